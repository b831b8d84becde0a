"""Times the CUDA kernels in every tile worth trying: threads of a block, vectors of a thread, cache hints.

Each time stands beside that of a device-to-device copy of the same bytes in the same run, with a cold L2 cache. The
constants in csrc/cuda/kernels.cu are to be chosen from this: large tensors for the large tile, small ones for the small
tile and for the size from which the large one is better.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "benchmarks" / "sweep.cu"
PROGRAM = ROOT / "build" / "sweep"
MEGABYTES = (0.25, 1, 4, 8, 16, 32, 64, 256, 1024)
RESULTS = ROOT / "benchmarks" / "results" / "latest-{device}-sweep.json"
SHOWN = 5  # of the best configurations a step
Record = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--megabytes", nargs="+", type=float, default=MEGABYTES, help="of one tensor; default: %(default)s")
    add("--arch", default="native", help="nvcc's -arch; default: the GPU that is there")
    add("--build-only", action="store_true", help="compile and stop: needs no GPU")
    add("--json", type=Path, default=RESULTS, help="default: results/latest-{device}-sweep.json, with the GPU's name")
    return parser.parse_args(arguments)


def build(arch: str) -> None:
    PROGRAM.parent.mkdir(exist_ok=True)
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror", "all-warnings", f"-arch={arch}"]
    subprocess.run(["nvcc", *flags, "-o", PROGRAM, SOURCE], check=True)


def measure(megabytes: float) -> list[Record]:
    run = subprocess.run([PROGRAM, str(megabytes)], stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in run.stdout.splitlines()]


def bandwidth(record: Record) -> float:
    """GB/s, read and written."""
    return record["moved_bytes"] / record["microseconds"] / 1e3


def shipped_tiles() -> dict[str, tuple[int, int, str, str]]:
    """Large and Small of csrc/cuda/kernels.cu: threads, vectors, loads, stores."""
    text = (ROOT / "csrc" / "cuda" / "kernels.cu").read_text()
    tiles = {}
    for name, arguments in re.findall(r"using (\w+) = Tile<(.*?)>;", text):
        threads, vectors, *hints = (word.strip() for word in arguments.split(","))
        loads, stores = ["streaming" if "streaming" in hint else "plain" for hint in hints] + ["plain"] * (
            2 - len(hints)
        )
        tiles[name] = (int(threads), int(vectors), loads, stores)
    return tiles


def configuration(record: Record) -> tuple[int, int, str, str]:
    return record["threads"], record["vectors"], record["loads"], record["stores"]


def table(records: list[Record]) -> Table:
    """Of one size: the copy, then the best and the shipped configurations of each step."""
    copy, *others = records
    title = (
        f"{copy['tensor_bytes'] / 2**20:g} MB; a copy takes {copy['microseconds']:.1f} us, {bandwidth(copy):.0f} GB/s"
    )
    result = Table(title=title)
    for heading in ("step", "dtype", "threads", "vectors", "loads", "stores", "us", "GB/s", "of copy", "shipped"):
        result.add_column(
            heading, justify="right" if heading in ("threads", "vectors", "us", "GB/s", "of copy") else "left"
        )
    shipped = {tile: name for name, tile in shipped_tiles().items()}
    others.sort(key=lambda r: (r["step"], r["dtype"], r["microseconds"]))
    for (step, dtype), group in groupby(others, key=lambda r: (r["step"], r["dtype"])):
        ranked = list(group)
        rows = [r for rank, r in enumerate(ranked) if rank < SHOWN or configuration(r) in shipped]
        for r in rows:
            share = f"{bandwidth(r) / bandwidth(copy):.1%}"
            cells = (*configuration(r), f"{r['microseconds']:.1f}", f"{bandwidth(r):.0f}", share)
            name = shipped.get(configuration(r), "")
            result.add_row(step, dtype, *map(str, cells), name, end_section=r is rows[-1])
    return result


def main() -> int:
    options = parse()
    progress = Console(stderr=True)
    with progress.status("compiling, about a minute"):
        build(options.arch)
    if options.build_only:
        return 0
    sizes = [measure(size) for size in track(options.megabytes, "sweeping", console=progress, transient=True)]
    console = Console(width=None if sys.stdout.isatty() else 130, highlight=False)
    for records in sizes:
        console.print(table(records))
    import _checkout  # noqa: F401
    import torch
    from machine import describe, file_name

    device = torch.device("cuda")
    about = describe(device, threads=1)
    path = Path(str(options.json).format(device=file_name(device)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**about, "records": list(chain.from_iterable(sizes))}, indent=1) + "\n")
    console.print(f"{about['machine']['gpu']}; written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
