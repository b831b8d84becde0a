"""The real CUDA kernels, run on the CPU by the emulator, against NumPy: every bit of what they write."""

import bisect
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from kernels import ACTIVATIONS, DTYPES, Kernels, Memory, build_library, names_of

KERNELS = Kernels(Path(os.environ.get("EMULATED_LIBRARY") or build_library("plain")))
STREAM = 0x5EA
VECTOR = 16  # bytes


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
    """Zero, smallest and largest subnormal, smallest normal, largest finite, infinity, three NaN; both signs."""
    fraction = dtype.infinity & -dtype.infinity
    infinity = dtype.infinity
    positive = [0, 1, fraction - 1, fraction, infinity - 1, infinity]
    positive += [infinity | 1, infinity | fraction >> 1, infinity | fraction - 1]
    return np.array(positive + [element | dtype.sign for element in positive], dtype.word)


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
        return activation.keep(dtype.values(elements))


def unpacked(bits, count):
    return np.unpackbits(bits, count=count, bitorder="little").astype(bool)


def launch_once(launcher, *arguments):
    before = KERNELS.launches
    assert launcher(*arguments, STREAM) == 0
    assert KERNELS.launches - before == (arguments[-1] > 0)
    assert arguments[-1] == 0 or KERNELS.last_launch.stream == STREAM


def check_forward(activation, dtype, elements, input_at=0, output_at=0, bits_at=0):
    """With and without bits, out of place and in place, the pointers so many bytes off a multiple of 16."""
    count = len(elements)
    keep = kept(activation, dtype, elements)
    expected, expected_bits = activation.forward(elements, keep), np.packbits(keep, bitorder="little")
    for in_place in (False, True):
        for with_bits in (False, True):
            input = Memory(elements, input_at)
            output = input if in_place else Memory.unwritten(count, dtype.word, output_at)
            bits = Memory.unwritten((count + 7) // 8, np.uint8, bits_at)
            address = bits.address if with_bits else None
            launch_once(KERNELS.forward, activation, dtype, input.address, output.address, address, count)
            np.testing.assert_array_equal(output.elements, expected)
            if not in_place:
                np.testing.assert_array_equal(input.elements, elements)
            unwritten = np.full_like(expected_bits, Memory.POISON)
            np.testing.assert_array_equal(bits.elements, expected_bits if with_bits else unwritten)
            assert input.intact() and output.intact() and bits.intact()


def check_backward(activation, dtype, elements, bits, grad_at=0, output_at=0, bits_at=0):
    """Out of place and in place, from these bits."""
    count = len(elements)
    expected = activation.backward(elements, unpacked(bits, count))
    for in_place in (False, True):
        grad, memory_of_bits = Memory(elements, grad_at), Memory(bits, bits_at)
        output = grad if in_place else Memory.unwritten(count, dtype.word, output_at)
        launch_once(KERNELS.backward, activation, dtype, grad.address, memory_of_bits.address, output.address, count)
        np.testing.assert_array_equal(output.elements, expected)
        if not in_place:
            np.testing.assert_array_equal(grad.elements, elements)
        np.testing.assert_array_equal(memory_of_bits.elements, bits)
        assert grad.intact() and output.intact() and memory_of_bits.intact()


def check(activation, dtype, count, elements_at=0, output_at=0, bits_at=0):
    check_forward(activation, dtype, random_elements(count, dtype), elements_at, output_at, bits_at)
    check_backward(
        activation, dtype, random_elements(count, dtype, 1), random_bits(count), elements_at, output_at, bits_at
    )


class Reserved:
    """Zeros for `count` elements and some more, which take memory only where they are touched."""

    AFTER = 64

    def __init__(self, count, dtype, at=0):
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
        self.map = mmap.mmap(-1, at + count * np.dtype(dtype).itemsize + self.AFTER, flags=flags)
        whole = np.frombuffer(self.map, np.uint8)
        self.elements = whole[at : at + count * np.dtype(dtype).itemsize].view(dtype)
        self.after = whole[at + self.elements.nbytes :]
        self.address = self.elements.ctypes.data


MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Python 3.13 names it


def check_blocks(activation, dtype, count, blocks, per_block, at=0):
    """Of tensors too large for a CPU, what these blocks do, forward with bits and backward.

    `at`: the elements' offset in bytes from a multiple of 16.
    """
    input, output, grad, grad_input = (Reserved(count, dtype.word, at) for _ in range(4))
    bits = Reserved((count + 7) // 8, np.uint8)
    spans = [slice(block * per_block, min((block + 1) * per_block, count)) for block in blocks]
    bytes_of = [slice(span.start // 8, (span.stop + 7) // 8) for span in spans]
    for seed, span in enumerate(spans):
        input.elements[span] = random_elements(span.stop - span.start, dtype, 2 * seed)
        grad.elements[span] = random_elements(span.stop - span.start, dtype, 2 * seed + 1)
    with KERNELS.only_blocks(blocks):
        launch_once(KERNELS.forward, activation, dtype, input.address, output.address, bits.address, count)
        assert KERNELS.last_launch.grid.x == -(-count // per_block)
        launch_once(KERNELS.backward, activation, dtype, grad.address, bits.address, grad_input.address, count)
    for span, of_bits in zip(spans, bytes_of, strict=True):
        keep = kept(activation, dtype, input.elements[span])
        np.testing.assert_array_equal(output.elements[span], activation.forward(input.elements[span], keep))
        np.testing.assert_array_equal(bits.elements[of_bits], np.packbits(keep, bitorder="little"))
        np.testing.assert_array_equal(grad_input.elements[span], activation.backward(grad.elements[span], keep))
    assert not (output.after.any() or bits.after.any() or grad_input.after.any())


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

    def takes_large(multiple):
        return per_block(dtype, multiple * large) == large

    return large * bisect.bisect_left(range(1, 2**30 // large), True, key=takes_large) + large


def test_every_name_is_here():
    assert [activation.name for activation in ACTIVATIONS] == names_of("Activation")
    assert {dtype.name for dtype in DTYPES} == set(names_of("Dtype"))


@pytest.mark.usefixtures("order")
def test_every_length_up_to_more_than_a_warp(activation, dtype):
    for count in range(32 * VECTOR // dtype.bytes + 2 * VECTOR):
        check(activation, dtype, count)


@pytest.mark.usefixtures("order")
def test_lengths_at_the_edges_of_blocks(activation, dtype):
    block = per_block(dtype, 2**16)
    for blocks in (1, 2, 5):
        for beside in (*range(-VECTOR - 1, VECTOR + 2), -block // 2 - 1, block // 2 + 1):
            check(activation, dtype, blocks * block + beside)


@pytest.mark.usefixtures("order")
def test_values(activation, dtype):
    count = 2**16
    elements = np.arange(count).astype(dtype.word) if dtype.bytes == 2 else random_elements(count, dtype)
    check_forward(activation, dtype, elements)
    check_backward(activation, dtype, elements, random_bits(count))
    check_backward(activation, dtype, elements, ~random_bits(count))


@pytest.mark.parametrize("count", [1, 100, 3001])
def test_pointers_at_any_element(activation, dtype, count):
    places = range(0, VECTOR, dtype.bytes)
    for elements_at in places:
        for output_at in {0, dtype.bytes, VECTOR - dtype.bytes, elements_at}:
            check(activation, dtype, count, elements_at, output_at, bits_at=(elements_at + output_at) % 3)


@pytest.mark.usefixtures("order")
def test_bits_at_any_byte(activation, dtype):
    for bits_at in range(VECTOR):
        check(activation, dtype, 3001, bits_at=bits_at)


def test_large_tile(activation, dtype):
    start = large_from(dtype)
    check(activation, dtype, start - 1)
    check(activation, dtype, start + 3001)


@pytest.mark.usefixtures("order")
def test_lengths_at_the_edges_of_large_tiles(activation, dtype):
    start = large_from(dtype)
    block = per_block(dtype, start)
    for beside in (0, 1, 7, 8, 9, VECTOR, 31 * VECTOR + 1, block // 2 + 3, block - 9, block - 1):
        blocks = start // block + (beside > 0)
        check_blocks(activation, dtype, start + beside, [0, 1, blocks - 2, blocks - 1], block)


@pytest.mark.parametrize("aligned", [True, False], ids=["aligned", "misaligned"])
def test_more_than_2_to_the_32_elements(activation, dtype, aligned):
    at = 0 if aligned else dtype.bytes
    block = per_block(dtype, 2**32, VECTOR + at)
    count = 2**32 + block + 13
    blocks = {element // block for element in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, count - 1)}
    check_blocks(activation, dtype, count, sorted(blocks), block, at)


def test_launches_from_several_threads(dtype):
    failures = []

    def work():
        try:
            for count in range(3000, 3020):
                check(ACTIVATIONS[0], dtype, count)
        except AssertionError as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
