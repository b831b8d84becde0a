"""Every operation as one call with tensors alone: what the tests of faults, of threads and of memory walk."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from operations import OPERATIONS
from test_fused import ROWS as FUSED

import relu_ext
from relu_ext import _C

SHAPE = (6, 4, 9)
NEVER = 2.0**-20  # the probability of a dropout that drops nothing: its steps are 2^-16


@dataclass(frozen=True)
class Call:
    function: Callable  # (*inputs) -> output, relu_ext's
    definition: Callable  # torch's
    shapes: Callable = lambda shape: [shape]  # of the inputs, for the first one's
    needs: tuple = (True,) * 4  # which of them need a gradient
    sizes: Callable = lambda n: [(n,)]  # shapes of the first that hang on a number of elements, or of channels

    def inputs(self, shape=SHAPE, device="cpu", seed=0) -> list[torch.Tensor]:
        make = torch.Generator().manual_seed(seed)
        return self.made(lambda *own: torch.randn(own, generator=make).to(device), shape)

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

    def made(self, make, shape) -> list[torch.Tensor]:
        """The inputs, each of them of make(*shape)."""
        return [make(*own) for own in self.shapes(shape)]

    def choices(self) -> int:
        """Of the inputs that need a gradient."""
        return 1 << len(self.shapes(SHAPE))

    def run(self, make, shape, choice) -> list[torch.Tensor | None]:
        """The output and the gradients of the inputs whose bit is 1; what arrives is made, too."""
        inputs = [x.requires_grad_(bool(choice >> i & 1)) for i, x in enumerate(self.made(make, shape))]
        output = self.function(*inputs)
        wanted = [x for x in inputs if x.requires_grad]
        return [output.detach(), *(torch.autograd.grad(output, wanted, make(*output.shape)) if wanted else ())]


def with_vectors(vectors):
    """For the shape of the first: those beside it are vectors of the channels, or like it."""
    return lambda shape: [shape, *(shape[1:2] if vector else shape for vector in vectors)]


def in_place(function_):
    return lambda input: function_(input.clone())


def of_channels(n):
    """Runs of n elements of a channel, and n channels next to each other."""
    return [(2, 3, n), (3, n)]


def alike(shape):
    return [shape, shape]


def linear(shape):
    return [shape, (5, shape[-1]), (5,)]


def rows(n):
    return [(n, 3)]


def monitored(input):
    """What a Monitor does with a layer's output and with its gradient."""
    output = relu_ext.relu(input)
    kept, last, first = (_C.cells(input, count) for count in (input.shape[1], input.shape[1], 1))
    if not _C.count_bits(output, 1, 1, kept, last):
        _C.count_bits_of("hardtanh", [-1.0, 1.0], input, 1, 1, kept, last)
    _C.find_nonfinite(output, 1, first)
    _C.watch_gradient(output, 1, first)
    return output


def linear_relu(input, weight, bias=None):
    return torch.relu(F.linear(input, weight, bias))


def gated(gate, up):
    return torch.relu(gate) * up


def halves(function):
    """One view each: those of chunk() refuse some of what is done to tensors here."""
    return lambda both: function(*(both.narrow(-1, place, both.shape[-1] // 2) for place in (0, both.shape[-1] // 2)))


SCALE = FUSED["scale_shift_relu"]
prelu_shapes = with_vectors([True])
CALLS = {
    **{str(row): Call(row.function, row.definition) for row in OPERATIONS},
    **{
        f"{row} in place": Call(in_place(row.function_), in_place(row.differentiable_))
        for row in OPERATIONS
        if row.in_place
    },
    **{name: Call(row.ours, row.theirs, with_vectors(row.vectors), sizes=of_channels) for name, row in FUSED.items()},
    "scale_shift_relu, frozen scale": Call(SCALE.ours, SCALE.theirs, with_vectors([True, True]), (True, False, True)),
    "ReLUFunction": Call(relu_ext.ReLUFunction.apply, torch.relu),
    "prelu": Call(relu_ext.prelu, F.prelu, prelu_shapes, sizes=of_channels),
    "prelu, one weight": Call(relu_ext.prelu, F.prelu, lambda shape: [shape, (1,)]),
    "prelu, frozen weight": Call(relu_ext.prelu, F.prelu, prelu_shapes, (True, False)),
    "reglu": Call(relu_ext.reglu, gated, alike),
    "reglu, frozen gate": Call(relu_ext.reglu, gated, alike, (False, True)),
    "reglu of halves": Call(
        halves(relu_ext.reglu),
        halves(gated),
        lambda shape: [(*shape[:-1], 2 * shape[-1])],
        sizes=lambda n: [(3, n)],
    ),
    "relu_dropout": Call(
        lambda input: relu_ext.relu_dropout(input, NEVER), lambda input: torch.relu(input) * (1 / (1 - NEVER))
    ),
    "linear_relu": Call(relu_ext.linear_relu, linear_relu, linear, sizes=rows),
    "linear_relu, no bias": Call(relu_ext.linear_relu, linear_relu, lambda shape: linear(shape)[:2], sizes=rows),
    "relu, monitored": Call(monitored, torch.relu, sizes=of_channels),
}
# Those of which every input may need a gradient.
UNFROZEN = {name: call for name, call in CALLS.items() if all(call.needs)}
