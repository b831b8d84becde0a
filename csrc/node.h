// The node of the autograd graph, for every operation. What depends on torch's private autograd API, which changes
// between releases, is in node.cpp.
#pragma once
#include <ATen/core/Tensor.h>
#include <c10/core/SymIntArrayRef.h>
#include <c10/util/DimVector.h>
#include <c10/util/FunctionRef.h>

#include <array>
#include <vector>

#include "operations.h"

namespace relu_ext {

using variable_list = std::vector<at::Tensor>;

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

struct Saving {
  const at::Tensor& tensor;
  bool is_output = false;  // of the node itself
};

// Makes output the result of a node that leads to the inputs, those that are defined, and keeps what is saved.
void set_history(const at::Tensor& output, Gradients*, Keeping, at::ArrayRef<const at::Tensor*> inputs,
                 at::ArrayRef<Saving> saved);

// The same for what was computed from the output of a function, but is one of that function's input.
void set_history_past(const at::Tensor& output, Gradients*, Keeping, const at::Tensor& computed_from, Saving saved);

// In place. overwrite() changes the input and its version; it returns the bits, or an undefined tensor where the output
// itself is saved.
void rebase_history(const at::Tensor& input, Gradients*, Keeping, c10::function_ref<at::Tensor()> overwrite);

// The bits that output's node keeps, in output's memory order; undefined where it keeps none, or hooks for saved
// tensors (checkpointing, offloading) have taken them away.
at::Tensor bits_of(const at::Tensor& output);

// Throws PyTorch's own errors for a tensor that may not be overwritten.
void check_inplace(const at::Tensor& input, bool history);

}  // namespace relu_ext
