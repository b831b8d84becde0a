// The node of the autograd graph, for every operation. It and autograd.cpp depend on torch's private autograd API,
// which changes between releases; nothing else does.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>

#include <array>
#include <string>
#include <utility>

#include "operations.h"

namespace relu_ext {

using torch::autograd::variable_list;
using NodePtr = decltype(torch::autograd::Edge::function);

// An operation's most inputs.
constexpr size_t most_inputs = 4;
using Needs = std::array<bool, most_inputs>;

// What a node keeps beside tensors. stride: of the forward's output, which the bits follow. dim: of the channels.
// factor: of dropout.
struct Keeping {
  Bound bound;
  Kept kept;
  c10::SymDimVector stride;
  int64_t dim = 0;
  double factor = 0;
};

// The gradients of those inputs that are needed; more than there are inputs, or fewer, where they are undefined.
using Gradients = variable_list(const Keeping&, const at::Tensor& grad, const variable_list& saved, const Needs&);

struct KernelBackward final : torch::autograd::Node {
  KernelBackward(Gradients* gradients, Keeping keeping) : gradients_(gradients), keeping_(std::move(keeping)) {}

  std::string name() const override { return keeping_.bound.operation->node; }

  variable_list apply(variable_list&& grads) override;
  void release_variables() override;

  // Compiled autograd: what the graph depends on, and the same gradients as a function of tensors that it can trace.
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override;
  variable_list apply_with_saved(const variable_list& grads, torch::dynamo::autograd::SwapSavedVariables&) override;

  // is_output: of this node. inplace_view: the operation overwrote a view.
  void save(const at::Tensor& tensor, bool is_output = false, bool inplace_view = false) {
    saved_.push_back({{tensor, is_output, inplace_view}, is_output});
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

// A node that leads to these edges, one an input.
std::pair<NodePtr, KernelBackward*> make_node(Gradients*, Keeping, at::ArrayRef<torch::autograd::Edge>);

}  // namespace relu_ext
