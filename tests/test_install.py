"""install(): torch's own functions take the kernels, and mean what they meant; after it nothing is left of it."""

import contextlib
import itertools
import threading

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from composing import FORMS, Watch, assert_all_same, error_of, leaf, numbers, output_and_gradient
from operations import DTYPES, OPERATIONS, REPRESENTATIVE, assert_same, kept_by
from test_composability import LAYOUTS, Wrapper, described
from test_transforms import TRANSFORMS
from torch._C import DispatchKey
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import profile
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._pytree import tree_leaves

import relu_ext
from relu_ext import _C

ROWS = [row for row in OPERATIONS if row.name != "relu_squared"]  # those that torch has
FEW = [row for row in REPRESENTATIVE if row in ROWS]

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")


@pytest.fixture(autouse=True)
def nothing_stays_installed():
    yield
    assert not relu_ext.is_installed()


def before_and_installed(run):
    """What it gives without install() and with it."""
    before = run()
    with relu_ext.installed():
        return before, run()


def outcome(function, input):
    """As described, without the list of all registrations that torch adds to an error."""
    type, *rest = described(function, input)
    return type, *(part.partition("\n")[0] if isinstance(type, Exception.__class__) else part for part in rest)


def node_installed(operation):
    """relu6 is a composite: what arrives is its hardtanh."""
    return "HardtanhBackward" if operation.name == "relu6" else operation.node


def nodes_of(output):
    """The names of all nodes that lead to it."""
    names, waiting = set(), [output.grad_fn]
    while waiting:
        node = waiting.pop()
        names.add(node.name())
        waiting += [next_node for next_node, _ in node.next_functions if next_node]
    return names


def profiled(function, *inputs):
    """The operators and kernels that the profiler shows."""
    with profile(activities=[torch.profiler.ProfilerActivity.CPU]) as recorded:
        function(*inputs)
    return {event.key for event in recorded.key_averages()}


# Values, gradients and nodes

INPUTS = {
    "contiguous": lambda **o: numbers(5, 7, **o),
    "transposed": lambda **o: numbers(7, 5, **o).t(),
    "channels last": lambda **o: numbers(2, 3, 4, 5, **o).contiguous(memory_format=torch.channels_last),
    "one dimension": lambda **o: numbers(19, **o),
    "empty": lambda **o: numbers(0, 3, **o),
}


# A part of its output is another function's.
WHOLE = {name: form for name, form in FORMS.items() if name != "in place on a view"}
IN_PLACE = FORMS["in place"], FORMS["in place by argument"]


@pytest.mark.parametrize("form", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(operation, device, form, dtype):
    _, function = form(operation)
    reference = function
    if not operation.torch_has_gradient_in_place and form in IN_PLACE:
        _, reference = FORMS["function"](operation)
    for build in INPUTS.values():
        expected = output_and_gradient(reference, build(device=device, dtype=dtype))
        with relu_ext.installed():
            results = output_and_gradient(function, build(device=device, dtype=dtype))
        assert_all_same(results, expected)
        assert results[0].stride() == expected[0].stride()


@pytest.mark.in_place
@pytest.mark.parametrize("operation", FEW, ids=str)
def test_in_place_on_a_view(operation, device):
    _, function = FORMS["in place on a view"](operation)
    before, while_installed = before_and_installed(lambda: output_and_gradient(function, numbers(5, 7, device=device)))
    assert_all_same(while_installed, before)


@pytest.mark.parametrize("form", WHOLE.values(), ids=WHOLE)
def test_node(operation, device, form):
    _, function = form(operation)
    before, while_installed = before_and_installed(lambda: nodes_of(function(leaf(5, 7, device=device))))
    assert node_installed(operation) in while_installed - before
    assert nodes_of(function(leaf(5, 7, device=device))) == before


CALLS = {
    "torch.relu": torch.relu,
    "torch.relu_": lambda x: torch.relu_(x * 1),
    "Tensor.relu": lambda x: x.relu(),
    "Tensor.relu_": lambda x: (x * 1).relu_(),
    "F.relu": F.relu,
    "nn.ReLU": torch.nn.ReLU(),
    "aten.relu": torch.ops.aten.relu,
    "a parameter": lambda x: torch.relu(torch.nn.Parameter(x)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_every_way_to_call(device, call):
    with relu_ext.installed():
        assert call(leaf(5, 7, device=device)).grad_fn.name() == "ReLUBackward"
    assert call(leaf(5, 7, device=device)).grad_fn.name() == "ReluBackward0"


def test_ways_to_call_prelu(device):
    def run(call, channels):
        input = numbers(4, 3, 5, device=device).nan_to_num(0, 1, -1).requires_grad_()
        weight = torch.linspace(-0.5, 1.5, channels, device=device, requires_grad=True)
        output = call(input, weight)
        grads = torch.autograd.grad(
            output, (input, weight), numbers(4, 3, 5, device=device, seed=1).nan_to_num(0, 1, 2)
        )
        return output, grads

    for call, channels in itertools.product((F.prelu, torch.prelu, lambda x, w: x.prelu(w)), (1, 3)):
        (before, expected), (output, results) = before_and_installed(lambda: run(call, channels))  # noqa: B023
        assert (before.grad_fn.name(), output.grad_fn.name()) == ("PreluKernelBackward0", "PReLUBackward")
        assert_same(output.detach(), before.detach())
        assert_same(results[0], expected[0])
        torch.testing.assert_close(results[1], expected[1])  # a sum in another order


def test_errors_of_prelu():
    for arguments in (
        (numbers(4, 3), torch.ones(2)),
        (numbers(4, 3), torch.ones(3, dtype=torch.float64)),
        (numbers(), torch.ones(3)),
    ):
        before, while_installed = before_and_installed(lambda: error_of(F.prelu, *arguments))  # noqa: B023
        assert before == while_installed


def test_scalars(device):
    """Numbers that are none of the kernels' are torch's, with its errors."""
    scalars = 0.5, 1, True, -1, 2**60, 2**54 + 2**30 + 1, float("inf"), float("nan"), 1e300, 1j, torch.tensor(0.5), None
    functions = [
        F.leaky_relu,
        F.elu,
        F.celu,
        lambda x, s: F.threshold(x, s, 0),
        lambda x, s: F.threshold(x, 0, s),
        lambda x, s: F.hardtanh(x, -1, s),
        lambda x, s: torch.ops.aten.hardtanh(x, s, -1),
        lambda x, s: torch.ops.aten.elu(x, 1.5, s, 1),
        lambda x, s: torch.ops.aten.elu(x, 1.5, 1, s),
    ]
    input = torch.tensor([-2.0, -0.0, 0.5, 3.0], device=device)
    for function, scalar in itertools.product(functions, scalars):
        before, while_installed = before_and_installed(lambda: described(lambda x: function(x, scalar), input))  # noqa: B023
        if len(before) == 2 or function not in (F.elu, F.celu):
            assert while_installed == before
        else:  # exponentials
            assert while_installed[:-1] == before[:-1]


def test_scales_of_elu_that_are_not_selus_are_left_alone():
    with relu_ext.installed():
        nodes = [torch.ops.aten.elu(leaf(9), 1.5, *scales).grad_fn.name() for scales in ((1, 1), (2, 1), (1, 2))]
    assert nodes == ["ELUBackward", "EluBackward0", "EluBackward0"]


def test_operators_with_out_are_torchs(device):
    input, output = numbers(9, device=device), torch.empty(9, device=device)
    with relu_ext.installed():
        assert not any("relu_ext" in name for name in profiled(lambda: torch._C._nn.hardtanh(input, out=output)))
    assert_same(output, F.hardtanh(input))


# What is kept


def test_kept_bytes(device):
    def run():
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda x: x):
            layers = torch.nn.ReLU(), torch.nn.Hardtanh(), torch.nn.LeakyReLU(0.1), torch.nn.ReLU6()
            torch.nn.Sequential(*layers)(leaf(1024, 64, device=device)).mean()
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        return sum(storages.values())

    before, while_installed = before_and_installed(run)
    size = 1024 * 64
    assert before == 3 * 4 * size  # the output of ReLU is the input of Hardtanh
    assert while_installed == 4 * size // 8


def test_output_may_be_changed():
    """The bits do not depend on it, where torch keeps it."""
    with relu_ext.installed():
        input = leaf(9)
        torch.relu(input).mul_(2).sum().backward()
    assert_same(input.grad, torch.where(input <= 0, 0, 2.0))


def test_nothing_is_kept_without_gradients(operation, device):
    with relu_ext.installed():
        for mode in (contextlib.nullcontext, torch.no_grad):
            with mode():
                output, kept = kept_by(operation.definition, numbers(5, 7, device=device))
            assert output.grad_fn is None and not kept
        assert any("relu_ext" in name for name in profiled(operation.definition, numbers(9, device=device)))


def test_inference_mode_is_torchs(operation, device):
    input = numbers(9, device=device)
    expected = operation.definition(input)
    with relu_ext.installed(), torch.inference_mode():
        assert_same(operation.definition(input), expected)
        assert not any("relu_ext" in name for name in profiled(operation.definition, input))


# What is left to torch


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:.*legacy constructor:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts(operation, layout):
    def run():
        input = layout(numbers(4, 6).nan_to_num(0, 1, -1).requires_grad_())
        functions = operation.definition, operation.definition_, operation.torch_module()
        return [outcome(function, input.detach() if i == 1 else input) for i, function in enumerate(functions)]

    before, while_installed = before_and_installed(run)
    assert while_installed == before


OTHER_DTYPES = [torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", OTHER_DTYPES, ids=str)
def test_other_dtypes(operation, device, dtype):
    def run():
        input = torch.tensor([-3, 0, 1, 4], device=device).to(dtype)
        return [described(f, input.clone()) for f in (operation.definition, operation.definition_)]

    before, while_installed = before_and_installed(run)
    assert while_installed == before


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
def test_quantized(operation):
    input = torch.quantize_per_tensor(numbers(4, 6).nan_to_num(0, 1, -1), 0.1, 8, torch.quint8)
    before, while_installed = before_and_installed(lambda: described(operation.definition, input))
    assert while_installed == before


NOT_PLAIN = {
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(3, 7),
    "negated": lambda x: torch.complex(x, x).conj().imag,
    "TwoTensor": lambda x: TwoTensor(x, x * 2),
    "subclass": Wrapper,
    "coo": lambda x: x.to_sparse(),
    "strided nested": lambda x: torch.nested.as_nested_tensor([x, x[1:]]),
    "jagged": lambda x: torch.nested.as_nested_tensor([x, x[1:]], layout=torch.jagged),
    "fake": lambda x: FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x.detach()).requires_grad_(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("build", NOT_PLAIN.values(), ids=NOT_PLAIN)
@pytest.mark.parametrize("operation", FEW, ids=str)
def test_node_is_torchs_for_what_is_not_plain(operation, build):
    def run():
        try:
            return operation.definition(build(leaf(5, 7))).grad_fn.name()
        except Exception as error:
            return type(error), str(error).partition("\n")[0]  # a list of all registrations follows

    before, while_installed = before_and_installed(run)
    assert while_installed == before
    assert run() == before


def test_subclass_sees_what_it_saw(operation):
    def run():
        Wrapper.seen.clear()
        input = Wrapper(leaf(5, 7))
        output = operation.definition(input)
        (grad,) = torch.autograd.grad(output, input, Wrapper(numbers(5, 7, seed=1)))
        return list(Wrapper.seen), [output.inner, grad.inner]

    (their_calls, before), (our_calls, while_installed) = before_and_installed(run)
    assert their_calls == our_calls
    assert_all_same(while_installed, before)


# Transforms, tracers, modes


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # by linearize
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
@pytest.mark.parametrize("operation", FEW, ids=str)
def test_transform(operation, device, transform):
    for form in FORMS.values():
        _, function = form(operation)
        before, while_installed = before_and_installed(
            lambda: tree_leaves(
                transform(function, numbers(5, 7, device=device), numbers(5, 7, device=device, seed=1))  # noqa: B023
            )
        )
        assert_all_same(while_installed, before)


def test_a_transform_never_meets_our_operators(device):
    """vmap has no rule for them; a wrapper of grad hides its keys from the dispatcher."""
    with relu_ext.installed(), Watch() as mode:
        torch.func.vmap(torch.func.grad(lambda row: torch.relu(row).sum()))(numbers(5, 7, device=device))
    assert mode.seen and not any("relu_ext" in str(function) for function in mode.seen)


class Block(torch.nn.Module):
    """What is traced: every activation that torch has, in its module, out of place and in place."""

    def __init__(self):
        super().__init__()
        rows = [row for row in ROWS if row.ulps == 0]
        self.layers = torch.nn.Sequential(
            *(row.torch_module() for row in rows),
            torch.nn.PReLU(),
            *(row.torch_module(inplace=True) for row in rows if row.torch_has_gradient_in_place),
        )

    def forward(self, input):
        for layer in self.layers:
            input = layer(input * 1.5)
        return input


def fixed_numbers():
    return torch.linspace(-3, 3, 35).view(5, 7)


def test_compiled():
    graphs = []

    def keep(graph, _):
        graphs.append(graph.print_readable(print_output=False))
        return make_boxed_func(graph.forward)

    def run():
        torch._dynamo.reset()
        graphs.clear()
        backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
        results = output_and_gradient(torch.compile(Block(), backend=backend, fullgraph=True), fixed_numbers())
        return results, list(graphs)

    expected = output_and_gradient(Block(), fixed_numbers())
    (before, their_graphs), (while_installed, our_graphs) = before_and_installed(run)
    assert our_graphs == their_graphs
    assert "aten.relu.default" in our_graphs[0] and "relu_ext" not in "".join(our_graphs)
    for results in (before, while_installed):
        assert_all_same(results, expected)


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict):
    def run():
        program = torch.export.export(Block(), (fixed_numbers(),), strict=strict)
        return str(program.graph), str(program.run_decompositions().graph), program.module()(fixed_numbers())

    before, while_installed = before_and_installed(run)
    assert while_installed[:2] == before[:2]
    assert_same(while_installed[2].detach(), before[2].detach())


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("pre_dispatch", [False, True])
@pytest.mark.parametrize("operation", FEW, ids=str)
def test_make_fx(operation, mode, pre_dispatch):
    def forward_and_backward(input, grad):
        input = input.detach().requires_grad_()
        output = operation.definition(input)
        return output.detach(), *torch.autograd.grad(output, input, grad)

    def run():
        gradient = make_fx(forward_and_backward, tracing_mode=mode)(numbers(5, 7), numbers(7, 5, seed=1).t())
        forward = make_fx(lambda x: operation.definition(x), tracing_mode=mode, pre_dispatch=pre_dispatch)
        return str(gradient.graph), str(forward(numbers(5, 7)).graph)

    before, while_installed = before_and_installed(run)
    assert while_installed == before


def test_dispatch_mode_sees_ours_where_something_is_kept(device):
    """As of relu_ext.relu: so that what is kept does not depend on modes."""
    input = leaf(5, 7, device=device)
    with relu_ext.installed(), Watch() as mode:
        torch.relu(input)
        with torch.no_grad():
            torch.relu(input)
    assert [str(function) for function in mode.seen] == ["relu_ext.relu_forward.default", "aten.relu.default"]


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("backward_mode", [contextlib.nullcontext, Watch])
def test_checkpoint(operation, device, use_reentrant, backward_mode):
    def run():
        input = leaf(5, 7, device=device)
        output = torch.utils.checkpoint.checkpoint(
            lambda x: operation.definition(operation.definition(x) * 2), input, use_reentrant=use_reentrant
        )
        with backward_mode():
            output.backward(numbers(5, 7, device=device, seed=1))
        return output.detach(), input.grad

    assert_all_same(*before_and_installed(run))


def test_autocast(device):
    def run():
        input, weight = leaf(4, 3, device=device, dtype=torch.bfloat16), torch.ones(3, device=device)
        with torch.autocast(device, torch.bfloat16):
            return [torch.relu(input).detach(), F.prelu(input, weight).detach(), F.elu(input).detach()]

    before, while_installed = before_and_installed(run)
    for ours, theirs in zip(while_installed, before, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.in_place
def test_errors_in_place(operation, device):
    with torch.inference_mode():
        inference = numbers(9, device=device)

    def run():
        expanded, output_of_split = numbers(1, device=device).expand(4), (leaf(4, device=device) * 1).split(2)[0]
        inputs = leaf(4, device=device), output_of_split, inference, expanded
        return [outcome(operation.definition_, input) for input in inputs]

    before, while_installed = before_and_installed(run)
    assert while_installed == before


@pytest.mark.in_place
def test_versions(operation, device):
    with relu_ext.installed():
        for input in (numbers(9, device=device).clone(), leaf(9, device=device) * 1):
            used = input.exp() * input
            operation.definition_(input)
            assert input._version == 1
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            used.sum().backward()


# Other callers in C++


def test_torchscript(device):
    def function(x: torch.Tensor):
        return torch.relu(x * 2) + torch.nn.functional.leaky_relu(x, 0.1)

    def run():
        scripted = torch.jit.script(function)
        results = [output_and_gradient(scripted, fixed_numbers().to(device)) for _ in range(4)]  # optimised by then
        return scripted, list(itertools.chain(*results))

    (_, before), (scripted, while_installed) = before_and_installed(run)
    assert_all_same(while_installed, before)
    with relu_ext.installed():
        assert {"relu_ext::relu", "relu_ext::leaky_relu"} <= profiled(scripted, fixed_numbers().to(device))


def test_torchscript_trace():
    def run():
        return [node.kind() for node in torch.jit.trace(Block(), fixed_numbers()).inlined_graph.nodes()]

    before, while_installed = before_and_installed(run)
    assert while_installed == before and "aten::relu" in before


def test_recurrent_network(device):
    """Its steps are of one operator that calls relu in C++."""

    def run():
        torch.manual_seed(0)
        network = torch.nn.RNN(7, 5, nonlinearity="relu").to(device)
        output, _ = network(torch.linspace(-3, 3, 42, device=device).view(3, 2, 7))
        return output, torch.autograd.grad(output.square().sum(), list(network.parameters()))

    (before, expected), (output, results) = before_and_installed(run)
    if device == "cpu":  # cuDNN has its own
        assert "ReluBackward0" in nodes_of(before) and "ReluBackward0" not in nodes_of(output)
        assert "ReLUBackward" in nodes_of(output)
    assert_all_same([output.detach(), *results], [before.detach(), *expected])


@pytest.mark.parametrize("train", [True, False])
def test_transformer(device, train):
    def run():
        torch.manual_seed(0)
        layer = torch.nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).to(device).train(train)
        input = torch.linspace(-3, 3, 48, device=device).view(2, 3, 8)
        with torch.no_grad():
            fast = layer(input)
        output = layer(input)
        return [fast, output.detach(), *torch.autograd.grad(output.square().sum(), list(layer.parameters()))]

    assert_all_same(*before_and_installed(run))


# Install and uninstall


def tables():
    """What PyTorch's dispatcher has for each operator and key, as text."""
    return {name: torch._C._dispatch_dump_table(name) for name in _C.installable()}


def kernel(name, key):
    (line,) = (line for line in tables()[name].splitlines() if line.startswith(key + ":"))
    return line.removeprefix(key + ":")


@pytest.mark.parametrize("name", _C.installable())
def test_torchs_kernel_stays_beneath(name):
    """Where csrc/install.cpp looks for it."""
    theirs = kernel(name, "AutogradCPU")
    assert kernel(name, "AutogradOther") == kernel(name, "AutogradCUDA") == theirs
    with relu_ext.installed():
        assert kernel(name, "AutogradOther") == theirs
        assert "install.cpp" in kernel(name, "AutogradCPU")
        assert ("install.cpp" in kernel(name, "AutogradCUDA")) == bool(relu_ext.build_info()["cuda"])


def test_twice_is_as_good_as_once():
    before = tables()
    assert not relu_ext.is_installed()
    relu_ext.install()
    relu_ext.install()
    assert relu_ext.is_installed()
    relu_ext.uninstall()
    assert not relu_ext.is_installed() and tables() == before
    relu_ext.uninstall()
    assert tables() == before


def test_context_leaves_what_it_found():
    before = tables()
    with pytest.raises(ZeroDivisionError), relu_ext.installed():
        assert relu_ext.is_installed()
        raise ZeroDivisionError
    assert tables() == before
    relu_ext.install()
    with relu_ext.installed():
        pass
    assert relu_ext.is_installed()
    relu_ext.uninstall()


def test_decorator():
    @relu_ext.installed()
    def run():
        return torch.relu(leaf(9)).grad_fn.name()

    assert run() == run() == "ReLUBackward"


def test_errors_within_an_operator_leave_it_usable():
    with relu_ext.installed():
        for _ in range(2):
            assert error_of(torch.relu, torch.tensor([True]))
            assert torch.relu(leaf(9)).grad_fn.name() == "ReLUBackward"
    assert torch.relu(leaf(9)).grad_fn.name() == "ReluBackward0"


def test_graphs_outlive_it(operation, device):
    """Those of before and of meanwhile go backward whenever."""
    input, grad = leaf(5, 7, device=device), numbers(5, 7, device=device, seed=1)
    before = operation.definition(input)
    relu_ext.install()
    meanwhile = operation.definition(input)
    (expected,) = torch.autograd.grad(before, input, grad)
    relu_ext.uninstall()
    (result,) = torch.autograd.grad(meanwhile, input, grad)
    assert_same(result, expected)


def test_compiled_before_and_after():
    torch._dynamo.reset()
    compiled = torch.compile(Block(), backend="aot_eager", fullgraph=True)
    before, while_installed = before_and_installed(lambda: output_and_gradient(compiled, fixed_numbers()))
    after = output_and_gradient(compiled, fixed_numbers())
    for results in (while_installed, after):
        assert_all_same(results, before)


def test_kernels_of_another_library_are_not_hidden():
    library = torch.library.Library("aten", "IMPL")
    try:
        library.impl("elu", lambda *arguments: arguments[0], "AutogradCPU")
        before = tables()
        with pytest.raises(RuntimeError, match="aten::elu has a kernel for AutogradCPU"):
            relu_ext.install()
        assert not relu_ext.is_installed() and tables() == before
    finally:
        library._destroy()
    with relu_ext.installed():
        assert F.elu(leaf(9)).grad_fn.name() == "ELUBackward"


def test_dispatcher_in_python(operation):
    """It serves tracers, so what is called through it is torch's; and it keeps what an operator has for a key."""

    def run():
        with enable_python_dispatcher():
            output = operation.definition(leaf(9))
        return output.grad_fn.name(), output.detach()

    def resolved():
        operators = (getattr(torch.ops.aten, name.removeprefix("aten::")).default for name in _C.installable())
        return {cache.get(DispatchKey.AutogradCPU) for cache in (operator._dispatch_cache for operator in operators)}

    (name, before), (name_installed, while_installed) = before_and_installed(run)
    assert name == name_installed
    assert_same(while_installed, before)
    assert resolved() == {None}
    run()
    assert DispatchKey.AutogradCPU not in resolved()


def test_relu_ext_itself(operation, device):
    """Its functions go past the operators, and its own operators pass torch's checks."""
    with relu_ext.installed():
        input = leaf(5, 7, device=device)
        assert operation.function(input).grad_fn.name() == operation.node
        if operation.keep:
            arguments = fixed_numbers().to(device).requires_grad_(), operation.scalars
            torch.library.opcheck(getattr(torch.ops.relu_ext, operation.name + "_forward").default, arguments)
        assert_same(operation.function(input[:, ::2]), operation.definition(input[:, ::2]))


def test_relu_squared(device):
    """Its definition calls torch.relu, and so does its gradient's."""
    (row,) = (row for row in REPRESENTATIVE if row.name == "relu_squared")
    dtypes = torch.float32, torch.float16
    inputs = [numbers(5, 7, device=device, dtype=dtype).nan_to_num(0, 1, -1) for dtype in dtypes]

    def run(function, input):
        input = input.detach().requires_grad_()
        (first,) = torch.autograd.grad(function(input).sum(), input, create_graph=True)
        return first.detach(), torch.autograd.grad(first.sum(), input)[0]

    for function, input in itertools.product((row.function, row.definition), inputs):
        assert_all_same(*before_and_installed(lambda: run(function, input)))  # noqa: B023


def test_other_threads_go_on():
    stop, wrong = threading.Event(), []
    expected = torch.relu(numbers(5000))

    def work():
        while not stop.is_set():
            input = leaf(5000)
            output = torch.relu(input)
            output.sum().backward()
            integers = torch.relu(torch.tensor([-1, 2]))
            if not torch.equal(output.nan_to_num(), expected.nan_to_num()) or integers.tolist() != [0, 2]:
                wrong.append(output)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with relu_ext.installed():
            torch.relu(leaf(9))
    stop.set()
    for thread in threads:
        thread.join()
    assert not wrong
