"""Modes that watch or change what runs: dispatch and function modes, default devices, autocast, inference mode."""

import contextlib

import pytest
import torch
from composing import (
    Watch,
    assert_all_same,
    error_of,
    leaf,
    node_name,
    numbers,
    output_and_gradient,
    over_forms,
)
from operations import REPRESENTATIVE, assert_same, kept_by, packed
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROWS = REPRESENTATIVE


class WatchFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def operators(operation):
    return [getattr(torch.ops.relu_ext, f"{operation.name}_{way}").default for way in ("forward", "backward")]


# Dispatch modes


@pytest.mark.keeps_bits
def test_dispatch_mode_sees_the_registered_operators(operation, device):
    forward, backward = operators(operation)
    input = leaf(5, 7, device=device)
    with Watch() as mode:
        output = operation.function(input)
        assert mode.seen == [forward]
        output.backward(torch.ones_like(output))
    assert backward in mode.seen
    assert output.grad_fn.name() == node_name(operation)


@pytest.mark.in_place
def test_dispatch_mode_sees_what_torch_calls_if_no_gradient_is_needed(operation, device):
    input = numbers(5, 7, device=device)
    for ours, theirs in ((operation.function, operation.definition), (operation.function_, operation.definition_)):
        with Watch() as our_mode:
            our_output = ours(input.clone())
        with Watch() as their_mode:
            their_output = theirs(input.clone())
        assert our_mode.seen == their_mode.seen
        assert_same(our_output, their_output)


@over_forms
def test_under_a_dispatch_mode(operation, device, form):
    ours, theirs = form(operation)
    for input in (numbers(5, 7, device=device), numbers(7, 5, device=device).t(), numbers(5, 9, device=device)[:, 1:4]):
        with Watch():
            results = output_and_gradient(ours, input)
        assert_all_same(results, output_and_gradient(theirs, input))


@over_forms
def test_backward_under_other_modes_than_forward(operation, device, form):
    """What is kept is the same on every road."""
    ours, theirs = form(operation)
    input, grad = leaf(5, 7, device=device), numbers(7, 5, device=device, seed=1).t()
    (expected,) = torch.autograd.grad(theirs(input), input, grad)
    for forward_mode, backward_mode in ((contextlib.nullcontext, Watch), (Watch, contextlib.nullcontext)):
        with forward_mode():
            output = ours(input)
        with backward_mode():
            (result,) = torch.autograd.grad(output, input, grad)
        assert_same(result, expected)


@pytest.mark.in_place
@pytest.mark.keeps_bits
def test_keeps_the_same_under_a_dispatch_mode(operation, device):
    for build in (lambda: leaf(9, device=device), lambda: leaf(2, 3, 4, device=device).transpose(0, 2)):
        for function in (operation.function, lambda input: operation.function_(input * 1)):
            with Watch():
                output, (bits,) = kept_by(function, build())
            keep = torch.empty_strided(output.shape, output.stride(), dtype=torch.bool, device=device)
            assert torch.equal(bits, packed(keep.copy_(operation.keep(build()))))


@pytest.mark.keeps_bits
def test_nested_dispatch_modes(operation, device):
    forward, backward = operators(operation)
    with Watch() as outer, Watch() as inner:
        results = output_and_gradient(operation.function, numbers(5, 7, device=device))
    assert_all_same(results, output_and_gradient(operation.definition, numbers(5, 7, device=device)))
    for mode in (outer, inner):
        assert forward in mode.seen and backward in mode.seen


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dispatch_mode_that_changes_results(operation, device, requires_grad):
    class PlusOne(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            first, *rest = result if isinstance(result := function(*args, **(kwargs or {})), tuple) else (result,)
            return (first + 1, *rest) if rest else first + 1

    input = numbers(5, 7, device=device).requires_grad_(requires_grad)
    with PlusOne():
        output, expected = operation.function(input), operation.definition(input)
    assert_same(output, expected)
    assert (expected != operation.definition(input)).any()


@pytest.mark.in_place
def test_dispatch_mode_that_raises(operation, device):
    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            raise ValueError("refused")

    input = leaf(9, device=device)
    with Refuse():
        for function in (operation.function, operation.function_):
            with pytest.raises(ValueError, match="refused"):
                function(input.detach() if function is operation.function_ else input)
    assert_same(operation.function(input), operation.definition(input))


@pytest.mark.in_place
def test_in_place_errors_under_a_dispatch_mode(operation, device):
    def output_of_split(relu_):
        relu_((leaf(4, device=device) * 1).split(2)[0])

    for case in (lambda relu_: relu_(leaf(4, device=device)), output_of_split):
        with Watch():
            ours = error_of(case, operation.function_)
        assert ours == error_of(case, operation.definition_)


@pytest.mark.in_place
def test_versions_under_a_dispatch_mode(operation, device):
    for input in (numbers(9, device=device).clone(), leaf(9, device=device) * 1):
        with Watch():
            assert operation.function_(input) is input
        assert input._version == 1


@pytest.mark.in_place
def test_mutation_on_saved_tensors_allowed(operation, device):
    """A mode and hooks of torch's that save what in-place operations overwrite: they must see ours overwrite."""

    def run(relu, relu_):
        input = leaf(9, device=device)
        with torch.autograd.graph.allow_mutation_on_saved_tensors():
            squashed = input.sigmoid()  # keeps its output
            relu_(squashed.mul_(2).sub_(1))
            output = relu(squashed)
            output.mul_(2)
            (output * squashed).nan_to_num().sum().backward()
        return output.detach(), input.grad

    assert_all_same(
        run(operation.function, operation.function_),
        run(operation.definition, operation.definition_),
    )


def flops(relu, input):
    weight = torch.ones(7, 3, device=input.device)
    with FlopCounterMode(display=False) as counter:
        relu(input @ torch.ones(7, 7, device=input.device)).matmul(weight).sum().backward()
    return counter.get_flop_counts()


def test_flop_counter(operation, device):
    ours, theirs = (flops(f, leaf(5, 7, device=device)) for f in (operation.function, operation.definition))
    assert ours == theirs
    assert sum(ours["Global"].values()) == 2 * 5 * 7 * (2 * 7 + 2 * 3)


# Function modes


@over_forms
def test_function_mode_sees_what_torch_calls(operation, device, form):
    def seen(function):
        with WatchFunctions() as mode:
            results = output_and_gradient(function, numbers(5, 7, device=device))
        return results, mode.seen

    (ours, our_calls), (theirs, their_calls) = map(seen, form(operation))
    assert_all_same(ours, theirs)
    assert our_calls == their_calls


@pytest.mark.in_place
def test_function_mode_that_changes_results(operation, device):
    class Replace(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            return function, args[0]

    input = numbers(9, device=device)
    with Replace():
        ours = operation.function(input), operation.function_(input), operation.module()(input)
        theirs = operation.definition(input), operation.definition_(input), operation.torch_module()(input)
    assert ours == theirs


@pytest.mark.parametrize("order", ["device inside", "device outside"])
def test_function_mode_beside_a_default_device(operation, device, order):
    watch = WatchFunctions()
    with contextlib.ExitStack() as stack:
        for mode in (watch, torch.device(device)) if order == "device inside" else (torch.device(device), watch):
            stack.enter_context(mode)
        results = output_and_gradient(operation.function, numbers(5, 7, device=device))
    assert {operation.definition, torch.relu} & set(watch.seen)  # relu_squared's has no name
    assert_all_same(results, output_and_gradient(operation.definition, numbers(5, 7, device=device)))


@pytest.fixture
def default_device(device):
    torch.set_default_device(device)
    yield device
    torch.set_default_device(None)


@pytest.mark.in_place
def test_default_device_leaves_the_kernels_on(operation, default_device):
    assert operation.function(leaf(5, 7, device=default_device)).grad_fn.name() == node_name(operation)
    assert operation.function_(leaf(5, 7, device=default_device) * 1).grad_fn.name() == node_name(operation)
    input = numbers(5, 7, device=default_device)
    assert_all_same(*(output_and_gradient(f, input) for f in (operation.function, operation.definition)))


@pytest.mark.keeps_bits
@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_device_context_leaves_the_kernels_on(operation, device, default):
    """Also where it names another device: only calls that make tensors heed it."""
    input = leaf(5, 7, device=device)
    with torch.device(default):
        output = operation.function(input)
        output.backward(input.detach())
    assert output.grad_fn.name() == node_name(operation)
    assert_same(output, operation.definition(input))
    assert_same(input.grad, operation.masked(input.detach(), operation.keep(input.detach())))


def test_device_context_in_a_default_device_leaves_the_kernels_on(operation, default_device):
    input = leaf(5, 7, device=default_device)
    with torch.device("meta"):
        output = operation.function(input)
    assert output.grad_fn.name() == node_name(operation)
    assert_same(output, operation.definition(input))


def test_torch_function_disabled(operation, device):
    input = leaf(5, 7, device=device)
    with WatchFunctions() as mode, torch._C.DisableTorchFunction():
        output = operation.function(input)
    assert mode.seen == [] and type(output) is torch.Tensor
    assert_same(output, operation.definition(input))


# Grad modes


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(operation, device, mode):
    input = leaf(5, 7, device=device)
    with mode():
        ours, theirs = operation.function(input), operation.definition(input)
        assert_same(ours, theirs)
        assert (ours.requires_grad, ours.grad_fn, ours.is_inference()) == (False, None, theirs.is_inference())
        with torch.enable_grad():
            ours, theirs = operation.function(input), operation.definition(input)
            assert_same(ours, theirs)
            assert ours.requires_grad == theirs.requires_grad


@pytest.mark.in_place
def test_inference_mode_of_inference_tensors(operation, device):
    def run(relu, relu_):
        with torch.inference_mode():
            input = numbers(5, 7, device=device)
            output = relu(input)
            same = relu_(input[1])
            return output, input, same, output.is_inference(), same.is_inference()

    *ours, a, b = run(operation.function, operation.function_)
    *theirs, c, d = run(operation.definition, operation.definition_)
    assert_all_same(ours, theirs)
    assert (a, b) == (c, d) == (True, True)


@pytest.mark.in_place
def test_inference_tensor_outside(operation, device):
    with torch.inference_mode():
        input = numbers(5, 7, device=device)
    output = operation.function(input)
    assert not output.is_inference()
    assert_same(output, operation.definition(input))
    assert error_of(operation.function_, input) == error_of(operation.definition_, input)
    with torch.no_grad():
        assert error_of(operation.function_, input) == error_of(operation.definition_, input)
    sums = leaf(5, 7, device=device) + input
    assert_all_same(*(output_and_gradient(f, sums) for f in (operation.function, operation.definition)))


@pytest.mark.in_place
def test_normal_tensor_in_inference_mode(operation, device):
    def run(relu_):
        input = leaf(5, 7, device=device) * 1
        used = input.exp() * input  # keeps input for backward
        with torch.inference_mode():
            relu_(input)
            relu_(input[1])
        return used, input._version

    ours, theirs = run(operation.function_), run(operation.definition_)
    assert ours[1] == theirs[1] == 2
    assert error_of(ours[0].sum().backward) == error_of(theirs[0].sum().backward)


def test_below_autograd(operation, device):
    """As in another operator's kernel: nothing is recorded."""
    input = leaf(5, 7, device=device)
    with torch._C._AutoDispatchBelowAutograd():
        ours, theirs = operation.function(input), operation.definition(input)
    assert_same(ours, theirs)
    assert ours.requires_grad == theirs.requires_grad and ours.grad_fn is None


def test_grad_mode_switched_off_in_between(operation, device):
    input = leaf(9, device=device)
    with torch.set_grad_enabled(False):
        without = operation.function(input)
    assert operation.function(without + input).grad_fn.name() == node_name(operation)
    assert without.grad_fn is None


# Autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast_is_ignored(operation, device, dtype):
    input = numbers(5, 7, device=device, dtype=dtype)
    with torch.autocast(device, torch.bfloat16):
        results = output_and_gradient(operation.function, input)
        assert operation.function(input.clone().requires_grad_()).grad_fn.name() == node_name(operation)
    assert_all_same(results, output_and_gradient(operation.definition, input))


def test_autocast_network(operation, device):
    def run(relu):
        torch.manual_seed(0)
        layers = torch.nn.Linear(7, 5), relu, torch.nn.Linear(5, 3), relu
        network = torch.nn.Sequential(*layers).to(device)
        with torch.autocast(device, torch.bfloat16):
            output = network(torch.linspace(-1, 1, 28, device=device).view(4, 7))
        output.float().square().sum().backward()
        return [output.detach(), *(parameter.grad for parameter in network.parameters())]

    assert_all_same(run(operation.module()), run(operation.torch_module()))
