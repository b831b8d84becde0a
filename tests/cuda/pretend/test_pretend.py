"""How often, on which device and on which stream kernels are launched; and that a bug there would show.

Streams are known by their ids; 0 is every device's default stream.
"""

import ctypes
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from composing import leaf, numbers
from operations import DTYPES, assert_same, kept_by

from relu_ext import ReLUFunction

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
on_cuda = pytest.mark.parametrize("device", ["cuda"])
over_devices = pytest.mark.parametrize("index", range(torch.cuda.device_count()))


def launches(function, *inputs):
    """The result, and device and stream of every launch that it took."""
    torch.ops.pretend.take_launches()
    return function(*inputs), [tuple(launch) for launch in torch.ops.pretend.take_launches()]


@contextmanager
def current(stream):
    before = torch.accelerator.current_stream(stream.device)
    torch.accelerator.set_stream(stream)
    torch.accelerator.set_device_index(0)
    try:
        yield stream.stream_id
    finally:
        torch.accelerator.set_stream(before)
        torch.accelerator.set_device_index(0)


def ways_to_run(operation):
    """Each way gives function(input) -> output with a graph, for a leaf; the function where there is no such way."""
    return {
        "function": operation.function,
        "function in place": (lambda x: operation.function_(x * 1)) if operation.in_place else operation.function,
        "module": operation.module(),
        "operators": (lambda x: operation.forward(x)[0]) if operation.keep else operation.function,
        "autograd.Function": ReLUFunction.apply,
    }


over_ways = pytest.mark.parametrize(
    "way", ["function", "function in place", "module", "operators", "autograd.Function"]
)


# Launches


@on_cuda
@over_ways
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3, 333), (2**17 + 3,)], ids=str)
def test_one_launch_each_way(operation, device, way, dtype, shape):
    run = ways_to_run(operation)[way]
    input = leaf(*shape, device=device, dtype=dtype)
    grad = numbers(*shape, device=device, dtype=dtype, seed=1)
    output, forward = launches(run, input)
    _, backward = launches(torch.autograd.grad, output, input, grad)
    assert (len(forward), len(backward)) == (1, 1)


@pytest.mark.in_place
@on_cuda
def test_one_launch_without_a_gradient(operation, device):
    input = numbers(5, 7, device=device)
    for function in (operation.function, operation.function_, operation.module(), operation.module(inplace=True)):
        assert launches(function, input)[1] == [(0, 0)]


@on_cuda
def test_one_launch_for_gradients_of_any_layout(operation, device):
    input = leaf(2, 3, 5, 7, device=device)
    for grad in (
        numbers(1, device=device)[0].expand(2, 3, 5, 7),
        numbers(7, 5, 3, 2, device=device).permute(3, 2, 1, 0),
    ):
        output = operation.function(input)
        assert launches(torch.autograd.grad, output, input, grad)[1] == [(0, 0)]


@on_cuda
def test_nothing_is_launched_for_no_elements(operation, device):
    input = leaf(0, 3, device=device)
    output, forward = launches(operation.function, input)
    assert forward == launches(torch.autograd.grad, output, input, torch.ones_like(output))[1] == []


@on_cuda
def test_what_kernels_do_not_take_is_left_to_torch(operation, device):
    inputs = [numbers(6, 7, device=device)[:, 1:4]]
    if operation.name not in ("leaky_relu", "elu"):  # torch's take no integers
        inputs.append(torch.arange(-3, 4, device=device))
    for input in inputs:
        output, launched = launches(operation.function, input)
        assert launched == []
        assert_same(output, operation.definition(input))


@on_cuda
@over_ways
def test_launches_are_checked(operation, device, way):
    run = ways_to_run(operation)[way]
    input = leaf(9, device=device)
    torch.ops.pretend.refuse_next_launch()
    with pytest.raises(RuntimeError, match="CUDA error"):
        run(input)
    output = run(input)
    torch.ops.pretend.refuse_next_launch()
    with pytest.raises(RuntimeError, match="CUDA error"):
        output.sum().backward()


# Devices and streams


@on_cuda
@over_devices
@over_ways
def test_launches_are_on_the_tensors_device(operation, device, index, way):
    """Whatever the current one is, which stays; and on its current stream."""
    run, place = ways_to_run(operation)[way], torch.device(device, index)
    with current(torch.Stream(place)) as stream:
        input = leaf(5, 7, device=place)
        (output, (bits,)), forward = launches(kept_by, run, input)
        assert torch.cuda.current_device() == 0
    gradient, backward = launches(torch.autograd.grad, output, input, torch.ones_like(output))
    assert forward == backward == [(index, stream)]  # autograd runs backward on the stream of forward
    assert output.device == bits.device == gradient[0].device == place


@on_cuda
@over_devices
def test_launches_without_history_are_on_the_tensors_device(operation, device, index):
    place = torch.device(device, index)
    input = numbers(5, 7, device=place)
    bits = torch.ones(5, dtype=torch.uint8, device=place)
    ways = [operation.function, operation.function_]
    if operation.keep:
        ways.append(lambda input: operation.backward(input, bits, input.stride()))
    for run in ways:
        assert launches(run, input)[1] == [(index, 0)]
        with current(torch.Stream(place)) as stream:
            output, launched = launches(run, input)
        assert launched == [(index, stream)]
        assert output.device == place


@on_cuda
def test_streams_of_threads_are_their_own(operation, device):
    """Autograd's threads included: backward of two graphs, each on the stream of its forward, whatever is current."""
    first, second = torch.Stream(device), torch.Stream(device)
    inputs = leaf(9, device=device), leaf(9, device=device)
    with current(first):
        one = operation.function(inputs[0])
    with current(second):
        two = operation.function(inputs[1])
        _, launched = launches(torch.autograd.grad, one.sum() + two.sum(), inputs)
    assert sorted(launched) == [(0, first.stream_id), (0, second.stream_id)]


# A build for the CPU alone

CPU_ONLY = """
import sys; sys.path[:0] = sys.argv[1:]
import run; run.load_device()
import plugin, pytest, relu_ext, torch
from composing import assert_all_same, leaf
from operations import OPERATIONS

assert relu_ext.build_info()["cuda"] is None
for operation in OPERATIONS:
    input = leaf(5, 7, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        ours = operation.function(input)
        gradient, = torch.autograd.grad(ours, input, torch.ones_like(ours))
    assert not [event.name for event in profiler.events() if "relu_ext" in event.name]
    theirs = operation.definition(input)
    assert ours.grad_fn.name() == theirs.grad_fn.name() != operation.node
    assert ours.device == gradient.device == input.device
    assert_all_same((ours, gradient), (theirs, *torch.autograd.grad(theirs, input, torch.ones_like(theirs))))
    if operation.keep:
        with pytest.raises(NotImplementedError, match="'CUDA' backend"):
            operation.forward(input)
assert torch.ops.pretend.take_launches() == []
"""


@on_cuda
def test_a_build_for_the_cpu_alone_leaves_cuda_tensors_to_torch(device):
    """The one beside the sources, which `make build` makes."""
    command = [sys.executable, "-c", CPU_ONLY, HERE, ROOT / "tests", ROOT]
    process = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


# The pretence itself


@on_cuda
def test_fresh_memory_is_poisoned(device):
    for fresh in (torch.empty(99, dtype=torch.uint8, device=device), torch.empty_like(numbers(99, device=device))):
        assert (fresh.view(torch.uint8) == 0xA5).all()


@on_cuda
@pytest.mark.parametrize("place", [-1, 99])
def test_a_byte_beside_a_tensor_is_seen(device, place):
    memory = torch.empty(99, dtype=torch.uint8, device=device)
    ctypes.memset(memory.data_ptr() + place, 0, 1)
    del memory
    assert torch.ops.pretend.take_broken_fences() == 1


@on_cuda
def test_tensors_of_two_devices_do_not_mix(device):
    first, second = numbers(9, device=f"{device}:0"), numbers(9, device=f"{device}:1")
    for other in (second, numbers(9, device="cpu")):
        with pytest.raises(RuntimeError, match="at least two devices"):
            first + other
    assert_same(first.to(second.device).cpu(), second.cpu())


ATEN = {
    "view": lambda x: x.view(-1)[3:].add_(1),
    "in place": lambda x: x.mul_(2).t_(),
    "out": lambda x: torch.add(x, 1, out=torch.empty(0, device=x.device)),
    "out, a view": lambda x: torch.add(x[0], 1, out=x[1]),
    "resized": lambda x: x.resize_(2, 3).add_(1),
    "grown": lambda x: x.resize_(9, 9).fill_(2),
    "set": lambda x: torch.empty(0, device=x.device).set_(x.untyped_storage(), 2, (3,), (2,)).add_(1),
    "list": lambda x: torch.cat([x, x.t().contiguous().view(4, 5)]),
    "parts": lambda x: x.split(2)[1].neg_(),
    "several": lambda x: x.sort(1)[1],
    "index": lambda x: x[torch.tensor([0, 2]), x[0, 1:3].long()],
    "complex": lambda x: torch.complex(x, x).conj().imag,
}


@on_cuda
@pytest.mark.parametrize("run", ATEN.values(), ids=ATEN)
def test_aten_is_the_cpus(device, run):
    """On the same memory, with the same strides."""
    ours, theirs = torch.arange(20.0, device=device).view(4, 5), torch.arange(20.0).view(4, 5)
    output, expected = run(ours), run(theirs)
    assert output.device == ours.device == torch.device(device, 0)
    assert output.stride() == expected.stride()
    assert output.storage_offset() == expected.storage_offset()
    assert_same(output.cpu(), expected)
    assert ours.stride() == theirs.stride()
    assert_same(ours.cpu(), theirs)
    assert (output.untyped_storage().data_ptr() == ours.untyped_storage().data_ptr()) == (
        expected.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
    )
