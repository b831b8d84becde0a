"""Trains a small CNN on real handwritten digits with nn.ReLU and with relu_ext.ReLU, from one seed.

Losses and final weights must be bit-identical on CPU. Prints accuracy, time, and the bytes kept for backward by the
whole model, part by part. With --monitor: what relu_ext.Monitor adds to a training step, and its report.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable

# Read when CUDA starts; without it cuBLAS may sum in another order from run to run.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import _checkout  # noqa: F401
import torch
from harness import kept_storages
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional as F

import relu_ext

WIDTH = 32  # channels
BATCH = 64
Part = tuple[str, Callable[[torch.Tensor], torch.Tensor]]


class DigitsNet(nn.Module):
    """An activation in each of the places that differ in what the layer after it keeps for its own backward."""

    def __init__(self, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(WIDTH if i else 1, WIDTH, 3, padding=1) for i in range(5))
        self.activations = nn.ModuleList(activation() for _ in range(4))
        self.head = nn.Linear(WIDTH, 10)
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
            nn.init.zeros_(conv.bias)

    def before_convolution(self, x: torch.Tensor) -> torch.Tensor:
        return self.convs[1](self.activations[0](self.convs[0](x)))

    def before_max_pool(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(self.activations[1](self.convs[2](x)), 2)

    def before_add(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.activations[2](self.convs[3](x))

    def before_mean(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.activations[3](self.convs[4](x)).mean((2, 3)))

    def parts(self) -> list[Part]:
        return [
            ("ReLU, then a convolution", self.before_convolution),
            ("ReLU, then max pooling", self.before_max_pool),
            ("ReLU, then a residual add", self.before_add),
            ("ReLU, then the mean of each plane", self.before_mean),
        ]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _, part in self.parts():
            x = part(x)
        return x


class Run:
    """One of the two trainings, an epoch at a time."""

    def __init__(self, activation: Callable[[], nn.Module], seed: int, device: str) -> None:
        torch.manual_seed(seed)
        self.model = DigitsNet(activation).to(device)
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=2e-3)
        self.order = torch.Generator().manual_seed(seed)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def epoch(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        synchronize(images)
        start = time.perf_counter()
        losses = []
        for batch in torch.randperm(len(images), generator=self.order).to(images.device).split(BATCH):
            losses.append(self.step(images[batch], labels[batch]))
        self.losses += torch.stack(losses).tolist()
        synchronize(images)
        self.seconds.append(time.perf_counter() - start)

    def step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        loss = F.cross_entropy(self.model(images), labels)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def mean_loss(self) -> float:
        return statistics.fmean(self.losses[-len(self.losses) // len(self.seconds) :])

    @torch.no_grad()
    def accuracy(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        return (self.model(images).argmax(1) == labels).double().mean().item()

    def kept(self, images: torch.Tensor) -> dict[str, int]:
        """Bytes that each part of the model adds to what is kept for the backward of one batch."""
        x, before, added = images[:BATCH].clone(), 0, {}  # a slice would count as the whole data set
        with kept_storages(excluded=self.model.parameters()) as storages:
            for name, part in self.model.parts():
                x = part(x)
                added[name] = sum(storages.values()) - before
                before += added[name]
        return added


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def differences(first: Run, second: Run) -> list[str]:
    found = [
        f"loss of step {step}: {a!r} and {b!r}"
        for step, (a, b) in enumerate(zip(first.losses, second.losses, strict=True))
        if a != b
    ]
    weights = first.model.state_dict()
    for name, weight in second.model.state_dict().items():
        if not torch.equal(weight, weights[name]):
            found.append(f"{name}: differs by up to {(weight - weights[name]).abs().max().item():.3g}")
    return found


def digits(seed: int, device: str) -> list[torch.Tensor]:
    """Training images, held-out images, training labels, held-out labels; 8 x 8 pixels of 0 to 16."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    split = train_test_split(images.numpy(), data.target, test_size=0.25, random_state=seed, stratify=data.target)
    return [torch.as_tensor(part).to(device) for part in split]


def result_table(runs: dict[str, Run], held_out: tuple[torch.Tensor, torch.Tensor]) -> Table:
    table = Table(
        title="Handwritten digits of scikit-learn",
        caption=f"accuracy: on {len(held_out[0])} held-out digits. loss: mean of the last epoch. "
        "epoch: median; the two trainings take turns, epoch by epoch.",
        min_width=70,
    )
    for heading in ("activation", "accuracy", "loss", "epoch"):
        table.add_column(heading, justify="left" if heading == "activation" else "right")
    for name, run in runs.items():
        epoch = f"{statistics.median(run.seconds) * 1e3:.1f} ms"
        table.add_row(name, f"{run.accuracy(*held_out):.2%}", f"{run.mean_loss():.6f}", epoch)
    return table


def kept_table(runs: dict[str, Run], images: torch.Tensor) -> Table:
    table = Table(
        title=f"Kept for the backward of one batch of {BATCH}, KiB",
        caption="Every storage counts once, where it is first kept, whichever layer keeps it; parameters do not count. "
        "A convolution or a max pooling keeps its input, the output of the ReLU, whatever the ReLU does: bits are "
        "extra there. An add or a mean keeps nothing: there bits replace the output.",
    )
    kept = {name: run.kept(images) for name, run in runs.items()}
    for heading in ("part of the model", *kept, "ratio"):
        table.add_column(heading, justify="left" if heading == "part of the model" else "right")
    parts = next(iter(kept.values()))
    rows = [(part, [counts[part] for counts in kept.values()]) for part in parts]
    rows.append(("the whole model", [sum(counts.values()) for counts in kept.values()]))
    for part, (theirs, ours) in rows:
        table.add_row(
            part, f"{theirs / 1024:.1f}", f"{ours / 1024:.1f}", f"{ours / theirs:.3f}", end_section=part == rows[-2][0]
        )
    return table


def monitored(options: argparse.Namespace, console: Console) -> int:
    """Two trainings with relu_ext.ReLU from one seed, one of them watched, take turns step by step."""
    images, _, labels, _ = digits(options.seed, options.device)
    runs = {name: Run(relu_ext.ReLU, options.seed, options.device) for name in ("without", "with relu_ext.Monitor")}
    monitor = relu_ext.Monitor(runs["with relu_ext.Monitor"].model)
    batches = [batch for _ in range(options.epochs) for batch in torch.randperm(len(images)).split(BATCH)]
    for number, batch in enumerate(batches):
        inputs = images[batch], labels[batch]
        for run in list(runs.values())[:: 1 if number % 2 else -1]:
            synchronize(images)
            start = time.perf_counter()
            loss = run.step(*inputs)
            synchronize(images)
            run.seconds.append(time.perf_counter() - start)
            run.losses.append(loss.item())
    medians = [statistics.median(run.seconds) for run in runs.values()]
    for name, median in zip(runs, medians, strict=True):
        console.print(f"a step {name}: {median * 1e3:.3f} ms, median of {len(batches)}")
    console.print(f"ratio of the medians: {medians[1] / medians[0]:.4f}")
    monitor.report(console)
    found = differences(*runs.values())
    console.print(f"[red]not bit-identical[/]: {found[0]}" if found else "[green]bit-identical[/]")
    return 1 if found and options.device == "cpu" else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--monitor", action="store_true", help="the time of relu_ext.Monitor in a training step")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: no GPU is visible")
    return options


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    if options.monitor:
        return monitored(options, console)
    train_images, test_images, train_labels, test_labels = digits(options.seed, options.device)
    activations = {"nn.ReLU": nn.ReLU, "relu_ext.ReLU": relu_ext.ReLU}
    runs = {name: Run(activation, options.seed, options.device) for name, activation in activations.items()}
    progress = Console(stderr=True)
    for epoch in track(range(options.epochs), "training", console=progress, transient=True, auto_refresh=False):
        for run in list(runs.values())[:: 1 if epoch % 2 else -1]:
            run.epoch(train_images, train_labels)

    console.print(result_table(runs, (test_images, test_labels)))
    console.print(kept_table(runs, train_images))
    found = differences(*runs.values())
    steps = len(runs["nn.ReLU"].losses)
    if not found:
        console.print(f"[green]bit-identical[/]: {steps} losses and all final weights, {options.device}")
        return 0
    console.print(f"[red]not bit-identical[/] on {options.device}: {len(found)} differences, first: {found[0]}")
    return 1 if options.device == "cpu" else 0


if __name__ == "__main__":
    sys.exit(main())
