"""What is measured: one row per operation, the shapes, and the numbers to reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import _checkout  # noqa: F401
import torch
from machine import last_level_cache, memory_bytes
from torch import nn

import relu_ext

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS, EAGER, COMPILED = "relu_ext", "torch", "torch.compile"  # the competitors
FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward + backward"
STEPS = (FORWARD, BACKWARD, TRAINING)


class Pair(NamedTuple):
    ours: Callable[..., Any]
    torch: Callable[..., Any]


@dataclass(frozen=True)
class Operation:
    """A row of every table. `function.torch` is the definition that `function.ours` must equal.

    A pass is one tensor of the input's size, read or written. Where the result of a layer is kept for backward, that
    is no pass of its own; packed bits are, `bits` of them an element, written in forward and read in backward.
    """

    name: str
    torch_name: str
    function: Pair
    inplace: Pair | None = None
    module: Pair | None = None
    operands: int = 1
    forward_passes: int = 2
    backward_passes: int = 2
    bits: int = 0
    rtol: float = 0.0
    atol: float = 0.0

    def passes(self, step: str, itemsize: int) -> float:
        bits = self.bits / (8 * itemsize)
        return {
            FORWARD: self.forward_passes,
            BACKWARD: self.backward_passes + bits,
            TRAINING: self.forward_passes + self.backward_passes + 2 * bits,
        }[step]


OPERATIONS = (
    Operation(
        name="relu",
        torch_name="torch.relu",
        function=Pair(relu_ext.relu, torch.relu),
        inplace=Pair(relu_ext.relu_, torch.relu_),
        module=Pair(relu_ext.ReLU, nn.ReLU),
        bits=1,
    ),
)


@dataclass(frozen=True)
class Shape:
    name: str
    dims: tuple[int, ...]
    # Inductor specialises on the shape, which costs 3 s of g++ per shape and dtype for forward and training.
    compiled: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.dims)


NETWORK_SHAPES = (
    # OPT-125M: 8 sequences of 512 tokens, feed-forward width 3072, ReLU (arXiv:2205.01068, table 1).
    Shape("OPT-125M ffn", (8, 512, 3072), compiled=True),
    # ResNet-50: what leaves stage conv3_x (arXiv:1512.03385, table 1), batch 32. conv2_x, twice as large, is past
    # the cache like the largest of the sizes and would cost the default run half a minute.
    Shape("ResNet-50 stage", (32, 512, 28, 28), compiled=True),
)


def size_name(elements: int) -> str:
    for factor, unit in ((2**20, "M"), (2**10, "K")):
        if elements >= factor and elements % factor == 0:
            return f"{elements // factor}{unit}"
    return str(elements)


def shapes(device: torch.device) -> list[Shape]:
    """Powers of two from 64 elements to float32 tensors of four times the last-level cache, then real networks."""
    if device.type == "cuda":
        # 128M elements are 256 MB in 16 bits, five times the largest L2 cache of today (50 MB, H100).
        sizes = [64, 2**10, 2**14, 2**17, 2**20, 2**24, 2**26, 2**27]
    else:
        # Training keeps six such tensors alive at most: a sixteenth of the memory each leaves room.
        largest = min(4 * last_level_cache(), memory_bytes() // 16) // 4
        largest = 2 ** int(math.log2(largest))
        sizes = [size for size in (64, 2**10, 2**14, 2**17, 2**20, 2**22) if size < largest] + [largest]
    return [Shape(size_name(size), (size,), compiled=size in (64, 2**20)) for size in sizes] + list(NETWORK_SHAPES)


HOST_ELEMENTS = 64
CHAIN = 200  # layers
CALL, CALL_GRAD, MODULE, MODULE_GRAD = "call", "call, input with grad", "module", "module, input with grad"
INPLACE, CHAIN_BACKWARD, CHAIN_TRAINING = "in place", "backward, a layer of 200", "forward + backward, a layer of 200"


@dataclass(frozen=True)
class Target:
    """`quantity` of every record that agrees with `where` has to be at most `limit`."""

    text: str
    limit: float
    operation: str
    where: dict[str, Any]
    quantity: str = "ratio"


CPU_TARGETS = (
    Target("relu: call, 64 elements", 0.65, "relu", {"section": "host", "step": CALL}),
    Target("relu: call with grad, 64 elements", 0.80, "relu", {"section": "host", "step": CALL_GRAD}),
    Target("relu: module, 64 elements", 0.80, "relu", {"section": "host", "step": MODULE}),
    Target("relu: backward per layer, 64 elements", 0.90, "relu", {"section": "host", "step": CHAIN_BACKWARD}),
    Target("relu: forward in cache", 1.0, "relu", {"section": "speed", "step": FORWARD, "in_cache": True}),
    Target("relu: backward from bits, every size", 1.0, "relu", {"section": "speed", "step": BACKWARD}),
    Target("relu: kept, float32", 1 / 32, "relu", {"section": "kept", "dtype": "float32"}, "share_of_input"),
    Target("relu: kept, bfloat16", 1 / 16, "relu", {"section": "kept", "dtype": "bfloat16"}, "share_of_input"),
    Target("relu: kept, float16", 1 / 16, "relu", {"section": "kept", "dtype": "float16"}, "share_of_input"),
)
TARGETS = {"cpu": CPU_TARGETS, "cuda": ()}
