"""ReLU fused with its neighbours: torch's values and gradients in any layout; what is kept; how they compose."""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from composing import Watch, error_of
from operations import DTYPES, assert_same, kept_by, mixed_values, packed
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import relu_ext


def along(vector, input, dim):
    return vector.view([-1 if d == dim % input.dim() else 1 for d in range(input.dim())])


def added(input, residual):
    return torch.relu(input + residual)


def biased(input, bias, dim=1):
    return torch.relu(input + along(bias, input, dim))


def scaled(input, scale, shift, residual=None, dim=1):
    result = input * along(scale, input, dim) + along(shift, input, dim)
    return torch.relu(result if residual is None else result + residual)


def multiplied_and_added(input, scale, shift, residual=None, dim=1):
    result = torch.addcmul(along(shift, input, dim), input, along(scale, input, dim))
    return torch.relu(result if residual is None else result + residual)


@dataclass(frozen=True)
class Row:
    """A fused operation: which of its inputs after the first are vectors of the channels."""

    ours: Callable
    theirs: Callable
    vectors: tuple
    node: str
    rounds_twice: bool = True  # input * scale + shift

    def inputs(self, make, shape, dim=1, lay_out=lambda tensor: tensor):
        shapes = [(), *((shape[dim],) if vector else shape for vector in self.vectors)]
        first = lay_out(make(*shape, seed=0))
        rest = (make(*own, seed=seed) for seed, own in enumerate(shapes[1:], 1))
        return [first, *(x if vector else lay_out(x) for x, vector in zip(rest, self.vectors, strict=True))]

    def arguments(self, dim):
        return {"dim": dim} if any(self.vectors) else {}

    @property
    def has_scale(self):
        return self.vectors[:2] == (True, True)

    def rounds_as_torch(self, dtype):
        return not self.has_scale or (self.rounds_twice and dtype.itemsize > 2)

    def before_relu(self, inputs, dim=1):
        """In float64: what is rectified, and the sum of what its roundings are relative to."""
        first, *rest = (x.double() for x in inputs)
        vectors = [along(x, first, dim) if is_vector else x for x, is_vector in zip(rest, self.vectors, strict=True)]
        total = first * vectors.pop(0) if self.has_scale else first
        sizes = total.abs() if self.has_scale else torch.zeros_like(total)
        for x in vectors:
            total = total + x
            sizes = sizes + total.abs()
        return total, sizes


ADD = Row(relu_ext.add_relu, added, (False,), "AddReLUBackward")
BIAS = Row(relu_ext.bias_relu, biased, (True,), "BiasReLUBackward")
SCALE = Row(relu_ext.scale_shift_relu, scaled, (True, True), "ScaleShiftReLUBackward")
SCALE_ADD = Row(relu_ext.scale_shift_relu, scaled, (True, True, False), "ScaleShiftReLUBackward")
FMA = Row(relu_ext.fma_relu, scaled, (True, True), "FMAReLUBackward", rounds_twice=False)
FMA_ADD = Row(relu_ext.fma_relu, scaled, (True, True, False), "FMAReLUBackward", rounds_twice=False)
ROWS = {
    "add_relu": ADD,
    "bias_relu": BIAS,
    "scale_shift_relu": SCALE,
    "scale_shift_relu, residual": SCALE_ADD,
    "fma_relu": FMA,
    "fma_relu, residual": FMA_ADD,
}
over_rows = pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
over_vectors = pytest.mark.parametrize("row", [BIAS, SCALE], ids=["bias_relu", "scale_shift_relu"])
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def moderate(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def special(*shape, dtype=torch.float32, device="cpu", seed=0):
    return mixed_values(torch.Size(shape).numel(), dtype, device, seed).view(shape)


def maker(make, **options):
    return lambda *shape, seed=0: make(*shape, seed=seed, **options)


def results(function, inputs, grad, needs=None, **arguments):
    """The output and the gradients of those inputs that need one."""
    needs = needs or [True] * len(inputs)
    inputs = [input.detach().requires_grad_(need) for input, need in zip(inputs, needs, strict=True)]
    output = function(*inputs, **arguments)
    wanted = [input for input in inputs if input.requires_grad]
    return output.detach(), *(torch.autograd.grad(output, wanted, grad) if wanted else ())


def kernels_take(row, inputs, **arguments):
    leaves = [input.detach().requires_grad_() for input in inputs]
    return row.ours(*leaves, **arguments).grad_fn.name() == row.node


def sum_over(terms, dim):
    others = [d for d in range(terms.dim()) if d != dim % terms.dim()]
    return terms.sum(others) if others else terms  # sum([]) is over all


def assert_sums(ours, terms, dim, dtype):
    """Sums of float64 terms, each of which may have been rounded to float32, but for the last rounding."""
    unit, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    truth, size = sum_over(terms, dim), sum_over(terms.abs(), dim)
    bound = truth.abs() * unit + size * min(unit, torch.finfo(torch.float32).eps) + smallest
    assert ours.dtype == dtype and ours.shape == truth.shape
    assert ((ours.double() - truth).abs() <= bound).all()


def sums_of(row, inputs, grad):
    """The gradients of the vectors."""
    _, *gradients = results(row.ours, inputs, grad)
    return [gradient for gradient, vector in zip(gradients[1:], row.vectors, strict=True) if vector]


def assert_near(row, output, inputs, dim=1):
    """As many roundings as there are operations, each of half a unit; in 16 bits all but the last are float32's."""
    total, sizes = row.before_relu(inputs, dim)
    unit = torch.finfo(output.dtype).eps / 2
    inner = min(unit, torch.finfo(torch.float32).eps / 2)
    bound = (sizes * inner + total.abs() * unit) * 1.001 + torch.finfo(output.dtype).smallest_normal
    errors = (output.double() - torch.relu(total)).abs()
    finite = output.isfinite() & total.isfinite()
    assert (errors <= bound)[finite].all()
    return errors


def assert_output(row, output, inputs, dim):
    errors = assert_near(row, output, inputs, dim)
    if output.numel() > 1000:  # as a whole not further from the truth than torch
        theirs = row.theirs(*inputs, **row.arguments(dim)).double()
        assert errors.sum() <= (theirs - torch.relu(row.before_relu(inputs, dim)[0])).abs().sum()


def assert_gradients(row, gradients, output, inputs, grad, dim):
    """Of those elements that the output shows to be kept."""
    dtype, masked = grad.dtype, torch.where(output <= 0, torch.zeros_like(grad), grad)
    grad_input, *rest = gradients
    assert_same(grad_input, masked * along(inputs[1], grad, dim) if row.has_scale else masked)
    for k, (gradient, is_vector) in enumerate(zip(rest, row.vectors, strict=True)):
        if not is_vector:
            assert_same(gradient, masked)
        else:
            terms = masked.double() * inputs[0].double() if row.has_scale and k == 0 else masked.double()
            assert_sums(gradient, terms, dim, dtype)


def assert_right(row, inputs, grad, dim=1):
    output, *gradients = results(row.ours, inputs, grad, **row.arguments(dim))
    if row.rounds_as_torch(grad.dtype):
        assert_same(output, row.theirs(*inputs, **row.arguments(dim)))
    else:
        assert_output(row, output, inputs, dim)
    assert_gradients(row, gradients, output, inputs, grad, dim)
    strides = [x.stride() for x in (output, *gradients)]
    assert strides == [x.stride() for x in (inputs[0], *inputs)]


def lay_backwards(tensor):
    order = tuple(range(tensor.dim())[::-1])
    return tensor.permute(order).contiguous().permute(order)


LAYOUTS = {
    "contiguous": lambda tensor: tensor,
    "backwards": lay_backwards,
    "channels last": lambda tensor: tensor.movedim(1, -1).contiguous().movedim(-1, 1),
    "offset": lambda tensor: F.pad(tensor.flatten(), (1, 0))[1:].view(tensor.shape),
}
SHAPES = {
    "NCHW": ((4, 6, 5, 7), 1),
    "its batch": ((4, 6, 5, 7), 0),
    "its columns": ((4, 6, 5, 7), -1),
    "one place": ((3, 200, 1, 1), 1),
    "rows": ((50, 70), 1),
    "rows of rows": ((50, 33), 0),
    "few columns": ((7000, 3), 1),
    "long runs": ((5, 4, 130), 1),
    "planes of whole words": ((3, 5, 16, 16), 1),
    "large planes": ((2, 3, 61, 41), 1),
    "one channel": ((3, 1, 5), 1),
    "a vector": ((1000,), 0),
}


@over_rows
@over_dtypes
@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape, dim", SHAPES.values(), ids=SHAPES)
def test_layouts(device, row, dtype, lay_out, shape, dim, isa):
    if len(shape) == 1 and lay_out is LAYOUTS["channels last"]:
        pytest.skip("a vector has no channels but itself")
    make = maker(moderate, dtype=dtype, device=device)
    inputs, grad = row.inputs(make, shape, dim, lay_out), lay_out(make(*shape, seed=9))
    assert_right(row, inputs, grad, dim)
    assert kernels_take(row, inputs, **row.arguments(dim))


@over_rows
@over_dtypes
def test_every_length(device, row, dtype, isa):
    """Around the vectors, the blocks of 64 and the chunks of 1024 elements."""
    make = maker(moderate, dtype=dtype, device=device)
    for columns in (*range(1, 70), 127, 511, 512, 513, 1023, 1024, 1025):
        for shape in ((3, columns), (1, 2, columns)):
            assert_right(row, row.inputs(make, shape), make(*shape, seed=9))


@over_rows
@over_dtypes
def test_on_more_threads(device, row, dtype, threads):
    make = maker(moderate, dtype=dtype, device=device)
    for shape in ((3, 7, 150, 70), (130, 1001)):
        assert_right(row, row.inputs(make, shape), make(*shape, seed=9))


@over_rows
@over_dtypes
def test_special_values(device, row, dtype, isa):
    """Of the input, the residual and grad; and of the bias. What is infinite or NaN is so in torch."""
    make = maker(special, dtype=dtype, device=device)
    inputs, grad = row.inputs(make, (12, 7, 19)), make(12, 7, 19, seed=9)
    if not row.has_scale:
        output, *gradients = results(row.ours, inputs, grad)
        expected, *theirs = results(row.theirs, inputs, grad)
        assert_same(output, expected)
        assert_same(gradients[0], theirs[0])
        return
    inputs[1:3] = moderate(7, dtype=dtype, device=device, seed=1), moderate(7, dtype=dtype, device=device, seed=2)
    output, *gradients = results(row.ours, inputs, grad)
    expected = row.theirs(*(x.float() if dtype.itemsize == 2 else x for x in inputs)).to(dtype)
    assert torch.equal(output.isnan(), expected.isnan()) and torch.equal(output.isinf(), expected.isinf())
    if row.rounds_as_torch(dtype):
        assert_same(output, expected)
    assert_near(row, output, inputs)
    masked = torch.where(output <= 0, torch.zeros_like(grad), grad)
    assert_same(gradients[0], masked * along(inputs[1], grad, 1))
    for residual in gradients[3:]:
        assert_same(residual, masked)


@over_dtypes
@pytest.mark.parametrize("row", [FMA, FMA_ADD], ids=["alone", "residual"])
def test_multiply_add_rounds_as_addcmul(row, dtype, isas):
    """Where both have the instruction; in 16 bits ours rounds the residual's sum alone."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this build of torch has no multiply-adds here")
    if row is FMA_ADD and dtype.itemsize == 2:
        pytest.skip("addcmul rounds before the residual is added")
    for isa in isas:
        for shape in ((4, 6, 5, 7), (50, 33), (3, 200, 1, 1), (2, 3, 60, 40)):
            inputs = row.inputs(maker(moderate, dtype=dtype), shape)
            output, expected = row.ours(*inputs), multiplied_and_added(*inputs)
            assert isa == "portable" or torch.equal(output, expected)


@over_dtypes
@pytest.mark.parametrize("row", [SCALE, SCALE_ADD], ids=["alone", "residual"])
def test_products_beyond_the_range(row, device, dtype, isa):
    """Infinite, or less than the least number, whatever is added to them: bfloat16 has float's range."""
    huge, tiny = torch.finfo(dtype).max / 2, torch.finfo(dtype).smallest_normal
    for number, factor, addend in ((huge, 3, -huge), (tiny, tiny, tiny), (-huge, 3, huge)):
        inputs = row.inputs(
            lambda *shape, seed, n=(number, factor, addend, 0.0): torch.full(shape, n[seed], dtype=torch.float64),
            (3, 70),
        )
        inputs = [x.to(device, dtype) for x in inputs]
        wide = [x.float() if dtype.itemsize == 2 else x for x in inputs]
        assert_same(row.ours(*inputs), row.theirs(*wide).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_no_gradient_where_the_sum_rounds_to_zero(device, dtype, isa):
    """As in torch, whose relu sees the rounded sum."""
    half_of_least = round(math.log2(torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2))
    multiples = torch.tensor([-2, -1, -0.5, 0.5, 1, 1.5, 2]).repeat(20).view(1, -1)
    input = (multiples * 2.0 ** (half_of_least // 2)).to(device, dtype)
    scale = input.new_full(input.shape[1:], 2.0 ** (half_of_least - half_of_least // 2))
    inputs, grad = [input, scale, torch.zeros_like(scale)], torch.ones_like(input)
    output, *gradients = results(relu_ext.scale_shift_relu, inputs, grad)
    expected, *theirs = results(scaled, inputs, grad)
    assert ((output == 0) & (input > 0)).any() and (output > 0).any()
    assert_same(output, expected)
    assert_same(gradients[0], theirs[0])


@over_rows
@pytest.mark.parametrize("shape", [(0, 3, 2), (2, 3, 0), (2, 0, 3), (2, 0)], ids=str)
def test_empty(device, row, shape):
    inputs = row.inputs(maker(moderate, device=device), shape)
    ours, theirs = (results(f, inputs, torch.ones(shape, device=device)) for f in (row.ours, row.theirs))
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@over_rows
def test_gradients_alone(device, row):
    """Any of them, and any other not: the same numbers, and nothing is kept for those that are not needed."""
    shape = (5, 6, 70)
    inputs, grad = row.inputs(maker(moderate, device=device), shape), moderate(*shape, device=device, seed=9)
    _, *all_of_them = results(row.ours, inputs, grad)
    for which in range(1, 2 ** len(inputs)):
        needs = [bool(which >> i & 1) for i in range(len(inputs))]
        _, *some = results(row.ours, inputs, grad, needs)
        for a, b in zip(some, (x for x, need in zip(all_of_them, needs, strict=True) if need), strict=True):
            assert torch.equal(a, b)
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        output, (bits, *others) = kept_by(row.ours, *leaves)
        if not row.has_scale:
            assert torch.equal(bits, packed(~(output <= 0)))
        expected = [inputs[1]] * row.has_scale + [inputs[0]] * (row.has_scale and needs[1])
        assert [x.data_ptr() for x in others] == [x.data_ptr() for x in expected]
    assert kept_by(row.ours, *inputs)[1] == []
    with torch.no_grad():
        assert kept_by(row.ours, *(x.requires_grad_() for x in inputs))[1] == []


@over_dtypes
@pytest.mark.parametrize("shape", [(1, 3, 7), (2, 1, 13), (3, 70, 1)], ids=str)
def test_spare_bits_are_zero(device, dtype, shape, isa):
    """Where a block goes beyond the end, the bias alone would have bits there."""
    input, bias = moderate(*shape, dtype=dtype, device=device), torch.ones(shape[1], dtype=dtype, device=device)
    output, (bits,) = kept_by(relu_ext.bias_relu, input.requires_grad_(), bias)
    assert torch.equal(bits, packed(output > 0))


def test_residual_and_input_have_one_gradient(device):
    leaves = [moderate(7, 9, device=device, seed=seed).requires_grad_() for seed in (0, 1)]
    first, second = torch.autograd.grad(relu_ext.add_relu(*leaves).sum(), leaves)
    assert first.data_ptr() == second.data_ptr()


@over_rows
def test_gradient_of_another_layout(device, row):
    make = maker(moderate, device=device)
    inputs = row.inputs(make, (4, 6, 5, 7))
    dense = make(4, 6, 5, 7, seed=9)
    for grad in (lay_backwards(dense), dense.new_ones(()).expand(dense.shape)):
        ours, same = (results(row.ours, inputs, g) for g in (grad, grad.contiguous()))
        for a, b in zip(ours, same, strict=True):
            assert torch.equal(a, b) and a.stride() == b.stride()


@over_vectors
@over_dtypes
@pytest.mark.parametrize("shape", [(3, 5, 1100), (2100, 130), (300, 7)], ids=str)
def test_sums_are_the_same_for_every_instruction_set(row, dtype, shape, isas):
    make = maker(moderate, dtype=dtype)
    inputs, grad = row.inputs(make, shape), make(*shape, seed=9)
    first, *others = [sums_of(row, inputs, grad) for _ in isas]
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert torch.equal(a, b)


@over_rows
@pytest.mark.parametrize("shape", [(64, 16, 40, 40), (1 << 17, 10), (1 << 20, 1)], ids=str)
def test_sums_are_the_same_on_any_number_of_threads(row, shape):
    inputs, grad = row.inputs(moderate, shape), moderate(*shape, seed=9)
    before = torch.get_num_threads()
    runs = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        runs.append(results(row.ours, inputs, grad))
    torch.set_num_threads(before)
    for first, second, third in zip(*runs, strict=True):
        assert torch.equal(first, second) and torch.equal(second, third)


@over_vectors
@pytest.mark.parametrize("shape, dim", [((10, 2, 500_000), 1), ((1_000_000, 10), 1), ((10_000, 1000), 1)], ids=str)
def test_sums_of_ten_million(device, row, shape, dim):
    """In float32 not further from the truth than torch's, but for the last rounding."""
    inputs = [x.abs() for x in row.inputs(maker(moderate, device=device), shape, dim)]
    grad = moderate(*shape, device=device, seed=9).abs()
    ours, theirs = (results(f, inputs, grad, **row.arguments(dim)) for f in (row.ours, row.theirs))
    truth = results(row.theirs, [x.double() for x in inputs], grad.double(), **row.arguments(dim))
    for a, b, c in list(zip(ours, theirs, truth, strict=True))[2:]:
        assert ((a - c).abs() <= torch.maximum((b - c).abs(), c.abs() * 2**-23)).all()


LEFT_TO_TORCH = {
    "another dtype": lambda make: (make(5, 7), make(5, 7, seed=1).double()),
    "integers": lambda make: (make(5, 7).int(), make(5, 7, seed=1)),
    "broadcast": lambda make: (make(5, 7), make(7, seed=1)),
    "broadcast input": lambda make: (make(7), make(5, 7, seed=1)),
    "another layout": lambda make: (make(5, 7), make(7, 5, seed=1).t()),
    "not dense": lambda make: (make(5, 14)[:, ::2], make(5, 7, seed=1)),
    "expanded": lambda make: (make(5, 1).expand(5, 7), make(5, 7, seed=1)),
}


@pytest.mark.parametrize("build", LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_add_relu_left_to_torch(device, build):
    inputs = build(maker(special, device=device))
    assert_same(relu_ext.add_relu(*inputs), added(*inputs))
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    assert relu_ext.add_relu(*leaves).grad_fn.name() == "ReluBackward0"


def test_vectors_left_to_torch(device):
    make = maker(moderate, device=device)
    input = make(5, 7, 3)
    for bias in (make(1, seed=1), make(14, seed=1)[::2], make(7, seed=1).double()):
        assert_same(relu_ext.bias_relu(input, bias), biased(input, bias))
        assert_same(relu_ext.scale_shift_relu(input, bias, bias), scaled(input, bias, bias))
    every_other = make(5, 14, 3)[:, ::2]
    assert_same(relu_ext.bias_relu(every_other, make(7)), biased(every_other, make(7)))


WRONG = {
    "another number": lambda: (relu_ext.bias_relu, torch.rand(2, 3, 4), torch.rand(4)),
    "no such dimension": lambda: (lambda x, b: relu_ext.bias_relu(x, b, 3), torch.rand(2, 3, 4), torch.rand(4)),
    "no dimensions": lambda: (relu_ext.bias_relu, torch.rand(()), torch.rand(1)),
    "sizes": lambda: (relu_ext.add_relu, torch.rand(2, 3), torch.rand(3, 2)),
    "a number": lambda: (relu_ext.scale_shift_relu, torch.rand(2, 3), torch.rand(3), 0.5),
    "nothing": lambda: (relu_ext.add_relu, torch.rand(2, 3), None),
    "another inner size": lambda: (relu_ext.linear_relu, torch.rand(2, 3), torch.rand(5, 4)),
}
ERRORS = {
    "another number": "must match the size",
    "no such dimension": "out of range",
    "no dimensions": "out of range",
    "sizes": "must match the size",
    "a number": "'float' object has no attribute 'reshape'",
    "nothing": "unsupported operand type",
    "another inner size": "cannot be multiplied",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    function, *inputs = WRONG[name]()
    assert ERRORS[name] in error_of(function, *inputs)[1]


@over_rows
def test_the_output_may_be_changed(device, row):
    inputs = row.inputs(maker(moderate, device=device), (4, 6))
    expected = results(row.ours, inputs, torch.ones(4, 6, device=device))
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = row.ours(*leaves)
    output.mul_(0)
    for a, b in zip(torch.autograd.grad(output, leaves, torch.ones_like(output)), expected[1:], strict=True):
        assert_same(a, 0 * b)


def test_inputs_changed_before_backward_are_noticed(device):
    make = maker(moderate, device=device)
    for changed in (0, 1):
        inputs = [x.requires_grad_() * 1 for x in SCALE.inputs(make, (4, 6))]
        output = relu_ext.scale_shift_relu(*inputs)
        inputs[changed].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()


# Composition; linear_relu has part in it.


def linear(input, weight, bias=None):
    return torch.relu(F.linear(input, weight, bias))


class LinearRow(Row):
    def inputs(self, make, shape, dim=1, lay_out=lambda tensor: tensor):
        return [make(*shape), make(5, shape[-1], seed=1), make(5, seed=2)]


LINEAR = LinearRow(relu_ext.linear_relu, linear, (False, True), "LinearReLUBackward")
ALL = {**ROWS, "linear_relu": LINEAR}
over_all = pytest.mark.parametrize("row", ALL.values(), ids=ALL)


@over_all
def test_gradcheck(device, row):
    inputs = [x.requires_grad_() for x in row.inputs(maker(moderate, dtype=torch.float64, device=device), (3, 4))]
    assert gradcheck(row.ours, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(row.ours, inputs, check_fwd_over_rev=True, check_batched_grad=True)
    for frozen in range(len(inputs)):
        some = [x.detach().requires_grad_(i != frozen) for i, x in enumerate(inputs)]
        assert gradcheck(row.ours, some, check_batched_grad=True)
        assert gradgradcheck(row.ours, some, check_batched_grad=True)


@over_all
def test_what_is_kept_does_not_depend_on_modes(device, row):
    def kept(mode, needs):
        inputs = row.inputs(maker(moderate, device=device), (4, 6))
        leaves = [x.requires_grad_(need) for x, need in zip(inputs, needs, strict=True)]
        with mode:
            output, kept = kept_by(row.ours, *leaves)
        gradients = torch.autograd.grad(output.sum(), [x for x in leaves if x.requires_grad])
        return output.grad_fn.name(), [(x.shape, x.dtype) for x in kept], output.detach(), *gradients

    count = len(row.inputs(moderate, (4, 6)))
    for which in range(1, 2**count):
        needs = [bool(which >> i & 1) for i in range(count)]
        alone, watched = kept(torch.enable_grad(), needs), kept(Watch(), needs)
        assert alone[:2] == watched[:2]
        torch.testing.assert_close(alone[2:], watched[2:])


@over_all
def test_backward_within_a_mode(device, row):
    inputs = row.inputs(maker(moderate, device=device), (4, 6))
    leaves = [x.requires_grad_() for x in inputs]
    output = row.ours(*leaves)
    alone = torch.autograd.grad(output.sum(), leaves, retain_graph=True)
    with Watch():
        watched = torch.autograd.grad(output.sum(), leaves)
    torch.testing.assert_close(alone, watched)


@over_all
def test_checkpoint(device, row):
    inputs = row.inputs(maker(moderate, device=device), (4, 6))

    def function(*inputs):
        return checkpoint(row.ours, *inputs, use_reentrant=False)

    shape = row.ours(*inputs).shape
    grad = moderate(*shape, device=device, seed=9)
    for a, b in zip(*(results(f, inputs, grad) for f in (function, row.ours)), strict=True):
        assert torch.equal(a, b)


@over_all
def test_transforms(device, row):
    inputs = row.inputs(maker(moderate, device=device), (4, 6))
    arguments = tuple(range(len(inputs)))
    for transform in (
        lambda f: torch.func.grad(lambda *x: f(*x).sum(), argnums=arguments),
        lambda f: torch.func.jacrev(f, argnums=arguments),
        lambda f: torch.func.jacfwd(f, argnums=arguments),
    ):
        torch.testing.assert_close(transform(row.ours)(*inputs), transform(row.theirs)(*inputs))
    batched = [torch.stack([x, 2 * x]) for x in inputs]
    torch.testing.assert_close(torch.vmap(row.ours)(*batched), torch.vmap(row.theirs)(*batched))


@over_all
def test_compile(device, row):
    inputs = row.inputs(maker(moderate, device=device), (4, 6))
    compiled = torch.compile(row.ours, fullgraph=True, backend="aot_eager")
    grad = moderate(*row.ours(*inputs).shape, device=device, seed=9)
    torch.testing.assert_close(results(compiled, inputs, grad), results(row.theirs, inputs, grad))


@over_all
def test_compiled_autograd(device, row):
    inputs = row.inputs(maker(moderate, device=device), (4, 6))
    grad = moderate(*row.ours(*inputs).shape, device=device, seed=9)
    eager = results(row.ours, inputs, grad)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", dynamic=False)):
        leaves = [x.detach().requires_grad_() for x in inputs]
        row.ours(*leaves).backward(grad)
    torch.testing.assert_close([x.grad for x in leaves], list(eager[1:]))


def test_compiled_autograd_of_another_dimension(device):
    """The graph that was captured first must not serve it."""
    inputs = BIAS.inputs(maker(moderate, device=device), (4, 4))
    grad = moderate(4, 4, device=device, seed=9)
    for dim in (0, 1):
        leaves = [x.detach().requires_grad_() for x in inputs]
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager", dynamic=False)):
            relu_ext.bias_relu(*leaves, dim=dim).backward(grad)
        torch.testing.assert_close([x.grad for x in leaves], list(results(biased, inputs, grad, dim=dim)[1:]))


@over_all
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_and_trace(device, row):
    inputs = row.inputs(maker(moderate, device=device), (4, 6))
    expected = row.theirs(*inputs)
    torch.testing.assert_close(torch.jit.script(row.ours)(*inputs), expected)
    torch.testing.assert_close(torch.jit.trace(row.ours, tuple(inputs))(*inputs), expected)
    with torch._subclasses.FakeTensorMode() as mode:
        assert row.ours(*(mode.from_tensor(x) for x in inputs)).shape == expected.shape
    assert row.ours(*(x.to("meta") for x in inputs)).shape == expected.shape


@over_all
def test_autocast(device, row):
    """linear has a rule, the others have none."""
    inputs = row.inputs(maker(moderate, device=device), (4, 6))
    with torch.autocast(device, torch.bfloat16):
        output, expected = row.ours(*inputs), row.theirs(*inputs)
        recorded = row.ours(*(x.detach().requires_grad_() for x in inputs)).grad_fn.name()
    assert output.dtype == expected.dtype
    torch.testing.assert_close(output, expected)
    assert recorded == ("ReluBackward0" if row is LINEAR else row.node)


@over_all
def test_profiler(device, row):
    inputs = [x.requires_grad_() for x in row.inputs(maker(moderate, device=device), (4, 6))]
    with torch.profiler.profile() as profile:
        row.ours(*inputs).sum().backward()
    name = "relu_ext::" + row.ours.__name__
    assert {name, name + "_backward"} <= {event.key for event in profile.key_averages()}


@over_all
def test_deepcopied_and_saved_tensor_hooks(device, row):
    """What is kept goes through the hooks, all of it."""
    inputs = [x.requires_grad_() for x in row.inputs(maker(moderate, device=device), (4, 6))]
    expected = torch.autograd.grad(row.ours(*inputs).sum(), inputs)
    with torch.autograd.graph.save_on_cpu():
        output = row.ours(*inputs)
    for a, b in zip(torch.autograd.grad(output.sum(), inputs), expected, strict=True):
        assert torch.equal(a, b)


@over_all
def test_graph_is_freed(device, row, no_garbage_collection):
    for with_backward in (False, True):
        inputs = [x.requires_grad_() for x in row.inputs(maker(moderate, device=device), (4, 6))]
        output = row.ours(*inputs)
        if with_backward:
            output.sum().backward()
        references = [weakref.ref(tensor) for tensor in (output, *inputs)]
        del inputs, output
        assert [reference() for reference in references] == [None] * len(references)


# linear_relu


@over_dtypes
@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 3, 6), (130, 6)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_relu(device, dtype, shape, with_bias):
    """The product is torch's, so the output is; the bias's gradient is summed in another order."""
    make = maker(moderate, dtype=dtype, device=device)
    inputs = [make(*shape), make(9, 6, seed=1), make(9, seed=2)][: 2 + with_bias]
    grad = make(*shape[:-1], 9, seed=9)
    ours, theirs = (results(f, inputs, grad) for f in (relu_ext.linear_relu, linear))
    for a, b in list(zip(ours, theirs, strict=True))[:3]:
        assert_same(a, b) if device == "cpu" else torch.testing.assert_close(a, b)
    masked = torch.where(ours[0] <= 0, torch.zeros_like(grad), grad)
    if with_bias:
        assert_sums(ours[3], masked.double().view(-1, 9), 1, dtype)
    leaves = [x.requires_grad_() for x in inputs]
    output, kept = kept_by(relu_ext.linear_relu, *leaves)
    assert output.grad_fn.name() == "LinearReLUBackward"
    assert {x.data_ptr() for x in kept} == {output.data_ptr(), inputs[0].data_ptr(), inputs[1].data_ptr()}


def test_linear_relu_special_values(device):
    make = maker(special, device=device)
    inputs, grad = [make(7, 3), make(5, 3, seed=1), make(5, seed=2)], make(7, 5, seed=9)
    ours, theirs = (results(f, inputs, grad) for f in (relu_ext.linear_relu, linear))
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert_same(a, b)


def test_linear_relu_left_to_torch(device):
    make = maker(moderate, device=device)
    for inputs in ((make(3, 4, 6).transpose(0, 1), make(5, 6)), (make(0, 6), make(5, 6)), (make(6), make(6))):
        assert_same(relu_ext.linear_relu(*inputs), linear(*inputs))


@pytest.mark.parametrize("changed", ["input", "weight", "output"])
def test_linear_relu_what_is_changed_before_backward_is_noticed(device, changed):
    inputs = [x.requires_grad_() * 1 for x in LINEAR.inputs(maker(moderate, device=device), (4, 6))]
    output = relu_ext.linear_relu(*inputs)
    dict(zip(("output", "input", "weight"), (output, *inputs), strict=False))[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


# Modules


def test_modules(device):
    make = maker(moderate, device=device)
    input, residual = make(2, 3, 4, 5), make(2, 3, 4, 5, seed=1)
    assert_same(relu_ext.AddReLU()(input, residual), added(input, residual))
    bias = relu_ext.BiasReLU(3, device=device)
    torch.nn.init.normal_(bias.bias)
    assert_same(bias(input), biased(input, bias.bias))
    assert repr(bias) == "BiasReLU(3, dim=1)" and list(bias.state_dict()) == ["bias"]
    bias(input).sum().backward()
    assert bias.bias.grad.shape == (3,)


def test_linear_relu_module(device):
    ours, theirs = relu_ext.LinearReLU(6, 5, device=device), torch.nn.Linear(6, 5, device=device)
    assert isinstance(ours, torch.nn.Linear)
    assert repr(ours) == "LinearReLU(in_features=6, out_features=5, bias=True)"
    ours.load_state_dict(theirs.state_dict())
    input = moderate(4, 6, device=device)
    torch.testing.assert_close(ours(input), torch.relu(theirs(input)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [True, False])
def test_frozen_batch_norm_module(device, dtype, with_residual):
    theirs = torch.nn.BatchNorm2d(3, eps=1e-3, device=device)
    for name, tensor in theirs.state_dict().items():
        if tensor.dim():
            tensor.copy_(moderate(3, device=device, seed=len(name)).abs() + 0.1)
    ours = relu_ext.FrozenBatchNormReLU2d(3, eps=1e-3, device=device)
    assert ours.load_state_dict(theirs.state_dict()).missing_keys == []
    assert list(ours.parameters()) == [] and repr(ours) == "FrozenBatchNormReLU2d(3, eps=0.001)"
    input = moderate(2, 3, 5, 7, dtype=dtype, device=device).requires_grad_()
    residual = moderate(2, 3, 5, 7, dtype=dtype, device=device, seed=1) if with_residual else None
    expected = theirs.eval()(input.float()) + (0 if residual is None else residual.float())
    unit = torch.finfo(dtype).eps
    output = ours(input, residual)
    torch.testing.assert_close(output.float(), torch.relu(expected), rtol=8 * unit, atol=8 * unit)
    assert output.dtype == dtype and output.grad_fn.name() == "ScaleShiftReLUBackward"
    in_a_model, torchs = torch.nn.Sequential(ours), torch.nn.Sequential(theirs)
    in_a_model.load_state_dict(torchs.state_dict())
    assert "0.num_batches_tracked" in torchs.state_dict() and "0.num_batches_tracked" not in in_a_model.state_dict()
