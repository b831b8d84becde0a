"""Plants bugs in copies of the project, but for its CUDA kernels, and expects tests to fail: see tests/mutation.py.

A bug is an edit of csrc/ or relu_ext/. The copy is built with it, where only what the edit touches is compiled again,
and of the project's tests those run that are for it.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mutation
from mutation import Mutant

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["csrc", "relu_ext", "tests", "setup.py", "pyproject.toml"]
# Objects know their folder: every copy is in the place where the first was built.
BUILT = ROOT / "build" / "mutants"
TREE, BASE = BUILT / "tree", BUILT / "base"
SECONDS = 300  # for the tests of one bug, which take a tenth of that unless they hang


@dataclass(frozen=True)
class By:
    """Tests of a file: those that these words select, as of pytest's -k."""

    file: str
    words: str

    def __call__(self, tree: Path) -> str | None:
        build(tree)
        try:
            return mutation.failure(run_tests(tree, self.file, self.words))
        except subprocess.TimeoutExpired:
            return f"no end in {SECONDS} s"


def run_tests(tree: Path, file: str, words: str, seconds: float | None = SECONDS) -> subprocess.CompletedProcess:
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    options = ["-x", "--tb=no", "-p", "no:cacheprovider", "-k", words]
    command = [sys.executable, "-m", "pytest", f"tests/{file}", *options]
    return subprocess.run(command, cwd=tree, env=environ, capture_output=True, text=True, timeout=seconds)


def build(tree: Path) -> None:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # ninja is a program
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    built = subprocess.run(command, cwd=tree, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if built.returncode:
        raise SystemExit(built.stdout + built.stderr)


# g++ takes a third of the time. Products are contracted with sums at -O2 and above unless it is told to.
FASTER = Mutant("", "setup.py", '"-O3", "-g0"', '"-O1", "-fexpensive-optimizations", "-g0"', build)

LOOPS, STAGED, CHANNELS = "csrc/cpu/loops.h", "csrc/cpu/staged.h", "csrc/cpu/channels.h"
THREADS, COUNTS, RANDOM = "csrc/cpu/backend.cpp", "csrc/cpu/monitor.cpp", "csrc/cpu/random.h"
FUSED_KERNELS, GATED_KERNELS = "csrc/cpu/fused.cpp", "csrc/cpu/gated.cpp"
MATHS, NUMBERS, EXPONENTIAL = "csrc/activations.h", "csrc/numeric.h", "csrc/exponential.h"
GATE, AUTOGRAD, NODE, LAUNCH = "csrc/gate.h", "csrc/autograd.cpp", "csrc/node.cpp", "csrc/launch.cpp"
FUSED, PRELU, REGLU = "csrc/fused.cpp", "csrc/prelu.cpp", "csrc/reglu.cpp"
DROPOUT, LINEAR = "csrc/dropout.cpp", "csrc/linear.cpp"
OPERATORS, INSTALL, MONITOR, PYTHON = "csrc/operators.cpp", "csrc/install.cpp", "csrc/monitor.cpp", "csrc/python.cpp"

LENGTHS = By("test_values.py", "test_every_length and (relu or elu) and not offset")
PATTERNS = By("test_values.py", "special_values_in_every_lane or every_16_bit_pattern")
INSIDE = By("test_memory.py", "no_byte_outside")
SHARES = By("test_values.py", "sizes_that_use_more_threads")
FUSED_LAYOUTS = By("test_fused.py", "test_layouts")

MUTANTS = [
    # Loops
    Mutant("the tail of a block is lost", LOOPS, "  if (i < end) body(i, int(end - i));\n", "", LENGTHS),
    Mutant(
        "spare bits are set",
        LOOPS,
        "      alignas(64) W mask[lanes] = {};\n",
        "      alignas(64) W mask[lanes];\n      std::memset(mask, count < lanes ? 255 : 0, sizeof(mask));\n",
        By("test_values.py", "little_endian"),
    ),
    Mutant(
        "a byte of bits too many is written",
        LOOPS,
        "std::memcpy(bits + i / 8, &kept, (count + 7) / 8);",
        "std::memcpy(bits + i / 8, &kept, std::min((count + 8) / 8, 8));",
        INSIDE,
    ),
    Mutant(
        "bits are read past the end",
        LOOPS,
        "std::memcpy(kept, bits + i / 8, (count + 7) / 8);",
        "std::memcpy(kept, bits + i / 8, 8);",
        INSIDE,
    ),
    Mutant(
        "backward reads the bits of the first vector",
        LOOPS,
        "single<W>.bit[first % word + j]",
        "single<W>.bit[j]",
        LENGTHS,
    ),
    Mutant(
        "the last of a tail of 16 bits is lost",
        STAGED,
        "const size_t bytes = size_t(end - i) * sizeof(T);",
        "const size_t bytes = size_t(end - i - 1) * sizeof(T);",
        LENGTHS,
    ),
    Mutant(
        "a tail of 16 bits is read past the end",
        STAGED,
        "std::memcpy(last[k], input[k] + i, bytes);",
        "std::memcpy(last[k], input[k] + i, sizeof(last[k]));",
        INSIDE,
    ),
    Mutant(
        "ties of bfloat16 are rounded up",
        STAGED,
        "uint16_t(0x7ffeu | (upper[j] & 1u))",
        "uint16_t(0x7fffu)",
        By("test_fused.py", "test_layouts and bfloat16"),
    ),
    Mutant(
        "products of the first element's factor",
        STAGED,
        "RELU_EXT_INLINE const T* factors_from(Slopes<T> slopes, int64_t i) {\n  return slopes.slope + i;",
        "RELU_EXT_INLINE const T* factors_from(Slopes<T> slopes, int64_t) {\n  return slopes.slope;",
        By("test_two_tensors.py", "test_prelu and bfloat16"),
    ),
    # Predicates and numbers
    Mutant(
        "relu drops NaN",
        NUMBERS,
        "bool not_at_most_0(float value) { return !(value <= 0); }",
        "bool not_at_most_0(float value) { return value > 0; }",
        PATTERNS,
    ),
    Mutant("a half's zero passes", NUMBERS, " | (value.bits == 0));", ");", PATTERNS),
    Mutant(
        "minus infinity passes for NaN",
        NUMBERS,
        "int16_t(0x8000u | infinity)) |",
        "int16_t(0x7fffu + infinity)) |",
        PATTERNS,
    ),
    Mutant(
        "a NaN at the upper bound has no gradient",
        NUMBERS,
        "(value.order() < high.order_or(-1))) | value.is_nan();",
        "(value.order() < high.order_or(-1)));",
        PATTERNS,
    ),
    Mutant(
        "the gradient passes at the upper bound",
        NUMBERS,
        "return !(value <= low) & !(value >= high);",
        "return !(value <= low) & !(value > high);",
        PATTERNS,
    ),
    Mutant(
        "+0 is above a lower bound of -0",
        NUMBERS,
        "(value.order() > low.order_or(0)) &",
        "(value.order() > low.order()) &",
        By("test_values.py", "bounds_of_zero"),
    ),
    Mutant(
        "-0 is below an upper bound of +0",
        NUMBERS,
        "high.order_or(-1)",
        "high.order()",
        By("test_values.py", "bounds_of_zero"),
    ),
    Mutant(
        "the threshold is rounded to the nearest",
        MATHS,
        "threshold(device == Device::cpu ? at_most<X>(Arithmetic<T>(scalars[0]))",
        "threshold(device == Device::cpu ? narrow<X>(Arithmetic<T>(scalars[0]))",
        PATTERNS,
    ),
    Mutant(
        "leaky_relu's gradient passes at NaN",
        MATHS,
        "{ return is_positive(as<X>(input)); }",
        "{ return not_at_most_0(as<X>(input)); }",
        PATTERNS,
    ),
    Mutant(
        "elu's kink belongs to the other side", MATHS, "grad * select(value <= 0,", "grad * select(value < 0,", PATTERNS
    ),
    Mutant(
        "celu does not scale its input",
        "csrc/dispatch.h",
        "if (scalars[2] == 1)",
        "if (scalars[2] > 0)",
        By("test_values.py", "celu"),
    ),
    Mutant(
        "relu_squared's gradient is infinity times 0",
        MATHS,
        "return select(root <= 0, X{}, twice);",
        "return twice;",
        PATTERNS,
    ),
    Mutant(
        "a NaN of the gate has no gradient",
        MATHS,
        "return masked(!(gate <= 0), X(grad * up));",
        "return masked(gate > 0, X(grad * up));",
        By("test_two_tensors.py", "test_reglu"),
    ),
    Mutant(
        "a NaN of the input is not in the slope's gradient",
        MATHS,
        "return select(is_positive(input), Arithmetic<T>{}, product);",
        "return select(!(input <= 0), Arithmetic<T>{}, product);",
        By("test_two_tensors.py", "prelu_special or where_a_number_is_nan"),
    ),
    Mutant("half's ties go up", NUMBERS, "(capped + 0xfffu + (capped >> 13 & 1u)", "(capped + 0x1000u", PATTERNS),
    Mutant("bfloat16's ties go up", NUMBERS, "bits + 0x7fffu + (bits >> 16 & 1u)", "bits + 0x8000u", PATTERNS),
    Mutant(
        "a half's subnormals are 0",
        NUMBERS,
        "select(magnitude < 0x38800000u, subnormal, normal);",
        "select(magnitude < 0x38800000u, 0u, normal);",
        PATTERNS,
    ),
    Mutant("NaN becomes infinite", NUMBERS, "select(magnitude > 0x7f800000u, 0x7e00u, finite)", "finite", PATTERNS),
    Mutant(
        "exp underflows early",
        EXPONENTIAL,
        "exp_is_0 = -104.5f",
        "exp_is_0 = -87.f",
        By("test_values.py", "elu and every_16_bit_pattern"),
    ),
    Mutant(
        "a coefficient of two digits",
        EXPONENTIAL,
        "0x1.120ba2p-7f",
        "0x1.1p-7f",
        By("test_values.py", "elu and float32 and (every_lane or million)"),
    ),
    Mutant(
        "a product is part of a multiply-add",
        FUSED_KERNELS,
        '#pragma GCC optimize("fp-contract=off")',
        '#pragma GCC optimize("fp-contract=fast")',
        FUSED_LAYOUTS,
    ),
    Mutant(
        "bfloat16's products are not rounded",
        "csrc/epilogue.h",
        "if constexpr (!std::is_same_v<T, half>)",
        "if constexpr (!is_16_bit<T>)",
        By("test_fused.py", "products_beyond"),
    ),
    Mutant(
        "a multiply-add rounds its product",
        "csrc/epilogue.h",
        "if constexpr (Parts::multiply_add && has_multiply_add)",
        "if constexpr (false)",
        By("test_fused.py", "multiply_add_rounds"),
    ),
    # Channels and their sums
    Mutant(
        "the first row is as long as the others",
        CHANNELS,
        "if (inner == 1) return {i % number, number - i % number};",
        "if (inner == 1) return {i % number, number};",
        FUSED_LAYOUTS,
    ),
    Mutant(
        "the last of a run are not summed", CHANNELS, "  for (; j < count; ++j) total += terms[j];\n", "", FUSED_LAYOUTS
    ),
    Mutant("one of eight partial sums is lost", CHANNELS, "((e + f) + (g + h))", "((e + f) + g)", FUSED_LAYOUTS),
    Mutant("rows are added twice", CHANNELS, "    std::fill(rows.begin(), rows.end(), 0.f);\n", "", FUSED_LAYOUTS),
    Mutant("the last rows are lost", CHANNELS, "  ~Sums() { add_to_totals(); }\n", "", FUSED_LAYOUTS),
    Mutant(
        "a thousand rows are summed in float32",
        CHANNELS,
        "most_rows = 16;",
        "most_rows = 1 << 20;",
        By("test_fused.py", "sums_of_ten_million"),
    ),
    Mutant(
        "channels are counted from the first element of all",
        CHANNELS,
        "repeated[k].data() + (i - begin) % channels.channels",
        "repeated[k].data() + i % channels.channels",
        By("test_fused.py", "on_more_threads"),
    ),
    Mutant(
        "runs have the values of the first channel",
        CHANNELS,
        "widen(of.vectors[k][run.channel])",
        "widen(of.vectors[k][0])",
        FUSED_LAYOUTS,
    ),
    Mutant(
        "runs begin within a word of bits",
        CHANNELS,
        "whole_words ? left :",
        "channels.inner >= few ? left :",
        FUSED_LAYOUTS,
    ),
    Mutant(
        "two parts share a byte of bits", CHANNELS, "count -= count % alignment;", "count -= count % 4;", FUSED_LAYOUTS
    ),
    Mutant(
        "the shift's sums are the scale's",
        THREADS,
        "std::exchange(next, next + channels)",
        "next",
        FUSED_LAYOUTS,
    ),
    Mutant(
        "what is not wanted overwrites what is summed",
        FUSED_KERNELS,
        "grad_input ? grad_input + i : unwanted[1]",
        "grad_input ? grad_input + i : unwanted[0]",
        By("test_fused.py", "gradients_alone"),
    ),
    # Threads
    Mutant(
        "the last share is lost",
        THREADS,
        "const int64_t blocks = (numel - 1) / alignment + 1;",
        "const int64_t blocks = numel / alignment;",
        SHARES,
    ),
    Mutant("the last share is too long", THREADS, "std::min(end * alignment, numel)", "end * alignment", SHARES),
    Mutant(
        "shares overlap",
        THREADS,
        "body(begin * alignment, std::min(",
        "body(begin ? begin * alignment - 8 : 0, std::min(",
        SHARES,
    ),
    Mutant(
        "sums depend on the number of threads",
        THREADS,
        "numel / most_parts}",
        "numel / at::get_num_threads()}",
        By("test_fused.py", "any_number_of_threads"),
    ),
    Mutant(
        "the last part of a sum is lost",
        THREADS,
        "i + step < parts; i += 2 * step",
        "i + step < parts - 1; i += 2 * step",
        By("test_fused.py", "on_more_threads"),
    ),
    Mutant(
        "a thread's counts replace the others'",
        THREADS,
        "std::transform(own.begin(), own.end(), counts.begin(), counts.begin(), std::plus<>());",
        "counts = own;",
        By("test_monitor.py", "more_counts"),
    ),
    Mutant(
        "the last thread says what is finite",
        THREADS,
        "if (!cpu::is_finite(work, begin, end)) finite = false;",
        "finite = cpu::is_finite(work, begin, end);",
        By("test_monitor.py", "not_finite"),
    ),
    # Dropout
    Mutant(
        "the seed is not advanced", THREADS, "own->random64()", "own->current_seed()", By("test_dropout.py", "seed")
    ),
    Mutant(
        "the last number drops",
        RANDOM,
        "random_of(block, i) <= last",
        "random_of(block, i) < last",
        By("test_dropout.py", "seed"),
    ),
    Mutant(
        "random numbers are used twice",
        RANDOM,
        "_mm256_set_epi64x(3, 2, 1, 0) + lanes * i)",
        "_mm256_set_epi64x(3, 2, 1, 0))",
        By("test_dropout.py", "seed or independence"),
    ),
    Mutant(
        "random numbers repeat every 4096 elements",
        FUSED_KERNELS,
        "draw<isa>(dropout, i, count, drawn);",
        "draw<isa>(dropout, 0, count, drawn);",
        By("test_dropout.py", "seed or independence"),
    ),
    Mutant(
        "bits of what is not positive",
        FUSED_KERNELS,
        "bits[k] &= drawn[k];",
        "bits[k] = drawn[k];",
        By("test_dropout.py", "values"),
    ),
    Mutant("p is off by a step", DROPOUT, "uint16_t(leaving - 1)", "uint16_t(leaving)", By("test_dropout.py", "seed")),
    Mutant(
        "the factor is that of the numbers drawn",
        DROPOUT,
        "uint16_t(leaving - 1), 1 / (1 - p)}",
        "uint16_t(leaving - 1), 65536 / leaving}",
        By("test_dropout.py", "values"),
    ),
    Mutant(
        "the differentiable gradient lacks the factor",
        DROPOUT,
        "grad.mul(keeping.factor)",
        "grad",
        By("test_dropout.py", "gradcheck or modes"),
    ),
    Mutant(
        "bits of nothing are not cleared",
        DROPOUT,
        "if (with_bits) bits.zero_();",
        "if (with_bits) bits.fill_(255);",
        By("test_dropout.py", "all_is_dropped"),
    ),
    # Rows and counts
    Mutant(
        "a row that is not whole is lost",
        GATED_KERNELS,
        "row * columns < end; ++row",
        "(row + 1) * columns <= end; ++row",
        By("test_two_tensors.py", "reglu_on_more_threads"),
    ),
    Mutant(
        "bits of a ninth byte are not counted",
        COUNTS,
        "  if (bytes > 8) word |= uint64_t(bits[first / 8 + 8]) << (64 - shift);\n",
        "",
        By("test_monitor.py", "counts_of_images"),
    ),
    Mutant(
        "counters overflow",
        COUNTS,
        "UINT16_MAX * period",
        "(UINT16_MAX + 1) * period",
        By("test_monitor.py", "more_counts"),
    ),
    Mutant(
        "NaN is finite",
        NUMBERS,
        "(bit_cast<uint32_t>(value) & 0x7f800000u) != 0x7f800000u",
        "(bit_cast<uint32_t>(value) & 0x7fffffffu) != 0x7f800000u",
        By("test_monitor.py", "not_finite"),
    ),
    # The gate
    Mutant(
        "history below autograd",
        GATE,
        "effective.has_any(keys::autograd) && c10::GradMode",
        "c10::GradMode",
        By("test_modes.py", "below_autograd or inference"),
    ),
    Mutant(
        "history without grad mode",
        GATE,
        "c10::GradMode::is_enabled() && tensor.requires_grad()",
        "tensor.requires_grad()",
        By("test_modes.py", "grad or inference"),
    ),
    Mutant(
        "history of what needs no gradient",
        GATE,
        "c10::GradMode::is_enabled() && tensor.requires_grad()",
        "c10::GradMode::is_enabled()",
        By("test_autograd.py", "requires_grad_follows or keeps_nothing"),
    ),
    Mutant(
        "dual tensors take the kernels",
        GATE,
        "if (tensor._fw_grad(/*level=*/0).defined()) return Road::definition;",
        "",
        By("test_transforms.py", "test_transform"),
    ),
    Mutant(
        "other dtypes take the kernels",
        GATE,
        "  if (!dtype_of(tensor)) return Road::definition;\n",
        "",
        By("test_composability.py", "every_dtype"),
    ),
    Mutant(
        "modes that trace only watch",
        GATE,
        "is_plain(tensor.key_set() - keys::ours) || !modes_only_watch())",
        "is_plain(tensor.key_set() - keys::ours))",
        By("test_export.py", "fake or make_fx"),
    ),
    Mutant(
        "autocast is not torch's affair",
        GATE,
        "    if (operation.autocast && effective.has_any(keys::autocast)) return {Road::definition};\n",
        "",
        By("test_two_tensors.py", "autocast"),
    ),
    Mutant(
        "two dtypes are alike",
        GATE,
        "tensor->scalar_type() != first.scalar_type() ||",
        "",
        By("test_two_tensors.py", "left_to_torch or wrong_weight"),
    ),
    Mutant(
        "a gradient with history takes the kernels",
        GATE,
        "road(grad, effective) != Road::kernel || records_history(grad, effective)",
        "road(grad, effective) != Road::kernel",
        By("test_two_tensors.py", "gradcheck"),
    ),
    Mutant(
        "what was saved with history takes the kernels",
        GATE,
        " && !records_history(tensor, own);",
        ";",
        By("test_two_tensors.py", "second_derivatives_of"),
    ),
    Mutant(
        "what was saved may be of any kind",
        GATE,
        "return own - keys::ours == effective - keys::ours &&",
        "return",
        By("test_composability.py", "what_is_kept or gradient"),
    ),
    Mutant(
        "a sign to be applied is not",
        GATE,
        "DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect,",
        "DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect, DispatchKey::Negative,",
        By("test_composability.py", "sign_to_be_applied"),
    ),
    Mutant(
        "memory with gaps takes the kernels",
        AUTOGRAD,
        "taken != Road::definition && input.is_non_overlapping_and_dense() &&",
        "taken != Road::definition &&",
        By("test_layouts.py", "is_torchs"),
    ),
    Mutant(
        "scalars that torch refuses",
        AUTOGRAD,
        " &&\n         scalars_fit(bound.scalars, *dtype_of(input));",
        ";",
        By("test_scalars.py", "any_scalar"),
    ),
    Mutant(
        "modes see operators without a gradient",
        AUTOGRAD,
        "  if (taken == Road::operators && !history) return std::nullopt;\n",
        "",
        By("test_modes.py", "dispatch_mode_sees"),
    ),
    # The graph
    Mutant(
        "bits of another kind take the kernel",
        AUTOGRAD,
        "taken == Road::definition || effective_keys(bits) - keys::ours != keys - keys::ours",
        "taken == Road::definition",
        By("test_composability.py", "what_is_kept or gradient"),
    ),
    Mutant(
        "the gradient has no history",
        AUTOGRAD,
        "const bool history = records_history(grad, keys);",
        "const bool history = false;",
        By("test_autograd.py", "gradgradcheck"),
    ),
    Mutant(
        "what was kept may have any shape",
        AUTOGRAD,
        "  launch::check_kept(grad, value);\n",
        "",
        By("test_faults.py", "hooks_that_unpack and relu_squared"),
    ),
    Mutant(
        "what was kept may have any layout",
        AUTOGRAD,
        "grad.scalar_type() != value.scalar_type() ||\n      !value.is_non_overlapping_and_dense())",
        "grad.scalar_type() != value.scalar_type())",
        By("test_faults.py", "hooks_that_unpack and (elu or selu)"),
    ),
    Mutant(
        "what was kept may have any dtype",
        AUTOGRAD,
        "grad.scalar_type() != value.scalar_type() ||\n",
        "\n",
        By("test_faults.py", "hooks_that_unpack and (elu or selu)"),
    ),
    Mutant(
        "elu in place has a gradient for a negative alpha",
        AUTOGRAD,
        "|| is_torchs ||",
        "||",
        By("test_scalars.py", "elu_in_place"),
    ),
    Mutant(
        "an output holds itself",
        AUTOGRAD,
        "kept == Kept::input ? input : output, kept == Kept::output};",
        "kept == Kept::input ? input : output, false};",
        By("test_graph.py", "graph_is_freed"),
    ),
    Mutant(
        "a half's square is kept",
        AUTOGRAD,
        "kept_by(*bound.operation, *dtype_of(input), /*inplace=*/false)",
        "bound.operation->kept",
        By("test_values.py", "relu_squared and float16 and lane"),
    ),
    Mutant(
        "in place on a leaf",
        AUTOGRAD,
        "  check_inplace(input, history);\n",
        "",
        By("test_autograd.py", "in_place_raises"),
    ),
    Mutant(
        "the version does not change without a gradient",
        AUTOGRAD,
        "      launch::forward_(bound, input);\n      return bump_version();",
        "      launch::forward_(bound, input);\n      return;",
        By("test_modes.py", "normal_tensor_in_inference_mode or versions"),
    ),
    Mutant(
        "the version does not change with a gradient",
        AUTOGRAD,
        "      bump_version();\n      return bits;",
        "      return bits;",
        By("test_autograd.py", "in_place or needs_the_old_value"),
    ),
    Mutant(
        "an operator drops the tangent",
        AUTOGRAD,
        "  check_no_forward_grad(bound, input);\n",
        "",
        By("test_operators.py", "no_forward_mode"),
    ),
    Mutant(
        "every gradient is computed",
        NODE,
        "needs[i] = task_should_compute_output(i);",
        "needs[i] = true;",
        By("test_fused.py", "gradients_alone"),
    ),
    Mutant(
        "a gradient that does not arrive is read",
        NODE,
        "  if (!grads[0].defined()) return variable_list(num_outputs());\n",
        "",
        By("test_autograd.py", "does_not_arrive"),
    ),
    Mutant(
        "backward frees nothing",
        NODE,
        "  for (auto& saved : saved_) saved.variable.reset_data();\n",
        "",
        By("test_autograd.py", "freed_by_backward"),
    ),
    Mutant(
        "bits of a transposed output",
        NODE,
        "  if (!own || !c10::SymIntArrayRef(output.sym_strides()).equals(own->stride())) return {};\n",
        "  if (!own) return {};\n",
        By("test_monitor.py", "exchanged"),
    ),
    Mutant(
        "compiled autograd takes one scalar for another",
        NODE,
        "  for (const double scalar : keeping_.bound.scalars) args.collect(scalar);\n",
        "",
        By("test_compile.py", "another_scalar"),
    ),
    Mutant(
        "compiled autograd takes one dimension for another",
        NODE,
        "  args.collect(keeping_.dim);\n",
        "",
        By("test_fused.py", "another_dimension"),
    ),
    Mutant(
        "compiled autograd takes one p for another",
        NODE,
        "  args.collect(keeping_.factor);\n",
        "",
        By("test_dropout.py", "another_p"),
    ),
    # Layouts
    Mutant(
        "a gradient of another layout is not copied",
        LAUNCH,
        "  if (!same_layout(grad.sizes(), grad.strides(), stride)) {",
        "  if (false) {",
        By("test_layouts.py", "gradient"),
    ),
    Mutant(
        "the gradient has its own strides",
        LAUNCH,
        "empty_strided(grad.sizes(), stride, grad.scalar_type());\n  const Tensor* source",
        "empty_strided(grad.sizes(), grad.strides(), grad.scalar_type());\n  const Tensor* source",
        By("test_layouts.py", "gradient"),
    ),
    Mutant(
        "strides that overlap",
        LAUNCH,
        "    if (stride[d] != expected) return false;\n",
        "",
        By("test_operators.py", "wrong_strides"),
    ),
    Mutant(
        "bits with gaps",
        LAUNCH,
        "bits.is_contiguous() && bits.device()",
        "bits.device()",
        By("test_operators.py", "wrong_bits"),
    ),
    Mutant(
        "vectors with gaps",
        FUSED,
        "vector->dim() != 1 || !vector->is_contiguous() ||",
        "vector->dim() != 1 ||",
        By("test_fused.py", "left_to_torch"),
    ),
    Mutant(
        "a residual of another layout",
        FUSED,
        "launch::same_layout(input.sizes(), input.strides(), residual.strides()));",
        "true);",
        By("test_fused.py", "left_to_torch"),
    ),
    Mutant(
        "the input is kept for a scale that needs no gradient",
        FUSED,
        "if (records_history(scale, effective_keys(scale))) saved",
        "saved",
        By("test_fused.py", "gradients_alone"),
    ),
    Mutant(
        "the scale's history is the shift's",
        FUSED,
        "{&input, &inputs.scale, &inputs.shift, &inputs.residual}, saved",
        "{&input, &inputs.shift, &inputs.scale, &inputs.residual}, saved",
        By("test_fused.py", "gradients_alone or modules or (gradcheck and scale)"),
    ),
    Mutant(
        "a slope for every other place",
        PRELU,
        "|| !weight.is_contiguous() ||",
        "||",
        By("test_two_tensors.py", "prelu_weight_with_gaps"),
    ),
    Mutant(
        "the slope's gradient is as wide as the input",
        PRELU,
        "products.sum_to_size_symint(slopes.sym_sizes()).reshape_symint(weight.sym_sizes())",
        "products.sum_to_size_symint(slopes.sym_sizes())",
        By("test_two_tensors.py", "gradcheck"),
    ),
    Mutant(
        "prelu does not see that its input has changed",
        PRELU,
        "{{with_bits ? bits : input}, {weight}}",
        "{{with_bits ? bits : input.variable_data()}, {weight}}",
        By("test_two_tensors.py", "noticed"),
    ),
    Mutant(
        "linear_relu does not see that its weight has changed",
        LINEAR,
        "/*is_output=*/true}, {weight}, {input}}",
        "/*is_output=*/true}, {weight.variable_data()}, {input}}",
        By("test_fused.py", "noticed"),
    ),
    Mutant(
        "linear_relu's output holds itself",
        LINEAR,
        "{{output, /*is_output=*/true}, {weight}",
        "{{output, /*is_output=*/false}, {weight}",
        By("test_fused.py", "graph_is_freed"),
    ),
    Mutant(
        "the bias's gradient is not masked",
        LINEAR,
        "gradients[2] = bias.defined() ? bias : rows_of(inner).sum(0);",
        "gradients[2] = rows_of(grad).sum(0);",
        By("test_fused.py", "test_linear_relu"),
    ),
    Mutant(
        "what prelu has kept may have any layout",
        PRELU,
        "else if (!launch::lies_as_kept(grad, kept, stride))",
        "else if (false)",
        By("test_faults.py", "hooks_that_unpack and prelu"),
    ),
    Mutant(
        "what a fused operation has kept may have any layout",
        FUSED,
        "return !kept.input.defined() || launch::lies_as_kept(",
        "return true || launch::lies_as_kept(",
        By("test_faults.py", "hooks_that_unpack and scale_shift"),
    ),
    Mutant(
        "what linear_relu has kept may have any size",
        LINEAR,
        "  launch::check_kept(grad, output);\n",
        "",
        By("test_faults.py", "hooks_that_unpack and linear"),
    ),
    Mutant(
        "dropout's bits are not looked at",
        DROPOUT,
        "  launch::check_backward(grad, bits, keeping.stride);\n",
        "",
        By("test_faults.py", "hooks_that_unpack and dropout"),
    ),
    Mutant(
        "rows that are expanded",
        REGLU,
        "strides[d] == 0 || (expected",
        "(expected",
        By("test_two_tensors.py", "reglu_left_to_torch"),
    ),
    Mutant(
        "rows of two strides",
        REGLU,
        "strides[d] == 0 || (expected && strides[d] != expected)",
        "strides[d] == 0",
        By("test_two_tensors.py", "reglu_left_to_torch"),
    ),
    Mutant(
        "up is kept for a gate that needs no gradient",
        REGLU,
        "if (records_history(gate, effective_keys(gate))) saved",
        "saved",
        By("test_two_tensors.py", "one_gradient"),
    ),
    Mutant(
        "what reglu has kept may have any layout",
        REGLU,
        "kept.scalar_type() == grad.scalar_type() && fit(gate, kept);",
        "kept.scalar_type() == grad.scalar_type();",
        By("test_faults.py", "hooks_that_unpack and reglu"),
    ),
    # Operators
    Mutant(
        "a byte too many without data",
        OPERATORS,
        "(tensor.sym_numel() + 7) / 8",
        "tensor.sym_numel() / 8 + 1",
        By("test_operators.py", "without_data"),
    ),
    Mutant(
        "dropout's operator draws nothing",
        OPERATORS,
        "{at::Tag::nondeterministic_seeded}",
        "{}",
        By("test_dropout.py", "test_operator"),
    ),
    Mutant(
        "it stays installed",
        INSTALL,
        "{ libraries().clear(); }",
        "{}",
        By("test_install.py", "context or twice"),
    ),
    Mutant(
        "it is installed twice",
        INSTALL,
        "  if (is_installed()) return;\n",
        "",
        By("test_install.py", "twice"),
    ),
    Mutant(
        "every elu is elu",
        INSTALL,
        "if (means(operation)) return",
        "return",
        By("test_install.py", "elu"),
    ),
    Mutant(
        "another library's kernel is hidden",
        INSTALL,
        "TORCH_CHECK(!handle.hasKernelForDispatchKey(key),",
        "TORCH_CHECK(true,",
        By("test_install.py", "another_library"),
    ),
    Mutant(
        "torch's kernel is not found beneath",
        INSTALL,
        "(keys & c10::after_autograd_keyset).add(DispatchKey::AutogradOther)",
        "(keys & c10::after_autograd_keyset)",
        By("test_install.py", "layouts or dtypes"),
    ),
    Mutant(
        "integers that are no doubles, in C++",
        INSTALL,
        "value > exact_in_double || value < -exact_in_double",
        "false",
        By("test_install.py", "scalars"),
    ),
    Mutant(
        "modes see the monitor",
        MONITOR,
        "  const BelowModes guard;\n  const auto [output, bits]",
        "  const auto [output, bits]",
        By("test_monitor.py", "asks_pytorch"),
    ),
    Mutant(
        "a repeated forward is counted",
        MONITOR,
        "return torch::autograd::get_current_graph_task_id() != -1;",
        "return false;",
        By("test_monitor.py", "checkpoint"),
    ),
    Mutant(
        "any number of bits is counted",
        MONITOR,
        "!bits.defined() || bits.numel() != bytes_of_bits(output.numel())",
        "!bits.defined()",
        By("test_monitor.py", "exchanged"),
    ),
    # Python's references, lock and arguments
    Mutant(
        "a reference is leaked in place",
        PYTHON,
        "Py_NewRef(args[0])",
        "Py_NewRef(Py_NewRef(args[0]))",
        By("test_autograd.py", "references"),
    ),
    Mutant("a reference is lost", PYTHON, "Py_NewRef(args[0])", "args[0]", By("test_autograd.py", "references")),
    Mutant(
        "outputs are leaked",
        PYTHON,
        """THPVariable_Unpack(args[1]));
  });
  return output ? THPVariable_Wrap(std::move(*output)) : nullptr;""",
        """THPVariable_Unpack(args[1]));
  });
  return output ? Py_NewRef(THPVariable_Wrap(std::move(*output))) : nullptr;""",
        By("test_graph.py", "freed"),
    ),
    Mutant(
        "fused outputs are leaked",
        PYTHON,
        """apply_fused(*bound, inputs); });
  return output ? THPVariable_Wrap(std::move(*output)) : nullptr;""",
        """apply_fused(*bound, inputs); });
  return output ? Py_NewRef(THPVariable_Wrap(std::move(*output))) : nullptr;""",
        By("test_fused.py", "graph_is_freed"),
    ),
    Mutant(
        "NotImplemented loses a reference",
        PYTHON,
        "  if (output) return output;\n  Py_RETURN_NOTIMPLEMENTED;",
        "  if (output) return output;\n  return Py_NotImplemented;",
        By("test_autograd.py", "references"),
    ),
    Mutant(
        "the interpreter lock is held",
        PYTHON,
        "input.numel() > short_work || !input.is_cpu()",
        "false",
        By("test_threads.py", "interpreter_lock"),
    ),
    Mutant(
        "function modes are not asked",
        PYTHON,
        "  if (!at::impl::torch_function_mode_enabled()) return true;\n",
        "  return true;\n",
        By("test_modes.py", "function_mode"),
    ),
    Mutant(
        "a default device switches the kernels off",
        PYTHON,
        "if (!is_device_context(Modes",
        "if (true || !is_device_context(Modes",
        By("test_modes.py", "default_device"),
    ),
    Mutant(
        "subclasses take the kernels",
        PYTHON,
        "    if (!THPVariable_CheckExact(args[i])) return nullptr;\n",
        "    if (!THPVariable_Check(args[i])) return nullptr;\n",
        By("test_composability.py", "subclass"),
    ),
    Mutant(
        "integers that are no doubles",
        PYTHON,
        "overflow || value > exact_in_double || value < -exact_in_double",
        "overflow",
        By("test_scalars.py", "any_scalar"),
    ),
    Mutant(
        "dimensions are not counted from the end",
        PYTHON,
        " + (*given < 0 ? tensors[0]->dim() : 0);",
        ";",
        FUSED_LAYOUTS,
    ),
    # Models
    Mutant(
        "a forward of its own is converted",
        "relu_ext/convert.py",
        'if exact and "forward" in vars(module):',
        "if False:",
        By("test_convert.py", "left_alone"),
    ),
    Mutant(
        "copies share what is remembered",
        "relu_ext/convert.py",
        "vars(module)[_BEFORE] = {**before, attribute: now}",
        "vars(module).setdefault(_BEFORE, {})[attribute] = now",
        By("test_convert.py", "shallow or copies"),
    ),
    Mutant(
        "a class that was changed since is forgotten",
        "relu_ext/convert.py",
        '        elif attribute == "__class__":\n            vars(module)[_BEFORE] = {attribute: before}\n',
        "",
        By("test_convert.py", "since"),
    ),
    Mutant(
        "what is used elsewhere is fused",
        "relu_ext/fuse.py",
        'return f"{self.names(node)} is used elsewhere, too" if len(node.users) > 1 else None',
        "return None",
        By("test_fuse.py", "left_alone or pattern"),
    ),
    Mutant(
        "everything is private",
        "relu_ext/fuse.py",
        "return len(node.users) == 1 and _is_fresh(self.module, node, self.traces)",
        "return True",
        By("test_fuse.py", "in_place or left_alone"),
    ),
    Mutant(
        "a norm that is called twice is moved",
        "relu_ext/fuse.py",
        "if is_last and site.calls(norm) == 1 and",
        "if is_last and",
        By("test_fuse.py", "called_twice"),
    ),
    Mutant(
        "another formula is a batch normalisation",
        "relu_ext/fuse.py",
        "return eps if torch.allclose(probe(input), expected, rtol=1e-9, atol=1e-9) else None",
        "return eps",
        By("test_fuse.py", "frozen or left_alone"),
    ),
    Mutant(
        "other outputs stay",
        "relu_ext/fuse.py",
        "            wrong.add(module)\n",
        "            pass\n",
        By("test_fuse.py", "example_inputs"),
    ),
    Mutant(
        "verifying leaves the model in eval mode",
        "relu_ext/fuse.py",
        "            module.training = training\n",
        "            pass\n",
        By("test_fuse.py", "example_inputs"),
    ),
    Mutant(
        "backward hooks are left out",
        "relu_ext/neighbours.py",
        "        and not (module._backward_pre_hooks or module._backward_hooks)\n",
        "",
        By("test_fuse.py", "hooks"),
    ),
    Mutant(
        "a batch normalisation that trains is fixed",
        "relu_ext/neighbours.py",
        "return is_wide and not norm.training and",
        "return is_wide and",
        By("test_fuse.py", "batch_norm or training"),
    ),
    Mutant(
        "two dtypes are added",
        "relu_ext/neighbours.py",
        "return input.dtype == residual.dtype and input.shape == residual.shape",
        "return input.shape == residual.shape",
        By("test_fuse.py", "sums_of_unequal"),
    ),
    Mutant(
        "eps is that of the day it was fused",
        "relu_ext/neighbours.py",
        'norm.__dict__.get("eps", eps)',
        "eps",
        By("test_fuse.py", "changed or each_call or batch_norm"),
    ),
    Mutant(
        "the shift is rounded twice",
        "relu_ext/neighbours.py",
        "torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)",
        "norm.bias - norm.running_mean * scale",
        By("test_fuse.py", "torchs_outputs"),
    ),
    Mutant(
        "sequences have their channels second",
        "relu_ext/monitor.py",
        "dim = 2 if output.dim() == 3 else",
        "dim =",
        By("test_monitor.py", "sequences"),
    ),
    Mutant(
        "dead a step too late",
        "relu_ext/monitor.py",
        "(last <= since)",
        "(last < since)",
        By("test_monitor.py", "dead_in_the_last"),
    ),
    Mutant(
        "the window before is forgotten",
        "relu_ext/monitor.py",
        "_C.cells(self.kept, len(self.kept)), self.kept",
        "_C.cells(self.kept, len(self.kept)), self.earlier",
        By("test_monitor.py", "fractions"),
    ),
    Mutant(
        "an input that is overwritten tells what fired",
        "relu_ext/monitor.py",
        ' or getattr(module, "inplace", False):',
        ":",
        By("test_monitor.py", "cannot_be_counted or every_activation"),
    ),
    # What nothing above would see
    Mutant(
        "nobody looks whether there is memory",
        LAUNCH,
        "!overflows && needed <= bytes",
        "true",
        By("test_faults.py", "inputs_without_memory"),
    ),
    Mutant(
        "the last element may lack memory",
        LAUNCH,
        "size_t(last) + 1",
        "size_t(last)",
        By("test_faults.py", "inputs_without_memory"),
    ),
    Mutant(
        "a node takes a gradient of any shape",
        NODE,
        "TORCH_CHECK(input_metadata(0).is_same_shape(grads[0]),",
        "TORCH_CHECK(true,",
        By("test_faults.py", "grad_of_another_shape or a_longer_grad"),
    ),
    Mutant(
        "channels are repeated where there are none",
        CHANNELS,
        "channels.inner != 1 || begin == end",
        "channels.inner != 1",
        By("test_two_tensors.py", "test_prelu and channels"),
    ),
    Mutant(
        "a backward pass is waited for",
        NODE,
        "lock(mutex_, std::try_to_lock)",
        "lock(mutex_)",
        By("test_threads.py", "bits_are_asked_for"),
    ),
    Mutant(
        "two threads add up at once",
        "relu_ext/monitor.py",
        "            with _adding_up:\n                self._add_up(",
        "            if True:\n                self._add_up(",
        By("test_threads.py", "a_monitor_counts"),
    ),
    Mutant(
        "names of children run as code",
        "relu_ext/rewriting.py",
        "            _check_names(node)\n",
        "",
        By("test_fuse.py", "test_names"),
    ),
    Mutant(
        "all symbols are exported",
        "csrc/exported.map",
        "local: *;",
        "",
        By("test_packaging.py", "test_symbols"),
    ),
    Mutant(
        "selu's scale has seven digits",
        "csrc/operations.h",
        "selu_scale = 1.0507009873554804934193349852946;",
        "selu_scale = 1.050701;",
        By("test_torchs_cases.py", "SELU or selu"),
    ),
    Mutant(
        "relu6 ends at 5",
        "csrc/operations.h",
        "Activation::hardtanh, 0, {0, 6}}",
        "Activation::hardtanh, 0, {0, 5}}",
        By("test_properties.py", "test_elementwise or test_in_place"),
    ),
    Mutant(
        "elements of a row are apart",
        REGLU,
        "if (columns > 1 && strides.back() != 1) return std::nullopt;",
        "",
        By("test_properties.py", "test_reglu"),
    ),
]


# What an edit is planted in


def update_base() -> None:
    """BASE, of the project as it is now; only what has changed since the last time is compiled."""
    shutil.rmtree(TREE, ignore_errors=True)
    if BASE.exists():
        shutil.copytree(BASE, TREE)
    for part in PARTS:
        copy(ROOT / part, TREE / part)
    FASTER.plant(TREE)
    build(TREE)
    shutil.rmtree(BASE, ignore_errors=True)
    shutil.copytree(TREE, BASE)


def copy(part: Path, to: Path) -> None:
    if part.is_file():
        shutil.copy2(part, to)
        return
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(part, to, ignore=shutil.ignore_patterns("*.so", "_build.py", "__pycache__"))


@contextmanager
def copied() -> Iterator[Path]:
    shutil.rmtree(TREE)
    yield Path(shutil.copytree(BASE, TREE))


def check_without_bugs(mutants: Iterable[Mutant]) -> None:
    """All that is to fail passes in BASE: what fails is the bug's doing."""
    words = defaultdict(set)
    for mutant in mutants:
        words[mutant.caught.file].add(mutant.caught.words)
    with copied() as tree:
        for file, some in words.items():
            if failed := mutation.failure(run_tests(tree, file, " or ".join(f"({one})" for one in some), None)):
                raise SystemExit(f"without a bug {file} fails: {failed}")


def main(pattern: str = "") -> int:
    if pattern == "--fit":
        return mutation.fit(MUTANTS, ROOT)
    mutants = mutation.matching(MUTANTS, pattern)
    update_base()
    check_without_bugs(mutants)
    return mutation.run(mutants, copied)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
