// Every CPU kernel by its name, on memory that the caller has.
#pragma once
#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace relu_ext {

// Elements of one dtype in all, but for bits; null: not wanted. scale, shift and counts have one for each channel,
// totals two.
struct Arrays {
  const void *input, *other, *grad, *scale, *shift;
  void *output, *grad_input, *grad_other;
  uint8_t* bits;
  double* totals;
  int64_t* counts;
};

enum class Step { forward, forward_with_bits, backward };

namespace works {

// Of one tensor.
struct Elementwise {
  const char* name;
  Activation activation;
  Scalars scalars;
  Kept kept;
};
constexpr Elementwise elementwise[] = {
    {"relu", Activation::relu, {}, Kept::bits},
    {"relu6", Activation::hardtanh, {0, 6}, Kept::bits},
    {"hardtanh", Activation::hardtanh, {-1, 6}, Kept::bits},
    {"threshold", Activation::threshold, {0.1, -3}, Kept::bits},
    {"leaky_relu", Activation::leaky_relu, {0.01}, Kept::bits},
    {"elu", Activation::elu, {1.5, 1, 1}, Kept::input},
    {"elu_", Activation::elu, {1.5, 1, 1}, Kept::output},
    {"celu", Activation::elu, {1.5, 1, 2 / 3.}, Kept::input},
    {"relu_squared", Activation::relu_squared, {}, Kept::output},
    {"relu_squared_of_input", Activation::relu_squared, {}, Kept::input},
};
struct Parts {
  const char* name;
  bool scale, shift, residual, dropout, multiply_add;
  Kept kept = Kept::bits;
};
constexpr Parts fused[] = {
    {"add_relu", false, false, true, false, false},
    {"bias_relu", false, true, false, false, false},
    {"scale_shift_relu", true, true, false, false, false},
    {"scale_shift_add_relu", true, true, true, false, false},
    {"fma_relu", true, true, false, false, true},
    {"relu_dropout", false, false, false, true, false},
    {"linear_relu", false, true, false, false, false, Kept::output},
};

inline void run(const Elementwise& own, Step step, Dtype dtype, int64_t numel, const Arrays& a) {
  if (step != Step::backward)
    return cpu::forward(
        {own.activation, own.scalars, dtype, a.input, a.output, step == Step::forward ? nullptr : a.bits}, 0, numel);
  const void* const kept = own.kept == Kept::bits ? a.bits : own.kept == Kept::input ? a.input : a.output;
  cpu::backward({own.activation, own.scalars, dtype, own.kept, a.grad, kept, a.grad_input}, 0, numel);
}

inline void run(const Parts& own, Step step, Dtype dtype, int64_t numel, Channels channels, const Arrays& a) {
  const double factor = own.dropout ? 1 / 0.9 : 0;
  const void* const scale = own.scale ? a.scale : nullptr;
  if (step != Step::backward)
    return cpu::fused({Activation::relu,
                       {},
                       dtype,
                       channels,
                       a.input,
                       scale,
                       own.shift ? a.shift : nullptr,
                       own.residual ? a.other : nullptr,
                       own.multiply_add,
                       {{42, 7, nullptr, nullptr}, 58981, factor},
                       a.output,
                       step == Step::forward ? nullptr : a.bits},
                      0, numel);
  FusedBackward back{};
  back.dtype = dtype, back.channels = channels, back.kept_as = own.kept, back.grad = a.grad;
  back.kept = own.kept == Kept::bits ? static_cast<const void*>(a.bits) : a.output;
  back.input = a.input, back.scale = scale, back.factor = factor, back.grad_input = a.grad_input;
  if (own.scale) back.grad_residual = a.grad_other, back.grad_scale = a.totals;
  if (own.shift) back.grad_shift = a.totals;
  cpu::fused_backward(back, a.totals, 0, numel);
}

// With these gradients.
inline void reglu(bool of_gate, bool of_up, Step step, Dtype dtype, int64_t numel, const Arrays& a) {
  const int64_t columns = std::max<int64_t>(numel, 1);
  if (step != Step::backward)
    return cpu::gated({dtype, columns, {a.input, numel}, {a.other, numel}, {a.output, numel}}, 0, numel);
  cpu::gated_backward({dtype,
                       columns,
                       {a.grad, numel},
                       {a.input, numel},
                       {of_gate ? a.other : nullptr, numel},
                       {of_gate ? a.grad_input : nullptr, numel},
                       {of_up ? a.grad_other : nullptr, numel}},
                      0, numel);
}

// With the weight's gradient, from the input, or without it, from the bits.
inline void prelu(bool of_weight, Step step, Dtype dtype, int64_t numel, Channels channels, const Arrays& a) {
  if (step != Step::backward)
    return cpu::prelu({dtype, channels, a.input, a.scale, a.output, step == Step::forward ? nullptr : a.bits}, 0,
                      numel);
  double* const totals = of_weight ? a.totals : nullptr;
  cpu::prelu_backward({dtype, channels, a.grad, of_weight ? a.input : nullptr, of_weight ? nullptr : a.bits, a.scale,
                       a.grad_input, totals},
                      totals, 0, numel);
}

// A Monitor's, of the bits that relu makes.
inline void count(Step step, Dtype dtype, int64_t numel, Channels channels, const Arrays& a) {
  if (step != Step::backward) return run(elementwise[0], step, dtype, numel, a);
  cpu::count({channels, a.bits, 1, nullptr, nullptr}, a.counts, 0, numel);
  a.counts[0] += cpu::is_finite({dtype, a.input, 1, nullptr}, 0, numel);
}

}  // namespace works

// body(name, run), where run(step, dtype, numel, channels, arrays), for each kernel.
template <class Body>
void for_works(Body body) {
  for (const auto& own : works::elementwise)
    body(own.name, [&](Step step, Dtype dtype, int64_t numel, Channels, const Arrays& a) {
      works::run(own, step, dtype, numel, a);
    });
  for (const auto& own : works::fused) body(own.name, [&](auto... arguments) { works::run(own, arguments...); });
  const auto reglu = [](bool of_gate, bool of_up) {
    return [=](Step step, Dtype dtype, int64_t numel, Channels, const Arrays& a) {
      works::reglu(of_gate, of_up, step, dtype, numel, a);
    };
  };
  body("reglu", reglu(true, true));
  body("reglu_gate", reglu(true, false));
  body("reglu_up", reglu(false, true));
  body("prelu", [](auto... arguments) { works::prelu(true, arguments...); });
  body("prelu_of_bits", [](auto... arguments) { works::prelu(false, arguments...); });
  body("count", [](auto... arguments) { works::count(arguments...); });
}

}  // namespace relu_ext
