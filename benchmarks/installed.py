"""torch.relu without and with relu_ext.install(), in turns: host time on 64 elements, and a step on 1M.

python benchmarks/installed.py
"""

from statistics import median, quantiles
from typing import NamedTuple

import _checkout  # noqa: F401
import torch
from machine import restart_with_steady_malloc
from torch.utils.benchmark import Timer

import relu_ext

ROUNDS = 25


class Case(NamedTuple):
    name: str
    statement: str
    input: torch.Tensor
    calls: int  # in a round
    threads: int = 1


def cases() -> list[Case]:
    call, step = "torch.relu(x)", "torch.autograd.grad(torch.relu(x), x, g)"
    small, large = torch.randn(64), torch.randn(1 << 20)
    return [
        Case("64, no gradient", call, small, 20_000),
        Case("64, with grad", call, small.clone().requires_grad_(), 20_000),
        Case("64, int64: left to torch", call, torch.arange(64), 20_000),
        Case("64, relu_ext.relu", "relu_ext.relu(x)", small, 20_000),
        Case("1M, forward and backward", step, large.clone().requires_grad_(), 50, 2),
        Case("1M bfloat16, the same", step, large.bfloat16().requires_grad_(), 50, 2),
    ]


def microseconds(case: Case) -> tuple[list[float], list[float]]:
    """A call, round by round: without install() and with it."""
    names = {"torch": torch, "relu_ext": relu_ext, "x": case.input, "g": torch.ones_like(case.input)}
    timer = Timer(case.statement, globals=names, num_threads=case.threads)
    timer.timeit(case.calls)
    without, installed = [], []
    for _ in range(ROUNDS):
        without.append(timer.timeit(case.calls).mean * 1e6)
        with relu_ext.installed():
            installed.append(timer.timeit(case.calls).mean * 1e6)
    return without, installed


def main() -> None:
    restart_with_steady_malloc()
    torch.manual_seed(0)
    print(f"{'':26}{'torch':>11}{'installed':>13}  ratio (20 to 80 %)")
    for case in cases():
        without, installed = microseconds(case)
        ratios = [ours / theirs for ours, theirs in zip(installed, without, strict=True)]
        low, *_, high = quantiles(ratios, n=5)
        times = f"{median(without):8.2f} us{median(installed):10.2f} us"
        print(f"{case.name:26}{times}  {median(ratios):.2f} ({low:.2f} to {high:.2f})")


if __name__ == "__main__":
    main()
