"""Measures how far each operation on the CPU is from a copy of the bytes that it must move; prints tables, writes JSON.

Every operation, dtype, size and number of threads: forward, forward with grad (which also writes what backward needs)
and backward, in turns with torch and with a copy of as many bytes. What allocates its output is compared with `clone`,
what overwrites its input with `copy_`, whose output is there. Tensors past the cache are measured with all threads
only, and twice: the second time under THP_MEM_ALLOC_ENABLE=1, with which torch too asks for huge pages. All of it takes
a quarter of an hour on 2 cores; --operations, --dtypes and --quick choose parts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import harness
import machine
import report
import torch
from cases import (
    BACKWARD,
    DTYPES,
    EAGER,
    FORWARD,
    HUGE,
    INPLACE,
    OPERATIONS,
    OURS,
    PAST,
    STOCK,
    WITH_GRAD,
    Operation,
    size_name,
)
from harness import Call
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

RESULTS = Path(__file__).parent / "results" / "latest-roofline.json"
STEPS = (FORWARD, WITH_GRAD, BACKWARD, INPLACE)
ALL_DTYPES = {"float32": torch.float32, "float64": torch.float64, **DTYPES}
SIZES = [2**6, 2**12, 2**16, 2**18, 2**20, 2**22]
BLOCK_SECONDS = 2e-3  # thousands of cells: shorter than run.py's
COPY, NODE = "copy", "relu_ext, node alone"
MEASURED = [operation for operation in OPERATIONS if operation.forward_passes]
Record = dict[str, Any]


def passes(operation: Operation, step: str, itemsize: int) -> float:
    """Tensors of the input's size that are read or written."""
    if step == BACKWARD:
        return operation.passes(BACKWARD, itemsize)
    return operation.forward_passes + (operation.bits / (8 * itemsize) if step == WITH_GRAD else 0)


def copy_of(grad: torch.Tensor, count: float, step: str) -> Call:
    """Moves as many bytes as `count` passes over grad."""
    source = grad.new_zeros(max(1, round(grad.numel() * count / 2)))
    return Call(torch.empty_like(source).copy_, (source,)) if step == INPLACE else Call(torch.clone, (source,))


def node_alone(operation: Operation, problem: harness.Problem) -> dict[str, Call]:
    """The backward without autograd's engine, which a model pays once for all its layers."""
    output = operation.function.ours(*problem.leaves())
    return {NODE: Call(output.grad_fn, (problem.grad,))} if harness.is_one_node(output.grad_fn) else {}


def calls(operation: Operation, step: str, problem: harness.Problem) -> dict[str, Call] | None:
    """None where there is no such step."""
    functions = dict(zip((OURS, EAGER), operation.function, strict=True))
    if step == INPLACE:
        if not operation.inplace:
            return None
        first, *others = problem.operands
        pairs = zip((OURS, EAGER), operation.inplace, strict=True)
        return {side: Call(function, (first.clone(), *others)) for side, function in pairs}
    if step == WITH_GRAD:
        return {side: Call(function, problem.leaves()) for side, function in functions.items()}
    found = harness.step_calls(step, functions, problem)
    return found | node_alone(operation, problem) if step == BACKWARD else found


def records(operation: Operation, dtype: str, elements: int, pages: str, options: Any) -> Iterator[Record]:
    problem = harness.problem(operation, operation.dims(elements), ALL_DTYPES[dtype], torch.device("cpu"))
    grad = problem.grad
    harness.check(operation, problem)
    for step in options.steps:
        competitors = calls(operation, step, problem)
        if competitors is None:
            continue
        count = passes(operation, step, grad.itemsize)
        competitors[COPY] = copy_of(grad, count, step)
        past_cache = grad.nbytes >= PAST
        for threads in [max(options.threads)] if past_cache else options.threads:
            sampler = partial(harness.wall_clock, threads=threads, block=BLOCK_SECONDS)
            with torch.set_grad_enabled(step != BACKWARD):
                samples = harness.measure(competitors, options.seconds, sampler, least=9 if past_cache else 5)
            yield {
                "section": "roofline",
                "operation": operation.name,
                "step": step,
                "dtype": dtype,
                "elements": elements,
                "threads": threads,
                "pages": pages,
                "tensor_bytes": grad.nbytes,
                "bytes_moved": count * grad.nbytes,
                "seconds": {name: harness.spread(times) for name, times in samples.items()},
                "over_copy": harness.quotients(samples, NODE if NODE in samples else OURS, COPY),
                "ratio": harness.quotients(samples, OURS, EAGER),
            }


def sizes(dtype: str, pages: str, options: Any) -> list[int]:
    past = PAST // ALL_DTYPES[dtype].itemsize
    return [past] if pages == HUGE else sorted({*options.sizes, *([] if options.quick else [past])})


def measured(pages: str, options: Any) -> list[Record]:
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    operations = [operation for operation in MEASURED if operation.name in options.operations]
    cells = [(o, dtype, size) for o in operations for dtype in options.dtypes for size in sizes(dtype, pages, options)]
    found: list[Record] = []
    with Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False) as progress:
        task = progress.add_task("", total=len(cells))
        for operation, dtype, size in cells:
            name = f"{operation.name}, {dtype}, {size_name(size)}"
            progress.update(task, description=name, refresh=True)
            found.extend(records(operation, dtype, size, pages, options))
            progress.advance(task)
    return found


def measured_with_huge_pages() -> list[Record]:
    """By another process: torch reads the setting once."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, *sys.argv, "--only-huge-pages", "--json", file.name]
        subprocess.run(command, env=os.environ | {"THP_MEM_ALLOC_ENABLE": "1"}, check=True)
        return json.loads(Path(file.name).read_text())["records"]


def ratios_table(found: list[Record], dtype: str, quantity: str, title: str) -> Table:
    """A row for each operation and step, a column for each size and number of threads."""
    found = [record for record in found if record["dtype"] == dtype]
    columns = sorted({(r["pages"] == HUGE, r["elements"], r["threads"]) for r in found})
    table = Table(title=f"{dtype}: {title}", caption="medians of rounds in turns; t: threads; huge: " + HUGE)
    table.add_column("operation, step", no_wrap=True)
    for huge, elements, threads in columns:
        heading = f"{size_name(elements)} {threads}t{' huge' if huge else ''}"
        table.add_column(heading, justify="right")
    cells = {(r["operation"], r["step"], r["pages"] == HUGE, r["elements"], r["threads"]): r for r in found}
    for operation, step in dict.fromkeys((r["operation"], r["step"]) for r in found):
        of = (cells.get((operation, step, *column)) for column in columns)
        table.add_row(f"{operation}, {step}", *(f"{r[quantity]['median']:.2f}" if r else "" for r in of))
    return table


def show(console: Console, results: Record) -> None:
    console.print(f"\n{machine.summary(results)}", soft_wrap=True)
    found = results["records"]
    for dtype in dict.fromkeys(record["dtype"] for record in found):
        console.print(ratios_table(found, dtype, "over_copy", "time over that of a copy of the same bytes"))
        console.print(ratios_table(found, dtype, "ratio", "time over that of torch"))
    if results["targets"]:
        console.print(report.target_table(results["targets"]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [operation.name for operation in MEASURED]
    add = parser.add_argument
    add("--operations", nargs="+", choices=names, default=names, metavar="NAME", help=f"of: {', '.join(names)}")
    add("--dtypes", nargs="+", choices=list(ALL_DTYPES), default=list(ALL_DTYPES), help="default: all")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    add("--sizes", nargs="+", type=int, default=SIZES, metavar="N", help="elements; default: 64 to 4M, and 64 MB")
    add("--threads", nargs="+", type=int, default=sorted({1, torch.get_num_threads()}), help="default: 1 and all")
    add("--seconds", type=float, default=0.05, help="on a cell, or five rounds, nine past the cache")
    add("--quick", action="store_true", help="nothing past the cache")
    add("--only-huge-pages", action="store_true", help=argparse.SUPPRESS)
    add("--json", type=Path, default=RESULTS, help="default: %(default)s")
    return parser.parse_args()


def main() -> None:
    options = parse()
    machine.restart_with_steady_malloc()
    start, others = time.perf_counter(), machine.OtherLoad()
    found = measured(HUGE if options.only_huge_pages else STOCK, options)
    if not options.only_huge_pages and not options.quick:
        found += measured_with_huge_pages()
    results = machine.describe(torch.device("cpu"), max(options.threads))
    results |= {"seconds": time.perf_counter() - start, "other_processes": others.share()}
    results |= {"targets": report.verdicts("roofline", found), "records": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(results, indent=1) + "\n")
    if not options.only_huge_pages:
        show(Console(width=None if sys.stdout.isatty() else 200, highlight=False), results)
        print(f"{results['seconds']:.0f} s; written to {options.json}")


if __name__ == "__main__":
    main()
