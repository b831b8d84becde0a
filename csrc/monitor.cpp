#include "monitor.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/isfinite.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/TensorOptions.h>
#include <torch/csrc/autograd/graph_task.h>

#include <algorithm>

#include "backend.h"
#include "gate.h"
#include "launch.h"
#include "node.h"

namespace relu_ext::monitor {
namespace {

using at::Tensor;

struct BelowModes {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard below_modes{keys::modes};
};

// For one that is observable.
bool has_kernels(const Tensor& tensor) {
  return dtype_of(tensor) && (tensor.is_cpu() || (cuda::built && tensor.is_cuda()));
}

void check_cells(const Tensor& cells, int64_t count, const Tensor& beside) {
  TORCH_CHECK(is_observable(cells) && cells.scalar_type() == at::kLong && cells.is_contiguous() &&
                  cells.numel() == count && cells.device() == beside.device(),
              "relu_ext: expected ", count, " contiguous int64 on ", beside.device(), ", got ", cells.numel(), " of ",
              cells.scalar_type(), " on ", cells.device());
  launch::check_memory(cells);
}

// bits: in the memory order of a dense tensor.
void count(const Tensor& bits, const Tensor& tensor, int64_t dim, int64_t step, const Tensor& kept,
           const Tensor& last) {
  const int64_t number = tensor.size(dim);
  check_cells(kept, number, tensor);
  check_cells(last, number, tensor);
  TORCH_CHECK(tensor.is_non_overlapping_and_dense(), "relu_ext: a tensor of shape ", tensor.sizes(), " with strides ",
              tensor.strides(), " is not dense");
  if (tensor.numel() == 0) return;
  const launch::OnDevice device(tensor);
  const int64_t inner = number == 1 ? tensor.numel() : tensor.stride(dim);  // the stride of one may be anything
  backend_of(tensor).count({{number, std::max<int64_t>(inner, 1)},
                            static_cast<const uint8_t*>(launch::data(bits)),
                            step,
                            kept.mutable_data_ptr<int64_t>(),
                            last.mutable_data_ptr<int64_t>()},
                           tensor.numel());
}

const Operation& operation_named(const std::string& name) {
  const auto* const found = std::find_if(operations.begin(), operations.end(), [&](const Operation& operation) {
    return operation.has_operators() && operation.name == name;
  });
  TORCH_CHECK(found != operations.end(), "relu_ext: ", name, " is no operation that keeps bits");
  return *found;
}

}  // namespace

bool is_observable(const Tensor& tensor) {
  const auto options = tensor.options();
  const auto dense = c10::computeDispatchKey(tensor.scalar_type(), options.layout(), options.device());
  return effective_keys(tensor) - keys::ours - keys::modes == c10::DispatchKeySet(dense) &&
         !tensor.key_set().has(c10::DispatchKey::Python) && tensor.layout() == at::kStrided && modes_only_watch() &&
         !tensor._fw_grad(/*level=*/0).defined();
}

Tensor cells(const Tensor& beside, int64_t count) {
  const c10::InferenceMode ordinary(false);
  const BelowModes guard;
  return at::zeros({count}, beside.options().dtype(at::kLong));
}

bool in_backward() { return torch::autograd::get_current_graph_task_id() != -1; }

bool count_bits(const Tensor& output, int64_t dim, int64_t step, const Tensor& kept, const Tensor& last) {
  const Tensor bits = bits_of(output);
  if (!bits.defined() || bits.numel() != bytes_of_bits(output.numel())) return false;
  count(bits, output, dim, step, kept, last);
  return true;
}

bool count_bits_of(const std::string& operation, const std::vector<double>& scalars, const Tensor& input, int64_t dim,
                   int64_t step, const Tensor& kept, const Tensor& last) {
  const Operation& named = operation_named(operation);
  TORCH_CHECK(scalars.size() == size_t(named.arguments), "relu_ext: ", operation, " has ", named.arguments, " scalars");
  const auto bound = bind(named, scalars.data());
  if (!bound || !is_observable(input) || !has_kernels(input) || !scalars_fit(bound->scalars, *dtype_of(input)))
    return false;
  const BelowModes guard;
  const auto [output, bits] = launch::forward_bits(*bound, input);
  count(bits, output, dim, step, kept, last);
  return true;
}

void find_nonfinite(const Tensor& tensor, int64_t step, const Tensor& first) {
  check_cells(first, 1, tensor);
  const bool observable = is_observable(tensor);
  if (observable) launch::check_memory(tensor);
  if (observable && has_kernels(tensor) && tensor.is_non_overlapping_and_dense()) {
    const launch::OnDevice device(tensor);
    backend_of(tensor).find_nonfinite(
        {*dtype_of(tensor), tensor.const_data_ptr(), step, first.mutable_data_ptr<int64_t>()}, tensor.numel());
    return;
  }
  TORCH_CHECK(!tensor.is_meta() && !tensor.key_set().has(c10::DispatchKey::Python),
              "relu_ext: there may be no memory to look at in a tensor of ", tensor.key_set());
  const BelowModes guard;
  const Tensor found = at::isfinite(tensor).all().logical_not().logical_and(first.eq(0));
  first.copy_(at::where(found, step, first));
}

void watch_gradient(const Tensor& output, int64_t step, const Tensor& first) {
  if (!output.grad_fn()) return;
  output.register_hook([=](const at::TensorBase& arrived) {
    const Tensor grad(arrived);
    if (grad.defined() && grad.device() == first.device() && is_observable(grad)) find_nonfinite(grad, step, first);
  });
}

}  // namespace relu_ext::monitor
