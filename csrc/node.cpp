#include "node.h"

#include <torch/csrc/autograd/VariableTypeUtils.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

namespace relu_ext {
namespace {

using at::Tensor;
using torch::autograd::Node;
using NodePtr = decltype(torch::autograd::Edge::function);

struct KernelBackward final : Node {
  KernelBackward(Gradients* gradients, Keeping keeping) : gradients_(gradients), keeping_(std::move(keeping)) {}

  std::string name() const override { return keeping_.bound.operation->node; }

  variable_list apply(variable_list&& grads) override;
  void release_variables() override;

  // Compiled autograd: what the graph depends on, and the same gradients as a function of tensors that it can trace.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override;
  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables&) override;

  // Undefined where there are none at hand; a backward pass that runs just now has them, and may wait, in a hook, for
  // the interpreter lock that the caller has. They are the first of what is saved.
  Tensor bits() {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || keeping_.kept != Kept::bits || saved_.empty()) return {};
    return saved_[0].variable.get_raw_data().value_or(Tensor());
  }
  c10::SymIntArrayRef stride() const { return keeping_.stride; }

  // inplace_view: the operation overwrote a view.
  void save(const Saving& saving, bool inplace_view = false) {
    saved_.push_back({{saving.tensor, saving.is_output, inplace_view}, saving.is_output});
  }

 private:
  variable_list unpacked();
  Needs needs() const;

  struct Saved {
    torch::autograd::SavedVariable variable;
    bool is_output;
  };

  Gradients* gradients_;
  Keeping keeping_;
  c10::SmallVector<Saved, 1> saved_;
};

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
  // The engine has looked, but a hook before the node, or who calls the node itself, may give anything.
  TORCH_CHECK(input_metadata(0).is_same_shape(grads[0]), name(), ": a gradient of shape ", grads[0].sym_sizes(),
              " for an output of shape ", input_metadata(0).shape_as_dim_vector());
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

// A node without edges yet.
std::pair<NodePtr, KernelBackward*> make_node(Gradients* gradients, Keeping keeping) {
  return make_owned<NodePtr, KernelBackward>(gradients, std::move(keeping));
}

}  // namespace

void set_history(const Tensor& output, Gradients* gradients, Keeping keeping, at::ArrayRef<const Tensor*> inputs,
                 at::ArrayRef<Saving> saved) {
  const auto [node, raw] = make_node(gradients, std::move(keeping));
  for (const Tensor* input : inputs)
    if (input->defined()) raw->add_next_edge(torch::autograd::impl::gradient_edge(*input));
  torch::autograd::set_history(output, node);
  for (const Saving& saving : saved) raw->save(saving);
}

void set_history_past(const Tensor& output, Gradients* gradients, Keeping keeping, const Tensor& computed_from,
                      Saving saved) {
  const auto [node, raw] = make_node(gradients, std::move(keeping));
  raw->add_next_edge(computed_from.grad_fn()->next_edge(0));
  torch::autograd::set_history(output, node);
  raw->save(saved);
}

void rebase_history(const Tensor& input, Gradients* gradients, Keeping keeping, c10::function_ref<Tensor()> overwrite) {
  const auto [node, raw] = make_node(gradients, std::move(keeping));
  // The edge is taken before the version changes: asked for at a new version, a view makes a node, which nothing needs.
  raw->add_next_edge(torch::autograd::impl::gradient_edge(input));
  const Tensor bits = overwrite();
  torch::autograd::rebase_history(input, node);
  if (bits.defined())
    raw->save({bits});
  else
    raw->save({input, /*is_output=*/true}, /*inplace_view=*/input.is_view());
}

Tensor bits_of(const Tensor& output) {
  const auto node = output.grad_fn();
  auto* const own = dynamic_cast<KernelBackward*>(node.get());
  if (!own || !c10::SymIntArrayRef(output.sym_strides()).equals(own->stride())) return {};
  return own->bits();
}

void check_inplace(const Tensor& input, bool history) { torch::autograd::check_inplace(input, history); }

}  // namespace relu_ext
