"""The table that the tests walk: one row an operation and its scalars; a new row is tested without a new test."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import relu_ext

SPECIAL = ["zero", "smallest", "largest subnormal", "smallest normal", "largest", "infinity", *["NaN"] * 3]
NOT_NAN = range(6)  # ATen's vector code and its scalar code give other gradients at NaN
NOT_HUGE = range(4)  # and exponentials are compared among numbers of the order of 1, where a tolerance has a meaning
NOT_SMALL_NOR_HUGE = [0, 6, 7, 8]  # whose squares lose digits


@dataclass(frozen=True)
class Operation:
    """One operation of relu_ext with the scalars of its calls, and what defines it.

    Of those that keep bits ``keep`` gives the bit of every element as a bool tensor: the gradient passes where it is
    True. Elsewhere it is multiplied by ``slope``; None stands for a gradient of 0, whatever arrives. The others have a
    ``derivative``.
    """

    name: str
    function: Callable  # (input) -> output, relu_ext's
    definition: Callable  # (input) -> output, torch's
    module: Callable  # relu_ext's, takes inplace= where there is such a form
    torch_module: Callable
    function_: Callable  # the same in place; where there is no such form, by a copy
    definition_: Callable
    in_place: bool = True  # whether there is such a form
    keep: Callable | None = None
    derivative: Callable | None = None  # (input) -> slope, in the type of input
    scalars: tuple = ()  # what the functions have been given, or their defaults; the operators have no defaults
    slope: float | None = None
    special: Sequence = range(9)  # of SPECIAL, those at which ours is torch's
    ulps: int = 0  # units in the last place between relu_ext's numbers and torch's

    def __str__(self):
        defaults = isinstance(self.module, type)
        return self.name if defaults else f"{self.name}({', '.join(map(str, self.scalars))})"

    @property
    def torch_has_gradient_in_place(self):
        """It refuses that of leaky_relu with a negative slope."""
        return self.keep is None or self.slope is None or self.slope >= 0

    def differentiable_(self, input):
        """``definition_``, whose gradient exists for every slope."""
        if self.torch_has_gradient_in_place:
            return self.definition_(input)
        return input.copy_(self.definition(input.clone()))

    @property
    def node(self):
        """Of the node that keeps bits: a tensor with it has come by the kernels or the registered operators."""
        return getattr(self.module, "func", self.module).__name__ + "Backward"

    def masked(self, grad, keep):
        """The gradient that these bits make of ``grad``, by the formula."""
        if self.slope is None:
            return torch.where(keep, grad, torch.zeros((), dtype=grad.dtype, device=grad.device))
        return torch.where(keep, grad, (wide(grad) * self.slope).to(grad.dtype))

    def forward(self, input):
        """The registered operator: output and bits."""
        return getattr(torch.ops.relu_ext, self.name + "_forward")(input, self.scalars)

    def backward(self, grad, bits, stride):
        return getattr(torch.ops.relu_ext, self.name + "_backward")(grad, bits, stride, self.scalars)

    def kept(self, dtype, in_place=False):
        """What backward needs beside the gradient: "bits", "input" or "output"."""
        if self.keep:
            return "bits"
        if in_place:
            return "output"
        return "output" if self.name == "relu_squared" and dtype != torch.float16 else "input"


def wide(tensor):
    """In the type that it is computed in: float32 for 16 bits."""
    return tensor.float() if tensor.dtype.itemsize == 2 else tensor


def bound(function, *scalars):
    return lambda input, inplace=False: function(input, *scalars, inplace)


def bound_(function_, *scalars):
    return lambda input: function_(input, *scalars)


def by_copy(function):
    return lambda input: input.copy_(function(input))


def between(low, high):
    return lambda input: ~((wide(input) <= low) | (wide(input) >= high))


def above(threshold):
    """ATen compares with the threshold as a float on the CPU, rounded to the type of the elements on CUDA."""

    def keep(input):
        rounded = torch.tensor(threshold, dtype=(input if input.is_cuda else wide(input)).dtype)
        return ~(wide(input) <= rounded.item())

    return keep


def hardtanh_row(low, high):
    return Operation(
        name="hardtanh",
        function=bound(relu_ext.hardtanh, low, high),
        function_=bound_(relu_ext.hardtanh_, low, high),
        definition=bound(F.hardtanh, low, high),
        definition_=bound_(F.hardtanh_, low, high),
        module=functools.partial(relu_ext.Hardtanh, low, high),
        torch_module=functools.partial(torch.nn.Hardtanh, low, high),
        keep=between(low, high),
        scalars=(low, high),
        special=NOT_NAN,
    )


def threshold_row(threshold, value):
    return Operation(
        name="threshold",
        function=bound(relu_ext.threshold, threshold, value),
        function_=bound_(relu_ext.threshold_, threshold, value),
        definition=bound(F.threshold, threshold, value),
        definition_=bound_(torch.threshold_, threshold, value),
        module=functools.partial(relu_ext.Threshold, threshold, value),
        torch_module=functools.partial(torch.nn.Threshold, threshold, value),
        keep=above(threshold),
        scalars=(threshold, value),
    )


def leaky_relu_row(slope):
    return Operation(
        name="leaky_relu",
        function=bound(relu_ext.leaky_relu, slope),
        function_=bound_(relu_ext.leaky_relu_, slope),
        definition=bound(F.leaky_relu, slope),
        definition_=bound_(F.leaky_relu_, slope),
        module=functools.partial(relu_ext.LeakyReLU, slope),
        torch_module=functools.partial(torch.nn.LeakyReLU, slope),
        keep=lambda input: input > 0,
        scalars=(slope,),
        slope=slope,
    )


def exponential(alpha, scale=1.0, input_scale=1.0):
    """The derivative of elu."""

    def derivative(input):
        below = scale * alpha * input_scale * torch.exp(input * input_scale)
        return torch.where(input <= 0, below, torch.full_like(input, scale))

    return derivative


def elu_row(alpha):
    """torch has no gradient in place for alpha < 0."""
    function, definition = bound(relu_ext.elu, alpha), bound(F.elu, alpha)
    return Operation(
        name="elu",
        function=function,
        function_=bound_(relu_ext.elu_, alpha) if alpha >= 0 else by_copy(function),
        definition=definition,
        definition_=bound_(F.elu_, alpha) if alpha >= 0 else by_copy(definition),
        in_place=alpha >= 0,
        module=functools.partial(relu_ext.ELU, alpha),
        torch_module=functools.partial(torch.nn.ELU, alpha),
        derivative=exponential(alpha),
        scalars=(alpha,),
        special=NOT_HUGE,
        ulps=8,
    )


def celu_row(alpha):
    return Operation(
        name="celu",
        function=bound(relu_ext.celu, alpha),
        function_=bound_(relu_ext.celu_, alpha),
        definition=bound(F.celu, alpha),
        definition_=bound_(torch.celu_, alpha),
        module=functools.partial(relu_ext.CELU, alpha),
        torch_module=functools.partial(torch.nn.CELU, alpha),
        derivative=exponential(alpha, 1, 1 / alpha if alpha else math.inf),
        scalars=(alpha,),
        special=NOT_HUGE,
        ulps=8,
    )


def squared(input):
    return (r := torch.relu(input)) * r


class DefinedReLUSquared(torch.nn.Module):
    def forward(self, input):
        return squared(input)


RELU = Operation(
    name="relu",
    function=relu_ext.relu,
    function_=relu_ext.relu_,
    definition=F.relu,
    definition_=torch.relu_,
    module=relu_ext.ReLU,
    torch_module=torch.nn.ReLU,
    keep=lambda input: ~(input <= 0),
)
RELU6 = Operation(
    name="relu6",
    function=relu_ext.relu6,
    function_=relu_ext.relu6_,
    definition=F.relu6,
    definition_=functools.partial(F.relu6, inplace=True),
    module=relu_ext.ReLU6,
    torch_module=torch.nn.ReLU6,
    keep=between(0, 6),
    special=NOT_NAN,
)
HARDTANH = Operation(
    name="hardtanh",
    function=relu_ext.hardtanh,
    function_=relu_ext.hardtanh_,
    definition=F.hardtanh,
    definition_=bound_(F.hardtanh_, -1.0, 1.0),
    module=relu_ext.Hardtanh,
    torch_module=torch.nn.Hardtanh,
    keep=between(-1, 1),
    scalars=(-1.0, 1.0),
    special=NOT_NAN,
)
LEAKY_RELU = Operation(
    name="leaky_relu",
    function=relu_ext.leaky_relu,
    function_=relu_ext.leaky_relu_,
    definition=F.leaky_relu,
    definition_=bound_(F.leaky_relu_, 0.01),
    module=relu_ext.LeakyReLU,
    torch_module=torch.nn.LeakyReLU,
    keep=lambda input: input > 0,
    scalars=(0.01,),
    slope=0.01,
)

ELU = Operation(
    name="elu",
    function=relu_ext.elu,
    function_=relu_ext.elu_,
    definition=F.elu,
    definition_=bound_(F.elu_, 1.0),
    module=relu_ext.ELU,
    torch_module=torch.nn.ELU,
    derivative=exponential(1.0),
    scalars=(1.0,),
    special=NOT_HUGE,
    ulps=8,
)
SELU = Operation(
    name="selu",
    function=relu_ext.selu,
    function_=relu_ext.selu_,
    definition=F.selu,
    definition_=torch.selu_,
    module=relu_ext.SELU,
    torch_module=torch.nn.SELU,
    derivative=exponential(1.6732632423543772848170429916717, 1.0507009873554804934193349852946),
    special=NOT_HUGE,
    ulps=8,
)
RELU_SQUARED = Operation(
    name="relu_squared",
    function=relu_ext.relu_squared,
    function_=by_copy(relu_ext.relu_squared),
    definition=squared,
    definition_=by_copy(squared),
    in_place=False,
    module=relu_ext.ReLUSquared,
    torch_module=DefinedReLUSquared,
    derivative=lambda input: 2 * torch.relu(input),
    special=NOT_SMALL_NOR_HUGE,
    ulps=2,  # higher derivatives are sums in another order; test_values.py shows that the first is exact
)

# Functions and modules as they are, without scalars that are bound to them.
WITH_DEFAULTS = [RELU, RELU6, HARDTANH, LEAKY_RELU, ELU, SELU, RELU_SQUARED]
# For what asks more of PyTorch than of the operation. They keep bits: one without scalars, one with them, and one that
# computes; their output; their input.
REPRESENTATIVE = [RELU, HARDTANH, LEAKY_RELU, RELU_SQUARED, ELU]
OPERATIONS = [
    *WITH_DEFAULTS,
    hardtanh_row(-0.3, 0.7),  # neither is a number of 16 bits
    threshold_row(0.1, 0.0),
    threshold_row(0.3, -0.7),
    leaky_relu_row(-0.3),
    leaky_relu_row(1.5),
    elu_row(1.7),
    elu_row(-0.3),
    celu_row(0.5),  # torch's gradient divides by alpha in float32: nothing is lost
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
    """SPECIAL of both signs."""
    fraction = 1 << -int(math.log2(torch.finfo(dtype).eps))
    infinity = torch.tensor(math.inf, dtype=dtype).view(INTEGERS[dtype]).item()
    nan = [infinity | payload for payload in (1, fraction >> 1, fraction - 1)]  # signalling, quiet, every bit set
    positive = torch.tensor([0, 1, fraction - 1, fraction, infinity - 1, infinity, *nan], dtype=INTEGERS[dtype])
    sign_bit = torch.iinfo(INTEGERS[dtype]).min
    return torch.cat([positive, positive | sign_bit]).view(dtype)


def mixed_values(count, dtype, device="cpu", seed=0):
    """Normally distributed numbers, a third of them replaced by special values; the same for the same seed.

    In tests of an operation whose gradient at NaN torch leaves open there is no NaN, unless they ask for it.
    """
    with torch.device("cpu"):  # the generator's, whatever the default device
        generator = torch.Generator().manual_seed(seed)
        values = torch.randn(count, generator=generator).to(dtype)
        special = special_values(dtype)
        places = torch.randperm(count, generator=generator)[: count // 3]
        values[places] = special[torch.randint(len(special), (len(places),), generator=generator)]
    return values.to(device)


ULPS = 0  # of the operation under test: conftest.py


def assert_same(ours, theirs):
    """Equal values, any NaN equal to any other, one zero to the other: what torch promises itself.

    Of exponentials both are close to the truth, by as many units in the last place of themselves or of 1.
    """
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    if not ((ours == theirs) | (ours.isnan() & theirs.isnan())).all():  # assert_close explains, but takes 0.3 ms
        tolerance = ULPS * torch.finfo(ours.dtype).eps if ours.dtype.is_floating_point else 0
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


def kept_by(function, *inputs):
    """function's output, and the tensors that it keeps for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = function(*inputs)
    return output, kept
