// Calls that PyTorch sees: the registered operators through its dispatcher, and kernels recorded for its profiler.
#pragma once
#include <ATen/SequenceNumber.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/record_function.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "operations.h"

namespace relu_ext {

using Outputs = std::tuple<at::Tensor, at::Tensor>;  // output, bits

// What the dispatcher has under a row's name, and what the profiler shows for it.
struct Registered {
  using Forward = Outputs(const at::Tensor&, at::ArrayRef<double>);
  using Backward = at::Tensor(const at::Tensor&, const at::Tensor&, c10::SymIntArrayRef, at::ArrayRef<double>);

  std::string recorded, recorded_in_place, recorded_backward;
  std::optional<c10::TypedOperatorHandle<Forward>> forward;  // of rows that keep bits
  std::optional<c10::TypedOperatorHandle<Backward>> backward;

  explicit Registered(const Operation&);
};

const Registered& registered(const Bound&);

// The registered operators of a row that keeps bits.
Outputs call_forward(const Bound&, const at::Tensor& input);
at::Tensor call_backward(const Bound&, const at::Tensor& grad, const at::Tensor& bits, c10::SymIntArrayRef stride);

// call(), shown by the profiler under this name. As the dispatcher does it: without a profiler nothing is constructed.
template <class Call>
auto recorded(const Bound& bound, std::string Registered::* name, std::initializer_list<const at::Tensor*> inputs,
              bool history, Call call) {
  auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
  if (!callbacks) return call();
  at::RecordFunction guard(std::move(*callbacks));
  const char* const shown = (registered(bound).*name).c_str();
  const int64_t sequence = history ? int64_t(at::sequence_number::peek()) : -1;  // leads the profiler to the backward
  if (guard.needsInputs()) {
    std::vector<c10::IValue> values;
    for (const at::Tensor* input : inputs) values.emplace_back(*input);
    guard.before(shown, &values, sequence);
  } else {
    guard.before(shown, sequence);
  }
  return call();
}

template <class Call>
auto below_autograd(Call call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call();
}

}  // namespace relu_ext
