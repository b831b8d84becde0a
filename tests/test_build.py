"""What setup.py chooses to build, and that the extension in use is what its record says."""

import ast
import importlib.util
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operations import OPERATIONS
from torch.utils import cpp_extension

import relu_ext
from relu_ext import _C

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("relu_ext_setup", ROOT / "setup.py")
setup = importlib.util.module_from_spec(spec)
spec.loader.exec_module(setup)


def nvcc(version, archs="7.5 8.0 8.6 8.7 8.8 8.9 9.0 10.0 11.0 10.3 12.0 12.1"):
    return setup.Nvcc(version, archs.split(), [], [])


def choose(environ=(), torch_cuda="13.0", torch_hip=None, nvcc=nvcc("13.0"), gpus=0):  # noqa: B008
    return setup.choose(dict(environ), torch_cuda, torch_hip, nvcc, gpus)


CPU, ERROR = "built for the CPU", "an error"
AUTO = [{}, {"RELU_EXT_CUDA": "auto"}, {"RELU_EXT_CUDA": ""}, {"FORCE_CUDA": "0"}, {"FORCE_CUDA": ""}]
OFF = [{"RELU_EXT_CUDA": "0"}, {"RELU_EXT_CUDA": "0", "FORCE_CUDA": "1"}]
ON = [{"RELU_EXT_CUDA": "1"}, {"FORCE_CUDA": "1"}, {"RELU_EXT_CUDA": "1", "FORCE_CUDA": "0"}]
# torch's CUDA, torch's ROCm and nvcc; what is built with auto and with 1; what an error or a warning must name.
MACHINES = {
    "CPU torch": (None, None, None, CPU, ERROR, ["CPU build", "CUDA build of torch", "--no-build-isolation"]),
    "CPU torch, nvcc": (None, None, nvcc("13.0"), CPU, ERROR, ["CPU build", "CUDA build of torch"]),
    "ROCm torch": (None, "6.4.43482", nvcc("13.0"), CPU, ERROR, ["ROCm 6.4.43482", "CUDA build of torch"]),
    "no nvcc": (
        "12.8",
        None,
        None,
        CPU,
        ERROR,
        ["no nvcc", "install the toolkit of CUDA 12.8", "CUDA_HOME"],
    ),
    "older nvcc": ("13.0", None, nvcc("12.8"), ERROR, ERROR, ["12.8", "13.0", "CUDA_HOME", "RELU_EXT_CUDA=0"]),
    "newer nvcc": ("12.6", None, nvcc("13.0"), ERROR, ERROR, ["12.6", "13.0", "CUDA_HOME", "RELU_EXT_CUDA=0"]),
    "another minor": ("13.0", None, nvcc("13.2"), "13.2", "13.2", []),
    "the same": ("13.0", None, nvcc("13.0"), "13.0", "13.0", []),
}


@pytest.mark.parametrize("gpus", [0, 1, 8])
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("environ", AUTO + OFF + ON, ids=str)
def test_choice(environ, machine, gpus):
    torch_cuda, torch_hip, compiler, auto, on, words = MACHINES[machine]
    expected = CPU if environ in OFF else on if environ in ON else auto
    if expected == ERROR:
        with pytest.raises(SystemExit) as error:
            choose(environ, torch_cuda, torch_hip, compiler, gpus)
        message = str(error.value)
    else:
        choice = choose(environ, torch_cuda, torch_hip, compiler, gpus)
        message = choice.note
        assert choice.cuda == (None if expected == CPU else expected)
        assert (choice.arch_list is None) == (expected == CPU or gpus > 0)
        assert message.startswith("With CUDA kernels") == (expected != CPU)
        assert message.startswith("WARNING") == (machine == "no nvcc" and environ in AUTO)
    wanted = ["RELU_EXT_CUDA=0"] if environ in OFF else words
    if auto == CPU and environ in ON:
        wanted = [*words, "RELU_EXT_CUDA=1 or FORCE_CUDA=1"]
    assert [word for word in wanted if word not in message] == []


@pytest.mark.parametrize("value", ["yes", "2", "AUTO", " 1", "cuda"])
def test_bad_value(value):
    for (torch_cuda, torch_hip, compiler, *_), gpus in itertools.product(MACHINES.values(), (0, 1)):
        with pytest.raises(SystemExit, match=f"RELU_EXT_CUDA={value}: use auto, 0 or 1"):
            choose({"RELU_EXT_CUDA": value, "FORCE_CUDA": "1"}, torch_cuda, torch_hip, compiler, gpus)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ("7.5 8.0 8.6 8.7 8.8 8.9 9.0 10.0 11.0 10.3 12.0 12.1", "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"),  # 13.0
        ("5.0 5.2 5.3 6.0 6.1 6.2 7.0 7.2 7.5 8.0 8.6 8.7 8.9 9.0", "7.5;8.0;8.6;8.9;9.0+PTX"),  # 12.6
        ("12.0 9.0", "9.0;12.0+PTX"),
        ("7.5", "7.5+PTX"),
    ],
)
def test_default_archs(known, expected, monkeypatch):
    """What nvcc knows of them, oldest first, the newest also as PTX; and torch reads the list as it is meant."""
    assert choose(nvcc=nvcc("13.0", known)).arch_list == expected
    assert choose({"TORCH_CUDA_ARCH_LIST": ""}, nvcc=nvcc("13.0", known)).arch_list == expected
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", expected)
    names = expected.replace(".", "").removesuffix("+PTX").split(";")
    codes = [*(f"{name},code=sm_{name}" for name in names), f"{names[-1]},code=compute_{names[-1]}"]
    assert cpp_extension._get_cuda_arch_flags() == sorted(f"-gencode=arch=compute_{code}" for code in codes)


@pytest.mark.parametrize("gpus", [0, 1, 8])
@pytest.mark.parametrize("archs", ["9.0", "8.0;9.0+PTX", "8.0 9.0", "Hopper", "9.0a"])
def test_users_archs_are_left_alone(archs, gpus):
    assert choose({"TORCH_CUDA_ARCH_LIST": archs}, gpus=gpus).arch_list is None


@pytest.mark.parametrize("environ", [{}, {"TORCH_CUDA_ARCH_LIST": ""}, {"TORCH_CUDA_ARCH_LIST": "native"}], ids=str)
def test_visible_gpus_are_torchs_to_choose(environ):
    assert choose(environ, gpus=1).arch_list is None


@pytest.mark.parametrize(
    ("environ", "compiler"), [({"TORCH_CUDA_ARCH_LIST": "native"}, nvcc("13.0")), ({}, nvcc("13.0", "5.0 7.0"))]
)
def test_nothing_to_compile_for(environ, compiler):
    with pytest.raises(SystemExit, match=r"(?s)none is visible.*Set TORCH_CUDA_ARCH_LIST"):
        choose(environ, nvcc=compiler)


# Asking nvcc

ANSWERS = """#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release 12.8, V12.8.93" ;;
  --list-gpu-arch) printf 'compute_75\\ncompute_90\\ncompute_100\\n' ;;
  --dryrun) echo '#$ INCLUDES="-I/toolkit/include"  ' >&2
            echo '#$ LIBRARIES=  "-L/toolkit/lib/stubs" "-L/toolkit/lib"' >&2 ;;
  *) exit 1 ;;
esac
"""


@pytest.fixture
def wrapper(tmp_path):
    """write(text): the path of a folder whose bin/nvcc is this script."""

    def write(text):
        path = tmp_path / "bin" / "nvcc"
        path.parent.mkdir()
        path.write_text(text)
        path.chmod(0o755)
        return str(tmp_path)

    return write


def test_nvcc_answers(wrapper):
    expected = ("12.8", ["7.5", "9.0", "10.0"], ["/toolkit/include"], ["/toolkit/lib/stubs", "/toolkit/lib"])
    assert setup.find_nvcc(wrapper(ANSWERS)) == expected


def test_no_nvcc(tmp_path):
    assert setup.find_nvcc(None) is None
    assert setup.find_nvcc(str(tmp_path)) is None


@pytest.mark.skipif(not shutil.which("nvcc"), reason="no nvcc in PATH")
def test_toolkit_behind_a_wrapper(wrapper):
    found = setup.find_nvcc(wrapper(f'#!/bin/sh\nexec {shutil.which("nvcc")} "$@"\n'))
    assert any(Path(folder, "cuda_runtime_api.h").exists() for folder in found.include_dirs)
    assert any(Path(folder, "libcudart.so").exists() for folder in found.library_dirs)
    assert {"8.0", "9.0"} <= set(found.archs)


# setup.py itself


def run_setup(**environ):
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environ}, capture_output=True, text=True)


def test_setup_stops_with_the_message():
    result = run_setup(RELU_EXT_CUDA="on")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1] == "RELU_EXT_CUDA=on: use auto, 0 or 1."
    assert "Traceback" not in result.stderr


@pytest.mark.skipif(torch.version.cuda is not None, reason="torch is a CUDA build")
def test_setup_on_a_cpu_torch():
    """Where CUDA_HOME names a toolkit or nothing at all."""
    for home in ("/usr/local/cuda", "/nowhere"):
        assert run_setup(CUDA_HOME=home).stdout.splitlines()[-1] == relu_ext.__version__
        assert "torch is a CPU build" in run_setup(CUDA_HOME=home, RELU_EXT_CUDA="1").stderr


def test_every_source_is_shipped():
    """A source distribution made with a CPU torch must build with a CUDA torch too."""
    extension = setup.extension(setup.Choice(None, None, ""), None)
    files = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    assert {"csrc/cuda/kernels.cu", "csrc/cuda/kernels.cuh", "csrc/kernels.h"} < files
    assert files <= set(extension.depends)
    assert not [source for source in extension.sources if "cuda" in source]


# The extension in use


def test_stub_names_what_the_extension_has():
    """One by one, but for the operations."""
    tree = ast.parse((ROOT / "relu_ext" / "_C.pyi").read_text())
    named = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    operations = {name for name in relu_ext.__all__ if hasattr(relu_ext.functional, name)}
    assert named - {"__getattr__"} | operations == {name for name in vars(_C) if not name.startswith("__")}


WITH_TORCH_ALONE = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1:]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())

import torch
from torch import nn

import relu_ext

model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 8), nn.ReLU6())
assert list(relu_ext.convert(model)) == ["1", "4"]
assert list(relu_ext.fuse(model, torch.randn(4, 8))) == ["1"]
with relu_ext.installed(), relu_ext.Monitor(model) as monitor:
    torch.relu(model(torch.randn(4, 8))).sum().backward()
assert monitor.to_dict()["4"]["channels"] == 8 and monitor.scalars()
for ask in (monitor.report, monitor.plot):
    try:
        ask()
    except ImportError as error:
        print(error)
assert not set(sys.argv[1:]) & set(sys.modules)
"""


def test_torch_is_all_that_it_needs():
    """Tables and pictures say what else they want."""
    refused = ["numpy", "scipy", "rich", "matplotlib", "sklearn", "transformers", "onnx", "expecttest", "pytest"]
    command = [sys.executable, "-W", "ignore", "-c", WITH_TORCH_ALONE, *refused]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    wanted = "relu_ext.Monitor needs {} for this: pip install relu_ext[bench]".format
    assert result.stdout.splitlines() == [wanted("rich"), wanted("matplotlib")]


def test_record_agrees_with_the_extension():
    info = relu_ext.build_info()
    built = info["cuda"] is not None
    assert (b".nv_fatbin" in Path(_C.__file__).read_bytes()) == built
    for operation, step in itertools.product([row for row in OPERATIONS if row.keep], ("forward", "backward")):
        operator = f"relu_ext::{operation.name}_{step}"
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(operator, "CUDA") == built
    assert info["cuda_note"].startswith("With CUDA kernels") == built
    if built:
        assert f"nvcc {info['cuda']}" in info["cuda_note"]
        assert info["cuda"].split(".")[0] == torch.version.cuda.split(".")[0]
        assert info["cuda_archs"]
        assert all(re.fullmatch(r"(sm|compute)_\d+a?", arch) for arch in info["cuda_archs"])
    else:
        assert info["cuda_archs"] == []
