"""A converted model, fused or not, on each of the roads out of eager torch: what comes of it is the stock model's.

The operations on their own: test_export.py, test_compile.py, test_checkpoint.py, test_modes.py, test_layouts.py.
"""

import io
import re
import shutil

import pytest
import torch
from composing import assert_all_same
from operations import assert_same
from torch import nn
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.export import Dim
from torch.utils.checkpoint import checkpoint_sequential

import relu_ext

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # torch.export's own use of it
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd:UserWarning"),  # torch's own test helper
]


class Block(nn.Module):
    """Activations as attributes, one of them twice, in place and not; a function among them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.bounded = nn.functional.relu6

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.relu(self.norm(self.first(input)))
        return self.relu(self.bounded(self.second(output)) + input)


def stock() -> nn.Module:
    """Selecting activations: the results are to be equal."""
    torch.manual_seed(0)
    head = [nn.Flatten(), nn.Linear(72, 16), nn.Hardtanh(-0.5, 2.0), nn.Linear(16, 16), nn.Threshold(0.1, 0.0)]
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), Block(8), nn.MaxPool2d(2), *head, nn.Linear(16, 4))


@pytest.fixture(params=["converted", "fused"])
def both(request) -> tuple[nn.Module, nn.Module]:
    """The model prepared and as it is."""
    model = stock()
    assert len(relu_ext.convert(model)) == 5
    if request.param == "fused":
        fused = [after for _, after in relu_ext.fuse(model, images()).values()]
        assert fused == ["relu_ext.fma_relu, in eval mode", "relu_ext.add_relu"]
    return model, stock()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, run=None, input=None) -> list[torch.Tensor]:
    """Output, and the gradients of all parameters."""
    output = (run or model)(images() if input is None else input)
    output.float().square().sum().backward()
    return [output.detach(), *(parameter.grad for parameter in model.parameters())]


# Other programs than Python


def test_export(both):
    ours, theirs = (
        torch.export.export(model.eval(), (images(),), dynamic_shapes=({0: Dim("batch")},)) for model in both
    )
    assert ours.graph_module.code == theirs.graph_module.code
    assert_same(ours.module()(images(7)), stock().eval()(images(7)))


@pytest.mark.parametrize("both", ["fused"], indirect=True)  # what is exported is the same, above
def test_aot_inductor_package(both, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("Inductor needs a C++ compiler")
    exported = torch.export.export(both[0].eval(), (images(),))
    quickly = {"aot_inductor.compile_wrapper_opt_level": "O0"}  # what calls the kernels, not these
    path = torch._inductor.aoti_compile_and_package(
        exported, package_path=str(tmp_path / "model.pt2"), inductor_configs=quickly
    )
    loaded = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(loaded(images()), stock().eval()(images()))  # of sums that Inductor orders anew


def test_onnx(both, tmp_path):
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    programs = []
    for model in both:
        program = torch.onnx.export(model.eval(), (images(),), dynamo=True, verbose=False)
        programs.append(program)
    ours, theirs = ([node.op_type for node in program.model.graph] for program in programs)
    assert ours == theirs
    programs[0].save(tmp_path / "model.onnx")
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(output), stock().eval()(images()))  # of sums in another order


def called(scripted) -> list[str]:
    return re.findall(r" = (aten::\w+|\^\w+)", str(scripted.inlined_graph))  # ^ marks a call back into Python


def saved_and_loaded(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


def test_script(both):
    ours, theirs = (torch.jit.script(model.eval()) for model in both)
    assert called(ours) == called(theirs)
    assert_same(saved_and_loaded(ours)(images()), stock().eval()(images()))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # a fused model compares the shapes of what it adds
def test_trace(both):
    """Of a fused model it has the arithmetic: batch normalisation as a scale and a shift."""
    ours = saved_and_loaded(torch.jit.trace(both[0].eval(), images()))
    assert all(name.startswith("aten::") for name in called(ours))
    torch.testing.assert_close(ours(images()), stock().eval()(images()))


# torch's compiler


def test_compile(both):
    """A single graph, of ATen operators that Inductor fuses."""
    torch._dynamo.reset()
    graphs, results = [], []
    for model in both:
        recorded = AotEagerAndRecordGraphs()
        results.append(trained(model, torch.compile(model, backend=recorded, fullgraph=True)))
        graphs.append([graph.code for graph in (*recorded.fw_graphs, *recorded.bw_graphs)])
    assert_all_same(*results)
    ours, theirs = graphs
    assert ours == theirs and len(ours) == 2
    assert "aten.relu" in ours[0] and "aten.hardtanh" in ours[0] and "relu_ext" not in str(ours)


# Training in eager torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_amp(both, dtype):
    def train(model):
        optimiser, scaler = torch.optim.SGD(model.parameters(), lr=0.01), torch.amp.GradScaler("cpu", init_scale=8.0)
        for _ in range(3):
            with torch.autocast("cpu", dtype):
                loss = model(images()).float().square().mean()
            optimiser.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimiser)
            scaler.update()
        return [loss.detach(), *model.parameters()]

    assert_all_same(*map(train, both))


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["", "reentrant"])
def test_activation_checkpointing(both, use_reentrant):
    ours, theirs = both
    results = trained(
        ours,
        lambda input: checkpoint_sequential(ours, 3, input, use_reentrant=use_reentrant),
        images().requires_grad_(),
    )
    assert_all_same(results, trained(theirs))


def test_save_on_cpu(both):
    ours, theirs = both
    with torch.autograd.graph.save_on_cpu():
        results = trained(ours)
    assert_all_same(results, trained(theirs))


def test_channels_last(both):
    """The activations leave the layout as it is, and their kernels walk it."""
    ours, theirs = (model.to(memory_format=torch.channels_last) for model in both)
    seen = []
    ours[2].relu.register_forward_hook(lambda module, inputs, output: seen.append(output))
    input = images().to(memory_format=torch.channels_last)
    assert_all_same(trained(ours, input=input), trained(theirs, input=input))
    assert len(seen) == 2
    for output in seen:
        assert output.is_contiguous(memory_format=torch.channels_last)
        assert output.grad_fn.name() == "ReLUBackward"
