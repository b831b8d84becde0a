"""Builds the extension with its CUDA half over the emulated language, and the device that it finds in a CPU torch.

python build.py FOLDER: makes FOLDER/relu_ext, the package that runs on it, and FOLDER/_device*.so, to be loaded before
torch. What is up to date there is left alone.
"""

import sys
from pathlib import Path

import torch
from torch.utils.cpp_extension import CppExtension

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
sys.path.append(str(ROOT / "tests"))
import variant  # noqa: E402

# What tests/cuda/emulator asks for; and kernels over it take g++ minutes at -O3.
EMULATED = ["-fno-strict-aliasing", "-Wno-unknown-pragmas", "-O1"]


def extension(name: str, sources: list[Path | str], flags: list[str]) -> CppExtension:
    return CppExtension(
        name,
        [str(ROOT / source) for source in sources],
        include_dirs=[str(HERE / "runtime"), str(HERE.parent / "emulator"), str(ROOT / "csrc")],
        define_macros=[("RELU_EXT_CUDA", None), ("C10_CUDA_NO_CMAKE_CONFIGURE_FILE", None)],
        extra_compile_args={"cxx": [*flags, *EMULATED], "nvcc": []},
        extra_link_args=["-fopenmp", f"-Wl,-rpath,{Path(torch.__file__).parent / 'lib'}"],
    )


def main(folder: Path) -> None:
    project = variant.setup_py()
    project.Build.choice = project.Choice("emulated", None, "CUDA kernels on the CPU.")
    replaced = ROOT / "csrc" / "cuda" / "random.cpp"
    sources = [source for source in project.sources("*.cpp") if ROOT / source != replaced]
    extensions = [
        extension("relu_ext._C", [*sources, HERE / "kernels.cpp", HERE / "random.cpp"], project.FLAGS),
        extension("_device", [HERE / "device.cpp", HERE / "fallback.cpp"], project.FLAGS),
    ]
    variant.build(project, folder, extensions)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
