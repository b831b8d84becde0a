"""The table that the tests walk: one row an operation, so that a new row is tested without a new test."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import relu_ext


@dataclass(frozen=True)
class Operation:
    """One operation of relu_ext and what defines it.

    ``keep`` gives the bit of every element as a bool tensor: the gradient passes where it is True.
    """

    name: str
    function: Callable  # (input) -> output, relu_ext's
    function_: Callable  # the same in place
    definition: Callable  # (input) -> output, torch's
    definition_: Callable  # the same in place
    module: type  # relu_ext's, takes inplace=
    torch_module: type
    keep: Callable

    def __str__(self):
        return self.name


OPERATIONS = [
    Operation(
        name="relu",
        function=relu_ext.relu,
        function_=relu_ext.relu_,
        definition=F.relu,
        definition_=torch.relu_,
        module=relu_ext.ReLU,
        torch_module=torch.nn.ReLU,
        keep=lambda input: ~(input <= 0),
    ),
]

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = {
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
}  # as wide as the key, to look at its bits


def packed(keep):
    """The bit format's definition: element i of ``keep`` in memory order is bit i % 8 of byte i // 8."""
    order = sorted(range(keep.dim()), key=lambda d: (-keep.stride(d), keep.size(d)))
    flat = keep.permute(order).reshape(-1).to(torch.uint8)
    flat = F.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (flat << torch.arange(8, dtype=torch.uint8, device=keep.device)).sum(1, dtype=torch.uint8)


def special_values(dtype):
    """Zero, smallest and largest subnormal, smallest normal, largest finite, infinity, three NaN; both signs."""
    fraction = 1 << -int(math.log2(torch.finfo(dtype).eps))
    infinity = torch.tensor(math.inf, dtype=dtype).view(INTEGERS[dtype]).item()
    nan = [infinity | payload for payload in (1, fraction >> 1, fraction - 1)]  # signalling, quiet, every bit set
    positive = torch.tensor([0, 1, fraction - 1, fraction, infinity - 1, infinity, *nan], dtype=INTEGERS[dtype])
    sign_bit = torch.iinfo(INTEGERS[dtype]).min
    return torch.cat([positive, positive | sign_bit]).view(dtype)


def mixed_values(count, dtype, device="cpu", seed=0):
    """Normally distributed numbers, a third of them replaced by special values; the same for the same seed."""
    with torch.device("cpu"):  # the generator's, whatever the default device
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(count, generator=generator).to(dtype)
        special = special_values(dtype)
        places = torch.randperm(count, generator=generator)[: count // 3]
        values[places] = special[torch.randint(len(special), (len(places),), generator=generator)]
    return values.to(device)


def assert_same(ours, theirs):
    """Equal values, any NaN equal to any other, one zero to the other: what torch promises itself."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if not ((ours == theirs) | (ours.isnan() & theirs.isnan())).all():  # assert_close explains, but takes 0.3 ms
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def kept_by(function, *inputs):
    """function's output, and the tensors that it keeps for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = function(*inputs)
    return output, kept
