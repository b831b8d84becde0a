"""Plants bugs in copies of the CUDA kernels and expects tests to fail: see tests/mutation.py.

A bug is an edit of csrc/, caught by the kernels' tests over the emulator or, where every result stays right, by the
sanitizers or the check of the machine code. Without nvcc the last are left out, and it says so.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import machine_code
from kernels import ROOT, build_library, environment, pytest_command

sys.path.append(str(ROOT / "tests"))
import mutation

KERNELS, LAUNCHERS, MATHS = "cuda/kernels.cuh", "cuda/kernels.cu", "activations.h"
GATED, CHANNELS, SUMS, FUSED = "cuda/gated.cuh", "cuda/channels.cuh", "cuda/sums.cuh", "cuda/fused.cuh"
MONITOR = "cuda/monitor.cuh"
LAUNCH, LAUNCH_CHANNELS = "cuda/launch.cuh", "cuda/launch_channels.cuh"
ONE_ORDER = "not backward and not shuffled"  # of threads: a third of the time


def by_tests(csrc: Path, variant: str = "plain", words: str = ONE_ORDER) -> str | None:
    """What ended the run, or the first test that fails; or None."""
    flags = ["-g0", "-w"]  # a bug may leave a variable unused
    library = build_library(variant, csrc.parent / "kernels.so", csrc, flags)
    command = pytest_command("-x", "--tb=no", "-p", "no:cacheprovider", "-k", words)
    process = subprocess.run(command, env=environment(variant, library), cwd=ROOT, capture_output=True, text=True)
    said = re.search(r"CUDA emulator: .*|AddressSanitizer: [\w-]+|runtime error: .*", process.stderr)
    return said[0] if process.returncode and said else mutation.failure(process)


def by_sanitizers(csrc: Path) -> str | None:
    """For bugs that no result shows."""
    return by_tests(csrc, "sanitized")


def by_fused_tests(csrc: Path) -> str | None:
    """Which come last."""
    return by_tests(csrc, words=f"(fused or dropout) and {ONE_ORDER}")


def by_monitor_tests(csrc: Path) -> str | None:
    """Which come last."""
    return by_tests(csrc, words="counts or finite")


def by_machine_code(csrc: Path) -> str | None:
    """The first complaint, or None."""
    nvcc, nvdisasm = machine_code.find_nvcc(), machine_code.find_nvdisasm()
    try:
        results = machine_code.results(nvcc, nvdisasm, ["90"], csrc)
    except machine_code.Refused as refused:
        return next(line for line in str(refused).splitlines() if line.startswith("ptxas"))
    return next((problem for result in results for problem in result.problems), None)


@dataclass(frozen=True)
class Mutant(mutation.Mutant):
    caught: Callable[[Path], str | None] = by_tests


MUTANTS = [
    Mutant("NaN is dropped", MATHS, "return not_at_most_0(as<X>(input));", "return is_positive(as<X>(input));"),
    Mutant("zero is kept", MATHS, "return not_at_most_0(as<X>(input));", "return !(as<X>(input) < X{});"),
    Mutant(
        "backward is the wrong way round",
        MATHS,
        "return select(keep, value, product);",
        "return select(!keep, value, product);",
    ),
    Mutant(
        "the lower bound passes",
        "numeric.h",
        "return !(value <= low) & !(value >= high);",
        "return !(value < low) & !(value >= high);",
    ),
    Mutant(
        "the threshold is not rounded",
        MATHS,
        ": as<X>(narrow<T>(Arithmetic<T>(scalars[0])))),",
        ": X(Arithmetic<T>(scalars[0]))),",
    ),
    Mutant("the slope reaches what is kept", MATHS, "return select(keep, value, product);", "return product;"),
    Mutant(
        "rounded towards zero",
        "numeric.h",
        "return bits + 0x7fffu + (bits >> 16 & 1u);",
        "return bits;",
    ),
    Mutant("one element too many is written", KERNELS, "if (j < count) to[j]", "if (j <= count) to[j]"),
    Mutant("the last element is not read", KERNELS, "if (j < count) vector", "if (j + 1 < count) vector"),
    Mutant(
        "spare bits are set", KERNELS, "uint32_t(keep && j < part.count(k))", "uint32_t(keep || j >= part.count(k))"
    ),
    Mutant("one byte of bits too many", KERNELS, "8 * byte < part.numel", "8 * byte <= part.numel"),
    Mutant("the wrong lane", KERNELS, "bytes, step);", "bytes, 2 * step);"),
    Mutant("not every lane shuffles", KERNELS, "bytes |= __shfl", "if (sharer != 1) bytes |= __shfl"),
    Mutant("bits in reverse", KERNELS, "j < part.count(k)) << j;", "j < part.count(k)) << (Vector<T>::lanes - 1 - j);"),
    Mutant("bytes of neighbours", KERNELS, "uint8_t(bytes >> 8 * sharer)", "uint8_t(bytes >> 8 * (sharer ^ 1))"),
    Mutant("backward takes a neighbour's bits", KERNELS, "kept[k] >> Vector<T>::lanes *", "kept[k] >> 2 *"),
    Mutant("strides between lanes", KERNELS, "return (first + warp * k) *", "return (first + (warp + 1) * k) *"),
    Mutant("index of 32 bits", KERNELS, "{ return (first + warp * k) *", "{ return int(first + warp * k) *"),
    Mutant(
        "index of 32 bits, no sign", KERNELS, "{ return (first + warp * k) *", "{ return unsigned(first + warp * k) *"
    ),
    Mutant(
        "a tile less one element is full",
        KERNELS,
        ">= elements_of<T, Tile, lanes>;",
        ">= elements_of<T, Tile, lanes> - 1;",
    ),
    Mutant("the output's alignment", LAUNCHERS, "are_aligned({work.input, work.output})", "are_aligned({work.input})"),
    Mutant("8 bytes of alignment will do", LAUNCH, "% 16 == 0", "% 8 == 0"),
    Mutant(
        "the last block is missing",
        LAUNCH,
        "(numel - 1) / elements_of<T, Tile, lanes> + 1",
        "numel / elements_of<T, Tile, lanes>",
    ),
    Mutant(
        "blocks of the wrong tile",
        LAUNCH,
        "(numel - 1) / elements_of<T, Tile, lanes>",
        "(numel - 1) / elements_of<T, cuda::Tile<256, 4>, lanes>",
    ),
    Mutant("a block too many", LAUNCH, "elements_of<T, Tile, lanes> + 1;", "elements_of<T, Tile, lanes> + 2;"),
    Mutant("a launch for no elements", LAUNCHERS, "if (numel == 0) return cudaSuccess;", ""),
    Mutant("another stream", LAUNCH, "pointers, 0, stream)", "pointers, 0, nullptr)"),
    Mutant("elements read past the end", KERNELS, "if (j < count) vector", "vector", by_sanitizers),
    Mutant(
        "bits read past the end",
        KERNELS,
        "part.count(k) ? bits[part.byte(k)] : 0u",
        "bits[part.byte(k)]",
        by_sanitizers,
    ),
    Mutant(
        "narrow loads",
        KERNELS,
        "if (aligned && count == lanes) {\n    const auto raw = reinterpret_cast<const",
        "if (false) {\n    const auto raw = reinterpret_cast<const",
        by_machine_code,
    ),
    Mutant(
        "loads between stores",
        KERNELS,
        """
    values[k] = load<Tile::loads, aligned>(input + part.element(k), part.count(k));
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {""",
        " { values[k] = load<Tile::loads, aligned>(input + part.element(k), part.count(k));",
        by_machine_code,
    ),
    Mutant(
        "vectors in local memory",
        KERNELS,
        "values[k].lane[j] = own(act, owns[k], j).backward(",
        "values[(k + threadIdx.x) % Tile::vectors].lane[j] = own(act, owns[k], j).backward(",
        by_machine_code,
    ),
    Mutant(
        "the exponential is elu's slope twice",
        MATHS,
        "select(value <= 0, scaled(below), positive)",
        "select(value <= 0, scaled(scaled(below)), positive)",
    ),
    Mutant("relu_squared's gradient is not doubled", MATHS, "grad * root * 2;", "grad * root;"),
    Mutant("reglu's mask is dropped", MATHS, "return masked(!(gate <= 0), X(grad * up));", "return grad * up;"),
    Mutant("the stride of a row is its columns", GATED, "data + element + row * gap", "data + element"),
    Mutant("the row of a neighbour", GATED, "columns.quotient(Part::element(k))", "columns.quotient(Part::element(0))"),
    Mutant(
        "gradients of gate and up are swapped",
        GATED,
        "part.store(grad_up, k, grads[k])",
        "part.store(grad_up, k, gates[k])",
    ),
    Mutant(
        "rows need not divide into vectors", "cuda/gated.cu", "bool whole = columns % lanes == 0;", "bool whole = true;"
    ),
    Mutant("strides need not divide into vectors", "cuda/gated.cu", "whole &= stride % lanes == 0;", "whole &= true;"),
    Mutant("the quotient is one less", "cuda/division.h", "/ uint64_t(value)) + 1;", "/ uint64_t(value));"),
    Mutant("channels do not repeat", CHANNELS, "channel + 1 == channels.value ? 0 : channel + 1", "channel + 1"),
    Mutant("a run is one longer", CHANNELS, "const bool next = left == 0;", "const bool next = left < 0;"),
    Mutant(
        "the sums' mask is dropped",
        MATHS,
        "return select(is_positive(input), Arithmetic<T>{}, product);",
        "return product;",
    ),
    Mutant("a column's channel is that of its first element", SUMS, "column * lanes + j);", "column * lanes);"),
    Mutant("a part is lost", SUMS, "i < parts * inner.value;", "i < (parts - 1) * inner.value;"),
    Mutant("the last of a part is lost", SUMS, "item + k * step >= end ? 0", "item + k * step + 1 >= end ? 0"),
    Mutant("half a block's sums are lost", SUMS, "int reach = Sums::threads / 2;", "int reach = Sums::threads / 4;"),
    Mutant(
        "a lane's sum is lost", SUMS, "int j = 1; j < lanes; ++j) totals[sum]", "int j = 2; j < lanes; ++j) totals[sum]"
    ),
    Mutant("a barrier is missing", SUMS, "    __syncthreads();\n", ""),
    Mutant("float64 is joined in float32", SUMS, "double total = 0;", "float total = 0;"),
    Mutant("parts that the grid has not", LAUNCH_CHANNELS, "sums.groups.value * sums.parts", "sums.groups.value"),
    Mutant(
        "the last of a single channel is lost",
        SUMS,
        "item = (whole - begin) % step == threadIdx.x / sums.across ? whole : end;",
        "item = end;",
    ),
    Mutant("both sums are the first", SUMS, "(second ? parts : 0)", "0", by_fused_tests),
    Mutant("channels need not be aligned", LAUNCH_CHANNELS, "% lanes == 0 && values_are)", "% lanes == 0)"),
    Mutant("the shift is the scale", FUSED, "load(operands.shift,", "load(operands.scale,", by_fused_tests),
    Mutant("no residual", FUSED, "if constexpr (Parts::residual)\n", "if constexpr (false)\n", by_fused_tests),
    Mutant(
        "the wrong group of numbers",
        FUSED,
        "offset, uint64_t(element) / 8)",
        "offset, uint64_t(element) / 16)",
        by_fused_tests,
    ),
    Mutant("the wrong half of a word", "epilogue.h", ">> 16 * (i % 2)", ">> 16 * (1 - i % 2)", by_fused_tests),
    Mutant(
        "a neighbour's words",
        FUSED,
        "all.word[other * words + word]",
        "all.word[(other ^ 1) * words + word]",
        by_fused_tests,
    ),
    Mutant("the last number drops", FUSED, "<= operands.last", "< operands.last", by_fused_tests),
    Mutant(
        "a graph's offset is that of its memory",
        FUSED,
        "stream.offset += uint64_t",
        "stream.offset = uint64_t",
        by_fused_tests,
    ),
    Mutant("bits of what is dropped", FUSED, "keep = keep && random_of", "keep = random_of", by_fused_tests),
    Mutant("bits of another vector", FUSED, "loaded.bits >> element % 8 >> j", "loaded.bits >> j", by_fused_tests),
    Mutant(
        "the sums' gradients are not masked",
        FUSED,
        "totals[0][j] += widen(one);",
        "totals[0][j] += widen(loaded.grad.lane[j]);",
        by_fused_tests,
    ),
    Mutant(
        "a residual's gradient is scaled",
        FUSED,
        "work.grad_residual + part.element(k), part.count(k), masked[k]",
        "work.grad_residual + part.element(k), part.count(k), grads[k]",
        by_fused_tests,
    ),
    Mutant(
        "a residual's gradient beside sums is scaled",
        FUSED,
        "(grad_residual + element, count, masked)",
        "(grad_residual + element, count, loaded.grad)",
        by_fused_tests,
    ),
    Mutant("loads behind arithmetic", FUSED, "    __syncwarp();  //", "    //", by_machine_code),
    Mutant(
        "gated stores of 32 bits",
        "cuda/gated.cu",
        "Tile<256, 2, Hint::none, Hint::streaming>",
        "Tile<256, 2>",
        by_machine_code,
    ),
    Mutant("bits before a run", MONITOR, "if (32 * word < begin) own", "if (false) own", by_monitor_tests),
    Mutant("bits behind a run", MONITOR, "if (32 * word + 32 > end) own", "if (false) own", by_monitor_tests),
    Mutant("a piece of a part is lost", MONITOR, "item < last;", "item + 1 < last;", by_monitor_tests),
    Mutant(
        "parts overlap", MONITOR, "part * how.rows * how.period.value +", "part * how.period.value +", by_monitor_tests
    ),
    Mutant(
        "counts are not added", MONITOR, "  if (count == 0) return;\n", "  if (count < 2) return;\n", by_monitor_tests
    ),
    Mutant(
        "a negative infinity is finite",
        "numeric.h",
        "return (value.bits & infinity) != infinity;",
        "return (value.bits & (0x8000u | infinity)) != infinity;",
        by_monitor_tests,
    ),
    Mutant("a later step is written", MONITOR, "if (!finite && *first == 0)", "if (!finite)", by_monitor_tests),
    Mutant("too few registers", KERNELS, "blocks_ = 1024 / threads_", "blocks_ = 2048 / threads_", by_machine_code),
]


@contextmanager
def copied() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(shutil.copytree(ROOT / "csrc", Path(folder) / "csrc"))


def main(pattern: str = "") -> int:
    if pattern == "--fit":
        return mutation.fit(MUTANTS, ROOT / "csrc")
    mutants = mutation.matching(MUTANTS, pattern)
    if not machine_code.find_nvcc():
        print("no nvcc: bugs that only machine code shows are left out")
        mutants = [mutant for mutant in mutants if mutant.caught is not by_machine_code]
    return mutation.run(mutants, copied, os.cpu_count())


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
