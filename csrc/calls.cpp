#include "calls.h"

namespace relu_ext {
namespace {

using at::Tensor;

c10::OperatorHandle find(const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
}

at::ArrayRef<double> arguments(const Bound& bound) {
  return {bound.scalars.data(), size_t(bound.operation->arguments)};
}

}  // namespace

Registered::Registered(const Operation& operation)
    : recorded(std::string("relu_ext::") + operation.name),
      recorded_in_place(recorded + "_"),
      recorded_backward(recorded + "_backward") {
  if (!operation.has_operators()) return;
  forward = find(recorded + "_forward").typed<Forward>();
  backward = find(recorded_backward).typed<Backward>();
}

const Registered& registered(const Bound& bound) {
  static const std::vector<Registered> rows(operations.begin(), operations.end());
  return rows[bound.operation - operations.data()];
}

Outputs call_forward(const Bound& bound, const Tensor& input) {
  return registered(bound).forward->call(input, arguments(bound));
}
Tensor call_backward(const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  return registered(bound).backward->call(grad, bits, stride, arguments(bound));
}

}  // namespace relu_ext
