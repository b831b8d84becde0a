"""Properties of all operations, for whatever Hypothesis makes up: ours equals the definition, also in its errors.

`make fuzz` (fuzz.py) looks at the same for as long as one likes, with other numbers each time.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from operations import (
    DTYPES,
    NOT_NAN,
    OPERATIONS,
    RELU,
    RELU6,
    RELU_SQUARED,
    assert_same,
    hardtanh_row,
    leaky_relu_row,
    threshold_row,
    wide,
)
from strategies import (
    View,
    any_shape,
    bytes_of,
    circumstances,
    dtypes,
    gradients,
    like,
    models,
    needs,
    rows,
    seeds,
    small_integers,
    strides_of,
    views,
)
from test_fused import ROWS as FUSED
from test_fused import along, assert_sums, kernels_take, linear, multiplied_and_added
from test_layouts import strides_that_matter
from test_two_tensors import gated
from test_values import ALLOWED, assert_near, exponential_gradients

import relu_ext

# What a call does


@dataclass
class Raised:
    error: type
    message: str


@dataclass
class Results:
    """The output, the name of its node, and the gradients of those inputs that need one, for the others None."""

    output: torch.Tensor
    node: str | None
    gradients: list


def outcome(function, *arguments):
    """What it returns, or the error. F.threshold's own name is _threshold."""
    try:
        return function(*arguments)
    except Exception as error:
        return Raised(type(error), str(error).removeprefix("_"))


def call(function, inputs, needs, grad):
    inputs = [x.detach().requires_grad_(need and x.is_floating_point()) for x, need in zip(inputs, needs, strict=True)]
    output = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, grad) if wanted else ())
    gradients = [next(found) if x.requires_grad else None for x in inputs]
    return Results(output.detach(), output.grad_fn and output.grad_fn.name(), gradients)


def states(tensors):
    return [(bytes_of(x), x._version) for x in tensors]


def assert_untouched(tensors, before):
    for (memory, version), (memory_before, version_before) in zip(states(tensors), before, strict=True):
        assert version == version_before and torch.equal(memory, memory_before)


def results(ours, theirs, inputs, needs, grad):
    """Those of both; None where both raise the same error. Nothing but outputs is written."""
    before = states([*inputs, grad])
    found, expected = (outcome(call, function, inputs, needs, grad) for function in (ours, theirs))
    assert_untouched([*inputs, grad], before)
    if isinstance(found, Raised) or isinstance(expected, Raised):
        assert found == expected
        return None
    assert strides_that_matter(found.output) == strides_that_matter(expected.output)
    for result in (found.output, *found.gradients):
        for x in inputs if result is not None and result.numel() else ():
            assert result.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    return found, expected


def assert_same_gradients(found, expected):
    for ours, theirs in zip(found.gradients, expected.gradients, strict=True):
        if theirs is not None:
            assert_same(ours, theirs)


def assert_all_same(both):
    """Of what results() gives."""
    if both:
        found, expected = both
        assert_same(found.output, expected.output)
        assert_same_gradients(found, expected)


def same(ours, theirs):
    return (ours == theirs) | (ours.isnan() & theirs.isnan())


# Elementwise


def exponential_truth(row, input):
    """Output and slope in float64, of scalars and a product that are rounded as ATen rounds them; NaN for a slope of
    which the arithmetic's range loses digits on the way."""
    selu = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946)
    alpha, scale = selu if row.name == "selu" else (row.scalars[0], 1.0)
    x = wide(input)
    scalars = torch.tensor([scale, alpha * scale, 1 / alpha if row.name == "celu" else 1.0], dtype=torch.float64)
    positive, negative, inner = scalars.to(x.dtype).double()
    argument = (x * inner.to(x.dtype)).double()
    output = torch.where(x < 0, torch.expm1(argument) * negative, x.double() * positive)
    below = torch.exp(argument) * negative
    below = below.masked_fill((below != 0) & (below.abs() < torch.finfo(x.dtype).smallest_normal), math.nan)
    return output, torch.where(x <= 0, below * inner, positive)


def is_ours(node):
    """A node's name: PyTorch's own end in a number."""
    return node is not None and not node[-1].isdigit()


def torch_has_gradient(row, view):
    """It converts celu's alpha to float32 even for float64."""
    return row.name != "celu" or view.dtype != torch.float64 or not abs(row.scalars[0]) > torch.finfo(torch.float32).max


def is_exponential(row):
    return row.derivative is not None and row.name != "relu_squared"


def assert_output(row, ours, theirs, input):
    """Exponentials, where they are not torch's, are as near to the truth as they are said to be."""
    if not is_exponential(row) or same(ours, theirs).all():
        return assert_same(ours, theirs)
    assert_near(ours, exponential_truth(row, input)[0], ALLOWED[ours.dtype])


def assert_gradient(row, ours, theirs, input, grad, by_kernel):
    """torch's, but for what README excepts: NaN, and squares that lose digits."""
    if not by_kernel:
        excepted = input.isnan() if row.special == NOT_NAN or is_exponential(row) else torch.zeros_like(ours).bool()
        return assert_same(ours[~excepted], theirs[~excepted])
    if is_exponential(row):
        slope = exponential_truth(row, input)[1]
        near = ~same(ours, theirs) & ~(slope.isnan() & ~input.isnan())
        products = 1 if ours.dtype.itemsize == 2 else 2  # that are rounded, of float32 or better
        assert_near(ours[near], (grad.double() * slope)[near], products * ALLOWED[ours.dtype])
    elif row.name == "relu_squared":
        size, product = input.abs(), (wide(grad) * wide(input)).abs()
        exact = (size >= 2.0**-60) & (size <= 2.0**60) & ~(product < torch.finfo(ours.dtype).smallest_normal)
        exact |= ~(input > 0)
        assert_same(ours[exact], theirs[exact])
    else:
        excepted = input.isnan() if row.special == NOT_NAN else torch.zeros_like(ours).bool()
        formula = row.masked(grad, row.keep(input))
        assert_same(ours, torch.where(excepted, formula, theirs))


@st.composite
def elementwise_calls(draw):
    view = draw(views(draw(any_shape), draw(dtypes), exact=draw(st.booleans())))
    return draw(rows), view, draw(gradients(view))


@given(elementwise_calls(), needs, st.booleans(), circumstances)
def test_elementwise(operands, need, installed, where):
    row, view, grad = operands
    input, grad = view.build(row.scalars), grad.build()
    theirs = row.definition
    ours = relu_ext.installed()(theirs) if installed else row.function
    with where():
        both = results(ours, theirs, [input], [need and torch_has_gradient(row, view)], grad)
    if not both:
        return
    found, expected = both
    assert_output(row, found.output, expected.output, input)
    if found.node is None:
        return
    by_kernel = is_ours(found.node)
    assert by_kernel or not (row in OPERATIONS and view.is_plain) or (installed and row.name == "relu_squared")
    (gradient,), (their_gradient,) = found.gradients, expected.gradients
    assert_gradient(row, gradient, their_gradient, input, grad.to(gradient.dtype), by_kernel)
    layouts = [strides_that_matter(x) for x in (their_gradient, found.output)]
    assert strides_that_matter(gradient) in (layouts if by_kernel else layouts[:1])


@dataclass
class InPlace:
    """What becomes of all the memory that the input is a view of; the gradient of what it was."""

    memory: torch.Tensor
    versions: int
    returns_it: bool
    gradient: torch.Tensor | None


def call_in_place(function_, view, kinks, need, grad):
    leaf = view.memory(kinks).requires_grad_(need and view.dtype in DTYPES)
    memory = leaf * 1 if leaf.requires_grad else leaf
    version, input = memory._version, view.of(memory)
    pointer = input.data_ptr()
    returns_it = function_(input) is input and input.data_ptr() == pointer
    after = memory.detach().clone()
    gradient = torch.autograd.grad(memory, leaf, grad)[0] if leaf.requires_grad else None
    return InPlace(after, memory._version - version, returns_it, gradient)


@st.composite
def in_place_calls(draw):
    row = draw(rows.filter(lambda row: row.name != "relu_squared"))
    view = draw(views(draw(any_shape), draw(dtypes), exact=draw(st.booleans())))
    memory = View(tuple(view.memory().shape), (1,), dtype=view.dtype, exact=view.exact, seed=draw(seeds))
    return row, view, memory


@given(in_place_calls(), needs, st.booleans(), st.booleans(), circumstances)
def test_in_place(operands, need, by_argument, installed, where):
    row, view, grad = operands
    ours, theirs = row.function_, row.definition_
    if by_argument or not row.in_place:
        ours, theirs = (lambda input, f=f: f(input, inplace=True) for f in (row.function, row.definition))
    if installed:
        ours = relu_ext.installed()(theirs)
    if row.slope is not None and row.slope < 0 and need and view.is_plain:
        theirs = row.differentiable_
    need = need and torch_has_gradient(row, view)
    with where():
        found, expected = (outcome(call_in_place, f, view, row.scalars, need, grad.build()) for f in (ours, theirs))
    if isinstance(found, Raised) or isinstance(expected, Raised):
        assert found == expected
        return
    assert found.returns_it and found.versions == expected.versions
    assert_in_place(row, view, grad.build(), found, expected)


def assert_in_place(row, view, grad, found, expected):
    input = view.build(row.scalars)
    seen = torch.zeros(found.memory.shape, dtype=torch.bool)
    seen.as_strided(view.shape, view.strides, view.offset).fill_(True)
    assert_same(found.memory[~seen], view.memory(row.scalars)[~seen])
    if not view.is_plain:  # then it is torch that has run
        assert_same(found.memory, expected.memory)
    else:
        assert_output(row, view.of(found.memory), view.of(expected.memory), input)
    if found.gradient is None:
        return
    excepted = torch.zeros_like(seen)
    if row.special == NOT_NAN or is_exponential(row):
        excepted = view.memory(row.scalars).isnan() & seen
    if is_exponential(row) and view.is_plain and not same(found.gradient, expected.gradient).all():
        _, from_output = exponential_gradients(row, input, view.of(grad))
        view.of(expected.gradient).copy_(from_output(view.of(found.memory)))
    assert_same(found.gradient[~excepted], expected.gradient[~excepted])


# The registered operators


@st.composite
def operator_calls(draw):
    row = draw(rows.filter(lambda row: row.keep and all(isinstance(scalar, float) for scalar in row.scalars)))
    view = draw(views(draw(any_shape), draw(dtypes), exact=draw(st.booleans())))
    grad = draw(views(view.shape, view.dtype, view.exact))
    dims = len(view.shape)
    stride = strides_of(view.shape, "dense") | st.tuples(*[st.integers(-1, 9)] * dims) | st.just((1,) * (dims + 1))
    return row, view, grad, draw(stride)


# What may be given in the place of bits.
CROOKED = {
    "those bits": lambda bits: bits,
    "too few": lambda bits: bits[1:],
    "too many": lambda bits: torch.cat([bits, bits.new_zeros(1)]),
    "another dtype": lambda bits: bits.view(torch.int8),
    "two dimensions": lambda bits: bits[None],
    "every other": lambda bits: torch.stack([bits, bits], 1)[:, 0],
}


def unpacked(bits, shape, stride):
    """By the format's definition."""
    kept = torch.from_numpy(np.unpackbits(bits.numpy(), bitorder="little")).bool()
    assert not kept[math.prod(shape) :].any()
    return kept.as_strided(shape, stride)


@given(operator_calls(), st.sampled_from(list(CROOKED)), circumstances)
def test_operators(operands, crooked, where):
    row, view, grad, stride = operands
    input, grad = view.build(row.scalars), grad.build()
    before = states([input, grad])
    with where():
        found, expected = outcome(row.forward, input), outcome(row.definition, input)
        if isinstance(found, Raised):
            assert view.dtype not in DTYPES or row not in OPERATIONS
            return
        output, bits = found
        if not isinstance(expected, Raised):
            assert_same(output, expected)
        kept = unpacked(bits, output.shape, output.stride())
        assert torch.equal(kept, row.keep(input))
        assert_same(row.backward(grad, bits, output.stride()), row.masked(grad, kept))
        others = CROOKED[crooked](bits)
        gradient = outcome(row.backward, grad, others, stride)
    assert_untouched([input, grad], before)
    if isinstance(gradient, Raised):
        assert gradient.error is RuntimeError and "relu_ext" in gradient.message
    else:
        assert strides_that_matter(gradient) == strides_that_matter(torch.empty_strided(grad.shape, stride))
        assert_same(gradient, row.masked(grad, unpacked(others, grad.shape, gradient.stride())))


# With vectors of the channels, a residual, or both


@st.composite
def fused_calls(draw):
    row = draw(st.sampled_from(list(FUSED.values())))
    first = draw(views(draw(any_shape), draw(dtypes), exact=draw(st.booleans())))
    dims = len(first.shape)
    dim = draw(st.integers(-dims, dims - 1) if dims else st.just(1))
    channels = first.shape[dim] if dims else 1
    vector = View((channels,), (1,), dtype=first.dtype, exact=first.exact)
    rest = [draw(like(vector if is_vector else first)) for is_vector in row.vectors]
    return row, [first, *rest], draw(st.tuples(*[needs] * (1 + len(rest)))), dim, draw(gradients(first))


def assert_fused_output(row, ours, inputs, arguments):
    """16-bit types are computed in float32, where products are exact unless they are infinite; whether others are
    rounded hangs on the CPU."""
    in_float32 = row.has_scale and ours.dtype.itemsize == 2
    inputs = [x.float() if in_float32 else x for x in inputs]
    theirs = row.theirs(*inputs, **arguments).to(ours.dtype)
    if not row.rounds_twice:
        fused = multiplied_and_added(*inputs, **arguments).to(ours.dtype)
        theirs = torch.where(same(ours, fused), fused, theirs)
    assert_same(ours, theirs)


@given(fused_calls(), circumstances)
def test_fused(operands, where):
    row, inputs, needs, dim, grad = operands
    exact = inputs[0].exact
    inputs, grad = [view.build() for view in inputs], grad.build()
    arguments = row.arguments(dim)
    with where():
        by_kernel = outcome(lambda: kernels_take(row, inputs, **arguments)) is True
        both = results(
            lambda *x: row.ours(*x, **arguments), lambda *x: row.ours.__wrapped__(*x, **arguments), inputs, needs, grad
        )
        if not both:
            return
        found, expected = both
        if not by_kernel or where.watched:
            assert_same(found.output, expected.output)
        else:
            assert_fused_output(row, found.output, inputs, arguments)
    if exact or not by_kernel:
        return assert_same_gradients(found, expected)
    if found.node is None:  # nothing has looked at grad, whose shape may be any
        return
    assert_fused_gradients(row, found, inputs, grad.to(inputs[0].dtype), dim, with_sums=not where.watched)


def assert_fused_gradients(row, found, inputs, grad, dim, with_sums):
    masked = torch.where(found.output <= 0, torch.zeros_like(grad), grad)
    is_vector = (False, *row.vectors)
    for k, gradient in enumerate(found.gradients):
        if gradient is None or (is_vector[k] and not with_sums):
            continue
        if is_vector[k]:
            by_input = row.has_scale and k == 1
            terms = masked.double() * inputs[0].double() if by_input else masked.double()
            assert_sums_where_finite(gradient, terms.movedim(dim, 0))
        else:
            assert_same(gradient, masked * along(inputs[1], grad, dim) if row.has_scale and k == 0 else masked)


def assert_sums_where_finite(ours, terms):
    """Over all but the first dimension; NaN where that is among the terms."""
    terms = terms.reshape(len(terms), -1) if terms.numel() else terms.new_zeros(len(terms), 1)
    finite = terms.isfinite().all(1) & (terms.abs().sum(1) < torch.finfo(ours.dtype).max / 4)
    assert ours[terms.isnan().any(1)].isnan().all()
    assert_sums(ours[finite], terms[finite], 0, ours.dtype)


# Two tensors


@st.composite
def prelu_calls(draw):
    input = draw(views(draw(any_shape), draw(dtypes), exact=draw(st.booleans())))
    count = input.shape[1] if len(input.shape) > 1 and draw(st.booleans()) else 1
    shape = draw(st.sampled_from([(count,), (count,), ()])) if count == 1 else (count,)
    weight = draw(like(View(shape, (1,) * len(shape), dtype=input.dtype, exact=input.exact)))
    return input, weight, draw(gradients(input))


@given(prelu_calls(), st.tuples(needs, needs), st.booleans(), circumstances)
def test_prelu(operands, needs, installed, where):
    exact = operands[0].exact
    input, weight, grad = (view.build() for view in operands)
    ours = relu_ext.installed()(F.prelu) if installed else relu_ext.prelu
    with where():
        both = results(ours, F.prelu, [input, weight], needs, grad)
    if not both:
        return
    found, expected = both
    assert_same(found.output, expected.output)
    if exact or found.node != "PReLUBackward":
        return assert_same_gradients(found, expected)
    if needs[0]:
        assert_same(found.gradients[0], expected.gradients[0])
    if needs[1] and not where.watched:
        terms = torch.where(input > 0, 0.0, input.double() * grad.to(input.dtype).double())
        terms = terms.reshape(1, -1) if weight.numel() == 1 else terms.movedim(1, 0)
        assert_sums_where_finite(found.gradients[1].reshape(-1), terms)


@st.composite
def reglu_calls(draw):
    gate = draw(views(draw(any_shape), draw(dtypes), exact=draw(st.booleans())))
    return gate, draw(like(gate)), draw(st.booleans()), draw(gradients(gate))


def halves_of(gate, up):
    """Two tensors of these numbers that are the halves of one."""
    return torch.cat([gate, up], -1).chunk(2, -1)


@given(reglu_calls(), st.tuples(needs, needs), circumstances)
def test_reglu(operands, needs, where):
    gate, up, halves, grad = operands
    halves = halves and gate.shape == up.shape and len(gate.shape) > 0
    gate, up, grad = gate.build(), up.build(), grad.build()
    inputs = halves_of(gate, up) if halves else (gate, up)
    with where():
        both = results(relu_ext.reglu, gated, inputs, needs, grad)
    assert_all_same(both)


@st.composite
def linear_calls(draw):
    """Of small integers, so that no order of a sum matters, and as few as bfloat16 can count."""
    shape = draw(st.lists(st.integers(0, 3), min_size=1, max_size=3).map(tuple))
    dtype = draw(st.sampled_from(DTYPES))
    input = draw(views(shape, dtype, exact=True))
    weight = draw(like(draw(views((draw(st.integers(0, 5)), shape[-1]), dtype, exact=True))))
    bias = draw(st.none() | like(View((weight.shape[0] if weight.shape else 1,), (1,), dtype=dtype, exact=True)))
    grad = draw(gradients(View((*shape[:-1], *weight.shape[:1]), (), dtype=dtype, exact=True)))
    return [view for view in (input, weight, bias) if view], grad


@given(linear_calls(), st.tuples(needs, needs, needs), circumstances)
def test_linear_relu(operands, needs, where):
    inputs, grad = operands
    inputs, grad = [view.build() for view in inputs], grad.build()
    with where():
        both = results(relu_ext.linear_relu, relu_ext.linear_relu.__wrapped__, inputs, needs[: len(inputs)], grad)
    assert_all_same(both)


# Dropout


@st.composite
def dropout_calls(draw):
    view = draw(views(draw(any_shape), draw(dtypes), exact=draw(st.booleans())))
    p = draw(st.floats(0, 1) | st.sampled_from([0, 1, 0.5, 1e-9, 1 - 1e-9, -0.5, 2.0]))
    return view, p, draw(st.booleans()), draw(gradients(view))


@given(dropout_calls(), needs, seeds, circumstances)
def test_relu_dropout(operands, need, seed, where):
    view, p, training, grad = operands
    input, grad = view.build(), grad.build()

    def ours(input):
        torch.manual_seed(seed)
        return relu_ext.relu_dropout(input, p, training)

    def theirs(input):
        torch.manual_seed(seed)
        return F.dropout(torch.relu(input), p, training)

    with where():
        both = results(ours, theirs, [input], [need], grad)
        if not both:
            return
        found, expected = both
        if not view.is_plain or not training or p == 0:
            assert_same(found.output, expected.output)
            return assert_same_gradients(found, expected)
        stays = ours(torch.empty_like(input).fill_(1)) != 0
    factor = torch.tensor(1 / (1 - p) if p < 1 else 1, dtype=wide(input).dtype)

    def kept(numbers, keep):
        return torch.where(keep, (wide(numbers) * factor).to(input.dtype), torch.zeros((), dtype=input.dtype))

    assert_same(found.output, kept(torch.relu(input), stays))
    if found.node:
        assert found.node == "ReLUDropoutBackward"
        assert_same(found.gradients[0], kept(grad.to(input.dtype), stays & ~(input <= 0)))


# Graphs


SHAPE = (2, 3, 4)  # of all tensors of a graph
CHANNELS = SHAPE[1]
# Exact in float64 for small integers, in every derivative.
DYADIC = [RELU, RELU6, RELU_SQUARED, hardtanh_row(-2, 3), threshold_row(1, -2), leaky_relu_row(0.5), leaky_relu_row(2)]


@dataclass(frozen=True)
class Step:
    """A function of some tensors and, after these, some vectors of the channels."""

    name: str
    ours: Callable = field(repr=False)
    theirs: Callable = field(repr=False)
    tensors: int = field(default=1, repr=False)
    vectors: int = field(default=0, repr=False)


def in_place(function_):
    return lambda input: function_(input * 1)


def in_place_on_a_part(function_):
    def change(input):
        output = input * 1
        function_(output.transpose(0, 2)[1:])
        return output

    return change


def then_changed(function):
    """Bits do not hang on the output; torch's function, which takes what is not dense, would keep it."""
    return lambda input, other: function(input * 1).add_(other)


def of_halves(function):
    return lambda gate, up: function(*halves_of(gate, up))


def with_weight(function):
    """Four rows of the second tensor are the weight of a linear layer."""
    return lambda input, other: function(input, other.reshape(6, 4)[:4])


def all_steps():
    for row in DYADIC:
        yield Step(str(row), row.function, row.definition)
        if row.in_place:
            yield Step(f"{row} in place", in_place(row.function_), in_place(row.definition_))
            yield Step(f"{row} of a part", *map(in_place_on_a_part, (row.function_, row.definition_)))
        if row.keep:
            yield Step(f"{row}, then changed", then_changed(row.function), lambda x, y, f=row.definition: f(x) + y, 2)
    for name, row in FUSED.items():
        yield Step(name, row.ours, row.theirs, 1 + row.vectors.count(False), row.vectors.count(True))
    yield Step("prelu", relu_ext.prelu, F.prelu, vectors=1)
    yield Step("reglu", relu_ext.reglu, gated, 2)
    yield Step("reglu of halves", of_halves(relu_ext.reglu), of_halves(gated), 2)
    yield Step("linear_relu", with_weight(relu_ext.linear_relu), with_weight(linear), 2)
    for name, count, function in (
        ("another layout", 1, lambda x: x.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
        ("difference", 2, torch.sub),
        ("half, backwards", 1, lambda x: x.flip(0) * 0.5),
    ):
        yield Step(name, function, function, count)


steps = st.tuples(st.sampled_from(list(all_steps())), st.tuples(*[st.integers(0, 5)] * 4))


def grown(graph, side, tensors, vectors):
    """The tensors, and with each step one more, made of some of those before. side: "ours" or "theirs"."""
    tensors = list(tensors)
    for step, choice in graph:
        first, *rest = (tensors[-1 - i % len(tensors)] for i in choice[: step.tensors])
        own = (vectors[i % len(vectors)] for i in choice[2 : 2 + step.vectors])
        tensors.append(getattr(step, side)(first, *own, *rest))
    return tensors


def derivatives(graph, side, views, seed):
    """What a graph computes, its gradients, and the gradients of these."""
    tensors = [view.build().requires_grad_() for view in views]
    vectors = [small_integers(CHANNELS, torch.float64, seed + k).requires_grad_() for k in range(2)]
    inputs = [*tensors, *vectors]
    outputs = grown(graph, side, tensors, vectors)
    weights = [small_integers(24, torch.float64, seed + k).view(SHAPE) for k in range(len(outputs))]
    loss = sum((weight * output).sum() for weight, output in zip(weights, outputs, strict=True))
    first = torch.autograd.grad(loss, inputs, create_graph=True, materialize_grads=True)
    loss = sum((gradient * x).sum() for gradient, x in zip(first, inputs, strict=True))
    second = torch.autograd.grad(loss, inputs, materialize_grads=True)
    return [x.detach() for x in (*outputs, *first, *second)]


graph_views = views(SHAPE, torch.float64, exact=True, kinds=["dense", "dense", "gaps"])


@given(st.lists(steps, min_size=1, max_size=8), st.tuples(graph_views, graph_views), seeds, circumstances)
def test_graphs(graph, views, seed, where):
    with where():
        ours, theirs = (derivatives(graph, side, views, seed) for side in ("ours", "theirs"))
    assume(all((x.abs() < 2**20).all() for x in theirs))  # nothing is rounded
    for a, b in zip(ours, theirs, strict=True):
        assert_same(a, b)


# Models


@given(models, seeds)
def test_convert_and_revert(model, seed):
    torch.manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv1d):
            layer.reset_parameters()
    input = torch.randn(5, 3, 4)
    before = copy.deepcopy(model)
    expected = model(input.clone())
    report = relu_ext.convert(model)
    tolerance = 1e-5 if any(type(x).__name__ in ("ELU", "CELU", "SELU") for x in model.modules()) else 0
    torch.testing.assert_close(model(input.clone()), expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    assert list(model.state_dict()) == list(before.state_dict())
    assert relu_ext.revert(model).keys() == report.keys()
    assert repr(model) == repr(before)
    assert torch.equal(model(input.clone()), expected)
