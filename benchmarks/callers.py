"""Several Python threads that call at once, each on tensors of its own: the time per call of all together, and over
that of torch's in the same rounds. Two minutes; prints a table.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable

import _checkout  # noqa: F401
import harness
import torch
from cases import size_name
from rich.console import Console
from rich.progress import track
from rich.table import Table

import relu_ext

OURS, TORCH = "relu_ext", "torch"
FUNCTIONS = {OURS: relu_ext.relu, TORCH: torch.relu}
FORWARD, BOTH = "forward", "forward + backward"


def seconds_per_call(function: Callable, elements: int, callers: int, both: bool, seconds: float) -> float:
    """Of all callers together, while all of them call."""
    counts, stop, barrier = [0] * callers, threading.Event(), threading.Barrier(callers + 1)
    grad = torch.ones(elements)

    def run(caller: int) -> None:
        x = torch.randn(elements, requires_grad=both)
        barrier.wait()
        while not stop.is_set():
            y = function(x)
            if both:
                torch.autograd.grad(y, x, grad)
            counts[caller] += 1

    threads = [threading.Thread(target=run, args=(caller,)) for caller in range(callers)]
    for thread in threads:
        thread.start()
    barrier.wait()
    start = time.perf_counter()
    time.sleep(seconds)
    stop.set()
    for thread in threads:
        thread.join()
    return (time.perf_counter() - start) / sum(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--callers", nargs="+", type=int, default=[1, 2, 4], metavar="N", help="Python threads; default: 1 2 4")
    add("--pools", nargs="+", type=int, default=[1, 2], metavar="N", help="torch.set_num_threads; default: 1 2")
    add("--sizes", nargs="+", type=int, default=[2**6, 2**14, 2**18, 2**20], metavar="N", help="elements")
    add("--seconds", type=float, default=0.1, help="on a round; default: %(default)s")
    add("--rounds", type=int, default=7, help="default: %(default)s")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    table = Table("step", "elements", "pool", "callers", "us a call", "over torch's", "20 to 80 %")
    cells = [
        (step, size, pool, callers)
        for step in (FORWARD, BOTH)
        for size in options.sizes
        for pool in options.pools
        for callers in options.callers
    ]
    for step, size, pool, callers in track(cells, transient=True, console=console):
        torch.set_num_threads(pool)
        samples: dict[str, list[float]] = {name: [] for name in FUNCTIONS}
        for _ in range(options.rounds):
            for name, function in FUNCTIONS.items():
                samples[name].append(seconds_per_call(function, size, callers, step == BOTH, options.seconds))
        ratio = harness.quotients(samples, OURS, TORCH)
        time_spent = f"{harness.spread(samples[OURS])['median'] * 1e6:.2f}"
        between = f"{ratio['q20']:.2f} to {ratio['q80']:.2f}"
        table.add_row(step, size_name(size), str(pool), str(callers), time_spent, f"{ratio['median']:.2f}", between)
    console.print(table)


if __name__ == "__main__":
    main()
