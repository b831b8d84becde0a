"""prelu and reglu: torch's values and gradients, whatever the layouts; what is kept; how they compose."""

import pytest
import torch
import torch.nn.functional as F
from composing import Watch, assert_near_sum, error_of
from operations import DTYPES, assert_same, kept_by, mixed_values, packed
from torch.autograd import gradcheck, gradgradcheck

import relu_ext


def gated(gate, up):
    return torch.relu(gate) * up


def numbers(*shape, dtype=torch.float32, device="cpu", seed=0):
    return mixed_values(torch.Size(shape).numel(), dtype, device, seed).view(shape)


def moderate(*shape, dtype=torch.float32, device="cpu", seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def lay_backwards(tensor):
    """Its last dimension becomes the one with the greatest stride."""
    order = tuple(range(tensor.dim())[::-1])
    return tensor.permute(order).contiguous().permute(order)


def results(function, *inputs, grad=None, needs=(True, True)):
    """The output and the gradients of those inputs that need one."""
    inputs = [input.detach().requires_grad_(need) for input, need in zip(inputs, needs, strict=True)]
    output = function(*inputs)
    grad = torch.ones_like(output) if grad is None else grad
    return output.detach(), *torch.autograd.grad(output, [input for input in inputs if input.requires_grad], grad)


def assert_all_same(ours, theirs, strides=True):
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)
        assert not strides or a.stride() == b.stride()


def kernels_take(function, *inputs):
    name = function(*(input.detach().requires_grad_() for input in inputs)).grad_fn.name()
    return name in ("ReGLUBackward", "PReLUBackward")


# reglu

BOTH = {
    "contiguous": lambda make: (make(3, 5, 7), make(3, 5, 7, seed=1)),
    "transposed": lambda make: (make(5, 7).t(), make(5, 7, seed=1).t()),
    "channels_last": lambda make: tuple(
        make(2, 3, 4, 5, seed=seed).to(memory_format=torch.channels_last) for seed in (0, 1)
    ),
    "offset": lambda make: (make(40)[3:], make(38, seed=1)[1:]),
    "halves": lambda make: make(9, 66).chunk(2, -1),
    "halves, exchanged": lambda make: make(9, 66).chunk(2, -1)[::-1],
    "halves of three dimensions": lambda make: make(2, 5, 130).chunk(2, -1),
    "halves of one column": lambda make: make(9, 2).chunk(2, -1),
    "halves of one row": lambda make: make(1, 66).chunk(2, -1),
    "halves of a vector": lambda make: make(66).chunk(2, -1),
    "parts of other tensors": lambda make: (make(9, 40)[:, :33], make(9, 50, seed=1)[:, 3:36]),
    "rows and a half": lambda make: (make(9, 33), make(9, 66, seed=1).chunk(2, -1)[0]),
    "every other row": lambda make: (make(18, 33)[::2], make(9, 33, seed=1)),
    "one tensor": lambda make: (make(9, 33),) * 2,
    "0-d": lambda make: (make(1)[0], make(1, seed=1)[0]),
    "empty": lambda make: (make(3, 0, 2), make(3, 0, 2, seed=1)),
    "empty halves": lambda make: make(3, 0).chunk(2, -1),
}
LEFT_TO_TORCH = {
    "broadcast": lambda make: (make(5, 7), make(7, seed=1)),
    "broadcast gate": lambda make: (make(5, 1), make(5, 7, seed=1)),
    "other strides": lambda make: (make(5, 7), make(7, 5, seed=1).t()),
    "expanded": lambda make: (make(5, 1).expand(5, 7), make(5, 7, seed=1)),
    "every other column": lambda make: (make(5, 14)[:, ::2], make(5, 14, seed=1)[:, ::2]),
    "expanded between": lambda make: (make(3, 1, 7).expand(3, 4, 7), make(3, 4, 7, seed=1)),
    "rows of two strides": lambda make: (make(4, 4, 7)[:, :3], make(4, 3, 7, seed=1)),
    "mixed dtypes": lambda make: (make(5, 7), make(5, 7, seed=1).double()),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("build", BOTH.values(), ids=BOTH)
def test_reglu(device, dtype, build, isa):
    gate, up = build(lambda *shape, seed=0: numbers(*shape, dtype=dtype, device=device, seed=seed))
    dense = numbers(*gate.shape, dtype=dtype, device=device, seed=2)
    for grad in (dense, lay_backwards(dense), dense.new_ones(()).expand(dense.shape)):
        assert_all_same(*(results(f, gate, up, grad=grad) for f in (relu_ext.reglu, gated)), strides=False)
    assert relu_ext.reglu(gate, up).stride() == gated(gate, up).stride()
    assert kernels_take(relu_ext.reglu, gate, up)


@pytest.mark.parametrize("build", LEFT_TO_TORCH.values(), ids=LEFT_TO_TORCH)
def test_reglu_left_to_torch(device, build):
    gate, up = build(lambda *shape, seed=0: numbers(*shape, device=device, seed=seed))
    assert not kernels_take(relu_ext.reglu, gate, up)
    grad = numbers(*torch.broadcast_shapes(gate.shape, up.shape), device=device, seed=2)
    assert_all_same(*(results(f, gate, up, grad=grad) for f in (relu_ext.reglu, gated)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reglu_every_length(device, dtype, isa):
    """Around the chunks of 512 elements and the vectors; rows that begin anywhere."""
    for columns in (*range(1, 70), 127, 511, 512, 513, 1025):
        gate, up = numbers(5, 2 * columns, dtype=dtype, device=device, seed=columns).chunk(2, -1)
        grad = numbers(5, columns, dtype=dtype, device=device, seed=-columns)
        assert_all_same(*(results(f, gate, up, grad=grad) for f in (relu_ext.reglu, gated)), strides=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reglu_on_more_threads(device, dtype, threads):
    for shape in ((300, 2 * 1001), (3, 2 * 70001), (1, 2 * 131075)):
        gate, up = numbers(*shape, dtype=dtype, device=device).chunk(2, -1)
        grad = numbers(*gate.shape, dtype=dtype, device=device, seed=1)
        assert_all_same(*(results(f, gate, up, grad=grad) for f in (relu_ext.reglu, gated)), strides=False)


@pytest.mark.parametrize("needs", [(True, False), (False, True)])
def test_reglu_one_gradient(device, needs):
    alike = numbers(9, device=device), numbers(9, device=device, seed=1)
    for gate, up in (numbers(9, 66, device=device).chunk(2, -1), alike):
        assert_all_same(*(results(f, gate, up, needs=needs) for f in (relu_ext.reglu, gated)), strides=False)
        inputs = [x.detach().requires_grad_(need) for x, need in zip((gate, up), needs, strict=True)]
        _, kept = kept_by(relu_ext.reglu, *inputs)
        expected = [gate, up] if needs[0] else [gate]
        assert [x.data_ptr() for x in kept] == [x.data_ptr() for x in expected]


def test_reglu_gradients_of_halves_are_halves(device):
    for shape in ((9, 66), (2, 5, 66)):
        gate, up = (half.detach().requires_grad_() for half in numbers(*shape, device=device).chunk(2, -1))
        grads = torch.autograd.grad(relu_ext.reglu(gate, up), (gate, up), numbers(*gate.shape, device=device, seed=1))
        first, second = grads
        assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        assert first.stride() == second.stride() == torch.empty(shape).chunk(2, -1)[0].stride()
        assert second.storage_offset() == first.storage_offset() + gate.shape[-1]


def test_reglu_keeps_nothing_without_a_gradient(device):
    gate, up = numbers(9, device=device), numbers(9, device=device, seed=1)
    assert kept_by(relu_ext.reglu, gate, up)[1] == []
    with torch.no_grad():
        assert kept_by(relu_ext.reglu, gate.requires_grad_(), up)[1] == []


# prelu

SHAPES = {
    "NCHW": (4, 6, 5, 7),
    "one place": (3, 200, 1, 1),
    "rows": (50, 70),
    "few columns": (7000, 3),
    "three dimensions": (5, 4, 130),
    "planes of whole words": (3, 5, 16, 16),
    "large planes": (2, 3, 61, 41),
    "one channel": (3, 1, 5),
    "empty": (0, 3, 2),
    "no places": (2, 3, 0),
    "no channels": (2, 0),
    "neither": (2, 0, 0),
}
LAYOUTS = {
    "contiguous": lambda input: input,
    "backwards": lay_backwards,
    "channels last": lambda input: input.movedim(1, -1).contiguous().movedim(-1, 1),
    "offset": lambda input: F.pad(input.flatten(), (1, 0))[1:].view(input.shape),
}


def weights(input, one, seed=3):
    return moderate(1 if one else input.shape[1], dtype=input.dtype, device=input.device, seed=seed)


@pytest.mark.parametrize("one", [True, False], ids=["one weight", "one a channel"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_prelu(device, shape, lay_out, dtype, one, isa):
    """The output and the input's gradient are torch's; the weight's is nearer to the truth, or as near."""
    input = lay_out(moderate(*shape, dtype=dtype, device=device))
    weight, grad = weights(input, one), lay_out(moderate(*shape, dtype=dtype, device=device, seed=1))
    output, grad_input, grad_weight = results(relu_ext.prelu, input, weight, grad=grad)
    theirs = results(F.prelu, input, weight, grad=grad)
    assert_all_same((output, grad_input), theirs[:2])
    assert grad_weight.shape == weight.shape
    assert_near_sum(grad_weight, input, grad)
    assert kernels_take(relu_ext.prelu, input, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prelu_special_values(device, dtype, isa):
    input, weight = numbers(12, 7, 19, dtype=dtype, device=device), numbers(7, dtype=dtype, device=device, seed=3)
    grad = numbers(12, 7, 19, dtype=dtype, device=device, seed=1)
    ours, theirs = (results(f, input, weight, grad=grad)[:2] for f in (relu_ext.prelu, F.prelu))
    assert_all_same(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prelu_weight_where_a_number_is_nan(device, dtype, isa):
    """The gradient of its channel is, no other."""
    input = moderate(12, 7, 19, dtype=dtype, device=device)
    input[5, 3, 2] = torch.nan
    (gradient,) = results(relu_ext.prelu, input, weights(input, one=False), needs=(False, True))[1:]
    assert gradient.isnan().tolist() == [channel == 3 for channel in range(7)]


def test_prelu_weight_with_gaps(device):
    input, weight = moderate(5, 7, 3, device=device), moderate(14, device=device, seed=1)[::2]
    assert_all_same(*(results(f, input, weight) for f in (relu_ext.prelu, F.prelu)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(9, 5, 77), (300, 7), (3, 5, 200, 100)], ids=str)
def test_prelu_with_a_frozen_weight_keeps_bits(device, dtype, shape, isa):
    input = numbers(*shape, dtype=dtype, device=device)
    weight, grad = weights(input, one=False), numbers(*shape, dtype=dtype, device=device, seed=1)
    leaf = input.clone().requires_grad_()
    output, (bits, kept_weight) = kept_by(relu_ext.prelu, leaf, weight)
    assert kept_weight.data_ptr() == weight.data_ptr()
    assert torch.equal(bits, packed(input > 0))
    output.backward(grad)
    assert_all_same((output.detach(), leaf.grad), results(F.prelu, input, weight, grad=grad, needs=(True, False)))


def test_prelu_weight_alone(device):
    input, weight = moderate(9, 5, 7, device=device), moderate(5, device=device, seed=1)
    ours, theirs = (results(f, input, weight, needs=(False, True)) for f in (relu_ext.prelu, F.prelu))
    torch.testing.assert_close(ours, theirs)
    assert torch.equal(ours[1], results(relu_ext.prelu, input, weight)[2])


@pytest.mark.parametrize("shape", [(64, 16, 40, 40), (1 << 17, 10), (1 << 20, 1)], ids=str)
def test_prelu_sums_the_same_on_any_number_of_threads(shape):
    input, grad = moderate(*shape), moderate(*shape, seed=1)
    sums = []
    before = torch.get_num_threads()
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        sums.append(results(relu_ext.prelu, input, weights(input, one=False), grad=grad)[2])
    torch.set_num_threads(before)
    assert torch.equal(sums[0], sums[1]) and torch.equal(sums[1], sums[2])


def test_prelu_sum_of_ten_million(device):
    """In float32 the truth's float32, but for its last place."""
    input = moderate(10, 2, 500_000, device=device).abs().neg()
    grad = moderate(10, 2, 500_000, device=device, seed=1).abs()
    weight = torch.tensor([0.25, 0.5], device=device)
    ours, theirs, truth = (
        results(f, *(x.to(dtype) for x in (input, weight)), grad=grad.to(dtype))[2].double()
        for f, dtype in ((relu_ext.prelu, torch.float32), (F.prelu, torch.float32), (F.prelu, torch.float64))
    )
    assert ((ours - truth).abs() <= torch.maximum((theirs - truth).abs(), truth.abs() * 2**-23)).all()


WRONG_WEIGHTS = {
    "another number": lambda: torch.rand(4),
    "two dimensions": lambda: torch.rand(3, 1),
    "another dtype": lambda: torch.rand(3).double(),
    "a number": lambda: 0.25,
    "none": lambda: torch.rand(0),
}


@pytest.mark.parametrize("build", WRONG_WEIGHTS.values(), ids=WRONG_WEIGHTS)
def test_prelu_wrong_weight_raises_what_torch_raises(build):
    assert error_of(relu_ext.prelu, torch.randn(2, 3, 4), build()) == error_of(F.prelu, torch.randn(2, 3, 4), build())
    assert error_of(relu_ext.prelu, torch.randn(3), torch.rand(3)) == error_of(F.prelu, torch.randn(3), torch.rand(3))


def test_prelu_of_no_dimensions(device):
    for shape in ((), (5,)):
        input = moderate(*shape, device=device)
        for weight in (torch.tensor(0.25, device=device), torch.tensor([0.25], device=device)):
            assert_all_same(*(results(f, input, weight)[:2] for f in (relu_ext.prelu, F.prelu)))


def test_prelu_module(device):
    ours, theirs = relu_ext.PReLU(3, init=0.1, device=device), torch.nn.PReLU(3, init=0.3, device=device)
    assert isinstance(ours, torch.nn.PReLU) and repr(ours) == repr(theirs)
    ours.load_state_dict(theirs.state_dict())
    input = moderate(2, 3, 5, device=device)
    assert_same(ours(input), theirs(input))
    ours(input).sum().backward(), theirs(input).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_reglu_module(device):
    module, input = relu_ext.ReGLU(), moderate(3, 5, 66, device=device)
    assert_same(module(input), gated(*input.chunk(2, -1)))
    assert_same(relu_ext.ReGLU(dim=0)(input[:2]), gated(input[:1], input[1:2]))
    assert repr(module) == "ReGLU(dim=-1)"
    assert_same(relu_ext.ReGLU(dim=2)(input), module(input))
    with pytest.raises(RuntimeError, match="multiply up to the size of dim 1"):
        relu_ext.ReGLU(dim=1)(input)


# Both


def reglu_inputs(device, dtype=torch.float32):
    return moderate(4, 12, dtype=dtype, device=device).chunk(2, -1)


def prelu_inputs(device, dtype=torch.float32):
    return moderate(4, 6, 2, dtype=dtype, device=device), moderate(6, dtype=dtype, device=device, seed=1)


PAIRS = {"reglu": (relu_ext.reglu, gated, reglu_inputs), "prelu": (relu_ext.prelu, F.prelu, prelu_inputs)}
over_pairs = pytest.mark.parametrize("ours, theirs, build", PAIRS.values(), ids=PAIRS)


@over_pairs
def test_gradcheck(device, ours, theirs, build):
    inputs = [input.detach().requires_grad_() for input in build(device, torch.float64)]
    assert gradcheck(ours, inputs, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(ours, inputs, check_fwd_over_rev=True, check_batched_grad=True)
    for frozen in (0, 1):
        some = [input.detach().requires_grad_(i != frozen) for i, input in enumerate(inputs)]
        assert gradcheck(ours, some, check_batched_grad=True)
        assert gradgradcheck(ours, some, check_batched_grad=True)


@over_pairs
def test_second_derivatives_of_a_sum(device, ours, theirs, build):
    """The gradient that arrives has no history, what was kept has."""

    def run(function):
        inputs = [input.detach().requires_grad_() for input in build(device)]
        first = torch.autograd.grad(function(*inputs).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum(x.square().sum() for x in first), inputs)

    torch.testing.assert_close(run(ours), run(theirs))


@over_pairs
def test_what_is_kept_does_not_depend_on_modes(device, ours, theirs, build):
    def kept(mode, needs):
        inputs = [input.detach().requires_grad_(need) for input, need in zip(build(device), needs, strict=True)]
        with mode:
            output, kept = kept_by(ours, *inputs)
        gradients = torch.autograd.grad(output.sum(), [x for x in inputs if x.requires_grad])
        return output.grad_fn.name(), [(x.shape, x.dtype) for x in kept], output.detach(), *gradients

    for needs in ((True, True), (True, False), (False, True)):
        alone, watched = kept(torch.enable_grad(), needs), kept(Watch(), needs)
        assert alone[:2] == watched[:2]
        torch.testing.assert_close(alone[2:], watched[2:])


@over_pairs
def test_transforms(device, ours, theirs, build):
    inputs = build(device)
    for transform in (
        lambda f: torch.func.grad(lambda *x: f(*x).sum(), argnums=(0, 1)),
        lambda f: torch.func.jacrev(f, argnums=(0, 1)),
        lambda f: torch.func.jacfwd(f, argnums=(0, 1)),
        lambda f: torch.vmap(f, in_dims=(0, None)) if f in (relu_ext.reglu, gated) else f,
    ):
        torch.testing.assert_close(transform(ours)(*inputs), transform(theirs)(*inputs))


@over_pairs
def test_compile(device, ours, theirs, build):
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(results(compiled, *build(device)), results(theirs, *build(device)))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_script_and_trace(device):
    """Functions and modules, ReLUSquared too, which has no form in place and so no part in other tests of these."""
    reglu_, prelu_ = torch.jit.script(relu_ext.reglu), torch.jit.script(relu_ext.prelu)
    assert_same(reglu_(*reglu_inputs(device)), gated(*reglu_inputs(device)))
    assert_same(prelu_(*prelu_inputs(device)), F.prelu(*prelu_inputs(device)))
    input = moderate(3, 4, device=device)
    for module in (relu_ext.ReGLU(), relu_ext.PReLU(device=device), relu_ext.ReLUSquared()):
        expected = module(input)
        assert_same(torch.jit.script(module)(input), expected)
        assert_same(torch.fx.symbolic_trace(module)(input), expected)
    assert_same(torch.jit.script(relu_ext.relu_squared)(input), torch.relu(input) ** 2)


@over_pairs
def test_autocast(device, ours, theirs, build):
    """prelu has a rule of its own on some devices, reglu's products have none: as torch either way."""
    with torch.autocast(device, torch.bfloat16):
        output, expected = ours(*build(device)), theirs(*build(device))
        recorded = ours(*(x.detach().requires_grad_() for x in build(device))).grad_fn.name()
    assert_same(output, expected)
    assert recorded == ("ReGLUBackward" if ours is relu_ext.reglu else "PreluKernelBackward0")


@over_pairs
@pytest.mark.parametrize("changed", [0, 1])
def test_inputs_changed_before_backward_are_noticed(device, ours, theirs, build, changed):
    inputs = [input.clone().requires_grad_() * 1 for input in build(device)]
    output = ours(*inputs)
    inputs[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@over_pairs
def test_profiler(device, ours, theirs, build):
    with torch.profiler.profile() as profile:
        ours(*(x.detach().requires_grad_() for x in build(device))).sum().backward()
    names = {event.key for event in profile.key_averages()}
    name = "relu_ext::" + ours.__name__
    assert {name, name + "_backward"} <= names
