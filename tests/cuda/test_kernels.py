"""The real CUDA kernels, run on the CPU by the emulator, against NumPy: every bit of what they write."""

import bisect
import itertools
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from kernels import (
    ACTIVATIONS,
    DTYPES,
    Count,
    Dropout,
    Fused,
    FusedBackward,
    Gated,
    GatedBackward,
    Kernels,
    Memory,
    NonFinite,
    Prelu,
    PreluBackward,
    Range,
    Rows,
    Stream,
    build_library,
    names_of,
    rectified,
    widened,
)

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


ORDERS = {"forward": "0", "backward": "1", "shuffled": "7"}


@pytest.fixture(params=ORDERS)
def order(request, monkeypatch):
    """Of threads and blocks."""
    monkeypatch.setenv("EMULATOR_ORDER", ORDERS[request.param])


# Threads that share bytes of bits might depend on it. The others exchange nothing.
in_every_order = pytest.mark.parametrize(
    "activation, order",
    [(activation, order) for activation in ACTIVATIONS for order in (ORDERS if activation.keep else ["forward"])],
    ids=str,
    indirect=["order"],
)


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


def assert_numbers(ours, expected, dtype):
    """Every bit, but any NaN for any other."""
    assert_same(*(np.where(np.isnan(dtype.values(x)), dtype.word(dtype.infinity + 1), x) for x in (ours, expected)))


def assert_elements(ours, expected, activation, dtype):
    """Every bit; but where the activation computes, any NaN for any other, or what a Range admits."""
    if isinstance(expected, Range):
        wrong = expected.wrong(dtype, ours)
        assert not wrong.any(), (dtype.values(ours)[wrong], expected.low[wrong], expected.high[wrong])
    elif activation.computes:
        assert_numbers(ours, expected, dtype)
    else:
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


@in_every_order
def test_every_length_up_to_more_than_a_warp(activation, order, dtype):
    for count in range(32 * VECTOR // dtype.bytes + 2 * VECTOR):
        check_length(activation, dtype, count)


@in_every_order
def test_lengths_at_the_edges_of_blocks(activation, order, dtype):
    block = per_block(dtype, 2**16)
    for blocks in (1, 2, 5):
        for beside in (*range(-VECTOR - 1, VECTOR + 2), -block // 2 - 1, block // 2 + 1):
            check_length(activation, dtype, blocks * block + beside)


@in_every_order
def test_every_value(activation, order, dtype):
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


@in_every_order
def test_bits_at_any_byte(activation, order, dtype):
    for bits_at in range(VECTOR):
        check_length(activation, dtype, 3001, bits_at=bits_at)


@in_every_order
def test_lengths_at_the_edges_of_large_tiles(activation, order, dtype):
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


@pytest.mark.parametrize("activation", [ACTIVATIONS[0], ACTIVATIONS[-1]], ids=str)
def test_every_block_around_the_change_of_tiles(activation, dtype):
    """Of a row that keeps bits and one that keeps elements: apart from that, neither the choice of a tile nor the
    division among blocks regards the activation."""
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


# Gated


def reglu(dtype, gate, up):
    with np.errstate(all="ignore"):
        return dtype.elements(rectified(widened(dtype, gate)) * widened(dtype, up))


def reglu_gradients(dtype, grad, gate, up):
    with np.errstate(all="ignore"):
        product = dtype.elements(widened(dtype, grad) * widened(dtype, up))
        to_gate = np.where(widened(dtype, gate) <= 0, dtype.word(0), product)
        return to_gate, reglu(dtype, gate, grad)


class Table:
    """numel elements in rows, apart or not, in a Memory or Reserved; their places there in `place`."""

    def __init__(self, make, numel, columns, stride, dtype, at=0, spans=None):
        rows = -(-numel // columns)
        self.memory = make((rows - 1) * stride + numel - (rows - 1) * columns, dtype, at)
        element = np.concatenate([np.arange(span.start, span.stop) for span in spans or [slice(0, numel)]])
        self.place = element // columns * stride + element % columns
        self.rows = Rows(self.memory.address, stride)

    @property
    def elements(self):
        return self.memory.elements[self.place]

    def fill(self, dtype, seed):
        self.memory.elements[self.place] = random_elements(len(self.place), dtype, seed)
        return self

    def untouched(self):
        """Between the rows and around them."""
        between = np.ones(len(self.memory.elements), bool)
        between[self.place] = False
        poison = self.memory.elements[between].view(np.uint8)
        return self.memory.intact() and bool((poison == Memory.POISON).all())


def unwritten(count, dtype, at):
    return Memory.unwritten(count, dtype.word, at)


def check_gated(dtype, numel, columns, strides, at=(0, 0, 0), make=unwritten, spans=None):
    """Both ways; strides and at are those of gate and grad_gate, up and grad_up, output and grad."""
    shapes = list(zip(strides, at, strict=True))

    def table(which):
        stride, place = shapes[which]
        return Table(make, numel, columns, stride, dtype, place, spans)

    gate, up, output, grad = (table(which) for which in (0, 1, 2, 2))
    for seed, filled in enumerate((gate, up, grad)):
        filled.fill(dtype, seed)
    before = gate.elements, up.elements, grad.elements
    launch_once(launcher("gated"), Gated(dtype.code, columns, gate.rows, up.rows, output.rows), numel)
    assert_numbers(output.elements, reglu(dtype, *before[:2]), dtype)
    written = [output]
    for wanted in ((True, True), (True, False), (False, True)):
        gradients = [table(which) if wanted[which] else None for which in range(2)]
        targets = [gradient.rows if gradient else Rows() for gradient in gradients]
        work = GatedBackward(dtype.code, columns, grad.rows, gate.rows, up.rows if wanted[0] else Rows(), *targets)
        launch_once(launcher("gated_backward"), work, numel)
        expected = reglu_gradients(dtype, before[2], *before[:2])
        for gradient, right in zip(gradients, expected, strict=True):
            if gradient:
                assert_numbers(gradient.elements, right, dtype)
                written.append(gradient)
    for table, same in zip((gate, up, grad), before, strict=True):
        assert_same(table.elements, same)
    if make is unwritten:
        assert all(table.untouched() for table in (gate, up, grad, *written))
    return written


def launcher(name):
    return lambda *arguments: KERNELS.launch(name, *arguments)


def test_gated_rows(dtype):
    """Of vectors and of parts of one, apart by so many of either, in any number."""
    lanes = VECTOR // dtype.bytes
    for columns in (1, 3, lanes, lanes + 1, 5 * lanes, 33 * lanes, 700):
        for rows in (1, 2, 37):
            for gap in (0, lanes, columns, 1):
                strides = [columns + gap, columns + gap, columns]
                check_gated(dtype, rows * columns, columns, strides)
    for strides in ([96, 96, 97], [96, 97, 96], [97, 96, 96], [96, 104, 112]):
        check_gated(dtype, 30 * 96, 96, strides)


def test_gated_lengths_of_one_row(dtype):
    """A dense tensor: vectors whatever its length."""
    for numel in (*range(1, 40), 511, 2047, 2048, 2049, 4096, 8191, 8193):
        check_gated(dtype, numel, numel, [numel] * 3)


def test_gated_pointers_at_any_element(dtype):
    for at in [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)]:
        for columns in (64, 1001):
            check_gated(dtype, 5 * columns, columns, [2 * columns] * 3, [dtype.bytes * place for place in at])
            check_gated(dtype, columns, columns, [columns] * 3, [dtype.bytes * place for place in at])


@pytest.mark.parametrize("columns", [1024, 1001])
def test_gated_more_than_2_to_the_32_elements(dtype, columns):
    lanes = VECTOR // dtype.bytes if columns == 1024 else 1
    per_block = 256 * 2 * lanes
    numel = (2**32 // columns + 9) * columns
    elements = 0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, numel - 1
    blocks = sorted({element // per_block for element in elements})
    spans = [slice(block * per_block, min((block + 1) * per_block, numel)) for block in blocks]

    def reserved(count, dtype, at):
        return Reserved(count, dtype.word, at)

    with KERNELS.only_blocks(blocks):
        written = check_gated(dtype, numel, columns, [2 * columns] * 3, make=reserved, spans=spans)
    assert KERNELS.last_launch.grid.x == -(-numel // per_block)
    assert all(table.memory.intact() for table in written)


def test_gated_nothing(dtype):
    work = Gated(dtype.code, 1, Rows(VECTOR, 1), Rows(VECTOR, 1), Rows(VECTOR, 1))
    launch_once(launcher("gated"), work, 0)
    launch_once(launcher("gated_backward"), GatedBackward(dtype.code, 1, *[Rows(VECTOR, 1)] * 5), 0)


# prelu: (repetitions, channels, inner)

LANES = 8  # of the narrowest type; multiples of it divide into vectors of each

SHAPES = [
    *[(1, 1, numel) for numel in (1, 2, 7, 8, 9, 255, 1024, 4097, 20001)],  # a single weight
    *[(5, 1, 40), (3, 2, 1), (700, 3, 1), (1300, 8, 1), (37, 24, 1), (129, 264, 1), (3, 1000, 1), (9, 33, 1)],
    *[(4, 3, 2), (90, 8, 4), (11, 5, 7), (257, 2, 31), (70, 5, 31)],  # columns of a channel's neighbours
    *[(2, 3, 32), (13, 5, 49), (3, 2, 64), (2, 3, 4100), (5, 2, 2040), (1, 3, 5001), (40, 3, 33)],
]


def normal_elements(count, dtype, seed):
    values = np.random.default_rng([count, seed, 1]).standard_normal(count)
    return dtype.elements(values.astype(dtype.arithmetic))


def channel_of(shape, element):
    _, channels, inner = shape
    return element // inner % channels


def sloped(dtype, elements, keep, slopes):
    with np.errstate(all="ignore"):
        scaled = dtype.elements(widened(dtype, elements) * widened(dtype, slopes))
    return np.where(keep, elements, scaled)


def is_positive(dtype, elements):
    with np.errstate(invalid="ignore"):
        return widened(dtype, elements) > 0


def prelu_work(kind, dtype, shape, *memories):
    _, channels, inner = shape
    return kind(dtype.code, channels, inner, *(memory and memory.address for memory in memories))


def check_prelu(dtype, shape, elements, at=0, output_at=0, weight_at=0):
    """Forward with bits and without, from bits out of place and in place."""
    numel = len(elements)
    weight = Memory(random_elements(shape[1], dtype, seed=2), weight_at)
    slopes = weight.elements[channel_of(shape, np.arange(numel))]
    keep = is_positive(dtype, elements)
    input = Memory(elements, at)
    for bits in (None, Memory.unwritten((numel + 7) // 8, np.uint8)):
        output = unwritten(numel, dtype, output_at)
        launch_once(launcher("prelu"), prelu_work(Prelu, dtype, shape, input, weight, output, bits), numel)
        assert_numbers(output.elements, sloped(dtype, elements, keep, slopes), dtype)
        assert all(memory is None or memory.intact() for memory in (input, weight, output, bits))
    assert_same(bits.elements, np.packbits(keep, bitorder="little"))
    for target in (unwritten(numel, dtype, output_at), input):
        work = prelu_work(PreluBackward, dtype, shape, input, None, bits, weight, target, None)
        launch_once(lambda work, *rest: KERNELS.prelu_backward(work, rest[0], None, *rest[1:]), work, numel)
        assert_numbers(target.elements, sloped(dtype, elements, keep, slopes), dtype)
        assert target.intact()


def run_prelu_gradients(dtype, shape, grad, input, weight, output, grad_weight):
    """By one kernel, or two where sums are wanted."""
    work = prelu_work(PreluBackward, dtype, shape, grad, input, None, weight, output, grad_weight)
    numel, before = len(grad.elements), KERNELS.launches
    workspace = Memory.unwritten(KERNELS.workspace("prelu", work, numel), np.uint8)
    assert KERNELS.prelu_backward(work, numel, workspace.address, STREAM) == 0
    assert KERNELS.launches - before == (1 if grad_weight is None else 2)
    assert KERNELS.last_launch.stream == STREAM
    memories = grad, input, weight, output, grad_weight, workspace
    assert all(memory is None or memory.intact() for memory in memories)


# Of a sum: up to 64 items of a thread, 7 additions between lanes, 8 between threads, and one for the product; the parts
# are joined in float64. Each rounding is at most half a unit in the last place of the sum of magnitudes.
MOST_ROUNDINGS = 64 + 7 + 8 + 1


def assert_sums(dtype, shape, terms, ours):
    """terms: long double, one an element."""
    channel = channel_of(shape, np.arange(len(terms)))
    exact, magnitude = np.zeros(shape[1], np.longdouble), np.zeros(shape[1], np.longdouble)
    np.add.at(exact, channel, terms)
    np.add.at(magnitude, channel, abs(terms))
    off = MOST_ROUNDINGS * np.finfo(dtype.arithmetic).eps / 2 * magnitude
    wrong = Range(exact - off, exact + off).wrong(dtype, ours)
    assert not wrong.any(), (dtype.values(ours)[wrong], exact[wrong], off[wrong])


def slope_terms(dtype, grad, input):
    terms = widened(dtype, grad).astype(np.longdouble) * widened(dtype, input)
    return np.where(is_positive(dtype, input), 0, terms)


def check_prelu_gradients(dtype, shape, at=0, other_at=0, make=normal_elements):
    """All of what may be wanted; of the sums their bits, which are the same each time."""
    numel = int(np.prod(shape))
    elements = [make(numel, dtype, seed) for seed in range(2)]
    grad, input = Memory(elements[0], at), Memory(elements[1], other_at)
    weight = Memory(normal_elements(shape[1], dtype, 2), dtype.bytes)
    slopes = weight.elements[channel_of(shape, np.arange(numel))]
    expected = sloped(dtype, elements[0], is_positive(dtype, elements[1]), slopes)
    sums = []
    for with_output in (True, False):
        for with_weight in (True, False):
            output = unwritten(numel, dtype, at) if with_output else None
            grad_weight = unwritten(shape[1], dtype, other_at) if with_weight else None
            run_prelu_gradients(dtype, shape, grad, input, weight, output, grad_weight)
            if with_output:
                assert_numbers(output.elements, expected, dtype)
            if with_weight:
                sums.append(grad_weight.elements.copy())
    assert_same(*sums)
    grad_weight = unwritten(shape[1], dtype, 0)
    run_prelu_gradients(dtype, shape, grad, input, weight, grad, grad_weight)  # in place
    assert_numbers(grad.elements, expected, dtype)
    assert_same(grad_weight.elements, sums[0])
    assert_same(input.elements, elements[1])
    if make is normal_elements:
        assert_sums(dtype, shape, slope_terms(dtype, *elements), sums[0])
    return sums[0]


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prelu(dtype, shape):
    check_prelu(dtype, shape, random_elements(int(np.prod(shape)), dtype))


@pytest.mark.parametrize("shape", [(1, 1, 1001), (30, 24, 1), (3, 2, 64), (11, 5, 7)], ids=str)
def test_prelu_pointers_at_any_element(dtype, shape):
    elements = random_elements(int(np.prod(shape)), dtype)
    for at in [(1, 0, 0), (0, 1, 0), (0, 0, 1)]:
        check_prelu(dtype, shape, elements, *(dtype.bytes * place for place in at))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_prelu_gradients(dtype, shape, monkeypatch):
    """The sums' bits whatever the order of threads and blocks, and wherever the memory is."""
    sums = []
    for number in "017":
        monkeypatch.setenv("EMULATOR_ORDER", number)
        sums.append(check_prelu_gradients(dtype, shape))
    for at, other_at in [(dtype.bytes, 0), (0, dtype.bytes)]:
        sums.append(check_prelu_gradients(dtype, shape, at, other_at))
    for other in sums[1:]:
        assert_same(other, sums[0])


@pytest.mark.parametrize("shape", [(5, 1, 40), (37, 24, 1), (70, 5, 31), (13, 5, 49)], ids=str)
def test_prelu_gradients_of_any_number(dtype, shape):
    check_prelu_gradients(dtype, shape, make=random_elements)


@pytest.mark.parametrize("shape", [(2**18 + 5, 8, 1), (2**19 + 1, 3, 1), (1, 1, 2**21 + 3), (3, 2, 2**18 + 1)], ids=str)
def test_prelu_sums_of_many(shape):
    """In float16, so that vectors are as wide as they come."""
    dtype = next(dtype for dtype in DTYPES if dtype.name == "float16")
    numel = int(np.prod(shape))
    elements = [normal_elements(numel, dtype, seed) for seed in range(2)]
    grad, input = map(Memory, elements)
    weight, grad_weight = unwritten(shape[1], dtype, 0), unwritten(shape[1], dtype, 0)
    run_prelu_gradients(dtype, shape, grad, input, weight, None, grad_weight)
    assert_sums(dtype, shape, slope_terms(dtype, *elements), grad_weight.elements)


@pytest.mark.parametrize("place", [0, 77, -1])
@pytest.mark.parametrize("shape", [(1, 1, 5000), (137, 24, 1), (70, 5, 31), (13, 5, 49)], ids=str)
def test_prelu_nan_reaches_the_sum_of_its_channel(dtype, shape, place):
    numel = int(np.prod(shape))
    grad, input = (Memory(normal_elements(numel, dtype, seed)) for seed in range(2))
    input.elements[place] = dtype.infinity + 1
    weight, grad_weight = Memory(normal_elements(shape[1], dtype, 2)), unwritten(shape[1], dtype, 0)
    run_prelu_gradients(dtype, shape, grad, input, weight, None, grad_weight)
    is_its = np.arange(shape[1]) == channel_of(shape, place % numel)
    assert_same(np.isnan(dtype.values(grad_weight.elements)), is_its)


def test_prelu_of_nothing(dtype):
    """No elements: no gradient, and sums of 0."""
    shape, none = (0, 3, 1), unwritten(0, dtype, 0)
    weight, grad_weight = Memory(normal_elements(3, dtype, 0)), unwritten(3, dtype, 0)
    launch_once(launcher("prelu"), prelu_work(Prelu, dtype, shape, none, weight, none, None), 0)
    work = prelu_work(PreluBackward, dtype, shape, none, none, None, weight, none, grad_weight)
    assert KERNELS.workspace("prelu", work, 0) == 0
    assert KERNELS.prelu_backward(work, 0, None, STREAM) == 0
    assert not grad_weight.elements.any()


@pytest.mark.parametrize("channels", [1, 256, 255])
def test_prelu_more_than_2_to_the_32_elements(dtype, channels):
    """Blocks have neighbouring elements: those of a single channel, and all of some repetitions."""
    numel = (2**32 // channels + 9) * channels
    shape = (1, 1, numel) if channels == 1 else (numel // channels, channels, 1)
    input, output = (Reserved(numel, dtype.word) for _ in range(2))
    weight = Memory(normal_elements(channels, dtype, 2))

    def check(run, per_block):
        blocks = {element // per_block for element in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, numel - 1)}
        spans = [slice(block * per_block, min((block + 1) * per_block, numel)) for block in sorted(blocks)]
        for span in spans:
            input.elements[span] = normal_elements(span.stop - span.start, dtype, span.start)
        with KERNELS.only_blocks(blocks):
            assert run() == 0
        assert KERNELS.last_launch.grid.x == -(-numel // per_block)
        for span in spans:
            elements = input.elements[span]
            slopes = weight.elements[channel_of(shape, np.arange(span.start, span.stop))]
            assert_numbers(output.elements[span], sloped(dtype, elements, is_positive(dtype, elements), slopes), dtype)
        assert output.intact()

    work = prelu_work(Prelu, dtype, shape, input, weight, output, None)
    check(
        lambda: KERNELS.launch("prelu", work, numel, STREAM),
        (1024 if dtype.bytes == 8 else 512) * VECTOR // dtype.bytes,
    )
    if channels == 255:  # each block has some of the columns
        return
    both = prelu_work(PreluBackward, dtype, shape, input, input, None, weight, output, None)
    with KERNELS.only_blocks([]):
        assert KERNELS.prelu_backward(both, numel, None, STREAM) == 0
    columns_a_block = min(32, channels * dtype.bytes // VECTOR)
    if channels == 1 or columns_a_block * VECTOR == channels * dtype.bytes:
        unit = VECTOR // dtype.bytes if channels == 1 else channels
        items = -(-numel // unit)
        part = -(-items // KERNELS.last_launch.grid.x)
        check(lambda: KERNELS.prelu_backward(both, numel, None, STREAM), part * unit)


# An activation fused with its neighbours: relu, with shapes as for prelu

PARTS = [("scale", "shift", "residual"), ("scale", "shift"), ("shift",), ("residual",)]
FUSED_SHAPES = [
    *[(1, 1, 1), (1, 1, 4097), (5, 1, 40), (3, 2, 64), (2, 3, 4100)],  # one channel to a vector
    *[(37, 24, 1), (129, 264, 1), (3, 520, 1)],  # consecutive channels
    *[(700, 3, 1), (90, 8, 4), (11, 5, 7), (13, 5, 49)],  # any
]
RELU = ACTIVATIONS[0]


def address(memory):
    return memory and memory.address


def fused_work(
    dtype, shape, *, input, output, scale=None, shift=None, residual=None, multiply_add=False, dropout=None, bits=None
):
    operands = *map(address, (input, scale, shift, residual)), multiply_add
    targets = map(address, (output, bits))
    return Fused(RELU.code, RELU.scalars, dtype.code, *shape[1:], *operands, dropout or Dropout(), *targets)


def sum_of_parts(dtype, shape, elements, multiply_add):
    """The two ends of what relu may be given, in `arithmetic`: one number but for a multiply-add."""
    X, channel = dtype.arithmetic, channel_of(shape, np.arange(len(elements["input"])))
    values = {name: widened(dtype, given) for name, given in elements.items()}
    ends = [values["input"]] * 2
    with np.errstate(all="ignore"):
        shift = values["shift"][channel] if "shift" in values else X(0)
        if "scale" in values:
            product = values["input"].astype(np.longdouble if multiply_add else X) * values["scale"][channel]
            off = abs(product) * np.finfo(X).eps / 2 * 1.01 + np.finfo(X).smallest_subnormal
            off = np.where(np.isfinite(off) & multiply_add, off, 0)
            ends = [(product + sign * off + shift).astype(X) for sign in (-1, 1)]
        elif "shift" in values:
            ends = [end + shift for end in ends]
        if "residual" in values:
            ends = [end + values["residual"] for end in ends]
    return ends


def check_fused(dtype, shape, elements, at=None, in_place=None):
    """With bits and without. at: how many bytes past a multiple of 16 the memory of a name is."""
    at, numel = at or {}, len(elements["input"])
    both = (False, True) if "scale" in elements else (False,)
    for multiply_add, has_bits in itertools.product(both, (False, True)):
        low, high = sum_of_parts(dtype, shape, elements, multiply_add)
        bits = unwritten_bits(numel, at.get("bits", 0)) if has_bits else None
        memories = {name: Memory(given, at.get(name, 0)) for name, given in elements.items()}
        output = memories[in_place] if in_place else unwritten(numel, dtype, at.get("output", 0))
        work = fused_work(dtype, shape, **memories, multiply_add=multiply_add, output=output, bits=bits)
        launch_once(launcher("fused"), work, numel)
        if multiply_add:
            wrong = Range(rectified(low), rectified(high)).wrong(dtype, output.elements)
            assert not wrong.any(), (dtype.values(output.elements)[wrong], low[wrong], high[wrong])
        else:
            with np.errstate(over="ignore"):
                assert_numbers(output.elements, dtype.elements(rectified(low)), dtype)
        if bits:
            assert_same(bits.elements, np.packbits(kept(RELU, dtype, output.elements), bitorder="little"))
        assert all(memory is None or memory.intact() for memory in (*memories.values(), output, bits))
        for name, given in elements.items():
            if name != in_place:
                assert_same(memories[name].elements, given)


def unwritten_bits(numel, at=0):
    return Memory.unwritten((numel + 7) // 8, np.uint8, at)


def fused_elements(dtype, shape, parts, make=random_elements):
    """Those of the channels are ordinary numbers, so that what is special of the others is not lost in them."""
    numel = int(np.prod(shape))
    elements = {"input": make(numel, dtype, 0)}
    for seed, name in enumerate(parts, 1):
        elements[name] = make(numel, dtype, seed) if name == "residual" else normal_elements(shape[1], dtype, seed)
    return elements


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
def test_fused(dtype, shape, parts):
    check_fused(dtype, shape, fused_elements(dtype, shape, parts))


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_fused_numbers_near_each_other(dtype, parts):
    """Whose sum may be 0 or next to it."""
    shape = (50, 24, 1)
    elements = fused_elements(dtype, shape, parts, normal_elements)
    others = elements["residual"] if "residual" in parts else elements["shift"][channel_of(shape, np.arange(1200))]
    elements["input"][::3] = others[::3] ^ dtype.word(dtype.sign)
    check_fused(dtype, shape, elements)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("parts", [PARTS[0], PARTS[3]], ids="+".join)
def test_fused_in_every_order(dtype, parts):
    check_fused(dtype, (9, 264, 1), fused_elements(dtype, (9, 264, 1), parts))


def lengths_at_edges(dtype, vectors):
    """Of blocks with so many vectors a thread, and of what is smaller."""
    lanes = VECTOR // dtype.bytes
    block = 256 * vectors * lanes
    around = [*range(-2, 3), -lanes, lanes + 1, 33 * lanes - 1]
    return [*range(1, 2 * VECTOR, 3), *(blocks * block + beside for blocks in (1, 2) for beside in around)]


@pytest.mark.parametrize("parts", [("shift",), ("residual",)], ids="+".join)
def test_fused_lengths(dtype, parts):
    for count in lengths_at_edges(dtype, 4 if dtype.bytes == 8 else 2):
        check_fused(dtype, (1, 1, count), fused_elements(dtype, (1, 1, count), parts))


@pytest.mark.parametrize("parts", PARTS, ids="+".join)
def test_fused_pointers_at_any_element(dtype, parts):
    for shape in [(30, 24, 1), (3, 2, 64)]:
        elements = fused_elements(dtype, shape, parts)
        for name in (*elements, "output", "bits"):
            check_fused(dtype, shape, elements, {name: 1 if name == "bits" else dtype.bytes})
        for in_place in {"input", "residual"} & set(elements):
            check_fused(dtype, shape, elements, in_place=in_place)


def philox(seed, offset, groups):
    """Philox4x32-7: four words a group."""
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    groups = np.asarray(groups, np.uint64)
    counter = [
        groups & low,
        groups >> shift,
        *(np.full_like(groups, half) for half in (offset & 0xFFFFFFFF, offset >> 32)),
    ]
    key = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(7):
        first, second = counter[0] * np.uint64(0xD2511F53), counter[2] * np.uint64(0xCD9E8D57)
        left = (second >> shift) ^ counter[1] ^ np.uint64(key[0])
        right = (first >> shift) ^ counter[3] ^ np.uint64(key[1])
        counter = [left, second & low, right, first & low]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(counter, axis=-1).astype(np.uint32)


@pytest.mark.parametrize(
    "seed, offset, group, words",
    [
        (0, 0, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (2**64 - 1, 2**64 - 1, 2**64 - 1, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88, "4dfccaba 190a87f0 c47362ba b6b5242a"),
    ],
)
def test_philox_is_the_published_one(seed, offset, group, words):
    """The known answers of its authors' library, Random123."""
    assert_same(philox(seed, offset, [group])[0], np.array([int(word, 16) for word in words.split()], np.uint32))


def random_numbers(seed, offset, first, count):
    """Of elements first to first + count - 1; first is a multiple of 8."""
    return philox(seed, offset, np.arange(first // 8, (first + count + 7) // 8)).view(np.uint16).reshape(-1)[:count]


def dropped(dtype, elements, keep, factor):
    with np.errstate(all="ignore"):
        scaled = dtype.elements(widened(dtype, elements) * dtype.arithmetic(factor))
    return np.where(keep, scaled, dtype.word(0))


def check_dropout(dtype, elements, seed, offset, last, factor, at=None, captured=False, in_place=False):
    at, count = at or {}, len(elements)
    keep = kept(RELU, dtype, elements) & (random_numbers(seed, offset, 0, count) <= last)
    cells = [Memory(np.array([number], np.int64)) for number in (seed, 3)]
    stream = Stream(99, offset - 3, *map(address, cells)) if captured else Stream(seed, offset)
    for bits in (None, unwritten_bits(count, at.get("bits", 0))):
        input = Memory(elements, at.get("input", 0))
        output = input if in_place else unwritten(count, dtype, at.get("output", 0))
        dropout = Dropout(stream, last, factor)
        work = fused_work(dtype, (0, 0, 0), input=input, output=output, dropout=dropout, bits=bits)
        launch_once(launcher("fused"), work, count)
        assert_numbers(output.elements, dropped(dtype, elements, keep, factor), dtype)
        if bits:
            assert_same(bits.elements, np.packbits(keep, bitorder="little"))
        assert all(memory is None or memory.intact() for memory in (input, output, bits))


SEED, OFFSET = 0x1234_5678_9ABC_DEF1, 0x3_0000_0004


@pytest.mark.parametrize("last, factor", [(0, 65536.0), (0x7FFF, 2.0), (0xE665, 1 / 0.9), (0xFFFF, 1.0)])
def test_dropout(dtype, last, factor):
    """Of any bit patterns; what is dropped is 0, infinities and NaN too."""
    elements = random_elements(5001, dtype)
    for captured in (False, True):
        check_dropout(dtype, elements, SEED, OFFSET, last, factor, captured=captured)


def test_dropout_keeps_the_last_number(dtype):
    elements = normal_elements(64, dtype, 0)
    places = np.flatnonzero(kept(RELU, dtype, elements))[:8]
    for number in random_numbers(SEED, OFFSET, 0, 64)[places]:
        check_dropout(dtype, elements, SEED, OFFSET, int(number), 1.5)


@pytest.mark.usefixtures("order")
def test_dropout_in_every_order(dtype):
    check_dropout(dtype, random_elements(5001, dtype), 7, 0, 0x7FFF, 2.0)


def test_dropout_lengths_and_places(dtype):
    for count in lengths_at_edges(dtype, 4 if dtype.bytes == 8 else 2):
        check_dropout(dtype, random_elements(count, dtype), 7, 0, 0x7FFF, 2.0)
    elements = random_elements(3001, dtype)
    for name in ("input", "output", "bits"):
        check_dropout(dtype, elements, 7, 0, 0x7FFF, 2.0, {name: 1 if name == "bits" else dtype.bytes}, True)
    check_dropout(dtype, elements, 7, 0, 0x7FFF, 2.0, in_place=True)


def masked_gradient(dtype, grad, keep, factor=0.0):
    return dropped(dtype, grad, keep, factor) if factor else np.where(keep, grad, dtype.word(0))


def times(dtype, elements, factors):
    with np.errstate(all="ignore"):
        return dtype.elements(widened(dtype, elements) * widened(dtype, factors))


def run_fused_gradients(dtype, shape, kept_as, numel, factor=0.0, **memories):
    """By one kernel, or two where sums are wanted, or none."""
    names = ["grad", "kept", "input", "scale", "factor", "grad_input", "grad_residual", "grad_scale", "grad_shift"]
    values = [factor if name == "factor" else address(memories.get(name)) for name in names]
    how = names_of("Kept").index(kept_as)
    work = FusedBackward(RELU.code, RELU.scalars, dtype.code, *shape[1:], how, *values)
    workspace = Memory.unwritten(KERNELS.workspace("fused", work, numel), np.uint8)
    before = KERNELS.launches
    assert KERNELS.launch_sums("fused", work, numel, workspace.address, STREAM) == 0
    elementwise = any(memories.get(name) for name in ("grad_input", "grad_residual")) and numel > 0
    sums = any(memories.get(name) for name in ("grad_scale", "grad_shift"))
    assert KERNELS.launches - before == ((1 + (numel > 0)) if sums else elementwise)
    assert (not sums and not elementwise) or KERNELS.last_launch.stream == STREAM
    assert workspace.intact() and all(memory.intact() for memory in memories.values())


ALL_GRADIENTS = ("grad_input", "grad_residual", "grad_scale", "grad_shift")
# With a scale, and without.
WANTED = [
    *[
        (True, ALL_GRADIENTS),
        (True, ("grad_input", "grad_scale", "grad_shift")),
        (True, ("grad_input", "grad_residual")),
    ],
    *[
        (True, ("grad_input",)),
        (True, ("grad_residual",)),
        (True, ("grad_scale",)),
        (True, ("grad_residual", "grad_shift")),
    ],
    *[(False, ("grad_input", "grad_shift")), (False, ("grad_input",)), (False, ("grad_shift",))],
]


class Gradients:
    """What backward is given, and what it must give for it."""

    def __init__(self, dtype, shape, kept_as, make=normal_elements, factor=0.0):
        self.dtype, self.shape, self.kept_as, self.factor = dtype, shape, kept_as, factor
        numel = int(np.prod(shape))
        self.grad, self.input = (make(numel, dtype, seed) for seed in range(2))
        self.scale = normal_elements(shape[1], dtype, 2)
        self.kept = random_bits(numel) if kept_as == "bits" else make(numel, dtype, 3)
        keep = unpacked(self.kept, numel) if kept_as == "bits" else kept(RELU, dtype, self.kept)
        self.masked = masked_gradient(dtype, self.grad, keep, factor)
        self.scaled = times(dtype, self.masked, self.scale[channel_of(shape, np.arange(numel))])

    def run(self, wanted, with_scale, at=None, in_place=None):
        """The elements of what is wanted. at: as for check_fused."""
        at, numel = at or {}, len(self.grad)
        given = {"grad": self.grad, "kept": self.kept}
        if with_scale and "grad_input" in wanted:
            given["scale"] = self.scale
        if "grad_scale" in wanted:
            given["input"] = self.input
        memories = {name: Memory(elements, at.get(name, 0)) for name, elements in given.items()}
        for name in wanted:
            count = self.shape[1] if name in ("grad_scale", "grad_shift") else numel
            memories[name] = memories["grad"] if name == in_place else unwritten(count, self.dtype, at.get(name, 0))
        run_fused_gradients(self.dtype, self.shape, self.kept_as, numel, self.factor, **memories)
        for name, elements in given.items():
            if not (in_place and name == "grad"):
                assert_same(memories[name].elements, elements)
        return {name: memories[name].elements.copy() for name in wanted}

    def check(self, wanted, with_scale, at=None, in_place=None):
        """Returns the sums, of which no more is asked than that they are near."""
        got = self.run(wanted, with_scale, at, in_place)
        for name, elements in got.items():
            if name in ("grad_input", "grad_residual"):
                right = self.scaled if with_scale and name == "grad_input" else self.masked
                assert_numbers(elements, right, self.dtype)
        return {name: got[name] for name in got if name in ("grad_scale", "grad_shift")}

    def check_sums(self, sums):
        masked = widened(self.dtype, self.masked).astype(np.longdouble)
        terms = {"grad_shift": masked, "grad_scale": masked * widened(self.dtype, self.input)}
        for name, ours in sums.items():
            assert_sums(self.dtype, self.shape, terms[name], ours)


@pytest.fixture(params=["bits", "output"])
def kept_as(request):
    return request.param


@pytest.mark.parametrize("shape", FUSED_SHAPES, ids=str)
def test_fused_gradients(dtype, shape, kept_as, monkeypatch):
    """Whatever is wanted; the bits of sums whatever else is, in whatever order threads run, wherever the memory is."""
    gradients, sums = Gradients(dtype, shape, kept_as), {}

    def same_sums(others):
        for name, elements in others.items():
            assert_same(elements, sums.setdefault(name, elements))

    for with_scale, wanted in WANTED:
        same_sums(gradients.check(wanted, with_scale))
    gradients.check_sums(sums)
    for order in "17":
        monkeypatch.setenv("EMULATOR_ORDER", order)
        same_sums(gradients.check(ALL_GRADIENTS, True))
    monkeypatch.undo()
    same_sums(gradients.check(ALL_GRADIENTS, True, in_place="grad_input"))
    same_sums(gradients.check(ALL_GRADIENTS, True, in_place="grad_residual"))
    for name in ("grad", "grad_residual"):
        same_sums(gradients.check(ALL_GRADIENTS, True, {name: dtype.bytes}))


@pytest.mark.parametrize("shape", [(5, 1, 40), (37, 24, 1), (11, 5, 7), (13, 5, 49)], ids=str)
def test_fused_gradients_of_any_number(dtype, shape, kept_as):
    gradients = Gradients(dtype, shape, kept_as, random_elements)
    for with_scale, wanted in WANTED:
        gradients.check(wanted, with_scale)


def test_fused_gradients_at_any_element(dtype, kept_as):
    for shape in [(30, 24, 1), (3, 2, 64)]:
        gradients = Gradients(dtype, shape, kept_as)
        for wanted in (("grad_input", "grad_residual"), ALL_GRADIENTS):
            for name in ("grad", "kept", "input", "scale", *wanted):
                by = 1 if name == "kept" and kept_as == "bits" else dtype.bytes
                gradients.check(wanted, True, {name: by})
        for in_place in ("grad_input", "grad_residual"):
            gradients.check(("grad_input", "grad_residual"), True, in_place=in_place)
        gradients.check(("grad_input",), False, in_place="grad_input")


def test_fused_gradients_lengths(dtype, kept_as):
    for count in lengths_at_edges(dtype, 2):
        for factor in (0.0, 1 / 0.7):
            gradients = Gradients(dtype, (1, 1, count), kept_as, random_elements, factor)
            gradients.check(("grad_input",), False)
    gradients.check(("grad_input",), False, {"grad": dtype.bytes})
    gradients.check(("grad_input",), False, in_place="grad_input")


@pytest.mark.parametrize("place", [0, 77, -1])
@pytest.mark.parametrize("shape", [(1, 1, 5000), (137, 24, 1), (70, 5, 31)], ids=str)
def test_fused_nan_reaches_the_sums_of_its_channel(dtype, shape, place):
    gradients = Gradients(dtype, shape, "bits")
    gradients.kept = np.full_like(gradients.kept, 0xFF)
    gradients.grad[place] = dtype.infinity + 1
    got = gradients.run(ALL_GRADIENTS, True)
    is_its = np.arange(shape[1]) == channel_of(shape, place % len(gradients.grad))
    for name in ("grad_scale", "grad_shift"):
        assert_same(np.isnan(dtype.values(got[name])), is_its)


@pytest.mark.parametrize("shape", [(2**18 + 5, 8, 1), (1, 1, 2**21 + 3), (3, 2, 2**18 + 1)], ids=str)
def test_fused_sums_of_many(shape):
    dtype = next(dtype for dtype in DTYPES if dtype.name == "float16")
    gradients = Gradients(dtype, shape, "bits")
    gradients.check_sums(gradients.run(("grad_scale", "grad_shift"), False))


def test_fused_of_nothing(dtype, kept_as):
    """No elements: nothing but sums of 0, whatever the channels."""
    none = unwritten(0, dtype, 0)
    for shape in [(0, 3, 1), (2, 3, 0), (0, 3, 4)]:
        launch_once(launcher("fused"), fused_work(dtype, shape, input=none, residual=none, output=none), 0)
        sums = {name: unwritten(3, dtype, 0) for name in ("grad_scale", "grad_shift")}
        run_fused_gradients(dtype, shape, kept_as, 0, grad=none, kept=none, input=none, grad_input=none, **sums)
        assert not any(memory.elements.any() for memory in sums.values())
    run_fused_gradients(dtype, (1, 1, 1), kept_as, 0, grad=none, kept=none, grad_input=none)
    run_fused_gradients(dtype, (1, 1, 1), kept_as, 1, grad=none, kept=none)


@pytest.mark.parametrize("what", ["scale", "dropout"])
def test_fused_more_than_2_to_the_32_elements(dtype, what):
    lanes = VECTOR // dtype.bytes
    numel = 2**32 + 9 * 256
    shape = (numel // 256, 256, 1)

    def spans_of(per_block):
        blocks = sorted({element // per_block for element in (0, 2**31 - 1, 2**31, 2**32 - 1, 2**32, numel - 1)})
        return blocks, [slice(block * per_block, min((block + 1) * per_block, numel)) for block in blocks]

    input, output = (Reserved(numel, dtype.word) for _ in range(2))
    bits = Reserved((numel + 7) // 8, np.uint8)
    vectors = {name: Memory(normal_elements(256, dtype, seed)) for seed, name in enumerate(("scale", "shift"))}
    operands = vectors if what == "scale" else {"dropout": Dropout(Stream(SEED, OFFSET), 0x7FFF, 2.0)}
    blocks, spans = spans_of(256 * lanes * (4 if dtype.bytes == 8 else 2))
    for span in spans:
        input.elements[span] = normal_elements(span.stop - span.start, dtype, span.start)
    with KERNELS.only_blocks(blocks):
        launch_once(
            launcher("fused"), fused_work(dtype, shape, input=input, output=output, bits=bits, **operands), numel
        )
    for span in spans:
        elements, got = input.elements[span], output.elements[span]
        if what == "scale":  # a span begins with the first channel
            of_vectors = {name: memory.elements for name, memory in vectors.items()}
            ends = sum_of_parts(dtype, shape, {"input": elements, **of_vectors}, multiply_add=False)
            assert not Range(*map(rectified, ends)).wrong(dtype, got).any()
        else:
            drawn = random_numbers(SEED, OFFSET, span.start, len(elements))
            keep = kept(RELU, dtype, elements) & (drawn <= 0x7FFF)
            assert_numbers(got, dropped(dtype, elements, keep, 2.0), dtype)
        assert_same(unpacked(bits.elements[bytes_of(span)], len(elements)), kept(RELU, dtype, got))
    blocks, spans = spans_of(256 * 2 * lanes)
    works = {"scale": {"scale": vectors["scale"]}, "dropout": {"factor": 2.0}}
    with KERNELS.only_blocks(blocks):
        grads = {"grad": input, "kept": bits, "grad_input": output}
        run_fused_gradients(dtype, shape, "bits", numel, **grads, **works[what])
    for span in spans:
        keep = unpacked(bits.elements[bytes_of(span)], span.stop - span.start)
        right = masked_gradient(dtype, input.elements[span], keep, 0.0 if what == "scale" else 2.0)
        if what == "scale":
            right = times(dtype, right, np.resize(vectors["scale"].elements, len(right)))
        assert_numbers(output.elements[span], right, dtype)


def check_counts(channels, inner, numel, kept=0.5, at=0):
    """Counts are added to what is there, and steps are written where there is one."""
    random = np.random.default_rng([channels, inner, numel])
    of_element = np.arange(numel) // inner % channels
    silent = random.random(channels) < 0.2
    ones = (random.random(numel) < kept) & ~silent[of_element]
    bits = Memory(np.packbits(ones, bitorder="little"), at)
    before = random.integers(0, 1 << 40, (2, channels))
    totals, last = (Memory(cells) for cells in before)
    step = (1 << 33) + 7
    work = Count(channels, inner, bits.address, step, totals.address, last.address)
    launch_once(launcher("count"), work, numel)
    counts = np.bincount(of_element, ones, channels).astype(np.int64)
    assert_same(totals.elements, before[0] + counts)
    assert_same(last.elements, np.where(counts > 0, step, before[1]))
    assert bits.intact() and totals.intact() and last.intact()


COUNTED = [  # channels, inner
    *[(1, 7), (3, 1), (32, 1), (33, 1), (5, 3), (8, 31), (257, 1), (1000, 2)],  # by columns
    *[(1, 32), (1, 5000), (1, 30_011), (2, 8193), (3, 33), (7, 49), (16, 64), (9, 128), (40, 1024)],  # by runs
]


@pytest.mark.parametrize("channels, inner", COUNTED)
@pytest.mark.parametrize("rows", [1, 2, 19])
def test_counts(channels, inner, rows):
    check_counts(channels, inner, rows * channels * inner)


@pytest.mark.parametrize("channels, inner, rows", [(5, 1, 9001), (4, 2, 40_000), (3, 64, 700), (2, 32, 3000)])
def test_counts_in_every_order(order, channels, inner, rows):
    """More than one part a channel."""
    check_counts(channels, inner, rows * channels * inner)


@pytest.mark.parametrize("numel", range(0, 70))
def test_counts_of_every_length(numel):
    check_counts(1, max(numel, 1), numel, 0.9, at=4)
    check_counts(max(numel, 1), 1, numel, 0.9, at=4)


def check_nonfinite(dtype, elements, found, before=0, at=0):
    input, first = Memory(elements, at), Memory(np.array([before], np.int64))
    launch_once(launcher("find_nonfinite"), NonFinite(dtype.code, input.address, 77, first.address), len(elements))
    assert first.elements[0] == (before or 77 * found)
    assert input.intact() and first.intact()


def finite_elements(count, dtype, seed=0):
    """Any bit patterns that are numbers."""
    elements = random_elements(count, dtype, seed)
    return np.where(elements & dtype.word(dtype.infinity) == dtype.infinity, dtype.word(dtype.infinity - 1), elements)


@pytest.mark.parametrize("count", [0, 1, 7, 256 * 8 - 1, 256 * 8 + 3])
def test_what_is_not_finite_is_found(dtype, count):
    check_nonfinite(dtype, finite_elements(count, dtype), found=False)
    for place in {0, count // 2, count - 1} if count else ():
        for wrong in [dtype.infinity, dtype.infinity | dtype.sign, dtype.infinity + 1, dtype.infinity | dtype.sign | 5]:
            elements = finite_elements(count, dtype, place)
            elements[place] = wrong
            for at in (0, dtype.bytes):
                check_nonfinite(dtype, elements, found=True, at=at)
    if count:
        check_nonfinite(dtype, elements, found=True, before=5)


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_what_is_not_finite_is_found_in_large_tiles(dtype, extra):
    """Of which only the last two blocks run."""
    count = large_from(dtype) + extra
    of_block = per_block(dtype, count - extra if extra >= 0 else 2**16)
    last = (count - 1) // of_block
    elements = np.zeros(count, dtype.word)
    with KERNELS.only_blocks({last - 1, last}):
        check_nonfinite(dtype, elements, found=False)
        for place in (count - 1, (last - 1) * of_block):
            elements[place] = dtype.infinity
            check_nonfinite(dtype, elements, found=True)
            elements[place] = 0
