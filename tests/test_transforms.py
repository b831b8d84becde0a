"""torch.func's transforms and forward mode, and gradients that they hand to a graph that was made in eager."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from composing import FORMS, assert_all_same, forms_of, leaf, numbers, output_and_gradient
from operations import REPRESENTATIVE, assert_same
from torch.func import functional_call, functionalize, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils._pytree import tree_leaves

ROWS = REPRESENTATIVE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),  # torch's own use of it
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning"),  # by linearize
]

# Transforms. Each function here gets a function of one tensor, an input of 5 by 7 and another of the same shape.


def scalar(function):
    """To a number, and with a second derivative."""
    return lambda input: (function(input).nan_to_num(1, 2, -2) ** 3).sum()


TRANSFORMS = {
    "grad": lambda f, x, v: grad(scalar(f))(x),
    "vjp": lambda f, x, v: vjp(f, x)[1](v),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,)),
    "linearize": lambda f, x, v: linearize(f, x)[1](v),
    "vmap": lambda f, x, v: vmap(f)(x),
    "vmap over columns": lambda f, x, v: vmap(f, in_dims=1, out_dims=1)(x),
    "vmap in chunks": lambda f, x, v: vmap(f, chunk_size=2)(x),
    "vmap of vmap": lambda f, x, v: vmap(vmap(lambda x: f(x.expand(2, 1)), in_dims=0), in_dims=1)(x),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "hessian": lambda f, x, v: hessian(scalar(f))(x),
    "jacrev of jacrev": lambda f, x, v: jacrev(jacrev(scalar(f)))(x),
    "jacrev of jacfwd": lambda f, x, v: jacrev(jacfwd(scalar(f)))(x),
    "grad of grad": lambda f, x, v: grad(lambda x: (grad(scalar(f))(x) * v.nan_to_num()).sum())(x),
    "jvp of grad": lambda f, x, v: jvp(grad(scalar(f)), (x,), (v,)),
    "grad of jvp": lambda f, x, v: grad(lambda x: jvp(scalar(f), (x,), (v.nan_to_num(),))[1])(x),
    "jvp of jvp": lambda f, x, v: jvp(lambda x: jvp(f, (x,), (v,))[1], (x,), (v,)),
    "vmap of grad": lambda f, x, v: vmap(grad(scalar(f)))(x.unsqueeze(1)),
    "grad of vmap": lambda f, x, v: grad(scalar(vmap(f)))(x),
    "vmap of jvp": lambda f, x, v: vmap(lambda x, v: jvp(f, (x,), (v,)))(x, v),
    "jvp of vmap": lambda f, x, v: jvp(vmap(f), (x,), (v,)),
    "vmap of vjp": lambda f, x, v: vmap(vjp(f, x)[1])(torch.stack([v, x])),
    "vmap of hessian": lambda f, x, v: vmap(hessian(scalar(f)))(x.unsqueeze(1)),
    "functionalize": lambda f, x, v: functionalize(f)(x),
    "functionalize of grad": lambda f, x, v: functionalize(grad(scalar(f)))(x),
    "functionalize of vmap": lambda f, x, v: functionalize(vmap(f))(x.unsqueeze(1)),
    "grad of a leaf": lambda f, x, v: grad(scalar(f))(x.clone().requires_grad_()),
    "backward through vmap": lambda f, x, v: output_and_gradient(vmap(f), x.unsqueeze(1)),
    "backward through jvp": lambda f, x, v: output_and_gradient(lambda x: jvp(f, (x,), (v,))[1], x),
    "dual": lambda f, x, v: dual(f, x, v),
    "dual of a leaf": lambda f, x, v: output_and_gradient(lambda x: dual(f, x, v)[1], x),
}


def dual(function, x, v):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(function(forward_ad.make_dual(x, v))))


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transform(operation, device, transform):
    for form in forms_of(operation):
        ours, theirs = (
            tree_leaves(transform(f, numbers(5, 7, device=device), numbers(5, 7, device=device, seed=1)))
            for f in form(operation)
        )
        assert len(ours) > 0
        assert_all_same(ours, theirs)


def test_vmap_without_a_loop(operation, device):
    """What is computed are torch's operators: for one of ours vmap would call it for every row."""
    torch._C._functorch._set_vmap_fallback_enabled(False)
    try:
        for form in forms_of(operation):
            ours, theirs = (vmap(f)(numbers(5, 7, device=device)) for f in form(operation))
            assert_same(ours, theirs)
        with pytest.raises(RuntimeError, match="fallback"):
            vmap(torch.ops.relu_ext.relu_forward)(numbers(5, 7, device=device))
    finally:
        torch._C._functorch._set_vmap_fallback_enabled(True)


def test_transform_of_a_network(operation, device):
    """The gradient of each sample, as torch.func's guide computes it."""

    def run(relu):
        torch.manual_seed(0)
        network = torch.nn.Sequential(torch.nn.Linear(7, 5), relu, torch.nn.Linear(5, 1), relu).to(device)
        parameters = dict(network.named_parameters())

        def loss(parameters, sample):
            return functional_call(network, parameters, (sample,)).square().sum()

        samples = torch.linspace(-2, 2, 28, device=device).view(4, 7)
        return vmap(grad(loss), in_dims=(None, 0))(parameters, samples).values()

    assert_all_same(run(operation.module()), run(operation.torch_module()))


def test_constant_in_a_transform(operation, device):
    """Plain tensors inside a transform that does not concern them; the eager graph outside must not be lost."""

    def run(relu):
        constant = leaf(5, 7, device=device)
        value = vmap(lambda row: row + relu(constant))(numbers(3, 7, device=device, seed=1))
        first = grad(lambda x: (x * relu(constant)).nan_to_num().sum())(numbers(5, 7, device=device, seed=2))
        outer = numbers(3, 5, 7, device=device, seed=3)
        return value.detach(), first.detach(), torch.autograd.grad(value, constant, outer)[0]

    assert_all_same(run(operation.function), run(operation.definition))


@pytest.mark.in_place
def test_in_place_on_what_a_transform_does_not_own(operation, device):
    """vmap refuses to write what varies into what does not; a plain tensor may be changed."""

    def run(relu_):
        constant = numbers(5, 7, device=device).clone()
        vmap(lambda row: row + relu_(constant))(numbers(3, 7, device=device))
        return constant, constant._version

    (ours, our_version), (theirs, their_version) = run(operation.function_), run(operation.definition_)
    assert_same(ours, theirs)
    assert our_version == their_version


# A graph that was made in eager meets gradients that are not plain


# Each gets the function from the gradient of the output to that of the input, and two gradients of 5 by 7.
OF_BACKWARD = {
    "batched": lambda f, x, v: f(torch.stack([x, v]), is_grads_batched=True),
    "vmap": lambda f, x, v: vmap(f)(torch.stack([x, v])),
    "vmap over the last dimension": lambda f, x, v: vmap(f, 2, 1)(torch.stack([x, v], 2)),
    "vmap of vmap": lambda f, x, v: vmap(vmap(f))(torch.stack([x, v, -x, -v]).view(2, 2, 5, 7)),
    "dual": lambda f, x, v: dual(f, x, v),
    "jvp": lambda f, x, v: jvp(f, (x,), (v,)),
    "vmap of jvp": lambda f, x, v: vmap(lambda x, v: jvp(f, (x,), (v,)))(torch.stack([x, v]), torch.stack([v, x])),
    "jvp of vmap": lambda f, x, v: jvp(vmap(f), (torch.stack([x, v]),), (torch.stack([v, x]),)),
    "jacrev": lambda f, x, v: jacrev(f)(x),
    "jacfwd": lambda f, x, v: jacfwd(f)(x),
    "functionalize": lambda f, x, v: functionalize(f)(x),
    "create_graph": lambda f, x, v: output_and_gradient(lambda grad: f(grad, create_graph=True), x),
}


@pytest.mark.parametrize("run", OF_BACKWARD.values(), ids=OF_BACKWARD)
@pytest.mark.parametrize("form", ["function", "in place", "in place on a view"])
def test_transform_of_backward(operation, device, run, form):
    def result(function):
        input = leaf(7, 5, device=device).t().detach().requires_grad_()  # bits in another order than the gradients
        output = function(input)

        def backward(grad, **options):
            return torch.autograd.grad(output, input, grad, retain_graph=True, **options)[0]

        return tree_leaves(run(backward, *(numbers(5, 7, device=device, seed=seed) for seed in (1, 2))))

    ours, theirs = map(result, FORMS[form](operation))
    assert len(ours) > 0
    assert_all_same(ours, theirs)


def test_forward_over_reverse(operation, device):
    def run(relu):
        input = leaf(5, 7, device=device, dtype=torch.float64)
        with forward_ad.dual_level():
            x = forward_ad.make_dual(input, numbers(5, 7, device=device, dtype=torch.float64, seed=1))
            output = relu(x) * relu(x * 2)
            (result,) = torch.autograd.grad(output, input, torch.ones_like(output), create_graph=True)
            return [tensor.detach() for tensor in (*forward_ad.unpack_dual(output), *forward_ad.unpack_dual(result))]

    assert_all_same(run(operation.function), run(operation.definition))


@pytest.mark.parametrize("strategy", ["reverse-mode", "forward-mode"])
def test_functional_jacobian_and_hessian(operation, device, strategy):
    def run(relu):
        input = numbers(3, 4, device=device)
        options = {"vectorize": True}
        return (
            torch.autograd.functional.jacobian(relu, input, strategy=strategy, **options),
            torch.autograd.functional.hessian(scalar(relu), input, outer_jacobian_strategy=strategy, **options),
            torch.autograd.functional.jacobian(relu, input),
            torch.autograd.functional.vhp(scalar(relu), input, input.nan_to_num())[1],
            torch.autograd.functional.hvp(scalar(relu), input, input.nan_to_num())[1],
        )

    assert_all_same(run(operation.function), run(operation.definition))
