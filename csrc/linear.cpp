// linear_relu: torch's own product with a ReLU behind it; one pass back for the masked gradient and the bias's.
#include <ATen/ops/_addmm_activation.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>

#include "autograd.h"
#include "backend.h"
#include "calls.h"
#include "gate.h"
#include "launch.h"
#include "node.h"

namespace relu_ext {
namespace {

using at::Tensor;

// Rows of the last dimension.
Tensor rows_of(const Tensor& tensor) { return tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)}); }

bool fit(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  if (weight.dim() != 2 || input.dim() < 1 || input.size(-1) != weight.size(1) || input.numel() == 0) return false;
  if (bias.defined() && (bias.dim() != 1 || bias.size(0) != weight.size(0) || !bias.is_contiguous())) return false;
  return weight.numel() > 0 && (input.dim() == 2 || input.is_contiguous());
}

Tensor forward(const Tensor& input, const Tensor& weight, const Tensor& bias) {
  for (const Tensor* read : {&input, &weight, &bias}) launch::check_memory(*read);
  c10::SmallVector<int64_t, 5> sizes(input.sizes());
  sizes.back() = weight.size(0);
  if (bias.defined()) return at::_addmm_activation(bias, rows_of(input), weight.t()).view(sizes);
  const Tensor output = at::linear(input, weight);
  launch::forward_({operation_of(Activation::relu, Form::elementwise), {}}, output);
  return output;
}

// The gradients by way of the masked one, which is where the output is not 0.
struct Masked {
  Tensor grad, bias;
};

Masked masked(const Keeping& keeping, const Tensor& grad, const Tensor& output, bool with_bias) {
  const launch::OnDevice device(grad);
  const Backend& backend = backend_of(grad);
  const Tensor laid_out = launch::in_layout(grad, output.strides());
  const int64_t columns = output.size(-1);
  Masked result{backend.empty_strided(grad.sizes(), output.strides(), grad.scalar_type()), {}};
  if (with_bias) result.bias = backend.empty({columns}, grad.scalar_type(), at::MemoryFormat::Contiguous);
  FusedBackward work{};
  work.activation = keeping.bound.operation->activation;
  work.dtype = *dtype_of(grad);
  work.channels = columns == 1 ? Channels{1, grad.numel()} : Channels{columns, 1};
  work.kept_as = Kept::output;
  work.grad = launch::data(laid_out);
  work.kept = launch::data(output);
  work.grad_input = result.grad.mutable_data_ptr();
  work.grad_shift = with_bias ? result.bias.mutable_data_ptr() : nullptr;
  backend.fused_backward(work, grad.numel());
  return result;
}

// saved: output, weight, input.
variable_list gradients(const Keeping& keeping, const Tensor& grad, const variable_list& saved, const Needs& needs) {
  const Tensor &output = saved[0], &weight = saved[1], &input = saved[2];
  launch::check_kept(grad, output);
  for (const Tensor* kept : {&weight, &input}) launch::check_device(grad, *kept);
  const bool plain = all_plain(grad, saved) && output.is_contiguous() && grad.scalar_type() == output.scalar_type();
  const auto run = [&] {
    if (plain)
      for (const Tensor* read : {&weight, &input}) launch::check_memory(*read);
    const auto [inner, bias] =
        plain ? masked(keeping, grad, output, needs[2]) : Masked{at::threshold_backward(grad, output, 0), {}};
    variable_list gradients(3);
    if (needs[0]) gradients[0] = inner.matmul(weight);
    if (needs[1]) gradients[1] = rows_of(inner).t().mm(rows_of(input));
    if (needs[2]) gradients[2] = bias.defined() ? bias : rows_of(inner).sum(0);
    return gradients;
  };
  return plain ? recorded(keeping.bound, &Registered::recorded_backward, {&grad, &output}, false, run) : run();
}

}  // namespace

std::optional<Tensor> apply_linear(const Bound& bound, const Tensor& input, const Tensor& weight, const Tensor& bias) {
  const Way way = way_of(*bound.operation, {&input, &weight, &bias});
  if (way.road == Road::definition || !fit(input, weight, bias)) return std::nullopt;
  if (way.road == Road::operators && !way.history) return std::nullopt;
  const auto run = [&] {
    Tensor output = below_autograd([&] {
      return way.road == Road::kernel ? forward(input, weight, bias) : at::relu(at::linear(input, weight, bias));
    });
    if (!way.history) return output;
    set_history(output, gradients, {bound, Kept::output, {}}, {&input, &weight, &bias},
                {{output, /*is_output=*/true}, {weight}, {input}});
    return output;
  };
  return way.road == Road::kernel ? recorded(bound, &Registered::recorded, {&input, &weight}, way.history, run) : run();
}

}  // namespace relu_ext
