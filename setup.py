"""Builds relu_ext's extension against the torch of the running Python.

python setup.py build_ext --inplace         beside the sources, for development
pip install --no-build-isolation .          into the environment
"""

import platform
import subprocess
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    raise SystemExit(
        f"relu_ext is built against the torch that it will run with, and none can be imported here ({error}). "
        "pip hides it in an isolated build. With torch, setuptools, ninja and pybind11 installed, use:\n\n"
        "    pip install --no-build-isolation ."
    ) from None

ROOT = Path(__file__).parent
# -fno-trapping-math lets g++ turn selections into vector blends, without a change to any result; -ffp-contract=off
# keeps results equal on every instruction set. Never -ffast-math: NaN and infinities are part of the contract.
# -falign-loops=64: these loops are a few instructions long, and one that crosses a cache line of code took up to twice
# the time in the first-level cache (AVX2 on an EPYC 7003).
FLAGS = [
    *("-O3", "-g0", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off", "-falign-loops=64"),
    *("-fvisibility=hidden", "-fopenmp"),
]


def relative(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern))


class Build(BuildExtension):
    """Writes what the extension was built for next to it, where relu_ext looks before it loads it."""

    def run(self):
        super().run()
        package = ROOT if self.inplace else Path(self.build_lib)
        (package / "relu_ext" / "_build.py").write_text(self.record())

    def record(self) -> str:
        compiler = subprocess.run([*self.compiler.compiler_cxx[:1], "--version"], capture_output=True, text=True).stdout
        return (
            '"""Written by setup.py: what the extension beside this file was built for."""\n\n'
            f"TORCH = {str(torch.__version__)!r}\n"
            f"PYTHON = {platform.python_version_tuple()[:2]!r}\n"
            f"COMPILER = {compiler.splitlines()[0]!r}\n"
            "CUDA = None\n"
            "CUDA_ARCHS = ()\n"
        )


setup(
    ext_modules=[
        CppExtension(
            "relu_ext._C",
            relative("*.cpp"),
            depends=relative("*.h"),
            extra_compile_args=FLAGS,
            extra_link_args=["-fopenmp", "-s"],
        )
    ],
    cmdclass={"build_ext": Build},
)
