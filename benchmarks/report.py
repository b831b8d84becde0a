"""Tables and targets from the records of run.py. As a program it prints tables of a JSON as Markdown."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
from cases import (
    BACKWARD,
    CALLS,
    COMPILED,
    DTYPES,
    EAGER,
    FORWARD,
    FUSED,
    HOST_ELEMENTS,
    OPERATIONS,
    OURS,
    STEPS,
    TARGETS,
    TRAINING,
    Operation,
    Target,
    size_name,
)
from harness import Spread
from rich.console import Console
from rich.table import Table
from rich.text import Text

Record = dict[str, Any]
VERDICTS = {"pass": "green", "spread": "yellow", "miss": "red"}


def duration(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}" if seconds * factor < 999.5 else f"{seconds * factor:.0f} {unit}"
    return f"{seconds * 1e9:.2f} ns"


def coloured(ratio: float, text: str) -> str:
    style = "green" if ratio <= 0.99 else "red" if ratio > 1.01 else "yellow"
    return f"[{style}]{text}[/]"


def ratio_text(ratio: Spread | None) -> str:
    return coloured(ratio["median"], f"{ratio['median']:.2f}") if ratio else ""


def spread_text(ratio: Spread) -> str:
    text = f"{ratio['median']:.3f} ({ratio['q20']:.3f} to {ratio['q80']:.3f})"
    return coloured(ratio["median"], text)


def host_table(records: list[Record]) -> Table:
    table = Table(
        title=f"Host time per call: {HOST_ELEMENTS} float32 elements, one thread",
        caption="ratio: relu_ext / torch in the same run, median (20 % to 80 %); below 1 relu_ext is faster",
    )
    for heading in ("operation", "what", "relu_ext", "torch", "ratio to torch"):
        table.add_column(heading, justify="left" if heading in ("operation", "what") else "right")
    for record in records:
        times = (duration(record["seconds"][side]["median"]) for side in (OURS, EAGER))
        table.add_row(record["operation"], record["step"], *times, spread_text(record["ratio"]))
    return table


def kept_table(records: list[Record]) -> Table:
    table = Table(
        title="Kept for backward, bytes per element",
        caption="every storage that autograd saves, counted once. What torch keeps here is free where the next layer "
        "keeps it too (a convolution, a linear layer): train_digits.py counts whole models.",
    )
    sides = [OURS, EAGER, COMPILED]
    for heading in ("operation", "dtype", "shape", *sides, "relu_ext / torch"):
        table.add_column(heading, justify="left" if heading in ("operation", "dtype", "shape") else "right")
    for record in records:
        kept, shape = record["bytes_per_element"], record.get("shape", size_name(record["elements"]))
        counts = (f"{kept[side]:.4g}" if side in kept else "" for side in sides)
        table.add_row(record["operation"], record["dtype"], shape, *counts, f"1/{1 / record['ratio']:.4g}")
    return table


# What a copy is, by whether `clone` was measured too.
LIMITS = {
    True: "the speed of the better of clone and copy_ moving the same bytes (copy_ writes to memory it has, relu_ext "
    "to a fresh output)",
    False: "the speed of copy_ moving the same bytes; time on the device with a cold L2 cache, without host time",
}


def fraction_text(record: Record) -> str:
    return f"{record['copy_fraction']:.2f}" if "copy_fraction" in record else ""


def speed_table(records: list[Record], operation: Operation, dtype: str) -> Table:
    limit = f"of copy: fraction of the copy limit, {LIMITS['clone' in records[0]['seconds']]}. "
    has_limit = "copy_fraction" in records[0]
    table = Table(
        title=f"{operation.name}, {dtype}: relu_ext against {operation.torch_name}",
        caption="/torch, /compile: time of relu_ext divided by that of eager torch or torch.compile in the same run, "
        f"below 1 relu_ext is faster. {limit if has_limit else ''}"
        "backward: without the engine of autograd if each side is one node; fwd + bwd: with it.",
    )
    table.add_column("shape", no_wrap=True)
    found = {(record["shape"], record["step"]): record for record in records}
    steps = [step for step in STEPS if any(record["step"] == step for record in records)]
    for step in steps:
        table.add_column(step.replace("forward + backward", "fwd + bwd"), justify="right", no_wrap=True)
        columns = ("/torch",) if step == BACKWARD else ("/torch", "/compile")
        for heading in (*columns, "of copy") if has_limit else columns:
            table.add_column(heading, justify="right", no_wrap=True)
    for shape in dict.fromkeys(record["shape"] for record in records):
        row = [shape]
        for step in steps:
            record = found.get((shape, step), {})
            row += [duration(record["seconds"][OURS]["median"]) if record else "", ratio_text(record.get("ratio"))]
            row += [] if step == BACKWARD else [ratio_text(record.get("compile_ratio"))]
            row += [fraction_text(record)] if has_limit else []
        table.add_row(*row)
    return table


def bandwidth_table(records: list[Record], operation: Operation, dtype: str) -> Table:
    table = Table(
        title=f"{operation.name}, {dtype}: GB/s",
        caption="bytes that the operation has to move, whatever each competitor moves, over the time it takes; in "
        "brackets the percentage of what copy_ reaches in the same run",
    )
    table.add_column("shape", no_wrap=True)
    steps = [step for step in STEPS if any(record["step"] == step for record in records)]
    sides = [side for side in (OURS, EAGER, COMPILED) if any(side in record["seconds"] for record in records)]
    columns = [(step, side) for step in steps for side in sides if (step, side) != (BACKWARD, COMPILED)]
    for step, side in columns:
        table.add_column(f"{step.replace('forward + backward', 'fwd + bwd')}\n{side}", justify="right", no_wrap=True)
    table.add_column("\ncopy_", justify="right", no_wrap=True)

    def text(record: Record | None, side: str) -> str:
        if record is None or side not in record["seconds"]:
            return ""
        seconds = record["seconds"][side]["median"]
        percent = 100 * record["copy_limit_seconds"] / seconds
        return f"{record['bytes_moved'] / seconds / 1e9:.0f} ({percent:.0f})"

    for shape in dict.fromkeys(record["shape"] for record in records):
        of_step = {record["step"]: record for record in records if record["shape"] == shape}
        copied = next(iter(of_step.values()))
        speed = copied["bytes_moved"] / copied["copy_limit_seconds"] / 1e9
        table.add_row(shape, *(text(of_step.get(step), side) for step, side in columns), f"{speed:.0f}")
    return table


def kernels_table(records: list[Record]) -> Table:
    table = Table(title="Kernels that a call runs", caption="as torch.profiler sees them")
    for heading in ("operation", "what", "relu_ext", "torch"):
        table.add_column(heading, justify="left" if heading in ("operation", "what") else "right")
    for record in records:
        table.add_row(record["operation"], record["step"], str(record["kernels"]), str(record["kernels_of_torch"]))
    return table


def block_table(records: list[Record]) -> Table:
    shape = " x ".join(map(str, records[0]["shape"]))
    table = Table(
        title=f"A ResNet-style block in training, {shape}, MiB",
        caption="convolution, norm, ReLU, convolution, norm, add, ReLU. kept: every storage that is kept for backward, "
        "once, without parameters and the block's input. peak: memory at its highest in forward and backward, over "
        "what is there before. A convolution after the block keeps the block's output, whatever the ReLU does.",
    )
    for heading in ("the block", "in place", "activation", "kept", "peak"):
        table.add_column(heading, justify="right" if heading in ("kept", "peak") else "left")
    for record in records:
        sizes = (f"{record[key] / 2**20:.2f}" if key in record else "" for key in ("kept_bytes", "peak_bytes"))
        inplace = "yes" if record["inplace"] else "no"
        table.add_row(record["place"], inplace, f"{record['operation']}, {record['side']}", *sizes)
    return table


def judge(target: Target, records: list[Record]) -> Record | None:
    """The worst record of a target, and a verdict; None where the run did not measure it."""

    def value(record: Record) -> Spread:
        found = record[target.quantity]
        return found if isinstance(found, dict) else {"median": found, "q20": found, "q80": found}

    met = [record for record in records if target.covers(record)]
    if not met:
        return None
    worst = max(met, key=lambda record: value(record)["median"])
    found = value(worst)
    verdict = "pass" if found["median"] <= target.limit else "spread" if found["q20"] <= target.limit else "miss"
    place = ", ".join(str(worst[key]) for key in ("dtype", "shape", "step") if key in worst)
    return {
        "target": target.text,
        "limit": target.limit,
        "worst": found,
        "worst_at": place,
        "records": len(met),
        "verdict": verdict,
    }


def verdicts(device: str, records: list[Record]) -> list[Record]:
    return [verdict for target in TARGETS[device] if (verdict := judge(target, records))]


def target_table(judged: list[Record]) -> Table:
    table = Table(
        title="Targets",
        caption="worst: the highest median among the cells the target covers (20 % to 80 %). "
        "spread: the median is above the limit, the limit is within the spread of the rounds.",
    )
    for heading in ("target", "at most", "worst", "at", "cells", "verdict"):
        table.add_column(heading, justify="right" if heading in ("at most", "worst", "cells") else "left")
    for entry in judged:
        worst, style = entry["worst"], VERDICTS[entry["verdict"]]
        width = "" if worst["q20"] == worst["q80"] else f" ({worst['q20']:.3f} to {worst['q80']:.3f})"
        found = f"{worst['median']:.5g}" if not width else f"{worst['median']:.3f}{width}"
        table.add_row(
            entry["target"],
            f"{entry['limit']:.5g}",
            found,
            entry["worst_at"],
            str(entry["records"]),
            f"[bold {style}]{entry['verdict']}[/]",
        )
    return table


def family_row(records: list[Record]) -> list[str]:
    """Of one operation and dtype; what was not measured is left empty."""

    def of(step: str, section: str = "speed") -> Record:
        return next((r for r in records if r["section"] == section and r.get("step") == step), {})

    kept = next((r["bytes_per_element"] for r in records if r["section"] == "kept"), {})
    cells = [f"{kept[OURS]:.4g} / {kept[EAGER]:.4g}" if kept else ""]
    for record in (of(FORWARD), of(TRAINING)):
        cells += [ratio_text(record.get("ratio")), ratio_text(record.get("compile_ratio"))]
        cells += [fraction_text(record)]
    return cells + [ratio_text(of(call, "host").get("ratio")) for call in CALLS]


def family_table(records: list[Record], dtype: str, shape: str) -> Table:
    table = Table(
        title=f"The family: {dtype}, {shape} elements",
        caption="kept: bytes an element, relu_ext / torch. /torch, /compile: relu_ext's time divided by theirs in the "
        "same run, below 1 relu_ext is faster. of copy: fraction of the copy limit. call, with grad: host time of a "
        f"call without and with a gradient to come, {HOST_ELEMENTS} float32 elements, divided by torch's.",
    )
    table.add_column("operation", no_wrap=True)
    columns = ("kept", "forward /torch", "/compile", "of copy", "fwd + bwd /torch", "/compile", "of copy")
    for heading in (*columns, "call", "with grad"):
        table.add_column(heading, justify="right")
    for operation in OPERATIONS:
        rows = [r for r in records if r["operation"] == operation.name]
        rows = [r for r in rows if r["section"] == "host" or r.get("dtype") == dtype]
        rows = [r for r in rows if r["section"] != "speed" or r["shape"] == shape]
        if any(r["section"] == "speed" for r in rows):
            table.add_row(operation.name, *family_row(rows))
    return table


def family_shapes(records: list[Record]) -> list[str]:
    """Those at which most of the operations were measured."""
    speed = [record for record in records if record["section"] == "speed"]
    names = {record["operation"] for record in speed}
    at = {shape: {r["operation"] for r in speed if r["shape"] == shape} for shape in (r["shape"] for r in speed)}
    return [shape for shape, found in at.items() if len(found) > max(1, len(names) // 2)]


def fused_table(records: list[Record]) -> Table:
    """What a network gains where an operation stands for several of its own."""
    dtypes = [dtype for dtype in DTYPES if any(record.get("dtype") == dtype for record in records)]
    table = Table(
        title="Fused operations",
        caption="kept: bytes an element of the output, relu_ext / torch. forward, fwd + bwd: relu_ext's time, and in "
        "brackets that divided by eager torch's in the same run, below 1 relu_ext is faster.",
    )
    for heading in ("operation", "shape"):
        table.add_column(heading, no_wrap=True)
    for dtype in dtypes:
        for heading in ("kept", "forward", "fwd + bwd"):
            table.add_column(f"{heading}, {dtype}", justify="right", no_wrap=True)

    def text(record: Record | None) -> str:
        if record is None:
            return ""
        if record["section"] == "kept":
            return " / ".join(f"{record['bytes_per_element'][side]:.4g}" for side in (OURS, EAGER))
        return f"{duration(record['seconds'][OURS]['median'])} ({ratio_text(record['ratio'])})"

    for operation in FUSED:
        own = [record for record in records if record["operation"] == operation.name]
        found = {(r["shape"], r["dtype"], r.get("step")): r for r in own}  # what is kept hangs on no step
        for shape in dict.fromkeys(record["shape"] for record in own if record["section"] == "speed"):
            cells = (found.get((shape, dtype, step)) for dtype in dtypes for step in (None, FORWARD, TRAINING))
            table.add_row(operation.name, shape, *map(text, cells))
    return table


def tables(device: str, records: list[Record], judged: list[Record]) -> Iterator[tuple[str, Table]]:
    """Every table that the records have rows for, by kind."""

    def of(section: str) -> list[Record]:
        return [record for record in records if record["section"] == section]

    for operation in OPERATIONS:
        for dtype in DTYPES:
            rows = [r for r in of("speed") if (r["operation"], r["dtype"]) == (operation.name, dtype)]
            if rows:
                yield "speed", speed_table(rows, operation, dtype)
            if rows and device == "cuda" and "bytes_moved" in rows[0]:
                yield "bandwidth", bandwidth_table(rows, operation, dtype)
    for shape in family_shapes(records):
        for dtype in DTYPES:
            table = family_table(records, dtype, shape)
            if table.row_count > 1:
                yield "family", table
    fused = fused_table([*of("kept"), *of("speed")])
    if fused.row_count:
        yield "fused", fused
    sections = {"kept": kept_table, "block": block_table, "kernels": kernels_table, "host": host_table}
    for section, table in sections.items():
        if of(section):
            yield section, table(of(section))
    if judged:
        yield "targets", target_table(judged)


def show(console: Console, about: dict[str, Any], records: list[Record], judged: list[Record]) -> None:
    console.print(f"\n[bold]{about['device']}[/]: {machine.summary(about)}", soft_wrap=True)
    for _, table in tables(about["device"], records, judged):
        console.print(table)


def markdown(table: Table) -> str:
    def line(cells: Any) -> str:
        return f"| {' | '.join(Text.from_markup(str(cell)).plain for cell in cells)} |"

    rules = ("---:" if column.justify == "right" else "---" for column in table.columns)
    rows = zip(*(column.cells for column in table.columns), strict=True)
    lines = [line(column.header for column in table.columns), line(rules), *map(line, rows)]
    return "\n".join([f"**{table.title}**", "", *lines, "", str(table.caption or ""), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    default = Path(__file__).parent / "results" / "latest-cpu.json"
    kinds = ("speed", "bandwidth", "family", "fused", "kept", "block", "kernels", "host", "targets")
    parser.add_argument("json", nargs="?", type=Path, default=default, help="what run.py wrote; default: %(default)s")
    parser.add_argument("--tables", nargs="+", choices=kinds, default=["family", "fused"], help="default: %(default)s")
    options = parser.parse_args()
    results = json.loads(options.json.read_text())
    for kind, table in tables(results["device"], results["records"], results["targets"]):
        if kind in options.tables:
            print(markdown(table))
    print(machine.summary(results))


if __name__ == "__main__":
    main()
