"""What is shipped: the files of both archives, what the extension exports, the package at work where it is installed.

The wheel's extension is a copy of the one under test. `make package` has pip compile it, and gives both archives here.
"""

import ast
import email
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import relu_ext
from relu_ext import _C

ROOT = Path(__file__).resolve().parents[1]
NAME = f"relu_ext-{relu_ext.__version__}"
TYPES = {"relu_ext/py.typed", "relu_ext/_C.pyi"}
BUILT = {"relu_ext/_build.py", f"relu_ext/_C{sysconfig.get_config_var('EXT_SUFFIX')}"}
PACKAGE = {f"relu_ext/{path.name}" for path in (ROOT / "relu_ext").glob("*.py")} - BUILT | TYPES
DOCUMENTS = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md"}

# python -c BACKEND EXTENSION build_sdist|build_wheel FOLDER: setuptools' part of `pip install`, but for the compiler's.
BACKEND = """
import shutil, sys
from pathlib import Path
from setuptools import build_meta
from torch.utils.cpp_extension import BuildExtension

extension, step, folder = sys.argv[1:]

def set_down(command):
    path = Path(command.get_ext_fullpath("relu_ext._C"))
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(extension, path)

BuildExtension.build_extensions = set_down
getattr(build_meta, step)(folder)
"""


def python(*arguments, executable=sys.executable, **keywords):
    result = subprocess.run([executable, *map(str, arguments)], capture_output=True, text=True, **keywords)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def make_archives(folder):
    """The source distribution of a copy of this clone, built files and all; and, of that alone, the wheel."""
    leave_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "venv", "build", "dist")
    shutil.copytree(ROOT, folder / "clone", ignore=leave_out)
    python("-c", BACKEND, _C.__file__, "build_sdist", folder, cwd=folder / "clone")
    shutil.unpack_archive(folder / f"{NAME}.tar.gz", folder / "unpacked", filter="data")
    python("-c", BACKEND, _C.__file__, "build_wheel", folder, cwd=folder / "unpacked" / NAME)


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of both archives, which pytest-xdist's workers share."""
    if "DIST" in os.environ:
        return Path(os.environ["DIST"])
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "dist"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            make_archives(folder)
    return folder


@pytest.fixture
def wheel(dist):
    (path,) = dist.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture
def extension(wheel, tmp_path):
    (name,) = (name for name in wheel.namelist() if name.endswith(".so"))
    return wheel.extract(name, tmp_path)


def test_source_distribution(dist):
    """The package, what the extension is made of, CUDA's part included, and what says how."""
    with tarfile.open(dist / f"{NAME}.tar.gz") as archive:
        files = {member.name.removeprefix(f"{NAME}/") for member in archive if member.isfile()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*")}
    made = {"PKG-INFO", "setup.cfg", *(name for name in files if name.startswith("relu_ext.egg-info/"))}
    assert files == PACKAGE | sources | DOCUMENTS | made | {"setup.py", "pyproject.toml", "MANIFEST.in"}


def test_wheel(wheel):
    """The package with its types and its extension, no more."""
    info = {f"{NAME}.dist-info/{name}" for name in ("METADATA", "WHEEL", "RECORD", "top_level.txt")}
    assert set(wheel.namelist()) == PACKAGE | BUILT | info
    assert all(wheel.read(name) == (ROOT / name).read_bytes() for name in PACKAGE)
    metadata = email.message_from_bytes(wheel.read(f"{NAME}.dist-info/METADATA"))
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert [re.match(r"[\w-]+", line)[0] for line in required] == ["torch"]
    assert (metadata["Name"], metadata["Version"]) == ("relu_ext", relu_ext.__version__)
    tags = email.message_from_bytes(wheel.read(f"{NAME}.dist-info/WHEEL"))
    python_tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert tags["Tag"] == f"{python_tag}-{python_tag}-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"


def symbols(extension, which):
    lines = subprocess.run(["nm", "-D", which, extension], check=True, capture_output=True, text=True).stdout
    return [line.split()[-1].partition("@")[0] for line in lines.splitlines()]


@pytest.mark.skipif(not shutil.which("nm"), reason="no nm in PATH")
def test_symbols(extension):
    """Nothing that could stand for a function of another library; nothing that makes a process or a connection."""
    assert symbols(extension, "--defined-only") == ["PyInit__C"]
    reach = re.compile(r"socket|connect|bind|listen|getaddrinfo|system|popen|v?fork|exec[lv]\w*|posix_spawnp?|dlopen")
    assert [name for name in symbols(extension, "--undefined-only") if reach.fullmatch(name)] == []


@pytest.mark.skipif(relu_ext.build_info()["cuda"] is not None, reason="nvcc puts names of temporary files into it")
def test_no_folder_of_this_machine(extension):
    """An extension that was compiled elsewhere of the same sources is the same, byte for byte."""
    built = Path(extension).read_bytes()
    assert built == Path(_C.__file__).read_bytes()
    assert not any(str(folder).encode() in built for folder in (ROOT, Path(torch.__file__).parents[1]))


# In another process, which may neither connect nor start another.
USE = """
import socket, sys

def refuse(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn")):
        raise PermissionError(event)

sys.addaudithook(refuse)
try:
    socket.socket()
except PermissionError:
    print("refused")

import torch
from torch import nn

import relu_ext

def train(swap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.PReLU(), nn.Linear(32, 4), nn.ReLU6())
    swap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 8)).square().mean()
        loss.backward()
        optimizer.step()
    return [loss, *model.parameters()]

ours = train(lambda model: print(list(relu_ext.convert(model)), list(relu_ext.fuse(model))))
assert all(map(torch.equal, ours, train(lambda model: None)))
with relu_ext.installed():
    assert all(map(torch.equal, ours, train(relu_ext.Monitor)))
print(relu_ext.__file__)
"""


def test_installed_elsewhere(dist, tmp_path):
    """In an environment of its own, which sees this one's torch."""
    pytest.importorskip("pip", reason="pip is not installed")
    venv.create(tmp_path / "venv", symlinks=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    (archive,) = dist.glob("*.whl")
    executable = tmp_path / "venv" / "bin" / "python"
    python("-m", "pip", "--python", executable, "install", "--no-deps", "--no-index", archive.resolve())
    lines = python("-I", "-c", USE, executable=executable, cwd=tmp_path).splitlines()
    assert lines == ["refused", "['1', '3', '5'] ['1']", str(site / "relu_ext" / "__init__.py")]


# What runs text as code, and in which function: definitions of this package, and forwards that fuse rewrites.
RUN_AS_CODE = {
    ("functional.py", "decorate", "exec"),
    ("functional.py", "decorate", "compile"),
    ("rewriting.py", "_of_tensors", "exec"),
    ("rewriting.py", "rewritten_class", "exec"),
    ("rewriting.py", "rewritten_class", "compile"),
    ("rewriting.py", "add", "importlib.import_module"),  # of a function that the forward already has
    ("source.py", "_compiled", "compile"),
}
CALLS = {"eval", "exec", "compile", "open", "__import__", "importlib.import_module", "torch.load", "torch.hub.load"}
MODULES = {"asyncio", "builtins", "ctypes", "http", "marshal", "multiprocessing", "os", "pickle", "runpy", "shutil"}
MODULES |= {"socket", "ssl", "subprocess", "tempfile", "urllib"}


def enclosing_function(tree, node):
    functions = [outer for outer in ast.walk(tree) if isinstance(outer, ast.FunctionDef)]
    around = [outer.name for outer in functions if outer.lineno <= node.lineno <= outer.end_lineno]
    return around[-1] if around else ""  # the innermost


def test_input_is_no_code():
    called, imported = set(), set()
    for path in (ROOT / "relu_ext").glob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in CALLS:
                called.add((path.name, enclosing_function(tree, node), name))
            elif isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    assert called == RUN_AS_CODE
    assert "torch" in imported and imported & MODULES == set()


PINNED = re.compile(r"[\w-]+==[\w.]+")


def test_requirements_are_pinned():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert "torch" in requirements[0] and [line for line in requirements if not PINNED.fullmatch(line)] == []


@pytest.mark.skipif(not shutil.which("make"), reason="no make in PATH")
def test_what_make_installs_is_pinned():
    environments = [".venv/ready", ".venv-check/ready", ".venv-cuda/ready", "compat/ready"]
    command = ["make", "--dry-run", "--always-make", "PYTHON=false", "PY=false", "COMPAT=compat", *environments]
    outer = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES"}  # of the make that runs these tests
    environment = {name: value for name, value in os.environ.items() if name not in outer}
    commands = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
    installs = re.findall(r"pip install -q (.*)", commands.replace("\\\n", "").replace("-r requirements.txt", ""))
    assert len(installs) == len(environments)
    assert [word for line in installs for word in line.split() if not PINNED.fullmatch(word)] == []
