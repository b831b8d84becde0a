"""Values: torch's, whatever the length, the place in memory, the number of threads and the instruction set."""

import time

import pytest
import torch
import torch.nn.functional as F
from operations import (
    DTYPES,
    INTEGERS,
    NOT_NAN,
    REPRESENTATIVE,
    assert_same,
    kept_by,
    mixed_values,
    packed,
    special_values,
    wide,
)

import relu_ext

# The loops take blocks of at most 64 elements: twice that, and a few on both sides of the second boundary.
LENGTHS = range(2 * 64 + 4)
MARGIN = 64


@pytest.fixture
def numbers_and_tolerance_of_the_row():
    """Here every operation meets all numbers: the formula says what its gradient is."""


def window(values, offset):
    """A copy of values in the middle of a buffer of a number that every operation changes; and that buffer."""
    buffer = torch.full((len(values) + 2 * MARGIN,), -3.0, dtype=values.dtype, device=values.device)
    view = buffer[MARGIN + offset : MARGIN + offset + len(values)]
    view.copy_(values)
    return view, buffer


def assert_margins_untouched(buffer, length, offset):
    begin = MARGIN + offset
    assert (buffer[:begin] == -3).all() and (buffer[begin + length :] == -3).all()


def assert_bitwise(ours, theirs):
    assert torch.equal(ours.view(INTEGERS[ours.dtype]), theirs.view(INTEGERS[theirs.dtype]))


def assert_kept(ours, theirs, operation):
    """Bit by bit where the operation selects. Where it computes, a signalling NaN may become a quiet one."""
    (assert_bitwise if operation.slope is None else assert_same)(ours, theirs)


def expected_gradient(operation, values, grad):
    """By the formula, which is torch's gradient, but at NaN where torch has two."""
    input = values.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(operation.definition(input), input, grad)
    formula = operation.masked(grad, operation.keep(values))
    defined = slice(None) if operation.special != NOT_NAN else ~values.isnan()
    assert_same(formula[defined], theirs[defined])
    return formula


def assert_near(ours, truth, ulps):
    """Within so many units in the last place of the truth, which is known in float64."""
    rounded = truth.to(ours.dtype)
    finite = rounded.isfinite() & (ours != rounded)
    assert_same(ours[~finite], rounded[~finite])
    information = torch.finfo(ours.dtype)
    unit = information.eps * torch.exp2(truth.abs().log2().floor()).clamp(min=information.smallest_normal)
    error = ((ours.double() - truth) / unit)[finite].abs()
    assert not len(error) or error.max() <= ulps, (error.max(), truth[finite][error.argmax()])


# Exponentials have errors of at most 1.3 units in the last place (csrc/exponential.h); a rounded scalar and a product
# add half a unit each, and a gradient has one product more. float64 is compared with torch's, which has its own error
# of 1. 16-bit types are computed in float32, of which 4 units are 2^-11 of theirs, and rounded once.
ALLOWED = {torch.float32: 3.5, torch.float64: 5, torch.float16: 0.501, torch.bfloat16: 0.5001}


def exponential_gradients(operation, values, grad):
    """From the input in float64, and from the output in the order of the kernels' products."""
    truth = grad.double() * operation.derivative(values.double())
    scale = 1.0507009873554804934193349852946 if operation.name == "selu" else 1.0
    input_scale = 1 / operation.scalars[0] if operation.name == "celu" else 1.0
    alpha = operation.scalars[0] if operation.scalars else 1.6732632423543772848170429916717
    arithmetic = wide(grad).dtype
    positive, alpha, input_scale = torch.tensor([scale, alpha, input_scale], dtype=torch.float64).to(arithmetic)

    def from_output(output):
        grad_, output = wide(grad), wide(output)
        below = grad_ * ((output + alpha * positive) * input_scale)
        return torch.where(output <= 0, below, grad_ * positive).to(values.dtype)

    return truth, from_output


def check_exponential(operation, values, grad, offset):
    """All forms against the truth, in place against the formula of the output that is kept."""
    ulps = ALLOWED[values.dtype]
    truth, from_output = exponential_gradients(operation, values, grad)
    expected = operation.definition(values.double())
    input, buffer = window(values, offset)
    assert_near(operation.function(input), expected, ulps)

    leaf = input.detach().requires_grad_()
    output, (kept,) = kept_by(operation.function, leaf)
    assert kept.data_ptr() == input.data_ptr()
    assert_near(output.detach(), expected, ulps)
    output.backward(window(grad, offset)[0])
    assert_near(leaf.grad, truth, 2 * ulps if values.dtype.itemsize > 2 else ulps)
    assert_bitwise(input, values)

    if operation.in_place:
        output = operation.function(values)
        operation.function_(input)
        assert_same(input, output)
        leaf = values.clone().requires_grad_()
        view, _ = window(leaf, offset)
        operation.function_(view).backward(grad)
        assert_same(leaf.grad, from_output(output))
    assert_margins_untouched(buffer, len(values), offset)


def check_squared(operation, values, grad, offset):
    """Equal to the definition; the gradient too, where squares lose no digits, and to its formula everywhere."""
    expected = operation.definition(values)
    exact = ((values.abs() >= 2.0**-60) & (values.abs() <= 2.0**60)) | ~(values > 0)
    root = torch.relu(values)
    if values.dtype != torch.float16:  # by float64: of float32 MKL's square root is not always the nearest
        root = expected.double().sqrt().to(values.dtype)
    assert_same(root[exact], torch.relu(values)[exact])
    formula = torch.where(root <= 0, torch.zeros_like(root), (wide(grad) * wide(root) * 2).to(root.dtype))
    input = values.clone().requires_grad_()
    (theirs,) = torch.autograd.grad(operation.definition(input), input, grad)
    smallest = torch.finfo(values.dtype).smallest_normal
    rounded_once = ((wide(grad) * root).abs() >= smallest) | (formula == 0) | formula.isnan()  # torch adds two halves
    assert_same(formula[exact & rounded_once], theirs[exact & rounded_once])

    input, buffer = window(values, offset)
    assert_same(operation.function(input), expected)
    leaf = input.detach().requires_grad_()
    output, (kept,) = kept_by(operation.function, leaf)
    assert kept.data_ptr() == (input if values.dtype == torch.float16 else output).data_ptr()
    assert_same(output.detach(), expected)
    output.backward(window(grad, offset)[0])
    assert_same(leaf.grad, formula)
    assert_bitwise(input, values)
    assert_margins_untouched(buffer, len(values), offset)


def check(operation, values, grad_values, offset=0):
    """Forward, with what is kept, backward, and in place, on 1-d tensors at an offset into their storages."""
    if operation.keep:
        return check_bits(operation, values, grad_values, offset)
    if operation.name != "relu_squared":
        return check_exponential(operation, values, grad_values, offset)
    return check_squared(operation, values, grad_values, offset)


def check_bits(operation, values, grad_values, offset):
    expected = operation.definition(values)
    gradient = expected_gradient(operation, values, grad_values)
    keep = operation.keep(values)

    input, input_buffer = window(values, offset)
    grad, grad_buffer = window(grad_values, offset)
    assert_same(operation.function(input), expected)

    leaf = input.detach().requires_grad_()
    output, (bits,) = kept_by(operation.function, leaf)
    assert_same(output.detach(), expected)
    assert_bitwise(output.detach()[keep], values[keep])
    assert torch.equal(bits, packed(keep))
    output.backward(grad)
    assert_same(leaf.grad, gradient)
    assert_kept(leaf.grad[keep], grad_values[keep], operation)
    assert_bitwise(input, values)
    assert_bitwise(grad, grad_values)
    assert_margins_untouched(input_buffer, len(values), offset)
    assert_margins_untouched(grad_buffer, len(values), offset)

    operation.function_(input)
    assert_same(input, expected)
    assert_margins_untouched(input_buffer, len(values), offset)

    leaf = values.clone().requires_grad_()
    view, buffer = window(leaf, offset)
    _, (bits,) = kept_by(operation.function_, view)
    assert torch.equal(bits, packed(keep))
    view.backward(grad)
    assert_same(view.detach(), expected)
    assert_same(leaf.grad, gradient)
    assert_margins_untouched(buffer.detach(), len(values), offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length(operation, device, dtype, isa):
    for length in LENGTHS:
        check(operation, mixed_values(length, dtype, device, length), mixed_values(length, dtype, device, -length))


# Where memory begins and which thread works on it is the loops' affair, not the maths'.
representative = pytest.mark.parametrize("operation", REPRESENTATIVE, ids=str)


@representative
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_length_at_every_offset(operation, device, dtype, isa):
    for length in LENGTHS:
        values = mixed_values(length, dtype, device, length)
        grad = mixed_values(length, dtype, device, -length)
        for offset in (1, 2, 3, 4, 5, 7, 8, 15, 31):
            if offset < 4 or length % 8 in (0, 1, 7):  # the rest would take a minute
                check(operation, values, grad, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_in_every_lane(operation, device, dtype, isa):
    kinks = torch.tensor([6, *operation.scalars], dtype=torch.float64).to(dtype)
    beside = [kinks.nextafter(torch.tensor(side, dtype=dtype)) for side in (-9.0, 9.0) if dtype is not torch.float16]
    special = torch.cat([special_values(dtype), kinks, *beside]).to(device)
    values = special.repeat(64 + 1)  # a whole turn, whatever divisors the counts share: each meets each lane
    grad = special.repeat_interleave(64 + 1)
    check(operation, values, grad)
    check(operation, values[1:], grad[:-1], offset=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_pattern(operation, device, dtype, isa):
    every = torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)
    check(operation, every, every)
    check(operation, every, every.flip(0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bounds", [(-0.0, 0.0), (0.0, 6.0), (-0.0, 6.0), (-1.0, 0.0), (-1.0, -0.0)], ids=str)
def test_bounds_of_zero(device, dtype, isa, bounds):
    """The gradient stops at both zeros, whichever of them the bound is."""
    input = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0, 6.0] * 20, device=device, dtype=dtype).requires_grad_()
    ours, theirs = (f(input, *bounds) for f in (relu_ext.hardtanh, F.hardtanh))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    (ours,), (theirs,) = (torch.autograd.grad(output, input, torch.ones_like(output)) for output in (ours, theirs))
    assert_same(ours, theirs)


@representative
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_that_use_more_threads(operation, device, dtype, threads):
    for length in (32769, 65535, 65536, 65537, 131072 + 65, 262145):  # around any grain up to 1 MiB
        check(operation, mixed_values(length, dtype, device, length), mixed_values(length, dtype, device, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_million_elements_and_three(operation, device, dtype, threads):
    length = 2**20 + 3
    check(operation, mixed_values(length, dtype, device), mixed_values(length, dtype, device, 1), offset=1)


@pytest.mark.in_place
@pytest.mark.keeps_bits
@representative
def test_outputs_over_32_megabytes(operation, device, threads):
    """They are fresh memory at every call, and treated as such."""
    length = 33 * 2**18 + 5
    values = mixed_values(length, torch.float32, device)
    check(operation, values, values.roll(1))


@pytest.mark.keeps_bits
def test_bits_are_little_endian_and_end_in_zeros(operation, device):
    """The format in literal bytes, so that a mistake cannot hide in the helper that all other tests compare with."""
    input = torch.tensor([0.5, -1, 0.5, 0.5, -1, -1, -1, -1, -1, 0.5, 0.5], device=device, requires_grad=True)
    _, (bits,) = kept_by(operation.function, input)
    assert bits.tolist() == [0b00001101, 0b110]


@pytest.mark.in_place
@representative
def test_threads_are_used(operation, threads):
    """A parallel loop that was compiled without OpenMP runs on one thread and says nothing."""
    input = torch.randn(2**22)
    output = operation.function(input)
    stop = time.perf_counter() + 0.1
    process, caller = time.process_time(), time.thread_time()
    while time.perf_counter() < stop:
        operation.function_(output)
    caller = time.thread_time() - caller
    others = time.process_time() - process - caller
    assert (others > 0.1 * caller) == (threads == 2)
