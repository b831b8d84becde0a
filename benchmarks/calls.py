"""Shows what a call on a few elements is made of: instructions by who executes them, counted by valgrind.

A call's parts are the differences between the rows: `relu_` makes no output; a forward that is recorded makes the bits
and a node as well; backward runs it. What relu_ext itself executes, its gate and its kernel among it, is a column.
Counts of instructions are the same at every run; the time of a call is run.py's. Takes ten minutes: valgrind imports
torch for each row.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.benchmark import CallgrindStats, Timer

ELEMENTS = 64
SETUP = f"""
import sys
sys.path.insert(0, {os.path.dirname(os.path.dirname(os.path.abspath(__file__)))!r})
import torch
import relu_ext
relu, relu_ = {{relu}}
x, leaf, grad = torch.randn({ELEMENTS}), torch.randn({ELEMENTS}, requires_grad=True), torch.ones({ELEMENTS})
"""
SIDES = {"relu_ext": "(relu_ext.relu, relu_ext.relu_)", "torch": "(torch.relu, torch.relu_)"}
CALLS = {
    "in place, no output": "relu_(x)",
    "no grad": "relu(x)",
    "recorded": "relu(leaf)",
    "recorded, and backward": "relu(leaf).backward(grad)",
}
MEMORY = ("malloc", "free", "memalign", "operator new", "operator delete", "alloc_cpu")
# The first that fits is who executes it. A name is followed by its library.
WHO: dict[str, Callable[[str], bool]] = {
    "memory": lambda name: any(word in name for word in MEMORY),
    "relu_ext": lambda name: "relu_ext/_C" in name,
    "Python": lambda name: "libpython" in name or "bin/python" in name,
    "torch": lambda name: "torch/lib" in name,
    "system": lambda name: True,
}


def by_whom(stats: CallgrindStats, number: int) -> dict[str, float]:
    counts = dict.fromkeys(WHO, 0.0)
    for count, name in stats.stats(inclusive=False):
        counts[next(who for who, fits in WHO.items() if fits(name))] += count / number
    return counts


def main(number: int) -> None:
    console = Console(width=120)
    title = f"instructions of one call, {ELEMENTS} elements, torch {torch.__version__}"
    table = Table("call", "", "all", *WHO, title=title)
    # valgrind starts the Python that is found first.
    os.environ["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    for call, code in CALLS.items():
        for side, functions in SIDES.items():
            with console.status(f"{side}, {call}"):
                timer = Timer(code, setup=SETUP.format(relu=functions), num_threads=1)
                counts = by_whom(timer.collect_callgrind(number=number, collect_baseline=False), number)
            table.add_row(call, side, *(f"{count:.0f}" for count in (sum(counts.values()), *counts.values())))
    console.print(table)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--number", type=int, default=500, help="calls that are counted; default: %(default)s")
    arguments = parser.parse_args()
    if not shutil.which("valgrind"):
        sys.exit("valgrind is not installed")
    main(arguments.number)
