"""convert and revert: what is replaced, what stays, what is left alone; and that PyTorch sees no difference."""

import copy
import io
import pickle
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from operations import assert_same
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import relu_ext
from relu_ext.convert import FUNCTIONS, MODULES

TORCHS = [
    nn.ReLU(),
    nn.ReLU(inplace=True),
    nn.ReLU6(inplace=True),
    nn.LeakyReLU(0.2),
    nn.PReLU(3, init=0.1),
    nn.ELU(1.5),
    nn.CELU(0.5),
    nn.SELU(),
    nn.Hardtanh(-0.3, 0.7),
    nn.Threshold(0.1, -0.7),
]
each_module = pytest.mark.parametrize("module", TORCHS, ids=repr)
FUNCTION_IDS = [torch.overrides.resolve_name(function) for function in FUNCTIONS]
SCALARS = {"threshold": (0.1, -0.7), "threshold_": (0.1, -0.7)}  # of those that have no defaults


class Block(nn.Module):
    """Holds a function, as transformers' and torch's own layers do, and the same module twice."""

    def __init__(self, activation=F.relu):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4))
        self.first = self.second = nn.PReLU()
        self.activation = activation

    def forward(self, input):
        return self.activation(self.inner(input)) + self.first(input) - self.second(-input)


def model():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Dropout(0.5), nn.LeakyReLU(0.2), Block(torch.relu), nn.Tanh())


def train(model, steps=3):
    """Losses and the last gradients."""
    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(8, 4)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, [parameter.grad for parameter in model.parameters()]


def assert_equal_training(ours, theirs):
    (losses, grads), (their_losses, their_grads) = train(ours), train(theirs)
    assert losses == their_losses
    for grad, their_grad in zip(grads, their_grads, strict=True):
        torch.testing.assert_close(grad, their_grad, rtol=1e-6, atol=1e-7)  # sums of PReLU's weight: another order


# What is replaced


def test_families_are_whole():
    """Every module and function of ours that torch has under its name."""
    named = set(relu_ext.__all__)
    assert set(MODULES) == {getattr(nn, name) for name in named if hasattr(nn, name)}
    functions = {getattr(F, name) for name in named if hasattr(F, name)} - {F.threshold, F.threshold_}
    assert functions <= set(FUNCTIONS)
    for theirs, ours in FUNCTIONS.items():
        assert getattr(relu_ext, ours.__name__) is ours and theirs.__name__.lstrip("_") == ours.__name__


@each_module
def test_module(module):
    module = copy.deepcopy(module)
    theirs, before = copy.deepcopy(module), dict(vars(module))
    parameters = list(module.parameters())
    report = relu_ext.convert(module)
    name = type(theirs).__name__
    assert report == {"": (f"torch.nn.{name}", f"relu_ext.{name}")} and report.left_alone == {}
    assert type(module) is getattr(relu_ext, name) and repr(module) == repr(theirs)
    assert all(a is b for a, b in zip(module.parameters(), parameters, strict=True))
    assert {key: vars(module)[key] for key in before} == before
    input = torch.randn(5, 3, 4)
    torch.testing.assert_close(module(input.clone()), theirs(input.clone()), rtol=1e-6, atol=1e-6)
    assert relu_ext.convert(module) == {}
    assert relu_ext.revert(module) == {"": (f"relu_ext.{name}", f"torch.nn.{name}")}
    assert type(module) is type(theirs) and vars(module) == before
    assert relu_ext.revert(module) == {}


@pytest.mark.parametrize("function", FUNCTIONS, ids=FUNCTION_IDS)
def test_function(function):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = function

    holder = Holder()
    report = relu_ext.convert(holder)
    name = function.__name__.lstrip("_")
    assert report == {"act": (torch.overrides.resolve_name(function), f"relu_ext.{name}")}
    assert holder.act is getattr(relu_ext, name)
    scalars = (torch.tensor([0.25]),) if name == "prelu" else SCALARS.get(name, ())
    input = torch.linspace(-2, 2, 9)
    torch.testing.assert_close(holder.act(input.clone(), *scalars), function(input.clone(), *scalars))
    assert relu_ext.convert(holder) == {}
    relu_ext.revert(holder)
    assert holder.act is function


def test_model():
    ours = model()
    theirs, modules, state = copy.deepcopy(ours), list(ours.modules()), ours.state_dict()
    report = relu_ext.convert(ours)
    assert report == {
        "0.activation": ("torch.nn.functional.relu", "relu_ext.relu"),
        "0.inner.1": ("torch.nn.ReLU", "relu_ext.ReLU"),
        "0.first": ("torch.nn.PReLU", "relu_ext.PReLU"),
        "2": ("torch.nn.LeakyReLU", "relu_ext.LeakyReLU"),
        "3.activation": ("torch.relu", "relu_ext.relu"),
        "3.inner.1": ("torch.nn.ReLU", "relu_ext.ReLU"),
        "3.first": ("torch.nn.PReLU", "relu_ext.PReLU"),
    }
    assert all(a is b for a, b in zip(ours.modules(), modules, strict=True)) and ours[0].first is ours[0].second
    assert list(ours.state_dict()) == list(state) and repr(ours) == repr(theirs)
    assert_equal_training(ours, theirs)
    assert relu_ext.revert(ours).keys() == report.keys()
    assert_as_before(ours, theirs)


def assert_as_before(ours, theirs):
    """Of the same classes with the same attributes, in all modules."""
    for a, b in zip(ours.modules(), theirs.modules(), strict=True):
        assert type(a) is type(b) and vars(a).keys() == vars(b).keys()
        assert getattr(a, "activation", None) is getattr(b, "activation", None)


def test_report_prints():
    class Mine(nn.ReLU):
        pass

    text = str(relu_ext.convert(nn.Sequential(nn.ReLU(), Mine())))
    assert text.startswith("1 replaced, 1 left alone")
    assert "0  torch.nn.ReLU -> relu_ext.ReLU" in text and "Mine is a subclass" in text


# What is kept


def test_flags_hooks_and_holders():
    relu, seen = nn.ReLU(), []
    relu.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    relu.register_forward_hook(lambda module, inputs, output: seen.append("after"))
    relu.register_full_backward_hook(lambda module, grads, outputs: seen.append("backward"))
    relu.register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.append("state"))
    network = nn.Sequential(nn.Linear(2, 2), relu, nn.Linear(2, 2)).eval()
    relu_ext.convert(network)
    assert network[1] is relu and not relu.training
    network(torch.randn(3, 2)).sum().backward()
    network.state_dict()
    assert seen == ["before", "after", "backward", "state"]


def test_parameters_stay_the_optimizers():
    network = nn.Sequential(nn.PReLU(4), nn.Linear(4, 1))
    weight = network[0].weight.requires_grad_(False)
    optimizer = torch.optim.SGD(network.parameters(), 1.0)
    relu_ext.convert(network)
    assert network[0].weight is weight is optimizer.param_groups[0]["params"][0] and not weight.requires_grad


def test_old_style_weight_norm_is_kept():
    network, input = nn.Sequential(nn.utils.weight_norm(nn.PReLU(4), dim=0)), torch.randn(3, 4)
    expected = network(input)
    assert relu_ext.convert(network).keys() == {"0"}
    assert list(network.state_dict()) == ["0.weight_g", "0.weight_v"]
    assert_same(network(input), expected)


# What is left alone


class Shifted(nn.ReLU):
    def forward(self, input):
        return super().forward(input - 1)


def parametrized():
    module = nn.PReLU(4)
    parametrizations.weight_norm(module)
    return module


def patched():
    module = nn.ReLU()
    module.forward = lambda input: input
    return module


def quantised():
    module = nn.ReLU()
    module.qconfig = torch.ao.quantization.default_qconfig
    return module


@pytest.mark.parametrize(
    "build, reason",
    [
        (Shifted, "Shifted is a subclass"),
        (parametrized, "ParametrizedPReLU is a subclass"),
        (patched, "forward of its own"),
        (quantised, "qconfig"),
        (lambda: torch.jit.script(nn.ReLU()), "compiled by TorchScript"),
    ],
    ids=["subclass", "parametrized", "own forward", "qconfig", "TorchScript"],
)
def test_left_alone(build, reason):
    network = nn.Sequential(build(), nn.ReLU())
    kind = type(network[0])
    report = relu_ext.convert(network)
    assert report.keys() == {"1"} and report.left_alone.keys() == {"0"} and reason in report.left_alone["0"]
    assert type(network[0]) is kind


@pytest.mark.parametrize("module", [nn.RReLU(), nn.Hardswish(), nn.GELU(), nn.Linear(2, 2), relu_ext.ReLU()], ids=repr)
def test_none_of_the_family(module):
    kind = type(module)
    report = relu_ext.convert(module)
    assert report == {} and report.left_alone == {} and type(module) is kind
    assert relu_ext.revert(module) == {} and type(module) is kind


def test_unregistered_modules_are_not_the_models():
    """A list hides its modules from everything that walks a model, sometimes on purpose: a teacher, the parent."""
    network, teacher = nn.Sequential(nn.ReLU()), nn.ReLU()
    network.teacher = [teacher]
    relu_ext.convert(network)
    assert type(teacher) is nn.ReLU


# Reverting


@pytest.mark.parametrize("by", ["deepcopy", "pickle", "torch.save"])
def test_copies_of_a_converted_model(by):
    ours, theirs = model(), model()
    relu_ext.convert(ours)
    if by == "deepcopy":
        other = copy.deepcopy(ours)
    elif by == "pickle":
        other = pickle.loads(pickle.dumps(ours))
    else:
        torch.save(ours, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert type(other[2]) is relu_ext.LeakyReLU and other[0].activation is relu_ext.relu
    assert_equal_training(other, copy.deepcopy(theirs))
    relu_ext.revert(other)
    assert_as_before(other, theirs)
    assert type(ours[2]) is relu_ext.LeakyReLU
    relu_ext.revert(ours)
    assert_as_before(ours, theirs)


def test_shallow_copies_do_not_share_what_is_remembered():
    module = nn.ReLU()
    relu_ext.convert(module)
    other = copy.copy(module)
    module.activation, other.activation = F.relu, relu_ext.relu
    relu_ext.convert(module)
    relu_ext.revert(module)
    assert type(other) is relu_ext.ReLU and module.activation is F.relu
    assert relu_ext.revert(other) and type(other) is nn.ReLU and other.activation is relu_ext.relu


def test_state_dict_goes_both_ways():
    ours, theirs = model(), model()
    relu_ext.convert(ours)
    train(ours)
    theirs.load_state_dict(ours.state_dict())
    relu_ext.revert(ours)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same(a, b)


def test_what_was_ours_before_stays_ours():
    network = nn.Sequential(relu_ext.ReLU(), nn.ReLU())
    network.activation = relu_ext.relu
    relu_ext.convert(network)
    relu_ext.revert(network)
    assert type(network[0]) is relu_ext.ReLU and type(network[1]) is nn.ReLU and network.activation is relu_ext.relu


def test_what_was_changed_since_stays():
    block = Block()
    relu_ext.convert(block)
    block.activation = F.gelu
    block.inner[1] = nn.GELU()
    relu_ext.revert(block)
    assert block.activation is F.gelu and type(block.inner[1]) is nn.GELU and type(block.first) is nn.PReLU


def test_parametrized_since():
    network = nn.Sequential(nn.PReLU(4))
    relu_ext.convert(network)
    parametrizations.weight_norm(network[0])
    report = relu_ext.revert(network)
    assert report == {} and "ParametrizedPReLU" in report.left_alone["0"]
    parametrize.remove_parametrizations(network[0], "weight")
    assert type(network[0]) is relu_ext.PReLU
    assert relu_ext.revert(network).keys() == {"0"} and type(network[0]) is nn.PReLU


# Other people's modules


@pytest.fixture
def transformers(monkeypatch):
    """Its module of activations, with the one class; as it stands there."""
    module = types.ModuleType("transformers.activations")

    class ReLUSquaredActivation(nn.Module):
        def forward(self, input):
            relu_applied = F.relu(input)
            squared = torch.square(relu_applied)
            return squared

    ReLUSquaredActivation.__module__, ReLUSquaredActivation.__qualname__ = module.__name__, "ReLUSquaredActivation"
    module.ReLUSquaredActivation = ReLUSquaredActivation
    monkeypatch.setitem(sys.modules, "transformers.activations", module)
    return module


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_relu_squared(transformers, autocast):
    theirs = transformers.ReLUSquaredActivation()
    ours = copy.deepcopy(theirs)
    report = relu_ext.convert(ours)
    before = "transformers.activations.ReLUSquaredActivation"
    assert report == {"": (before, "relu_ext.ReLUSquaredActivation")}
    assert isinstance(ours, relu_ext.ReLUSquared)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        values, grad = torch.randn(999).to(dtype) * 3, torch.randn(999)
        grads = []
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            for module in (ours, theirs):
                input = values.clone().requires_grad_()
                output = module(input)
                grads += [output.detach(), *torch.autograd.grad(output, input, grad.to(output.dtype))]
        assert_same(grads[0], grads[2])
        assert_same(grads[1], grads[3])
    relu_ext.revert(pickle.loads(pickle.dumps(ours)))
    relu_ext.revert(ours)
    assert type(ours) is type(theirs)


@pytest.mark.parametrize("training", [True, False])
def test_transformer_layers(training):
    """They look at the activation themselves, for a fast path and when they are unpickled."""
    torch.manual_seed(0)
    theirs = nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True).train(training)
    ours = copy.deepcopy(theirs)
    report = relu_ext.convert(ours)
    assert report.keys() == {"encoder.layers.0.activation", "decoder.layers.0.activation"}
    assert ours.encoder.layers[0].activation_relu_or_gelu == 1
    source, target = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
    for other in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert other.decoder.layers[0].activation is relu_ext.relu
        with torch.set_grad_enabled(training):
            assert_same(other(source, target), theirs(source, target))
    relu_ext.revert(ours)
    assert ours.encoder.layers[0].activation is F.relu


# PyTorch over converted models


def test_data_parallel_replica():
    network = nn.Sequential(nn.ReLU(), nn.PReLU())
    relu_ext.convert(network)
    replica = network[0]._replicate_for_data_parallel()
    assert type(replica) is relu_ext.ReLU
    relu_ext.revert(network)
    assert relu_ext.revert(replica) and type(replica) is nn.ReLU


def test_apply_indexing_and_slices():
    network, seen = model(), []
    relu_ext.convert(network)
    network.apply(lambda module: seen.append(type(module)))
    assert seen.count(relu_ext.ReLU) == 2
    assert isinstance(network[2], relu_ext.LeakyReLU) and isinstance(network[1:3][1], nn.LeakyReLU)


@pytest.mark.parametrize("order", ["convert, compile", "compile, convert", "revert while compiled"])
def test_compile(order):
    torch._dynamo.reset()
    ours, theirs = model().eval(), model().eval()
    input = torch.randn(8, 4)
    expected = theirs(input)
    if order == "convert, compile":
        relu_ext.convert(ours)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert_same(compiled(input), expected)
    if order == "compile, convert":
        relu_ext.convert(compiled)
        assert type(ours[2]) is relu_ext.LeakyReLU
    elif order == "revert while compiled":
        relu_ext.convert(ours)
        assert_same(compiled(input), expected)
        relu_ext.revert(compiled)
    assert_same(compiled(input), expected)


def test_torchscript():
    ours, theirs = Block().eval(), None
    theirs = copy.deepcopy(ours)
    relu_ext.convert(ours)
    input = torch.randn(8, 4)
    assert_same(torch.jit.script(ours)(input), theirs(input))
    assert_same(torch.jit.trace(ours, input)(input), theirs(input))


def test_symbolic_trace_and_graph_modules():
    ours = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.PReLU())
    graph = torch.fx.symbolic_trace(ours)
    input = torch.randn(8, 4)
    expected = ours(input)
    assert relu_ext.convert(graph).keys() == {"1", "2"}
    assert_same(graph(input), expected)
    assert_same(torch.fx.symbolic_trace(graph)(input), expected)
