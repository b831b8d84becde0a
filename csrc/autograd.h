// Operations with history: gate, node, version counter. Everything here depends on torch's private autograd API, which
// changes between releases; nothing else does.
#pragma once
#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "operations.h"

namespace relu_ext {

// The output by way of the kernels, or nullopt where the operation's ATen line must run instead.
std::optional<at::Tensor> apply(const Bound&, const at::Tensor& input);

// In place. False: nothing was done, the ATen line must run. Throws PyTorch's own errors for a leaf that requires grad,
// ...
bool apply_(const Bound&, const at::Tensor& input);

// The registered operators' kernels for the Autograd key.
std::tuple<at::Tensor, at::Tensor> operator_forward(const Bound&, const at::Tensor& input);
at::Tensor operator_backward(const Bound&, const at::Tensor& grad, const at::Tensor& bits, c10::SymIntArrayRef stride);

}  // namespace relu_ext
