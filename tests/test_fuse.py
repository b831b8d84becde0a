"""fuse: what becomes one call, what is left alone and why; that the model stays what it was in all other ways."""

import copy
import io
import pickle
import random

import pytest
import torch
import torch.nn.functional as F
from operations import assert_same, kept_by
from torch import nn
from torch.nn.utils import parametrizations

import relu_ext


def block(forward, **children):
    """A module with these children and attributes, and ``forward(self, ...)``."""
    module = type("Block", (nn.Module,), {"forward": forward, "__module__": __name__})()
    for name, child in children.items():
        setattr(module, name, child)
    return module


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    def __init__(self, channels, out, norm=nn.BatchNorm2d):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=False)
        self.bn1 = norm(out)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.bn2 = norm(out)
        self.downsample = None if channels == out else nn.Sequential(nn.Conv2d(channels, out, 1), norm(out))

    def forward(self, x):
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ConvLayer(nn.Module):
    """As transformers writes ResNet: layers of layers, the last without an activation."""

    def __init__(self, channels, activation):
        super().__init__()
        self.convolution = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.normalization = nn.BatchNorm2d(channels)
        self.activation = activation

    def forward(self, input):
        return self.activation(self.normalization(self.convolution(input)))


class BasicLayer(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.shortcut = nn.Identity()
        self.layer = nn.Sequential(ConvLayer(channels, nn.ReLU()), ConvLayer(channels, nn.Identity()))
        self.activation = nn.ReLU()

    def forward(self, hidden_state):
        residual = hidden_state
        hidden_state = self.layer(hidden_state)
        residual = self.shortcut(residual)
        hidden_state += residual
        return self.activation(hidden_state)


class DenseActDense(nn.Module):
    """T5's, whose question of a dtype cannot be traced."""

    def __init__(self, dropout=0.25):
        super().__init__()
        self.wi = nn.Linear(16, 64, bias=False)
        self.wo = nn.Linear(64, 16, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.act = nn.ReLU()

    def forward(self, hidden_states):
        hidden_states = self.wi(hidden_states)
        hidden_states = self.act(hidden_states)
        hidden_states = self.dropout(hidden_states)
        if hidden_states.dtype != self.wo.weight.dtype and self.wo.weight.dtype != torch.int8:
            hidden_states = hidden_states.to(self.wo.weight.dtype)
        return self.wo(hidden_states)


class FrozenBatchNorm2d(nn.Module):
    """torchvision's formula, with the buffers' names that all have; transformers' has no attribute ``eps``."""

    def __init__(self, features, eps=1e-5, has_eps=True):
        super().__init__()
        self.constant = eps
        if has_eps:
            self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(features) + 0.5)

    def forward(self, x):
        weight, bias, mean, variance = (
            getattr(self, name).reshape(1, -1, 1, 1) for name in ("weight", "bias", "running_mean", "running_var")
        )
        scale = weight * (variance + self.constant).rsqrt()
        return x * scale + (bias - mean * scale)


class Wrong(FrozenBatchNorm2d):
    def forward(self, x):
        return super().forward(x) + x.square()


def images(channels=4, **keywords):
    return torch.randn(2, channels, 6, 6, **keywords)


def settle(model, *inputs):
    """Running statistics that are not the defaults, and no eps is nothing beside them."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.uniform_(module.bias, -1, 1)
    return model


def results(model, *inputs):
    """Output, and gradients of inputs and parameters."""
    torch.manual_seed(3)
    inputs = [input.clone().requires_grad_() for input in inputs]
    output = model(*(input * 1 for input in inputs))  # no leaves: a block may change them
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(4)).to(output)
    return output, *torch.autograd.grad(output, [*inputs, *model.parameters()], grad, allow_unused=True)


def assert_results(ours, theirs, *inputs, exact=True):
    for a, b in zip(results(ours, *inputs), results(theirs, *inputs), strict=True):
        if a is None or b is None:
            assert a is b
        elif exact:
            assert_same(a, b)
        else:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


# What is fused

conv, norm, linear = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(6, 6)


def add_then_relu(self, x, y):
    return F.relu(x + y)


def torch_add(self, x, y):
    return torch.relu(torch.add(x, y)) * 2


def methods(self, x, y):
    return x.add(y).relu()


def in_place(self, x, y):
    out = self.conv(x)
    out += y
    return out.relu_()


def method_in_place(self, x, y):
    return self.relu(self.conv(x).add_(y))


def sum_with_itself(self, x, y):
    z = x * y
    return self.relu(z + z)


def norm_first(self, x, y):
    return self.relu(self.norm(self.conv(x)) + y)


def norm_second(self, x, y):
    return self.relu(y + self.norm(self.conv(x)))


def norm_twice(self, x, y):
    z = self.norm(self.conv(x))
    return self.relu(z + z)


def norm_of_an_argument(self, x, y):
    return self.relu(self.norm(x) + y)


def norm_then_relu(self, x, y):
    return F.relu(self.norm(x), inplace=True) + y


def linear_then_relu(self, x, y):
    return self.relu(self.linear(x)) + y


ADD, NORM, LINEAR = "relu_ext.add_relu", "relu_ext.fma_relu, in eval mode", "relu_ext.linear_relu"
PATTERNS = [
    (add_then_relu, "add, relu", ADD),
    (torch_add, "add, relu", ADD),
    (methods, "add, relu", ADD),
    (in_place, "iadd, relu_", ADD),
    (method_in_place, "add_, relu", ADD),
    (sum_with_itself, "add, relu", ADD),
    (norm_first, "norm, add, relu", NORM),
    (norm_second, "norm, add, relu", NORM),
    (norm_twice, "add, relu", ADD),
    (norm_of_an_argument, "add, relu", ADD),  # the norm's input is the caller's: it might change before the sum
    (norm_then_relu, "norm, relu", NORM),
    (linear_then_relu, "linear, relu", LINEAR),
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("forward, before, after", PATTERNS, ids=[forward.__name__ for forward, *_ in PATTERNS])
def test_pattern(forward, before, after, training):
    torch.manual_seed(0)
    ours = settle(block(forward, conv=conv, norm=norm, linear=linear, relu=nn.ReLU(inplace=True)))
    ours.train(training)
    theirs = copy.deepcopy(ours)
    report = relu_ext.fuse(ours)
    assert list(report.values()) == [(before, after)] and report.left_alone == {}
    exact = after == ADD or (training and after == NORM)  # the linear layer's bias has its sums in another order
    assert_results(ours, theirs, images(), images(), exact=exact)
    for a, b in zip(ours.buffers(), theirs.buffers(), strict=True):
        assert_same(a, b)


def test_the_kernels_are_used():
    """Where the sum of a residual was kept by nobody else, bits are."""
    ours = block(add_then_relu)
    relu_ext.fuse(ours)
    x, y = (images().requires_grad_() for _ in range(2))
    output, kept = kept_by(ours, x, y)
    assert [tensor.dtype for tensor in kept] == [torch.uint8]
    assert output.grad_fn.name() == relu_ext.add_relu(x, y).grad_fn.name()


@pytest.mark.parametrize("kind", ["module", "function"])
def test_dropout(kind):
    def modules(self, x):
        return self.dropout(self.relu(x * 1))

    def functions(self, x):
        return F.dropout(self.relu(x * 1), 0.25, self.training)

    children = {"dropout": nn.Dropout(0.25)} if kind == "module" else {}
    ours = block(modules if kind == "module" else functions, relu=nn.ReLU(), **children)
    theirs = copy.deepcopy(ours)
    dropout = "dropout"
    assert relu_ext.fuse(ours) == {"relu": (f"relu, {dropout}", "relu_ext.relu_dropout")}
    assert_results(ours.eval(), theirs.eval(), images())
    input = torch.randn(100_000)
    output = ours.train()(input)
    torch.manual_seed(5)
    expected = relu_ext.relu_dropout(input, 0.25)
    torch.manual_seed(5)
    assert_same(ours(input), expected)
    kept = output != 0
    torch.testing.assert_close(output[kept], input[kept] / 0.75)
    assert (kept.sum() / (input > 0).sum() - 0.75).abs() < 0.01  # 5 standard deviations
    assert_results(ours.eval(), theirs.eval(), images())


@pytest.mark.parametrize("build", ["source", "graph", "function"])
def test_a_relu_in_place_before_dropout(build):
    """It changes what others see; not in the middle of a chain."""

    def from_source(self, x):
        y = x * 1
        return self.dropout(self.relu(y)) + y

    def from_graph(self, x):
        y = x * 1
        z = self.relu(y)
        return self.dropout(z) + y

    def function(self, x):
        y = x * 1
        return F.dropout(torch.relu_(y), 0.5, True) * 0 + y

    forward = {"source": from_source, "graph": from_graph, "function": function}[build]
    ours = block(forward, relu=nn.ReLU(inplace=True), dropout=nn.Dropout()).eval()
    theirs = copy.deepcopy(ours)
    report = relu_ext.fuse(ours)
    assert build == "source" or "changes in place" in str(report)
    assert_same(ours(x := images()), theirs(x))
    chain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Dropout())
    assert relu_ext.fuse(chain).keys() == {"1"}
    assert kept_by(chain, x)[1][-1].dtype == torch.uint8


def test_dropout_has_the_first_claim():
    """It saves most: linear, ReLU and dropout are not fused with the linear layer."""
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Dropout(), nn.Linear(4, 4))
    assert relu_ext.fuse(model) == {"1": ("1, 2", "relu_ext.relu_dropout")}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm(norm, affine):
    dims = {nn.BatchNorm1d: 0, nn.BatchNorm2d: 2, nn.BatchNorm3d: 3}[norm]
    ours = settle(nn.Sequential(norm(4, affine=affine), nn.ReLU())).eval()
    theirs = copy.deepcopy(ours)
    assert relu_ext.fuse(ours).keys() == {"1"}
    assert_results(ours, theirs, torch.randn(3, 4, *[5] * dims), exact=False)
    ours[0].eps = theirs[0].eps = 0.5
    assert_results(ours, theirs, torch.randn(3, 4, *[5] * dims), exact=False)


@pytest.mark.parametrize("with_residual", [False, True])
def test_batch_norm_is_as_near_to_the_truth_as_torchs(with_residual):
    """Largest errors against float64, of outputs and gradients. They are those of the scale and the shift, which both
    round once or twice: so one is not a unit in the last place of the largest number worse than the other."""
    torch.manual_seed(0)
    forward = norm_first if with_residual else norm_then_relu
    ours = settle(block(forward, conv=nn.Identity(), norm=nn.BatchNorm2d(16), relu=nn.ReLU())).eval()
    ours.conv = nn.Conv2d(16, 16, 1)
    theirs, truth = copy.deepcopy(ours), copy.deepcopy(ours).double()
    assert NORM in str(relu_ext.fuse(ours))
    inputs = torch.randn(8, 16, 20, 20), torch.randn(8, 16, 20, 20)
    exact = results(truth, *(input.double() for input in inputs))
    for a, b, true in zip(results(ours, *inputs), results(theirs, *inputs), exact, strict=True):
        if true is None:
            assert a is b is None
            continue
        unit = torch.finfo(torch.float32).eps * true.abs().max()
        assert (a - true).abs().max() <= (b - true).abs().max() + unit


@pytest.mark.skipif(relu_ext.build_info()["isa"] == "portable", reason="no fused multiply-adds, which torch's has")
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_batch_norm_has_torchs_outputs(affine, memory_format):
    """Bit for bit: one multiply-add an element, of a scale and a shift that are made with as many roundings."""
    torch.manual_seed(0)
    ours = settle(nn.Sequential(nn.BatchNorm2d(33, affine=affine), nn.ReLU())).eval()
    theirs = copy.deepcopy(ours)
    assert NORM in str(relu_ext.fuse(ours))
    input = torch.randn(8, 33, 20, 20).contiguous(memory_format=memory_format)
    assert torch.equal(ours(input), theirs(input))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_batch_norm_of_16_bits_is_left_to_torch(dtype):
    """Also with statistics in float32."""
    ours = settle(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU())).eval()
    for model in (ours, copy.deepcopy(ours).to(dtype)):
        theirs = copy.deepcopy(model)
        relu_ext.fuse(model)
        assert_results(model, theirs, images(dtype=dtype))


@pytest.mark.parametrize("shape", [(4, 6, 6), (2, 1, 6, 6), (2, 3, 6, 6), (2, 4)])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d], ids=["BatchNorm2d", "frozen"])
def test_inputs_that_are_no_images(norm, shape):
    """The same outputs or errors as before."""
    theirs = nn.Sequential(norm(4), nn.ReLU()).eval()
    ours = copy.deepcopy(theirs)
    assert relu_ext.fuse(ours).keys() == {"1"}
    input = torch.randn(shape)
    try:
        expected = theirs(input)
    except Exception as error:
        with pytest.raises(type(error)) as raised:
            ours(input)
        assert str(raised.value) == str(error)
    else:
        assert_same(ours(input), expected)


def test_a_norm_that_is_called_twice_keeps_its_order():
    def forward(self, x):
        first = self.norm(self.conv(x))
        second = self.norm(self.conv(x * 3))
        return self.relu(first + second)

    theirs = settle(block(forward, conv=conv, norm=nn.BatchNorm2d(4), relu=nn.ReLU()))
    ours = copy.deepcopy(theirs)
    assert list(relu_ext.fuse(ours).values()) == [("add, relu", ADD)]
    assert_results(ours, theirs, images())
    assert_same(ours.norm.running_mean, theirs.norm.running_mean)


@pytest.mark.parametrize("has_eps", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_frozen_batch_norm(dtype, has_eps, eps):
    """The same numbers; in 16 bits, rounded once instead of after each step, they are as near to the truth."""
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(4, eps, has_eps)
    norm.running_var.fill_(1e-3)
    ours = block(norm_first, conv=nn.Conv2d(4, 4, 1), norm=norm, relu=nn.ReLU()).to(dtype)
    theirs, truth = copy.deepcopy(ours), copy.deepcopy(ours).double()
    assert relu_ext.fuse(ours) == {"relu": ("norm, add, relu", "relu_ext.scale_shift_relu")}
    inputs = images(dtype=dtype), images(dtype=dtype)
    output, expected = ours(*inputs), theirs(*inputs)
    assert "ScaleShift" in output.grad_fn.name() or "scale_shift" in output.grad_fn.name().lower()
    true = truth(*(input.double() for input in inputs))
    if dtype != torch.bfloat16:
        assert_results(ours, theirs, *inputs)
    # the products before are torch's in both: their rounding is part of both errors
    unit = torch.finfo(dtype).eps * true.abs().max()
    assert (output - true).abs().max() <= (expected - true).abs().max() + unit


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, FrozenBatchNorm2d], ids=["BatchNorm2d", "frozen"])
@pytest.mark.parametrize("channels", [4, 6])
def test_basic_block(norm, channels):
    torch.manual_seed(0)
    theirs = settle(nn.Sequential(BasicBlock(channels, 4, norm), BasicBlock(4, 4, norm)))
    ours = copy.deepcopy(theirs)
    report = relu_ext.fuse(ours)
    after = NORM if norm is nn.BatchNorm2d else "relu_ext.scale_shift_relu"
    assert report == {
        f"{i}.{place}": (before, after)
        for i in range(2)
        for place, before in (("relu", "bn1, relu"), ("relu (2)", "bn2, iadd, relu (2)"))
    }
    for training in (False, True, False):
        exact = training or norm is not nn.BatchNorm2d
        assert_results(ours.train(training), theirs.train(training), images(channels), exact=exact)
    assert_results(ours.double(), theirs.double(), images(channels).double(), exact=False)


def test_layers_of_layers():
    """A sum in place of what a child returns, which is shown to be new memory."""
    theirs = settle(BasicLayer(4))
    ours = copy.deepcopy(theirs)
    assert relu_ext.fuse(ours) == {
        "activation": ("iadd, activation", ADD),
        "layer.0.activation": ("normalization, activation", NORM),
    }
    for training in (True, False):
        assert_results(ours.train(training), theirs.train(training), images(), exact=training)


# What is left alone


class Subclass(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input) * 2


def sum_is_used(self, x, y):
    z = x + y
    return F.relu(z) + z


def alpha(self, x, y):
    return F.relu(torch.add(x, y, alpha=2))


def scalar(self, x, y):
    return F.relu(x + 1) + y


def callers_memory(self, x, y):
    x += y
    return F.relu(x)


def memory_of_another(self, x, y):
    z = self.conv(x)
    w = z.sum()
    z += y
    return F.relu(z) + w


def norm_is_used(self, x, y):
    z = self.norm(x)
    return self.relu(z) + z


def linear_is_used(self, x, y):
    z = self.linear(x)
    return self.relu(z) + z


LEFT = [
    (sum_is_used, {}, "add is used elsewhere"),
    (alpha, {}, "add does not add two tensors"),
    (scalar, {}, "add does not add two tensors"),
    (callers_memory, {}, "iadd changes in place"),
    (memory_of_another, {}, "iadd changes in place"),
    (norm_is_used, {}, "norm is used elsewhere"),
    (linear_is_used, {}, "linear is used elsewhere"),
    (norm_then_relu, {"norm": Subclass(4)}, "Subclass may compute something else"),
    (norm_then_relu, {"norm": nn.SyncBatchNorm(4)}, "SyncBatchNorm may compute something else"),
    (norm_then_relu, {"norm": nn.BatchNorm2d(4, track_running_stats=False)}, "no running statistics"),
    (norm_then_relu, {"norm": Wrong(4)}, "Wrong is not the formula"),
]


@pytest.mark.parametrize("forward, children, reason", LEFT, ids=[reason for *_, reason in LEFT])
def test_left_alone(forward, children, reason):
    children = {"conv": conv, "norm": norm, "linear": linear, "relu": nn.ReLU(), **children}
    ours = block(forward, **children).eval()
    theirs, kind = copy.deepcopy(ours), type(ours)
    report = relu_ext.fuse(ours)
    assert report == {} and [reason in text for text in report.left_alone.values()] == [True]
    assert type(ours) is kind
    if not isinstance(ours.norm, nn.SyncBatchNorm):
        assert_results(ours, theirs, images(), images())


def depends_on_values(self, x):
    return self.relu(x + x) if x.sum() > 0 else x


def looks_at_a_type(self, x):
    z = self.child(x)
    return self.relu(z + x) if isinstance(z, torch.Tensor) else z


def sets_attributes(self, x):
    self.seen = 1
    return self.relu(x + x)


def keeps_a_list(self, x):
    self.features.append(x)
    return self.relu(x + x)


def draws(self, x):
    return self.relu(x + x) if random.random() < 0.5 else x


def draws_by_torch(self, x):
    return self.relu(x + x) if torch.rand(()) < 0.5 else x


def makes_a_tensor(self, x):
    return self.relu(x + torch.ones(6))


def any_arguments(self, *inputs):
    return self.relu(inputs[0] + inputs[1])


@pytest.mark.parametrize(
    "forward, reason",
    [
        (depends_on_values, "cannot trace"),
        (looks_at_a_type, "looks at the type"),
        (sets_attributes, "sets attributes"),
        (keeps_a_list, "self.features, which may change"),
        (draws, "draws random numbers"),
        (draws_by_torch, "draws random numbers"),
        (makes_a_tensor, "sets attributes"),
        (any_arguments, "no fixed arguments"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_forward_that_is_no_graph(forward, reason):
    model = nn.Sequential(block(forward, relu=nn.ReLU(), child=nn.Identity()))
    model[0].features = []
    kind, attributes = type(model[0]), dict(vars(model[0]))
    report = relu_ext.fuse(model)
    assert report == {} and reason in report.left_alone["0"]
    assert type(model[0]) is kind and vars(model[0]) == attributes


def names_a_child(name):
    return lambda self, x, y: self.by_name[name](self.relu(x + y))


def names_an_attribute(name):
    return lambda self, x, y: self.relu(x + y) if getattr(self, name) else x


def names_a_method(name):
    return lambda self, x, y: getattr(self.relu(x + y), name)()


def names_an_argument(name):
    return lambda self, x, y: self.relu(x + y).sum(**{name: 0})


def block_with_a_name(forward_of, name):
    by_name = nn.ModuleDict({name: nn.Identity()})
    return nn.Sequential(block(forward_of(name), relu=nn.ReLU(), by_name=by_name, **{name: True}))


@pytest.mark.parametrize(
    "forward_of, name",
    [
        (names_a_child, 'a"), print(1), ("'),
        (names_a_child, 'a"'),
        (names_a_child, "a\\"),
        (names_a_child, "a\n"),
        (names_a_child, "class"),
        (names_an_attribute, "relu or print(1)"),
        (names_an_attribute, "class"),
        (names_a_method, 'a"), print(1), ("'),
        (names_a_method, "class"),
        (names_an_argument, "dim=print(1), a"),
        (names_an_argument, "class"),
    ],
)
def test_names_are_no_code(forward_of, name):
    """They may come from a file of labels, and torch.fx writes them into its text as they are."""
    model = block_with_a_name(forward_of, name)
    kind = type(model[0])
    report = relu_ext.fuse(model)
    assert report == {} and "cannot be written as Python" in report.left_alone["0"]
    assert type(model[0]) is kind


@pytest.mark.parametrize("name", ["0", "a b", "a-b", "a'", "in_", "ä", "a(b)"])
def test_names_between_quotes(name):
    ours = block_with_a_name(names_a_child, name)
    theirs = copy.deepcopy(ours)
    assert list(relu_ext.fuse(ours)) == ["0.relu"]
    assert_results(ours[0], theirs[0], images(), images())


def test_nothing_to_fuse():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.MaxPool2d(2), nn.LSTM(2, 2))
    report = relu_ext.fuse(model)
    assert report == {} and report.left_alone == {} and type(model) is nn.Sequential


# A trace sees one path: others are the forward's own


def test_attributes_are_looked_at_in_each_call():
    def forward(self, x, y):
        return self.activation(x + y) if self.adds else self.activation(x)

    ours = block(forward, adds=True, activation=F.relu)
    assert len(relu_ext.fuse(ours)) == 1
    x, y = images(), images()
    assert_same(ours(x, y), F.relu(x + y))
    ours.adds = False
    assert_same(ours(x, y), F.relu(x))
    ours.adds, ours.activation = True, F.gelu
    assert_same(ours(x, y), F.gelu(x + y))


def test_arguments_are_looked_at_in_each_call():
    def forward(self, x, y, z=None):
        if isinstance(x, list):
            x = torch.cat(x)
        return F.relu(x + y) if z is None else F.relu(x + y) * z

    ours = block(forward)
    assert len(relu_ext.fuse(ours)) == 1
    x, y = images(), images()
    expected = F.relu(x + y)
    for output in (ours(x, y), ours(x, y=y), ours([x], y), ours(x, y, None)):
        assert_same(output, expected)
    assert_same(ours(x, y, 2), expected * 2)
    assert_same(ours(x, y, z=2), expected * 2)
    assert_same(ours(x, 1.5), F.relu(x + 1.5))


def test_none_is_an_argument():
    def forward(self, x, y):
        return F.relu(x if y is None else x + y)

    ours = block(forward)
    relu_ext.fuse(ours)
    assert_same(ours(x := images(), None), F.relu(x))


@pytest.mark.parametrize(
    "y", [images(dtype=torch.float64), images()[0], images().to(torch.float16)], ids=["float64", "broadcast", "float16"]
)
@pytest.mark.parametrize("forward", [add_then_relu, in_place])
def test_sums_of_unequal_tensors(forward, y):
    """Broadcast or promoted as torch does it; a sum in place keeps its dtype."""
    ours = block(forward, conv=conv)
    theirs = copy.deepcopy(ours)
    relu_ext.fuse(ours)
    x = images()
    assert ours(x, y).dtype == theirs(x, y).dtype
    assert_same(ours(x, y), theirs(x, y))


def test_a_changed_sequential():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    relu_ext.fuse(model)
    x = torch.randn(2, 4)
    assert type(model[:2]) is nn.Sequential
    assert_same(model[:2](x), F.relu(model[0](x)))
    expected = model(x)
    model.append(nn.Tanh())
    assert_same(model(x), expected.tanh())
    del model[1]
    assert_same(model(x), model[1](model[0](x)).tanh())


def test_modules_replaced_since():
    model = settle(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU())).eval()
    relu_ext.fuse(model)
    model[0], model[1] = nn.Linear(4, 4, bias=False), nn.GELU()
    model[2] = nn.LayerNorm(4)
    x = torch.randn(2, 4)
    assert_same(model(x), F.relu(model[2](F.gelu(model[0](x)))))


def test_hooks_registered_before_and_after():
    model, seen = settle(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.BatchNorm1d(4), nn.ReLU())).eval(), []
    theirs = copy.deepcopy(model)
    note = lambda name: lambda *inputs: seen.append(name)  # noqa: E731
    model[0].register_forward_hook(note("before"))
    model.register_forward_hook(note("outside"))
    assert relu_ext.fuse(model).keys() == {"3"}
    model[3].register_full_backward_hook(note("after"))
    x = torch.randn(2, 4)
    assert_results(model, theirs, x)
    assert seen == ["before", "outside", "after"]


def test_parametrized_since():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    relu_ext.fuse(model)
    parametrizations.weight_norm(model[0])
    x = torch.randn(2, 4)
    assert_same(model(x), F.relu(model[0](x)))


def test_conversion_before_and_after():
    for order in ((relu_ext.convert, relu_ext.fuse), (relu_ext.fuse, relu_ext.convert)):
        ours = settle(nn.Sequential(BasicBlock(4, 4), DenseActDense()))
        theirs = copy.deepcopy(ours)
        reports = [step(ours) for step in order]
        assert [len(report) for report in reports if "0.relu (2)" in report] == [3]
        assert type(ours[0].relu) is relu_ext.ReLU
        assert_results(ours[0].eval(), theirs[0].eval(), images(), exact=False)
        relu_ext.revert(ours)
        assert [type(module) for module in ours.modules()] == [type(module) for module in theirs.modules()]
        assert all(vars(a).keys() == vars(b).keys() for a, b in zip(ours.modules(), theirs.modules(), strict=True))


# The model stays what it was


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return settle(
        nn.Sequential(BasicBlock(3, 4), BasicLayer(4), nn.Flatten(), nn.Linear(144, 16), nn.ReLU(), DenseActDense(0.0))
    )


def test_identity(network):
    ours = copy.deepcopy(network)
    modules, parameters = list(ours.named_modules()), list(ours.named_parameters())
    state, text = ours.state_dict(), repr(ours)
    report = relu_ext.fuse(ours)
    assert len(report) == 6
    assert [(name, id(module)) for name, module in ours.named_modules()] == [
        (name, id(module)) for name, module in modules
    ]
    assert all(a is b for (_, a), (_, b) in zip(ours.named_parameters(), parameters, strict=True))
    assert list(ours.state_dict()) == list(state)
    assert isinstance(ours[0], BasicBlock) and type(ours[0]).__name__ == "BasicBlock"
    assert repr(ours[:5]) == repr(network[:5])
    assert "left alone" in str(report) and text
    ours.load_state_dict(network.state_dict())
    assert relu_ext.fuse(ours) == {}


@pytest.mark.parametrize("by", ["deepcopy", "copy", "pickle", "torch.save"])
def test_copies(network, by):
    ours = copy.deepcopy(network).eval()
    relu_ext.fuse(ours)
    if by == "torch.save":
        torch.save(ours, file := io.BytesIO())
        file.seek(0)
        other = torch.load(file, weights_only=False)
    else:
        other = {"deepcopy": copy.deepcopy, "copy": copy.copy, "pickle": lambda m: pickle.loads(pickle.dumps(m))}[by](
            ours
        )
    x = images(3)
    assert type(other) is type(ours) and type(other[0]) is type(ours[0])
    assert_same(other(x), ours(x))
    relu_ext.revert(other)
    assert type(other) is nn.Sequential and type(other[0]) is BasicBlock
    assert_same(other(x), network.eval()(x))


def test_replicas_of_data_parallel(network):
    ours = copy.deepcopy(network)[0].eval()
    relu_ext.fuse(ours)
    replica = ours._replicate_for_data_parallel()
    assert type(replica) is type(ours) and replica is not ours
    for name, child in ours.named_children():
        setattr(replica, name, copy.deepcopy(child).double())
    assert replica(images(3).double()).dtype == torch.float64


def test_training(network):
    """Three steps with batch normalisation in training mode: the same losses."""
    losses = []
    for fuse in (False, True):
        torch.manual_seed(1)
        model = copy.deepcopy(network).train()
        if fuse:
            relu_ext.fuse(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(images(3)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-5, atol=0)


def test_compile_and_export(network):
    torch._dynamo.reset()
    ours = copy.deepcopy(network).eval()
    relu_ext.fuse(ours)
    x = images(3)
    expected = network.eval()(x)
    assert_same(torch.compile(ours, backend="eager", fullgraph=True)(x), expected)
    exported = torch.export.export(ours, (x,))
    assert_same(exported.module()(x), expected)
    assert "relu_ext" not in exported.graph_module.code


def test_torchscript():
    ours = settle(nn.Sequential(BasicBlock(3, 4), nn.Linear(6, 6), nn.ReLU())).eval()
    theirs = copy.deepcopy(ours)
    relu_ext.fuse(ours)
    x = images(3)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), theirs(x))
    assert_same(torch.jit.script(ours)(x), theirs(x))


def test_checkpointing(network):
    ours = copy.deepcopy(network)[:4]
    relu_ext.fuse(ours)
    x = images(3, requires_grad=True)
    (plain,) = torch.autograd.grad(ours(x).sum(), x)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(ours, x, use_reentrant=False).sum(), x)
    assert_same(again, plain)


# Example inputs


@pytest.mark.parametrize("inputs", [images(), (images(),), {"input": images()}], ids=["tensor", "tuple", "dict"])
def test_example_inputs(inputs):
    """What a graph cannot know is found by running it."""

    def forward(self, x):
        z = self.conv(x)
        return F.relu(z + x) if torch.is_grad_enabled() else z

    model = nn.Sequential(block(forward, conv=conv), settle(BasicBlock(4, 4)))
    model[1].eval()
    report = relu_ext.fuse(model, inputs)
    assert report.keys() == {"1.relu", "1.relu (2)"}
    assert report.left_alone == {"0": "the example inputs gave other outputs"}
    assert [module.training for module in model] == [True, False] and not model[1].bn1.training
    with torch.no_grad():
        assert_same(model[0](x := images()), conv(x))


# Neighbours in a forward that cannot be traced


def test_feed_forward_of_t5():
    torch.manual_seed(0)
    theirs = nn.Sequential(DenseActDense(), DenseActDense())
    ours = copy.deepcopy(theirs)
    report = relu_ext.fuse(ours)
    assert report == {f"{i}.act": ("act, dropout", "relu_ext.relu_dropout") for i in range(2)}
    assert type(ours[0].act) is nn.ReLU and type(ours[0].dropout) is nn.Dropout
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(5, 16)
    assert_results(ours.eval(), theirs.eval(), x)
    block = ours[0].train()
    torch.manual_seed(7)
    output = block(x)
    torch.manual_seed(7)
    assert_same(output, block.wo(relu_ext.relu_dropout(block.wi(x), 0.25)))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert_results(other.eval(), theirs, x)
        relu_ext.revert(other)
        assert type(other[0]) is DenseActDense
        assert_results(other, theirs, x)


def test_feed_forward_keeps_bits():
    theirs = DenseActDense()
    ours = copy.deepcopy(theirs)
    relu_ext.fuse(ours)
    x = torch.randn(128, 16, requires_grad=True)

    def kept_bytes(model):
        storages = {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept_by(model, x)[1]}
        return sum(storages.values())

    hidden = 128 * 64
    # torch's: the ReLU's output and, on the CPU, the dropout's factors
    assert kept_bytes(theirs) - kept_bytes(ours) == 2 * hidden * 4 - hidden // 8


def test_neighbours_changed_since():
    ours, seen = DenseActDense().eval(), []
    relu_ext.fuse(ours)
    hook = ours.dropout.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(5, 16)
    ours(x)
    assert_same(seen[0], F.relu(ours.wi(x)))
    hook.remove()
    ours.act = nn.GELU()
    assert_same(ours(x), ours.wo(F.gelu(ours.wi(x))))


def test_compile_and_script_neighbours():
    torch._dynamo.reset()
    theirs = DenseActDense().eval()
    ours = copy.deepcopy(theirs)
    relu_ext.fuse(ours)
    x = torch.randn(5, 16)
    assert_same(torch.compile(ours, backend="eager", fullgraph=True)(x), theirs(x))


@pytest.mark.parametrize("activation", ["relu", nn.ReLU()], ids=["function", "module"])
@pytest.mark.parametrize("layer", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_transformer_layers(layer, activation):
    torch.manual_seed(0)
    theirs = layer(8, 2, 16, dropout=0.25, activation=copy.deepcopy(activation), batch_first=True)
    ours = copy.deepcopy(theirs)
    assert relu_ext.fuse(ours) == {"activation": ("activation, dropout", "relu_ext.relu_dropout")}
    inputs = [torch.randn(2, 5, 8)] * (1 + (layer is nn.TransformerDecoderLayer))
    assert_results(ours.eval(), theirs.eval(), *inputs)
    with torch.no_grad():  # the fast path
        assert_same(ours(*inputs), theirs(*inputs))
    assert_same(pickle.loads(pickle.dumps(ours))(*inputs), theirs(*inputs))
    _, kept = kept_by(ours.train(), *inputs)
    assert any(tensor.dtype == torch.uint8 for tensor in kept)
    relu_ext.revert(ours)
    assert ours.activation is F.relu or type(ours.activation) is nn.ReLU


class Several(DenseActDense):
    """Where its source shows a pair it is fused, whatever else is done with the modules."""

    def forward(self, input, *more, flag=True):
        if input.sum() > 1e6:
            return self.act(self.wi(input))
        if flag:
            try:
                x = self.act(self.wi(input))
                x = self.dropout(x)
            finally:
                pass
        else:
            x = self.dropout(self.act(self.dropout(self.act(self.wi(input)))))
        y = self.act(x)
        z = self.dropout(y)
        return self.wo(y + z)


def test_source_with_several_pairs():
    theirs = Several().eval()
    ours = copy.deepcopy(theirs)
    assert relu_ext.fuse(ours) == {"act": ("act, dropout", "relu_ext.relu_dropout")}
    x = torch.randn(5, 16)
    for flag in (True, False):
        assert_same(ours(x, flag=flag), theirs(x, flag=flag))
        calls = []
        ours.relu_ext_relu_then_dropout = lambda *arguments, calls=calls: calls.append(0) or arguments[-1]
        ours(x, flag=flag)
        assert len(calls) == (1 if flag else 2)
        del ours.relu_ext_relu_then_dropout


class OtherName(DenseActDense):
    def forward(self, hidden_states):
        if hidden_states.sum() > 0:
            return hidden_states
        x = self.act(self.wi(hidden_states))
        y = self.dropout(x)
        return self.wo(x + y)


class Private(DenseActDense):
    def forward(self, hidden_states):
        self.__secret = hidden_states.sum() > 0
        return self.wo(self.dropout(self.act(self.wi(hidden_states))))


class Super(DenseActDense):
    def forward(self, hidden_states):
        if hidden_states.sum() > 0:
            return super().forward(hidden_states)
        return self.wo(self.dropout(self.act(self.wi(hidden_states))))


def hooked():
    module = DenseActDense()
    module.dropout.register_forward_pre_hook(lambda module, inputs: None)
    return module


@pytest.mark.parametrize("build", [OtherName, Private, Super, hooked])
def test_neighbours_left_alone(build):
    model = build()
    kind = type(model)
    report = relu_ext.fuse(model)
    assert report == {} and report.left_alone and type(model) is kind


@pytest.mark.parametrize(
    "place, forward", [("relu", linear_then_relu), ("linear", linear_then_relu), ("norm", norm_then_relu)]
)
def test_hooks_are_a_reason(place, forward):
    model = block(forward, linear=copy.deepcopy(linear), norm=copy.deepcopy(norm), relu=nn.ReLU())
    getattr(model, place).register_forward_hook(lambda module, inputs, output: None)
    report = relu_ext.fuse(model)
    assert report == {} and list(report.left_alone.values()) == [f"{place} has hooks or a forward of its own"]
