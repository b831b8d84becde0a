"""relu_ext.Monitor: its counts are those that torch makes of the outputs, and watching a step changes nothing in it."""

import copy
import io
import json
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import relu_ext

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def bits_at_hand(row):
    return "no bits" not in row.note


def only(monitor):
    (row,) = monitor.layers()
    return row


def watch(module, *inputs, **options):
    """One step of this module. The row, and the output."""
    monitor = relu_ext.Monitor(module, **options)
    output = module(*inputs)
    return only(monitor), output


def assert_counts(row, active, dim):
    kept = (1 - row.inactive_by_channel) * (active.numel() // active.shape[dim])
    expected = active.movedim(dim, 0).reshape(active.shape[dim], -1).sum(1).cpu()
    assert torch.equal(kept.round().long(), expected)
    assert torch.equal(row.inactive_by_channel, 1 - expected.double() / (active.numel() // active.shape[dim]))
    assert torch.equal(row.dead, (expected == 0).nonzero().flatten())


def numbers(*shape, dtype=torch.float32, device="cpu", silent=()):
    """Channels of dimension 1 among ``silent`` have no positive number."""
    generator = torch.Generator().manual_seed(sum(shape))
    values = torch.randn(shape, generator=generator)
    for channel in silent:
        values[:, channel].abs_().neg_()
    return values.to(device, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(
    "shape",
    [(2, 3, 5, 7), (4, 8, 8, 8), (3, 5, 1, 1), (2, 1, 9, 3), (1, 33, 7, 7), (64, 32, 4, 4), (2, 65, 13, 11)],
    ids=str,
)
def test_counts_of_images(device, isa, dtype, channels_last, shape):
    silent = [channel for channel in (0, 4) if channel < shape[1] - 1]
    x = numbers(*shape, dtype=dtype, device=device, silent=silent)
    x = x.to(memory_format=torch.channels_last) if channels_last else x
    row, output = watch(relu_ext.ReLU(), x.requires_grad_())
    assert bits_at_hand(row)
    assert_counts(row, output > 0, dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(1,), (70,), (9, 1), (130, 31), (257, 64), (3, 1000), (5, 4, 96), (2, 7, 33)], ids=str
)
def test_counts_of_vectors_and_sequences(device, isa, dtype, shape):
    """The last dimension is that of the channels."""
    row, output = watch(relu_ext.ReLU(), numbers(*shape, dtype=dtype, device=device).requires_grad_())
    assert bits_at_hand(row)
    assert_counts(row, output > 0, dim=-1)


def test_more_counts_than_16_bits_and_one_thread_hold(isa, threads):
    """Counters are emptied in time, and each thread has its own."""
    x = torch.ones(2**22 + 77, 2).requires_grad_()
    assert only_count(x) == x.shape[0]
    x = torch.ones(2**20 + 3, 5).requires_grad_()
    assert only_count(x) == x.shape[0]
    x = torch.ones(2, 3, 1100, 1001).requires_grad_()
    assert only_count(x) == x.numel() // 3


def only_count(x):
    row, _ = watch(relu_ext.ReLU(), x)
    (fraction,) = set((1 - row.inactive_by_channel).tolist())
    return fraction * x.numel() / row.channels


class Exchanged(nn.Module):
    """The tensor that its ReLU gives has other memory afterwards."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        output = relu_ext.relu(x)
        output.data = self.change(output.data)
        return output


@pytest.mark.parametrize(
    "change", [lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: torch.cat([x, x])]
)
def test_memory_that_was_exchanged(change):
    """The bits are of what was there before."""
    row, _ = watch(Exchanged(change), numbers(4, 5, 6, 7).requires_grad_(), also="")
    assert row.channels == 0 and "neither bits" in row.note


@pytest.mark.parametrize("dim", [0, 1, 2, 3, -1, -2])
def test_any_dimension(dim):
    x = numbers(3, 4, 5, 6).permute(2, 0, 3, 1).requires_grad_()
    row, output = watch(relu_ext.ReLU(), x, dim=dim)
    assert bits_at_hand(row)
    assert_counts(row, output > 0, dim)


def test_nan_is_active_as_its_gradient_passes():
    x = torch.tensor([[float("nan"), -1.0, float("inf")]], requires_grad=True)
    row, _ = watch(relu_ext.ReLU(), x)
    assert row.inactive_by_channel.tolist() == [0, 1, 0]
    assert row.nonfinite == 1


SHAPE = (6, 5, 4, 4)
OF_BITS = {
    "relu": (relu_ext.ReLU(), lambda x, y: x > 0),
    "relu in place": (relu_ext.ReLU(inplace=True), lambda x, y: x > 0),
    "relu6": (relu_ext.ReLU6(), lambda x, y: (x > 0) & (x < 6)),
    "hardtanh": (relu_ext.Hardtanh(-0.3, 0.7), lambda x, y: (x > -0.3) & (x < 0.7)),
    "threshold": (relu_ext.Threshold(0.3, 7.0), lambda x, y: x > 0.3),
    "leaky_relu": (relu_ext.LeakyReLU(-0.5), lambda x, y: x > 0),
    "relu_dropout": (relu_ext.ReLUDropout(0.4), lambda x, y: y > 0),
    "bias_relu": (relu_ext.BiasReLU(5), lambda x, y: y > 0),
    "batch norm": (relu_ext.FrozenBatchNormReLU2d(5), lambda x, y: y > 0),
}
BITS_AGAIN = {
    "elu": (relu_ext.ELU(), lambda x, y: x > 0),
    "celu": (relu_ext.CELU(), lambda x, y: x > 0),
    "selu": (relu_ext.SELU(), lambda x, y: x > 0),
    "relu_squared": (relu_ext.ReLUSquared(), lambda x, y: x > 0),
    "prelu": (relu_ext.PReLU(init=-0.3), lambda x, y: x > 0),
    "torch's relu": (nn.ReLU(inplace=True), lambda x, y: x > 0),
    "torch's relu6": (nn.ReLU6(inplace=True), lambda x, y: (x > 0) & (x < 6)),
    "torch's hardtanh": (nn.Hardtanh(-0.3, 0.7), lambda x, y: (x > -0.3) & (x < 0.7)),
    "torch's threshold": (nn.Threshold(0.3, 7.0), lambda x, y: x > 0.3),
    "torch's leaky_relu": (nn.LeakyReLU(-0.5), lambda x, y: x > 0),
}


@pytest.mark.parametrize("name", [*OF_BITS, *BITS_AGAIN])
def test_every_activation(device, name):
    module, active = (OF_BITS | BITS_AGAIN)[name]
    x = 4 * numbers(*SHAPE, device=device)
    row, output = watch(module.to(device), x.clone().requires_grad_().clone())
    assert bits_at_hand(row) == (name in OF_BITS)
    assert_counts(row, active(x, output), dim=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_bounds_that_the_type_has_not(dtype):
    """The bits that are made again are those that would have been kept."""
    x = torch.linspace(-1, 1, 4001).to(dtype)[:, None].requires_grad_()
    rows = [watch(module(-0.3, 0.7), x)[0] for module in (nn.Hardtanh, relu_ext.Hardtanh)]
    assert rows[0].inactive == rows[1].inactive


def test_two_inputs_and_halves():
    x, residual = numbers(*SHAPE).requires_grad_(), numbers(*SHAPE, silent=[3])
    assert_counts(watch(relu_ext.AddReLU(), x, residual)[0], x + residual > 0, 1)
    projection = numbers(3, 7, 20).requires_grad_()
    assert_counts(watch(relu_ext.ReGLU(), projection)[0], projection.chunk(2, -1)[0] > 0, -1)
    linear = relu_ext.LinearReLU(5, 9)
    row, output = watch(linear, numbers(8, 5))
    assert_counts(row, output > 0, 1)


def test_without_history_the_bits_are_made_again():
    with torch.no_grad():
        row, output = watch(relu_ext.ReLU(), numbers(*SHAPE))
    assert not bits_at_hand(row)
    assert_counts(row, output > 0, 1)


def test_counts_add_up_and_eval_is_not_counted():
    module = relu_ext.ReLU()
    monitor = relu_ext.Monitor(module)
    batches = [numbers(size, 6).requires_grad_() for size in (3, 8, 21)]
    for batch in batches:
        module(batch)
        with torch.no_grad():
            module.eval()(torch.ones(50, 6))
        module.train()
    assert monitor.steps == 3
    assert_counts(only(monitor), torch.cat(batches) > 0, 1)


def fires(*channels, of=4):
    x = torch.full((2, of), -1.0)
    x[:, list(channels)] = 1
    return x.requires_grad_()


def test_dead_in_the_last_steps():
    module = relu_ext.ReLU()
    monitor = relu_ext.Monitor(module, window=3)
    expected = [[1, 2, 3], [2, 3], [2, 3], [0, 2, 3], [0, 1, 3]]
    for channels, dead in zip([[0], [1], [], [], [2]], expected, strict=True):
        module(fires(*channels))
        assert only(monitor).dead.tolist() == dead


def test_fractions_are_of_this_window_and_the_last():
    module = relu_ext.ReLU()
    monitor = relu_ext.Monitor(module, window=2)
    fractions = []
    for channels in [[0, 1, 2, 3], [0, 1, 2, 3], [], [], [], [0], [0]]:
        module(fires(*channels))
        fractions.append(only(monitor).inactive)
    assert fractions == pytest.approx([0, 0, 1 / 3, 1 / 2, 1, 15 / 16, 10 / 12])


def test_every_so_many_steps():
    module = relu_ext.ReLU()
    monitor = relu_ext.Monitor(module, every=2)
    for channels in ([0], [1], [2], [1, 3]):
        module(fires(*channels))
    assert only(monitor).dead.tolist() == [0, 2]


class Shared(nn.Module):
    """One activation in three places, as in a residual network's block."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
        self.act = relu_ext.ReLU()
        self.same = self.act

    def forward(self, x):
        return self.act(self.second(self.act(self.first(x))) + self.act(x)[:, :4])


def test_calls_of_a_shared_module_are_told_apart():
    model = Shared()
    monitor = relu_ext.Monitor(model)
    for _ in range(3):
        model(numbers(5, 8)).sum().backward()
    rows = monitor.layers()
    assert [(row.name, row.channels) for row in rows] == [("act", 16), ("act:2", 8), ("act:3", 4)]
    assert_counts(rows[1], numbers(5, 8) > 0, 1)


def test_later_calls_are_added_to_the_last():
    module = relu_ext.ReLU()
    model = nn.Sequential(module, module, module)
    monitor = relu_ext.Monitor(model, calls=2)
    model(fires(0))
    assert list(monitor.to_dict()) == ["0", "0:2"]
    assert monitor.layers()[1].inactive == 0.75


def test_what_cannot_be_counted_is_said():
    module = relu_ext.ReLU()
    monitor = relu_ext.Monitor(module)
    module(fires(0))
    module(torch.ones(2, 7, requires_grad=True))
    assert only(monitor).channels == 4 and only(monitor).inactive == 0.75
    assert "had 4 channels, then 7" in only(monitor).note

    for module, x, note in [
        (nn.LeakyReLU(inplace=True), torch.ones(2, 3), "neither bits"),
        (nn.ReLU(), torch.ones(2, 3, dtype=torch.int32), "no kernels for torch.int32"),
        (nn.ReLU(), torch.ones(()), "without elements or dimensions"),
        (nn.ReLU(), torch.ones(2, 3).to_sparse(), "traced or transformed"),
        (nn.ReLU(), nn.Parameter(torch.ones(2, 3)).to(torch.complex64).real.as_subclass(Subclass), "Subclass"),
    ]:
        row, _ = watch(module, x)
        assert row.channels == 0 and note in row.note


class Subclass(torch.Tensor):
    pass


def test_functorch_is_left_alone():
    module = relu_ext.ReLU()
    monitor = relu_ext.Monitor(module)
    x = numbers(4, 3)
    assert torch.equal(torch.func.vmap(module)(x), F.relu(x))
    assert torch.equal(torch.func.grad(lambda x: module(x).sum())(x), (x > 0).float())
    assert only(monitor).channels == 0


def test_modules_by_name_and_functions():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 9)

        def forward(self, x):
            return relu_ext.relu(self.linear(x))

    model = nn.Sequential(Block(), nn.Linear(9, 2))
    with pytest.raises(ValueError, match="no activation"):
        relu_ext.Monitor(model)
    monitor = relu_ext.Monitor(model, also=["0", "1*"])
    model(numbers(8, 6)).sum().backward()
    block, linear = monitor.layers()
    assert_counts(block, model[0](numbers(8, 6)) > 0, 1)
    assert linear.channels == 0 and "neither bits" in linear.note


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_outputs_that_are_not_finite(device, isa, dtype, value):
    """The first step, of the layers that let it through."""
    model = nn.Sequential(relu_ext.LeakyReLU(), relu_ext.ReLU())
    monitor = relu_ext.Monitor(model)
    for step in range(1, 6):
        x = numbers(300, 7, dtype=dtype, device=device)
        if step in (3, 5):
            x[137, 2] = value
        model(x.requires_grad_())
    assert [row.nonfinite for row in monitor.layers()] == [3, None if value < 0 else 3]


@pytest.mark.parametrize("place", [0, -1])
def test_one_number_among_many_is_not_finite(device, threads, place):
    x = torch.ones(1 << 17, device=device)
    x[place] = torch.nan
    assert watch(relu_ext.ReLU(), x)[0].nonfinite == 1


def test_gradients_that_are_not_finite(device):
    model = nn.Sequential(relu_ext.ReLU(), nn.Identity())
    monitor = relu_ext.Monitor(model)
    for step in range(1, 5):
        y = model(torch.ones(40, 3, device=device, requires_grad=True))
        gradient = torch.ones(40, 3, device=device)
        gradient[39, 2] = float("nan") if step == 2 else 1
        y.backward(gradient.t().contiguous().t() if step == 3 else gradient)
    row = only(monitor)
    assert (row.nonfinite, row.nonfinite_gradient) == (None, 2)
    monitor.reset()
    model(torch.ones(2, 3, device=device, requires_grad=True)).backward(
        torch.tensor(float("inf")).expand(2, 3).to(device)
    )
    assert only(monitor).nonfinite_gradient == 1


class Names(TorchDispatchMode):
    """What PyTorch's dispatcher is asked."""

    def __init__(self):
        super().__init__()
        self.called = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.called.append(str(function))
        return function(*args, **(kwargs or {}))


def cnn(activation=relu_ext.ReLU):
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Conv2d(1, 8, 3), activation(), nn.Conv2d(8, 8, 3), activation(), nn.Flatten(), nn.Linear(8 * 16, 4)]
    )


@pytest.mark.parametrize("activation", [relu_ext.ReLU, nn.ReLU, relu_ext.ELU])
def test_a_step_asks_pytorch_for_nothing(activation):
    """No copy to the host, no allocation by it, and no operation that a mode could see."""
    called = []
    for watched in (False, True):
        model = cnn(activation)
        if watched:
            relu_ext.Monitor(model, window=2)
        with Names() as names:
            for _ in range(5):
                model(numbers(4, 1, 8, 8)).square().sum().backward()
        called.append(names.called)
    assert called[0] == called[1]


def test_counting_an_input_with_gaps_asks_pytorch_for_nothing():
    """Of torch's hardtanh the bits are made again, from its input."""
    called = []
    for watched in (False, True):
        module = nn.Hardtanh()
        if watched:
            relu_ext.Monitor(module)
        x = numbers(4, 8)[:, ::2]
        with Names() as names:
            module(x)
        called.append(names.called)
    assert called[0] == called[1]


def test_a_step_reads_nothing_on_the_host():
    model = cnn()
    monitor = relu_ext.Monitor(model, window=2)

    def step():
        model(numbers(4, 1, 8, 8)).square().sum().backward()

    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        for _ in range(4):
            step()
    events = {event.name for event in profiler.events()}
    assert events and not events & {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        monitor.scalars()
    assert "aten::item" in {event.name for event in profiler.events()}  # so the first would have seen it


def test_training_is_the_same():
    weights = []
    for watched in (False, True):
        model = cnn()
        if watched:
            relu_ext.Monitor(model)
        for _ in range(3):
            model(numbers(4, 1, 8, 8)).square().sum().backward()
        weights.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_is_counted_once(use_reentrant):
    stages = cnn()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = stages

        def forward(self, x):
            return checkpoint(self.stages, x, use_reentrant=use_reentrant)

    plain = relu_ext.Monitor(stages)
    stages(numbers(4, 1, 8, 8).requires_grad_()).sum().backward()
    expected = [row.inactive_by_channel for row in plain.layers()]
    plain.close()
    model = Checkpointed()
    monitor = relu_ext.Monitor(model)
    for _ in range(2):
        y = model(numbers(4, 1, 8, 8).requires_grad_())
        (y * float("inf")).sum().backward()
    assert monitor.steps == 2
    rows = monitor.layers()
    assert all(torch.equal(row.inactive_by_channel, fractions) for row, fractions in zip(rows, expected, strict=True))
    assert [row.nonfinite_gradient for row in rows] == [1, 1]


def test_under_modes_and_offloading():
    x = numbers(*SHAPE).requires_grad_()
    with FlopCounterMode(display=False):
        row, output = watch(relu_ext.ReLU(), x)
    assert_counts(row, output > 0, 1)
    with torch.autograd.graph.save_on_cpu():
        row, output = watch(relu_ext.ReLU(), x)
    assert not bits_at_hand(row)
    assert_counts(row, output > 0, 1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_not_watched(copied):
    model = cnn()
    monitor = relu_ext.Monitor(model)
    other = copied(model)
    other(numbers(4, 1, 8, 8)).sum().backward()
    assert monitor.steps == 0 and all(row.channels == 0 for row in monitor.layers())
    model(numbers(4, 1, 8, 8)).sum().backward()
    assert monitor.steps == 1 and all(row.channels == 8 for row in monitor.layers())


def test_closing():
    model = cnn()
    with relu_ext.Monitor(model) as monitor:
        model(numbers(4, 1, 8, 8))
    model(numbers(4, 1, 8, 8))
    assert monitor.steps == 1
    assert not model._forward_pre_hooks and not any(module._forward_hooks for module in model)
    assert all(row.channels == 8 for row in monitor.layers())


def test_compiled_modules_are_not_counted():
    model = cnn()
    monitor = relu_ext.Monitor(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    x = numbers(4, 1, 8, 8)
    assert torch.equal(compiled(x), model.eval()(x))
    assert monitor.steps == 0
    assert all("torch.compile" in row.note for row in monitor.layers())


def test_a_module_that_was_moved(device):
    """Cells are where the output is; rows are of all devices."""
    module = relu_ext.ReLU()
    monitor = relu_ext.Monitor(module)
    module(fires(0))
    module(fires(1).detach().to(device).requires_grad_())
    assert only(monitor).dead.tolist() == [2, 3]
    assert only(monitor).inactive == 0.75


def test_loggers_tables_and_pictures(tmp_path):
    console = pytest.importorskip("rich.console", reason="rich is for tables only")
    pytest.importorskip("matplotlib", reason="matplotlib is for pictures only")
    model = cnn()
    with torch.no_grad():
        model[0].bias[5] = -100
        model[2].weight[0, 0, 0, 0] = float("nan")
    monitor = relu_ext.Monitor(model)
    with pytest.raises(RuntimeError, match="nothing was counted"):
        monitor.plot()
    model(numbers(4, 1, 8, 8)).sum().backward()
    first = json.loads(json.dumps(monitor.to_dict()))["1"]
    assert first["dead"] == [5] and first["kind"] == "ReLU" and 0 < first["inactive"] < 1
    scalars = monitor.scalars()
    assert scalars["1/dead"] == 1 / 8 and scalars["3/nonfinite"] == 1
    assert scalars["1/inactive"] == first["inactive"]
    text = io.StringIO()
    monitor.report(console.Console(file=text, width=100))
    assert "dead" in text.getvalue() and "output 1" in text.getvalue()
    figure = monitor.plot(tmp_path / "layers.png")
    assert (tmp_path / "layers.png").stat().st_size > 1000 and figure.axes


@pytest.mark.parametrize("options", [{"window": 0}, {"every": 0}, {"calls": 0}])
def test_arguments(options):
    with pytest.raises(ValueError, match="at least 1"):
        relu_ext.Monitor(relu_ext.ReLU(), **options)
