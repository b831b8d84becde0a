#include "launch.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/empty_like.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <optional>

#include "backend.h"
#include "gate.h"

namespace relu_ext::launch {
namespace {

using at::Tensor;

void run_forward(const Bound& bound, const Tensor& input, const Tensor& output, uint8_t* bits) {
  backend_of(input).forward(
      {bound.operation->activation, bound.scalars, checked_dtype(input), data(input), output.mutable_data_ptr(), bits},
      input.numel());
}

// Do these strides visit each of numel memory places once?
bool is_dense(at::IntArrayRef sizes, at::IntArrayRef stride) {
  c10::SmallVector<int64_t, 5> dims;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] == 0) return true;
    if (sizes[d] > 1) dims.push_back(int64_t(d));
  }
  std::sort(dims.begin(), dims.end(), [&](int64_t a, int64_t b) { return stride[a] < stride[b]; });
  int64_t expected = 1;
  for (const auto d : dims) {
    if (stride[d] != expected) return false;
    expected *= sizes[d];
  }
  return true;
}

// The gradient, with these strides. A grad of another layout is copied to it.
Tensor run_backward(const Bound& bound, Kept kept_as, const Tensor& grad, const void* kept, at::IntArrayRef stride) {
  const OnDevice device(grad);
  Tensor output = backend_of(grad).empty_strided(grad.sizes(), stride, grad.scalar_type());
  const Tensor* source = &grad;
  if (!same_layout(grad.sizes(), grad.strides(), stride)) {
    check_memory(grad);
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    source = &output.copy_(grad);
  }
  backend_of(grad).backward({bound.operation->activation, bound.scalars, *dtype_of(grad), kept_as, data(*source), kept,
                             output.mutable_data_ptr()},
                            grad.numel());
  return output;
}

}  // namespace

Tensor allocate_like(const Tensor& input) {
  const Backend& backend = backend_of(input);
  for (const auto format : {at::MemoryFormat::Contiguous, at::MemoryFormat::ChannelsLast})
    if (input.is_contiguous(format)) return backend.empty(input.sizes(), input.scalar_type(), format);
  return backend.empty_strided(input.sizes(), input.strides(), input.scalar_type());
}

Tensor allocate_bits(const Tensor& input) {
  return backend_of(input).empty({bytes_of_bits(input.numel())}, at::kByte, at::MemoryFormat::Contiguous);
}

bool same_layout(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b) {
  for (size_t d = 0; d < sizes.size(); ++d)
    if (sizes[d] > 1 && a[d] != b[d]) return false;
  return true;
}

Tensor in_layout(const Tensor& tensor, at::IntArrayRef stride) {
  if (same_layout(tensor.sizes(), tensor.strides(), stride)) return tensor;
  check_memory(tensor);
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  return backend_of(tensor).empty_strided(tensor.sizes(), stride, tensor.scalar_type()).copy_(tensor);
}

void check_memory(const Tensor& tensor) {
  if (!tensor.defined() || tensor.numel() == 0) return;
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = tensor.storage_offset();
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  const size_t bytes = tensor.unsafeGetTensorImpl()->unsafe_storage().nbytes();
  size_t needed;  // multiplied: a division takes longer than all else here
  const bool overflows = __builtin_mul_overflow(size_t(last) + 1, tensor.itemsize(), &needed);
  TORCH_CHECK(!overflows && needed <= bytes, "relu_ext: the storage of a tensor of shape ", tensor.sizes(),
              " has been resized to ", bytes, " bytes, which are less than its elements take");
}

const void* data(const Tensor& tensor) {
  check_memory(tensor);
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

Dtype checked_dtype(const Tensor& tensor) {
  const auto dtype = dtype_of(tensor);
  TORCH_CHECK_TYPE(dtype, "relu_ext: expected float32, float64, float16 or bfloat16, got ", tensor.scalar_type());
  return *dtype;
}

void check_backward(const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  TORCH_CHECK(bits.scalar_type() == at::kByte && bits.dim() == 1 && bits.sym_numel() == (grad.sym_numel() + 7) / 8 &&
                  bits.is_contiguous() && bits.device() == grad.device(),
              "relu_ext: bits must be one contiguous dimension of uint8 on ", grad.device(),
              ", a byte for 8 elements of a ", "gradient of shape ", grad.sym_sizes(), ", got ", bits.scalar_type(),
              " of shape ", bits.sym_sizes(), " on ", bits.device());
  TORCH_CHECK(stride.size() == size_t(grad.dim()), "relu_ext: ", stride.size(), " strides for a gradient of ",
              grad.dim(), " dimensions");
}

void check_device(const Tensor& grad, const Tensor& kept) {
  TORCH_CHECK(kept.device() == grad.device(), "relu_ext: a gradient on ", grad.device(), " for what was kept on ",
              kept.device());
}

void check_kept(const Tensor& grad, const Tensor& kept) {
  check_device(grad, kept);
  TORCH_CHECK(kept.sym_sizes() == grad.sym_sizes(), "relu_ext: a gradient of shape ", grad.sym_sizes(),
              " for what was kept of shape ", kept.sym_sizes());
}

void check_kept_vector(const Tensor& grad, int64_t dim, const Tensor& vector) {
  check_device(grad, vector);
  TORCH_CHECK(vector.sym_numel() == (dim == no_dim ? c10::SymInt(1) : grad.sym_size(dim)),
              "relu_ext: a gradient of shape ", grad.sym_sizes(), " for a vector that was kept of shape ",
              vector.sym_sizes());
}

bool lies_as_kept(const Tensor& grad, const Tensor& kept, at::IntArrayRef stride) {
  return kept.scalar_type() == grad.scalar_type() && same_layout(grad.sizes(), kept.strides(), stride);
}

bool is_kept_vector(const Tensor& grad, const Tensor& vector) {
  return vector.scalar_type() == grad.scalar_type() && vector.is_contiguous();
}

Tensor forward(const Bound& bound, const Tensor& input) {
  const OnDevice device(input);
  Tensor output = allocate_like(input);
  run_forward(bound, input, output, nullptr);
  return output;
}

std::tuple<Tensor, Tensor> forward_bits(const Bound& bound, const Tensor& input) {
  checked_dtype(input);
  const OnDevice device(input);
  const bool dense = input.is_non_overlapping_and_dense();
  // Before the output: of the memory that glibc has for two large tensors, the bits then take a corner of one and leave
  // the other whole, where they would go between them. In a loop of steps three blocks took turns, not two.
  Tensor bits = allocate_bits(input);
  if (!dense) check_memory(input);
  Tensor output = dense ? allocate_like(input) : at::empty_like(input).copy_(input);
  // No copy of the handle: a second reference to a tensor that Python owns takes the interpreter lock in torch 2.13.
  run_forward(bound, dense ? input : output, output, bits.mutable_data_ptr<uint8_t>());
  return {std::move(output), std::move(bits)};
}

void forward_(const Bound& bound, const Tensor& input) {
  const OnDevice device(input);
  run_forward(bound, input, input, nullptr);
}

Tensor forward_bits_(const Bound& bound, const Tensor& input) {
  const OnDevice device(input);
  Tensor bits = allocate_bits(input);
  run_forward(bound, input, input, bits.mutable_data_ptr<uint8_t>());
  return bits;
}

Tensor backward(const Bound& bound, const Tensor& grad, const Tensor& bits, at::IntArrayRef stride) {
  checked_dtype(grad);
  check_backward(grad, bits, c10::fromIntArrayRefUnchecked(stride));
  TORCH_CHECK(is_dense(grad.sizes(), stride), "relu_ext: the strides ", stride,
              " are not those of a dense tensor of shape ", grad.sizes());
  return run_backward(bound, Kept::bits, grad, data(bits), stride);
}

Tensor backward_from(Kept kept, const Bound& bound, const Tensor& grad, const Tensor& value) {
  return run_backward(bound, kept, grad, data(value), value.strides());
}

}  // namespace relu_ext::launch
