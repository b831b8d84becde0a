"""The real CUDA kernels, run on the CPU by the emulator, against NumPy: every bit of what they write."""

import bisect
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from kernels import ACTIVATIONS, DTYPES, Kernels, Memory, Range, build_library, names_of, widened

KERNELS = Kernels(Path(os.environ.get("EMULATED_LIBRARY") or build_library("plain")))
STREAM = 0x5EA
VECTOR = 16  # bytes
MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python has it from 3.13 on


@pytest.fixture(params=ACTIVATIONS, ids=str)
def activation(request):
    return request.param


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


@pytest.fixture(params=["0", "1", "7"], ids=["forward", "backward", "shuffled"])
def order(request, monkeypatch):
    """Of threads and blocks."""
    monkeypatch.setenv("EMULATOR_ORDER", request.param)


def special_elements(dtype):
    """Zero, smallest and largest subnormal, smallest normal, largest finite, infinity, three NaN; both signs; kinks."""
    fraction = dtype.infinity & -dtype.infinity
    infinity = dtype.infinity
    positive = [0, 1, fraction - 1, fraction, infinity - 1, infinity]
    positive += [infinity | 1, infinity | fraction >> 1, infinity | fraction - 1]
    kinks = [dtype.rounded(scalar)[0] for activation in ACTIVATIONS for scalar in activation.scalars]
    return np.array(positive + [element | dtype.sign for element in positive] + kinks, dtype.word)


def random_elements(count, dtype, seed=0):
    """Any bit patterns, a third of them special."""
    random = np.random.default_rng([count, seed])
    elements = np.frombuffer(random.bytes(count * dtype.bytes), dtype.word).copy()
    places = random.permutation(count)[: count // 3]
    elements[places] = random.choice(special_elements(dtype), len(places))
    return elements


def random_bits(count, seed=0):
    return np.frombuffer(np.random.default_rng([count, seed]).bytes((count + 7) // 8), np.uint8)


def kept(activation, dtype, elements):
    with np.errstate(invalid="ignore"):
        return activation.keep(dtype, widened(dtype, elements))


def unpacked(bits, count):
    return np.unpackbits(bits, count=count, bitorder="little").astype(bool)


def assert_same(ours, expected):
    if not np.array_equal(ours, expected):  # assert_array_equal explains, but takes 0.1 ms
        np.testing.assert_array_equal(ours, expected)


def assert_elements(ours, expected, activation, dtype):
    """Every bit; but where the activation computes, any NaN for any other, or what a Range admits."""
    if isinstance(expected, Range):
        wrong = expected.wrong(dtype, ours)
        assert not wrong.any(), (dtype.values(ours)[wrong], expected.low[wrong], expected.high[wrong])
        return
    if activation.computes:
        ours, expected = (
            np.where(np.isnan(dtype.values(x)), dtype.word(dtype.infinity + 1), x) for x in (ours, expected)
        )
    assert_same(ours, expected)


def launch_once(launcher, *arguments):
    """By one kernel, or none for no elements, on the stream that was asked for."""
    before, count = KERNELS.launches, arguments[-1]
    assert launcher(*arguments, STREAM) == 0
    assert KERNELS.launches - before == (count > 0)
    assert count == 0 or KERNELS.last_launch.stream == STREAM


def whole(memory):
    return [slice(0, len(memory.elements))]


def bytes_of(span):
    return slice(span.start // 8, (span.stop + 7) // 8)


def check_forward(activation, dtype, input, output, bits, spans):
    """These spans of elements; output may be input, bits may be None."""
    elements = [input.elements[span].copy() for span in spans]
    address = None if bits is None else bits.address
    launch_once(KERNELS.forward, activation, dtype, input.address, output.address, address, len(input.elements))
    for span, before in zip(spans, elements, strict=True):
        keep = [kept(activation, dtype, before)] if activation.keep else []
        assert_elements(output.elements[span], activation.forward(dtype, before, *keep), activation, dtype)
        if bits is not None:
            assert_same(bits.elements[bytes_of(span)], np.packbits(*keep, bitorder="little"))
        if output is not input:
            assert_same(input.elements[span], before)
    assert all(memory is None or memory.intact() for memory in (input, output, bits))


def check_backward(activation, dtype, kept_as, grad, kept, output, spans):
    """These spans of elements; output may be grad."""
    kept_spans = [bytes_of(span) if kept_as == "bits" else span for span in spans]
    elements = [grad.elements[span].copy() for span in spans]
    kept_before = [kept.elements[span].copy() for span in kept_spans]
    addresses = grad.address, kept.address, output.address
    launch_once(KERNELS.backward, activation, dtype, kept_as, *addresses, len(grad.elements))
    for span, kept_span, before, other in zip(spans, kept_spans, elements, kept_before, strict=True):
        what = [unpacked(other, len(before))] if kept_as == "bits" else [other, kept_as]
        assert_elements(output.elements[span], activation.backward(dtype, before, *what), activation, dtype)
        assert_same(kept.elements[kept_span], other)
        if output is not grad:
            assert_same(grad.elements[span], before)
    assert all(memory.intact() for memory in (grad, kept, output))


def check(activation, dtype, elements, bits, elements_at=0, output_at=0, bits_at=0):
    """Out of place and in place, forward with and without bits, and backward from these bits or from elements.

    ..._at: how many bytes past a multiple of 16 the memory is. The same elements serve as input and as gradients, in
    reverse as what is kept.
    """
    for in_place in (False, True):
        for with_bits in (False, True) if activation.keep else (False,):
            input = Memory(elements, elements_at)
            output = input if in_place else Memory.unwritten(len(elements), dtype.word, output_at)
            written = Memory.unwritten(len(bits), np.uint8, bits_at) if with_bits else None
            check_forward(activation, dtype, input, output, written, whole(input))
        for kept_as in activation.kept:
            grad = Memory(elements, elements_at)
            output = grad if in_place else Memory.unwritten(len(elements), dtype.word, output_at)
            kept = (
                Memory(bits, bits_at) if kept_as == "bits" else Memory(elements[::-1], bits_at * dtype.bytes % VECTOR)
            )
            check_backward(activation, dtype, kept_as, grad, kept, output, whole(grad))


def check_length(activation, dtype, count, **places):
    check(activation, dtype, random_elements(count, dtype), random_bits(count), **places)


class Reserved:
    """As Memory, but zeros, which take memory only where they are touched."""

    BEHIND = 64

    def __init__(self, count, dtype, at=0):
        size = count * np.dtype(dtype).itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        whole = np.frombuffer(mmap.mmap(-1, at + size + self.BEHIND, flags=flags), np.uint8)
        self.elements = whole[at : at + size].view(dtype)
        self.behind = whole[at + size :]
        self.address = self.elements.ctypes.data

    def intact(self):
        return not self.behind.any()


def check_blocks(activation, dtype, count, blocks, per_block, at=0):
    """As check, but of many elements only those of these blocks, so that they cost next to nothing.

    at: how many bytes past a multiple of 16 elements are.
    """
    spans = [slice(block * per_block, min((block + 1) * per_block, count)) for block in blocks]
    input, output = (Reserved(count, dtype.word, at) for _ in range(2))
    bits = Reserved((count + 7) // 8, np.uint8) if activation.keep else None

    def fill(memory, seed=0):
        for span in spans:
            memory.elements[span] = random_elements(span.stop - span.start, dtype, seed=span.start + seed)

    with KERNELS.only_blocks(blocks):
        fill(input)
        check_forward(activation, dtype, input, output, None, spans)
        assert KERNELS.last_launch.grid.x == -(-count // per_block)
        if bits:
            check_forward(activation, dtype, input, output, bits, spans)
        kept = bits or Reserved(count, dtype.word, at)
        for kept_as in activation.kept:
            if kept_as != "bits":
                fill(input)
                fill(kept, seed=1)
            check_backward(activation, dtype, kept_as, input, kept, output, spans)
            check_backward(activation, dtype, kept_as, input, kept, input, spans)
        for bits_in_place in {None, bits}:
            fill(input)
            check_forward(activation, dtype, input, input, bits_in_place, spans)


def per_block(dtype, count, at=VECTOR):
    """Elements per block of a launch, asked of the launcher; count is a multiple of it."""
    with KERNELS.only_blocks([]):
        assert KERNELS.forward(ACTIVATIONS[0], dtype, at, at, None, count) == 0
    assert count % KERNELS.last_launch.grid.x == 0
    return count // KERNELS.last_launch.grid.x


def large_from(dtype):
    """The smallest count for which the launcher takes the larger of its tiles."""
    small, large = per_block(dtype, 2**16), per_block(dtype, 2**30)
    assert small < large
    counts = range(large, 2**30, large)
    return counts[bisect.bisect_left(counts, True, key=lambda count: per_block(dtype, count) == large)]


def test_every_name_is_here():
    assert {activation.name for activation in ACTIVATIONS} == set(names_of("Activation"))
    assert {dtype.name for dtype in DTYPES} == set(names_of("Dtype"))


@pytest.mark.usefixtures("order")
def test_every_length_up_to_more_than_a_warp(activation, dtype):
    for count in range(32 * VECTOR // dtype.bytes + 2 * VECTOR):
        check_length(activation, dtype, count)


@pytest.mark.usefixtures("order")
def test_lengths_at_the_edges_of_blocks(activation, dtype):
    block = per_block(dtype, 2**16)
    for blocks in (1, 2, 5):
        for beside in (*range(-VECTOR - 1, VECTOR + 2), -block // 2 - 1, block // 2 + 1):
            check_length(activation, dtype, blocks * block + beside)


@pytest.mark.usefixtures("order")
def test_every_value(activation, dtype):
    """Of 16 bits; of wider types as many random ones."""
    count = 2**16
    elements = np.arange(count).astype(dtype.word) if dtype.bytes == 2 else random_elements(count, dtype)
    for bits in (random_bits(count), ~random_bits(count)):
        check(activation, dtype, elements, bits)


@pytest.mark.parametrize("count", [1, 100, 3001])
def test_pointers_at_any_element(activation, dtype, count):
    for elements_at in range(0, VECTOR, dtype.bytes):
        for output_at in {0, dtype.bytes, VECTOR - dtype.bytes, elements_at}:
            check_length(activation, dtype, count, elements_at=elements_at, output_at=output_at)


@pytest.mark.usefixtures("order")
def test_bits_at_any_byte(activation, dtype):
    for bits_at in range(VECTOR):
        check_length(activation, dtype, 3001, bits_at=bits_at)


@pytest.mark.usefixtures("order")
def test_lengths_at_the_edges_of_large_tiles(activation, dtype):
    start = large_from(dtype)
    block = per_block(dtype, start)
    for beside in (0, 1, 7, 8, 9, VECTOR, 31 * VECTOR + 1, block // 2 + 3, block - 9, block - 1):
        last = (start + beside - 1) // block
        check_blocks(activation, dtype, start + beside, [0, 1, last - 1, last], block)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "misaligned"])
def test_more_than_2_to_the_32_elements(activation, dtype, aligned):
    at = 0 if aligned else dtype.bytes
    block = per_block(dtype, 2**32, VECTOR + at)
    count = 2**32 + block + 13
    blocks = {element // block for element in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, count - 1)}
    check_blocks(activation, dtype, count, sorted(blocks), block, at)


def test_every_block_around_the_change_of_tiles(activation, dtype):
    start = large_from(dtype)
    for count in (start - 1, start + 3001):
        elements = random_elements(count, dtype)
        bits = Memory.unwritten((count + 7) // 8, np.uint8) if activation.keep else None
        input, output = Memory(elements), Memory.unwritten(count, dtype.word)
        check_forward(activation, dtype, input, output, bits, whole(input))
        for kept_as in activation.kept:
            check_backward(activation, dtype, kept_as, input, bits or Memory(elements[::-1]), output, whole(input))


def test_launches_from_several_threads(activation, dtype):
    def work(first):
        for count in range(first, first + 20):
            check_length(activation, dtype, count)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(3000, 3080, 20)))
