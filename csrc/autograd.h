// Operations with history: gate, node, version counter. Everything here depends on torch's private autograd API, which
// changes between releases; nothing else does.
#pragma once
#include <ATen/core/Generator.h>
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

// The same for those with two tensors.
std::optional<at::Tensor> apply_prelu(const Bound&, const at::Tensor& input, const at::Tensor& weight);
std::optional<at::Tensor> apply_reglu(const Bound&, const at::Tensor& gate, const at::Tensor& up);

// Those with more. vectors and residual: as the operation has them beside its input, where defined; dim: of the
// channels.
struct FusedInputs {
  const at::Tensor &input, &scale, &shift, &residual;
  int64_t dim;
};
std::optional<at::Tensor> apply_fused(const Bound&, const FusedInputs&);
// 0 <= p <= 1. Throws for a generator of another device.
std::optional<at::Tensor> apply_dropout(const Bound&, const at::Tensor& input, double p,
                                        const std::optional<at::Generator>&);
std::optional<at::Tensor> apply_linear(const Bound&, const at::Tensor& input, const at::Tensor& weight,
                                       const at::Tensor& bias);

// The gradient that grad and the bits give, as ATen calls.
at::Tensor gradient_definition(const Bound&, const at::Tensor& grad, const at::Tensor& bits,
                               c10::SymIntArrayRef stride);

// The bits as a bool tensor of grad's sizes and these strides. Throws for bits that do not fit grad.
at::Tensor kept_by_bits(const at::Tensor& grad, const at::Tensor& bits, c10::SymIntArrayRef stride);

// The registered operators have no forward-mode derivative: throws for a dual tensor.
void check_no_forward_grad(const Bound&, const at::Tensor&);

// The registered operators' kernels for the Autograd key, and, of relu_dropout, for a device.
std::tuple<at::Tensor, at::Tensor> operator_forward(const Bound&, const at::Tensor& input);
at::Tensor operator_backward(const Bound&, const at::Tensor& grad, const at::Tensor& bits, c10::SymIntArrayRef stride);
std::tuple<at::Tensor, at::Tensor> operator_dropout(const at::Tensor& input, double p, std::optional<at::Generator>);
// Throws for a p that is none.
void check_probability(double p);
std::tuple<at::Tensor, at::Tensor> dropout_on_device(const at::Tensor& input, double p, std::optional<at::Generator>);

}  // namespace relu_ext
