"""torch.compile and compiled autograd: both see the definition, so the graphs and what comes of them are torch's."""

import pytest
import torch
import torch.nn.functional as F
from composing import assert_all_same, in_place, leaf, node_name, numbers, output_and_gradient, over_forms
from operations import RELU, REPRESENTATIVE, assert_same
from torch._dynamo import compiled_autograd
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch._dynamo.utils import counters
from torch._inductor import metrics

import relu_ext
from relu_ext import ReLUFunction

ROWS = REPRESENTATIVE

pytestmark = [
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning"),  # torch's own test helper
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),  # torch's own use of it
    pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compilers():
    torch._dynamo.reset()
    counters.clear()


class Compiled:
    """A function compiled without a break, and the graphs that came of it."""

    def __init__(self, function, **options):
        self.recorded = AotEagerAndRecordGraphs()
        self.function = torch.compile(function, backend=self.recorded, fullgraph=True, **options)

    def __call__(self, *inputs):
        return self.function(*inputs)

    @property
    def graphs(self):
        """What Dynamo's graphs call, and the code of those that AOTAutograd made of them; a list for each stage."""
        called = [[node.target for node in graph.graph.nodes if "call" in node.op] for graph in self.recorded.graphs]
        traced = [[graph.code for graph in graphs] for graphs in (self.recorded.fw_graphs, self.recorded.bw_graphs)]
        return [called, *traced]


# torch.compile


@over_forms
def test_compile_inference(operation, device, form):
    ours, theirs = map(Compiled, form(operation))
    input = numbers(5, 7, device=device)
    assert_same(ours(input), theirs(input))
    assert ours.graphs == theirs.graphs
    assert len(ours.recorded.graphs) == 1 and "relu_ext" not in str(ours.graphs)


@over_forms
def test_compile_training(operation, device, form):
    ours, theirs = map(Compiled, form(operation))
    input = numbers(5, 7, device=device)
    results = output_and_gradient(ours, input)
    assert_all_same(results, output_and_gradient(theirs, input))
    assert_all_same(results, output_and_gradient(form(operation)[0], input))
    assert ours.graphs == theirs.graphs
    assert [len(stage) for stage in ours.graphs] == [1, 1, 1]


@pytest.mark.in_place
def test_compile_the_function_in_place_itself(operation, device):
    ours, theirs = numbers(5, 7, device=device), numbers(5, 7, device=device)
    compiled = Compiled(operation.function_)
    assert compiled(ours) is ours
    assert_same(ours, operation.definition_(theirs))
    assert len(compiled.recorded.graphs) == 1


@pytest.mark.parametrize("operation", [RELU], ids=str)  # scalars become symbols of the graph
def test_compile_with_dynamic_shapes_compiles_once(operation, device):
    ours, theirs = Compiled(operation.function, dynamic=True), Compiled(operation.definition, dynamic=True)
    for shape in [(5, 7), (6, 9), (33, 2), (128, 64)]:
        input = numbers(*shape, device=device)
        assert_all_same(output_and_gradient(ours, input), output_and_gradient(theirs, input))
    assert ours.graphs == theirs.graphs
    assert [len(stage) for stage in ours.graphs] == [1, 1, 1]


def test_compile_recompiles_as_often_as_torch(operation, device):
    """Once when a size turns out to vary, and for another dtype or layout where torch does."""
    ours, theirs = Compiled(operation.function), Compiled(operation.definition)
    for input in [numbers(5, 7), numbers(6, 7), numbers(9, 7), numbers(7, 9).t(), numbers(5, 7).double()]:
        input = input.to(device)
        assert_all_same(output_and_gradient(ours, input), output_and_gradient(theirs, input))
    assert ours.graphs == theirs.graphs


def test_compile_leaves_disabled_code_to_the_kernels(operation, device):
    @torch.compiler.disable
    def eager(input):
        return operation.function(input)

    output = torch.compile(lambda input: eager(input * 2), backend="aot_eager")(leaf(9, device=device))
    assert output.grad_fn.name() == node_name(operation)
    assert_same(output, operation.definition(numbers(9, device=device) * 2))


def test_compile_after_a_graph_break(operation, device):
    def function(relu, input):
        output = relu(input * 2)
        torch._dynamo.graph_break()
        return relu(output - 1)

    compiled = torch.compile(function, backend="aot_eager")
    ours, theirs = (
        output_and_gradient(lambda input, relu=relu: compiled(relu, input), numbers(5, 7, device=device))
        for relu in (operation.function, operation.definition)
    )
    assert_all_same(ours, theirs)


def test_compile_inside_control_flow(operation, device):
    def function(relu):
        return lambda input: torch.cond(input.isnan().any(), lambda x: relu(x) + 1, lambda x: -relu(x), (input,))

    ours, theirs = (Compiled(function(relu)) for relu in (operation.function, operation.definition))
    for input in (numbers(5, 7, device=device), numbers(5, 7, device=device).nan_to_num()):
        assert_all_same(output_and_gradient(ours, input), output_and_gradient(theirs, input))


def test_inductor_fuses_it_with_its_neighbours(operation, device):
    def kernels(relu, input):
        torch._dynamo.reset()
        metrics.reset()
        compiled = torch.compile(lambda x: relu(x + 0.25) * 2 + x, fullgraph=True)
        results = output_and_gradient(compiled, input)
        return results, metrics.generated_kernel_count

    # The caches would hand over kernels of an earlier run without counting them.
    with torch._inductor.config.patch(force_disable_caches=True):
        input = numbers(9, 7, device=device).nan_to_num(posinf=1, neginf=-1)
        ours, count = kernels(operation.function, input)
        theirs, _ = kernels(operation.definition, input)
    assert count == 2  # one forward, one backward
    assert_all_same(ours, theirs)


def test_compile_with_a_checkpoint(operation, device):
    def function(relu):
        return lambda input: torch.utils.checkpoint.checkpoint(lambda x: relu(x * 2), input, use_reentrant=False)

    ours, theirs = (Compiled(function(relu)) for relu in (operation.function, operation.definition))
    input = numbers(5, 7, device=device)
    assert_all_same(output_and_gradient(ours, input), output_and_gradient(theirs, input))
    assert ours.graphs == theirs.graphs


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "function", [ReLUFunction.apply, lambda x: torch.ops.relu_ext.relu_forward(x)[0]], ids=["ReLUFunction", "operator"]
)
def test_compile_registered_operators(device, function, dynamic):
    """Who calls them by name gets them in the graph, with one bit an element kept for backward."""
    compiled = Compiled(function, dynamic=dynamic)
    for input in (numbers(5, 7, device=device), numbers(6, 9, device=device)):
        assert_same(compiled(input), torch.relu(input))
        assert_all_same(output_and_gradient(compiled, input), output_and_gradient(torch.relu, input))
    assert "relu_ext.relu_forward" in compiled.recorded.fw_graphs[-1].code
    kept = [node.meta["val"] for node in compiled.recorded.bw_graphs[-1].graph.find_nodes(op="placeholder")]
    assert any(isinstance(value, torch.Tensor) and value.dtype == torch.uint8 for value in kept)
    assert len(compiled.recorded.bw_graphs) == (1 if dynamic else 2)


# Compiled autograd: the graph of backward, recorded in eager, is compiled when backward runs


def captured(function, *inputs):
    """function's result under compiled autograd, and the number of graphs that this took."""
    before = counters["compiled_autograd"]["captures"]
    compiler = torch.compile(backend="aot_eager", fullgraph=True)
    with compiled_autograd._enable(compiler):
        result = function(*inputs)
    return result, counters["compiled_autograd"]["captures"] - before


def gradient(function, input):
    """By backward(): autograd.grad inside torch.compile is another road."""
    input = input.detach().requires_grad_()
    output = function(input)
    output.backward(numbers(*output.shape, device=input.device, seed=1))
    return input.grad


def on_overlapping_views(operation):
    """With torch in place this is an error: it keeps the output, which changes."""

    def in_place(input):
        output = input * 1
        operation.function_(output[1:])
        output.t()[2].mul_(-3)
        operation.function_(output[:, 1:4])
        return output

    def out_of_place(input):
        output = torch.cat([input[:1], operation.definition(input[1:])])
        output = torch.cat([output[:, :2], output[:, 2:3] * -3, output[:, 3:]], 1)
        return torch.cat([output[:, :1], operation.definition(output[:, 1:4]), output[:, 4:]], 1)

    return in_place, out_of_place


EAGER_FORMS = {
    "function": lambda operation: (operation.function, operation.definition),
    "twice": lambda operation: (
        lambda x: operation.function(operation.function(x) - 0.25),
        lambda x: operation.definition(operation.definition(x) - 0.25),
    ),
    "in place": in_place,
    "in place on overlapping views": on_overlapping_views,
}


@pytest.mark.parametrize("form", EAGER_FORMS.values(), ids=EAGER_FORMS)
def test_compiled_autograd(operation, device, form):
    if form is on_overlapping_views and not operation.keep:
        pytest.skip("what the first keeps, the second overwrites, in torch too")
    ours, theirs = form(operation)
    input = numbers(5, 7, device=device)
    result, captures = captured(gradient, ours, input)
    assert_same(result, gradient(theirs, input))
    assert captures == 1


def test_compiled_autograd_of_other_sizes_and_layouts(operation, device):
    """The graph that was captured first must not serve a tensor whose bits lie in another order."""
    inputs = {
        "first": numbers(2, 4, 6, 8),
        "same": numbers(2, 4, 6, 8, seed=2),
        "channels_last": numbers(2, 4, 6, 8).to(memory_format=torch.channels_last),
        "transposed": numbers(4, 2, 6, 8).transpose(0, 1),
        "larger": numbers(3, 5, 7, 9),
        "first again": numbers(2, 4, 6, 8, seed=3),
    }
    for name, input in inputs.items():
        input = input.to(device)
        result, captures = captured(gradient, operation.function, input)
        assert_same(result, gradient(operation.definition, input))
        if name in ("same", "first again"):
            assert captures == 0


@pytest.mark.one_node
def test_compiled_autograd_with_hooks(operation, device):
    def function(relu):
        def run(input):
            output = relu(input * 2)
            output.register_hook(lambda grad: grad * 3)
            output.grad_fn.register_prehook(lambda grads: (grads[0] + 1,))
            output.grad_fn.register_hook(lambda grads, _: (grads[0] * 5,))
            return output

        return run

    input = numbers(5, 7, device=device)
    result, _ = captured(gradient, function(operation.function), input)
    assert_same(result, gradient(function(operation.definition), input))


@pytest.mark.keeps_bits
def test_compiled_autograd_with_saved_tensor_hooks(operation, device):
    """What a hook packed is unpacked in the compiled backward: here the complement of the bits."""
    input = torch.tensor([0.5, -1, 0.6], device=device, requires_grad=True)

    def complement(bits):
        return ~torch.tensor(bits, device=device).byte()

    with torch.autograd.graph.saved_tensors_hooks(lambda bits: bits.tolist(), complement):
        output = operation.function(input)
    captured(output.sum().backward)
    keep = torch.tensor([False, True, False], device=device)
    assert_same(input.grad, operation.masked(torch.ones(3, device=device), keep))


def test_compiled_autograd_frees_the_bits(operation, device):
    output = operation.function(leaf(9, device=device))
    captured(output.sum().backward)
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        captured(output.sum().backward)


def test_compiled_autograd_keeps_the_bits_if_asked(operation, device):
    def run(function):
        input = leaf(9, device=device)
        output = function(input)
        captured(lambda: output.sum().backward(retain_graph=True))
        captured(output.sum().backward)
        return input.grad

    assert_same(run(operation.function), run(operation.definition))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_compiled_autograd_of_other_dtypes(operation, device, dtype):
    input = numbers(5, 7, device=device, dtype=dtype)
    results = captured(output_and_gradient, operation.function, input)[0]
    assert_all_same(results, output_and_gradient(operation.definition, input))


@pytest.mark.parametrize("ours, theirs", [(relu_ext.leaky_relu, F.leaky_relu), (relu_ext.elu, F.elu)])
def test_compiled_autograd_of_another_scalar(device, ours, theirs):
    """The graph that was captured first must not serve it."""
    input = torch.linspace(-2, 2, 9, device=device)
    for scalar in (0.25, 0.75):
        result, _ = captured(gradient, lambda x, scalar=scalar: ours(x, scalar), input)
        expected = gradient(lambda x, scalar=scalar: theirs(x, scalar), input)
        torch.testing.assert_close(result, expected, equal_nan=True)


def test_compiled_autograd_of_one_input(operation, device):
    """A second backward through the same graph asks for what the first left out."""

    def run(function):
        input, weight = leaf(9, device=device), leaf(9, device=device, seed=1)
        output = function(input) * weight
        captured(lambda: output.sum().backward(inputs=[weight], retain_graph=True))
        assert input.grad is None
        captured(lambda: output.sum().backward(inputs=[input]))
        return input.grad, weight.grad

    assert_all_same(run(operation.function), run(operation.definition))


def test_compiled_step_with_an_eager_layer(operation, device):
    """forward and backward() in one torch.compile region, by the setting that users have."""

    def step(relu):
        def run(weight, input):
            loss = relu(input * weight).nan_to_num(posinf=1).square().sum()
            loss.backward()

        return run

    grads = []
    with torch._dynamo.config.patch(compiled_autograd=True):
        for relu in (operation.function, torch.compiler.disable(operation.function), operation.definition):
            weight = torch.full((7,), 0.5, device=device, requires_grad=True)
            torch.compile(step(relu), backend="aot_eager")(weight, numbers(5, 7, device=device).nan_to_num(0, 1, 1))
            grads.append(weight.grad)
    assert_same(grads[0], grads[2])
    assert_same(grads[1], grads[2])
