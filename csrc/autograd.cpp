#include "autograd.h"

#include <ATen/ops/arange.h>
#include <ATen/ops/elu.h>
#include <ATen/ops/elu_backward.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/sqrt.h>
#include <ATen/ops/threshold_backward.h>
#include <ATen/ops/where.h>

#include <utility>
#include <vector>

#include "calls.h"
#include "gate.h"
#include "launch.h"
#include "node.h"

namespace relu_ext {
namespace {

using at::Tensor;

Gradients gradients;

Keeping keeping_for(const Bound& bound, Kept kept, const Tensor& output) {
  const auto stride = output.sym_strides();
  return {bound, kept, {stride.begin(), stride.end()}};
}

// launch(input) -> output, bits: with the node that remembers the bits.
template <class Launch>
Outputs forward_with_history(const Bound& bound, const Tensor& input, Launch launch) {
  Outputs outputs = launch(bound, input);
  auto& [output, bits] = outputs;
  set_history(output, gradients, keeping_for(bound, Kept::bits, output), {&input}, {{bits}});
  return outputs;
}

// launch(grad, bits, stride) -> gradient. It is linear in grad and so its own derivative: the same node again.
template <class Stride, class Launch>
Tensor gradient_with_history(const Bound& bound, const Tensor& grad, const Tensor& bits, Stride stride, Launch launch) {
  Tensor result = launch(bound, grad, bits, stride);
  set_history(result, gradients, keeping_for(bound, Kept::bits, result), {&grad}, {{bits}});
  return result;
}

Tensor gradient(const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  const auto keys = effective_keys(grad);
  const Road taken = road(grad, keys);
  if (taken == Road::definition || effective_keys(bits) - keys::ours != keys - keys::ours)
    return gradient_definition(bound, grad, bits, stride);
  if (taken == Road::operators) return call_backward(bound, grad, bits, stride);
  const auto concrete = C10_AS_INTARRAYREF_SLOW(stride);
  const bool history = records_history(grad, keys);
  return recorded(bound, &Registered::recorded_backward, {&grad, &bits}, history, [&] {
    if (!history) return launch::backward(bound, grad, bits, concrete);
    return gradient_with_history(bound, grad, bits, concrete, launch::backward);
  });
}

// What an operation that keeps no bits means, as ATen calls.
Tensor definition(const Bound& bound, const Tensor& input) {
  const auto& scalars = bound.scalars;
  if (bound.operation->activation == Activation::elu) return at::elu(input, scalars[0], scalars[1], scalars[2]);
  const Tensor root = at::relu(input);
  return root.mul(root);
}

// relu_squared's r = max(input, 0), differentiable: where it is made from the output, its node is relu's and leads to
// the input past the output, whose own derivative 2r would have to be divided by again.
Tensor root_of(Kept kept, const Tensor& value) {
  if (kept == Kept::input) return at::relu(value);
  // In double: of float32 at::sqrt is not always the nearest, where it is MKL's.
  const auto square_root = [&](const Tensor& square) { return square.to(at::kDouble).sqrt().to(square.scalar_type()); };
  if (!records_history(value, effective_keys(value))) return square_root(value);
  const Bound relu{operation_of(Activation::relu, Form::elementwise), {}};
  const Tensor root = below_autograd([&] { return square_root(value.detach()); });
  const Tensor bits = below_autograd([&] { return std::get<1>(call_forward(relu, root)); });
  set_history_past(root, gradients, keeping_for(relu, Kept::bits, root), value, {bits});
  return root;
}

// The gradient of the same as ATen calls, differentiable in grad and in the operation's input.
Tensor gradient_definition_from(const Bound& bound, Kept kept, const Tensor& grad, const Tensor& value) {
  const auto& scalars = bound.scalars;
  if (bound.operation->activation == Activation::elu)
    return at::elu_backward(grad, scalars[0], scalars[1], scalars[2], kept == Kept::output, value);
  const Tensor root = root_of(kept, value);
  return at::threshold_backward(grad.mul(root).mul(2), root, 0);
}

// value: the input or the output, as a tensor with history.
Tensor gradient_from(const Bound& bound, Kept kept, const Tensor& grad, const Tensor& value) {
  launch::check_kept(grad, value);
  // From the output of a function that falls no gradient follows; ATen has an error for it.
  const bool is_torchs = bound.operation->activation == Activation::elu && kept == Kept::output && bound.scalars[0] < 0;
  if (!all_plain(grad, value) || is_torchs || grad.scalar_type() != value.scalar_type() ||
      !value.is_non_overlapping_and_dense())
    return gradient_definition_from(bound, kept, grad, value);
  return recorded(bound, &Registered::recorded_backward, {&grad, &value}, false,
                  [&] { return launch::backward_from(kept, bound, grad, value); });
}

variable_list gradients(const Keeping& keeping, const Tensor& grad, const variable_list& saved, const Needs& needs) {
  const auto& [bound, kept, stride, dim, factor] = keeping;
  if (!needs[0]) return variable_list(1);
  if (kept == Kept::bits) return {gradient(bound, grad, saved[0], stride)};
  return {gradient_from(bound, kept, grad, saved[0])};
}

// The output; with history, and what it takes kept, where there is any.
Tensor apply_from(const Bound& bound, const Tensor& input, Road taken, bool history) {
  Tensor output =
      taken == Road::kernel ? launch::forward(bound, input) : below_autograd([&] { return definition(bound, input); });
  if (!history) return output;
  const Kept kept = kept_by(*bound.operation, *dtype_of(input), /*inplace=*/false);
  const Saving saving{kept == Kept::input ? input : output, kept == Kept::output};
  set_history(output, gradients, keeping_for(bound, kept, output), {&input}, {saving});
  return output;
}

// In place, below autograd; the bits where they are kept.
Tensor overwrite(const Bound& bound, Kept kept, const Tensor& input, Road taken) {
  if (taken == Road::kernel) {
    if (kept == Kept::bits) return launch::forward_bits_(bound, input);
    launch::forward_(bound, input);
    return {};
  }
  return below_autograd([&]() -> Tensor {
    if (kept == Kept::bits) {
      auto [output, bits] = call_forward(bound, input);
      input.copy_(output);
      return bits;
    }
    input.copy_(definition(bound, input));
    return {};
  });
}

bool takes_kernels(const Bound& bound, const Tensor& input, Road taken) {
  return taken != Road::definition && input.is_non_overlapping_and_dense() &&
         scalars_fit(bound.scalars, *dtype_of(input));
}

}  // namespace

void check_no_forward_grad(const Bound& bound, const Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(),
                              "relu_ext: the operators have no forward-mode "
                              "derivative; call relu_ext.",
                              bound.operation->name, "(), which has one");
}

Tensor gradient_definition(const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  const Tensor kept = kept_by_bits(grad, bits, stride);
  if (bound.operation->activation == Activation::leaky_relu) return at::where(kept, grad, grad.mul(bound.scalars[0]));
  return at::where(kept, grad, 0);
}

Tensor kept_by_bits(const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  launch::check_backward(grad, bits, stride);
  const Tensor position = at::arange(8, bits.options());
  const Tensor keep = bits.unsqueeze(1).__rshift__(position).__and__(1).to(at::kBool).flatten();
  return keep.as_strided_symint(grad.sym_sizes(), stride);
}

std::optional<Tensor> apply(const Bound& bound, const Tensor& input) {
  const auto keys = effective_keys(input);
  const Road taken = road(input, keys);
  if (!takes_kernels(bound, input, taken)) return std::nullopt;
  const bool history = records_history(input, keys);
  // What is kept for backward must not depend on modes; without history nothing is kept, and the definition serves.
  if (taken == Road::operators && !history) return std::nullopt;
  const bool keeps_bits = bound.operation->kept == Kept::bits;
  if (taken == Road::operators)
    return keeps_bits ? std::get<0>(call_forward(bound, input)) : apply_from(bound, input, taken, history);
  return recorded(bound, &Registered::recorded, {&input}, history, [&] {
    if (!keeps_bits) return apply_from(bound, input, taken, history);
    if (!history) return launch::forward(bound, input);
    return std::get<0>(forward_with_history(bound, input, launch::forward_bits));
  });
}

bool apply_(const Bound& bound, const Tensor& input) {
  const auto keys = effective_keys(input);
  const Road taken = road(input, keys);
  if (!takes_kernels(bound, input, taken)) return false;
  const bool history = records_history(input, keys);
  if (taken == Road::operators && !history) return false;
  check_inplace(input, history);
  const auto bump_version = [&] {
    if (keys.has_any(keys::inplace)) input.unsafeGetTensorImpl()->bump_version();
  };
  recorded(bound, &Registered::recorded_in_place, {&input}, history, [&] {
    if (!history) {
      launch::forward_(bound, input);
      return bump_version();
    }
    const Kept kept = kept_by(*bound.operation, *dtype_of(input), /*inplace=*/true);
    rebase_history(input, gradients, keeping_for(bound, kept, input), [&] {
      Tensor bits = overwrite(bound, kept, input, taken);
      bump_version();
      return bits;
    });
  });
  return true;
}

Outputs operator_forward(const Bound& bound, const Tensor& input) {
  check_no_forward_grad(bound, input);
  const auto launch = [](const Bound& bound, const Tensor& input) {
    return below_autograd([&] { return call_forward(bound, input); });
  };
  if (!records_history(input, effective_keys(input))) return launch(bound, input);
  return forward_with_history(bound, input, launch);
}

Tensor operator_backward(const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  check_no_forward_grad(bound, grad);
  const auto launch = [](const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
    return below_autograd([&] { return call_backward(bound, grad, bits, stride); });
  };
  if (!records_history(grad, effective_keys(grad))) return launch(bound, grad, bits, stride);
  return gradient_with_history(bound, grad, bits, stride, launch);
}

}  // namespace relu_ext
