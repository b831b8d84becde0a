# make bench        builds all it needs and runs the benchmark        make test    the same for the tests
# make check        style, and the CUDA kernels proved without a GPU   make format  applies the style
# make check-all    the same for every GPU that nvcc knows, the kernels under sanitizers, bugs planted in them, and the
#                   portable CPU kernels on x86-64 and aarch64
# make mutants      bugs planted in kernels, graph code and Python, which the tests must catch: two hours
# make fuzz         tests/test_properties.py with other examples each time, for MINUTES (10)
# make sanitize     the tests with sanitizers in the extension           make leaks   100,000 calls of each operation
# make clean        removes what was built
# make package      a source distribution and its wheel, in dist/     make compat   the tests with the oldest torch
# make gpu          on a machine with a GPU: build, tests, compute-sanitizer, benchmark; ARGS names parts
# make cuda-build   builds and imports the CUDA extension where there is no GPU, against a CUDA torch
#
# PYTHON (default python3) is used as it is, without a network, where it has torch and the other packages below; otherwise
# .venv is made from it and requirements.txt. ARGS is handed on: make test ARGS="-k layouts", make bench ARGS=--quick.

PYTHON ?= python3
ARGS ?=

PACKAGES := torch numpy ninja pybind11 setuptools pytest hypothesis rich matplotlib scikit-learn
HAS_ALL := import sys, importlib.metadata as m; v = [m.version(p) for p in sys.argv[1:]]; \
  sys.exit(not (2, 11) <= tuple(map(int, v[0].split(".")[:2])) < (2, 14))

ifeq ($(shell $(PYTHON) -c '$(HAS_ALL)' $(PACKAGES) 2>/dev/null && echo yes),yes)
  PY := $(PYTHON)
  READY :=
else
  PY := .venv/bin/python
  READY := .venv/ready
endif
# ninja is a program: it stands beside that python.
export PATH := $(shell $(PY) -c 'import sysconfig; print(sysconfig.get_path("scripts"))' 2>/dev/null || echo $(CURDIR)/.venv/bin):$(PATH)

# setup.py writes this file when it has built the extension. It is out of date also when it names another torch or Python.
BUILT := relu_ext/_build.py
ifneq ($(shell $(PY) -c 'import relu_ext' 2>/dev/null && echo yes),yes)
  .PHONY: $(BUILT)
endif

SOURCES := setup.py $(shell find csrc -type f)
STYLED := $(filter-out %.map,$(filter csrc/%,$(SOURCES))) $(shell find tests benchmarks -name '*.h' -o -name '*.cpp' -o -name '*.cu')
# pip's packages for `check`; nvdisasm reads the machine code that nvcc makes.
CHECKERS := ruff==0.17.5 clang-format==23.1.5 nvidia-cuda-nvdisasm==13.5.37 \
  $(shell grep -E '^(numpy|pytest|pytest-xdist|rich)==' requirements.txt)
CHECK := .venv-check/bin
# The oldest that are supported. PyPI's build of that torch is for CUDA 13.0.
TORCH := 2.11.0
SETUPTOOLS := 70.1.0

# Tests run in as many processes, where there is what that takes.
WORKERS = $(shell $(PY) -c 'import xdist' 2>/dev/null && echo '-n 2')

.PHONY: test fuzz leaks sanitize bench build check check-style check-mutants check-kernels check-machine-code check-device
.PHONY: check-portable check-all sanitize-kernels mutants mutants-cuda cuda-build package compat gpu format clean
test: $(BUILT)
	$(PY) -m pytest $(WORKERS) $(ARGS)

# As long as MINUTES says, about 100 examples a second on one core; a failure ends it. ARGS: --seed, --only PROPERTY ...
MINUTES := 10
fuzz: $(BUILT)
	$(PY) tests/fuzz.py --minutes $(MINUTES) $(ARGS)

bench: $(BUILT)
	$(PY) benchmarks/run.py $(ARGS)
	$(PY) benchmarks/plot.py
	$(PY) benchmarks/train_digits.py

build: $(BUILT)

$(BUILT): $(SOURCES) $(READY)
	@mkdir -p build; echo "building the extension, about a minute; the compiler's output goes to build/log"
	@$(PY) setup.py build_ext --inplace --force >build/log 2>&1 || { cat build/log; exit 1; }
	@grep '^relu_ext: ' build/log

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

SAMPLED := -p sample --one-in 4
check: check-device check-kernels check-machine-code check-style check-mutants

check-style: .venv-check/ready
	$(CHECK)/ruff check .
	$(CHECK)/ruff format --check .
	$(CHECK)/clang-format --dry-run -Werror $(STYLED)

# The CUDA kernels in emulation.
check-kernels: .venv-check/ready
	$(CHECK)/python -m pytest --confcutdir=tests/cuda tests/cuda/test_emulator.py
	$(CHECK)/python tests/cuda/kernels.py plain -n 2

# The same with AddressSanitizer and UndefinedBehaviorSanitizer, which takes five minutes.
sanitize-kernels: .venv-check/ready
	$(CHECK)/python tests/cuda/kernels.py sanitized -n 2

# Where there is no nvcc it says so.
check-machine-code: .venv-check/ready
	$(CHECK)/python tests/cuda/machine_code.py $(ARCHS)

# One in four of the tests of the whole extension, on a device that is pretended; all for check-all.
check-device: $(BUILT)
	PYTHONPATH=tests $(PY) tests/cuda/pretend/run.py $(WORKERS) $(SAMPLED)

# Bugs planted to try the tests take longer than all of that: here they must only fit the source.
check-mutants: .venv-check/ready
	$(CHECK)/python tests/cuda/mutants.py --fit
	$(CHECK)/python tests/mutants.py --fit

mutants: mutants-cuda
	$(PY) tests/mutants.py

mutants-cuda: .venv-check/ready
	$(CHECK)/python tests/cuda/mutants.py

# What g++ makes of the kernels without their instruction sets, for this processor and another: three minutes.
check-portable: .venv-check/ready
	$(CHECK)/python tests/portable/check.py

check-all: ARCHS := all
check-all: SAMPLED :=
check-all: check sanitize-kernels mutants-cuda check-portable

# Of what the compiler can see. Its build takes six minutes of one core, the first time; the tests half an hour.
sanitize: $(READY) sanitize-kernels
	$(PY) tests/sanitized/run.py memory $(WORKERS) $(ARGS)
	$(PY) tests/sanitized/run.py threads

leaks: $(BUILT)
	LEAK_CALLS=100000 $(PY) -m pytest $(WORKERS) tests/test_memory.py -k leave $(ARGS)

cuda-build:
	@if $(PYTHON) -c 'import sys, torch; sys.exit(not torch.version.cuda)' 2>/dev/null; then \
	  $(MAKE) --no-print-directory build/cuda/ready CUDA_PY=$(PYTHON); else \
	  $(MAKE) --no-print-directory .venv-cuda/ready && $(MAKE) --no-print-directory build/cuda/ready CUDA_PY=.venv-cuda/bin/python; fi

.PHONY: build/cuda/ready
build/cuda/ready:
	@mkdir -p build/cuda; echo "building for CUDA; the compiler's output goes to build/cuda/log"
	@PATH="$(abspath $(dir $(CUDA_PY))):$$PATH" RELU_EXT_CUDA=1 $(CUDA_PY) setup.py build --build-base build/cuda --build-lib build/cuda/lib >build/cuda/log 2>&1 \
	  || { cat build/cuda/log; exit 1; }
	$(CUDA_PY) tests/cuda/built.py build/cuda/lib

.venv-cuda/ready: requirements.txt
	@echo "$(PYTHON) has no CUDA build of torch: downloading one, several GB, into .venv-cuda"
	$(PYTHON) -m venv .venv-cuda
	.venv-cuda/bin/python -m pip install -q torch==$(TORCH) setuptools==$(SETUPTOOLS) \
	  $(shell grep -E '^(numpy|ninja|pybind11)==' requirements.txt)
	touch $@

# As for a release: pip compiles the wheel from the source distribution alone, and the tests of packaging get both. Five
# minutes of one core.
package: $(BUILT)
	rm -rf dist
	$(PY) -c 'from setuptools import build_meta; build_meta.build_sdist("dist")' >/dev/null
	$(PY) -m pip wheel -q --no-deps --no-build-isolation -w dist dist/*.tar.gz
	DIST=dist $(PY) -m pytest tests/test_packaging.py

# The tests and `package` for the CPU in an environment of its own: 5.3 GB, as PyPI's torch is for CUDA, and 25 minutes
# of one core.
# Others: make compat TORCH=2.13.0 SETUPTOOLS=84.2.1 PYTHON=python3.12
COMPAT := build/compat/$(notdir $(PYTHON))-torch-$(TORCH)
compat: $(COMPAT)/ready
	rm -rf $(COMPAT)/clone
	mkdir $(COMPAT)/clone
	git ls-files -z | xargs -0 cp --parents -pt $(COMPAT)/clone
	RELU_EXT_CUDA=0 $(MAKE) -C $(COMPAT)/clone PYTHON=$(abspath $(COMPAT)/venv/bin/python) test package

$(COMPAT)/ready: requirements.txt
	$(PYTHON) -m venv $(COMPAT)/venv
	$(COMPAT)/venv/bin/python -m pip install -q torch==$(TORCH) setuptools==$(SETUPTOOLS) \
	  $(shell grep '==' requirements.txt | grep -vE '^(torch|setuptools)==')
	touch $@

gpu: $(READY)
	$(PY) tests/gpu.py $(ARGS)

format: .venv-check/ready
	$(CHECK)/ruff check --fix .
	$(CHECK)/ruff format .
	$(CHECK)/clang-format -i $(STYLED)

.venv-check/ready: Makefile requirements.txt
	$(PYTHON) -m venv .venv-check
	$(CHECK)/python -m pip install -q $(CHECKERS)
	touch $@

clean:
	rm -rf build dist *.egg-info relu_ext/*.so $(BUILT) .venv .venv-check .venv-cuda
