"""What the composability tests share: numbers, comparisons, and the forms in which an operation is called."""

import pytest
import torch
from operations import assert_same, mixed_values
from torch.utils._python_dispatch import TorchDispatchMode


def numbers(*shape, device="cpu", dtype=torch.float32, seed=0):
    """Signed, a third of them NaN, infinities, zeros or subnormals; the same for the same seed."""
    return mixed_values(torch.Size(shape).numel(), dtype, device, seed).view(shape)


def leaf(*shape, **options):
    return numbers(*shape, **options).requires_grad_()


def node_name(operation):
    """Of the node that keeps bits: a tensor with it has come by the kernels or the registered operators."""
    return operation.node


def output_and_gradient(function, input):
    """The gradient that arrives lies in another layout than the output and has special values of its own."""
    grad = numbers(*reversed(input.shape), device=input.device, dtype=input.dtype, seed=1)
    input = input.detach().requires_grad_()
    output = function(input)
    return output.detach(), *torch.autograd.grad(output, input, grad.permute(*reversed(range(input.dim()))))


def assert_all_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


def assert_near_sum(grad_weight, input, grad):
    """prelu's gradient of its weight is at most as far from the truth as rounding that, and products in float32, is."""
    products = torch.where(input > 0, 0, input.double() * grad.double())
    places = [dim for dim in range(input.dim()) if dim != 1 or grad_weight.numel() == 1]
    truth, scale = (terms.sum(places).view(grad_weight.shape) for terms in (products, products.abs()))
    dtype = grad_weight.dtype
    unit, smallest = torch.finfo(dtype).eps, torch.finfo(dtype).smallest_normal
    rounding = truth.abs() * unit + scale * min(unit, torch.finfo(torch.float32).eps) + smallest
    finite = truth.to(dtype).isfinite()
    assert_same(grad_weight[~finite], truth.to(dtype)[~finite])
    assert ((grad_weight.double() - truth).abs() <= rounding)[finite].all()


def error_of(function, *inputs):
    with pytest.raises(Exception) as error:
        function(*inputs)
    return error.type, str(error.value)


class Watch(TorchDispatchMode):
    """Notes what passes and lets it run."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


def in_place(operation):
    return lambda input: operation.function_(input * 1), lambda input: operation.definition_(input * 1)


def in_place_by_argument(operation):
    return (
        lambda input: operation.function(input * 1, inplace=True),
        lambda input: operation.definition(input * 1, inplace=True),
    )


def in_place_on_a_view(operation):
    def rows(function_, input):
        output = input * 1
        function_(output[1:])
        return output

    return lambda input: rows(operation.function_, input), lambda input: rows(operation.definition_, input)


def between_others(operation):
    return lambda x: operation.function(x * 2).square() + x, lambda x: operation.definition(x * 2).square() + x


# Each gives our function and torch's.
FORMS = {
    "function": lambda operation: (operation.function, operation.definition),
    "module": lambda operation: (operation.module(), operation.torch_module()),
    "in place": in_place,
    "in place by argument": in_place_by_argument,
    "in place on a view": in_place_on_a_view,
    "between others": between_others,
}


def forms_of(operation):
    """Those that the operation has."""
    return [form for name, form in FORMS.items() if operation.in_place or not name.startswith("in place")]


over_forms = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
