// The table of operations: one row each. Python entries, registered operators and autograd nodes are made from it.
#pragma once
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "kernels.h"

namespace relu_ext {

struct Operation {
  Activation activation;
  Kept kept;                   // out of place; kept_by has the exceptions
  bool in_place;               // whether there is such a form
  int arguments;               // how many scalars a caller gives; the first of `scalars` stand for them
  Scalars scalars;             // what the others are
  bool (*complete)(Scalars&);  // sets scalars that follow from the arguments; false: ATen must see them
  const char* name;            // of the Python entry, the operators and what the profiler shows
  const char* node;            // of the autograd node: what a tensor's grad_fn shows
};

namespace complete {
inline bool nothing(Scalars&) { return true; }
inline bool in_order(Scalars& scalars) { return scalars[0] <= scalars[1]; }
// celu(alpha) is elu(alpha, 1, 1 / alpha).
inline bool inverse(Scalars& scalars) {
  scalars[2] = 1 / scalars[0];
  return scalars[0] > 0 && std::isfinite(scalars[2]);
}
}  // namespace complete

inline constexpr double selu_alpha = 1.6732632423543772848170429916717;  // arXiv:1706.02515, as ATen has them
inline constexpr double selu_scale = 1.0507009873554804934193349852946;

inline constexpr std::array operations{
    Operation{Activation::relu, Kept::bits, true, 0, {}, complete::nothing, "relu", "ReLUBackward"},
    Operation{Activation::hardtanh, Kept::bits, true, 0, {0, 6}, complete::nothing, "relu6", "ReLU6Backward"},
    Operation{Activation::hardtanh, Kept::bits, true, 2, {}, complete::in_order, "hardtanh", "HardtanhBackward"},
    Operation{Activation::threshold, Kept::bits, true, 2, {}, complete::nothing, "threshold", "ThresholdBackward"},
    Operation{Activation::leaky_relu, Kept::bits, true, 1, {}, complete::nothing, "leaky_relu", "LeakyReLUBackward"},
    Operation{Activation::elu, Kept::input, true, 1, {0, 1, 1}, complete::nothing, "elu", "ELUBackward"},
    Operation{Activation::elu, Kept::input, true, 1, {0, 1, 0}, complete::inverse, "celu", "CELUBackward"},
    Operation{
        Activation::elu, Kept::input, true, 0, {selu_alpha, selu_scale, 1}, complete::nothing, "selu", "SELUBackward"},
    Operation{
        Activation::relu_squared, Kept::output, false, 0, {}, complete::nothing, "relu_squared", "ReLUSquaredBackward"},
};

// In place the input is gone; in float16 the squares of numbers below 2^-12 have lost digits.
inline Kept kept_by(const Operation& operation, Dtype dtype, bool inplace) {
  if (operation.kept == Kept::bits) return Kept::bits;
  if (inplace) return Kept::output;
  return dtype == Dtype::float16 ? Kept::input : operation.kept;
}

// An operation with the scalars of one call.
struct Bound {
  const Operation* operation;
  Scalars scalars;
};

// With as many scalars as the operation has arguments; nullopt for those that are ATen's, with its errors.
inline std::optional<Bound> bind(const Operation& operation, const double* given) {
  Bound bound{&operation, operation.scalars};
  std::copy_n(given, operation.arguments, bound.scalars.begin());
  return operation.complete(bound.scalars) ? std::optional(bound) : std::nullopt;
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
