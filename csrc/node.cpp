#include "node.h"

#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <type_traits>
#include <vector>

namespace relu_ext {

using torch::autograd::Node;

// torch 2.11 holds nodes in a std::shared_ptr and frees them with deleteNode, 2.13 in a c10::intrusive_ptr.
template <class Ptr, class T, class... Args>
std::pair<Ptr, T*> make_owned(Args&&... args) {
  if constexpr (std::is_same_v<Ptr, std::shared_ptr<Node>>) {
    T* const raw = new T(std::forward<Args>(args)...);
    return {Ptr(raw, [](auto* node) { deleteNode(node); }), raw};
  } else {
    auto node = c10::make_intrusive<T>(std::forward<Args>(args)...);
    T* const raw = node.get();
    return {Ptr(std::move(node)), raw};
  }
}

variable_list KernelBackward::unpacked() {
  variable_list tensors;
  tensors.reserve(saved_.size());
  for (const auto& [variable, is_output] : saved_) tensors.push_back(variable.unpack(is_output ? getptr() : nullptr));
  return tensors;
}

Needs KernelBackward::needs() const {
  Needs needs{};
  for (size_t i = 0; i < num_outputs(); ++i) needs[i] = task_should_compute_output(i);
  return needs;
}

variable_list KernelBackward::apply(variable_list&& grads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!grads[0].defined()) return variable_list(num_outputs());
  variable_list gradients = gradients_(keeping_, grads[0], unpacked(), needs());
  gradients.resize(num_outputs());
  return gradients;
}

void KernelBackward::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (auto& saved : saved_) saved.variable.reset_data();
}

void KernelBackward::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  args.collect(std::string(keeping_.bound.operation->name));
  for (const double scalar : keeping_.bound.scalars) args.collect(scalar);
  args.collect(int64_t(keeping_.kept));
  args.collect(c10::SymIntArrayRef(keeping_.stride));
  args.collect(keeping_.dim);
  args.collect(keeping_.factor);
  for (const auto& [variable, is_output] : saved_) args.collect(variable, is_output);
}

variable_list KernelBackward::apply_with_saved(const variable_list& grads,
                                               torch::dynamo::autograd::SwapSavedVariables& saved) {
  namespace compiled = torch::dynamo::autograd;
  using Stride = std::vector<c10::SymInt>;

  const auto traced = [gradients = gradients_, keeping = keeping_, inputs = num_outputs()](
                          const variable_list& grads, const std::vector<c10::IValue>& packed) {
    compiled::PackedArgs args(packed);
    const auto tensors = args.unpack<variable_list>();
    const auto stride = args.unpack<Stride>();
    const auto needs = args.unpack<Needs>();
    if (!grads[0].defined()) return variable_list(inputs);
    Keeping traced = keeping;
    traced.stride.assign(stride.begin(), stride.end());
    variable_list results = gradients(traced, grads[0], tensors, needs);
    results.resize(inputs);
    return results;
  };

  for (auto& own : saved_) saved.before(own.variable);
  saved.before(keeping_.stride);
  compiled::PackedArgs packed;
  packed.pack(unpacked());
  packed.pack(Stride(keeping_.stride.begin(), keeping_.stride.end()));
  packed.pack(needs());
  const std::vector<at::TypePtr> schema{compiled::IValuePacker<variable_list>::packed_type(),
                                        compiled::IValuePacker<Stride>::packed_type(),
                                        compiled::IValuePacker<Needs>::packed_type()};
  const auto metadata = compiled::IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
      compiled::get_input_metadata(next_edges()));
  const auto& compiler = compiled::getPyCompilerInterface();
  const auto function = compiler->bind_function(saved.get_py_compiler(), name(), traced, schema,
                                                /*is_custom_function=*/true, /*is_traceable=*/true);
  auto inputs = compiler->call_function(saved.get_py_compiler(), "apply_functional", function, grads,
                                        std::move(packed).vec(), metadata);
  for (auto& own : saved_) saved.after(own.variable);
  saved.after(keeping_.stride);
  return inputs;
}

std::pair<NodePtr, KernelBackward*> make_node(Gradients* gradients, Keeping keeping,
                                              at::ArrayRef<torch::autograd::Edge> edges) {
  auto made = make_owned<NodePtr, KernelBackward>(gradients, std::move(keeping));
  for (const auto& edge : edges) made.second->add_next_edge(edge);
  return made;
}

}  // namespace relu_ext
