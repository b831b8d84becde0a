// The table of operations: one row each. Python entries, registered operators and autograd nodes are made from it.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "kernels.h"

namespace relu_ext {

// Integers up to this are doubles.
constexpr int64_t exact_in_double = int64_t(1) << 53;

// What an operation is given: a tensor; one and a vector of a value for each of its channels; two alike; one and what
// `beside` says; one, of which it drops elements; an input, a weight and a bias or none.
enum class Form : uint8_t { elementwise, channels, gated, fused, dropout, linear };

// The tensors beside the input of a fused operation, in this order: vectors of a value for each channel, and one like
// the input, which where there is a scale may be None. And whether input * scale + shift is one multiply-add.
struct Beside {
  bool scale, shift, residual, multiply_add = false;
};

// They set scalars that follow from the arguments. False: these are ATen's affair.
namespace complete {
inline bool in_order(Scalars& scalars) { return scalars[0] <= scalars[1]; }
// celu(alpha) is elu(alpha, 1, 1 / alpha).
inline bool inverse(Scalars& scalars) {
  scalars[2] = 1 / scalars[0];
  return scalars[0] > 0 && std::isfinite(scalars[2]);
}
}  // namespace complete

struct Operation {
  const char* name;  // of the Python entry, the operators and what the profiler shows
  const char* node;  // of the autograd node: what a tensor's grad_fn shows
  Kept kept;         // out of place; kept_by has the exceptions
  bool in_place;     // whether there is such a form
  Activation activation;
  int arguments = 0;     // how many scalars a caller gives; the first of `scalars` are those
  Scalars scalars = {};  // what the others are
  bool (*complete)(Scalars&) = nullptr;
  Form form = Form::elementwise;
  bool autocast = false;  // whether ATen has an autocast rule for it; then an active autocast is ATen's affair
  Beside beside = {};

  // Whether there are registered operators for its forward with bits and its backward.
  constexpr bool has_operators() const { return kept == Kept::bits && form == Form::elementwise; }
};

constexpr Operation fused(const char* name, const char* node, Activation activation, Beside beside, int arguments = 0,
                          Scalars scalars = {}) {
  return {name, node, Kept::bits, false, activation, arguments, scalars, nullptr, Form::fused, false, beside};
}

inline constexpr double selu_alpha = 1.6732632423543772848170429916717;  // arXiv:1706.02515, as ATen has them
inline constexpr double selu_scale = 1.0507009873554804934193349852946;

inline constexpr std::array operations{
    Operation{"relu", "ReLUBackward", Kept::bits, true, Activation::relu},
    Operation{"relu6", "ReLU6Backward", Kept::bits, true, Activation::hardtanh, 0, {0, 6}},
    Operation{"hardtanh", "HardtanhBackward", Kept::bits, true, Activation::hardtanh, 2, {}, complete::in_order},
    Operation{"threshold", "ThresholdBackward", Kept::bits, true, Activation::threshold, 2},
    Operation{"leaky_relu", "LeakyReLUBackward", Kept::bits, true, Activation::leaky_relu, 1},
    Operation{"elu", "ELUBackward", Kept::input, true, Activation::elu, 1, {0, 1, 1}},
    Operation{"celu", "CELUBackward", Kept::input, true, Activation::elu, 1, {0, 1, 0}, complete::inverse},
    Operation{"selu", "SELUBackward", Kept::input, true, Activation::elu, 0, {selu_alpha, selu_scale, 1}},
    Operation{"relu_squared", "ReLUSquaredBackward", Kept::output, false, Activation::relu_squared},
    Operation{
        "prelu", "PReLUBackward", Kept::input, false, Activation::leaky_relu, 0, {}, nullptr, Form::channels, true},
    Operation{"reglu", "ReGLUBackward", Kept::input, false, Activation::relu, 0, {}, nullptr, Form::gated},
    fused("add_relu", "AddReLUBackward", Activation::relu, {false, false, true}),
    fused("bias_relu", "BiasReLUBackward", Activation::relu, {false, true, false}),
    fused("scale_shift_relu", "ScaleShiftReLUBackward", Activation::relu, {true, true, true}),
    fused("fma_relu", "FMAReLUBackward", Activation::relu, {true, true, true, true}),
    Operation{
        "relu_dropout", "ReLUDropoutBackward", Kept::bits, false, Activation::relu, 0, {}, nullptr, Form::dropout},
    Operation{
        "linear_relu", "LinearReLUBackward", Kept::output, false, Activation::relu, 0, {}, nullptr, Form::linear, true},
};

// In place the input is gone; in float16 the squares of numbers below 2^-12 have lost digits.
inline Kept kept_by(const Operation& operation, Dtype dtype, bool inplace) {
  if (operation.kept == Kept::bits) return Kept::bits;
  if (inplace) return Kept::output;
  return dtype == Dtype::float16 ? Kept::input : operation.kept;
}

inline constexpr const Operation* operation_of(Activation activation, Form form) {
  for (const Operation& operation : operations)
    if (operation.activation == activation && operation.form == form) return &operation;
  return nullptr;
}

// An operation with the scalars of one call.
struct Bound {
  const Operation* operation;
  Scalars scalars;
};

// With as many scalars as the operation has arguments; nullopt for those that are ATen's, with its errors: NaN, with
// which no kernel compares, among them.
inline std::optional<Bound> bind(const Operation& operation, const double* given) {
  Bound bound{&operation, operation.scalars};
  std::copy_n(given, operation.arguments, bound.scalars.begin());
  if (std::any_of(given, given + operation.arguments, [](double scalar) { return std::isnan(scalar); }))
    return std::nullopt;
  if (operation.complete && !operation.complete(bound.scalars)) return std::nullopt;
  return bound;
}

// ATen refuses scalars that become infinite in the type that it computes in, or in that of the elements.
inline bool scalars_fit(const Scalars& scalars, Dtype dtype) {
  const double limit = dtype == Dtype::float64   ? std::numeric_limits<double>::max()
                       : dtype == Dtype::float16 ? 65504
                                                 : 0x1.fep127;  // bfloat16's
  return std::all_of(scalars.begin(), scalars.end(),
                     [=](double scalar) { return std::isinf(scalar) || std::abs(scalar) <= limit; });
}

}  // namespace relu_ext
