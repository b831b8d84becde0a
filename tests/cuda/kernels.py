"""The real CUDA kernels, built by g++ for the CPU over the emulated CUDA language, and their launchers for NumPy.

python kernels.py [plain|sanitized] [pytest's arguments] builds them and runs their tests, for `sanitized` under
AddressSanitizer and UndefinedBehaviorSanitizer.
"""

import contextlib
import ctypes
import mmap
import os
import re
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_double, c_int64, c_uint, c_uint8, c_uint16, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILT = ROOT / "build" / "emulated"

CXX = os.environ.get("CXX", "g++")
FLAGS = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fno-strict-aliasing"]
LIBRARY = ["-shared", "-fPIC"]
VARIANTS = {
    "plain": ["-O1"],
    "sanitized": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


def build(sources: Iterable[Path], target: Path, flags: Iterable[str], csrc: Path = ROOT / "csrc") -> Path:
    """Compiles files over the emulator, side by side, and links them, unless target is newer than all it may be of."""
    folders = (HERE / "emulator", csrc)
    made_of = [*sources, *(path for folder in folders for path in folder.rglob("*") if path.is_file())]
    if target.exists() and target.stat().st_mtime > max(path.stat().st_mtime for path in made_of):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [CXX, *FLAGS, *flags, *(f"-I{folder}" for folder in folders)]
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:

        def compiled(source: Path) -> Path:
            made = Path(folder) / f"{source.stem}_{source.suffix[1:]}.o"
            subprocess.run([*command, "-x", "c++", "-c", source, "-o", made], check=True)
            return made

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = list(pool.map(compiled, sources))
        linked = Path(folder) / target.name
        subprocess.run([*command, *objects, "-o", linked], check=True)
        return linked.replace(target)


def build_library(
    variant: str, target: Path | None = None, csrc: Path = ROOT / "csrc", flags: Iterable[str] = ()
) -> Path:
    sources = [HERE / "kernels.cpp", *sorted((csrc / "cuda").glob("*.cu"))]
    return build(sources, target or BUILT / f"{variant}.so", [*LIBRARY, *VARIANTS[variant], *flags], csrc)


@dataclass(frozen=True)
class Dtype:
    """An element type as NumPy sees it: bits are its elements as integers, values the numbers that they stand for.

    bfloat16 is no type of NumPy's: its values are float32. Values are computed with in the type `arithmetic`.
    """

    name: str
    code: int
    word: type
    infinity: int
    values: Callable
    elements: Callable  # from values that `arithmetic` has; to the nearest, ties to even
    arithmetic: type = np.float32

    @property
    def bytes(self) -> int:
        return np.dtype(self.word).itemsize

    @property
    def sign(self) -> int:
        return 1 << (8 * self.bytes - 1)

    def rounded(self, number: float) -> np.ndarray:
        """An argument as one element: first to `arithmetic`, as ATen hands it on."""
        with np.errstate(over="ignore"):
            return self.elements(np.array([number]).astype(self.arithmetic))

    def __str__(self):
        return self.name


def bfloat16_elements(values: np.ndarray) -> np.ndarray:
    bits = values.view(np.uint32)
    nearest = ((bits.astype(np.uint64) + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


@cache
def names_of(enum: str) -> list[str]:
    """An enum's names in csrc/kernels.h, in order."""
    text = (ROOT / "csrc" / "kernels.h").read_text()
    return re.search(rf"enum class {enum} : uint8_t {{ (.*) }};", text)[1].split(", ")


CODES = {name: code for code, name in enumerate(names_of("Dtype"))}
DTYPES = [
    Dtype(
        "float32",
        CODES["float32"],
        np.uint32,
        0xFF << 23,
        values=lambda bits: bits.view(np.float32),
        elements=lambda values: values.view(np.uint32),
    ),
    Dtype(
        "float64",
        CODES["float64"],
        np.uint64,
        0x7FF << 52,
        values=lambda bits: bits.view(np.float64),
        elements=lambda values: values.view(np.uint64),
        arithmetic=np.float64,
    ),
    Dtype(
        "float16",
        CODES["float16"],
        np.uint16,
        0x1F << 10,
        values=lambda bits: bits.view(np.float16),
        elements=lambda values: values.astype(np.float16).view(np.uint16),
    ),
    Dtype(
        "bfloat16",
        CODES["bfloat16"],
        np.uint16,
        0xFF << 7,
        values=lambda bits: (bits.astype(np.uint32) << 16).view(np.float32),
        elements=bfloat16_elements,
    ),
]


@dataclass(frozen=True)
class Activation:
    """The maths of an activation again, in NumPy. Elements come and go as integers, so that every bit counts.

    Those that keep bits have `keep`, and give and take it; the others are differentiated from each of `kept`.
    """

    name: str
    forward: Callable  # (dtype, elements, keep) -> elements, or (dtype, elements) -> Range
    backward: Callable  # (dtype, grad, keep) -> elements, or (dtype, grad, kept, "input" or "output") -> Range
    keep: Callable | None = None  # (dtype, values of `arithmetic`) -> bool
    scalars: tuple[float, float, float] = (0.0, 0.0, 0.0)
    computes: bool = False  # then one NaN is as good as another

    @cached_property
    def code(self) -> int:
        return names_of("Activation").index(self.name)

    @property
    def kept(self) -> list[str]:
        return ["bits"] if self.keep else ["input", "output"]

    def __str__(self):
        return f"{self.name}{self.scalars if any(self.scalars) else ''}"


@dataclass(frozen=True)
class Range:
    """The elements that are right: from low to high as values, of any width, whose rounding keeps their order.

    NaN where both are; NaN too where high alone is, because it hangs on the last digit.
    """

    low: np.ndarray
    high: np.ndarray

    def wrong(self, dtype: Dtype, elements: np.ndarray) -> np.ndarray:
        values = dtype.values(elements)
        with np.errstate(over="ignore"):
            low, high = (dtype.values(dtype.elements(x.astype(dtype.arithmetic))) for x in (self.low, self.high))
        outside = (values < low) | (values > high) | np.isnan(low)
        return np.where(np.isnan(values), ~np.isnan(high), outside)

    @classmethod
    def around(cls, low: np.ndarray, high: np.ndarray, ulps: float, arithmetic: type) -> "Range":
        return cls(low - ulps * ulp(low, arithmetic), high + ulps * ulp(high, arithmetic))

    def times(self, factor: np.ndarray, arithmetic: type) -> "Range":
        """Rounded once, to either side."""
        ends = self.low * factor, self.high * factor
        return self.around(np.fmin(*ends), np.maximum(*ends), 1, arithmetic)

    def where(self, inside: np.ndarray, otherwise: np.ndarray) -> "Range":
        return Range(*(np.where(inside, bound, otherwise) for bound in (self.low, self.high)))


def ulp(values: np.ndarray, arithmetic: type) -> np.ndarray:
    """A unit in the last place, 0 where there is none; long double, so that sums with it are of that width."""
    spacing = np.spacing(np.abs(values).astype(arithmetic)).astype(np.longdouble)
    return np.where(np.isfinite(spacing), spacing, 0)


def zero_elsewhere(dtype, elements, keep):
    return np.where(keep, elements, dtype.word(0))


def hardtanh(low, high):
    """The bounds are compared with as `arithmetic`, and written as elements."""

    def keep(dtype, values):
        return ~((values <= dtype.arithmetic(low)) | (values >= dtype.arithmetic(high)))

    def forward(dtype, elements, keep):
        is_low = dtype.values(elements).astype(dtype.arithmetic) <= dtype.arithmetic(low)
        return np.where(keep, elements, np.where(is_low, dtype.rounded(low), dtype.rounded(high)))

    return Activation("hardtanh", forward, zero_elsewhere, keep, (low, high, 0.0))


def threshold(threshold, value):
    """ATen on CUDA compares with the threshold as an element."""

    def keep(dtype, values):
        return ~(values <= dtype.values(dtype.rounded(threshold)).astype(dtype.arithmetic))

    def forward(dtype, elements, keep):
        return np.where(keep, elements, dtype.rounded(value))

    return Activation("threshold", forward, zero_elsewhere, keep, (threshold, value, 0.0))


def widened(dtype, elements):
    return dtype.values(elements).astype(dtype.arithmetic)


def leaky_relu(slope):
    def scaled_elsewhere(dtype, elements, keep):
        with np.errstate(all="ignore"):
            scaled = widened(dtype, elements) * dtype.arithmetic(slope)
            return np.where(keep, elements, dtype.elements(scaled))

    return Activation(
        "leaky_relu", scaled_elsewhere, scaled_elsewhere, lambda dtype, values: values > 0, (slope, 0.0, 0.0), True
    )


# In emulation csrc/exponential.h computes it, to within 1.3 units in the last place; on a GPU, CUDA does.
EXPONENTIAL_ULPS = 1.5


def elu(alpha, scale, input_scale):
    """The exponential in long double; every product is rounded once, from the output exactly as NumPy rounds it."""

    def constants(dtype):
        X = dtype.arithmetic
        return X(scale), X(alpha) * X(scale), X(input_scale)

    def forward(dtype, elements):
        positive, negative, inner = constants(dtype)
        with np.errstate(all="ignore"):
            x = widened(dtype, elements)
            below = np.expm1((x * inner).astype(np.longdouble))
            about = Range.around(below, below, EXPONENTIAL_ULPS, dtype.arithmetic)
            return about.times(negative, dtype.arithmetic).where(x < 0, x * positive)

    def backward(dtype, grad, elements, kept):
        positive, negative, inner = constants(dtype)
        with np.errstate(all="ignore"):
            g, x = widened(dtype, grad), widened(dtype, elements)
            if kept == "output":
                product = np.where(x <= 0, g * ((x + negative) * inner), g * positive)
                return Range(product, product)
            slope = np.exp((x * inner).astype(np.longdouble))
            about = Range.around(slope, slope, EXPONENTIAL_ULPS, dtype.arithmetic)
            about = about.times(negative, dtype.arithmetic).times(inner, dtype.arithmetic)
            above_zero = Range(about.low.clip(0), about.high)
            return above_zero.times(g.astype(np.longdouble), dtype.arithmetic).where(x <= 0, g * positive)

    return Activation("elu", forward, backward, None, (alpha, scale, input_scale), True)


def rectified(x):
    return np.where(x <= 0, x.dtype.type(0), x)


def relu_squared():
    def forward(dtype, elements):
        with np.errstate(all="ignore"):
            square = rectified(widened(dtype, elements)) ** 2
        return Range(square, square)

    def backward(dtype, grad, elements, kept):
        with np.errstate(all="ignore"):
            x = widened(dtype, elements)
            root = rectified(x) if kept == "input" else widened(dtype, dtype.elements(np.sqrt(x)))
            product = np.where(root <= 0, dtype.arithmetic(0), widened(dtype, grad) * root * dtype.arithmetic(2))
        return Range(product, product)

    return Activation("relu_squared", forward, backward, computes=True)


# Numbers that no 16-bit type has: 0.1 is above the nearest bfloat16... and below the nearest float16.
ACTIVATIONS = [
    Activation("relu", zero_elsewhere, zero_elsewhere, lambda dtype, values: ~(values <= 0)),
    hardtanh(-0.3, 0.7),
    threshold(0.1, -0.7),
    leaky_relu(-0.3),
    elu(1.3, 0.9, 0.7),
    relu_squared(),
]


class Dim3(ctypes.Structure):
    _fields_ = [("x", c_uint), ("y", c_uint), ("z", c_uint)]


class Launch(ctypes.Structure):
    """emulator::Launch."""

    _fields_ = [("stream", c_void_p), ("grid", Dim3), ("block", Dim3)]


class Forward(ctypes.Structure):
    """Of csrc/kernels.h, as are those that follow."""

    _fields_ = [
        *[("activation", c_uint8), ("scalars", c_double * 3), ("dtype", c_uint8)],
        *[("input", c_void_p), ("output", c_void_p), ("bits", c_void_p)],
    ]


class Backward(ctypes.Structure):
    _fields_ = [
        *[("activation", c_uint8), ("scalars", c_double * 3), ("dtype", c_uint8), ("kept_as", c_uint8)],
        *[("grad", c_void_p), ("kept", c_void_p), ("output", c_void_p)],
    ]


class Rows(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("stride", c_int64)]


class Gated(ctypes.Structure):
    _fields_ = [("dtype", c_uint8), ("columns", c_int64), ("gate", Rows), ("up", Rows), ("output", Rows)]


class GatedBackward(ctypes.Structure):
    _fields_ = [
        *[("dtype", c_uint8), ("columns", c_int64), ("grad", Rows), ("gate", Rows), ("up", Rows)],
        *[("grad_gate", Rows), ("grad_up", Rows)],
    ]


class Prelu(ctypes.Structure):
    _fields_ = [
        *[("dtype", c_uint8), ("channels", c_int64), ("inner", c_int64)],
        *[("input", c_void_p), ("weight", c_void_p), ("output", c_void_p), ("bits", c_void_p)],
    ]


class PreluBackward(ctypes.Structure):
    _fields_ = [
        *[("dtype", c_uint8), ("channels", c_int64), ("inner", c_int64)],
        *[("grad", c_void_p), ("input", c_void_p), ("bits", c_void_p), ("weight", c_void_p)],
        *[("output", c_void_p), ("grad_weight", c_void_p)],
    ]


class Stream(ctypes.Structure):
    _fields_ = [("seed", c_uint64), ("offset", c_uint64), ("seed_at", c_void_p), ("offset_at", c_void_p)]


class Dropout(ctypes.Structure):
    _fields_ = [("stream", Stream), ("last", c_uint16), ("factor", c_double)]


class Fused(ctypes.Structure):
    _fields_ = [
        *[("activation", c_uint8), ("scalars", c_double * 3), ("dtype", c_uint8)],
        *[("channels", c_int64), ("inner", c_int64)],
        *[("input", c_void_p), ("scale", c_void_p), ("shift", c_void_p), ("residual", c_void_p)],
        *[("multiply_add", c_bool), ("dropout", Dropout), ("output", c_void_p), ("bits", c_void_p)],
    ]


class FusedBackward(ctypes.Structure):
    _fields_ = [
        *[("activation", c_uint8), ("scalars", c_double * 3), ("dtype", c_uint8)],
        *[("channels", c_int64), ("inner", c_int64), ("kept_as", c_uint8)],
        *[("grad", c_void_p), ("kept", c_void_p), ("input", c_void_p), ("scale", c_void_p), ("factor", c_double)],
        *[("grad_input", c_void_p), ("grad_residual", c_void_p), ("grad_scale", c_void_p), ("grad_shift", c_void_p)],
    ]


class Count(ctypes.Structure):
    _fields_ = [
        *[("channels", c_int64), ("inner", c_int64), ("bits", c_void_p), ("step", c_int64)],
        *[("kept", c_void_p), ("last", c_void_p)],
    ]


class NonFinite(ctypes.Structure):
    _fields_ = [("dtype", c_uint8), ("input", c_void_p), ("step", c_int64), ("first", c_void_p)]


class Kernels:
    """The launchers of a built library; memory is given by its address."""

    def __init__(self, library: Path):
        self.library = ctypes.CDLL(str(library))
        self.library.emulator_launches.restype = c_int64
        self.library.kernels_prelu_workspace.restype = c_int64
        self.library.kernels_fused_workspace.restype = c_int64
        self.library.emulator_last_launch.restype = ctypes.POINTER(Launch)
        self.library.emulator_run_only.argtypes = [ctypes.POINTER(c_uint64), c_uint64]

    def launch(self, name: str, work: ctypes.Structure, numel: int, stream=None) -> int:
        return self.library[f"kernels_{name}"](ctypes.byref(work), c_int64(numel), c_void_p(stream))

    def forward(self, activation, dtype, input, output, bits, numel, stream=None) -> int:
        work = Forward(activation.code, activation.scalars, dtype.code, input, output, bits)
        return self.launch("forward", work, numel, stream)

    def backward(self, activation, dtype, kept_as, grad, kept, output, numel, stream=None) -> int:
        how = names_of("Kept").index(kept_as)
        work = Backward(activation.code, activation.scalars, dtype.code, how, grad, kept, output)
        return self.launch("backward", work, numel, stream)

    def workspace(self, name: str, work: ctypes.Structure, numel: int) -> int:
        """How many bytes the launcher of this name needs."""
        return self.library[f"kernels_{name}_workspace"](ctypes.byref(work), c_int64(numel))

    def launch_sums(self, name: str, work: ctypes.Structure, numel: int, workspace, stream=None) -> int:
        arguments = ctypes.byref(work), c_int64(numel), c_void_p(workspace), c_void_p(stream)
        return self.library[f"kernels_{name}_backward"](*arguments)

    def prelu_backward(self, work: PreluBackward, numel: int, workspace, stream=None) -> int:
        return self.launch_sums("prelu", work, numel, workspace, stream)

    @property
    def launches(self) -> int:
        """How many there were so far."""
        return self.library.emulator_launches()

    @property
    def last_launch(self) -> Launch:
        return self.library.emulator_last_launch().contents

    @contextlib.contextmanager
    def only_blocks(self, blocks: Iterable[int]):
        """Of every grid launched inside, only these blocks run."""
        blocks = sorted(blocks)
        self.library.emulator_run_only((c_uint64 * len(blocks))(*blocks), len(blocks))
        try:
            yield
        finally:
            self.library.emulator_run_all_blocks()


LIBC = ctypes.CDLL(None)
LIBC.malloc.restype, LIBC.malloc.argtypes, LIBC.free.argtypes = c_void_p, [ctypes.c_size_t], [c_void_p]
LIBC.mprotect.argtypes = [c_void_p, ctypes.c_size_t, ctypes.c_int]


def exact_block(size: int) -> np.ndarray:
    """Bytes from a multiple of 16 on, for AddressSanitizer."""
    address = LIBC.malloc(size)
    block = (ctypes.c_ubyte * size).from_address(address)
    weakref.finalize(block, LIBC.free, address)
    return np.frombuffer(block, np.uint8)


def guarded_block(size: int) -> np.ndarray:
    """The same up to a multiple of 16, and then a page that traps."""
    size = -(-size // 16) * 16
    inside = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    whole = np.frombuffer(mmap.mmap(-1, inside + mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    assert LIBC.mprotect(whole.ctypes.data + inside, mmap.PAGESIZE, 0) == 0
    return whole[inside - size : inside]


class Memory:
    """Elements at `offset` bytes past a multiple of 16, in a block that ends with them, or less than 16 bytes later.

    A read or write behind the block ends the process. intact() tells whether anything in it but the elements was
    written to.
    """

    POISON = 0xA5
    new_block = staticmethod(exact_block if os.environ.get("EMULATED") == "sanitized" else guarded_block)

    def __init__(self, elements: np.ndarray, offset: int = 0):
        whole = self.new_block(offset + elements.nbytes)
        assert whole.ctypes.data % 16 == 0
        whole[:] = self.POISON
        self.address = whole.ctypes.data + offset
        self.before, self.behind = whole[:offset], whole[offset + elements.nbytes :]
        self.elements = whole[offset : offset + elements.nbytes].view(elements.dtype)
        self.elements[:] = elements

    @classmethod
    def unwritten(cls, count: int, dtype: type, offset: int = 0) -> "Memory":
        return cls(np.full(count * np.dtype(dtype).itemsize, cls.POISON, np.uint8).view(dtype), offset)

    def intact(self) -> bool:
        return bool((self.before == self.POISON).all() and (self.behind == self.POISON).all())


def environment(variant: str, library: Path) -> dict[str, str]:
    """For a Python that loads this library."""
    variables = {**os.environ, "EMULATED": variant, "EMULATED_LIBRARY": str(library)}
    if variant == "sanitized":
        runtime = subprocess.run([CXX, "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
        variables["LD_PRELOAD"] = runtime.stdout.strip()
        variables["ASAN_OPTIONS"] = "detect_leaks=0:quarantine_size_mb=8"  # the leaks are Python's own
    return variables


def pytest_command(*arguments: str) -> list[str]:
    """Runs the kernels' tests; without the conftest.py above, which needs the whole extension.

    What the emulator or a sanitizer says when it ends the run is left to be seen.
    """
    options = [f"--confcutdir={HERE}", "--capture=sys"]
    return [sys.executable, "-m", "pytest", *options, str(HERE / "test_kernels.py"), *arguments]


if __name__ == "__main__":
    variant, *arguments = sys.argv[1:] or ["plain"]
    library = build_library(variant)
    sys.exit(subprocess.run(pytest_command(*arguments), env=environment(variant, library), cwd=ROOT).returncode)
