"""The table of calls: every function of relu_ext, its operators and what a Monitor asks, with all tensors they take.

It is walked where what is touched and what is left counts, not the numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from operations import OPERATIONS
from torch import Tensor

import relu_ext
from relu_ext import _C


@dataclass(frozen=True)
class Call:
    """``inputs(make, n)`` are tensors whose sizes hang on n; make(*shape) is one."""

    name: str
    function: Callable[..., Tensor]
    inputs: Callable[[Callable, int], list[Tensor]]

    def __str__(self) -> str:
        return self.name


def alike(count: int) -> Callable:
    return lambda make, n: [make(n) for _ in range(count)]


def planes(vectors: int, others: int = 0) -> Callable:
    """Runs of n elements of a channel, beside them vectors, and others like the input."""
    return lambda make, n: [make(2, 3, n), *(make(3) for _ in range(vectors)), *(make(2, 3, n) for _ in range(others))]


def columns(vectors: int, others: int = 0) -> Callable:
    """n channels next to each other."""
    return lambda make, n: [make(3, n), *(make(n) for _ in range(vectors)), *(make(3, n) for _ in range(others))]


def in_place(function_: Callable) -> Callable:
    return lambda input: function_(input * 1)


def counted(input: Tensor) -> Tensor:
    """What a Monitor does with a layer's output and with its gradient."""
    output = relu_ext.relu(input)
    kept, last, first = (_C.cells(input, count) for count in (input.shape[1], input.shape[1], 1))
    if not _C.count_bits(output, 1, 1, kept, last):
        _C.count_bits_of("hardtanh", [-1.0, 1.0], input, 1, 1, kept, last)
    _C.find_nonfinite(output, 1, first)
    _C.watch_gradient(output, 1, first)
    return output


def dropped(input: Tensor) -> Tensor:
    return relu_ext.relu_dropout(input, 0.3)


def calls() -> Iterator[Call]:
    for row in OPERATIONS:
        yield Call(str(row), row.function, alike(1))
        if row.in_place:
            yield Call(f"{row}, in place", in_place(row.function_), alike(1))
    yield Call("ReLUFunction", relu_ext.ReLUFunction.apply, alike(1))
    yield Call("relu_dropout", dropped, alike(1))
    yield Call("reglu", relu_ext.reglu, alike(2))
    yield Call("reglu of halves", lambda both: relu_ext.reglu(*both.chunk(2, -1)), lambda make, n: [make(3, 2 * n)])
    yield Call("prelu of one weight", relu_ext.prelu, lambda make, n: [make(n), make(1)])
    yield Call("add_relu", relu_ext.add_relu, alike(2))
    for shape in (planes, columns):
        yield Call(f"prelu, {shape.__name__}", relu_ext.prelu, shape(1))
        yield Call(f"bias_relu, {shape.__name__}", relu_ext.bias_relu, shape(1))
        for others, form in enumerate((shape.__name__, f"{shape.__name__}, residual")):
            yield Call(f"scale_shift_relu, {form}", relu_ext.scale_shift_relu, shape(2, others))
            yield Call(f"fma_relu, {form}", relu_ext.fma_relu, shape(2, others))
        yield Call(f"Monitor, {shape.__name__}", counted, shape(0))
    yield Call("linear_relu", relu_ext.linear_relu, lambda make, n: [make(2, 3), make(n, 3), make(n)])
    yield Call("linear_relu without bias", relu_ext.linear_relu, lambda make, n: [make(2, 3), make(n, 3)])


CALLS = list(calls())


def run(call: Call, make: Callable, n: int, needs: int) -> list[Tensor | None]:
    """The output and the gradients of the inputs whose bit of ``needs`` is 1; what arrives is made, too."""
    inputs = [tensor.requires_grad_(bool(needs >> i & 1)) for i, tensor in enumerate(call.inputs(make, n))]
    output = call.function(*inputs)
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    return [output.detach(), *(torch.autograd.grad(output, wanted, make(*output.shape)) if wanted else ())]
