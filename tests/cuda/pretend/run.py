"""Runs the project's tests on a pretended CUDA device, in a CPU build of torch: python run.py [pytest's arguments].

All tests that take `device`, and test_pretend.py. Builds what it needs below build/pretend: about a minute the first
time.
"""

import ctypes
import os
import runpy
import sys
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILT = ROOT / "build" / "pretend"
sys.path.append(str(ROOT / "tests"))
import variant  # noqa: E402


def torch_cuda() -> str | None:
    """The CUDA version that torch was built for, without importing it."""
    (package,) = find_spec("torch").submodule_search_locations
    return runpy.run_path(str(Path(package) / "version.py"))["cuda"]


def load_device() -> None:
    """device.cpp, before torch, which asks once, when it is imported, whether there are CUDA hooks."""
    ctypes.CDLL(next(BUILT.glob("_device*.so")), ctypes.RTLD_GLOBAL)


def main() -> int:
    if torch_cuda():
        print("LEFT OUT, the tests on a pretended CUDA device: this torch is a CUDA build, and it needs a CPU build.")
        return 0
    print("building the extension over emulated CUDA", flush=True)
    if not variant.run_build(HERE / "build.py", BUILT):
        return 1
    sys.path[:1] = [str(BUILT), str(HERE)]
    import pytest

    os.chdir(ROOT)
    options = ["-p", "plugin", "-c", str(ROOT / "pyproject.toml"), "-o", "testpaths=tests/test_*.py tests/cuda/pretend"]
    return pytest.main([*options, *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
