"""No byte outside of a tensor is touched, and nothing is left behind.

LEAK_CALLS=100000 is for `make leaks`. What the compiler can see of the same is seen by `make sanitize`.
"""

import ctypes
import gc
import operator
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from calls import UNFROZEN
from composing import Watch
from guarded_checks import PLACES
from tally import TRIED

import relu_ext
from relu_ext import _C

HERE = Path(__file__).resolve().parent
PAGE = resource.getpagesize()
needs_glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc 2.33 or newer")


def test_every_function_is_called():
    functions = {name for name in relu_ext.__all__ if name in relu_ext.functional.__dict__}
    called = {re.match(r"\w+", name)[0] + "_" * name.endswith("in place") for name in UNFROZEN}
    assert "relu_" in functions and functions <= called


# Guards


@pytest.fixture(scope="session")
def guards(tmp_path_factory):
    """The environment of a process whose tensors lie between pages that trap."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler or PAGE != 4096:
        pytest.skip("no compiler, or pages of another size than guards.cpp has")
    library = tmp_path_factory.mktemp("guards") / "guards.so"
    subprocess.run([compiler, "-std=c++17", "-O2", "-shared", "-fPIC", HERE / "guards.cpp", "-o", library], check=True)
    path = os.pathsep.join([str(HERE), str(Path(relu_ext.__file__).parents[1])])
    return {**os.environ, "LD_PRELOAD": str(library), "PYTHONPATH": path}


TOUCH = """
import ctypes, sys
place, size, offset = map(int, sys.argv[1:])
c = ctypes.CDLL(None)
ctypes.c_int.in_dll(c, "guard_place").value = place
memory = ctypes.c_void_p()
assert c.posix_memalign(ctypes.byref(memory), 64, size) == 0
ctypes.memset(memory.value, 1, size)
print(ctypes.c_uint8.from_address(memory.value + offset).value)
"""


@needs_glibc
@pytest.mark.parametrize("size", [1, 10, 4096, 4097])
def test_guards_trap(guards, size):
    def survives(place, offset):
        command = [sys.executable, "-c", TOUCH, str(PLACES[place]), str(size), str(offset)]
        return subprocess.run(command, env=guards, capture_output=True).returncode == 0

    for place in PLACES:
        assert survives(place, 0) and survives(place, size - 1)
    assert not survives("behind", size)
    assert not survives("before", -1)


@needs_glibc
@pytest.mark.parametrize("place", PLACES)
def test_no_byte_outside_of_a_tensor(guards, place):
    """All calls, dtypes and instruction sets, at lengths around the vectors, blocks, chunks and pages."""
    command = [sys.executable, HERE / "guarded_checks.py", place]
    result = subprocess.run(command, env=guards, capture_output=True, text=True)
    last = result.stdout.splitlines()[-1]
    assert result.returncode == 0, f"{last}\n{result.stderr}"
    assert last.endswith(" calls")
    TRIED["calls at guard pages"] += int(last.split()[0])


# Leaks


class Mallinfo(ctypes.Structure):
    """mallinfo2(3)."""

    FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]


def in_use() -> tuple[int, int, int]:
    """Bytes of malloc's, memory blocks of Python's own, and tensors."""
    gc.collect()
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    info = mallinfo()
    tensors = sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())
    return info.uordblks + info.hblkhd, sys.getallocatedblocks(), tensors


def resident() -> int:
    """Bytes."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


@pytest.fixture(scope="module", autouse=True)
def only_what_is_new_is_collected():
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


TIMES = int(os.environ.get("LEAK_CALLS", "500"))
SMALLEST = 24  # bytes of malloc's smallest block
RESIDENT = 256 << 10  # bytes
ROUNDS = 20


def assert_leaves_nothing(call, times, kinds=1):
    """``call(i)`` is one of so many kinds of calls, of which a single one may leak.

    What leaks grows in every round. Caches, malloc's of blocks of each size above all, are full after some, and free
    lists of Python's after a thousand calls or two.
    """
    for i in range(100):
        call(i)
    for _ in range(ROUNDS):
        before = *in_use(), resident()
        for i in range(times):
            call(i)
        *growth, pages = (b - a for a, b in zip(before, (*in_use(), resident()), strict=True))
        limits = SMALLEST * times / kinds, times / kinds, 1
        if all(map(operator.lt, growth, limits)) and pages <= RESIDENT:
            return
    raise AssertionError(
        f"{times} calls leave {growth} bytes, blocks of Python's and tensors, and {pages} bytes of pages"
    )


N = 5  # elements, or of a channel, or channels
SIZED = {f"{name}, {shape}": (call, shape) for name, call in UNFROZEN.items() for shape in call.sizes(N)}


def dense(*shape):
    return torch.ones(shape)


def sliced(*shape):
    """Which the kernels leave to the definition."""
    return torch.ones(*shape, 2)[..., 0]


def first_derivatives(call, shape, make=dense):
    """Each time of another choice of the inputs."""
    return lambda i: call.run(make, shape, i % call.choices())


def second_derivatives(call, shape):
    def twice(_):
        inputs = call.leaves(call.made(dense, shape))
        output = call.function(*inputs)
        grad = dense(*output.shape).requires_grad_()
        gradients = torch.autograd.grad(output, inputs, grad, create_graph=True)
        torch.autograd.grad(gradients, [grad, *inputs], gradients, allow_unused=True)

    return twice


def under_a_mode(call, shape):
    def watched(i):
        with Watch():
            call.run(dense, shape, i % call.choices())

    return watched


def twice_backward(call, shape):
    """The graph is freed by the first."""

    def raises(_):
        inputs = call.leaves(call.made(dense, shape))
        output = call.function(*inputs)
        torch.autograd.grad(output.sum(), inputs, retain_graph=False)
        with pytest.raises(RuntimeError):
            torch.autograd.grad(output.sum(), inputs)

    return raises


def misfit(call, shape):
    """A gradient of another shape than the output's."""

    def raises(_):
        output = call.function(*call.leaves(call.made(dense, shape)))
        with pytest.raises(RuntimeError):
            output.backward(dense(N + 1, 7))

    return raises


ROADS = {
    "definition": lambda call, shape: first_derivatives(call, shape, sliced),
    "operators": under_a_mode,
    "second derivatives": second_derivatives,
    "backward of a freed graph": twice_backward,
    "gradient that does not fit": misfit,
}


@needs_glibc
@pytest.mark.parametrize(("call", "shape"), SIZED.values(), ids=SIZED)
def test_leaves_nothing(call, shape):
    assert_leaves_nothing(first_derivatives(call, shape), TIMES, call.choices())


@needs_glibc
@pytest.mark.parametrize("road", ROADS.values(), ids=ROADS)
@pytest.mark.parametrize("name", [name for name in UNFROZEN if not re.match(r"\w+\(|relu6|selu|.* in place", name)])
def test_roads_leave_nothing(name, road):
    call = UNFROZEN[name]
    assert_leaves_nothing(road(call, call.sizes(N)[-1]), max(250, TIMES // 20), call.choices())


OF_RELU = (torch.ones(N), torch.ones(1, dtype=torch.uint8), [1])
REFUSED = {
    "in place on a leaf": lambda: relu_ext.relu_(torch.ones(N, requires_grad=True)),
    "bits of another tensor": lambda: torch.ops.relu_ext.relu_backward(torch.ones(9), *OF_RELU[1:]),
    "strides with gaps": lambda: torch.ops.relu_ext.relu_backward(*OF_RELU[:2], [2]),
    "an integer's operator": lambda: torch.ops.relu_ext.relu_forward(torch.ones(N, dtype=torch.int64)),
    "limits out of order": lambda: relu_ext.hardtanh(torch.ones(N), 1.0, -1.0),
    "a probability above 1": lambda: relu_ext.relu_dropout(torch.ones(N), 2.0),
    "a bias that does not fit": lambda: relu_ext.bias_relu(torch.ones(3, N), torch.ones(N + 1)),
    "a string": lambda: relu_ext.relu("a"),
    "cells that do not fit": lambda: _C.find_nonfinite(torch.ones(N), 1, torch.ones(2, dtype=torch.int64)),
    "an operation that is not there": lambda: _C.count_bits_of("elu", [], torch.ones(N), 0, 1, *OF_RELU[:2]),
    "an instruction set that is not there": lambda: _C.set_isa("mmx"),
}


@needs_glibc
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED)
def test_refused_calls_leave_nothing(call):
    def refused(_):
        with pytest.raises((RuntimeError, TypeError, ValueError, IndexError)):
            call()

    assert_leaves_nothing(refused, TIMES)
