"""Autograd: gradients of every order, in place, views, versions, hooks; and what is kept for all that."""

import contextlib
import sys
import weakref

import pytest
import torch
from operations import DTYPES, assert_same, kept_by
from torch.autograd import gradcheck, gradgradcheck

from relu_ext import ReLUFunction


def numbers(*shape, device="cpu", dtype=torch.float64, seed=0):
    """Odd multiples of 0.05, as kinks are at tenths: finite differences must not straddle them."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64)
    return ((10 * values).floor() / 10 + 0.05).to(device, dtype)


def leaf(*shape, **options):
    return numbers(*shape, **options).requires_grad_()


def error_of(function, *inputs):
    with pytest.raises(Exception) as error:
        function(*inputs)
    return error.type, str(error.value)


@pytest.fixture(params=[None, "cpu"], ids=["no default device", "default device"])
def default_device(request):
    torch.set_default_device(request.param)
    yield
    torch.set_default_device(None)


INPUTS = {
    "contiguous": lambda device: leaf(3, 5, device=device),
    "transposed": lambda device: numbers(3, 5, device=device).t().requires_grad_(),
    "channels_last": lambda device: (
        numbers(1, 3, 2, 2, device=device).to(memory_format=torch.channels_last).requires_grad_()
    ),
    "sliced": lambda device: numbers(3, 5, device=device)[:, 1:4].requires_grad_(),
    "0-d": lambda device: numbers(1, device=device)[0].requires_grad_(),
    "empty": lambda device: leaf(0, 3, device=device),
}
over_inputs = pytest.mark.parametrize("build", INPUTS.values(), ids=INPUTS)


# Derivatives of every kind


@over_inputs
def test_gradcheck(operation, device, build):
    assert gradcheck(
        operation.function,
        build(device),
        check_forward_ad=True,
        check_batched_grad=True,
        check_batched_forward_grad=True,
    )


@over_inputs
def test_gradgradcheck(operation, device, build):
    assert gradgradcheck(
        operation.function,
        build(device),
        check_batched_grad=True,
        check_fwd_over_rev=True,
        check_rev_over_rev=True,
    )


@pytest.mark.in_place
@over_inputs
def test_gradcheck_in_place(operation, device, build):
    def function(input):
        return operation.function_(input.clone())

    forward = operation.torch_has_gradient_in_place  # dual tensors take the definition
    assert gradcheck(function, build(device), check_forward_ad=forward, check_batched_grad=True)
    assert gradgradcheck(function, build(device), check_fwd_over_rev=forward, check_batched_grad=True)


@pytest.mark.keeps_bits
@pytest.mark.in_place
def test_gradcheck_in_place_on_a_view(operation, device):
    def function(input):
        output = input * 1
        operation.function_(output[1:])
        operation.function_(output.view(-1)[2:7].neg_())
        return output

    assert gradcheck(function, leaf(3, 4, device=device), check_batched_grad=True)
    assert gradgradcheck(function, leaf(3, 4, device=device))


def test_third_derivative(operation, device):
    def third(function):
        input = leaf(7, device=device)
        result = function(input) ** 4
        for _ in range(3):
            (result,) = torch.autograd.grad(result.sum(), input, create_graph=True)
        return result.detach()

    ours, theirs = third(operation.function), third(operation.definition)
    if operation.keep:
        assert_same(ours, theirs)
    else:  # sums of products, in other orders
        torch.testing.assert_close(ours, theirs, rtol=1e-14, atol=1e-14)
    assert (third(operation.function) != 0).any()


def test_second_derivative_in_another_layout(operation, device):
    def second(function):
        input = leaf(4, 6, device=device)
        weight = leaf(6, 4, device=device, seed=1)
        (first,) = torch.autograd.grad((function(input).t() * weight).sum(), input, create_graph=True)
        return torch.autograd.grad((first.t() ** 2).sum(), weight)[0]

    assert_same(second(operation.function), second(operation.definition))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_the_gradient_is_masked_alike(operation, device, dtype):
    def masked(function):
        input, grad = leaf(9, device=device, dtype=dtype), leaf(9, device=device, dtype=dtype, seed=1)
        (first,) = torch.autograd.grad(function(input), input, grad, create_graph=True)
        return torch.autograd.grad(first, grad, numbers(9, device=device, dtype=dtype, seed=2))[0]

    assert_same(masked(operation.function), masked(operation.definition))


# What is kept


@pytest.mark.keeps_bits
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (8,), (9,), (3, 5, 7)], ids=str)
def test_keeps_one_bit_an_element(operation, device, dtype, shape, default_device):
    output, (bits,) = kept_by(operation.function, torch.randn(shape, dtype=dtype, device=device).requires_grad_())
    assert bits.dtype == torch.uint8 and bits.device == output.device
    assert bits.untyped_storage().nbytes() == (output.numel() + 7) // 8


@pytest.mark.in_place
@pytest.mark.keeps_bits
def test_keeps_one_bit_an_element_in_place(operation, device, default_device):
    _, (bits,) = kept_by(operation.function_, leaf(3, 5, device=device) * 1)
    assert (bits.dtype, bits.untyped_storage().nbytes()) == (torch.uint8, 2)


@pytest.mark.in_place
@pytest.mark.keeps_bits
def test_parameters_are_plain_tensors(operation, device):
    parameter = torch.nn.Parameter(numbers(9, device=device))
    output, (bits,) = kept_by(operation.function, parameter)
    assert type(output) is torch.Tensor
    assert bits.dtype == torch.uint8
    output.sum().backward()
    assert_same(parameter.grad, operation.masked(torch.ones_like(output), operation.keep(parameter)))
    assert error_of(operation.function_, parameter) == error_of(operation.definition_, parameter)


@pytest.mark.in_place
def test_keeps_nothing_without_a_gradient(operation, device):
    for function in (operation.function, operation.function_):
        input = leaf(9, device=device)
        assert kept_by(function, input.detach())[1] == []
        with torch.no_grad():
            output, kept = kept_by(function, input)
        assert kept == []
        assert output.grad_fn is None
        with torch.inference_mode():
            assert kept_by(operation.function, input)[1] == []


def test_requires_grad_follows_the_input(operation, device):
    assert not operation.function(numbers(3, device=device)).requires_grad
    output = operation.function(leaf(3, device=device))
    assert output.requires_grad and not output.is_leaf
    with torch.no_grad():
        assert not operation.function(leaf(3, device=device)).requires_grad
    with torch.inference_mode():
        output = operation.function(leaf(3, device=device))
        assert output.is_inference() and not output.requires_grad
    assert not operation.function(output).is_inference()
    assert operation.function(output + leaf(3, device=device)).requires_grad


def test_bits_are_freed_by_backward(operation, device):
    output = operation.function(leaf(3, device=device))
    output.sum().backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        output.sum().backward()


@pytest.mark.keeps_bits
@pytest.mark.in_place
def test_what_is_kept_lives_no_longer_than_the_output(operation, device):
    class Packed:
        def __init__(self, bits):
            self.bits = bits
            alive.add(self)

    alive = weakref.WeakSet()
    with torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.bits):
        for function in (operation.function, lambda input: operation.function_(input * 1)):
            output = function(leaf(9, device=device))
            assert len(alive) == 1
            output.sum().backward()
            assert len(alive) == 0
            output = function(leaf(9, device=device))
            del output
            assert len(alive) == 0


@pytest.mark.in_place
def test_references_to_the_input_are_balanced(operation, device):
    input, needs_grad = numbers(9, device=device), leaf(9, device=device)

    def counts():
        return [sys.getrefcount(x) for x in (input, needs_grad, NotImplemented)]

    before = counts()
    for _ in range(5):
        operation.function(input)
        operation.function_(input)
        operation.function(input[::2]), operation.function_(input[::2])  # left to torch
        operation.function(needs_grad).sum().backward()
        with contextlib.suppress(RuntimeError):
            operation.function_(needs_grad)
    assert counts() == before


@pytest.mark.in_place
def test_a_deep_graph_is_freed_without_recursion(operation):
    output = leaf(1)
    for _ in range(100_000):
        output = operation.function(output)
    in_place = leaf(1) * 1
    for _ in range(100_000):
        operation.function_(in_place)
    del output, in_place  # a destructor that calls the next one would overflow the stack


@pytest.mark.keeps_bits
def test_saved_tensor_hooks_may_replace_the_bits(operation, device):
    """What a hook packs is what backward uses: here the complement, so that the gradient changes sides."""
    input = torch.tensor([0.5, -1, 0.6], device=device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda bits: (~bits).cpu(), lambda bits: bits.to(device)):
        output = operation.function(input)
    output.sum().backward()
    complement = torch.tensor([False, True, False], device=device)
    assert_same(input.grad, operation.masked(torch.ones(3, device=device), complement))


# The graph


def test_node(operation, device):
    middle = leaf(3, device=device) * 1
    output = operation.function(middle)
    assert output.grad_fn.name() == operation.node
    assert f"grad_fn=<{output.grad_fn.name()}>" in repr(output)
    assert output.grad_fn.next_functions == ((middle.grad_fn, 0),)
    seen = []
    output.grad_fn.register_prehook(lambda grads: seen.append("before"))
    output.grad_fn.register_hook(lambda inputs, outputs: seen.append("after"))
    output.sum().backward()
    assert seen == ["before", "after"]


def test_gradient_of_a_non_leaf(operation, device):
    def run(function):
        middle = leaf(7, device=device) * 2
        middle.retain_grad()
        (function(middle) ** 2).sum().backward()
        return middle.grad

    assert_same(run(operation.function), run(operation.definition))


def test_gradients_accumulate(operation, device):
    input = leaf(7, device=device)
    output = operation.function(input)
    output.sum().backward(retain_graph=True)
    once = input.grad.clone()
    output.sum().backward()
    operation.function(input).sum().backward()
    assert_same(input.grad, 3 * once)


def test_input_that_is_not_asked_for(operation, device):
    input, other = leaf(7, device=device), leaf(7, device=device, seed=1)
    output = operation.function(input)
    (grad,) = torch.autograd.grad((output * other).sum(), other)
    assert_same(grad, output.detach())
    assert input.grad is None


def test_gradient_that_does_not_arrive(operation, device):
    """A user of the output may give None back; then so does the operation."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            ctx.set_materialize_grads(False)
            return input.clone()

        @staticmethod
        def backward(ctx, grad):
            return None

    input = leaf(7, device=device)
    grads = torch.autograd.grad(Stop.apply(operation.function(input)).sum(), input, allow_unused=True)
    assert grads == (None,)


@pytest.mark.keeps_bits
def test_incoming_gradient_is_not_overwritten_nor_shared(operation, device):
    """Also where every element passes and the same memory would do."""
    input = torch.full((7,), 0.5, device=device, dtype=torch.float64, requires_grad=True)
    grad = numbers(7, device=device, seed=1)
    before = grad.clone()
    operation.function(input).backward(grad)
    assert_same(input.grad, before)
    input.grad.zero_()
    assert_same(grad, before)


@pytest.mark.keeps_bits
def test_input_changed_after_forward(operation, device):
    """Bits do not depend on the input either, which torch's relu does not keep and its others do."""

    def run(function):
        input = leaf(7, device=device)
        middle = input * 1
        output = function(middle)
        middle.mul_(-1)
        return torch.autograd.grad(output.sum() + middle.sum(), input)[0]

    assert_same(run(operation.function), run(lambda middle: operation.definition(middle.clone())))


# The output changed in place: an error with torch, which keeps it, but bits do not depend on it


@pytest.mark.keeps_bits
def test_output_plus_residual_in_place(operation, device, default_device):
    input, residual = leaf(3, 5, device=device), leaf(3, 5, device=device, seed=1)
    weight = numbers(3, 5, device=device, seed=2)
    output = operation.function(input)
    output += residual
    ours = torch.autograd.grad((output * weight).sum(), (input, residual))
    expected = operation.definition(input) + residual
    theirs = torch.autograd.grad((expected * weight).sum(), (input, residual))
    assert_same(output.detach(), expected.detach())
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


@pytest.mark.keeps_bits
@pytest.mark.in_place
def test_output_multiplied_in_place(operation, device, default_device):
    for function in (operation.function, lambda input: operation.function_(input.clone())):
        input = leaf(3, 5, device=device)
        (ours,) = torch.autograd.grad(function(input).mul_(2).sum(), input)
        (theirs,) = torch.autograd.grad((operation.definition(input) * 2).sum(), input)
        assert_same(ours, theirs)


@pytest.mark.keeps_bits
def test_part_of_the_output_changed_in_place(operation, device):
    input = leaf(3, 5, device=device)
    output = operation.function(input)
    output[1].zero_()
    output.t()[2] *= 3
    factor = torch.ones(3, 5, device=device, dtype=input.dtype)
    factor[:, 2] *= 3
    factor[1] = 0
    (ours,) = torch.autograd.grad(output.sum(), input)
    (theirs,) = torch.autograd.grad((operation.definition(input) * factor).sum(), input)
    assert_same(ours, theirs)


@pytest.mark.keeps_bits
@pytest.mark.in_place
def test_twice_in_place(operation, device):
    def run(function_):
        input = leaf(9, device=device)
        output = function_(function_(input * 2).sub_(0.5))
        return torch.autograd.grad((output * numbers(9, device=device, seed=1)).sum(), input)[0]

    input = leaf(9, device=device)
    expected = operation.definition(operation.definition(input * 2) - 0.5)
    (theirs,) = torch.autograd.grad((expected * numbers(9, device=device, seed=1)).sum(), input)
    assert_same(run(operation.function_), theirs)


@pytest.mark.keeps_bits
@pytest.mark.in_place
def test_view_in_place_then_changed_again(operation, device):
    input, weight = leaf(4, 6, device=device), numbers(4, 6, device=device, seed=1)
    output = input * 1
    view = output[1:3]
    operation.function_(view)
    view.mul_(3)
    output.add_(1)
    expected = torch.cat([input[:1], operation.definition(input[1:3]) * 3, input[3:]]) + 1
    assert_same(output.detach(), expected.detach())
    ours, theirs = (torch.autograd.grad((o * weight).sum(), input, retain_graph=True)[0] for o in (output, expected))
    assert_same(ours, theirs)
    ours, theirs = (torch.autograd.grad((o * weight[1:3]).sum(), input)[0] for o in (view, expected[1:3]))
    assert_same(ours, theirs)


# In place: each case gives what torch's function in place gives, or raises what it raises


def graph_of(input, *outputs):
    """Values, versions and the gradient of all outputs with different weights."""
    total = sum((output * numbers(*output.shape, device=output.device, seed=9)).sum() for output in outputs)
    grad = torch.autograd.grad(total, input)[0] if total.requires_grad else None
    return [*(output.detach() for output in outputs), grad], [output._version for output in outputs]


def in_place(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    assert relu_(output) is output
    return graph_of(input, output)


def rows(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    view = relu_(output[1:3])
    return graph_of(input, output, view)


def rows_alone(relu_, device):
    input = leaf(4, 6, device=device)
    return graph_of(input, relu_((input * 1)[1:3]))


def columns(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    view = relu_(output[:, 1:3])
    return graph_of(input, output, view)


def transposed(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    view = relu_(output.t())
    return graph_of(input, output, view)


def view_of_view(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    flat = output.view(-1)[3:15]
    view = relu_(flat.view(2, 6)[1])
    return graph_of(input, output, flat, view)


def base_of_an_older_view(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    view = output[1]
    relu_(output)
    return graph_of(input, output, view)


def view_that_got_its_gradient_in_place(relu_, device):
    input = leaf(2, 6, device=device)
    base = numbers(4, 6, device=device, seed=1)
    view = base[1:3]
    view.copy_(input)
    relu_(view)
    return graph_of(input, base, view)


def view_that_got_its_gradient_through_its_base(relu_, device):
    input = leaf(2, 6, device=device)
    base = numbers(4, 6, device=device, seed=1)
    view = base[1:4]
    base[0:2].copy_(input)
    assert view.grad_fn  # made when asked for; torch takes the view for a leaf until then
    relu_(view)
    return graph_of(input, base, view)


def detached(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    view = relu_(output.detach())
    return graph_of(input, output, view)


def under_no_grad(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    with torch.no_grad():
        relu_(output[1])
    return graph_of(input, output)


def leaf_under_no_grad(relu_, device):
    input = leaf(4, 6, device=device)
    with torch.no_grad():
        relu_(input)
    return graph_of(input, input * 2, input)


def in_inference_mode(relu_, device):
    input = numbers(4, 6, device=device)
    with torch.inference_mode():
        relu_(input)
        relu_(input[1])
        relu_(input * 1)
    return graph_of(input, input)


def without_gradient(relu_, device):
    input = numbers(4, 6, device=device)
    relu_(input)
    return graph_of(input, input)


def empty(relu_, device):
    input = leaf(0, 3, device=device)
    output = input * 1
    relu_(output)
    return graph_of(input, output)


def scalar(relu_, device):
    input = leaf(1, device=device)
    output = (input * 1)[0]
    relu_(output)
    return graph_of(input, output)


def reshaped_by_unsafe_view(relu_, device):
    input = leaf(4, 6, device=device)
    output = input.t().reshape(24)
    relu_(output)
    return graph_of(input, output)


def retained_before(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    output.retain_grad()
    relu_(output)
    (output * numbers(4, 6, device=device, seed=1)).sum().backward()
    return [input.grad, output.grad], [output._version]


def hooked_before_and_after(relu_, device):
    input = leaf(4, 6, device=device)
    output = input * 1
    seen = []
    output.register_hook(lambda grad: seen.append(grad) or grad * 2)
    relu_(output)
    output.register_hook(lambda grad: seen.append(grad) or grad * 3)
    (output * numbers(4, 6, device=device, seed=1)).sum().backward()
    return [input.grad, *seen], [output._version]


WORKS = [
    in_place,
    rows,
    rows_alone,
    columns,
    transposed,
    view_of_view,
    base_of_an_older_view,
    view_that_got_its_gradient_in_place,
    view_that_got_its_gradient_through_its_base,
    detached,
    under_no_grad,
    leaf_under_no_grad,
    in_inference_mode,
    without_gradient,
    empty,
    scalar,
    reshaped_by_unsafe_view,
    retained_before,
    hooked_before_and_after,
]


@pytest.mark.in_place
@pytest.mark.parametrize("case", WORKS, ids=lambda case: case.__name__)
def test_in_place_is_torchs(operation, device, case):
    if case is columns and not operation.torch_has_gradient_in_place:  # not dense, so it is the definition that runs
        assert error_of(case, operation.function_, device) == error_of(case, operation.definition_, device)
        return
    ours, our_versions = case(operation.function_, device)
    theirs, their_versions = case(operation.differentiable_, device)
    assert our_versions == their_versions
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert_same(a, b)


def a_leaf(relu_, device):
    relu_(leaf(4, device=device))


def view_of_a_leaf(relu_, device):
    relu_(leaf(4, device=device)[1:3])


def view_not_yet_known_to_have_a_gradient(relu_, device):
    base = numbers(4, 6, device=device)
    view = base[1:4]
    base[0:2].copy_(leaf(2, 6, device=device))
    relu_(view)


def output_of_unbind(relu_, device):
    relu_((leaf(4, 6, device=device) * 1).unbind()[1])


def output_of_split(relu_, device):
    relu_((leaf(4, 6, device=device) * 1).split(2)[1])


def output_of_chunk_of_a_base_without_gradient(relu_, device):
    base = numbers(4, 6, device=device)
    part = base.chunk(2)[1]
    base.copy_(leaf(4, 6, device=device))
    relu_(part)


def view_made_under_no_grad(relu_, device):
    output = leaf(4, 6, device=device) * 1
    with torch.no_grad():
        view = output[1]
    relu_(view)


def view_made_in_inference_mode(relu_, device):
    output = leaf(4, 6, device=device) * 1
    with torch.inference_mode():
        view = output[1]
    relu_(view)


def inference_tensor(relu_, device):
    with torch.inference_mode():
        tensor = numbers(4, device=device)
    relu_(tensor)


def view_from_a_custom_function(relu_, device):
    class FirstRow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, input):
            return input[0]

        @staticmethod
        def backward(ctx, grad):
            return grad.expand(4, 6)

    relu_(FirstRow.apply(leaf(4, 6, device=device) * 1))


def expanded(relu_, device):
    relu_(leaf(4, 1, device=device).mul(1).expand(4, 6))


def overlapping(relu_, device):
    relu_(numbers(1, device=device).expand(3))


RAISES = [
    a_leaf,
    view_of_a_leaf,
    view_not_yet_known_to_have_a_gradient,
    output_of_unbind,
    output_of_split,
    output_of_chunk_of_a_base_without_gradient,
    view_made_under_no_grad,
    view_made_in_inference_mode,
    inference_tensor,
    view_from_a_custom_function,
    expanded,
    overlapping,
]


@pytest.mark.in_place
@pytest.mark.parametrize("case", RAISES, ids=lambda case: case.__name__)
def test_in_place_raises_what_torch_raises(operation, device, case):
    if operation.name == "threshold" and case in (expanded, overlapping):
        pytest.skip("torch.threshold_ writes to overlapping memory; test_layouts.py looks at what comes of it")
    assert error_of(case, operation.function_, device) == error_of(case, operation.definition_, device)


@pytest.mark.in_place
def test_refused_in_place_changes_nothing(operation, device):
    input = leaf(4, device=device)
    before, version = input.detach().clone(), input._version
    error_of(operation.function_, input)
    assert_same(input.detach(), before)
    assert (input._version, input.is_leaf) == (version, True)


@pytest.mark.in_place
def test_another_operation_that_needs_the_old_value(operation, device):
    output = leaf(4, device=device).exp()  # keeps its output
    operation.function_(output)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation.*version 1; expected version 0"):
        output.sum().backward()


@pytest.mark.keeps_bits
@pytest.mark.in_place
def test_bits_survive_any_number_of_changes(operation, device):
    input = leaf(9, device=device)
    output = operation.function(input)
    version = output._version
    with torch.no_grad():
        output.fill_(-7)
        operation.function_(output)
    assert output._version == version + 2
    (ours,) = torch.autograd.grad(output.sum(), input)
    (theirs,) = torch.autograd.grad(operation.definition(input).sum(), input)
    assert_same(ours, theirs)


# ReLUFunction: the same over the registered operators


@over_inputs
def test_function_is_relu(device, build):
    input = build(device)
    output, kept = kept_by(ReLUFunction.apply, input)
    expected = torch.relu(input)
    assert_same(output, expected)
    assert output.stride() == expected.stride()
    assert [(bits.dtype, bits.shape) for bits in kept] == [(torch.uint8, ((input.numel() + 7) // 8,))]
    grad = numbers(*input.shape[::-1], device=device, seed=1).permute(list(reversed(range(input.dim()))))
    for ours, theirs in zip(*(torch.autograd.grad(o, input, grad) for o in (output, expected)), strict=True):
        assert_same(ours, theirs)


@over_inputs
def test_function_gradcheck(device, build):
    assert gradcheck(ReLUFunction.apply, build(device))
    assert gradgradcheck(ReLUFunction.apply, build(device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_function_takes_every_dtype(device, dtype):
    def run(function):
        input = leaf(9, device=device, dtype=dtype)
        return torch.autograd.grad((function(input) ** 2).sum(), input)[0]

    assert_same(run(ReLUFunction.apply), run(torch.relu))


def test_function_keeps_nothing_without_a_gradient(device):
    assert kept_by(ReLUFunction.apply, numbers(9, device=device))[1] == []
    with torch.no_grad():
        assert kept_by(ReLUFunction.apply, leaf(9, device=device))[1] == []


def test_function_output_may_be_changed_in_place(device):
    input = leaf(9, device=device)
    ReLUFunction.apply(input).mul_(2).sum().backward()
    assert_same(input.grad, 2 * (input > 0).to(input.dtype))


def test_function_refuses_what_the_operators_refuse(device):
    for wrong in (torch.arange(4, device=device), torch.ones(3, dtype=torch.complex64, device=device)):
        with pytest.raises(TypeError, match="expected float32, float64, float16 or bfloat16"):
            ReLUFunction.apply(wrong)
    with pytest.raises(TypeError):
        ReLUFunction.apply()
