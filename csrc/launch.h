// From tensors to the backend: checks, allocation, recording. Below autograd: no history, no version counter.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>

#include <optional>
#include <tuple>

#include "operations.h"

namespace relu_ext::launch {

// Makes the tensor's device the current one, whose queue and memory serve the call. The CPU has none to be set.
struct OnDevice {
  explicit OnDevice(const at::Tensor& tensor)
      : guard_(tensor.is_cpu() ? std::nullopt : std::optional(tensor.device())) {}
  const c10::OptionalDeviceGuard guard_;
};

// Uninitialised, with the strides that TensorIterator gives the output of an elementwise operation on a dense input.
at::Tensor allocate_like(const at::Tensor& input);
at::Tensor allocate_bits(const at::Tensor& input);

// Same place in memory for every element: strides agree wherever there is more than one step to take.
bool same_layout(at::IntArrayRef sizes, at::IntArrayRef a, at::IntArrayRef b);
// The tensor, or a copy of it, with these strides.
at::Tensor in_layout(const at::Tensor&, at::IntArrayRef stride);

// Throws for a tensor whose storage has been resized to less than its elements take, as FSDP does. PyTorch itself looks
// no further than whether there is any memory, and that not in all its kernels. Undefined ones have none and need none.
void check_memory(const at::Tensor&);
// Where its elements begin, which is checked; null where it is undefined.
const void* data(const at::Tensor&);

// These throw; no data is read, so they serve tensors without data too.
Dtype checked_dtype(const at::Tensor&);
void check_backward(const at::Tensor& grad, const at::Tensor& bits, c10::SymIntArrayRef stride);
// What a node unpacks need not be what it saved: hooks return what they like, and `x.data = ...` exchanges x itself.
void check_device(const at::Tensor& grad, const at::Tensor& kept);
void check_kept(const at::Tensor& grad, const at::Tensor& kept);
// vector: a value for each index of this dimension, or one for all.
constexpr int64_t no_dim = -1;
void check_kept_vector(const at::Tensor& grad, int64_t dim, const at::Tensor& vector);
// Those two, for what a kernel is to read: of grad's dtype, and in the memory order that these strides give.
bool lies_as_kept(const at::Tensor& grad, const at::Tensor& kept, at::IntArrayRef stride);
bool is_kept_vector(const at::Tensor& grad, const at::Tensor& vector);

// Outputs keep the input's strides where it is dense, else they have those of at::empty_like. Tensors are float32,
// float64, float16 or bfloat16 on a device that the build has kernels for; anything else throws.
at::Tensor forward(const Bound&, const at::Tensor& input);
std::tuple<at::Tensor, at::Tensor> forward_bits(const Bound&, const at::Tensor& input);  // output, bits

// In place; input is dense.
void forward_(const Bound&, const at::Tensor& input);
at::Tensor forward_bits_(const Bound&, const at::Tensor& input);  // bits

// The input's gradient, with the strides that the forward's output had: bits are in its memory order. A grad of another
// layout is copied to it. Throws for bits or strides that do not fit grad.
at::Tensor backward(const Bound&, const at::Tensor& grad, const at::Tensor& bits, at::IntArrayRef stride);

// The same from the forward's input or output, whose strides the gradient has. Both are plain tensors of the same shape
// and dtype, `value` dense.
at::Tensor backward_from(Kept, const Bound&, const at::Tensor& grad, const at::Tensor& value);

}  // namespace relu_ext::launch
