"""Every operation as one call with tensors alone: what the tests of faults and of threads walk."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from operations import OPERATIONS
from test_fused import ROWS as FUSED

import relu_ext

SHAPE = (6, 4, 9)
NEVER = 2.0**-20  # the probability of a dropout that drops nothing: its steps are 2^-16


@dataclass(frozen=True)
class Call:
    function: Callable  # (*inputs) -> output, relu_ext's
    definition: Callable  # torch's
    shapes: Callable = lambda shape: [shape]  # of the inputs, for the first one's
    needs: tuple = (True,) * 4  # which of them need a gradient

    def inputs(self, shape=SHAPE, device="cpu", seed=0) -> list[torch.Tensor]:
        make = torch.Generator().manual_seed(seed)
        return [torch.randn(own, generator=make).to(device) for own in self.shapes(shape)]

    def leaves(self, inputs) -> list[torch.Tensor]:
        """The inputs, those that need a gradient as leaves of a new graph."""
        return [x.detach().requires_grad_(need) for x, need in zip(inputs, self.needs, strict=False)]

    def gradients(self, output, leaves, grad=None, **options) -> tuple:
        wanted = [x for x in leaves if x.requires_grad]
        return torch.autograd.grad(output, wanted, torch.ones_like(output) if grad is None else grad, **options)

    def results(self, function, inputs, grad=None) -> list[torch.Tensor]:
        """The output, and the gradients of those inputs that need one."""
        leaves = self.leaves(inputs)
        output = function(*leaves)
        return [output.detach().clone(), *self.gradients(output, leaves, grad)]


def with_vectors(vectors):
    """For the shape of the first: those beside it are vectors of the channels, or like it."""
    return lambda shape: [shape, *(shape[1:2] if vector else shape for vector in vectors)]


def in_place(function_):
    return lambda input: function_(input.clone())


def alike(shape):
    return [shape, shape]


def linear(shape):
    return [shape, (5, shape[-1]), (5,)]


def linear_relu(input, weight, bias=None):
    return torch.relu(F.linear(input, weight, bias))


def gated(gate, up):
    return torch.relu(gate) * up


SCALE = FUSED["scale_shift_relu"]
prelu_shapes = with_vectors([True])
CALLS = {
    **{str(row): Call(row.function, row.definition) for row in OPERATIONS},
    **{
        f"{row} in place": Call(in_place(row.function_), in_place(row.differentiable_))
        for row in OPERATIONS
        if row.in_place
    },
    **{name: Call(row.ours, row.theirs, with_vectors(row.vectors)) for name, row in FUSED.items()},
    "scale_shift_relu, frozen scale": Call(
        FUSED["scale_shift_relu"].ours,
        FUSED["scale_shift_relu"].theirs,
        with_vectors([True, True]),
        (True, False, True),
    ),
    "ReLUFunction": Call(relu_ext.ReLUFunction.apply, torch.relu),
    "prelu": Call(relu_ext.prelu, F.prelu, prelu_shapes),
    "prelu, one weight": Call(relu_ext.prelu, F.prelu, lambda shape: [shape, (1,)]),
    "prelu, frozen weight": Call(relu_ext.prelu, F.prelu, prelu_shapes, (True, False)),
    "reglu": Call(relu_ext.reglu, gated, alike),
    "reglu, frozen gate": Call(relu_ext.reglu, gated, alike, (False, True)),
    "relu_dropout": Call(
        lambda input: relu_ext.relu_dropout(input, NEVER), lambda input: torch.relu(input) * (1 / (1 - NEVER))
    ),
    "linear_relu": Call(relu_ext.linear_relu, linear_relu, linear),
    "linear_relu, no bias": Call(
        lambda x, w: relu_ext.linear_relu(x, w),
        lambda x, w: torch.relu(F.linear(x, w)),
        lambda shape: linear(shape)[:2],
    ),
}
