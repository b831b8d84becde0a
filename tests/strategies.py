"""What the property tests draw: views of memory of any layout, scalars, operations, models. For Hypothesis."""

import contextlib
import math
from dataclasses import dataclass, replace

import torch
from composing import Watch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from operations import (
    DTYPES,
    OPERATIONS,
    celu_row,
    elu_row,
    hardtanh_row,
    leaky_relu_row,
    mixed_values,
    threshold_row,
    wide,
)

import relu_ext
from relu_ext import _C

# The same examples each time; or others.
SHORT = settings(
    max_examples=200, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(SHORT, max_examples=500, derandomize=False, print_blob=True)
settings.register_profile("tests", SHORT)
settings.register_profile("fuzz", LONG)
settings.load_profile("tests")

OTHER_DTYPES = [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64]
GRAIN = 32768  # csrc/cpu/backend.cpp: from two of these on, two threads run
MOST = 4096  # elements of all but the rare tensors that two threads share


def rarely(strategy, otherwise, times=20):
    """``strategy`` once in so many ``times``, or less: Hypothesis prefers small numbers."""
    return st.integers(0, times - 1).flatmap(lambda number: strategy if number == times - 1 else otherwise)


# Numbers


def small_integers(count, dtype, seed):
    """-3 to 3 or, of a type that has no sign, 0 to 3: sums and products of some thousands of them are exact."""
    generator = torch.Generator().manual_seed(seed)
    low = 0 if dtype in (torch.uint8, torch.bool) else -3
    return torch.randint(low, 4, (count,), generator=generator).to(dtype)


def special_numbers(count, dtype, seed):
    """NaN, infinities, zeros of both signs, subnormals among ordinary ones."""
    return mixed_values(count, dtype, seed=seed) if dtype in DTYPES else small_integers(count, dtype, seed)


# Views


@dataclass(frozen=True)
class View:
    """A tensor in memory of its own: what it sees begins at ``offset``, and ``spare`` elements follow it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    spare: int = 0
    dtype: torch.dtype = torch.float32
    exact: bool = False  # of small integers
    negated: bool = False  # the lazy negation that the imaginary part of a conjugate has
    seed: int = 0

    def memory(self, kinks=()):
        """One dimension; some of the numbers are ``kinks``, as far as the dtype has them, or their neighbours."""
        seen = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        count = self.offset + self.spare + (0 if 0 in self.shape else seen)
        values = (small_integers if self.exact else special_numbers)(count, self.dtype, self.seed)
        if kinks and count and not self.exact and self.dtype in DTYPES:
            kink = around(kinks[self.seed % len(kinks)], self.dtype)[self.seed % 3]
            values[torch.arange(count) % 5 == self.seed % 5] = kink
        return values

    def of(self, memory):
        tensor = memory.as_strided(self.shape, self.strides, self.offset)
        return tensor._neg_view() if self.negated else tensor

    def build(self, kinks=()):
        return self.of(self.memory(kinks))

    @property
    def is_plain(self):
        """What the kernels take."""
        dense = torch.ops.aten.is_non_overlapping_and_dense(torch.empty_strided(self.shape, self.strides))
        return dense and self.dtype in DTYPES and not self.negated


def around(scalar, dtype):
    """In the dtype; and the numbers of the type that it is computed in on both sides of that, rounded to the dtype."""
    arithmetic = wide(torch.empty(0, dtype=dtype)).dtype
    number = torch.tensor(float(min(scalar, 2**1000)), dtype=torch.float64).to(arithmetic)
    beside = [number.nextafter(number.new_tensor(side)) for side in (-math.inf, math.inf)]
    return [x.to(dtype) for x in (number, *beside)]


def bytes_of(tensor):
    """Of all the memory that it is a view of."""
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).clone()


sizes = rarely(st.sampled_from([0, 9, 64, 65, 130, 1025]), st.integers(1, 6), times=6)
one_to_five = st.lists(sizes, min_size=1, max_size=5).map(tuple).filter(lambda shape: math.prod(shape) <= MOST)
shapes = rarely(st.just(()), one_to_five)
large_shapes = st.one_of(
    st.integers(2 * GRAIN - 65, 2 * GRAIN + 200).map(lambda size: (size,)),
    st.integers(GRAIN - 65, GRAIN + 200).map(lambda size: (2, 1, size)),
    st.integers(7000, 7400).map(lambda size: (size, 3, 3)),
    st.integers(300, 400).map(lambda size: (size, 200)),
)
any_shape = rarely(large_shapes, shapes, times=25)


@st.composite
def strides_of(draw, shape, kind):
    """Those of dense memory in any order of dimensions; with gaps; some of them 0; or any, which may overlap."""
    if kind == "any":
        return tuple(draw(st.integers(0, 9)) for _ in shape)
    strides, step = [0] * len(shape), 1
    for d in draw(st.permutations(range(len(shape))[::-1])):
        step *= draw(st.integers(1, 2)) if kind == "gaps" else 1
        expanded = kind == "expanded" and draw(st.booleans())
        strides[d] = 0 if expanded else step
        step *= 1 if expanded else max(shape[d], 1)
    says_nothing = rarely(st.integers(0, 99), st.none(), times=4)  # where there is one element
    odd = [draw(says_nothing) if size == 1 else None for size in shape]
    return tuple(stride if other is None else other for stride, other in zip(strides, odd, strict=True))


KINDS = ["dense"] * 4 + ["gaps", "expanded", "any"]
seeds = st.integers(0, 2**20)
needs = st.sampled_from([True, True, True, False])  # a gradient


@st.composite
def views(draw, shape, dtype, exact, kinds=KINDS):
    return View(
        shape,
        draw(strides_of(shape, draw(st.sampled_from(kinds)))),
        draw(st.integers(0, 9)),
        draw(st.integers(0, 9)),
        dtype,
        exact,
        dtype in DTYPES and draw(rarely(st.just(True), st.just(False))),
        draw(seeds),
    )


dtypes = rarely(st.sampled_from(OTHER_DTYPES), st.sampled_from(DTYPES), times=12)


@st.composite
def like(draw, view):
    """Mostly a view of the same layout, at another offset; else one of another layout, dtype or shape."""
    same = replace(view, offset=draw(st.integers(0, 9)), seed=draw(seeds))
    other = views(view.shape, view.dtype, view.exact)
    of_dtype = st.sampled_from(DTYPES).flatmap(lambda dtype: views(view.shape, dtype, view.exact))
    of_shape = shapes.flatmap(lambda shape: views(shape, view.dtype, view.exact))
    unlike = rarely(of_dtype | of_shape, other, times=4)
    return draw(rarely(unlike, st.just(same), times=2))


@st.composite
def gradients(draw, view):
    """For an output like the view, in any layout; now and then of another dtype or shape."""
    own = view.dtype if view.dtype in DTYPES else torch.float32
    dtype = draw(rarely(st.sampled_from(DTYPES), st.just(own)))
    return draw(views(draw(rarely(shapes, st.just(view.shape), times=40)), dtype, view.exact))


# Operations and circumstances

EXTREME = [math.inf, -math.inf, math.nan, 1e-30, 1e-300, 6e4, 7e4, 1e39, 1e300, 2**53 + 1, 2**70, 10**400]
scalars = rarely(
    st.sampled_from(EXTREME),
    st.sampled_from([0.01, 0.5, 1.0, -0.5, 1.5, 2, 0, -0.0, 1, -1]) | st.floats(-4, 4),
    times=6,
)
low_and_high = st.tuples(scalars, scalars).map(sorted) | st.tuples(scalars, scalars)
rows = st.one_of(
    st.sampled_from(OPERATIONS),
    low_and_high.map(lambda bounds: hardtanh_row(*bounds)),
    st.builds(threshold_row, scalars, scalars),
    st.builds(leaky_relu_row, scalars),
    st.builds(elu_row, scalars),
    st.builds(celu_row, scalars),
)


@dataclass(frozen=True)
class Circumstances:
    """What must not change what a call means; a context."""

    isa: str
    threads: int
    watched: bool  # by a dispatch mode: then the registered operators run, and ATen's

    @contextlib.contextmanager
    def __call__(self):
        isa, threads = _C.isa(), torch.get_num_threads()
        _C.set_isa(self.isa)
        torch.set_num_threads(self.threads)
        try:
            with Watch() if self.watched else contextlib.nullcontext():
                yield
        finally:
            _C.set_isa(isa)
            torch.set_num_threads(threads)


circumstances = st.builds(
    Circumstances,
    st.sampled_from(relu_ext.build_info()["isas_supported"]),
    st.sampled_from([1, 2]),
    rarely(st.just(True), st.just(False), times=6),
)


# Models for inputs of three channels with four places

small = st.floats(-2, 2)


def activations(in_place):
    nn = torch.nn
    return st.one_of(
        st.builds(nn.ReLU, in_place),
        st.builds(nn.ReLU6, in_place),
        st.builds(nn.LeakyReLU, small, in_place),
        st.builds(nn.ELU, small, in_place),
        st.builds(nn.CELU, st.floats(0.25, 2), in_place),
        st.builds(nn.SELU, in_place),
        st.builds(nn.Hardtanh, st.floats(-2, 0.5), st.floats(0.75, 2), in_place),
        st.builds(nn.Threshold, small, small, in_place),
        st.builds(nn.PReLU, st.sampled_from([1, 3]), small),
    )


layers = st.one_of(
    activations(st.booleans()),
    st.builds(torch.nn.Linear, st.just(4), st.just(4)),
    st.builds(torch.nn.Conv1d, st.just(3), st.just(3), st.just(1)),
)


def sequences(inner):
    return st.lists(inner, min_size=1, max_size=4).map(lambda layers: torch.nn.Sequential(*layers))


models = st.recursive(layers, sequences)
