// An activation fused with what surrounds it: vectors of a value for each channel, and a residual.
#include <ATen/ops/add.h>
#include <ATen/ops/addcmul.h>
#include <ATen/ops/mul.h>

#include <vector>

#include "autograd.h"
#include "backend.h"
#include "calls.h"
#include "gate.h"
#include "launch.h"
#include "node.h"

namespace relu_ext {
namespace {

using at::Tensor;

// Where an operation has these among its inputs, and among the gradients.
struct Places {
  size_t scale = 0, shift = 0, residual = 0;  // 0: it has none
};
Places places_of(const Beside& beside) {
  Places places;
  size_t next = 1;
  if (beside.scale) places.scale = next++;
  if (beside.shift) places.shift = next++;
  if (beside.residual) places.residual = next;
  return places;
}

Bound activation_of(const Bound& bound) {
  return {operation_of(bound.operation->activation, Form::elementwise), bound.scalars};
}

// Of a dense tensor with these sizes and strides.
Channels channels_along(int64_t dim, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t numel) {
  if (dim >= int64_t(sizes.size()) || sizes[dim] == 1) return {1, std::max<int64_t>(numel, 1)};
  return {sizes[dim], std::max<int64_t>(strides[dim], 1)};
}

// A vector as ATen sees it beside a tensor of these many dimensions.
Tensor broadcastable(const Tensor& vector, int64_t dim, int64_t dims) {
  c10::SymDimVector sizes(size_t(dims), 1);
  sizes[size_t(dim)] = vector.sym_numel();
  return vector.reshape_symint(sizes);
}

bool fit(const FusedInputs& inputs) {
  const auto& [input, scale, shift, residual, dim] = inputs;
  if (!input.is_non_overlapping_and_dense()) return false;
  for (const Tensor* vector : {&scale, &shift})
    if (vector->defined() &&
        (dim >= input.dim() || vector->dim() != 1 || !vector->is_contiguous() || vector->numel() != input.size(dim)))
      return false;
  return !residual.defined() || (residual.sizes() == input.sizes() && residual.is_non_overlapping_and_dense() &&
                                 launch::same_layout(input.sizes(), input.strides(), residual.strides()));
}

void* written(const Tensor& tensor) { return tensor.defined() ? tensor.mutable_data_ptr() : nullptr; }

Outputs forward(const Bound& bound, const FusedInputs& inputs, bool with_bits) {
  const auto& [input, scale, shift, residual, dim] = inputs;
  const launch::OnDevice device(input);
  Tensor bits = with_bits ? launch::allocate_bits(input) : Tensor();
  Tensor output = launch::allocate_like(input);
  Fused work{};
  work.activation = bound.operation->activation;
  work.scalars = bound.scalars;
  work.dtype = *dtype_of(input);
  work.channels = channels_along(dim, input.sizes(), input.strides(), input.numel());
  work.input = launch::data(input);
  work.scale = launch::data(scale);
  work.shift = launch::data(shift);
  work.residual = launch::data(residual);
  work.multiply_add = bound.operation->beside.multiply_add;
  work.output = output.mutable_data_ptr();
  work.bits = static_cast<uint8_t*>(written(bits));
  backend_of(input).fused(work, input.numel());
  return {std::move(output), std::move(bits)};
}

// The same as calls that modes see.
Outputs forward_by_operators(const Bound& bound, const FusedInputs& inputs) {
  const auto& [input, scale, shift, residual, dim] = inputs;
  const auto vector = [&, dim = dim, dims = input.dim()](const Tensor& of) { return broadcastable(of, dim, dims); };
  Tensor sum = input;
  if (bound.operation->beside.multiply_add) {
    sum = at::addcmul(vector(shift), input, vector(scale));
  } else {
    if (scale.defined()) sum = sum.mul(vector(scale));
    if (shift.defined()) sum = sum.add(vector(shift));
  }
  if (residual.defined()) sum = sum.add(residual);
  return call_forward(activation_of(bound), sum);
}

// What a node saves, in this order; input and scale where there is a scale, input where that needs a gradient.
struct Kepts {
  const Tensor &bits, &scale, &input;
};
Kepts kept_of(const variable_list& saved) {
  static const Tensor none;
  return {saved[0], saved.size() > 1 ? saved[1] : none, saved.size() > 2 ? saved[2] : none};
}

// Of plain tensors: can a kernel read them?
bool lie_as_kept(const Keeping& keeping, const Tensor& grad, const Kepts& kept) {
  if (kept.scale.defined() && !launch::is_kept_vector(grad, kept.scale)) return false;
  return !kept.input.defined() || launch::lies_as_kept(grad, kept.input, C10_AS_INTARRAYREF_SLOW(keeping.stride));
}

variable_list definition(const Keeping& keeping, const Tensor& grad, const Kepts& kept, const Needs& needs) {
  const Places places = places_of(keeping.bound.operation->beside);
  const Tensor masked = gradient_definition(keeping.bound, grad, kept.bits, keeping.stride);
  const auto summed = [&](const Tensor& terms) {
    std::vector<int64_t> dims;
    for (int64_t d = 0; d < terms.dim(); ++d)
      if (d != keeping.dim) dims.push_back(d);
    return dims.empty() ? terms : terms.sum(dims);
  };
  variable_list gradients(most_inputs);
  if (needs[0]) gradients[0] = places.scale ? masked.mul(broadcastable(kept.scale, keeping.dim, grad.dim())) : masked;
  if (places.scale && needs[places.scale]) gradients[places.scale] = summed(masked.mul(kept.input));
  if (places.shift && needs[places.shift]) gradients[places.shift] = summed(masked);
  if (places.residual && needs[places.residual]) gradients[places.residual] = masked;
  return gradients;
}

variable_list backward(const Keeping& keeping, const Tensor& grad, const Kepts& kept, const Needs& needs) {
  const launch::OnDevice device(grad);
  const Places places = places_of(keeping.bound.operation->beside);
  const auto stride = C10_AS_INTARRAYREF_SLOW(keeping.stride);
  const auto needed = [&](size_t place) { return place && needs[place]; };
  variable_list gradients(most_inputs);
  if (!places.scale && !needed(places.shift)) {
    const bool wanted = needs[0] || needed(places.residual);
    const Tensor masked = wanted ? launch::backward(keeping.bound, grad, kept.bits, stride) : Tensor();
    if (needs[0]) gradients[0] = masked;
    if (needed(places.residual)) gradients[places.residual] = masked;
    return gradients;
  }
  launch::check_backward(grad, kept.bits, keeping.stride);
  const Backend& backend = backend_of(grad);
  const Tensor laid_out = launch::in_layout(grad, stride);
  const auto like_grad = [&] { return backend.empty_strided(grad.sizes(), stride, grad.scalar_type()); };
  const auto vector = [&] {
    return backend.empty({grad.size(keeping.dim)}, grad.scalar_type(), at::MemoryFormat::Contiguous);
  };
  if (needs[0]) gradients[0] = like_grad();  // without scale or residual it is the masked one
  if (places.scale && needed(places.residual)) gradients[places.residual] = like_grad();
  if (needed(places.scale)) gradients[places.scale] = vector();
  if (needed(places.shift)) gradients[places.shift] = vector();
  const auto at = [&](size_t place) { return place ? written(gradients[place]) : nullptr; };
  FusedBackward work{};
  work.activation = keeping.bound.operation->activation;
  work.scalars = keeping.bound.scalars;
  work.dtype = *dtype_of(grad);
  work.channels = channels_along(keeping.dim, grad.sizes(), stride, grad.numel());
  work.kept_as = Kept::bits;
  work.grad = launch::data(laid_out);
  work.kept = launch::data(kept.bits);
  work.input = launch::data(kept.input);
  work.scale = launch::data(kept.scale);
  work.grad_input = written(gradients[0]);
  work.grad_residual = places.scale ? at(places.residual) : nullptr;
  work.grad_scale = at(places.scale);
  work.grad_shift = at(places.shift);
  backend.fused_backward(work, grad.numel());
  return gradients;
}

variable_list gradients(const Keeping& keeping, const Tensor& grad, const variable_list& saved, const Needs& needs) {
  const Kepts kept = kept_of(saved);
  if (kept.scale.defined()) launch::check_kept_vector(grad, keeping.dim, kept.scale);
  if (kept.input.defined()) launch::check_kept(grad, kept.input);
  if (!all_plain(grad, saved) || !lie_as_kept(keeping, grad, kept)) return definition(keeping, grad, kept, needs);
  return recorded(keeping.bound, &Registered::recorded_backward, {&grad, &kept.bits}, false,
                  [&] { return backward(keeping, grad, kept, needs); });
}

}  // namespace

std::optional<Tensor> apply_fused(const Bound& bound, const FusedInputs& inputs) {
  const Tensor &input = inputs.input, &scale = inputs.scale;
  const Way way = way_of(*bound.operation, {&input, &scale, &inputs.shift, &inputs.residual});
  if (way.road == Road::definition || !fit(inputs) || !scalars_fit(bound.scalars, *dtype_of(input)))
    return std::nullopt;
  if (way.road == Road::operators && !way.history) return std::nullopt;
  const auto run = [&] {
    auto [output, bits] = way.road == Road::kernel
                              ? forward(bound, inputs, way.history)
                              : below_autograd([&] { return forward_by_operators(bound, inputs); });
    if (!way.history) return output;
    const auto stride = output.sym_strides();
    c10::SmallVector<Saving, 3> saved{{bits}};
    if (scale.defined()) {
      saved.push_back({scale});
      if (records_history(scale, effective_keys(scale))) saved.push_back({input});
    }
    set_history(output, gradients, {bound, Kept::bits, {stride.begin(), stride.end()}, inputs.dim},
                {&input, &inputs.scale, &inputs.shift, &inputs.residual}, saved);
    return output;
  };
  return way.road == Road::kernel ? recorded(bound, &Registered::recorded, {&input}, way.history, run) : run();
}

}  // namespace relu_ext
