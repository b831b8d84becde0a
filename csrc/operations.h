// The table of operations: one row each. Python entries, registered operators and autograd nodes are made from it.
#pragma once
#include <array>

#include "kernels.h"

namespace relu_ext {

struct Operation {
  Activation activation;
  const char* name;           // of the Python entry and, with _forward and _backward behind it, of the operators
  const char* backward;       // of the autograd node: what a tensor's grad_fn shows
  const char* recorded;       // what the profiler shows for a call,
  const char* recorded_;      // a call in place
  const char* recorded_back;  // and a gradient
};

inline constexpr std::array operations{
    Operation{Activation::relu, "relu", "ReLUBackward", "relu_ext::relu", "relu_ext::relu_", "relu_ext::relu_backward"},
};

}  // namespace relu_ext
