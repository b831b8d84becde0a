"""Tensors that are not plain: subclasses, duck types, other layouts and dtypes; and copies and files. As with torch."""

import copy
import io
import itertools
import pickle
import warnings
from typing import ClassVar

import pytest
import torch
from composing import FORMS, assert_all_same, error_of, forms_of, leaf, numbers, output_and_gradient, over_forms
from operations import RELU, REPRESENTATIVE, assert_same
from torch.testing._internal.two_tensor import TwoTensor

ROWS = REPRESENTATIVE

# Subclasses


class Named(torch.Tensor):
    """Passes its type on, and notes the functions that see it."""

    seen: ClassVar = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        return super().__torch_function__(function, types, args, kwargs)


@over_forms
def test_torch_function_subclass(operation, device, form):
    def run(function):
        input = numbers(5, 7, device=device).as_subclass(Named)
        Named.seen.clear()
        output = function(input.requires_grad_())
        seen = list(Named.seen)
        output.backward(numbers(5, 7, device=device, seed=1))
        return type(output), seen, [output.detach().as_subclass(torch.Tensor), input.grad.as_subclass(torch.Tensor)]

    (our_type, our_calls, ours), (their_type, their_calls, theirs) = map(run, form(operation))
    assert our_type is their_type
    assert our_calls == their_calls and len(our_calls) > 0
    assert_all_same(ours, theirs)


@pytest.mark.in_place
def test_subclass_without_torch_function(operation, device):
    class Bare(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    def run(function):
        input = leaf(5, 7, device=device)
        output = function(input.as_subclass(Bare))
        return type(output), [
            output.detach(),
            *torch.autograd.grad(output, input, numbers(5, 7, device=device, seed=1)),
        ]

    (our_type, ours), (their_type, theirs) = run(operation.function), run(operation.definition)
    assert our_type is their_type
    assert_all_same(ours, theirs)
    ours, theirs = numbers(5, 7, device=device).as_subclass(Bare), numbers(5, 7, device=device).as_subclass(Bare)
    assert operation.function_(ours) is ours
    assert_same(ours, operation.definition_(theirs))


@pytest.mark.in_place
def test_duck_type(operation):
    class Duck:
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            return function, types, args, kwargs

    duck = Duck()
    assert operation.function(duck) == operation.definition(duck)
    assert operation.function(duck, inplace=True) == operation.definition(duck, inplace=True)
    assert operation.function_(duck) == operation.definition_(duck)
    assert operation.module()(duck) == operation.torch_module()(duck)


class Wrapper(torch.Tensor):
    """Holds a tensor and handles what reaches it below autograd."""

    seen: ClassVar = []

    @staticmethod
    def __new__(cls, inner):
        options = {"dtype": inner.dtype, "device": inner.device, "requires_grad": inner.requires_grad}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, strides=inner.stride(), **options)

    def __init__(self, inner):
        self.inner = inner.detach()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        args = [arg.inner if isinstance(arg, Wrapper) else arg for arg in args]
        result = function(*args, **(kwargs or {}))
        return Wrapper(result) if isinstance(result, torch.Tensor) else result


def test_torch_dispatch_subclass(operation, device):
    """It sees what torch calls, in backward too, and needs to know no operator of ours."""

    def run(relu):
        Wrapper.seen.clear()
        input = Wrapper(leaf(5, 7, device=device))
        output = relu(input)
        (grad,) = torch.autograd.grad(output, input, Wrapper(numbers(5, 7, device=device, seed=1)))
        return list(Wrapper.seen), [output.inner, grad.inner]

    (our_calls, ours), (their_calls, theirs) = run(operation.function), run(operation.definition)
    assert our_calls == their_calls
    assert_all_same(ours, theirs)


def test_torch_dispatch_subclass_as_gradient_or_as_what_is_kept(operation, device):
    """Backward of a plain tensor then calls ATen alone, as any subclass knows that."""

    def run(function, incoming, unpack):
        Wrapper.seen.clear()
        input = leaf(5, 7, device=device)
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, unpack):
            output = function(input)
        (result,) = torch.autograd.grad(output, input, incoming)
        assert not any("relu_ext" in str(function) for function in Wrapper.seen)
        return result.inner

    incoming = numbers(5, 7, device=device, seed=1)
    for arguments in ((Wrapper(incoming), lambda kept: kept), (incoming, Wrapper), (Wrapper(incoming), Wrapper)):
        assert_same(run(operation.function, *arguments), run(operation.definition, *arguments))


def two(seed, device):
    """torch's own test subclass: two tensors, and every operator runs on both."""
    return TwoTensor(numbers(5, 7, device=device, seed=seed), numbers(5, 7, device=device, seed=seed + 1))


def through_two_tensors(function, input):
    """Output and gradient in parts; the gradient that arrives is a TwoTensor."""
    output = function(input.requires_grad_())
    (gradient,) = torch.autograd.grad(output, input, two(2, input.device))
    results = output.detach(), gradient
    return [part for x in results for part in ((x.a, x.b) if isinstance(x, TwoTensor) else (x,))]


@over_forms
def test_two_tensor(operation, device, form):
    ours, theirs = form(operation)
    assert_all_same(through_two_tensors(ours, two(0, device)), through_two_tensors(theirs, two(0, device)))


@over_forms
def test_two_tensor_as_gradient_of_a_plain_tensor(operation, device, form):
    ours, theirs = (through_two_tensors(f, numbers(5, 7, device=device)) for f in form(operation))
    assert len(ours) == 3
    assert_all_same(ours, theirs)


def test_two_tensor_compiled(operation, device):
    torch._dynamo.reset()
    compiled = torch.compile(operation.function, backend="aot_eager", fullgraph=True)
    ours, theirs = (through_two_tensors(f, two(0, device)) for f in (compiled, operation.definition))
    assert_all_same(ours, theirs)


@pytest.fixture
def mesh():
    """Two ranks of which only this one exists: torch's process group for tests, whose collectives move nothing."""
    if not torch.distributed.is_available():
        pytest.skip("a torch without distributed")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield torch.distributed.init_device_mesh("cpu", (2,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("operation", [RELU], ids=str)  # torch's hardtanh knows no sharding
def test_dtensor(operation, mesh):
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    def run(function, placement):
        local = numbers(5, 7)
        input = DTensor.from_local(local, mesh, [placement], run_check=False).requires_grad_()
        output = function(input)
        grad = DTensor.from_local(numbers(5, 7, seed=1), mesh, output.placements, run_check=False)
        (result,) = torch.autograd.grad(output, input, grad)
        return output.placements, [output.detach().to_local(), result.to_local()]

    for placement, form in itertools.product((Shard(0), Shard(1), Replicate(), Partial()), ("function", "module")):
        (our_placements, ours), (their_placements, theirs) = (run(f, placement) for f in FORMS[form](operation))
        assert our_placements == their_placements
        assert_all_same(ours, theirs)


@pytest.mark.parametrize("operation", [RELU], ids=str)  # torch's leaky_relu has no gradient there
def test_jagged_tensor(operation, device):
    def run(function):
        parts = [numbers(n, 7, device=device, seed=n) for n in (2, 5, 3)]
        input = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
        output = function(input)
        assert output.layout is torch.jagged
        output.backward(torch.nested.nested_tensor_from_jagged(numbers(10, 7, device=device), input.offsets()))
        return output.detach().values(), input.grad.values()

    for form in forms_of(operation):
        if form is not FORMS["in place on a view"]:  # no rows without a ragged dimension
            assert_all_same(*map(run, form(operation)))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_strided_nested_tensor(operation, device):
    def run(relu):
        parts = [numbers(n, 7, device=device, seed=n) for n in (2, 5, 3)]
        input = torch.nested.nested_tensor(parts, requires_grad=True)
        output = relu(input)
        output.backward(torch.ones_like(output))
        return [*output.detach().unbind(), *input.grad.unbind()]

    if operation.name not in ("relu", "relu_squared"):  # torch's others know no nested tensors
        assert error_of(run, operation.function) == error_of(run, operation.definition)
        return
    assert_all_same(run(operation.function), run(operation.definition))
    for form in forms_of(operation):
        if form is FORMS["in place"]:
            assert_all_same(*(f(torch.nested.nested_tensor([numbers(9)])).unbind() for f in form(operation)))


def ways_to_call(operation):
    yield operation.function, operation.definition
    yield operation.function_, operation.definition_
    yield operation.module(), operation.torch_module()
    if operation.in_place:
        yield operation.module(inplace=True), operation.torch_module(inplace=True)


def described(function, input):
    """The result with all that tells tensors apart, or the error."""
    try:
        output = function(input)
    except Exception as error:
        return type(error), str(error)
    dense = output.dequantize() if output.is_quantized else output.to_dense()
    return (
        (type(output), output.layout, output.dtype, output.device, output.shape, output is input),
        output.is_conj(),
        output.is_neg(),
        output.requires_grad,
        None if dense.is_meta else repr(dense.detach().resolve_neg().tolist()),  # so that NaN equals NaN
    )


LAYOUTS = {
    "coo": lambda x: x.to_sparse(),
    "coo, uncoalesced": lambda x: torch.sparse_coo_tensor([[1, 1, 0], [2, 2, 3]], x.view(-1)[:3], (4, 6)),
    "coo, hybrid": lambda x: x.to_sparse(1),
    "csr": lambda x: x.to_sparse_csr(),
    "csc": lambda x: x.to_sparse_csc(),
    "bsr": lambda x: x.to_sparse_bsr((2, 2)),
    "mkldnn": lambda x: x.to_mkldnn(),
    "meta": lambda x: x.to("meta"),
}


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning", "ignore:.*legacy constructor:UserWarning")
@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_other_layouts(operation, layout, requires_grad):
    if layout is LAYOUTS["mkldnn"] and not torch.backends.mkldnn.is_available():
        pytest.skip("a torch without oneDNN")
    dense = numbers(4, 6).nan_to_num(0, 1, -1)
    for functions in ways_to_call(operation):
        ours, theirs = (described(f, layout(dense.clone().requires_grad_(requires_grad))) for f in functions)
        assert ours == theirs


@pytest.mark.parametrize("layout", ["coo", "csr"])
def test_gradient_of_a_sparse_tensor(operation, layout):
    def run(relu):
        dense = numbers(4, 6).nan_to_num(0, 1, -1).requires_grad_()
        try:
            relu(LAYOUTS[layout](dense)).to_dense().backward(numbers(4, 6, seed=1))
        except Exception as error:
            return type(error), str(error)
        return dense.grad.tolist()

    assert repr(run(operation.function)) == repr(run(operation.definition))


def castable(dtype):
    try:
        torch.ones(4).to(dtype)
    except (RuntimeError, TypeError):  # quantised and sub-byte ones
        return False
    return True


with warnings.catch_warnings(action="ignore"):  # torch warns that complex32 is an experiment
    DTYPES = sorted(
        {value for value in vars(torch).values() if isinstance(value, torch.dtype) and castable(value)}, key=str
    )


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype(operation, device, dtype):
    """Whatever torch makes of it: values or an error, and the same one."""
    input = torch.tensor([-3, 0, 1, 4], device=device).to(dtype)
    for ours, theirs in ways_to_call(operation):
        assert described(ours, input.clone()) == described(theirs, input.clone())


@pytest.mark.filterwarnings("ignore:.*quantiz.*")
@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
def test_quantized(operation, dtype):
    input = numbers(4, 6).nan_to_num(0, 1, -1)
    scales, zeros = torch.full((4,), 0.1, dtype=torch.float64), torch.full((4,), 8)
    for ours, theirs in ways_to_call(operation):
        for build, arguments in (
            (torch.quantize_per_tensor, (0.1, 8, dtype)),
            (torch.quantize_per_channel, (scales, zeros, 0, dtype)),
        ):
            assert described(ours, build(input, *arguments)) == described(theirs, build(input, *arguments))


@pytest.mark.in_place
def test_tensors_with_a_sign_to_be_applied(operation, device):
    """The imaginary part of a conjugate is a real view whose numbers are yet to be negated; another has no gaps."""

    def imaginary():
        return numbers(5, 7, device=device, seed=2).to(torch.complex64).mul(1j).conj().imag

    def dense():
        return torch._neg_view(numbers(5, 7, device=device, seed=2))

    for view in (imaginary, dense):
        assert view().is_neg()
        for ours, theirs in ((operation.function, operation.definition), (operation.function_, operation.definition_)):
            assert described(ours, view()) == described(theirs, view())
        assert_all_same(*(output_and_gradient(f, view()) for f in (operation.function, operation.definition)))


@pytest.mark.in_place
def test_zero_tensor(operation):
    zeros = torch._efficientzerotensor(5, 7)
    assert described(operation.function, zeros) == described(operation.definition, zeros)
    assert error_of(operation.function_, zeros) == error_of(operation.definition_, zeros)


@pytest.mark.in_place
@pytest.mark.skipif(not hasattr(torch, "_lazy_clone"), reason="a torch without copy-on-write tensors")
def test_copy_on_write(operation, device):
    original = numbers(5, 7, device=device)
    before = original.clone()
    lazy = torch._lazy_clone(original)
    assert_same(operation.function(lazy), operation.definition(before))
    assert torch._C._is_cow_tensor(lazy)  # reading alone copies nothing
    assert_same(operation.function_(lazy), operation.definition(before))
    assert_same(original, before)

    leaf_ = before.clone().requires_grad_()
    output = operation.function(leaf_)
    grad = torch._lazy_clone(before)
    (result,) = torch.autograd.grad(output, leaf_, grad)
    assert torch._C._is_cow_tensor(grad)
    assert_same(result, torch.autograd.grad(operation.definition(leaf_), leaf_, before)[0])


@pytest.mark.in_place
def test_shared_and_borrowed_memory(operation):
    array = numbers(5, 7).numpy()
    expected = operation.definition(torch.tensor(array))
    assert_same(operation.function(torch.from_numpy(array)), expected)
    operation.function_(torch.from_dlpack(array))
    assert_same(torch.tensor(array), expected)
    shared = numbers(5, 7).clone().share_memory_()
    assert operation.function_(shared).is_shared()
    assert_same(shared, expected)


@pytest.mark.in_place
def test_lazily_initialised_parameter(operation):
    parameter = torch.nn.UninitializedParameter()
    for ours, theirs in ((operation.function, operation.definition), (operation.function_, operation.definition_)):
        assert error_of(ours, parameter) == error_of(theirs, parameter)


# Gradients that are not plain, for a graph of plain tensors


def backward_of(function, device):
    input = leaf(7, 5, device=device).t().detach().requires_grad_()
    output = function(input)
    return lambda grad: torch.autograd.grad(output, input, grad)[0]


def test_gradients_of_other_kinds(operation, device):
    negative = numbers(5, 7, device=device).to(torch.complex64).conj().imag
    assert negative.is_neg()
    named = numbers(5, 7, device=device).as_subclass(Named)
    for incoming in (negative, torch._efficientzerotensor((5, 7), device=device), named):
        ours, theirs = (backward_of(f, device)(incoming) for f in (operation.function, operation.definition))
        assert type(ours) is type(theirs)
        assert_same(ours.as_subclass(torch.Tensor), theirs.as_subclass(torch.Tensor))


REFUSED = {
    "sparse": lambda device: numbers(5, 7, device=device).to_sparse(),
    "meta": lambda device: numbers(5, 7, device="meta"),
    "wrong shape": lambda device: numbers(5, 6, device=device),
}


@pytest.mark.parametrize("build", REFUSED.values(), ids=REFUSED)
def test_gradient_that_torch_refuses(operation, device, build):
    incoming = build(device)
    for function in (operation.function, operation.definition):
        with pytest.raises(RuntimeError):
            backward_of(function, device)(incoming)


# Copies and files


@pytest.mark.in_place
@pytest.mark.parametrize("inplace", [False, True])
def test_module_survives_copies_and_files(operation, inplace):
    def through_a_file(module):
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        with torch.serialization.safe_globals([operation.module, torch.nn.Sequential]):
            return torch.load(file, weights_only=True)

    module = operation.module(inplace=inplace).eval()
    module.note = "kept"
    for copied in (copy.copy, copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module)), through_a_file):
        other = copied(module)
        assert type(other) is operation.module and other is not module
        assert (other.inplace, other.training, other.note) == (inplace, False, "kept")
        assert_same(other(numbers(9)), operation.definition(numbers(9)))
    network = copy.deepcopy(torch.nn.Sequential(torch.nn.Linear(3, 3), module))
    assert network[1] is not module and network[1].inplace is inplace


@pytest.mark.in_place
def test_functions_survive_copies_and_files(operation):
    for function in (operation.function, operation.function_):
        assert pickle.loads(pickle.dumps(function)) is function
        assert copy.deepcopy(function) is function


def test_outputs_survive_copies_and_files(operation):
    """An output is a tensor like any other: its numbers are stored, its graph is not."""
    output = operation.function(leaf(5, 7))
    assert error_of(copy.deepcopy, output) == error_of(copy.deepcopy, operation.definition(leaf(5, 7)))
    assert_same(copy.deepcopy(output.detach()), operation.definition(numbers(5, 7)))
    stored = pickle.loads(pickle.dumps(output))
    assert stored.is_leaf
    assert_same(stored, operation.definition(numbers(5, 7)))
