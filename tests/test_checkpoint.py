"""What is kept for backward: hooks that carry it elsewhere, and checkpoints that compute it anew."""

import contextlib
import functools

import pytest
import torch
from composing import (
    Watch,
    assert_all_same,
    error_of,
    leaf,
    numbers,
    output_and_gradient,
    over_forms,
)
from operations import REPRESENTATIVE, assert_same, kept_by
from torch.autograd.graph import saved_tensors_hooks
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import BaseTorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

ROWS = REPRESENTATIVE

# Saved-tensor hooks


@pytest.mark.keeps_bits
def test_hooks_see_the_bits_alone(operation, device):
    packed, unpacked = [], []
    with saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: unpacked.append(x) or x):
        output = operation.function(leaf(3, 5, 7, device=device))
    assert [(bits.dtype, bits.shape, bits.requires_grad) for bits in packed] == [(torch.uint8, (14,), False)]
    output.sum().backward()
    assert len(unpacked) == 1 and unpacked[0] is packed[0]


@over_forms
def test_hooks_that_carry_the_bits_elsewhere(operation, device, form):
    """As to a file: what backward gets are other tensors of the same values."""
    ours, theirs = form(operation)
    with saved_tensors_hooks(lambda x: (x.cpu().numpy(), x.device), lambda x: torch.tensor(x[0]).to(x[1])):
        results = output_and_gradient(ours, numbers(5, 7, device=device))
    assert_all_same(results, output_and_gradient(theirs, numbers(5, 7, device=device)))


@over_forms
def test_save_on_cpu(operation, device, form):
    ours, theirs = form(operation)
    with torch.autograd.graph.save_on_cpu():
        results = output_and_gradient(ours, numbers(5, 7, device=device))
    assert_all_same(results, output_and_gradient(theirs, numbers(5, 7, device=device)))


def test_hooks_that_raise(operation, device):
    def refuse(_):
        raise ValueError("refused")

    input = leaf(9, device=device)
    with saved_tensors_hooks(refuse, lambda x: x), pytest.raises(ValueError, match="refused"):
        operation.function(input)
    with saved_tensors_hooks(lambda x: x, refuse):
        output = operation.function(input)
    with pytest.raises(ValueError, match="refused"):
        output.sum().backward()
    assert input.grad is None


def test_hooks_disabled(operation, device):
    with torch.autograd.graph.disable_saved_tensors_hooks("no hooks here"):
        results = output_and_gradient(operation.function, numbers(5, 7, device=device))
        with pytest.raises(RuntimeError, match="no hooks here"):
            kept_by(operation.function, leaf(9, device=device))
    assert_all_same(results, output_and_gradient(operation.definition, numbers(5, 7, device=device)))


@pytest.mark.keeps_bits
def test_hooks_see_a_double_backward(operation, device):
    def run(function):
        kept = []
        input, grad = leaf(5, 7, device=device), leaf(5, 7, device=device, seed=1)
        with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            (first,) = torch.autograd.grad(function(input), input, grad, create_graph=True)
        return torch.autograd.grad(first, grad, numbers(5, 7, device=device, seed=2))[0], kept

    (ours, kept), (theirs, _) = run(operation.function), run(operation.definition)
    assert_same(ours, theirs)
    assert {(bits.dtype, bits.shape) for bits in kept} == {(torch.uint8, (5,))}


# Checkpoints


def block(relu):
    weight = torch.linspace(-1, 1, 49).view(7, 7)

    def run(input):
        return relu(relu(input * 2) @ weight.to(input.device)) + input

    return run


def finite(*shape, device):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)


def output_and_backward(function, input, forward_mode=None, backward_mode=None):
    """By backward(): a reentrant checkpoint allows no autograd.grad."""
    input = input.detach().requires_grad_()
    with forward_mode or torch.enable_grad():
        output = function(input)
    with backward_mode or torch.enable_grad():
        output.backward(finite(*output.shape, device=input.device))
    return output.detach(), input.grad


@pytest.mark.in_place
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_checkpoint(operation, device, use_reentrant):
    def run(relu):
        return lambda input: checkpoint(block(relu), input, use_reentrant=use_reentrant)

    input = finite(5, 7, device=device)
    expected = output_and_backward(block(operation.definition), input)
    assert_all_same(output_and_backward(run(operation.function), input), expected)
    assert_all_same(output_and_backward(run(lambda x: operation.function_(x * 1)), input), expected)


def test_checkpoint_keeps_its_input_alone(operation, device):
    kept = []
    with saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        checkpoint(block(operation.function), input := finite(5, 7, device=device).requires_grad_(), use_reentrant=True)
    assert [tensor.data_ptr() for tensor in kept] == [input.data_ptr()]


@contextlib.contextmanager
def two_device_contexts():
    with torch.device("cpu"), torch.device("cpu"):
        yield


MODES = {
    "flop counter": lambda: FlopCounterMode(display=False),
    "dispatch mode": Watch,
    "device context": lambda: torch.device("cpu"),
    "two device contexts": two_device_contexts,
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_checkpoint_with_a_mode_in_forward_or_backward_alone(operation, device, mode, use_reentrant):
    """It compares what backward computes anew with what forward kept: that must not depend on modes."""

    def run(input):
        return checkpoint(block(operation.function), input, use_reentrant=use_reentrant)

    input = finite(5, 7, device=device)
    expected = output_and_backward(block(operation.definition), input)
    assert_all_same(output_and_backward(run, input, backward_mode=mode()), expected)
    assert_all_same(output_and_backward(run, input, forward_mode=mode()), expected)
    assert_all_same(output_and_backward(run, input, mode(), mode()), expected)


def test_checkpoint_with_a_function_mode_in_forward_alone(operation, device, request):
    if operation.kept(torch.float32) != "input":  # elu keeps what torch's keeps
        reason = "function modes see F.relu, as with torch, and then it is torch's that keeps"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))

    def run(input):
        return checkpoint(block(operation.function), input, use_reentrant=False)

    input = finite(5, 7, device=device)
    expected = output_and_backward(block(operation.definition), input)
    assert_all_same(output_and_backward(run, input, forward_mode=BaseTorchFunctionMode()), expected)


# What turns a backward into something else, and with it what checkpoint computes anew.
BACKWARDS = {
    "create_graph": lambda backward, grad: backward(grad, create_graph=True).detach(),
    "batched": lambda backward, grad: backward(torch.stack([grad, -grad]), is_grads_batched=True),
    "vmap": lambda backward, grad: torch.vmap(backward)(torch.stack([grad, -grad])),
    "jvp": lambda backward, grad: torch.func.jvp(backward, (grad,), (-grad,)),
    "traced": lambda backward, grad: make_fx(backward)(torch.ones_like(grad))(grad),
}


@pytest.mark.in_place
@pytest.mark.parametrize("name", BACKWARDS)
def test_checkpoint_with_a_transformed_backward(operation, device, name, request):
    """Its forward ran in eager: what was kept then must be what is computed anew, on plain tensors."""
    if name in ("jvp", "traced") and operation.kept(torch.float32) != "input":  # elu keeps what ATen keeps
        reason = "in there every intermediate looks like one that is differentiated or traced, which takes ATen"
        request.applymarker(pytest.mark.xfail(strict=True, reason=reason))

    def result(function):
        input, grad = finite(5, 7, device=device).requires_grad_(), finite(5, 7, device=device)
        output = function(input)

        def backward(grad, **options):
            return torch.autograd.grad(output, input, grad, **options)[0]

        return tree_leaves(BACKWARDS[name](backward, grad))

    expected = result(block(operation.definition))
    for relu in (operation.function, lambda x: operation.function_(x * 1)):
        ours = result(lambda input, relu=relu: checkpoint(block(relu), input, use_reentrant=False))
        assert_all_same(ours, expected)


def test_checkpoint_in_a_vectorised_jacobian(operation, device):
    def jacobian(function):
        return torch.autograd.functional.jacobian(function, finite(3, 7, device=device), vectorize=True)

    ours = jacobian(lambda input: checkpoint(block(operation.function), input, use_reentrant=False))
    assert_same(ours, jacobian(block(operation.definition)))


def selectively(policy, relu, input, backward_mode=None):
    def contexts():
        return create_selective_checkpoint_contexts(lambda context, function, *args, **kwargs: policy)

    def run(input):
        return checkpoint(block(relu), input, use_reentrant=False, context_fn=contexts)

    return output_and_backward(run, input, backward_mode=backward_mode)


# Of its policies the rest are for torch's compiler.
EAGER_POLICIES = [
    CheckpointPolicy.MUST_SAVE,
    CheckpointPolicy.PREFER_SAVE,
    CheckpointPolicy.MUST_RECOMPUTE,
    CheckpointPolicy.PREFER_RECOMPUTE,
]


@pytest.mark.parametrize("policy", EAGER_POLICIES)
def test_selective_checkpoint(operation, device, policy):
    input = finite(5, 7, device=device)
    expected = output_and_backward(block(operation.definition), input)
    assert_all_same(selectively(policy, operation.function, input), expected)
    counter = FlopCounterMode(display=False)
    assert_all_same(selectively(policy, operation.function, input, counter), expected)


@pytest.mark.in_place
@pytest.mark.parametrize("policy", EAGER_POLICIES)
def test_selective_checkpoint_in_place(operation, device, policy):
    """An error where it saved what was then overwritten."""
    ours, theirs = (
        lambda relu_=relu_: selectively(policy, lambda x: relu_(x * 1), finite(5, 7, device=device))
        for relu_ in (operation.function_, operation.definition_)
    )
    if "SAVE" in policy.name:
        assert error_of(ours) == error_of(theirs)
    else:
        assert_all_same(ours(), theirs())


@pytest.mark.keeps_bits
def test_selective_checkpoint_by_operator(operation, device):
    """The registered operator can be named; then forward runs it once and backward does not."""
    forward = getattr(torch.ops.relu_ext, operation.name + "_forward").default

    def run(saved):
        contexts = functools.partial(create_selective_checkpoint_contexts, saved)
        with Watch() as mode:
            results = output_and_backward(
                lambda x: checkpoint(block(operation.function), x, use_reentrant=False, context_fn=contexts),
                finite(5, 7, device=device),
            )
        return results, mode.seen.count(forward)

    expected = output_and_backward(block(operation.definition), finite(5, 7, device=device))
    for saved, calls in ((forward, 2), (torch.ops.aten.mm.default, 4)):
        results, count = run([saved])
        assert_all_same(results, expected)
        assert count == calls


@pytest.mark.in_place
def test_checkpoint_of_modules(operation, device):
    def run(module, segments):
        torch.manual_seed(0)
        layers = [layer for _ in range(4) for layer in (torch.nn.Linear(7, 7), module(inplace=True))]
        network = torch.nn.Sequential(*layers).to(device)
        input = finite(5, 7, device=device).requires_grad_()
        run = (lambda x: checkpoint_sequential(network, segments, x, use_reentrant=False)) if segments else network
        run(input).square().sum().backward()
        return [input.grad, *(parameter.grad for parameter in network.parameters())]

    assert_all_same(run(operation.module, 2), run(operation.torch_module, 0))
