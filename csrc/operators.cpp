// The registered operators: torch.ops.relu_ext.NAME_forward and NAME_backward for every row of the table that keeps
// bits, which nothing else makes. Other rows have their meaning in ATen's own operators.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/empty_strided.h>
#include <torch/library.h>

#include <string>
#include <utility>

#include "autograd.h"
#include "backend.h"
#include "launch.h"

namespace relu_ext {
namespace {

using at::Tensor;
using Outputs = std::tuple<Tensor, Tensor>;

// Shapes and strides alone: Meta and Fake tensors.
c10::SymInt sym_bytes_of_bits(const Tensor& tensor) { return (tensor.sym_numel() + 7) / 8; }
Outputs meta_forward(const Tensor& input, at::ArrayRef<double>) {
  launch::checked_dtype(input);
  return {at::empty_like(input), at::empty_symint({sym_bytes_of_bits(input)}, input.options().dtype(at::kByte))};
}
Tensor meta_backward(const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride, at::ArrayRef<double>) {
  launch::checked_dtype(grad);
  launch::check_backward(grad, bits, stride);
  return at::empty_strided_symint(grad.sym_sizes(), stride, grad.options());
}

Outputs meta_dropout(const Tensor& input, double p, std::optional<at::Generator>) {
  check_probability(p);
  return meta_forward(input, {});
}

Bound checked(const Operation& operation, at::ArrayRef<double> scalars) {
  TORCH_CHECK(scalars.size() == size_t(operation.arguments), "relu_ext: ", operation.name, " has ", operation.arguments,
              " scalars, got ", scalars.size());
  const auto bound = bind(operation, scalars.data());
  TORCH_CHECK_VALUE(bound, "relu_ext: the scalars ", scalars, " are not those of a ", operation.name);
  return *bound;
}

// An operator's kernel is a plain function, so the row is a template argument here.
template <size_t row>
struct Kernels {
  static Outputs forward(const Tensor& input, at::ArrayRef<double> scalars) {
    return launch::forward_bits(checked(operations[row], scalars), input);
  }
  static Tensor backward(const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride,
                         at::ArrayRef<double> scalars) {
    return launch::backward(checked(operations[row], scalars), grad, bits, C10_AS_INTARRAYREF_SLOW(stride));
  }
  static Outputs autograd_forward(const Tensor& input, at::ArrayRef<double> scalars) {
    return operator_forward(checked(operations[row], scalars), input);
  }
  static Tensor autograd_backward(const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride,
                                  at::ArrayRef<double> scalars) {
    return operator_backward(checked(operations[row], scalars), grad, bits, stride);
  }
};

// each(std::integral_constant<size_t, row>) for every row of the table that keeps bits.
template <class Each, size_t... rows>
void for_rows(Each each, std::index_sequence<rows...>) {
  const auto where_bits = [&](auto row) {
    if constexpr (operations[row].has_operators()) each(row);
  };
  (where_bits(std::integral_constant<size_t, rows>{}), ...);
}
template <class Each>
void for_rows(Each each) {
  for_rows(each, std::make_index_sequence<operations.size()>{});
}

std::string forward_name(size_t row) { return std::string(operations[row].name) + "_forward"; }
std::string backward_name(size_t row) { return std::string(operations[row].name) + "_backward"; }

TORCH_LIBRARY(relu_ext, library) {
  for_rows([&](auto row) {
    library.def((forward_name(row) + "(Tensor input, float[] scalars=[]) -> (Tensor output, Tensor bits)").c_str());
    library.def(
        (backward_name(row) + "(Tensor grad, Tensor bits, SymInt[] stride, float[] scalars=[]) -> Tensor").c_str());
  });
  library.def("relu_dropout_forward(Tensor input, float p, Generator? generator=None) -> (Tensor output, Tensor bits)",
              {at::Tag::nondeterministic_seeded});
}

void implement_on_device(torch::Library& library) {
  for_rows([&](auto row) {
    library.impl(forward_name(row).c_str(), &Kernels<row>::forward);
    library.impl(backward_name(row).c_str(), &Kernels<row>::backward);
  });
  library.impl("relu_dropout_forward", &dropout_on_device);
}

TORCH_LIBRARY_IMPL(relu_ext, CPU, library) { implement_on_device(library); }
TORCH_LIBRARY_IMPL(relu_ext, CUDA, library) {
  if (cuda::built) implement_on_device(library);
}

TORCH_LIBRARY_IMPL(relu_ext, Meta, library) {
  for_rows([&](auto row) {
    library.impl(forward_name(row).c_str(), &meta_forward);
    library.impl(backward_name(row).c_str(), &meta_backward);
  });
  library.impl("relu_dropout_forward", &meta_dropout);
}

TORCH_LIBRARY_IMPL(relu_ext, Autograd, library) {
  for_rows([&](auto row) {
    library.impl(forward_name(row).c_str(), &Kernels<row>::autograd_forward);
    library.impl(backward_name(row).c_str(), &Kernels<row>::autograd_backward);
  });
  library.impl("relu_dropout_forward", &operator_dropout);
}

}  // namespace
}  // namespace relu_ext
