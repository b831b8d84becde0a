// relu_dropout: which elements stay is drawn in the pass that rectifies, and kept as one bit with the sign.

#include <algorithm>
#include <cmath>

#include "autograd.h"
#include "backend.h"
#include "calls.h"
#include "gate.h"
#include "launch.h"
#include "node.h"

namespace relu_ext {
namespace {

using at::Tensor;
using MaybeGenerator = std::optional<at::Generator>;

constexpr const Operation* relu_dropout = operation_of(Activation::relu, Form::dropout);

Outputs call_dropout(const Tensor& input, double p, const MaybeGenerator& generator) {
  static const auto handle = c10::Dispatcher::singleton()
                                 .findSchemaOrThrow("relu_ext::relu_dropout_forward", "")
                                 .typed<Outputs(const Tensor&, double, MaybeGenerator)>();
  return handle.call(input, p, generator);
}

// 16 random bits: of 65536 numbers the first (1 - p) * 65536 leave an element. 0 < p < 1.
Dropout dropping(double p, const Stream& stream) {
  const double leaving = std::clamp(std::nearbyint((1 - p) * 65536), 1.0, 65536.0);
  return {stream, uint16_t(leaving - 1), 1 / (1 - p)};
}

// As many numbers are taken from the generator whether or not the bits are wanted.
Outputs forward(const Tensor& input, double p, const MaybeGenerator& generator, bool with_bits) {
  const launch::OnDevice device(input);
  const Stream stream = backend_of(input).next_stream(generator);
  Tensor bits = with_bits ? launch::allocate_bits(input) : Tensor();
  Tensor output = launch::allocate_like(input);
  if (p == 1) {
    output.zero_();
    if (with_bits) bits.zero_();
    return {std::move(output), std::move(bits)};
  }
  Fused work{};
  work.activation = Activation::relu;
  work.dtype = *dtype_of(input);
  work.channels = {1, std::max<int64_t>(input.numel(), 1)};
  work.input = launch::data(input);
  work.dropout = dropping(p, stream);
  work.output = output.mutable_data_ptr();
  work.bits = with_bits ? bits.mutable_data_ptr<uint8_t>() : nullptr;
  backend_of(input).fused(work, input.numel());
  return {std::move(output), std::move(bits)};
}

Tensor backward(const Keeping& keeping, const Tensor& grad, const Tensor& bits) {
  launch::check_backward(grad, bits, keeping.stride);
  const launch::OnDevice device(grad);
  const Tensor laid_out = launch::in_layout(grad, C10_AS_INTARRAYREF_SLOW(keeping.stride));
  Tensor output = backend_of(grad).empty_strided(grad.sizes(), laid_out.strides(), grad.scalar_type());
  FusedBackward work{};
  work.activation = Activation::relu;
  work.dtype = *dtype_of(grad);
  work.channels = {1, std::max<int64_t>(grad.numel(), 1)};
  work.kept_as = Kept::bits;
  work.grad = launch::data(laid_out);
  work.kept = launch::data(bits);
  work.factor = keeping.factor;
  work.grad_input = output.mutable_data_ptr();
  backend_of(grad).fused_backward(work, grad.numel());
  return output;
}

variable_list gradients(const Keeping& keeping, const Tensor& grad, const variable_list& saved, const Needs& needs) {
  if (!needs[0]) return variable_list(1);
  const Tensor& bits = saved[0];
  if (!all_plain(grad, saved))
    return {gradient_definition(keeping.bound, grad.mul(keeping.factor), bits, keeping.stride)};
  return {recorded(keeping.bound, &Registered::recorded_backward, {&grad, &bits}, false,
                   [&] { return backward(keeping, grad, bits); })};
}

void remember(Outputs& outputs, const Tensor& input, double p) {
  auto& [output, bits] = outputs;
  const auto stride = output.sym_strides();
  const double factor = p < 1 ? 1 / (1 - p) : 1;
  set_history(output, gradients, {{relu_dropout, {}}, Kept::bits, {stride.begin(), stride.end()}, 0, factor}, {&input},
              {{bits}});
}

}  // namespace

std::optional<Tensor> apply_dropout(const Bound& bound, const Tensor& input, double p,
                                    const MaybeGenerator& generator) {
  const auto keys = effective_keys(input);
  const Road taken = road(input, keys);
  if (taken == Road::definition || !input.is_non_overlapping_and_dense()) return std::nullopt;
  const bool history = records_history(input, keys);
  const auto run = [&] {
    Outputs outputs = taken == Road::kernel ? forward(input, p, generator, history)
                                            : below_autograd([&] { return call_dropout(input, p, generator); });
    if (history) remember(outputs, input, p);
    return std::get<0>(std::move(outputs));
  };
  if (taken != Road::kernel) return run();
  return recorded(bound, &Registered::recorded, {&input}, history, run);
}

void check_probability(double p) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "relu_ext: dropout's probability has to be between 0 and 1, got ", p);
}

Outputs dropout_on_device(const Tensor& input, double p, MaybeGenerator generator) {
  launch::checked_dtype(input);
  check_probability(p);
  launch::check_memory(input);
  return forward(input.is_non_overlapping_and_dense() ? input : input.contiguous(), p, generator, /*with_bits=*/true);
}

Outputs operator_dropout(const Tensor& input, double p, MaybeGenerator generator) {
  check_no_forward_grad({relu_dropout, {}}, input);
  Outputs outputs = below_autograd([&] { return call_dropout(input, p, generator); });
  if (records_history(input, effective_keys(input))) remember(outputs, input, p);
  return outputs;
}

}  // namespace relu_ext
