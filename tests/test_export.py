"""Exporters, tracers and TorchScript: each sees the operation's definition, so what they record is torch's."""

import contextlib
import io
import re

import pytest
import torch
from composing import assert_all_same, forms_of, leaf, numbers, output_and_gradient
from operations import REPRESENTATIVE, assert_same
from torch._subclasses import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.proxy_tensor import make_fx

ROWS = REPRESENTATIVE

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),  # torch.export.load
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch.export's own use of it
]


# torch.export


def network(relu):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 5), relu, torch.nn.Linear(5, 3), relu)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export(operation, strict, inplace):
    options = {"inplace": inplace} if operation.in_place else {}

    def export(module):
        return torch.export.export(
            network(module(**options)), (torch.ones(4, 7),), strict=strict, dynamic_shapes=({0: Dim("batch")},)
        )

    ours, theirs = export(operation.module), export(operation.torch_module)
    assert ours.graph_module.code == theirs.graph_module.code
    assert ours.run_decompositions().graph_module.code == theirs.run_decompositions().graph_module.code

    file = io.BytesIO()
    torch.export.save(ours, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch in (1, 4, 33):
        input = torch.randn(batch, 7)
        expected = network(operation.torch_module(**options))(input)
        assert_same(loaded(input), expected)
        assert_same(ours.module()(input), expected)


# Tracers with fake and real tensors


def forward_and_backward(relu):
    def run(input, grad):
        output = relu(input)
        return output, torch.autograd.grad(output, input, grad)[0]

    return run


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx(operation, device, mode):
    input, grad = leaf(5, 7, device=device), numbers(5, 7, device=device, seed=1)
    for form in forms_of(operation):
        ours, theirs = (make_fx(forward_and_backward(f), tracing_mode=mode)(input, grad) for f in form(operation))
        assert ours.code == theirs.code
        assert "relu_ext" not in ours.code
        assert_all_same(ours(input, grad), theirs(input, grad))


def test_make_fx_of_a_backward_that_began_in_eager(operation, device):
    """Only the gradient is traced; the bits are there already and become constants of the graph."""
    input = leaf(4, 6, device=device).t()
    output = operation.function(input)
    grad = numbers(6, 4, device=device, seed=1)
    traced = make_fx(lambda grad: torch.autograd.grad(output, input, grad, retain_graph=True))(torch.ones_like(grad))
    assert "relu_ext" not in traced.code
    assert_all_same(traced(grad), torch.autograd.grad(operation.definition(input), input, grad))


@pytest.mark.parametrize("mode", ["fake", "meta"])
def test_tensors_without_data(operation, mode):
    def hollow(tensor):
        if mode == "meta":
            return torch.empty_strided(tensor.shape, tensor.stride(), device="meta")
        return fake.from_tensor(tensor)

    fake = FakeTensorMode()
    with fake if mode == "fake" else contextlib.nullcontext():
        for tensor in (numbers(5, 7), numbers(5, 7).t(), numbers(5, 7)[:, 2:4], numbers(0, 3)):
            for form in forms_of(operation):
                results = [
                    forward_and_backward(f)(hollow(tensor).requires_grad_(), hollow(tensor)) for f in form(operation)
                ]
                for ours, theirs in zip(*results, strict=True):
                    assert type(ours) is type(theirs)
                    assert (ours.device, ours.shape, ours.stride()) == (theirs.device, theirs.shape, theirs.stride())


def test_fake_gradient_of_a_graph_that_began_in_eager(operation, device):
    def run(function):
        input = leaf(4, 6, device=device).t().detach().requires_grad_()
        output = function(input)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            (gradient,) = torch.autograd.grad(output, input, mode.from_tensor(torch.ones(6, 4, device=device)))
        return type(gradient), gradient.shape, gradient.dtype, gradient.device

    assert run(operation.function) == run(operation.definition)


def symbolic_calls(function):
    traced = torch.fx.symbolic_trace(function)
    return [(node.target, node.args[1:], node.kwargs) for node in traced.graph.nodes if node.op == "call_function"]


@pytest.mark.in_place
def test_symbolic_trace(operation):
    """Each call becomes a call of the definition."""
    for inplace in (False, True):
        ours, theirs = (module(inplace=inplace) for module in (operation.module, operation.torch_module))
        ((function, _, keywords),) = calls = symbolic_calls(ours)
        assert calls == symbolic_calls(theirs)
        assert (function, keywords["inplace"]) == (operation.definition, inplace)
    scalars = operation.scalars
    calls = symbolic_calls(lambda input: operation.function_(input, *scalars))
    assert calls == symbolic_calls(lambda input: operation.definition_(input)) and len(calls) == 1


@pytest.mark.in_place
def test_symbolic_trace_of_the_function_itself(operation):
    """Then ``inplace`` is a symbol too."""
    traced = torch.fx.symbolic_trace(operation.function)
    for inplace in (False, True):
        assert_same(traced(numbers(9), *operation.scalars, inplace), operation.definition(numbers(9)))


# TorchScript


def reloaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def called(scripted):
    return re.findall(r" = (aten::\w+)", str(scripted.inlined_graph))


def assert_scripted(scripted, operation, input):
    """Before and after it was saved; the third call onwards runs what the executor made of it."""
    assert "^" not in str(scripted.inlined_graph)  # ^ marks a call back into Python
    expected = output_and_gradient(operation.definition, input)
    for function in (scripted, reloaded(scripted)):
        for _ in range(3):
            assert_all_same(output_and_gradient(function, input), expected)


@pytest.mark.in_place
def test_script(operation, device):
    relu, relu_ = operation.function, operation.function_

    def out_of_place(x: torch.Tensor):
        return relu(x)

    def in_place(x: torch.Tensor):
        return relu_(x * 1)

    def in_place_by_argument(x: torch.Tensor):
        return relu(x * 1, inplace=True)

    input = numbers(5, 7, device=device)
    for function in (out_of_place, in_place, in_place_by_argument):
        assert_scripted(torch.jit.script(function), operation, input)
    for function in (operation.function, operation.function_):
        assert_same(torch.jit.script(function)(input.clone()), operation.definition(input))
    ours, theirs = (torch.jit.script(module()) for module in (operation.module, operation.torch_module))
    assert called(ours) == called(theirs)
    assert_scripted(ours, operation, input)


def test_trace(operation, device):
    input = numbers(5, 7, device=device)
    for form in forms_of(operation):
        ours, theirs = (torch.jit.trace(f, (numbers(5, 7, device=device),)) for f in form(operation))
        assert called(ours) == called(theirs)
        assert_all_same(output_and_gradient(reloaded(ours), input), output_and_gradient(theirs, input))
