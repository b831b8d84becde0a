"""What only a GPU shows: more than 2^31 elements, graphs, streams, launches, memory. The rest takes `device`.

Tests with a parameter `device` ask for no more than tensors on devices called cuda; those with the fixture `gpu` need
the real thing.
"""

import gc
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from composing import assert_all_same, numbers
from operations import DTYPES, INTEGERS, assert_same, kept_by, packed
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import relu_ext

WHY_NOT = (
    "relu_ext is built without CUDA"
    if not relu_ext.build_info()["cuda"]
    else "there is no GPU"
    if not torch.cuda.is_available()
    else None
)
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))
on_cuda = pytest.mark.parametrize("device", ["cuda"])
over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

SLOW = 200_000_000  # cycles, a tenth of a second: longer than it takes to queue what these tests queue


@pytest.fixture
def gpu():
    """Memory of earlier tests is given back, and nothing is under way."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    yield torch.device("cuda", torch.cuda.current_device())
    torch.cuda.synchronize()


def patterns_(tensor):
    """Fills memory with random bits: every kind of number there is, NaN and infinities included."""
    integers = tensor.view(INTEGERS[tensor.dtype])
    integers.random_(torch.iinfo(integers.dtype).min, None)
    return tensor


def patterns(*shape, dtype=torch.float32, device="cuda"):
    return patterns_(torch.empty(shape, dtype=dtype, device=device))


def leaf(*shape, **options):
    return patterns(*shape, **options).requires_grad_()


def output_and_gradient(function, input, grad):
    output = function(input)
    return output.detach(), torch.autograd.grad(output, input, grad)[0]


# Sizes


CHUNK = 2**26  # elements: what is compared at once, so that comparing needs little memory


def chunks(*tensors):
    return zip(*(tensor.split(CHUNK) for tensor in tensors), strict=True)


def need_memory(wanted):
    free, _ = torch.cuda.mem_get_info()
    if free < wanted:
        pytest.skip(f"needs {wanted / 2**30:.1f} GiB of the GPU's memory, {free / 2**30:.1f} GiB are free")


@pytest.mark.in_place
@pytest.mark.keeps_bits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_more_elements_than_32_bits_count(operation, gpu, dtype):
    count = 2**31 + 3 * CHUNK + 13
    # input, output, grad and gradient; the bits; a dozen chunks to compare with
    need_memory(count * (4 * dtype.itemsize + 1 / 8) + 12 * CHUNK * max(4, dtype.itemsize))
    input, grad = (torch.empty(count, dtype=dtype, device=gpu) for _ in range(2))
    for tensor in (input, grad):
        for (chunk,) in chunks(tensor):
            patterns_(chunk)
    input.requires_grad_()
    output, (bits,) = kept_by(operation.function, input)
    assert bits.numel() == (count + 7) // 8
    (gradient,) = torch.autograd.grad(output, input, grad)
    values, output = input.detach(), output.detach()
    for i, (value, result, outer, inner) in enumerate(chunks(values, output, grad, gradient)):
        expected = value.clone().requires_grad_()
        assert_same(result, operation.definition(expected).detach())
        assert_same(inner, output_and_gradient(operation.definition, expected, outer)[1])
        first = i * CHUNK // 8
        assert torch.equal(bits[first : first + (len(value) + 7) // 8], packed(operation.keep(value)))
    with torch.no_grad():
        operation.function_(input)
    for result, expected in chunks(input.detach(), output):
        assert_same(result, expected)


@pytest.mark.in_place
@pytest.mark.keeps_bits
@over_dtypes
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
def test_sizes_that_fill_the_chip(operation, gpu, dtype, offset):
    """Other tests stay below: where every multiprocessor has work, a block takes more, and then too it has a tail."""
    for count in (2**24, 2**24 + 1, 2**24 + 2043, 2**25 - 9):
        values, grad = (patterns(count + offset, dtype=dtype)[offset:] for _ in range(2))
        input = values.detach().requires_grad_()
        output, (bits,) = kept_by(operation.function, input)
        expected = output_and_gradient(operation.definition, values.clone().requires_grad_(), grad)
        assert_all_same((output.detach(), torch.autograd.grad(output, input, grad)[0]), expected)
        assert torch.equal(bits, packed(operation.keep(values)))
        assert_same(operation.function(values), expected[0])
        buffer = torch.full((count + 2 * 64,), -3.0, dtype=dtype, device=gpu)
        view = buffer[64 + offset : 64 + offset + count]
        operation.function_(view.copy_(values))
        assert_same(view, expected[0])
        assert (buffer[: 64 + offset] == -3).all() and (buffer[64 + offset + count :] == -3).all()


# CUDA graphs


def replayed(function, input, grad):
    """function and its backward captured in a graph; gives replay(values, grads) -> output, gradient."""
    static_input, static_grad = input.clone().requires_grad_(), grad.clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # loads the kernels, which may not happen inside of a capture
        output_and_gradient(function, static_input, static_grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = output_and_gradient(function, static_input, static_grad)

    def replay(values, grads):
        with torch.no_grad():
            static_input.copy_(values)
            static_grad.copy_(grads)
        graph.replay()
        return [result.clone() for result in results]

    return replay


# Several layers, so that memory for bits would be used again too early if nothing kept it.
GRAPHED = {
    "function": lambda function, function_: function,
    "in place": lambda function, function_: lambda x: function_(x * 1),
    "layers": lambda function, function_: lambda x: function(-function(function(x).neg() + x) + x) * 2,
    "layers in place": lambda function, function_: lambda x: function_(function_(x * 2).neg() + x) * 3,
}


@pytest.mark.in_place
@pytest.mark.parametrize("build", GRAPHED.values(), ids=GRAPHED)
@pytest.mark.parametrize("count", [1000, 2**24 + 5])
def test_graph_of_forward_and_backward(operation, gpu, build, count):
    theirs = build(operation.definition, operation.definition_)
    replay = replayed(build(operation.function, operation.function_), patterns(count), patterns(count))
    for _ in range(3):
        values, grads = patterns(count), patterns(count)
        assert_all_same(replay(values, grads), output_and_gradient(theirs, values.clone().requires_grad_(), grads))


def test_graphs_of_forward_and_backward_apart(operation, gpu):
    """As torch.cuda.make_graphed_callables makes them: the bits are written by one graph and read by another."""

    def layers(relu):
        return lambda x: relu(relu(x - 1).neg() + x) * 2

    graphed = torch.cuda.make_graphed_callables(layers(operation.function), (leaf(33, 65),))
    for _ in range(3):
        input, grad = leaf(33, 65), patterns(33, 65)
        assert_all_same(
            output_and_gradient(graphed, input, grad),
            output_and_gradient(layers(operation.definition), input, grad),
        )


def test_capture_on_a_side_stream(operation, gpu):
    input, side = patterns(1000), torch.cuda.Stream()
    operation.function(input)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        output = operation.function(input)
    patterns_(input)
    graph.replay()
    assert_same(output, operation.definition(input))


# Streams


@contextmanager
def behind_slow_work(stream):
    """What the block queues on this stream starts long after the block has ended, or the test means nothing."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLOW)
        yield
    assert not stream.query(), "queueing has waited for the device"


@pytest.mark.in_place
def test_forward_and_backward_are_queued_on_the_current_stream(operation, gpu):
    """The numbers arrive late: a kernel on any other stream would read the old ones. Nothing waits for them."""
    values, grads = patterns(100_000), patterns(100_000)
    expected = output_and_gradient(operation.definition, values.clone().requires_grad_(), grads)
    side = torch.cuda.Stream()
    for function in (operation.function, lambda x: operation.function_(x * 1)):
        input, grad = torch.zeros_like(values).requires_grad_(), torch.zeros_like(grads)
        with torch.cuda.stream(side):
            output_and_gradient(function, input, grad)  # loading a kernel may wait
        with behind_slow_work(side):
            with torch.no_grad():
                input.copy_(values)
                grad.copy_(grads)
            ours = output_and_gradient(function, input, grad)
        side.synchronize()
        assert_all_same(ours, expected)


def test_backward_runs_on_the_stream_of_forward(operation, gpu):
    """As autograd promises; and what it gives may be used on the stream that called it."""
    values, grads = patterns(100_000), patterns(100_000)
    expected = output_and_gradient(operation.definition, values.clone().requires_grad_(), grads)
    side = torch.cuda.Stream()
    for function in (operation.definition, operation.function):  # the first says that the test is right
        input, grad = values.clone().requires_grad_(), torch.zeros_like(grads)
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            output = function(input)
            torch.autograd.grad(output, input, grad, retain_graph=True)
        with behind_slow_work(side):
            grad.copy_(grads)
        (ours,) = torch.autograd.grad(output, input, grad)
        ours = ours.clone()  # on the current stream, which autograd has made wait
        torch.cuda.current_stream().synchronize()
        assert_all_same((output.detach(), ours), expected)


def test_threads_with_streams_of_their_own(operation, gpu):
    values = [patterns(100_000 + i) for i in range(4)]
    expected = [output_and_gradient(operation.definition, value.clone().requires_grad_(), value) for value in values]
    inputs = [torch.zeros_like(value).requires_grad_() for value in values]
    results = [None] * len(values)
    output_and_gradient(operation.function, inputs[0], values[0])
    torch.cuda.synchronize()

    def run(index):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(SLOW // 10)
            with torch.no_grad():
                inputs[index].copy_(values[index])
            results[index] = output_and_gradient(operation.function, inputs[index], values[index])
        stream.synchronize()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(values))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ours, theirs in zip(results, expected, strict=True):
        assert_all_same(ours, theirs)


@pytest.mark.in_place
def test_nothing_synchronises(operation, gpu):
    """By torch's own account; that of the device is in the tests of slow streams."""
    input, grad = leaf(1000), patterns(1000)
    transposed = patterns(20, 50).t()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output_and_gradient(operation.function, input, grad)
        output_and_gradient(lambda x: operation.function_(x * 1), input, grad)
        output_and_gradient(operation.function, input.detach().view(50, 20).requires_grad_(), transposed)
        operation.function(input.detach())
        operation.module()(input)
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Devices


@pytest.mark.in_place
@pytest.mark.keeps_bits
@on_cuda
def test_device_that_is_not_the_current_one(operation, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    first, second = (torch.device(device, index) for index in range(2))
    torch.cuda.set_device(first)
    values, grads = numbers(3, 333), numbers(3, 333, seed=1)
    expected = output_and_gradient(operation.definition, values.clone().requires_grad_(), grads)
    for place in (second, first):
        for function in (operation.function, lambda x: operation.function_(x * 1)):
            input = values.to(place).requires_grad_()
            output, (bits,) = kept_by(function, input)
            (gradient,) = torch.autograd.grad(output, input, grads.to(place))
            assert output.device == bits.device == gradient.device == place
            assert torch.cuda.current_device() == first.index
            assert_all_same((output.detach().cpu(), gradient.cpu()), expected)


@pytest.mark.keeps_bits
@on_cuda
def test_operands_on_different_devices_are_refused(operation, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    grad, bits = torch.ones(9, device=f"{device}:1"), torch.zeros(2, dtype=torch.uint8, device=f"{device}:0")
    with pytest.raises(RuntimeError, match=r"bits must be .* on cuda:1.*on cuda:0"):
        operation.backward(grad, bits, [1])


def test_pinned_memory_is_the_cpus(operation, gpu):
    input = patterns(1000, device="cpu").pin_memory()
    output, expected = operation.function(input), operation.definition(input)
    assert (output.device.type, output.is_pinned()) == ("cpu", expected.is_pinned())
    assert_same(output, expected)
    assert_same(operation.function(input.cuda(non_blocking=True)).cpu(), expected)


# Launches


def kernels_of(function):
    """Names of the kernels that run, as the profiler sees them."""
    function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]


@pytest.mark.in_place
@over_dtypes
@pytest.mark.parametrize("count", [64, 2**24 + 3])
def test_one_kernel_each_way(operation, gpu, dtype, count):
    values, input, grad = (patterns(count, dtype=dtype) for _ in range(3))
    input.requires_grad_()
    if len(kernels_of(lambda: values.neg())) != 1:
        pytest.skip("the profiler does not see kernels here (CUPTI)")
    (forward,) = kernels_of(lambda: operation.function(values))
    assert "relu_ext::cuda::forward_kernel" in forward
    (in_place,) = kernels_of(lambda: operation.function_(values))
    assert "relu_ext::cuda::forward_kernel" in in_place
    with_bits, backward = kernels_of(lambda: output_and_gradient(operation.function, input, grad))
    assert "relu_ext::cuda::forward_kernel" in with_bits
    assert "relu_ext::cuda::backward_kernel" in backward
    assert with_bits != forward


# Memory


def requested():
    """Bytes that tensors have asked for, without what the allocator rounds them up to."""
    stats = torch.cuda.memory_stats()
    return SimpleNamespace(now=stats["requested_bytes.all.current"], peak=stats["requested_bytes.all.peak"])


@pytest.mark.in_place
@over_dtypes
@pytest.mark.parametrize("count", [1001, 2**24 + 3])
def test_memory_is_the_results_and_the_bits(operation, gpu, dtype, count):
    input, grad = leaf(count, dtype=dtype), patterns(count, dtype=dtype)
    tensor, bits = input.nbytes, (count + 7) // 8
    middle = input * 1
    torch.cuda.reset_peak_memory_stats()
    before = requested().now

    def extra():
        usage = requested()
        return usage.now - before, usage.peak - before

    output = operation.function(input)
    assert extra() == (tensor + bits, tensor + bits)
    node = output.grad_fn
    del output
    assert extra()[0] == bits
    result = node(grad)
    assert extra() == (bits + tensor, bits + tensor)
    del node, result
    assert extra()[0] == 0
    operation.function_(middle)
    assert extra()[0] == bits
    middle.backward(grad)
    assert input.grad is not None
    del middle
    # the gradient alone is new; the memory of `middle` has gone
    assert extra()[0] == 0


def test_peak_of_a_training_step(operation, gpu):
    """Where nobody else keeps the output: torch's peak less a tensor, plus the bits."""
    count = 2**22

    def peak(relu):
        input = leaf(count)
        torch.cuda.reset_peak_memory_stats()
        before = requested().now
        (relu(input) + 1).backward(torch.ones(count, device=gpu))
        return requested().peak - before

    assert peak(operation.definition) - peak(operation.function) == 4 * count - count // 8


@contextmanager
def little_memory(free):
    """In the block no more than this many bytes, rounded up to a step of the allocator's, can be had."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + free) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# Of two bytes each: 512 MiB a tensor, and 32 MiB of bits, for which no segment of other tensors has room left.
MANY = 2**28


@pytest.mark.parametrize("missing", ["output", "bits", "gradient"])
def test_out_of_memory_harms_nothing(operation, gpu, missing):
    need_memory(12 * 2 * MANY)
    input, grad = leaf(MANY, dtype=torch.bfloat16), patterns(MANY, dtype=torch.bfloat16)
    saved, version = input.detach().clone(), input._version
    held = operation.function(input) if missing == "gradient" else None
    before = requested().now
    with little_memory({"output": 2**20, "bits": 2 * MANY + 2**20, "gradient": 2**20}[missing]):
        with pytest.raises(torch.cuda.OutOfMemoryError):
            if missing == "gradient":
                torch.autograd.grad(held, input, grad, retain_graph=True)
            else:
                operation.function(input)
        assert requested().now == before
    assert torch.equal(input.detach().view(torch.int16), saved.view(torch.int16)) and input._version == version
    output = held if missing == "gradient" else operation.function(input)
    ours = output.detach(), torch.autograd.grad(output, input, grad)[0]
    assert_all_same(ours, output_and_gradient(operation.definition, saved.requires_grad_(), grad))


@pytest.mark.in_place
def test_out_of_memory_in_place_changes_nothing(operation, gpu):
    need_memory(12 * 2 * MANY)
    input = leaf(MANY, dtype=torch.bfloat16)
    middle = input * 1
    saved, version, node = middle.detach().clone(), middle._version, middle.grad_fn
    with little_memory(2**20), pytest.raises(torch.cuda.OutOfMemoryError):
        operation.function_(middle)
    assert (middle._version, middle.grad_fn) == (version, node)
    assert torch.equal(middle.detach().view(torch.int16), saved.view(torch.int16))
    operation.function_(middle)
    assert_same(middle.detach(), operation.definition(saved))
