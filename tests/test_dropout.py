"""relu_dropout: which elements stay, what becomes of them, what is kept, and that seeds mean something."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from composing import Watch, error_of
from operations import DTYPES, assert_same, kept_by, mixed_values, packed
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

import relu_ext

over_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def positive(*shape, dtype=torch.float32, device="cpu"):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)).add(0.5).to(device, dtype)


def dropped(input, p=0.5, seed=0):
    torch.manual_seed(seed)
    return relu_ext.relu_dropout(input, p)


def deviations(kept, p):
    """How far the number of those kept is from its expectation, in standard deviations of the binomial law."""
    count = kept.numel()
    return abs(kept.sum().item() - (1 - p) * count) / math.sqrt(p * (1 - p) * count)


# Philox in NumPy, for Random123's known answers and then for ours.


def philox(counter, key):
    """Philox4x32-7 of arrays of 32 bits in uint64."""
    a, b, c, d = counter
    low, high = key
    mask = np.uint64(0xFFFFFFFF)
    for _ in range(7):
        from_a, from_c = a * np.uint64(0xD2511F53), c * np.uint64(0xCD9E8D57)
        a, b, c, d = (
            (from_c >> np.uint64(32)) ^ b ^ low,
            from_c & mask,
            (from_a >> np.uint64(32)) ^ d ^ high,
            from_a & mask,
        )
        low, high = (low + np.uint64(0x9E3779B9)) & mask, (high + np.uint64(0xBB67AE85)) & mask
    return a, b, c, d


def test_philox_of_this_file():
    """kat_vectors of Random123, philox4x32-7."""
    ones = np.uint64(0xFFFFFFFF)
    for word, expected in (
        (np.uint64(0), (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (ones, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    ):
        assert tuple(int(x) for x in philox((word,) * 4, (word,) * 2)) == expected


def random_numbers(count, seed):
    """The 16 bits of every element, of a call whose seed is this and whose offset is 0."""
    groups = np.arange((count + 7) // 8, dtype=np.uint64)
    zero = np.zeros_like(groups)
    key = np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32)
    words = np.stack(philox((groups, zero, zero, zero), key), 1)
    return np.stack([words & np.uint64(0xFFFF), words >> np.uint64(16)], 2).reshape(-1)[:count]


@pytest.mark.parametrize("count", [1, 7, 64, 4096 + 300, 70001])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.75, 1e-7, 1 - 1e-7])
def test_mask_is_that_of_the_seed(count, p, isa, threads):
    generator = torch.Generator().manual_seed(count)
    seed = torch.empty((), dtype=torch.int64).random_(generator=generator).item()  # but for its highest bit
    kept = relu_ext.relu_dropout(positive(count), p, generator=generator.manual_seed(count)) != 0
    leaving = min(max(round((1 - p) * 65536), 1), 65536)
    expected = [random_numbers(count, seed | high << 63) < leaving for high in (0, 1)]
    assert any((kept.numpy() == x).all() for x in expected)


@over_dtypes
@pytest.mark.parametrize("shape", [(), (1,), (5, 7), (3, 1001), (2, 3, 64, 33), (0, 3)], ids=str)
def test_values_and_gradient(device, dtype, shape, isa):
    """Of the same bits: input / (1 - p), rounded once; one bit an element is kept; spare bits are 0."""
    input = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_()
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(device, dtype)
    output, kept = kept_by(lambda input: dropped(input, 0.3), input)
    stays = output > 0
    (bits,) = kept
    assert torch.equal(bits, packed(stays))
    factor = torch.tensor(1 / 0.7, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    for result, source in ((output.detach(), input), (torch.autograd.grad(output, input, grad)[0], grad)):
        expected = (source.detach().to(factor.dtype) * factor).to(dtype)
        assert_same(result, torch.where(stays, expected, torch.zeros((), dtype=dtype, device=device)))
    assert output.grad_fn.name() == "ReLUDropoutBackward" and output.stride() == input.stride()


@over_dtypes
def test_special_values(device, dtype, isa):
    """What is dropped becomes 0, NaN and infinities too; what stays is relu's, and infinities stay infinite."""
    input = mixed_values(3001, dtype, device).requires_grad_()
    grad = mixed_values(3001, dtype, device, seed=1)
    stays = dropped(torch.ones_like(input), 0.4) != 0
    output = dropped(input, 0.4)
    assert_same(output[~stays], torch.zeros_like(output[~stays]))
    factor = torch.tensor(1 / 0.6, dtype=torch.float64 if dtype == torch.float64 else torch.float32, device=device)
    scaled = (torch.relu(input.detach()).to(factor.dtype) * factor).to(dtype)
    assert_same(output[stays], scaled[stays])
    (gradient,) = torch.autograd.grad(output, input, grad)
    kept = stays & ~(input <= 0)
    assert_same(gradient, torch.where(kept, (grad.to(factor.dtype) * factor).to(dtype), torch.zeros_like(grad)))


def lay_backwards(tensor):
    return tensor.permute(*reversed(range(tensor.dim()))).contiguous().permute(*reversed(range(tensor.dim())))


def test_layouts(device):
    """Which stay hangs on the place in memory; gradients of another layout are copied to it."""
    input, grad = positive(4, 6, 5, device=device), torch.randn(4, 6, 5, device=device)
    laid = lay_backwards(input).requires_grad_()
    output = dropped(laid)
    assert output.stride() == laid.stride()
    in_memory = dropped(input.permute(2, 1, 0).contiguous())
    assert torch.equal(output.permute(2, 1, 0) != 0, in_memory != 0)
    for other in (grad, lay_backwards(grad), grad.new_ones(()).expand(grad.shape)):
        (gradient,) = torch.autograd.grad(output, laid, other, retain_graph=True)
        assert_same(gradient, torch.where(output != 0, 2 * other, torch.zeros_like(gradient)))


# The law


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9, 0.999])
def test_fraction_kept(device, p):
    kept = dropped(positive(1 << 22, device=device), p) != 0
    assert deviations(kept, p) < 5


def test_independence_of_positions_and_calls(device):
    """Two that are any distance apart, or in two calls, agree as often as independent ones."""
    torch.manual_seed(3)
    input = positive(1 << 21, device=device)
    first, second = (relu_ext.relu_dropout(input, 0.5) != 0 for _ in range(2))
    assert deviations(first == second, 0.5) < 5
    for distance in (1, 2, 7, 8, 9, 16, 64, 256, 4096, 65536):
        assert deviations(first[distance:] == first[:-distance], 0.5) < 5
    for place in range(64):  # no place of a block is favoured
        assert deviations(first[place::64], 0.5) < 5


def test_every_of_the_65536_numbers_occurs_alike(device):
    """A step of p by 2^-16 drops that share more, of the same numbers."""
    input = positive(1 << 22, device=device)
    kept = [(dropped(input, 1 - below / 65536) != 0) for below in (32768, 32769, 33000, 40000)]
    for fewer, more in itertools.pairwise(kept):
        assert not (fewer & ~more).any() and (more & ~fewer).any()


# Generators and modes of training


def test_manual_seed_reproduces(device):
    input = positive(1000, device=device)
    torch.manual_seed(5)
    first, second = relu_ext.relu_dropout(input), relu_ext.relu_dropout(input)
    torch.manual_seed(5)
    assert torch.equal(relu_ext.relu_dropout(input), first) and not torch.equal(first, second)


def test_generator_is_the_only_one_drawn_from(device):
    def drawn(seed):
        generator = torch.Generator(device).manual_seed(seed)
        return [relu_ext.relu_dropout(positive(1000, device=device), generator=generator) for _ in range(2)]

    state = torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state()
    first, second = drawn(1)
    assert not torch.equal(first, second) and not torch.equal(first, drawn(2)[0])
    assert all(torch.equal(*pair) for pair in zip(drawn(1), (first, second), strict=True))
    assert torch.equal(state, torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state())


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_generator_moves_on_alike(device, p):
    """With and without a gradient, whatever the size, in modes."""
    states = []
    for shape, grad in (((7,), False), ((7,), True), ((1 << 17,), False), ((1 << 17,), True)):
        generator = torch.Generator(device).manual_seed(1)
        relu_ext.relu_dropout(positive(*shape, device=device).requires_grad_(grad), p, generator=generator)
        states.append(generator.get_state())
    generator = torch.Generator(device).manual_seed(1)
    with Watch():
        relu_ext.relu_dropout(positive(7, device=device), p, generator=generator)
    assert all(torch.equal(states[0], state) for state in (*states, generator.get_state()))


@pytest.mark.parametrize("p, training", [(0.0, True), (0, True), (0.5, False), (1.0, False)])
def test_nothing_is_drawn_from_the_generator(device, p, training):
    generator = torch.Generator(device).manual_seed(1)
    state = generator.get_state()
    input = mixed_values(1000, torch.float32, device).requires_grad_()
    output = relu_ext.relu_dropout(input, p, training, generator)
    assert torch.equal(generator.get_state(), state)
    assert_same(output, torch.relu(input))
    assert output.grad_fn.name() == "ReLUBackward"


@over_dtypes
def test_all_is_dropped(device, dtype):
    input = mixed_values(1000, dtype, device).requires_grad_()
    output = dropped(input, 1.0)
    (gradient,) = torch.autograd.grad(output, input, torch.ones_like(output))
    assert_same(output, torch.zeros_like(output))
    assert_same(gradient, torch.zeros_like(output))


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_no_probability(p):
    if not math.isnan(p):  # torch takes that, and its kernel then raises
        assert error_of(relu_ext.relu_dropout, torch.rand(3), p) == error_of(F.dropout, torch.rand(3), p)
        with pytest.raises(ValueError, match="between 0 and 1"):
            relu_ext.ReLUDropout(p)
        with pytest.raises(ValueError, match="between 0 and 1"):
            torch.ops.relu_ext.relu_dropout_forward(torch.rand(3), p)
    else:
        assert error_of(relu_ext.relu_dropout, torch.rand(3), p)[0] is error_of(F.dropout, torch.rand(3), p)[0]


@pytest.mark.parametrize("input", [torch.rand(4, 6)[:, ::2], torch.rand(3).int(), torch.rand(3, device="meta")])
def test_generator_without_kernels_is_an_error(input):
    with pytest.raises(RuntimeError, match="relu_dropout draws from a generator for dense tensors"):
        relu_ext.relu_dropout(input, generator=torch.Generator())


def test_without_kernels_it_is_torchs(device):
    input = positive(40, 60, device=device)[:, ::2]
    torch.manual_seed(1)
    ours = relu_ext.relu_dropout(input, 0.3)
    torch.manual_seed(1)
    assert torch.equal(ours, F.dropout(torch.relu(input), 0.3))


# Composition


def test_gradcheck(device):
    input = torch.randn(40, dtype=torch.float64, device=device).requires_grad_()
    function = dropped
    assert gradcheck(function, [input], check_batched_grad=True)
    assert gradgradcheck(function, [input], check_batched_grad=True)


def test_the_output_may_be_changed(device):
    input = positive(100, device=device).requires_grad_()
    output = dropped(input)
    stays = output.detach() != 0
    output.mul_(3)
    assert_same(torch.autograd.grad(output.sum(), input)[0], 6.0 * stays)


@pytest.mark.parametrize("mode", [Watch, torch.enable_grad])
def test_modes_change_nothing(device, mode):
    input = positive(300, device=device).requires_grad_()
    plain, kept_plain = kept_by(dropped, input)
    with mode():
        watched, kept = kept_by(dropped, input)
    assert torch.equal(plain, watched) and torch.equal(kept_plain[0], kept[0])
    assert plain.grad_fn.name() == watched.grad_fn.name() == "ReLUDropoutBackward"
    with mode():
        gradients = [torch.autograd.grad(output.sum(), input)[0] for output in (plain, watched)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("watched", ["neither", "forward", "backward"])
def test_checkpoint(device, watched):
    """It recomputes with the same generator's state, in whatever modes."""

    def gradient(function):
        torch.manual_seed(3)
        input = positive(300, device=device).requires_grad_()
        with Watch() if watched == "forward" else torch.enable_grad():
            output = function(input)
        with Watch() if watched == "backward" else torch.enable_grad():
            return torch.autograd.grad(output.sum(), input)[0]

    def function(input):
        return relu_ext.relu_dropout(input, 0.4) * 2

    assert torch.equal(gradient(function), gradient(lambda input: checkpoint(function, input, use_reentrant=False)))


def test_compile(device):
    """A compiler sees torch's dropout, with torch's or its own numbers."""
    input = positive(10000, device=device).requires_grad_()
    output = torch.compile(relu_ext.relu_dropout, fullgraph=True, backend="aot_eager")(input, 0.3)
    assert deviations(output != 0, 0.3) < 5
    torch.testing.assert_close(output[output != 0], input[output != 0] / 0.7)
    (gradient,) = torch.autograd.grad(output.sum(), input)
    torch.testing.assert_close(gradient, (output != 0) / 0.7)


def test_compiled_autograd_of_another_p(device):
    """The graph that was captured first must not serve it."""
    for p in (0.5, 0.75):
        input = positive(300, device=device).requires_grad_()
        output = dropped(input, p)
        with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
            output.sum().backward()
        torch.testing.assert_close(input.grad, (output != 0) / (1 - p))


def test_transforms(device):
    """As torch's: random by way of randomness=, the gradient of whatever mask."""
    input = positive(5, 1000, device=device)
    output = torch.vmap(lambda x: relu_ext.relu_dropout(x, 0.3), randomness="different")(input)
    assert deviations(output != 0, 0.3) < 5
    gradient = torch.func.grad(lambda x: relu_ext.relu_dropout(x, 0.3).sum())(input)
    assert deviations(gradient != 0, 0.3) < 5


def test_script_and_trace(device):
    input = positive(10000, device=device)
    for function in (torch.jit.script(relu_ext.relu_dropout), torch.fx.symbolic_trace(relu_ext.ReLUDropout(0.5))):
        assert deviations(function(input) != 0, 0.5) < 5


def test_autocast_and_profiler(device):
    input = positive(10, device=device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        assert relu_ext.relu_dropout(input).dtype == torch.float32
    with torch.profiler.profile() as profile:
        relu_ext.relu_dropout(input).sum().backward()
    assert {"relu_ext::relu_dropout", "relu_ext::relu_dropout_backward"} <= {e.key for e in profile.key_averages()}


def test_operator(device):
    """torch.ops.relu_ext.relu_dropout_forward: output and bits, of whatever strides; differentiable."""
    operator = torch.ops.relu_ext.relu_dropout_forward
    input = positive(33, 7, device=device)
    expected = dropped(input)
    torch.manual_seed(0)
    output, bits = operator(input, 0.5)
    assert torch.equal(output, expected) and torch.equal(bits, packed(output != 0))
    output, bits = operator(positive(33, 14, device=device)[:, ::2], 0.5)
    assert torch.equal(bits, packed(output != 0)) and output.is_contiguous()
    leaf = input.clone().requires_grad_()
    output, _ = operator(leaf, 0.5)
    assert_same(torch.autograd.grad(output.sum(), leaf)[0], 2.0 * (output != 0))
    with pytest.raises(TypeError, match="expected float32"):
        operator(torch.ones(3, dtype=torch.int32, device=device), 0.5)
    assert torch.Tag.nondeterministic_seeded in operator.default.tags  # compilers then do not merge or repeat it
    meta = operator(torch.empty(5, 7, device="meta"), 0.5)
    assert [x.shape for x in meta] == [(5, 7), (5,)]


def test_module(device):
    module, input = relu_ext.ReLUDropout(0.25), torch.randn(1000, device=device)
    assert repr(module) == "ReLUDropout(p=0.25)" and list(module.state_dict()) == []
    torch.manual_seed(1)
    output = module(input)
    torch.manual_seed(1)
    assert torch.equal(output, relu_ext.relu_dropout(input, 0.25))
    assert_same(module.eval()(input), torch.relu(input))
