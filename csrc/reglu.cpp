// reglu: two inputs alike, which may be the halves of one projection.
#include <ATen/ops/mul.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>

#include <algorithm>

#include "autograd.h"
#include "backend.h"
#include "calls.h"
#include "gate.h"
#include "launch.h"
#include "node.h"

namespace relu_ext {
namespace {

using at::Tensor;

// How a tensor lies in memory: rows of `columns` elements, `stride` apart.
struct Layout {
  int64_t columns, stride;
};

// The rows of a tensor whose last dimension is dense, if one stride leads from each to the next.
std::optional<Layout> rows_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  if (tensor.dim() == 0 || tensor.numel() == 0) return Layout{1, 1};
  const int64_t columns = sizes.back();
  if (columns > 1 && strides.back() != 1) return std::nullopt;
  int64_t stride = columns, expected = 0;
  for (int64_t d = tensor.dim() - 2; d >= 0; --d) {
    if (sizes[d] == 1) continue;
    if (strides[d] == 0 || (expected && strides[d] != expected)) return std::nullopt;
    if (!expected) stride = strides[d];
    expected = strides[d] * sizes[d];
  }
  return Layout{columns, stride};
}

bool are_one_row(const Tensor& a, const Tensor& b) {
  return a.is_non_overlapping_and_dense() && launch::same_layout(a.sizes(), a.strides(), b.strides());
}

bool fit(const Tensor& gate, const Tensor& up) {
  return gate.sizes() == up.sizes() && (are_one_row(gate, up) || (rows_of(gate) && rows_of(up)));
}

template <class Pointer>
Rows<Pointer> rows(Pointer data, const Tensor& tensor, bool one_row) {
  return {data, one_row ? tensor.numel() : rows_of(tensor)->stride};
}
Rows<const void*> read(const Tensor& tensor, bool one_row) { return rows(launch::data(tensor), tensor, one_row); }
Rows<void*> written(const Tensor& tensor, bool one_row) {
  return tensor.defined() ? rows(tensor.mutable_data_ptr(), tensor, one_row) : Rows<void*>{};
}
int64_t columns_of(const Tensor& tensor, bool one_row) {
  return one_row ? std::max<int64_t>(tensor.numel(), 1) : rows_of(tensor)->columns;
}

Tensor forward(const Tensor& gate, const Tensor& up) {
  const launch::OnDevice device(gate);
  const bool one_row = are_one_row(gate, up);
  const Tensor output = one_row
                            ? launch::allocate_like(gate)
                            : backend_of(gate).empty(gate.sizes(), gate.scalar_type(), at::MemoryFormat::Contiguous);
  backend_of(gate).gated(
      {*dtype_of(gate), columns_of(gate, one_row), read(gate, one_row), read(up, one_row), written(output, one_row)},
      gate.numel());
  return output;
}

// Are they the halves that chunk(2, -1) makes of a tensor?
bool are_halves(const Tensor& gate, const Tensor& up) {
  const auto layout = rows_of(gate);
  return gate.dim() > 0 && layout && layout->stride == 2 * gate.size(-1) && gate.numel() > gate.size(-1) &&
         gate.strides() == up.strides() && gate.is_alias_of(up) &&
         up.storage_offset() == gate.storage_offset() + gate.size(-1);
}

variable_list backward(const Tensor& grad, const Tensor& gate, const Tensor& up, const Needs& needs) {
  const launch::OnDevice device(grad);
  const Backend& backend = backend_of(grad);
  const bool has_up = up.defined(), one_row = are_one_row(gate, has_up ? up : gate);
  launch::check_memory(grad);
  const Tensor laid_out =
      one_row ? launch::in_layout(grad, gate.strides()) : below_autograd([&] { return grad.contiguous(); });
  variable_list gradients(2);
  if (needs[0] && needs[1] && are_halves(gate, up)) {
    c10::SmallVector<int64_t, 5> sizes(grad.sizes());
    sizes.back() *= 2;
    const Tensor both = backend.empty(sizes, grad.scalar_type(), at::MemoryFormat::Contiguous);
    gradients = below_autograd([&] { return both.chunk(2, -1); });
  } else {
    const auto stride = laid_out.strides();
    for (size_t i = 0; i < 2; ++i)
      if (needs[i]) gradients[i] = backend.empty_strided(grad.sizes(), stride, grad.scalar_type());
  }
  backend.gated_backward({*dtype_of(grad), columns_of(gate, one_row), read(laid_out, one_row), read(gate, one_row),
                          has_up ? read(up, one_row) : Rows<const void*>{}, written(gradients[0], one_row),
                          written(gradients[1], one_row)},
                         grad.numel());
  return gradients;
}

// The same as ATen calls.
variable_list definition(const Tensor& grad, const Tensor& gate, const Tensor& up, const Needs& needs) {
  variable_list gradients(2);
  if (needs[0]) gradients[0] = at::threshold_backward(grad.mul(up), gate, 0);
  if (needs[1]) gradients[1] = grad.mul(gate.relu());
  return gradients;
}

// saved: gate, and up where gate needed a gradient.
variable_list gradients(const Keeping& keeping, const Tensor& grad, const variable_list& saved, const Needs& needs) {
  const Tensor& gate = saved[0];
  const Tensor up = saved.size() > 1 ? saved[1] : Tensor();
  for (const Tensor& kept : saved) launch::check_kept(grad, kept);
  const auto alike = [&](const Tensor& kept) { return kept.scalar_type() == grad.scalar_type() && fit(gate, kept); };
  if (!all_plain(grad, saved) || !std::all_of(saved.begin(), saved.end(), alike))
    return definition(grad, gate, up, needs);
  return recorded(keeping.bound, &Registered::recorded_backward, {&grad, &gate}, false,
                  [&] { return backward(grad, gate, up, needs); });
}

}  // namespace

std::optional<Tensor> apply_reglu(const Bound& bound, const Tensor& gate, const Tensor& up) {
  const Way way = way_of(*bound.operation, {&gate, &up});
  if (way.road == Road::definition || !fit(gate, up)) return std::nullopt;
  if (way.road == Road::operators && !way.history) return std::nullopt;
  const auto run = [&] {
    const Tensor output =
        way.road == Road::kernel ? forward(gate, up) : below_autograd([&] { return at::relu(gate).mul(up); });
    if (!way.history) return output;
    c10::SmallVector<Saving, 2> saved{{gate}};
    if (records_history(gate, effective_keys(gate))) saved.push_back({up});
    set_history(output, gradients, {bound, Kept::input, {}}, {&gate, &up}, saved);
    return output;
  };
  return way.road == Road::kernel ? recorded(bound, &Registered::recorded, {&gate, &up}, way.history, run) : run();
}

}  // namespace relu_ext
