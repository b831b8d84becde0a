"""Times the CPU kernels of two source trees side by side, in one process and in turns: python builds.py BEFORE [AFTER]

BEFORE and AFTER are folders like csrc/ (of another commit: `git worktree add ../before COMMIT`); AFTER is this one
where it is not given. Prints the time of AFTER over that of BEFORE, and of both over that of a copy of a tensor.
How far outputs lie from inputs, in a page of memory, decides as much as the code does (--apart).
What changes by a factor of 1.6 within seconds is a virtual machine's clock: only quotients of neighbours say anything.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import _checkout  # noqa: F401
import harness
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from setup import FLAGS

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
SOURCES = ("kernels", "fused", "prelu", "gated", "monitor", "isa")
KERNELS = ["relu", "relu6", "hardtanh", "threshold", "leaky_relu", "elu", "relu_squared", "prelu", "reglu"]
KERNELS += ["add_relu", "bias_relu", "scale_shift_relu", "scale_shift_add_relu", "fma_relu", "relu_dropout"]
STEPS = ("forward", "with bits", "backward")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK_SECONDS = 1e-3
PAGE = 4096


class Arrays(ctypes.Structure):
    """That of tests/portable/works.h."""

    NAMES = "input other grad scale shift output grad_input grad_other bits totals counts"
    _fields_ = [(name, ctypes.c_void_p) for name in NAMES.split()]


def compiled(source: Path, csrc: Path) -> Path:
    """An object file, made once for what the preprocessor makes of the source."""
    command = ["g++", "-std=c++17", *FLAGS, "-fPIC", f"-I{csrc}", str(source)]
    text = subprocess.run([*command, "-E", "-P"], check=True, capture_output=True).stdout
    folder = ROOT / "build" / "builds"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{source.stem}-{hashlib.sha256(text).hexdigest()[:16]}.o"
    if not target.exists():
        subprocess.run([*command, "-c", "-o", str(target)], check=True)
    return target


def library(csrc: Path, folder: Path) -> ctypes.CDLL:
    sources = [HERE / "builds.cpp", *(csrc / "cpu" / f"{name}.cpp" for name in SOURCES)]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(lambda source: str(compiled(source, csrc)), sources))
    subprocess.run(["g++", "-shared", "-fopenmp", "-o", str(folder / "kernels.so"), *objects], check=True)
    loaded = ctypes.CDLL(str(folder / "kernels.so"))
    loaded.seconds.restype = ctypes.c_double
    return loaded


def in_page(tensor: torch.Tensor, place: int) -> torch.Tensor:
    """A copy, so many bytes from the beginning of a page."""
    memory = torch.empty(place + tensor.nbytes + PAGE, dtype=torch.uint8)
    first = -memory.data_ptr() % PAGE + place
    return memory[first : first + tensor.nbytes].view(tensor.dtype).copy_(tensor)


def samples(libraries: list[ctypes.CDLL], kernel: str, step: str, dtype: str, options: argparse.Namespace):
    """Seconds of each round, of BEFORE, AFTER and a copy."""
    numel, inner = options.elements, options.inner
    channels = options.channels
    make = {"dtype": DTYPES[dtype]}
    tensors = [in_page(torch.randn(numel, **make), 0) for _ in range(3)]
    tensors += [torch.randn(channels, **make) for _ in range(2)]
    tensors += [in_page(torch.zeros(numel, **make), options.apart) for _ in range(3)]
    tensors += [torch.randint(256, (numel // 8 + 1,), dtype=torch.uint8), torch.zeros(2 * channels, dtype=torch.double)]
    arrays = Arrays(*(tensor.data_ptr() for tensor in tensors))
    sizes = [ctypes.c_int64(number) for number in (numel, channels, inner)]
    place = (STEPS.index(step), list(DTYPES).index(dtype), *sizes, ctypes.byref(arrays))

    def seconds(loaded: ctypes.CDLL, name: str, calls: int) -> float:
        return loaded.seconds(name.encode(), *place, ctypes.c_int64(tensors[0].nbytes), calls)

    calls = max(1, int(BLOCK_SECONDS / seconds(libraries[0], kernel, 1)))
    competitors = {"before": (libraries[0], kernel), "after": (libraries[1], kernel), "copy": (libraries[0], "copy")}
    found: dict[str, list[float]] = {name: [] for name in competitors}
    for _ in range(options.rounds):
        for name, (loaded, called) in competitors.items():
            found[name].append(seconds(loaded, called, calls))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("before", type=Path)
    add("after", type=Path, nargs="?", default=ROOT / "csrc")
    add("--kernels", nargs="+", choices=KERNELS, default=KERNELS, metavar="NAME", help=f"of: {', '.join(KERNELS)}")
    add("--steps", nargs="+", choices=STEPS, default=STEPS)
    add("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    add("--elements", type=int, default=2**17, metavar="N", help="default: %(default)s")
    add("--channels", type=int, default=64, metavar="N", help="default: %(default)s")
    add("--inner", type=int, default=1024, metavar="N", help="elements of a channel side by side; default: %(default)s")
    add(
        "--apart",
        type=int,
        default=64,
        metavar="BYTES",
        help="from an input's place in its page to an output's; default: %(default)s, as glibc places one tensor of a "
        "power of two after another",
    )
    add("--rounds", type=int, default=60, metavar="N", help="default: %(default)s")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    with tempfile.TemporaryDirectory() as before, tempfile.TemporaryDirectory() as after:
        with console.status("compiling"):
            libraries = [library(options.before.resolve(), Path(before)), library(options.after.resolve(), Path(after))]
        table = Table("kernel", "step", "dtype", "after / before", "20 to 80 %", "before / copy", "after / copy")
        cells = [(k, s, d) for k in options.kernels for s in options.steps for d in options.dtypes]
        for cell in track(cells, transient=True, console=console):
            found = samples(libraries, *cell, options)
            pairs = [("after", "before"), ("before", "copy"), ("after", "copy")]
            change, *over_copy = (harness.quotients(found, *pair) for pair in pairs)
            spread = f"{change['q20']:.2f} to {change['q80']:.2f}"
            table.add_row(*cell, f"{change['median']:.2f}", spread, *(f"{own['median']:.2f}" for own in over_copy))
    console.print(table)


if __name__ == "__main__":
    main()
