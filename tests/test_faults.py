"""What is given wrongly, taken away or exchanged: a clear error or the right numbers, never a crash.

What might crash runs in a process of its own, so that the crash has a name.
"""

import ctypes
import functools
import inspect
import itertools
import os
import resource
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from calls import CALLS, NEVER, Call
from operations import OPERATIONS, kept_by, packed
from processes import TESTS, in_child, run_script
from tally import TRIED
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks

import relu_ext
from relu_ext import _C

over_calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
ERRORS = (RuntimeError, TypeError, ValueError, IndexError, AssertionError)  # the last is FakeTensorMode's


def outcome(function, *arguments):
    """What it returns, or the error that it raises."""
    try:
        return function(*arguments)
    except ERRORS as error:
        assert "INTERNAL ASSERT" not in str(error)
        return error


def assert_right_or_refused(result, expected) -> None:
    if not isinstance(result, Exception):
        torch.testing.assert_close([x.to_dense() for x in result], expected)


def halve(tensor) -> torch.Tensor:
    """The tensor, of whose memory one half is gone."""
    tensor.untyped_storage().resize_(tensor.nbytes // 2)
    return tensor


def empty(tensor) -> torch.Tensor:
    """The tensor, whose memory is gone."""
    tensor.untyped_storage().resize_(0)
    return tensor


def shorten(tensor) -> torch.Tensor:
    """The tensor, of whose memory the last byte is gone."""
    tensor.untyped_storage().resize_(tensor.nbytes - 1)
    return tensor


TAKEN = (empty, halve, shorten)


def in_other_memory_order(tensor) -> torch.Tensor:
    """The same elements in the same shape."""
    backwards = tuple(range(tensor.dim()))[::-1]
    return tensor.permute(backwards).contiguous().permute(backwards)


def fake(tensor) -> torch.Tensor:
    return FakeTensorMode().from_tensor(tensor)


# Gradients

# Those that torch takes for some operation must give its numbers; where it raises an error ours does, too.
GRADS = {
    "shorter": lambda grad: grad[1:],
    "longer": lambda grad: torch.cat([grad, grad]),
    "flat": lambda grad: grad.flatten(),
    "0-d": lambda grad: grad.sum(),
    "one more dimension": lambda grad: grad[None],
    "its dimensions exchanged": lambda grad: grad.transpose(0, 1),
    "float64": lambda grad: grad.double(),
    "float16": lambda grad: grad.half(),
    "int64": lambda grad: grad.long(),
    "bool": lambda grad: grad > 0,
    "complex": lambda grad: grad.to(torch.complex64),
    "meta": lambda grad: grad.to("meta"),
    "sparse": lambda grad: grad.to_sparse(),
    "nested": lambda grad: torch.nested.nested_tensor(list(grad), layout=torch.jagged),
    "requires grad": lambda grad: grad.clone().requires_grad_(),
    "of one element": lambda grad: grad[:1, :1, :1].expand_as(grad),
    "in another memory order": in_other_memory_order,
    "sliced": lambda grad: torch.stack([grad, grad], -1)[..., 0],
    "a negative view": lambda grad: torch._neg_view(-grad),
    "a part of a conjugate": lambda grad: torch.complex(grad, -grad).conj().imag,
    "efficient zeros": lambda grad: torch._efficientzerotensor(grad.shape, device=grad.device),
    "a parameter": lambda grad: torch.nn.Parameter(grad),
    "inference": torch.inference_mode(lambda grad: grad.clone()),
}
GRADS_WITHOUT_MEMORY = {"without memory": empty, "with half of its memory": halve}


@over_calls
def test_grads_of_any_kind(device, call):
    inputs = call.inputs(device=device)
    grad = torch.randn(call.definition(*inputs).shape, generator=torch.Generator().manual_seed(9)).to(device)

    def as_torch(make):
        ours, theirs = (outcome(call.results, f, inputs, make(grad)) for f in (call.function, call.definition))
        assert isinstance(ours, Exception) == isinstance(theirs, Exception), (ours, theirs)
        if not isinstance(ours, Exception):
            torch.testing.assert_close(ours, theirs)

    def refused(make):
        expected = call.results(call.definition, inputs, grad)
        assert_right_or_refused(outcome(call.results, call.function, inputs, make(grad.clone())), expected)

    in_child(
        [
            *((name, lambda make=make: as_torch(make)) for name, make in GRADS.items()),
            *((name, lambda make=make: refused(make)) for name, make in GRADS_WITHOUT_MEMORY.items()),
        ]
    )


WRONG_SHAPES = ["shorter", "longer", "flat", "0-d", "one more dimension", "its dimensions exchanged"]


@pytest.mark.parametrize("name", [name for name in CALLS if name != "ReLUFunction"])
def test_a_node_that_is_called_with_a_grad_of_another_shape(device, name):
    """As nobody but the engine does, which looks first."""
    call = CALLS[name]
    leaves = call.leaves(call.inputs(device=device))
    output = call.function(*leaves)

    def refused(make):
        with pytest.raises(RuntimeError, match="a gradient of shape"):
            output.grad_fn(make(output.detach()))

    in_child((wrong, lambda wrong=wrong: refused(GRADS[wrong])) for wrong in WRONG_SHAPES)
    gradients = output.grad_fn(None)
    assert gradients is None or set(gradients) == {None}


def test_a_node_whose_bits_would_do_for_a_longer_grad(device):
    """Ten elements have two bytes of bits, as twelve have."""
    for function in (relu_ext.relu, relu_ext.relu_dropout):
        output = function(torch.ones(10, device=device, requires_grad=True))
        with pytest.raises(RuntimeError, match=r"a gradient of shape \[12\] for an output of shape \[10\]"):
            output.grad_fn(torch.ones(12, device=device))


# What is kept

KEPT = {
    "its first element": lambda kept: kept.flatten()[:1].clone(),
    "nothing": lambda kept: kept.flatten()[:0].clone(),
    "shorter": lambda kept: kept[:-1].clone(),  # beyond a view of it there would be the right numbers
    "longer": lambda kept: torch.cat([kept, kept]),
    "flat": lambda kept: kept.flatten(),
    "its dimensions exchanged": lambda kept: kept.movedim(0, -1),
    "one more dimension": lambda kept: kept[None],
    "float64": lambda kept: kept.double(),
    "int64": lambda kept: kept.long(),
    "bool": lambda kept: kept > 0,
    "meta": lambda kept: kept.to("meta"),
    "sparse": lambda kept: kept.to_sparse(),
    "fake": fake,
    "without memory": lambda kept: empty(kept.clone()),
    "with half of its memory": lambda kept: halve(kept.clone()),
    "None": lambda kept: None,
}
# The same elements.
KEPT_AND_RIGHT = {
    "in another memory order": in_other_memory_order,
    "sliced": lambda kept: torch.stack([kept, kept], -1)[..., 0],
    "a negative view": lambda kept: torch._neg_view(-kept),
    "requires grad": lambda kept: kept.clone().requires_grad_(kept.is_floating_point()),
}


def exchanged(call, inputs, place, make, expand):
    """The gradients where a hook unpacks something else for the tensor that was saved in this place.

    A grad of one element, expanded, is the definition's: the kernels take none.
    """
    places = itertools.count()
    with saved_tensors_hooks(
        lambda kept: (next(places), kept.detach().clone()),
        lambda packed: make(packed[1]) if packed[0] == place else packed[1],
    ):
        leaves = call.leaves(inputs)
        output = call.function(*leaves)
        grad = torch.ones((), device=output.device).expand(output.shape) if expand else None
        return [output.detach(), *call.gradients(output, leaves, grad)]


@over_calls
def test_hooks_that_unpack_something_else(device, call):
    """`int64` and `bool` are other numbers: of what is no bits they may give another gradient, as in torch."""
    inputs = call.inputs(device=device)
    expected, kept = call.results(call.function, inputs), kept_by(call.function, *call.leaves(inputs))[1]
    assert kept

    def refused(place, name, expand):
        result = outcome(exchanged, call, inputs, place, KEPT[name], expand)
        if name not in ("int64", "bool") or kept[place].dtype == torch.uint8:
            assert_right_or_refused(result, expected)

    def right(place, name, expand):
        result = outcome(exchanged, call, inputs, place, KEPT_AND_RIGHT[name], expand)
        if kept[place].dtype == torch.uint8:
            return assert_right_or_refused(result, expected)
        torch.testing.assert_close(result, expected)

    in_child(
        (f"{name}, place {place}, {expand=}", functools.partial(test, place, name, expand))
        for expand in (False, True)
        for place in range(len(kept))
        for test, names in ((refused, KEPT), (right, KEPT_AND_RIGHT))
        for name in names
    )


@pytest.mark.parametrize("name", ["shorter", "longer", "its first element", "float64", "one more dimension"])
@pytest.mark.parametrize("expanded", [False, True])
def test_bits_that_are_none(device, name, expanded):
    """An error of ours, on the kernels' road and on that of the definition, which a grad with history takes."""
    for function in (relu_ext.relu, relu_ext.relu_dropout, relu_ext.leaky_relu):
        call = Call(function, None)
        with saved_tensors_hooks(lambda kept: kept, KEPT[name]):
            leaf = torch.randn(40, device=device, requires_grad=True)
            output = function(leaf)
        grad = torch._neg_view(torch.ones(40, device=device)) if expanded else torch.ones(40, device=device)
        with pytest.raises(RuntimeError, match="relu_ext: bits must be one contiguous dimension of uint8"):
            call.gradients(output, [leaf], grad)


DATA = {
    "shorter": lambda data: data[:-1].clone(),
    "longer": lambda data: torch.cat([data, data]),
    "its first element": lambda data: data.flatten()[:1].clone(),
    "without memory": lambda data: empty(data.clone()),
    "with half of its memory": lambda data: halve(data.clone()),
}


@over_calls
def test_data_exchanged_between_forward_and_backward(device, call):
    """x.data = ..., which no version counter sees; and memory that is taken away."""
    inputs = call.inputs(device=device)
    expected = call.results(call.function, inputs)

    def run(place, change):
        leaves = call.leaves([x.clone() for x in inputs])
        output = call.function(*leaves)
        result = output.detach().clone()
        change(leaves[place])
        return [result, *call.gradients(output, leaves)]

    def exchange(make):
        return lambda leaf: setattr(leaf, "data", make(leaf.data))

    def other_order(place):
        torch.testing.assert_close(run(place, exchange(in_other_memory_order)), expected)

    def refused(place, change):
        assert_right_or_refused(outcome(run, place, change), expected)

    changes = {name: exchange(make) for name, make in DATA.items()}
    changes |= {"memory freed": empty, "memory halved": halve, "set_": lambda leaf: leaf.detach().set_()}
    in_child(
        [
            *((f"other order, input {k}", lambda k=k: other_order(k)) for k in range(len(inputs))),
            *(
                (f"{name}, input {k}", lambda k=k, change=change: refused(k, change))
                for name, change in changes.items()
                for k in range(len(inputs))
            ),
        ]
    )


@over_calls
def test_output_freed_between_forward_and_backward(call):
    inputs = call.inputs()
    expected = call.results(call.function, inputs)

    def run(free):
        leaves = call.leaves(inputs)
        output = call.function(*leaves)
        free(output.detach())
        return [expected[0], *call.gradients(output, leaves, torch.ones(output.shape))]

    in_child((free.__name__, lambda f=free: assert_right_or_refused(outcome(run, f), expected)) for free in TAKEN)


@pytest.mark.parametrize("name", [name for name in CALLS if "in place" not in name])
def test_inputs_without_memory(name):
    """torch's own kernels do not look: it crashes."""
    call = CALLS[name]
    inputs = call.inputs()

    def refused(place, take):
        given = [take(x.clone()) if k == place else x for k, x in enumerate(inputs)]
        assert isinstance(outcome(call.function, *call.leaves(given)), RuntimeError)

    in_child(
        (f"{take.__name__}, input {k}", lambda k=k, take=take: refused(k, take))
        for take in TAKEN
        for k in range(len(inputs))
    )


@pytest.mark.parametrize("row", [row for row in OPERATIONS if row.in_place], ids=str)
def test_in_place_without_memory(row):
    def refused(take):
        tensor = take(torch.ones(80))
        assert isinstance(outcome(row.function_, tensor), RuntimeError) and tensor._version == 0

    in_child((take.__name__, lambda take=take: refused(take)) for take in TAKEN)


@over_calls
def test_what_is_kept_and_changed_in_place_is_noticed(device, call):
    """Output or input: an error where it was kept, the right gradient where it was not."""
    inputs = call.inputs(device=device)
    expected = call.results(call.function, inputs)[1:]
    for place in range(len(inputs) + 1):
        tensors = [x * 1 for x in call.leaves(inputs)]
        output, kept = kept_by(call.function, *tensors)
        is_kept = [output, *tensors][place].data_ptr() in [x.data_ptr() for x in kept]
        leaves = call.leaves(inputs)
        tensors = [x * 1 for x in leaves]  # of another graph: where hooks are, no version is looked at
        output = call.function(*tensors)
        [output, *tensors][place].detach().mul_(1)
        if is_kept:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                call.gradients(output, leaves)
        else:
            torch.testing.assert_close(list(call.gradients(output, leaves)), expected)


@over_calls
def test_backward_twice(device, call):
    leaves = call.leaves(call.inputs(device=device))
    output = call.function(*leaves)
    call.gradients(output, leaves)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
            call.gradients(output, leaves)


# The registered operators

OPERATORS = [operation for operation in OPERATIONS if operation.keep]
ELEMENTS = 9  # and two bytes of bits


def bits(count=2, **options):
    return torch.zeros(count, dtype=torch.uint8, **options)


def sliced(whole, places, take):
    """A part of a tensor, some of whose memory is taken away afterwards."""
    part = whole[places]
    take(whole)
    return part


TENSORS = {
    "None": lambda: None,
    "a list": lambda: [1.0, 2.0],
    "a number": lambda: 1.0,
    "an array": lambda: np.ones(ELEMENTS, np.float32),
    "int64": lambda: torch.ones(ELEMENTS, dtype=torch.int64),
    "complex": lambda: torch.ones(ELEMENTS, dtype=torch.complex64),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(ELEMENTS), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.ones(ELEMENTS).to_sparse(),
    "compressed": lambda: torch.ones(3, 3).to_sparse_csr(),
    "mkldnn": lambda: torch.ones(ELEMENTS).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(3)], layout=torch.strided),
    "without memory": lambda: empty(torch.ones(ELEMENTS)),
    "with half of its memory": lambda: halve(torch.ones(ELEMENTS)),
    "a slice without memory": lambda: sliced(torch.ones(4 * ELEMENTS), slice(None, None, 4), halve),
    "of more elements than there is memory": lambda: torch.ones(1).expand(2**62),
    "of the most elements": lambda: torch.ones(1).expand(2**63 - 1),
}
BITS = {
    "None": lambda: None,
    "a list": lambda: [255, 1],
    "too short": lambda: bits(1),
    "too long": lambda: bits(3),
    "none": lambda: bits(0),
    "two dimensions": lambda: bits()[None],
    "no dimensions": lambda: bits()[0],
    "every other": lambda: bits(4)[::2],
    "expanded": lambda: bits(1).expand(2),
    "int64": lambda: bits().long(),
    "float32": lambda: bits().float(),
    "bool": lambda: bits().bool(),
    "meta": lambda: bits(device="meta"),
    "sparse": lambda: bits().to_sparse(),
    "without memory": lambda: sliced(bits(64), slice(2), empty),
    "fake": lambda: fake(bits()),
}
STRIDES = {
    "None": None,
    "a number": 1.5,
    "a string": "1",
    "none": [],
    "two": [1, 1],
    "zero": [0],
    "negative": [-1],
    "two apart": [2],
    "the largest": [2**63 - 1],
    "the smallest": [-(2**63)],
    "no int64": [2**64],
}


def refused(operator, *arguments):
    result = outcome(operator, *arguments)
    assert isinstance(result, Exception), result
    assert str(result)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_operators_refuse(requires_grad):
    """Whatever is in one argument's place, the others being right."""

    def faults():
        grad = torch.ones(ELEMENTS, requires_grad=requires_grad)
        for operation in OPERATORS:
            name, right = operation.name, list(operation.scalars)
            forward, backward = (getattr(torch.ops.relu_ext, f"{name}_{way}") for way in ("forward", "backward"))
            for kind, make in TENSORS.items():
                yield f"{name}, input {kind}", lambda f=forward, make=make, s=right: refused(f, make(), s)
                yield f"{name}, grad {kind}", lambda f=backward, make=make, s=right: refused(f, make(), bits(), [1], s)
            for kind, make in BITS.items():
                yield f"{name}, bits {kind}", lambda f=backward, make=make, s=right: refused(f, grad, make(), [1], s)
            for kind, stride in STRIDES.items():
                yield f"{name}, strides {kind}", lambda f=backward, i=stride, s=right: refused(f, grad, bits(), i, s)
            for wrong in ([*right, 1.0], ["1"], [None], "1", 1j, [torch.ones(2)]):
                yield f"{name}, scalars {wrong}", lambda f=forward, s=wrong: refused(f, grad, s)
                yield f"{name}, scalars {wrong}", lambda f=backward, s=wrong: refused(f, grad, bits(), [1], s)
        dropout = torch.ops.relu_ext.relu_dropout_forward
        for kind, make in TENSORS.items():
            yield f"dropout, input {kind}", lambda make=make: refused(dropout, make(), 0.5)
        for p in (-0.1, 1.1, float("nan"), float("inf"), None, "0.5", [0.5]):
            for device in ("cpu", "meta"):
                yield f"dropout, p {p}", lambda p=p, d=device: refused(dropout, torch.ones(9, device=d), p)
        for generator in (0, "cpu", torch.ones(1), object()):
            yield "dropout, generator", lambda g=generator: refused(dropout, grad, 0.5, g)

    in_child(faults())


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (1, 1), ()], ids=str)
@pytest.mark.parametrize("step", [-5, 0, 2**63 - 1, -(2**63)])
def test_strides_that_are_never_taken(shape, step):
    """Of dimensions with no step to take they may be anything, also in empty_strided, which has the last word."""
    stride = [step] * len(shape)
    grad = torch.ones(shape)

    def as_torch():
        ours = outcome(torch.ops.relu_ext.relu_backward, grad, bits((grad.numel() + 7) // 8) + 1, stride)
        theirs = outcome(torch.empty_strided, shape, stride)
        assert isinstance(ours, Exception) == isinstance(theirs, Exception), (ours, theirs)
        if not isinstance(ours, Exception):
            assert ours.stride() == theirs.stride() and torch.equal(ours, grad)

    in_child([(f"{shape}, {step}", as_torch)])


DISGUISES = {
    "a negative view": lambda bits: torch._neg_view(-bits),
    "a parameter": lambda bits: torch.nn.Parameter(bits, requires_grad=False),
    "inference": torch.inference_mode(lambda bits: bits.clone()),
}


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_bits_in_disguise(disguise):
    """What PyTorch resolves before it calls a kernel."""
    keep = torch.arange(ELEMENTS) % 3 == 0
    result = torch.ops.relu_ext.relu_backward(torch.ones(ELEMENTS), disguise(packed(keep)), [1])
    assert torch.equal(result, keep.float())


def test_operators_refuse_dual_tensors():
    """They have no forward-mode derivative: without an error the tangent would be lost."""
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(torch.ones(ELEMENTS), torch.ones(ELEMENTS))
        for operation in OPERATORS:
            for refused in (
                lambda: operation.forward(dual),  # noqa: B023
                lambda: operation.backward(dual, bits(), [1]),  # noqa: B023
            ):
                with pytest.raises(NotImplementedError, match=rf"call relu_ext\.{operation.name}\("):
                    refused()
        with pytest.raises(NotImplementedError, match=r"call relu_ext\.relu_dropout"):
            torch.ops.relu_ext.relu_dropout_forward(dual, 0.5)
        tangent = forward_ad.unpack_dual(relu_ext.relu_dropout(dual, NEVER)).tangent
    torch.testing.assert_close(tangent, torch.ones(ELEMENTS))


# The entries


def entries() -> dict[str, tuple]:
    """Of relu_ext._C: each with arguments that it takes."""
    x, like, vector = torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.rand(3)
    found = {}
    for row in OPERATIONS:
        found[row.name] = (x, *row.scalars, *[False] * row.in_place)
        if row.in_place:
            found[f"{row.name}_"] = (x, *row.scalars)
    return found | {
        "prelu": (x, vector),
        "reglu": (x, like),
        "add_relu": (x, like),
        "bias_relu": (x, vector, 1),
        "scale_shift_relu": (x, vector, vector, like, 1),
        "fma_relu": (x, vector, vector, None, 1),
        "relu_dropout": (x, 0.5, True, None),
        "linear_relu": (x, torch.randn(5, 4), torch.randn(5)),
    }


class Subclass(torch.Tensor):
    pass


class Index:
    """What Python takes for an integer, but no plain one."""

    def __index__(self):
        return 1

    def __float__(self):
        return 1.0


JUNK = {
    **TENSORS,
    "a subclass": lambda: torch.randn(2, 3, 4).as_subclass(Subclass),
    "a parameter": lambda: torch.nn.Parameter(torch.randn(2, 3, 4)),
    "fake": lambda: fake(torch.randn(2, 3, 4)),
    "meta": lambda: torch.randn(2, 3, 4, device="meta"),
    "float64": lambda: torch.randn(2, 3, 4, dtype=torch.float64),
    "no dimensions": lambda: torch.tensor(1.0),
    "no elements": lambda: torch.empty(2, 0, 4),
    "one dimension": lambda: torch.randn(3),
    "seventy dimensions": lambda: torch.randn([1] * 70),
    "expanded": lambda: torch.randn(3, 1).expand(2, 3, 4),
    "efficient zeros": lambda: torch._efficientzerotensor(2, 3, 4),
    "a new tensor": lambda: torch.Tensor.__new__(torch.Tensor),
    "a type": lambda: torch.Tensor,
    "a module": lambda: torch.nn.ReLU(),
    "an object": object,
    "a string": lambda: "1",
    "bytes": lambda: b"1",
    "a dictionary": dict,
    "a generator": torch.Generator,
    "True": lambda: True,
    "False": lambda: False,
    "-1": lambda: -1,
    "2^53": lambda: 2**53,
    "2^70": lambda: 2**70,
    "-2^63": lambda: -(2**63),
    "NaN": lambda: float("nan"),
    "infinity": lambda: float("inf"),
    "1e308": lambda: 1e308,
    "numpy.float32": lambda: np.float32(1),
    "numpy.float64": lambda: np.float64(1),
    "numpy.int64": lambda: np.int64(1),
    "an index": Index,
    "complex number": lambda: 1j,
    "a fraction": lambda: __import__("fractions").Fraction(1, 2),
}


def definition_of(name):
    return inspect.unwrap(getattr(relu_ext, name))


def test_entries_take_no_junk():
    """Objects of any kind in any place: an error, NotImplemented, or what the definition gives."""

    def arguments(name, place, make):
        torch.manual_seed(0)
        given = list(entries()[name])
        given[place] = make()
        return given

    def check(*which):
        name = which[0]
        result = outcome(getattr(_C, name), *arguments(*which))
        if not isinstance(result, Exception) and result is not NotImplemented and name != "relu_dropout":
            expected = definition_of(name)(*arguments(*which))
            assert result.shape == expected.shape  # assert_close takes no more than 64 dimensions
            torch.testing.assert_close(result.flatten(), expected.flatten(), equal_nan=True)

    in_child(
        (f"{name}, argument {place} {kind}", lambda which=(name, place, make): check(*which))
        for name, right in entries().items()
        for place in range(len(right))
        for kind, make in JUNK.items()
    )


def test_entries_take_no_other_number_of_arguments():
    def check(name, arguments):
        assert getattr(_C, name)(*arguments) is NotImplemented

    def faults():
        for name, right in entries().items():
            for count in {*range(9)} - {len(right)}:
                yield f"{name}, {count}", lambda n=name, c=count, r=right: check(n, [*r, *r, *r, *r, *r][:c])

    in_child(faults())
    for name, right in entries().items():
        with pytest.raises(TypeError, match="takes no keyword arguments"):
            getattr(_C, name)(*right[:-1], input=right[-1])


# The Monitor's


def cells(count, **options):
    return torch.zeros(count, dtype=torch.int64, **options)


CELLS = {
    "None": lambda: None,
    "an array": lambda: np.zeros(3, np.int64),
    "too few": lambda: cells(2),
    "too many": lambda: cells(4),
    "none": lambda: cells(0),
    "float32": lambda: cells(3).float(),
    "int32": lambda: cells(3).int(),
    "every other": lambda: cells(6)[::2],
    "expanded": lambda: cells(1).expand(3),
    "meta": lambda: cells(3, device="meta"),
    "sparse": lambda: cells(3).to_sparse(),
    "fake": lambda: fake(cells(3)),
    "efficient zeros": lambda: torch._efficientzerotensor(3, dtype=torch.int64),
    "a negative view": lambda: torch._neg_view(cells(3)),
    "without memory": lambda: empty(cells(3)),
    "with half of its memory": lambda: halve(cells(3)),
}


def test_monitor_refuses_cells():
    """Where the first cell of a channel lies the kernel would write."""

    def faults():
        given = torch.ones(2, 3)
        output = relu_ext.relu(given.clone().requires_grad_())
        for kind, make in CELLS.items():
            for k in range(2):
                both = lambda make=make, k=k: [make() if k == place else cells(3) for place in range(2)]  # noqa: E731
                yield f"count_bits {kind}", lambda both=both: refused(_C.count_bits, output, 1, 1, *both())
                yield (
                    f"count_bits_of {kind}",
                    lambda both=both: refused(_C.count_bits_of, "relu", [], given, 1, 1, *both()),
                )
            yield f"find_nonfinite {kind}", lambda make=make: refused(_C.find_nonfinite, given, 1, make())
            if kind != "meta":  # a gradient of another device than the cell's is not looked at
                yield f"watch_gradient {kind}", lambda make=make: refused(watched, make())

    def watched(first):
        output = relu_ext.relu(torch.ones(3, requires_grad=True))
        _C.watch_gradient(output, 1, first)
        output.sum().backward()

    in_child(faults())


def is_finite(tensor):
    """torch's own reductions take no more than 64 dimensions."""
    return bool((tensor.flatten() if tensor.dim() > 64 else tensor).isfinite().all())


def test_monitor_takes_no_junk():
    """An error, or nothing counted; of tensors that are no plain ones, the right count."""

    def counted(given):
        kept, last = cells(3), cells(3)
        result = outcome(_C.count_bits_of, "relu", [], given, 1, 1, kept, last)
        if result is True:
            numbers = given.flatten() if given.dim() > 64 else given
            assert torch.equal(kept, (numbers.double() > 0).sum([d for d in range(numbers.dim()) if d != 1]))
        else:
            assert not kept.any() and not last.any()

    def found(given):
        first = cells(1)
        result = outcome(_C.find_nonfinite, given, 7, first)
        assert first.item() == (7 if result is None and not is_finite(given) else 0)

    def faults():
        kinds = JUNK | {
            "a negative view": lambda: torch._neg_view(torch.randn(2, 3)),
            "a negative infinity": lambda: torch._neg_view(torch.full((2, 3), float("inf"))),
        }
        for kind, make in kinds.items():
            yield f"count_bits_of {kind}", lambda make=make: counted(make())
            yield f"find_nonfinite {kind}", lambda make=make: found(make())
            yield f"cells {kind}", lambda make=make: outcome(_C.cells, make(), 3)
            yield f"count_bits {kind}", lambda make=make: outcome(_C.count_bits, make(), 1, 1, cells(3), cells(3))
            yield f"watch_gradient {kind}", lambda make=make: outcome(_C.watch_gradient, make(), 1, cells(1))
            yield f"is_observable {kind}", lambda make=make: outcome(_C.is_observable, make())
        given = torch.ones(2, 3)
        output = relu_ext.relu(given.clone().requires_grad_())
        for dim in (2, -3, 2**40, "1", None):
            yield f"dim {dim}", lambda dim=dim: refused(_C.count_bits, output, dim, 1, cells(3), cells(3))
        for operation, scalars in (("elu", [1.0]), ("nothing", []), ("relu", [1.0]), ("hardtanh", [1.0]), (None, [])):
            yield (
                f"{operation}, {scalars}",
                lambda o=operation, s=scalars: refused(
                    _C.count_bits_of, o, s, torch.ones(2, 3), 1, 1, cells(3), cells(3)
                ),
            )
        for count in (-1, 2**62, None, "3", 1.5):
            yield f"{count} cells", lambda count=count: refused(_C.cells, torch.ones(3), count)
        for isa in ("", "avx1024", None, 3):
            yield f"set_isa {isa}", lambda isa=isa: refused(_C.set_isa, isa)

    in_child(faults())


def test_bits_of_an_output_that_was_exchanged():
    """output.data = ...: the node's bits are no longer those of the tensor."""

    def check(data):
        output = relu_ext.relu(torch.randn(4, 5, requires_grad=True))
        output.data = data
        kept = cells(data.shape[1])
        assert outcome(_C.count_bits, output, 1, 1, kept, cells(data.shape[1])) is False or not kept.any()

    shapes = [(4, 6), (5, 5), (3, 5), (1, 5), (40, 5), (0, 5)]
    in_child(
        [
            *((f"{shape}", lambda shape=shape: check(torch.ones(shape))) for shape in shapes),
            ("sliced", lambda: check(torch.ones(5, 5)[:, :4])),
        ]
    )


# Memory that there is not


def allocator_error(error) -> bool:
    return any(said in str(error) for said in ("DefaultCPUAllocator: ", "std::bad_alloc"))


def fail_every_allocation(library: str) -> None:
    """In each call, forward and backward, one allocation after the other fails, and nothing else changes."""
    fail_after = ctypes.CDLL(library).fail_after
    torch.set_num_threads(1)
    fail_after(0)
    try:
        torch.empty(3)
    except RuntimeError:
        pass
    else:
        return print("not intercepted")
    print(
        sum(fail_each(call, fail_after) for call in CALLS.values()),
        sum(fail_each_in_place(row, fail_after) for row in OPERATIONS if row.in_place),
    )


def fail_each(call, fail_after) -> int:
    """The number of those that failed."""
    inputs = call.inputs((2, 600, 3))  # so many channels that their sums are a large vector
    before = [x.clone() for x in inputs]
    expected = call.results(call.function, inputs)
    for count in itertools.count():
        fail_after(count)
        try:
            call.results(call.function, inputs)
        except (RuntimeError, MemoryError) as error:
            assert allocator_error(error)
        else:
            fail_after(-1)
            return count
        fail_after(-1)
        for now, then in zip((*inputs, *call.results(call.function, inputs)), (*before, *expected), strict=True):
            assert torch.equal(now, then)


def fail_each_in_place(row, fail_after) -> int:
    """What fails has changed nothing."""
    input = torch.randn(50).requires_grad_()
    for count in itertools.count():
        tensor = input * 1
        node, version, before = tensor.grad_fn, tensor._version, tensor.detach().clone()
        fail_after(count)
        try:
            row.function_(tensor)
        except RuntimeError as error:
            fail_after(-1)
            assert allocator_error(error)
        else:
            fail_after(-1)
            return count
        assert torch.equal(tensor, before) and (tensor.grad_fn, tensor._version) == (node, version)


@pytest.mark.skipif(not shutil.which("g++"), reason="there is no compiler for the library that fails")
def test_every_allocation_fails(tmp_path):
    library = tmp_path / "failing_allocations.so"
    source = TESTS / "failing_allocations.cpp"
    subprocess.run(["g++", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
    preloaded = " ".join(filter(None, (os.environ.get("LD_PRELOAD"), str(library))))
    script = f"import test_faults; test_faults.fail_every_allocation({str(library)!r})"
    said = run_script(script, LD_PRELOAD=preloaded)
    if "not intercepted" in said:
        pytest.skip("torch has an allocator of its own here")
    calls, in_place = map(int, said.split())
    TRIED["failing allocations"] += calls + in_place
    assert calls >= 3 * len(CALLS) and in_place >= len([row for row in OPERATIONS if row.in_place and row.keep])


@pytest.mark.parametrize("name", ["relu", "relu_squared", "bias_relu", "relu_dropout"])
def test_a_limited_address_space(name):
    """With 24 MiB more at each step, from next to nothing, until there is enough."""

    def size():
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

    def run():
        call = CALLS[name]
        inputs = call.inputs((8, 1025 << 10))  # a little more than 32 MiB a tensor: always memory of its own
        expected = call.results(call.function, inputs)
        small = call.results(call.function, call.inputs())
        unlimited = resource.getrlimit(resource.RLIMIT_AS)
        for failures in itertools.count():
            resource.setrlimit(resource.RLIMIT_AS, (size() + (4 << 20) + failures * (24 << 20), unlimited[1]))
            result = outcome(call.results, call.function, inputs)
            again = call.results(call.function, call.inputs())
            resource.setrlimit(resource.RLIMIT_AS, unlimited)
            assert all(map(torch.equal, again, small))
            if not isinstance(result, Exception):
                assert all(map(torch.equal, result, expected)) and failures > 2
                return
            assert allocator_error(result)

    in_child([(name, run)])
