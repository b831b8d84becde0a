"""Layouts: outputs have torch's strides, and a gradient may come in any layout. Bits follow memory, not indices."""

import random

import pytest
import torch
from operations import DTYPES, assert_same, kept_by, mixed_values, packed


def numbers(*shape):
    return mixed_values(torch.Size(shape).numel(), torch.float32).view(shape)


def with_strides(shape, strides):
    """Any strides, even ones that matter to nobody because the dimension has one element."""
    tensor = torch.empty_strided(shape, strides)
    return tensor.copy_(numbers(*shape))


DENSE = {
    "contiguous": lambda: numbers(3, 5, 7),
    "0-d": lambda: numbers(1)[0],
    "1-d": lambda: numbers(77),
    "transposed": lambda: numbers(9, 13).t(),
    "channels_last": lambda: numbers(2, 3, 5, 7).to(memory_format=torch.channels_last),
    "channels_last_3d": lambda: numbers(2, 3, 2, 5, 3).to(memory_format=torch.channels_last_3d),
    "permuted 5-d": lambda: numbers(2, 3, 4, 5, 3).permute(3, 0, 4, 2, 1),
    "permuted 7-d": lambda: numbers(2, 3, 2, 1, 3, 2, 2).permute(6, 2, 0, 5, 1, 3, 4),
    "rows of a slice": lambda: numbers(9, 7)[2:6],
    "odd offset": lambda: numbers(99)[3:94].view(7, 13),
    "one channel": lambda: numbers(2, 1, 5, 7).to(memory_format=torch.channels_last),
    "one pixel": lambda: numbers(4, 9, 1, 1).to(memory_format=torch.channels_last),
    "size 1, stride 0": lambda: with_strides((1, 3, 5), (0, 5, 1)),
    "size 1, large stride": lambda: with_strides((3, 1, 5), (5, 99, 1)),
    "size 1, transposed": lambda: with_strides((4, 1, 6), (1, 1, 4)),
    "one element, odd strides": lambda: with_strides((1, 1), (3, 8)),
    "empty": lambda: numbers(0),
    "empty, no rows": lambda: numbers(0, 5),
    "empty, no columns": lambda: numbers(5, 0, 3),
    "empty, odd strides": lambda: torch.empty_strided((0, 3), (9, 7)),
    "empty, channels_last": lambda: numbers(2, 0, 3, 5).to(memory_format=torch.channels_last),
}
SPARSE_IN_MEMORY = {
    "sliced columns": lambda: numbers(9, 14)[:, 3:10],
    "every other": lambda: numbers(90)[::2],
    "sliced channels_last": lambda: numbers(2, 6, 5, 7).to(memory_format=torch.channels_last)[:, 1:4],
    "transposed slice": lambda: numbers(9, 14)[:, 3:10].t(),
    "diagonal": lambda: numbers(6, 6).diagonal(),
}
OVERLAPPING = {
    "expanded": lambda: numbers(5, 1).expand(5, 7),
    "expanded scalar": lambda: numbers(1)[0].expand(3, 4),
    "unfolded": lambda: numbers(11).unfold(0, 4, 2),
    "sliding": lambda: numbers(12).as_strided((5, 6), (1, 1)),
}
NEGATED = {"negative view": lambda: torch.randn(5, 7, dtype=torch.complex64).conj().imag}
ALL = DENSE | SPARSE_IN_MEMORY | OVERLAPPING | NEGATED


def over(cases):
    return pytest.mark.parametrize("build", cases.values(), ids=cases)


def on(device, tensor):
    """The tensor there with the same strides in a copy of the same memory; Tensor.to would close gaps and overlaps."""
    if tensor.is_neg():
        return on(device, tensor._neg_view())._neg_view()
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def strides_that_matter(tensor):
    """Without those of dimensions of one element, and none for an empty tensor: they say nothing about memory."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return [stride for size, stride in steps if size > 1] if tensor.numel() else []


def gradient(function, input, grad):
    return torch.autograd.grad(function(input), input, grad)[0]


@over(ALL)
def test_output_is_torchs(operation, device, build):
    input = on(device, build())
    before = input.clone()
    for requires_grad in (False, True):
        input = input.detach().requires_grad_(requires_grad)
        output, expected = operation.function(input), operation.definition(input)
        assert_same(output, expected)
        assert strides_that_matter(output) == strides_that_matter(expected)
        assert output.data_ptr() != input.data_ptr() or not input.numel()
        assert_same(input.detach(), before)


@pytest.mark.keeps_bits
@over(DENSE)
def test_dense_inputs_keep_one_bit_an_element(operation, device, build):
    input = on(device, build()).requires_grad_()
    output, (bits,) = kept_by(operation.function, input)
    keep = torch.empty_strided(output.shape, output.stride(), dtype=torch.bool, device=device)
    assert torch.equal(bits, packed(keep.copy_(operation.keep(input))))


@pytest.mark.in_place
@over(DENSE | SPARSE_IN_MEMORY | NEGATED)
def test_in_place_is_torchs(operation, device, build):
    input, expected = on(device, build()), on(device, build())
    expected.copy_(input)
    pointer, strides = input.data_ptr(), input.stride()
    operation.definition_(expected)
    assert operation.function_(input) is input
    assert (input.data_ptr(), input.stride()) == (pointer, strides)
    assert_same(input, expected)


@pytest.mark.in_place
@over(SPARSE_IN_MEMORY)
def test_in_place_leaves_the_gaps(operation, device, build):
    view, expected_view = on(device, build()), on(device, build())
    operation.function_(view)
    operation.definition_(expected_view)
    assert_same(view._base, expected_view._base)


@pytest.mark.in_place
@over({name: build for name, build in OVERLAPPING.items() if name.startswith("expanded")})
def test_in_place_on_overlapping_memory_is_torchs(operation, device, build):
    """An error, but for threshold."""

    def result(function_):
        try:
            return str(function_(on(device, build())).tolist())
        except RuntimeError as error:
            return str(error)

    assert result(operation.function_) == result(operation.definition_)
    assert ("unsupported operation" in result(operation.function_)) == (operation.name != "threshold")


@over(ALL)
def test_gradient_is_torchs(operation, device, build):
    input = on(device, build()).requires_grad_()
    grad = torch.randn(input.shape, device=device)
    ours, theirs = (gradient(f, input, grad) for f in (operation.function, operation.definition))
    assert_same(ours, theirs)
    like = operation.function(input) if torch.ops.aten.is_non_overlapping_and_dense(input) else theirs
    assert strides_that_matter(ours) == strides_that_matter(like)


@over(ALL)
def test_gradient_of_a_leaf_has_its_strides(operation, device, build):
    leaf = on(device, build()).requires_grad_()
    expected = leaf.detach().requires_grad_()
    grad = torch.randn(leaf.shape, device=device)
    operation.function(leaf).backward(grad)
    operation.definition(expected).backward(grad)
    assert_same(leaf.grad, expected.grad)
    assert strides_that_matter(leaf.grad) == strides_that_matter(expected.grad)


@pytest.mark.in_place
@over(DENSE)
def test_gradient_in_place_is_torchs(operation, device, build):
    def run(function_):
        leaf = on(device, build()).requires_grad_()
        input = torch.empty_strided(leaf.shape, leaf.stride(), device=device).copy_(leaf)
        grad = torch.linspace(-1, 1, leaf.numel(), device=device).view(leaf.shape)
        return gradient(lambda leaf: function_(input), leaf, grad)

    assert_same(run(operation.function_), run(operation.differentiable_))


@over(DENSE | SPARSE_IN_MEMORY)
def test_gradient_of_a_sum(operation, device, build):
    """It is one number, expanded: every stride is 0."""
    input = on(device, build()).requires_grad_()
    ours, theirs = (torch.autograd.grad(f(input).sum(), input)[0] for f in (operation.function, operation.definition))
    assert_same(ours, theirs)


SHAPE = (2, 6, 4, 5)
IN_ONE_SHAPE = {
    "contiguous": lambda: numbers(*SHAPE),
    "channels_last": lambda: numbers(*SHAPE).to(memory_format=torch.channels_last),
    "reversed": lambda: numbers(*SHAPE[::-1]).permute(3, 2, 1, 0),
    "swapped": lambda: numbers(2, 6, 5, 4).transpose(2, 3),
    "sliced": lambda: numbers(2, 6, 4, 11)[..., 3:8],
    "sliced channels": lambda: numbers(2, 9, 4, 5).to(memory_format=torch.channels_last)[:, 2:8],
    "expanded": lambda: numbers(6, 1, 5).expand(SHAPE),
    "scalar": lambda: numbers(1)[0].expand(SHAPE),
    "negative view": lambda: torch.complex(numbers(*SHAPE), numbers(*SHAPE)).conj().imag,
}


@pytest.mark.parametrize("build_grad", IN_ONE_SHAPE.values(), ids=[f"grad {name}" for name in IN_ONE_SHAPE])
@over(IN_ONE_SHAPE)
def test_gradient_of_any_layout(operation, device, build, build_grad):
    input = on(device, build()).requires_grad_()
    grad = on(device, build_grad())
    before = grad.clone()
    ours, theirs = (gradient(f, input, grad) for f in (operation.function, operation.definition))
    assert_same(ours, theirs)
    assert_same(grad, before)


SIZE_ONE_STRIDES = [(12, 3, 3, 1), (0, 3, 99, 1), (1, 1, 1, 4), (7, 1, 12, 4)]  # of shape (1, 4, 1, 3)


@pytest.mark.parametrize("grad_strides", SIZE_ONE_STRIDES, ids=str)
@pytest.mark.parametrize("strides", SIZE_ONE_STRIDES, ids=str)
def test_strides_of_one_element_say_nothing(operation, device, strides, grad_strides):
    input = on(device, with_strides((1, 4, 1, 3), strides)).requires_grad_()
    grad = on(device, with_strides((1, 4, 1, 3), grad_strides))
    ours, theirs = (gradient(f, input, grad) for f in (operation.function, operation.definition))
    assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_use_of_the_output(operation, device, dtype):
    weight = mixed_values(9 * 13, dtype, device, 1).view(13, 9)

    def run(function):
        leaf = mixed_values(9 * 13, dtype, device).view(9, 13).requires_grad_()
        (function(leaf).t() * weight).sum().backward()
        return leaf.grad

    assert_same(run(operation.function), run(operation.definition))


def test_channels_last_network(operation, device):
    """The layouts that meet in practice: a convolution's on one side and a flatten's on the other."""
    torch.manual_seed(0)
    convolution = torch.nn.Conv2d(3, 8, 3).to(device, memory_format=torch.channels_last)
    images = torch.randn(2, 3, 9, 9, device=device).to(memory_format=torch.channels_last)
    weight = torch.randn(8 * 7 * 7, device=device)

    def run(function):
        convolution.zero_grad()
        hidden = function(convolution(images))
        assert hidden.is_contiguous(memory_format=torch.channels_last)
        (hidden.flatten(1) @ weight).sum().backward()
        return convolution.weight.grad

    same = assert_same if operation.keep else torch.testing.assert_close  # a sum makes more of the last place
    same(run(operation.function), run(operation.definition))


def random_view(choose, shape, dtype):
    """Sliced, stepped and permuted at random out of memory at a random offset."""
    slices = []
    for size in shape:
        start, step = choose.choice([0, 0, 1]), choose.choice([1, 1, 1, 2])
        slices.append(slice(start, start + step * size, step))
    order = choose.sample(range(len(shape)), len(shape))
    stored = [slices[d].stop for d in order]
    offset = choose.randrange(6)
    memory = mixed_values(offset + torch.Size(stored).numel(), dtype, seed=choose.randrange(2**31))
    return memory[offset:].view(stored).permute([order.index(d) for d in range(len(shape))])[tuple(slices)]


@pytest.mark.in_place
@pytest.mark.parametrize("seed", range(300))
def test_random_views(operation, device, seed):
    choose = random.Random(seed)
    dtype = choose.choice(DTYPES)
    shape = [
        choose.randrange(7) if choose.random() < 0.1 else choose.randrange(1, 7) for _ in range(choose.randrange(6))
    ]
    input, grad = (on(device, random_view(choose, shape, dtype)) for _ in range(2))
    leaf = input.detach().requires_grad_()
    output, expected = operation.function(leaf), operation.definition(leaf)
    assert_same(output, expected)
    assert strides_that_matter(output) == strides_that_matter(expected)
    ours, theirs = (torch.autograd.grad(o, leaf, grad)[0] for o in (output, expected))
    assert_same(ours, theirs)
    assert_same(operation.function_(input), expected.detach())
