# make bench   builds all it needs and runs the benchmark        make test    the same for the tests
# make check   formatters and linters                            make clean   removes what was built
#
# PYTHON (default python3) is used as it is, without a network, where it has torch and the other packages below; otherwise
# .venv is made from it and requirements.txt. ARGS is handed on: make test ARGS="-k layouts", make bench ARGS=--quick.

PYTHON ?= python3
ARGS ?=

PACKAGES := torch numpy ninja pybind11 setuptools pytest rich matplotlib scikit-learn
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
LINTERS := ruff==0.17.5 clang-format==23.1.5

.PHONY: test bench build check format clean
test: $(BUILT)
	$(PY) -m pytest $(ARGS)

bench: $(BUILT)
	$(PY) benchmarks/run.py $(ARGS)
	$(PY) benchmarks/plot.py
	$(PY) benchmarks/train_digits.py

build: $(BUILT)

$(BUILT): $(SOURCES) $(READY)
	@mkdir -p build; echo "building the extension, about a minute; the compiler's output goes to build/log"
	@$(PY) setup.py build_ext --inplace --force >build/log 2>&1 || { cat build/log; exit 1; }

.venv/ready: requirements.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -q -r requirements.txt
	touch $@

check: .venv-lint/ready
	.venv-lint/bin/ruff check .
	.venv-lint/bin/ruff format --check .
	.venv-lint/bin/clang-format --dry-run -Werror $(filter csrc/%,$(SOURCES))

format: .venv-lint/ready
	.venv-lint/bin/ruff check --fix .
	.venv-lint/bin/ruff format .
	.venv-lint/bin/clang-format -i $(filter csrc/%,$(SOURCES))

.venv-lint/ready: Makefile
	$(PYTHON) -m venv .venv-lint
	.venv-lint/bin/python -m pip install -q $(LINTERS)
	touch $@

clean:
	rm -rf build dist *.egg-info relu_ext/*.so $(BUILT) .venv .venv-lint
