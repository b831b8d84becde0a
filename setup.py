"""Builds relu_ext's extension against the torch of the running Python.

python setup.py build_ext --inplace         beside the sources, for development
pip install --no-build-isolation .          into the environment

RELU_EXT_CUDA=auto|0|1 chooses whether the CUDA kernels are built (see choose), TORCH_CUDA_ARCH_LIST for which GPUs,
MAX_JOBS how many files are compiled at once.
"""

import os
import platform
import re
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError as error:
    raise SystemExit(
        f"relu_ext is built against the torch that it will run with, and none can be imported here ({error}). "
        "pip hides it in an isolated build. With torch, setuptools, ninja and pybind11 installed, use:\n\n"
        "    pip install --no-build-isolation ."
    ) from None

ROOT = Path(__file__).parent
# -fno-trapping-math lets g++ turn selections into vector blends, without a change to any result. -ffp-contract=fast
# fuses products with sums where the instruction set can: elu takes 0.7 of the time and loses no accuracy. Never
# -ffast-math: NaN and infinities are part of the contract.
# -falign-loops=64: these loops are a few instructions long, and one that crosses a cache line of code took up to twice
# the time in the first-level cache (AVX2 on an EPYC 7003).
# -fmacro-prefix-map: messages name files without the folders of this machine, so that the extension is the same byte
# for byte wherever it is built.
FLAGS = [
    *("-O3", "-g0", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=fast", "-falign-loops=64"),
    *("-fvisibility=hidden", "-fopenmp"),
    *(f"-fmacro-prefix-map={folder}/=" for folder in (ROOT.resolve(), Path(torch.__file__).parents[1])),
]
# With NVCC_APPEND_FLAGS=-lineinfo compute-sanitizer and Nsight name source lines, and the kernels are 3 times as large.
NVCC_FLAGS = ["-O3", "-Xcompiler=-fvisibility=hidden"]
# Turing to Blackwell; the newest of them also as PTX, which later GPUs compile when they load it.
DEFAULT_ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


class Nvcc(NamedTuple):
    """A CUDA compiler: its version ("13.0"), the GPUs it knows ("7.5"), and where its headers and libraries are."""

    version: str
    archs: Collection[str]
    include_dirs: list[str]
    library_dirs: list[str]


class Choice(NamedTuple):
    """What is built: for the CPU alone where ``cuda``, the CUDA version, is None.

    ``arch_list`` is the TORCH_CUDA_ARCH_LIST to set; None leaves the GPUs to torch.
    """

    cuda: str | None
    arch_list: str | None
    note: str


def choose(
    environ: Mapping[str, str], torch_cuda: str | None, torch_hip: str | None, nvcc: Nvcc | None, gpus: int
) -> Choice:
    """Chooses by what torch and nvcc are; the number of visible GPUs matters only for which of them is compiled.

    RELU_EXT_CUDA=0 is for the CPU alone, 1 (or FORCE_CUDA=1) fails where the CUDA kernels cannot be built, auto builds
    them where torch is a CUDA build and nvcc is there. Raises SystemExit with what to do.
    """
    wanted = environ.get("RELU_EXT_CUDA") or ("1" if environ.get("FORCE_CUDA") == "1" else "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"RELU_EXT_CUDA={wanted}: use auto, 0 or 1.")
    if wanted == "0":
        return Choice(None, None, "CPU only: RELU_EXT_CUDA=0.")
    if missing := what_is_missing(torch_cuda, torch_hip, nvcc):
        if wanted == "1":
            raise SystemExit(f"The CUDA kernels are wanted (RELU_EXT_CUDA=1 or FORCE_CUDA=1), but {missing}")
        return Choice(None, None, f"{'WARNING, ' if torch_cuda else ''}CPU only: {missing}")
    if nvcc.version.split(".")[0] != torch_cuda.split(".")[0]:
        raise SystemExit(
            f"nvcc is of CUDA {nvcc.version} and torch was built for CUDA {torch_cuda}: the first numbers must agree. "
            f"Set CUDA_HOME to a toolkit of CUDA {torch_cuda}, or install a torch built for CUDA {nvcc.version}, "
            "or set RELU_EXT_CUDA=0 to build for the CPU alone."
        )
    return Choice(
        nvcc.version,
        arch_list(environ, nvcc, gpus),
        f"With CUDA kernels: nvcc {nvcc.version}, torch for CUDA {torch_cuda}.",
    )


def what_is_missing(torch_cuda: str | None, torch_hip: str | None, nvcc: Nvcc | None) -> str | None:
    if torch_hip:
        return (
            f"torch was built for ROCm {torch_hip}, for which there are no kernels: its GPU tensors take "
            "torch's own. For an NVIDIA GPU install a CUDA build of torch."
        )
    if not torch_cuda:
        return (
            "torch is a CPU build. For the CUDA kernels install a CUDA build of torch "
            "(https://pytorch.org/get-started) and build again with --no-build-isolation."
        )
    if not nvcc:
        return (
            f"torch was built for CUDA {torch_cuda} and no nvcc is found. For the CUDA kernels install the toolkit "
            f"of CUDA {torch_cuda}, or set CUDA_HOME to the folder that has its bin/nvcc, and build again."
        )
    return None


def arch_list(environ: Mapping[str, str], nvcc: Nvcc, gpus: int) -> str | None:
    """The GPUs to compile for where torch would look for a visible one and, finding none, raise a bare IndexError."""
    asked = environ.get("TORCH_CUDA_ARCH_LIST")
    if gpus or asked not in (None, "", "native"):
        return None
    known = [arch for arch in DEFAULT_ARCHS if arch in nvcc.archs]
    if asked == "native" or not known:
        raise SystemExit(
            f"There is no GPU to compile for: TORCH_CUDA_ARCH_LIST is {asked or 'not set'}, none is visible, and nvcc "
            f"knows {', '.join(nvcc.archs)}. Set TORCH_CUDA_ARCH_LIST to the GPUs that will be used, such as 9.0."
        )
    return ";".join(known) + "+PTX"


def find_nvcc(cuda_home: str | None) -> Nvcc | None:
    """Asks the nvcc of a toolkit. Where bin/nvcc is a wrapper, the toolkit's other folders are not beside it."""
    command = Path(cuda_home or "", "bin", "nvcc")
    if not cuda_home or not command.exists():
        return None

    def ask(*arguments: str) -> str:
        answer = subprocess.run([command, *arguments], capture_output=True, text=True, check=True)
        return answer.stdout + answer.stderr

    folders = ask("--dryrun", "-x", "cu", "-c", os.devnull)
    return Nvcc(
        re.search(r"release (\d+\.\d+)", ask("--version"))[1],
        [f"{major}.{minor}" for major, minor in re.findall(r"^compute_(\d+)(\d)$", ask("--list-gpu-arch"), re.M)],
        re.findall(r'"-I([^"]+)"', re.search("INCLUDES=.*", folders)[0]),
        re.findall(r'"-L([^"]+)"', re.search("LIBRARIES=.*", folders)[0]),
    )


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob(pattern) if path.is_file())


def extension(choice: Choice, nvcc: Nvcc | None) -> Extension:
    name, cpp = "relu_ext._C", sources("*.cpp")
    # depends also names what goes into a source distribution: everything, also where it is made without CUDA.
    link = ["-fopenmp", "-s", "-Wl,--version-script=csrc/exported.map"]
    common = {"depends": sources("*"), "extra_link_args": link}
    if not choice.cuda:
        cpp = [path for path in cpp if not path.startswith("csrc/cuda/")]
        return cpp_extension.CppExtension(name, cpp, extra_compile_args=FLAGS, **common)
    if choice.arch_list:
        os.environ["TORCH_CUDA_ARCH_LIST"] = choice.arch_list
    archs = cpp_extension._get_cuda_arch_flags()  # torch adds none of its own to these
    return cpp_extension.CUDAExtension(
        name,
        cpp + sources("*.cu"),
        define_macros=[("RELU_EXT_CUDA", None)],
        include_dirs=nvcc.include_dirs,
        library_dirs=nvcc.library_dirs,
        extra_compile_args={"cxx": FLAGS, "nvcc": NVCC_FLAGS + archs},
        **common,
    )


class Build(cpp_extension.BuildExtension):
    """Writes what the extension was built for next to it, where relu_ext looks before it loads it."""

    choice: Choice

    def run(self):
        print(f"relu_ext: {self.choice.note}", flush=True)
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
            f"CUDA = {self.choice.cuda!r}\n"
            f"CUDA_ARCHS = {self.archs()!r}\n"
            f"CUDA_NOTE = {self.choice.note!r}\n"
        )

    def archs(self) -> tuple[str, ...]:
        """What nvcc was told to make: sm_90 is machine code, compute_120 is PTX."""
        if not self.choice.cuda:
            return ()
        made = re.findall(r",code=(\w+)", " ".join(self.extensions[0].extra_compile_args["nvcc"]))
        return tuple(sorted(made, key=lambda arch: int(re.search(r"\d+", arch)[0])))


if __name__ == "__main__":
    nvcc = find_nvcc(cpp_extension.CUDA_HOME)
    Build.choice = choose(os.environ, torch.version.cuda, torch.version.hip, nvcc, torch.cuda.device_count())
    setup(ext_modules=[extension(Build.choice, nvcc)], cmdclass={"build_ext": Build})
