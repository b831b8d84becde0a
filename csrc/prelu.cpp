// prelu: a vector of slopes beside the input.
#include <ATen/ops/_prelu_kernel_backward.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/prelu.h>
#include <ATen/ops/where.h>

#include "autograd.h"
#include "backend.h"
#include "calls.h"
#include "gate.h"
#include "launch.h"
#include "node.h"

namespace relu_ext {
namespace {

using at::Tensor;

// nullopt where ATen must see them.
std::optional<Channels> channels_of(const Tensor& input, const Tensor& weight) {
  if (!input.is_non_overlapping_and_dense() || !weight.is_contiguous() || weight.dim() > 1) return std::nullopt;
  const int64_t number = weight.numel();
  if (number == 1) return Channels{1, std::max<int64_t>(input.numel(), 1)};
  if (input.dim() < 2 || input.size(1) != number) return std::nullopt;
  return Channels{number, std::max<int64_t>(input.stride(1), 1)};
}

// As ATen sees it beside an input of these many dimensions.
Tensor broadcastable(const Tensor& weight, int64_t dims) {
  c10::SymDimVector sizes(size_t(dims), 1);
  if (dims >= 2) sizes[1] = weight.sym_numel();
  return weight.reshape_symint(sizes);
}

Outputs forward(const Channels& channels, const Tensor& input, const Tensor& weight, bool with_bits) {
  const launch::OnDevice device(input);
  Tensor bits = with_bits ? launch::allocate_bits(input) : Tensor();
  Tensor output = launch::allocate_like(input);
  backend_of(input).prelu({*dtype_of(input), channels, launch::data(input), launch::data(weight),
                           output.mutable_data_ptr(), with_bits ? bits.mutable_data_ptr<uint8_t>() : nullptr},
                          input.numel());
  return {std::move(output), std::move(bits)};
}

// kept: the input or the bits.
variable_list backward(const Keeping& keeping, const Channels& channels, const Tensor& grad, const Tensor& kept,
                       const Tensor& weight, const Needs& needs) {
  const launch::OnDevice device(grad);
  const bool from_bits = keeping.kept == Kept::bits;
  const Tensor laid_out = launch::in_layout(grad, C10_AS_INTARRAYREF_SLOW(keeping.stride));
  variable_list gradients(2);
  if (needs[0]) gradients[0] = backend_of(grad).empty_strided(grad.sizes(), laid_out.strides(), grad.scalar_type());
  if (needs[1])
    gradients[1] = backend_of(grad).empty(weight.sizes(), weight.scalar_type(), at::MemoryFormat::Contiguous);
  backend_of(grad).prelu_backward(
      {*dtype_of(grad), channels, launch::data(laid_out), from_bits ? nullptr : launch::data(kept),
       from_bits ? static_cast<const uint8_t*>(launch::data(kept)) : nullptr, launch::data(weight),
       needs[0] ? gradients[0].mutable_data_ptr() : nullptr, needs[1] ? gradients[1].mutable_data_ptr() : nullptr},
      grad.numel());
  return gradients;
}

// The same as ATen calls.
variable_list definition(const Keeping& keeping, const Tensor& grad, const Tensor& kept, const Tensor& weight,
                         const Needs& needs) {
  const Tensor slopes = broadcastable(weight, grad.dim());
  if (keeping.kept == Kept::bits)
    return {at::where(kept_by_bits(grad, kept, keeping.stride), grad, slopes.mul(grad)), Tensor()};
  auto [grad_input, products] = at::_prelu_kernel_backward(grad, kept, slopes);
  if (!needs[1]) return {grad_input, Tensor()};
  return {grad_input, products.sum_to_size_symint(slopes.sym_sizes()).reshape_symint(weight.sym_sizes())};
}

variable_list gradients(const Keeping& keeping, const Tensor& grad, const variable_list& saved, const Needs& needs) {
  const Tensor &kept = saved[0], &weight = saved[1];
  const bool from_bits = keeping.kept == Kept::bits;
  if (!from_bits) launch::check_kept(grad, kept);
  launch::check_kept_vector(grad, keeping.dim, weight);
  if (!all_plain(grad, saved) || !launch::is_kept_vector(grad, weight))
    return definition(keeping, grad, kept, weight, needs);
  const auto stride = C10_AS_INTARRAYREF_SLOW(keeping.stride);
  if (from_bits)
    launch::check_backward(grad, kept, keeping.stride);
  else if (!launch::lies_as_kept(grad, kept, stride))
    return definition(keeping, grad, kept, weight, needs);
  const Channels channels{weight.numel(),
                          weight.numel() == 1 ? std::max<int64_t>(grad.numel(), 1) : std::max<int64_t>(stride[1], 1)};
  return recorded(keeping.bound, &Registered::recorded_backward, {&grad, &kept, &weight}, false,
                  [&] { return backward(keeping, channels, grad, kept, weight, needs); });
}

// The bits alone: those of leaky_relu, whatever its slope.
Tensor bits_under_modes(const Tensor& input) {
  constexpr const Operation* leaky_relu = operation_of(Activation::leaky_relu, Form::elementwise);
  return std::get<1>(call_forward({leaky_relu, {}}, input));
}

}  // namespace

std::optional<Tensor> apply_prelu(const Bound& bound, const Tensor& input, const Tensor& weight) {
  const Way way = way_of(*bound.operation, {&input, &weight});
  if (way.road == Road::definition) return std::nullopt;
  const auto channels = channels_of(input, weight);
  if (!channels) return std::nullopt;
  const bool for_weight = records_history(weight, effective_keys(weight));
  if (way.road == Road::operators && !way.history) return std::nullopt;
  const bool with_bits = way.history && !for_weight;
  const auto run = [&] {
    auto [output, bits] =
        way.road == Road::kernel ? forward(*channels, input, weight, with_bits) : below_autograd([&]() -> Outputs {
          return {at::prelu(input, weight), with_bits ? bits_under_modes(input) : Tensor()};
        });
    if (!way.history) return output;
    const auto stride = output.sym_strides();
    set_history(output, gradients,
                {bound,
                 with_bits ? Kept::bits : Kept::input,
                 {stride.begin(), stride.end()},
                 weight.numel() == 1 ? launch::no_dim : 1},
                {&input, &weight}, {{with_bits ? bits : input}, {weight}});
    return output;
  };
  return way.road == Road::kernel ? recorded(bound, &Registered::recorded, {&input, &weight}, way.history, run) : run();
}

}  // namespace relu_ext
