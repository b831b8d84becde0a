"""Draws a JSON of run.py as PNG pictures: speed-ups, bandwidth, bytes kept, and each function with its derivative; one
of roofline.py as tables in colour."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import machine
import matplotlib
import numpy
import report

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from cases import COMPILED, DTYPES, EAGER, FUSED, HUGE, OPERATIONS, OURS, SMALL, STEPS, size_name
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, SKY, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#777777"
SIDES = {OURS: BLUE, EAGER: ORANGE, COMPILED: GREEN}
DTYPE_COLOURS = dict(zip(DTYPES, (BLUE, SKY, GREEN), strict=True))
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
    "figure.titlesize": 14,
    "figure.titleweight": "bold",
}
NETWORK = {"linestyle": "", "marker": "s", "markersize": 5, "markerfacecolor": "none", "label": None}
SPAN, VANISHING = 7, 0.05  # of the curves: x from -SPAN to SPAN, and the derivative that counts as vanished
PARTS = {"family": "The family", "fused": "Fused operations"}
BANDS = {
    "vanishing": {"color": "#fdf0d0", "label": f"|derivative| < {VANISHING}"},
    "dead": {"color": "#e9d3dd", "label": "derivative exactly 0, value flat:\nno gradient, units die"},
}
Record = dict[str, Any]


def rows(results: Record, section: str, **where: Any) -> list[Record]:
    found = (record for record in results["records"] if record["section"] == section)
    return [record for record in found if all(record[key] == value for key, value in where.items())]


def present(records: list[Record], key: str, order: Any) -> list[Any]:
    found = {record[key] for record in records}
    return [value for value in order if value in found]


def save(figure: Figure, results: Record, title: str, path: Path) -> None:
    figure.suptitle(title, x=0.01, ha="left")
    figure.supxlabel(machine.summary(results), fontsize=8, color=GREY)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(path)


def scale(heights: list[float]) -> float:
    """The highest bar, but for a few five times as high as three quarters of them, which would flatten these."""
    usual = sorted(heights)[3 * (len(heights) - 1) // 4]
    return max(1, *(height for height in heights if height <= 5 * usual))


def draw_bars(axes: Axes, records: list[Record], step: str, dtypes: list[str]) -> None:
    names = list(dict.fromkeys(record["shape"] for record in records))
    width, bars = 0.8 / len(dtypes), []
    for i, dtype in enumerate(dtypes):
        found = {r["shape"]: r for r in records if (r["step"], r["dtype"]) == (step, dtype)}
        places = [x - 0.4 + (i + 0.5) * width for x, name in enumerate(names) if name in found]
        ratios = [found[name]["ratio"] for name in names if name in found]
        heights = [1 / ratio["median"] for ratio in ratios]
        ends = [
            [max(0, height - 1 / r["q80"]) for height, r in zip(heights, ratios, strict=True)],
            [max(0, 1 / r["q20"] - height) for height, r in zip(heights, ratios, strict=True)],
        ]
        axes.bar(places, heights, width * 0.92, color=DTYPE_COLOURS[dtype], label=dtype)
        axes.errorbar(places, heights, yerr=ends, fmt="none", ecolor="#333333", elinewidth=0.8)
        bars += [(x, height, height + end) for x, height, end in zip(places, heights, ends[1], strict=True)]
        for x, name in zip(places, (name for name in names if name in found), strict=True):
            seconds = found[name]["seconds"]
            if COMPILED in seconds:
                quotient = seconds[EAGER]["median"] / seconds[COMPILED]["median"]
                axes.plot(x, quotient, marker="D", markersize=5, color=ORANGE, markeredgecolor="black", linestyle="")
    # An outlier's error bar must not flatten the bars.
    top = 1.25 * scale([height for _, height, _ in bars])
    axes.set_ylim(0, top)
    for x, height, end in bars:
        label = {"ha": "center", "va": "bottom", "rotation": 90, "fontsize": 8}
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.85}
        axes.text(x, min(end + 0.015 * top, 0.88 * top), f"{height:.2f}", bbox=box, **label)
    axes.axhline(1, color=RED, linewidth=1.2, linestyle="--", label="torch")
    axes.set_xticks(range(len(names)), [name.replace(" ", "\n") for name in names])
    axes.grid(axis="x", visible=False)
    axes.set_title(step, loc="left")
    axes.set_ylabel("torch's time / relu_ext's")


def speedup(results: Record, records: list[Record], what: str, path: Path) -> None:
    steps, dtypes = present(records, "step", STEPS), present(records, "dtype", DTYPES)
    figure, grid = plt.subplots(len(steps), 1, figsize=(11, 3.2 * len(steps) + 1), squeeze=False, layout="constrained")
    for axes, step in zip(grid.flat, steps, strict=True):
        draw_bars(axes, records, step, dtypes)
    grid[0, 0].plot([], [], marker="D", color=ORANGE, markeredgecolor="black", linestyle="", label="torch.compile")
    grid[0, 0].legend(ncols=5, loc="lower right", bbox_to_anchor=(1, 1))
    save(figure, results, f"{what}: speed-up over eager torch, higher is faster", path)


def draw_line(axes: Axes, records: list[Record], seconds: Any, **style: Any) -> None:
    """GB/s against size, joined; the shapes of networks, which lie between sizes, as separate hollow squares.

    All competitors are drawn with the bytes that the operation has to move, not with those that each of them moves.
    """
    sizes = [record for record in records if record["shape"] == size_name(record["elements"])]
    for known, more in ((sizes, style), ([r for r in records if r not in sizes], style | NETWORK)):
        speeds = [record["bytes_moved"] / seconds(record) / 1e9 for record in known]
        axes.plot([record["elements"] for record in known], speeds, **more)


def draw_bandwidth(axes: Axes, records: list[Record]) -> None:
    records = sorted(records, key=lambda record: record["elements"])
    draw_line(axes, records, lambda r: r["copy_limit_seconds"], color=GREY, linestyle="--", label="copy limit")
    for side, colour in SIDES.items():
        known = [record for record in records if side in record["seconds"]]
        style = {"color": colour, "marker": "o", "markersize": 4.5, "label": side}
        if side == COMPILED:
            style["linestyle"] = ""  # measured at few sizes
        draw_line(axes, known, lambda r, side=side: r["seconds"][side]["median"], **style)
    axes.set_xscale("log", base=2)
    ticks = [2**i for i in range(6, 31, 4)]
    axes.set_xticks(ticks, [size_name(tick) for tick in ticks])
    axes.set_xlim(records[0]["elements"] / 1.5, records[-1]["elements"] * 1.5)
    axes.set_ylim(bottom=0)


def mark_cache(axes: Axes, results: Record, dtype: str) -> None:
    cache = max(results["machine"]["caches_bytes"].values(), default=0)
    elements = cache / 2 / DTYPES[dtype].itemsize
    if results["device"] != "cpu" or not axes.get_xlim()[0] < elements < axes.get_xlim()[1]:
        return
    axes.axvline(elements, color=RED, linewidth=1, linestyle=":")
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.5}
    note = {"rotation": 90, "ha": "right", "va": "top", "fontsize": 8, "color": RED, "bbox": box}
    axes.text(elements, 0.98, "input + output = last-level cache ", transform=axes.get_xaxis_transform(), **note)


def bandwidth(results: Record, operation: str, path: Path) -> None:
    records = rows(results, "speed", operation=operation)
    steps, dtypes = present(records, "step", STEPS), present(records, "dtype", DTYPES)
    size = (max(9, 4.2 * len(dtypes) + 0.6), max(4.5, 3 * len(steps) + 1))
    figure, grid = plt.subplots(len(steps), len(dtypes), figsize=size, squeeze=False, layout="constrained")
    for line, step in zip(grid, steps, strict=True):
        for axes, dtype in zip(line, dtypes, strict=True):
            draw_bandwidth(axes, [r for r in records if (r["step"], r["dtype"]) == (step, dtype)])
            mark_cache(axes, results, dtype)
            axes.set_title(f"{step}, {dtype}", loc="left")
        line[0].set_ylabel("GB/s that the operation must move")
    for axes in grid[-1]:
        axes.set_xlabel("elements")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=4)
    save(figure, results, f"{operation}: bandwidth against size (squares: shapes of networks)", path)


def draw_kept(axes: Axes, records: list[Record], operations: list[str], sides: list[str]) -> None:
    height = 0.8 / len(sides)
    for i, side in enumerate(sides):
        known = [r for r in records if side in r["bytes_per_element"]]
        places = [operations.index(r["operation"]) - 0.4 + (i + 0.5) * height for r in known]
        counts = [r["bytes_per_element"][side] for r in known]
        bars = axes.barh(places, counts, height * 0.92, color=SIDES[side], label=side)
        axes.bar_label(bars, [f"{count:.4g}" for count in counts], padding=4, fontsize=8)
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.14)


def kept(results: Record, path: Path) -> None:
    records = rows(results, "kept", elements=SMALL)
    operations = list(dict.fromkeys(record["operation"] for record in records))
    dtypes = present(records, "dtype", DTYPES)
    sides = [side for side in SIDES if any(side in record["bytes_per_element"] for record in records)]
    size = (max(9, 3.5 * len(dtypes) + 1), 0.6 * len(operations) + 1.9)
    shared = {"squeeze": False, "layout": "constrained", "sharex": True, "sharey": True}
    figure, grid = plt.subplots(1, len(dtypes), figsize=size, **shared)
    for axes, dtype in zip(grid.flat, dtypes, strict=True):
        draw_kept(axes, [record for record in records if record["dtype"] == dtype], operations, sides)
        axes.set_title(dtype, loc="left")
        axes.set_xlabel("bytes an element")
    grid[0, 0].set_yticks(range(len(operations)), operations)
    grid[0, 0].set_ylim(len(operations) - 0.4, -0.6)
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside upper right", ncols=3)
    save(figure, results, "Kept for backward by the layer alone", path)


def draw_curve(axes: Axes, name: str, function: Any) -> None:
    x = torch.linspace(-SPAN, SPAN, 2801, dtype=torch.float64, requires_grad=True)
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    at, y = x.detach(), y.detach()
    dead = slope == 0
    bands = {"vanishing": (slope.abs() < VANISHING) & ~dead, "dead": dead}
    for band, where in bands.items():
        axes.fill_between(at, 0, 1, where=where, transform=axes.get_xaxis_transform(), linewidth=0, **BANDS[band])
    # A line that jumps is broken there.
    value, derivative = (line.where(line.diff(append=line[-1:]).abs() < 0.08, float("nan")) for line in (y, slope))
    axes.axhline(0, color=GREY, linewidth=0.7)
    axes.axvline(0, color=GREY, linewidth=0.7)
    axes.plot(at, value, color=BLUE, linewidth=2.2, label="value")
    axes.plot(at, derivative, color=RED, linewidth=1.8, linestyle=(0, (4, 1.2)), label="derivative")
    axes.set_title(name, loc="left")


def curves(results: Record, path: Path) -> None:
    functions = {"sigmoid": torch.sigmoid, "tanh": torch.tanh}
    for operation in OPERATIONS:
        functions |= {operation.name: operation.function.ours} if operation.curve is None else operation.curve
    columns = 5
    lines = len(functions) // columns + 1  # and a place for the legend
    size = (2.6 * columns, 2.3 * lines + 0.8)
    figure, grid = plt.subplots(lines, columns, figsize=size, layout="constrained", sharex=True, sharey=True)
    for axes, (name, function) in zip(grid.flat, functions.items(), strict=False):
        draw_curve(axes, name, function)
    grid[0, 0].set(xlim=(-SPAN, SPAN), ylim=(-2.2, 6.8), xticks=range(-6, 7, 3), yticks=range(-2, 7, 2))
    places = list(grid.flat[len(functions) :])
    for axes in places:
        axes.set_axis_off()
    for axes in grid.flat[len(functions) - columns : len(functions)]:
        axes.tick_params(labelbottom=True)
    keys = [*grid[0, 0].get_lines()[2:], *(Patch(**band) for band in BANDS.values())]
    places[0].legend(handles=keys, loc="center left", fontsize=10.5).set_in_layout(False)
    save(figure, results, "Value and derivative, by autograd", path)


def roofline(results: Record, dtype: str, path: Path) -> None:
    """A row for each operation and step, a column for each size and number of threads, as roofline.py prints them."""
    found = rows(results, "roofline", dtype=dtype)
    columns = sorted({(r["pages"] == HUGE, r["elements"], r["threads"]) for r in found})
    lines = list(dict.fromkeys((r["operation"], r["step"]) for r in found))
    values = numpy.full((len(lines), len(columns)), numpy.nan)
    for r in found:
        column = columns.index((r["pages"] == HUGE, r["elements"], r["threads"]))
        values[lines.index((r["operation"], r["step"])), column] = r["over_copy"]["median"]
    figure, axes = plt.subplots(figsize=(3 + 0.55 * len(columns), 1.2 + 0.21 * len(lines)), layout="constrained")
    image = axes.imshow(numpy.log2(values), cmap="PuOr_r", vmin=-2, vmax=2, aspect="auto")
    for (line, column), value in numpy.ndenumerate(values):
        if not numpy.isnan(value):
            colour = "white" if abs(math.log2(value)) > 1.3 else "black"
            axes.text(column, line, f"{value:.2g}", ha="center", va="center", fontsize=6.5, color=colour)
    names = [f"{size_name(size)}\n{threads}t{' huge' if huge else ''}" for huge, size, threads in columns]
    axes.set_xticks(range(len(columns)), names, fontsize=8)
    axes.set_yticks(range(len(lines)), [f"{operation}, {step}" for operation, step in lines], fontsize=8)
    axes.grid(False)
    bar = figure.colorbar(image, ticks=range(-2, 3), shrink=0.4)
    bar.ax.set_yticklabels(["1/4", "1/2", "1", "2", "4"])
    save(figure, results, f"Time over that of a copy of the same bytes, {dtype}", path)


def draw(results: Record, out: Path, name: str) -> None:
    if dtypes := dict.fromkeys(record["dtype"] for record in rows(results, "roofline")):
        for dtype in dtypes:
            roofline(results, dtype, out / f"{name}-{dtype}.png")
        return
    speed = rows(results, "speed")
    for operation in dict.fromkeys(record["operation"] for record in speed):
        records = rows(results, "speed", operation=operation)
        sizes = {record["shape"] for record in records if record["shape"] == size_name(record["elements"])}
        if len(sizes) > 2:
            speedup(results, records, operation, out / f"{name}-speedup-{operation}.png")
        if len(sizes) > 2 and "bytes_moved" in records[0]:
            bandwidth(results, operation, out / f"{name}-bandwidth-{operation}.png")
    fused = {operation.name for operation in FUSED}
    for shape in report.family_shapes(results["records"]):
        records = [record | {"shape": record["operation"]} for record in speed if record["shape"] == shape]
        parts = {"family": [r for r in records if r["operation"] not in fused]}
        parts["fused"] = [r for r in records if r["operation"] in fused]
        for part, found in parts.items():
            if len({record["operation"] for record in found}) > 1:
                path = out / f"{name}-speedup-{part}-{shape.replace(' ', '-')}.png"
                speedup(results, found, f"{PARTS[part]}, {shape} elements", path)
    if rows(results, "kept"):
        kept(results, out / f"{name}-kept.png")
    curves(results, out / f"{name}-curves.png")


def results_in(path: Path) -> list[Path]:
    """The file, or the folder's latest ones; sweep.py's are tables, not ours."""
    if not path.is_dir():
        return [path]
    return [found for found in sorted(path.glob("latest-*.json")) if not found.stem.endswith("-sweep")]


def main() -> None:
    folder = Path(__file__).parent / "results"
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "json", nargs="*", type=Path, help="what run.py or roofline.py wrote, or its folder; default: results"
    )
    parser.add_argument("--out", type=Path, help="folder for the pictures; default: beside the JSON")
    options = parser.parse_args()
    found = [path for given in options.json or [folder] for path in results_in(given)]
    if not found:
        parser.error(
            f"no latest-*.json in {', '.join(map(str, options.json or [folder]))}: run benchmarks/run.py first"
        )
    plt.rcParams.update(STYLE)
    for path in found:
        out = options.out or path.parent
        out.mkdir(parents=True, exist_ok=True)
        draw(json.loads(path.read_text()), out, path.stem)


if __name__ == "__main__":
    main()
