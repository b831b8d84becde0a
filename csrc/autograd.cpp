#include "autograd.h"

#include <ATen/SequenceNumber.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/where.h>
#include <ATen/record_function.h>
#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "gate.h"
#include "launch.h"

namespace relu_ext {
namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

using Outputs = std::tuple<Tensor, Tensor>;  // output, bits

// torch 2.11 holds nodes in a std::shared_ptr and frees them with deleteNode, 2.13 in a c10::intrusive_ptr.
using NodePtr = decltype(torch::autograd::Edge::function);

template <class T, class... Args>
std::pair<NodePtr, T*> make_node(Args&&... args) {
  if constexpr (std::is_same_v<NodePtr, std::shared_ptr<Node>>) {
    T* const raw = new T(std::forward<Args>(args)...);
    return {NodePtr(raw, [](auto* node) { deleteNode(node); }), raw};
  } else {
    auto node = c10::make_intrusive<T>(std::forward<Args>(args)...);
    T* const raw = node.get();
    return {NodePtr(std::move(node)), raw};
  }
}

// call(), shown by the profiler under this name. As the dispatcher does it: without a profiler nothing is constructed.
template <class Call>
auto recorded(const char* name, std::initializer_list<const Tensor*> inputs, bool history, Call call) {
  auto callbacks = at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION);
  if (!callbacks) return call();
  at::RecordFunction guard(std::move(*callbacks));
  const int64_t sequence = history ? int64_t(at::sequence_number::peek()) : -1;  // leads the profiler to the backward
  if (guard.needsInputs()) {
    std::vector<c10::IValue> values;
    for (const Tensor* input : inputs) values.emplace_back(*input);
    guard.before(name, &values, sequence);
  } else {
    guard.before(name, sequence);
  }
  return call();
}

// The registered operators, through the dispatcher.
struct Registered {
  using Forward = Outputs(const Tensor&, at::ArrayRef<double>);
  using Backward = Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, at::ArrayRef<double>);

  c10::TypedOperatorHandle<Forward> forward;
  c10::TypedOperatorHandle<Backward> backward;

  explicit Registered(const Operation& operation)
      : forward(find(operation, "_forward").typed<Forward>()),
        backward(find(operation, "_backward").typed<Backward>()) {}

  static c10::OperatorHandle find(const Operation& operation, const char* suffix) {
    const auto name = std::string("relu_ext::") + operation.name + suffix;
    return c10::Dispatcher::singleton().findSchemaOrThrow(name.c_str(), "");
  }
};

const Registered& registered(const Bound& bound) {
  static const std::vector<Registered> rows(operations.begin(), operations.end());
  return rows[bound.operation - operations.data()];
}
at::ArrayRef<double> arguments(const Bound& bound) {
  return {bound.scalars.data(), size_t(bound.operation->arguments)};
}

Outputs call_forward(const Bound& bound, const Tensor& input) {
  return registered(bound).forward.call(input, arguments(bound));
}
Tensor call_backward(const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  return registered(bound).backward.call(grad, bits, stride, arguments(bound));
}

// The same function of grad as ATen calls, for gradients that the kernels do not take: PyTorch then batches,
// differentiates or traces them itself.
Tensor gradient_definition(const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  const Tensor position = at::arange(8, bits.options());
  const Tensor keep = bits.unsqueeze(1).__rshift__(position).__and__(1).to(at::kBool).flatten();
  const Tensor kept = keep.as_strided_symint(grad.sym_sizes(), stride);
  if (bound.operation->activation == Activation::leaky_relu) return at::where(kept, grad, grad.mul(bound.scalars[0]));
  return at::where(kept, grad, 0);
}

Tensor gradient(const Bound&, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride);

// Saves the bits of one activation and the strides that they follow; gives the input's gradient.
struct BitsBackward final : Node {
  BitsBackward(const Bound& bound, c10::SymIntArrayRef stride) : bound_(bound), stride_(stride.begin(), stride.end()) {}

  std::string name() const override { return bound_.operation->backward; }

  variable_list apply(variable_list&& grads) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    variable_list inputs(1);
    if (grads[0].defined() && task_should_compute_output(0))
      inputs[0] = gradient(bound_, grads[0], bits_.unpack(), stride_);
    return inputs;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    bits_.reset_data();
  }

  // Compiled autograd: what the graph depends on, and the same gradient as a function of tensors that it can trace.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(std::string(bound_.operation->name));
    for (const double scalar : bound_.scalars) args.collect(scalar);
    args.collect(bits_, /*is_output=*/false);
    args.collect(c10::SymIntArrayRef(stride_));
  }
  variable_list apply_with_saved(const variable_list& grads,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override;

  Bound bound_;
  c10::SymDimVector stride_;
  SavedVariable bits_;
};

variable_list BitsBackward::apply_with_saved(const variable_list& grads,
                                             torch::dynamo::autograd::SwapSavedVariables& saved) {
  namespace compiled = torch::dynamo::autograd;
  using Stride = std::vector<c10::SymInt>;

  const auto traced = [bound = bound_](const variable_list& grads, const std::vector<c10::IValue>& packed) {
    compiled::PackedArgs args(packed);
    const auto bits = args.unpack<Tensor>();
    const auto stride = args.unpack<Stride>();
    const auto needed = args.unpack<bool>();
    variable_list inputs(1);
    if (needed && grads[0].defined()) inputs[0] = gradient(bound, grads[0], bits, stride);
    return inputs;
  };

  saved.before(bits_);
  saved.before(stride_);
  compiled::PackedArgs packed;
  packed.pack(bits_.unpack());
  packed.pack(Stride(stride_.begin(), stride_.end()));
  packed.pack(task_should_compute_output(0));
  const std::vector<at::TypePtr> schema{at::TensorType::get(), compiled::IValuePacker<Stride>::packed_type(),
                                        at::BoolType::get()};
  const auto metadata = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
      compiled::get_input_metadata(next_edges()));
  const auto& compiler = compiled::getPyCompilerInterface();
  const auto bound = compiler->bind_function(saved.get_py_compiler(), name(), traced, schema,
                                             /*is_custom_function=*/true, /*is_traceable=*/true);
  auto inputs = compiler->call_function(saved.get_py_compiler(), "apply_functional", bound, grads,
                                        std::move(packed).vec(), metadata);
  saved.after(bits_);
  saved.after(stride_);
  return inputs;
}

// A node between `input` and what is about to be computed from it.
std::pair<NodePtr, BitsBackward*> node_after(const Bound& bound, const Tensor& input, c10::SymIntArrayRef stride) {
  auto made = make_node<BitsBackward>(bound, stride);
  made.first->add_next_edge(torch::autograd::impl::gradient_edge(input));
  return made;
}

// launch(input) -> output, bits: with the node that remembers the bits.
template <class Launch>
Outputs forward_with_history(const Bound& bound, const Tensor& input, Launch launch) {
  Outputs outputs = launch(bound, input);
  auto& [output, bits] = outputs;
  const auto [node, raw] = node_after(bound, input, output.sym_strides());
  torch::autograd::set_history(output, node);
  raw->bits_ = SavedVariable(bits, /*is_output=*/false);
  return outputs;
}

// launch(grad, bits, stride) -> gradient. It is linear in grad and so its own derivative: the same node again.
template <class Stride, class Launch>
Tensor gradient_with_history(const Bound& bound, const Tensor& grad, const Tensor& bits, Stride stride, Launch launch) {
  Tensor result = launch(bound, grad, bits, stride);
  const auto [node, raw] = node_after(bound, grad, result.sym_strides());
  torch::autograd::set_history(result, node);
  raw->bits_ = SavedVariable(bits, /*is_output=*/false);
  return result;
}

Tensor gradient(const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  const auto keys = effective_keys(grad);
  const Road taken = road(grad, keys);
  if (taken == Road::definition || effective_keys(bits) - keys::ours != keys - keys::ours)
    return gradient_definition(bound, grad, bits, stride);
  if (taken == Road::operators) return call_backward(bound, grad, bits, stride);
  const auto concrete = C10_AS_INTARRAYREF_SLOW(stride);
  const bool history = records_history(grad, keys);
  return recorded(bound.operation->recorded_back, {&grad, &bits}, history, [&] {
    if (!history) return launch::backward(bound, grad, bits, concrete);
    return gradient_with_history(bound, grad, bits, concrete, launch::backward);
  });
}

template <class Call>
auto below_autograd(Call call) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call();
}

void check_no_forward_grad(const Bound& bound, const Tensor& tensor) {
  TORCH_CHECK_NOT_IMPLEMENTED(!tensor._fw_grad(/*level=*/0).defined(),
                              "relu_ext: the operators have no forward-mode "
                              "derivative; call relu_ext.",
                              bound.operation->name, "(), which has one");
}

}  // namespace

std::optional<Tensor> apply(const Bound& bound, const Tensor& input) {
  const auto keys = effective_keys(input);
  const Road taken = road(input, keys);
  if (taken == Road::definition || !input.is_non_overlapping_and_dense()) return std::nullopt;
  const bool history = records_history(input, keys);
  // What is kept for backward must not depend on modes; without history nothing is kept, and the definition serves.
  if (taken == Road::operators) {
    if (!history) return std::nullopt;
    return std::get<0>(call_forward(bound, input));
  }
  return recorded(bound.operation->recorded, {&input}, history, [&] {
    if (!history) return launch::forward(bound, input);
    return std::get<0>(forward_with_history(bound, input, launch::forward_bits));
  });
}

bool apply_(const Bound& bound, const Tensor& input) {
  const auto keys = effective_keys(input);
  const Road taken = road(input, keys);
  if (taken == Road::definition || !input.is_non_overlapping_and_dense()) return false;
  const bool history = records_history(input, keys);
  if (taken == Road::operators && !history) return false;
  torch::autograd::check_inplace(input, history);
  const auto bump_version = [&] {
    if (keys.has_any(keys::inplace)) torch::autograd::increment_version(input);
  };
  recorded(bound.operation->recorded_, {&input}, history, [&] {
    if (!history) {
      launch::forward_(bound, input);
      return bump_version();
    }
    // The edge is taken before the version changes: a view's history is made anew when it is asked for at a new
    // version.
    const auto [node, raw] = node_after(bound, input, input.sym_strides());
    const Tensor bits = taken == Road::kernel ? launch::forward_bits_(bound, input) : below_autograd([&] {
      auto [output, bits] = call_forward(bound, input);
      input.copy_(output);
      return bits;
    });
    bump_version();
    torch::autograd::rebase_history(input, node);
    raw->bits_ = SavedVariable(bits, /*is_output=*/false);
  });
  return true;
}

Outputs operator_forward(const Bound& bound, const Tensor& input) {
  check_no_forward_grad(bound, input);
  const auto launch = [](const Bound& bound, const Tensor& input) {
    return below_autograd([&] { return call_forward(bound, input); });
  };
  if (!records_history(input, effective_keys(input))) return launch(bound, input);
  return forward_with_history(bound, input, launch);
}

Tensor operator_backward(const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
  check_no_forward_grad(bound, grad);
  const auto launch = [](const Bound& bound, const Tensor& grad, const Tensor& bits, c10::SymIntArrayRef stride) {
    return below_autograd([&] { return call_backward(bound, grad, bits, stride); });
  };
  if (!records_history(grad, effective_keys(grad))) return launch(bound, grad, bits, stride);
  return gradient_with_history(bound, grad, bits, stride, launch);
}

}  // namespace relu_ext
