"""Measures relu_ext against eager torch, torch.compile and a copy; prints tables and writes JSON."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import block
import gpu
import harness
import machine
import report
import torch
from cases import (
    BACKWARD,
    CALL,
    CALL_GRAD,
    CHAIN,
    CHAIN_BACKWARD,
    CHAIN_TRAINING,
    COMPILED,
    DTYPES,
    EAGER,
    HOST_ELEMENTS,
    INPLACE,
    MODULE,
    MODULE_GRAD,
    NETWORK_SHAPES,
    OPERATIONS,
    OURS,
    SMALL,
    STEPS,
    Operation,
    Shape,
    few_shapes,
    shapes,
    sized,
)
from harness import Call
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import relu_ext

RESULTS = Path(__file__).parent / "results" / "latest-{device}.json"
Record = dict[str, Any]
Options = argparse.Namespace


def parse(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__)
    names = [operation.name for operation in OPERATIONS]
    add = parser.add_argument
    add("--devices", nargs="+", choices=["cpu", "cuda"], help="default: cpu, and cuda where relu_ext is built for it")
    add("--operations", nargs="+", choices=names, default=names, metavar="NAME", help=f"of: {', '.join(names)}")
    add("--every-shape", action="store_true", help="measure each operation as fully as relu, else only relu is")
    add("--dtypes", nargs="+", choices=list(DTYPES), help="default: all for relu, else as in cases.py")
    add("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="default: all")
    add("--sizes", nargs="+", type=int, metavar="N", help="elements; default: 64 to past the cache, and networks")
    add("--threads", type=int, default=torch.get_num_threads(), help="of all but the host time; default: %(default)s")
    add("--seconds", type=float, default=0.3, help="on a cell of a table, or nine rounds; default: %(default)s")
    add("--quick", action="store_true", help="few sizes, a third of the time, no torch.compile: a smoke test")
    add("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    add("--no-host", dest="host", action="store_false", help="leave the host time per call out")
    add("--json", type=Path, default=RESULTS, help="default: results/latest-{device}.json, for a GPU with its name")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available() and relu_ext.build_info()["cuda"]
    if options.devices is None:
        options.devices = ["cpu", "cuda"] if has_gpu else ["cpu"]
    if "cuda" in options.devices and not has_gpu:
        parser.error("--devices cuda: no GPU is visible, or relu_ext is built without CUDA (python -m relu_ext tells)")
    if options.quick:
        options.seconds /= 3
        options.compile = False
    return options


def chosen(options: Options) -> list[Operation]:
    found = [operation for operation in OPERATIONS if operation.name in options.operations]
    if options.every_shape:
        every = {"every_shape": True, "dtypes": tuple(DTYPES)}
        found = [replace(operation, networks=operation.networks or NETWORK_SHAPES, **every) for operation in found]
    return [replace(operation, dtypes=tuple(options.dtypes)) for operation in found] if options.dtypes else found


def places(operation: Operation, device: torch.device, options: Options) -> list[Shape]:
    quick = [64, 2**14, 2**17, SMALL] if operation.every_shape else [SMALL]
    if sizes := options.sizes or (quick if options.quick else None):
        return [sized(operation, size, compiled=True) for size in sizes]
    return shapes(operation, device) if operation.every_shape else few_shapes(operation, device)


def compile_works(device: torch.device, console: Console) -> bool:
    try:
        torch.compile(torch.relu)(torch.ones(8, device=device))
    except Exception as error:  # whatever keeps Inductor from working here, usually a missing compiler
        console.print(f"torch.compile left out: {type(error).__name__}: {str(error).splitlines()[0]}")
        return False
    return True


def timed(
    section: str, operation: Operation, step: str, dtype: str, shape: Shape, samples: dict, threads: int
) -> Record:
    return {
        "section": section,
        "operation": operation.name,
        "step": step,
        "dtype": dtype,
        "shape": shape.name,
        "elements": shape.elements,
        "threads": threads,
        "rounds": len(samples[OURS]),
        "seconds": {name: harness.spread(times) for name, times in samples.items()},
        "ratio": harness.quotients(samples, OURS, EAGER),
        "compile_ratio": harness.quotients(samples, OURS, COMPILED),
    }


def host_calls(operation: Operation, device: torch.device) -> Iterator[tuple[str, dict[str, Call]]]:
    problem = harness.problem(operation, operation.dims(HOST_ELEMENTS), torch.float32, device)
    first, *others = problem.operands
    harness.check(operation, problem)
    harness.check_other_forms(operation, problem)
    sides = list(zip((OURS, EAGER), operation.function, strict=True))
    yield CALL, {side: Call(function, problem.operands) for side, function in sides}
    yield CALL_GRAD, {side: Call(function, problem.leaves()) for side, function in sides}
    if not operation.every_shape:
        return
    if operation.module:
        modules = [(side, build().to(device)) for side, build in zip((OURS, EAGER), operation.module, strict=True)]
        yield MODULE, {side: Call(module, problem.operands) for side, module in modules}
        yield MODULE_GRAD, {side: Call(module, problem.leaves()) for side, module in modules}
    if operation.inplace:
        inplace = zip((OURS, EAGER), operation.inplace, strict=True)
        yield INPLACE, {side: Call(function, (first.clone(), *others)) for side, function in inplace}
    if problem.grad.shape != first.shape:
        return  # no chain of these
    yield CHAIN_BACKWARD, {side: harness.chain_backward(function, problem, CHAIN) for side, function in sides}
    chains = [(side, harness.chain(function, CHAIN)) for side, function in sides]
    yield CHAIN_TRAINING, {side: harness.training(function, problem, CHAIN) for side, function in chains}


def host_records(operation: Operation, device: torch.device, seconds: float) -> Iterator[Record]:
    shape = sized(operation, HOST_ELEMENTS, compiled=False)
    sampler = gpu.queueing if device.type == "cuda" else partial(harness.wall_clock, threads=1)
    for step, calls in host_calls(operation, device):
        samples = harness.measure(calls, 3 * seconds, sampler)
        yield timed("host", operation, step, "float32", shape, samples, threads=1)


def kept_record(operation: Operation, dtype: str, shape: Shape, problem: harness.Problem, compiled: bool) -> Record:
    functions = dict(zip((OURS, EAGER), operation.function, strict=True))
    if compiled:
        torch._dynamo.reset()
        functions[COMPILED] = torch.compile(operation.function.torch, dynamic=False)
    kept = {side: harness.kept_bytes(function, problem) for side, function in functions.items()}
    return {
        "section": "kept",
        "operation": operation.name,
        "dtype": dtype,
        "shape": shape.name,
        "elements": shape.elements,
        "bytes_per_element": {side: counts.all / shape.elements for side, counts in kept.items()},
        "ratio": kept[OURS].all / kept[EAGER].all,
        "kept_per_element": kept[OURS].all / shape.elements,
        "share_of_input": kept[OURS].all / problem.grad.nbytes,
        **{f: getattr(kept[OURS], f) / shape.elements for f in harness.Kept._fields if f != "all"},
    }


def kept_records(operation: Operation, dtype: str, device: torch.device, compiled: bool) -> Iterator[Record]:
    shape = sized(operation, SMALL, compiled)
    problem = harness.problem(operation, shape.dims, DTYPES[dtype], device)
    yield kept_record(operation, dtype, shape, problem, compiled)


def limits(
    operation: Operation, step: str, grad: torch.Tensor, samples: dict[str, list[float]], copies: Iterable[str]
) -> Record:
    """What a copy of the same bytes would take; nothing where bytes are not what the operation takes its time for."""
    passes = operation.passes(step, grad.itemsize)
    if passes is None:
        return {}
    medians = {name: harness.spread(times)["median"] for name, times in samples.items()}
    best = min(copies, key=medians.__getitem__)
    copy = medians[best] * passes / 2
    return {
        "bytes_moved": passes * grad.nbytes,
        "copy_limit_seconds": copy,
        "copy_fraction": copy / medians[OURS],
        "over_copy": harness.quotients(samples, OURS, best, passes / 2),
    }


def speed_record(
    operation: Operation, step: str, dtype: str, shape: Shape, problem: harness.Problem, options: Options
) -> Record:
    grad = problem.grad
    functions = dict(zip((OURS, EAGER), operation.function, strict=True))
    # A compiled backward cannot run twice on one graph (it reuses what was kept), so it is measured in training only.
    if options.compile and shape.compiled and step != BACKWARD:
        torch._dynamo.reset()
        functions[COMPILED] = torch.compile(operation.function.torch, dynamic=False)
    copies = harness.copy_calls(grad) if operation.passes(step, grad.itemsize) else {}
    calls = harness.step_calls(step, functions, problem) | copies
    sampler = gpu.cold_l2 if grad.is_cuda else partial(harness.wall_clock, threads=options.threads)
    # Autograd's engine turns gradients off for the nodes that it calls; where they are on, a node that keeps tensors
    # records its own history.
    with torch.set_grad_enabled(step != BACKWARD):
        samples = harness.measure(calls, options.seconds, sampler)
    return {
        **timed("speed", operation, step, dtype, shape, samples, options.threads),
        **limits(operation, step, grad, samples, copies),
        "tensor_bytes": grad.nbytes,
        "in_cache": not grad.is_cuda and 2 * grad.nbytes < machine.last_level_cache(),
    }


def speed_records(
    operation: Operation, dtype: str, shape: Shape, device: torch.device, options: Options
) -> Iterator[Record]:
    problem = harness.problem(operation, shape.dims, DTYPES[dtype], device)
    harness.check(operation, problem)
    if shape in operation.networks:
        yield kept_record(operation, dtype, shape, problem, compiled=False)
    for step in options.steps:
        if step in shape.steps:
            yield speed_record(operation, step, dtype, shape, problem, options)


def kernel_records(operation: Operation, device: torch.device, console: Console) -> Iterator[Record]:
    problem = harness.problem(operation, operation.dims(HOST_ELEMENTS), torch.float32, device)
    functions = dict(zip((OURS, EAGER), operation.function, strict=True))
    for step in STEPS:
        calls = harness.step_calls(step, functions, problem)
        names = {side: gpu.kernels(call) for side, call in calls.items()}
        if not names[EAGER]:
            console.print("kernels left out: the profiler sees none")
            return
        yield {
            "section": "kernels",
            "operation": operation.name,
            "step": step,
            "kernels": len(names[OURS]),
            "kernels_of_torch": len(names[EAGER]),
            "names": names,
        }


def measure_all(device: torch.device, options: Options, progress: Progress) -> list[Record]:
    operations = chosen(options)
    cuda = device.type == "cuda"
    blocks = [operation for operation in operations if cuda and operation.bits and operation.inplace]
    cells = [(o, dtype, places(o, device, options)) for o in operations for dtype in o.dtypes]
    total = (options.host + cuda) * len(operations) + sum(1 + len(found) for _, _, found in cells) + len(blocks)
    task = progress.add_task("", total=total)
    records: list[Record] = []

    def add(name: str, more: Iterable[Record]) -> None:
        progress.update(task, description=f"{device.type}: {name}", refresh=True)
        records.extend(more)
        progress.advance(task)

    if options.host:
        # First, before Inductor is loaded: what a call costs in an eager program.
        for operation in operations:
            add(f"{operation.name}, host time", host_records(operation, device, options.seconds))
    options.compile = options.compile and compile_works(device, progress.console)
    for operation, dtype, found in cells:
        name = f"{operation.name}, {dtype}"
        add(f"{name}, kept", kept_records(operation, dtype, device, options.compile))
        for shape in found:
            add(f"{name}, {shape.name}", speed_records(operation, dtype, shape, device, options))
    for operation in blocks:
        add(f"{operation.name}, memory of a block", block.records(operation, device))
    for operation in operations if cuda else []:
        # Last: whoever has been profiled once pays for it at every launch (CUPTI stays).
        add(f"{operation.name}, kernels", kernel_records(operation, device, progress.console))
    return records


def main() -> None:
    options = parse()
    machine.restart_with_steady_malloc()
    torch.set_num_threads(options.threads)
    # A log has no width of its own; 80 columns would fold the tables.
    console = Console(width=None if sys.stdout.isatty() else 150, highlight=False)
    columns = (TextColumn("{task.description:40}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    for name in options.devices:
        device, start, others = torch.device(name), time.perf_counter(), machine.OtherLoad()
        progress = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
        with progress:
            records = measure_all(device, options, progress)
        verdicts = report.verdicts(name, records)
        about = machine.describe(device, options.threads)
        about |= {"seconds": time.perf_counter() - start, "other_processes": others.share()}
        report.show(console, about, records, verdicts)
        path = Path(str(options.json).format(device=machine.file_name(device)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**about, "targets": verdicts, "records": records}, indent=1) + "\n")
        busy = about["other_processes"]
        disturbed = "" if busy is None else f"; other processes took {busy:.0%} of the machine's CPU time meanwhile"
        counts = ", ".join(f"{sum(v['verdict'] == kind for v in verdicts)} {kind}" for kind in report.VERDICTS)
        console.print(f"{about['seconds']:.0f} s{disturbed}; written to {path}", soft_wrap=True)
        console.print(f"targets: {counts}")


if __name__ == "__main__":
    main()
