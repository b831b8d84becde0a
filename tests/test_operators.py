"""torch.ops.relu_ext: what opcheck asks of any operator, the bits, layouts, Meta kernels, and every refusal."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from operations import DTYPES, OPERATIONS, REPRESENTATIVE, assert_same, mixed_values, packed
from torch._subclasses import FakeTensorMode

ROWS = [row for row in REPRESENTATIVE if row.keep]

# Each makes a tensor of numbers, of which values(count) gives so many.
LAYOUTS = {
    "contiguous": lambda values: values(105).view(3, 5, 7),
    "0-d": lambda values: values(1)[0],
    "transposed": lambda values: values(35).view(5, 7).t(),
    "channels_last": lambda values: values(90).view(2, 3, 3, 5).to(memory_format=torch.channels_last),
    "offset": lambda values: values(37)[2:],
    "sliced": lambda values: values(60).view(6, 10)[:, 2:5],
    "expanded": lambda values: values(5).view(5, 1).expand(5, 3),
    "size 1, large stride": lambda values: values(15).as_strided((3, 1, 5), (5, 99, 1)),
    "empty": lambda values: values(0).view(3, 0, 2),
}
over_layouts = pytest.mark.parametrize("build", LAYOUTS.values(), ids=LAYOUTS)


def finite(device, dtype):
    """opcheck's equality refuses NaN."""
    return lambda count: mixed_values(count, dtype, device).nan_to_num()


def opcheck(*arguments):
    pytest.importorskip("expecttest", reason="torch.library.opcheck imports it")
    torch.library.opcheck(*arguments)


def raw(operation, way):
    return getattr(torch.ops.relu_ext, f"{operation.name}_{way}")


def bits_of(operation, input):
    return operation.forward(input)[1]


@pytest.mark.parametrize("operation", [row for row in OPERATIONS if row.keep], ids=str)
def test_schemas(operation):
    forward = "forward(Tensor input, float[] scalars=[]) -> (Tensor output, Tensor bits)"
    backward = "backward(Tensor grad, Tensor bits, SymInt[] stride, float[] scalars=[]) -> Tensor"
    for way, schema in (("forward", forward), ("backward", backward)):
        assert str(raw(operation, way).default._schema) == f"relu_ext::{operation.name}_{schema}"


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("operation", [row for row in OPERATIONS if row.keep], ids=str)
def test_wrong_number_of_scalars(operation, device, requires_grad):
    input, bits = torch.ones(3, device=device, requires_grad=requires_grad), byte(device, 7)
    right = operation.scalars
    for wrong in ([1.0] * count for count in range(4) if count != len(right)):
        with pytest.raises(RuntimeError, match=f"{operation.name} has {len(right)} scalars, got {len(wrong)}"):
            raw(operation, "forward")(input, wrong)
        with pytest.raises(RuntimeError, match=f"{operation.name} has {len(right)} scalars, got {len(wrong)}"):
            raw(operation, "backward")(input, bits, [1], wrong)


@pytest.mark.parametrize("operation", [row for row in OPERATIONS if row.keep and row.scalars], ids=str)
def test_a_scalar_that_is_nan(operation, device):
    wrong = [*operation.scalars[1:], float("nan")]
    with pytest.raises(ValueError, match=f"are not those of a {operation.name}"):
        raw(operation, "forward")(torch.ones(3, device=device), wrong)
    with pytest.raises(ValueError, match=f"are not those of a {operation.name}"):
        raw(operation, "backward")(torch.ones(3, device=device), byte(device, 7), [1], wrong)


# The forward


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_layouts
def test_opcheck_forward(operation, device, dtype, build, requires_grad):
    input = build(finite(device, dtype)).requires_grad_(requires_grad)
    opcheck(raw(operation, "forward"), (input, operation.scalars))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_layouts
def test_forward(operation, device, dtype, build):
    input = build(lambda count: mixed_values(count, dtype, device))
    output, bits = operation.forward(input)
    assert_same(output, operation.definition(input))
    assert output.stride() == torch.relu(input).stride()
    keep = torch.empty_strided(output.shape, output.stride(), dtype=torch.bool, device=device)
    assert torch.equal(bits, packed(keep.copy_(operation.keep(input))))


@pytest.mark.parametrize(
    "wrong",
    [
        torch.arange(4),
        torch.ones(3, dtype=torch.bool),
        torch.ones(3, dtype=torch.complex64),
        torch.ones(3, dtype=torch.uint8),
        torch.ones(3).to(torch.float8_e4m3fn),
    ],
    ids=lambda tensor: str(tensor.dtype),
)
@pytest.mark.parametrize("meta", [False, True], ids=["data", "meta"])
def test_forward_refuses_other_dtypes(operation, device, wrong, meta):
    with pytest.raises(TypeError, match="expected float32, float64, float16 or bfloat16, got "):
        operation.forward(wrong.to("meta" if meta else device))


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=["sparse", "mkldnn"])
def test_forward_refuses_other_layouts(operation, make):
    with pytest.raises(NotImplementedError, match=f"relu_ext::{operation.name}_forward"):
        operation.forward(make(torch.randn(3, 3)))


# The backward


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_layouts
def test_opcheck_backward(operation, device, dtype, build, requires_grad):
    output, bits = operation.forward(build(finite(device, dtype)))
    grad = torch.randn(output.shape, dtype=dtype, device=device).requires_grad_(requires_grad)
    opcheck(raw(operation, "backward"), (grad, bits, output.stride(), operation.scalars))


GRADS = {
    "contiguous": lambda grad: grad.contiguous(),
    "channels_last": lambda grad: grad.contiguous(memory_format=torch.channels_last),
    "transposed": lambda grad: grad.transpose(2, 3).contiguous().transpose(2, 3),
    "sliced": lambda grad: torch.cat([grad, grad], 1)[:, : grad.shape[1]],
    "expanded": lambda grad: grad[:1, :, :1].expand_as(grad),
    "offset": lambda grad: torch.cat([grad.flatten()[:1], grad.flatten()])[1:].view(grad.shape),
}
STRIDES = {"contiguous": (60, 20, 5, 1), "channels_last": (60, 1, 15, 3), "reversed": (1, 2, 6, 24)}


@pytest.mark.parametrize("stride", STRIDES.values(), ids=STRIDES)
@pytest.mark.parametrize("make", GRADS.values(), ids=[f"grad {name}" for name in GRADS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_copies_a_grad_of_another_layout(operation, device, dtype, make, stride):
    input = torch.empty_strided((2, 3, 4, 5), stride, dtype=dtype, device=device)
    input.copy_(mixed_values(120, dtype).view(2, 3, 4, 5))
    grad = make(mixed_values(120, dtype, device, 1).view(2, 3, 4, 5))
    before = grad.clone()
    result = operation.backward(grad, bits_of(operation, input), stride)
    assert result.stride() == stride
    assert_same(result, operation.masked(grad, operation.keep(input)))
    assert_same(grad, before)


@pytest.mark.parametrize("offset", range(1, 9))
def test_backward_takes_bits_at_any_address(operation, device, offset):
    input = mixed_values(131, torch.float32, device)
    bits = torch.cat([torch.full((offset,), 255, dtype=torch.uint8, device=device), bits_of(operation, input)])[offset:]
    grad = mixed_values(131, torch.float32, device, 1)
    assert_same(operation.backward(grad, bits, [1]), operation.masked(grad, operation.keep(input)))


def test_backward_ignores_spare_bits(operation, device):
    grad = torch.randn(5, device=device)
    bits = torch.tensor([0b11100101], dtype=torch.uint8, device=device)
    assert_same(
        operation.backward(grad, bits, [1]),
        operation.masked(grad, torch.tensor([True, False, True, False, False], device=device)),
    )


@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), ()], ids=str)
def test_no_elements_and_no_dimensions(operation, device, shape):
    output, bits = operation.forward(torch.full(shape, 0.5, device=device))
    assert bits.shape == (output.dim() == 0,)
    assert_same(operation.backward(output, bits, output.stride()), output)


def byte(device, *values):
    return torch.tensor(values, dtype=torch.uint8, device=device)


WRONG_BITS = {
    "too short": lambda device: byte(device, 1),
    "too long": lambda device: byte(device, 1, 2, 3),
    "none": lambda device: byte(device),
    "2-d": lambda device: byte(device, 1, 2).view(2, 1),
    "0-d": lambda device: byte(device, 1)[0],
    "every other byte": lambda device: byte(device, 1, 2, 3, 4)[::2],
    "expanded": lambda device: byte(device, 1).expand(2),
    "bool": lambda device: torch.ones(2, dtype=torch.bool, device=device),
    "int8": lambda device: torch.ones(2, dtype=torch.int8, device=device),
    "float": lambda device: torch.ones(2, device=device),
}


@pytest.mark.parametrize("make", WRONG_BITS.values(), ids=WRONG_BITS)
@pytest.mark.parametrize("meta", [False, True], ids=["data", "meta"])
def test_backward_refuses_wrong_bits(operation, device, make, meta):
    device = "meta" if meta else device
    with pytest.raises(RuntimeError, match="relu_ext: bits must be "):
        operation.backward(torch.ones(3, 3, device=device), make(device), [3, 1])


def test_backward_refuses_bits_of_another_device(operation, device):
    """The dispatcher takes the Meta kernel for any mixture with a meta tensor: its result would be memory as it was."""
    here, meta = (torch.ones(1, dtype=torch.uint8, device=where) for where in (device, "meta"))
    for grad, bits in ((here, meta), (meta, here)):
        with pytest.raises(RuntimeError, match="relu_ext: bits must be "):
            operation.backward(grad.float(), bits, [1])


WRONG_STRIDES = {
    "too few": [1],
    "too many": [9, 3, 1],
    "none": [],
    "negative": [3, -1],
    "zero": [0, 1],
    "overlapping": [1, 1],
    "gaps between elements": [6, 2],
    "gaps between rows": [4, 1],
    "huge": [2**62, 1],
}


@pytest.mark.parametrize("stride", WRONG_STRIDES.values(), ids=WRONG_STRIDES)
def test_backward_refuses_wrong_strides(operation, device, stride):
    with pytest.raises(RuntimeError, match=r"relu_ext: .*strides"):
        operation.backward(torch.ones(3, 3, device=device), byte(device, 255, 1), stride)


@pytest.mark.parametrize("stride", [[1], [9, 3, 1], []], ids=str)
def test_backward_without_data_refuses_another_number_of_strides(operation, stride):
    """Their values may be symbols there, which a check would tie to one shape."""
    with pytest.raises(RuntimeError, match=r"relu_ext: .*strides"):
        operation.backward(torch.ones(3, 3, device="meta"), byte("meta", 255, 1), stride)


@pytest.mark.parametrize("meta", [False, True], ids=["data", "meta"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64], ids=str)
def test_backward_refuses_other_dtypes(operation, device, dtype, meta):
    device = "meta" if meta else device
    with pytest.raises(TypeError, match="expected float32, float64, float16 or bfloat16, got "):
        operation.backward(torch.ones(3, dtype=dtype, device=device), byte(device, 1), [1])


# Derivatives


def test_operators_differentiate(operation, device):
    input = mixed_values(35, torch.float64, device).nan_to_num(posinf=1).view(5, 7).t().requires_grad_()
    output, bits = operation.forward(input)
    assert output.requires_grad and not bits.requires_grad
    grad = torch.randn(7, 5, dtype=torch.float64, device=device, requires_grad=True)
    (first,) = torch.autograd.grad(output, input, grad, create_graph=True)
    keep = operation.keep(input).detach()
    assert_same(first.detach(), operation.masked(grad, keep).detach())
    second = torch.randn(7, 5, dtype=torch.float64, device=device)
    assert_same(torch.autograd.grad(first, grad, second)[0], operation.masked(second, keep))


def test_operators_have_no_forward_mode(operation, device):
    """They say so rather than drop the tangent."""
    numbers = torch.randn(9, device=device)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(numbers, numbers)
        for call in (operation.forward, lambda x: operation.backward(x, byte(device, 255, 1), [1])):
            with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
                call(dual)


@pytest.mark.parametrize("stride", [(7, 1), (1, 5)], ids=["contiguous", "transposed"])
def test_gradcheck_backward(operation, device, stride):
    input = torch.empty_strided((5, 7), stride, device=device).normal_()
    grad = torch.randn(5, 7, dtype=torch.float64, device=device, requires_grad=True)
    bits = bits_of(operation, input)
    assert torch.autograd.gradcheck(lambda grad: operation.backward(grad, bits, stride), grad)
    assert torch.autograd.gradgradcheck(lambda grad: operation.backward(grad, bits, stride), grad)


# Without data


@pytest.mark.parametrize("without_data", ["meta", "fake"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@over_layouts
def test_shapes_and_strides_without_data(operation, device, dtype, build, without_data):
    input = build(lambda count: mixed_values(count, dtype, device))
    output, bits = operation.forward(input)
    grad = torch.randn(input.shape, dtype=dtype, device=device)
    result = operation.backward(grad, bits, output.stride())
    mode = FakeTensorMode()

    def hollow(tensor):
        if without_data == "fake":
            return mode.from_tensor(tensor)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")

    hollow_output, hollow_bits = operation.forward(hollow(input))
    hollow_result = operation.backward(hollow(grad), hollow_bits, hollow_output.stride())
    for ours, theirs in ((hollow_output, output), (hollow_bits, bits), (hollow_result, result)):
        assert (ours.shape, ours.stride(), ours.dtype) == (theirs.shape, theirs.stride(), theirs.dtype)
        assert ours.device.type == ("meta" if without_data == "meta" else device)
