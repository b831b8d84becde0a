#include "install.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/celu_ops.h>
#include <ATen/ops/elu_ops.h>
#include <ATen/ops/hardtanh_ops.h>
#include <ATen/ops/leaky_relu_ops.h>
#include <ATen/ops/prelu_ops.h>
#include <ATen/ops/relu_ops.h>
#include <ATen/ops/threshold_ops.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <optional>
#include <string_view>
#include <type_traits>
#include <utility>

#include "autograd.h"
#include "backend.h"

namespace relu_ext {
namespace {

using at::Scalar;
using at::Tensor;
using c10::DispatchKey;

// The operators. Others of the family are composites of these: relu6 of hardtanh, selu of elu.
template <class... Operators>
struct List {};
using Installable = List<at::_ops::relu, at::_ops::relu_, at::_ops::threshold, at::_ops::threshold_, at::_ops::hardtanh,
                         at::_ops::hardtanh_, at::_ops::leaky_relu, at::_ops::leaky_relu_, at::_ops::elu,
                         at::_ops::elu_, at::_ops::celu, at::_ops::celu_, at::_ops::prelu>;

// The row of the table for "aten::relu" or "aten::relu_".
constexpr const Operation& row_of(std::string_view name) {
  name.remove_prefix(std::string_view("aten::").size());
  if (name.back() == '_') name.remove_suffix(1);
  for (const Operation& operation : operations)
    if (operation.name == name) return operation;
  throw name;  // so that it does not compile
}

// As for Python's callers: nullopt for what is no plain number, or an int that is no double.
std::optional<double> number(const Scalar& scalar) {
  if (scalar.isSymbolic()) return std::nullopt;
  if (scalar.isFloatingPoint()) return scalar.toDouble();
  if (!scalar.isIntegral(/*includeBool=*/false) || scalar.type() == at::kUInt64) return std::nullopt;
  const int64_t value = scalar.toLong();
  if (value > exact_in_double || value < -exact_in_double) return std::nullopt;
  return double(value);
}

// The operation that an operator means with these scalars; nullopt where it is one that has no kernels here.
template <class... Scalars>
std::optional<Bound> bind(const Operation& operation, const Scalars&... scalars) {
  const std::array<std::optional<double>, sizeof...(scalars)> numbers{number(scalars)...};
  std::array<double, sizeof...(scalars)> given;
  for (size_t i = 0; i < given.size(); ++i) {
    if (!numbers[i]) return std::nullopt;
    given[i] = *numbers[i];
  }
  // ATen's elu has two scalars that elu leaves alone and selu sets.
  const auto means = [&](const Operation& row) {
    return std::equal(given.begin() + row.arguments, given.end(), row.scalars.begin() + row.arguments);
  };
  constexpr const Operation& selu = row_of("aten::selu");
  if (means(operation)) return relu_ext::bind(operation, given.data());
  if (operation.activation == Activation::elu && means(selu)) return relu_ext::bind(selu, given.data());
  return std::nullopt;
}

// Where PyTorch's own kernel is while ours takes the place for a device: it is registered for the alias Autograd, of a
// composite for CompositeImplicitAutograd, and so is at AutogradOther too, where no device looks for it.
c10::DispatchKeySet beneath(c10::DispatchKeySet keys) {
  return (keys & c10::after_autograd_keyset).add(DispatchKey::AutogradOther);
}

// One kernel an operator, by its signature. Nothing here has a state, so that a call in flight survives uninstall().
template <class Operator, class Schema = typename Operator::schema>
struct Kernel;

template <class Operator, class... Scalars>
struct Kernel<Operator, Tensor(const Tensor&, Scalars...)> {
  static Tensor call(c10::DispatchKeySet keys, const Tensor& input, Scalars... scalars) {
    if (const auto bound = bind(row_of(Operator::name), scalars...))
      if (auto output = apply(*bound, input)) return std::move(*output);
    return Operator::redispatch(beneath(keys), input, scalars...);
  }
};

template <class Operator, class... Scalars>
struct Kernel<Operator, Tensor&(Tensor&, Scalars...)> {
  static Tensor& call(c10::DispatchKeySet keys, Tensor& input, Scalars... scalars) {
    const auto bound = bind(row_of(Operator::name), scalars...);
    if (bound && apply_(*bound, input)) return input;
    return Operator::redispatch(beneath(keys), input, scalars...);
  }
};

template <class Operator>
struct Kernel<Operator, Tensor(const Tensor&, const Tensor&)> {
  static Tensor call(c10::DispatchKeySet keys, const Tensor& input, const Tensor& weight) {
    if (auto output = apply_prelu({&row_of(Operator::name), {}}, input, weight)) return std::move(*output);
    return Operator::redispatch(beneath(keys), input, weight);
  }
};

template <class Operator>
void implement(torch::Library& library, DispatchKey key) {
  const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow(Operator::name, Operator::overload_name);
  TORCH_CHECK(!handle.hasKernelForDispatchKey(key), "relu_ext.install: ", Operator::name, " has a kernel for ", key,
              " that is not PyTorch's own");
  // The function is a part of its type: see above.
  using Function = std::remove_reference_t<decltype(Kernel<Operator>::call)>;
  library.impl(Operator::name, c10::CompileTimeFunctionPointer<Function, Kernel<Operator>::call>());
}

template <class... Operators>
torch::Library implemented(DispatchKey key, List<Operators...>) {
  torch::Library library(torch::Library::IMPL, "aten", key, __FILE__, __LINE__);
  (implement<Operators>(library, key), ...);
  return library;
}

template <class... Operators>
std::vector<std::string> names(List<Operators...>) {
  return {Operators::name...};
}

// What is installed; the interpreter lock guards it.
std::vector<torch::Library>& libraries() {
  static std::vector<torch::Library> libraries;
  return libraries;
}

}  // namespace

void install() {
  if (is_installed()) return;
  std::vector<torch::Library> made;
  made.push_back(implemented(DispatchKey::AutogradCPU, Installable{}));
  if (cuda::built) made.push_back(implemented(DispatchKey::AutogradCUDA, Installable{}));
  libraries() = std::move(made);
}

void uninstall() { libraries().clear(); }

bool is_installed() { return !libraries().empty(); }

std::vector<std::string> installable() { return names(Installable{}); }

}  // namespace relu_ext
