"""Builds the extension with its CUDA half over the emulated language, and the device that it finds in a CPU torch.

python build.py FOLDER: makes FOLDER/relu_ext, the package that runs on it, and FOLDER/_device*.so, to be loaded before
torch. What is up to date there is left alone.
"""

import importlib.util
import sys
from pathlib import Path

import torch
from setuptools import Distribution
from torch.utils.cpp_extension import CppExtension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
# What tests/cuda/emulator asks for; and kernels over it take g++ minutes at -O3.
EMULATED = ["-fno-strict-aliasing", "-Wno-unknown-pragmas", "-O1"]


def setup_py():
    """The project's build, so that both builds have the same flags and leave the same record."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def extension(name: str, sources: list[Path | str], flags: list[str]) -> CppExtension:
    return CppExtension(
        name,
        [str(ROOT / source) for source in sources],
        include_dirs=[str(HERE / "runtime"), str(HERE.parent / "emulator"), str(ROOT / "csrc")],
        define_macros=[("RELU_EXT_CUDA", None), ("C10_CUDA_NO_CMAKE_CONFIGURE_FILE", None)],
        extra_compile_args={"cxx": [*flags, *EMULATED], "nvcc": []},
        extra_link_args=["-fopenmp", f"-Wl,-rpath,{Path(torch.__file__).parent / 'lib'}"],
    )


def link_python(package: Path) -> None:
    package.mkdir(parents=True, exist_ok=True)
    for path in package.glob("*.py"):
        path.unlink()
    for path in (ROOT / "relu_ext").glob("*.py"):
        if path.name != "_build.py":
            (package / path.name).symlink_to(path)


def build(folder: Path) -> None:
    project = setup_py()
    project.Build.choice = project.Choice("emulated", None, "CUDA kernels on the CPU.")
    link_python(folder / "relu_ext")
    replaced = ROOT / "csrc" / "cuda" / "random.cpp"
    sources = [source for source in project.sources("*.cpp") if ROOT / source != replaced]
    command = project.Build(
        Distribution(
            {
                "ext_modules": [
                    extension("relu_ext._C", [*sources, HERE / "kernels.cpp", HERE / "random.cpp"], project.FLAGS),
                    extension("_device", [HERE / "device.cpp", HERE / "fallback.cpp"], project.FLAGS),
                ]
            }
        )
    )
    command.build_lib = str(folder)
    command.build_temp = str(folder / "objects")
    command.force = True  # leaves it to ninja, which knows every header, what is out of date
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    build(Path(sys.argv[1]).resolve())
