"""Memory of a ResNet-style block in training: convolution, norm, ReLU, convolution, norm, add, ReLU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gpu
import torch
from cases import OURS, Operation
from harness import kept_storages
from torch import Tensor, nn

Record = dict[str, Any]
SHAPE = (32, 64, 56, 56)  # a batch of 32 in ResNet-18's stage conv2_x (arXiv:1512.03385, table 1)


class Block(nn.Module):
    def __init__(self, channels: int, relu: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (nn.BatchNorm2d(channels) for _ in range(2))
        self.relu1, self.relu2 = relu(), relu()

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.norm2(self.conv2(y)) + x)


def alone(block: Block) -> nn.Module:
    return block


def before_a_convolution(block: Block) -> nn.Module:
    """As in a network, where the next block's convolution keeps this block's output."""
    return nn.Sequential(block, nn.Conv2d(SHAPE[1], SHAPE[1], 3, padding=1, bias=False))


PLACES = {"alone": alone, "then a convolution": before_a_convolution}


def memory(model: nn.Module, x: Tensor, grad: Tensor) -> dict[str, int]:
    """Bytes kept for backward and bytes at the peak; parameters and the input, which others keep, do not count."""
    model(x).backward(grad)  # gradients have memory, and so has whatever the convolutions need
    with kept_storages(excluded=[x, *model.parameters(), *model.buffers()]) as storages:
        output = model(x)
    kept = {"kept_bytes": sum(storages.values())}
    del output
    return kept | ({"peak_bytes": gpu.peak_bytes(lambda: model(x).backward(grad))} if x.is_cuda else {})


def records(operation: Operation, device: torch.device, shape: tuple[int, ...] = SHAPE) -> Iterator[Record]:
    x = torch.randn(shape, device=device).requires_grad_()
    grad = torch.randn(shape, device=device)
    for place, build in PLACES.items():
        for inplace in (False, True):
            for side, module in operation.module._asdict().items():
                torch.manual_seed(0)
                model = build(Block(shape[1], lambda module=module, inplace=inplace: module(inplace=inplace)))
                yield {
                    "section": "block",
                    "operation": operation.name,
                    "place": place,
                    "inplace": inplace,
                    "side": OURS if side == "ours" else side,
                    "shape": list(shape),
                    **memory(model.to(device), x, grad),
                }
