// The table of operations: one row each. Python entries, registered operators and autograd nodes are made from it.
#pragma once
#include <array>

#include "kernels.h"

namespace relu_ext {

struct Operation {
  Activation activation;
  int arguments;              // how many scalars a caller gives; the first of `scalars` stand for them
  Scalars scalars;            // what the others are
  const char* name;           // of the Python entry and, with _forward and _backward behind it, of the operators
  const char* backward;       // of the autograd node: what a tensor's grad_fn shows
  const char* recorded;       // what the profiler shows for a call,
  const char* recorded_;      // a call in place
  const char* recorded_back;  // and a gradient
};

inline constexpr std::array operations{
    Operation{Activation::relu,
              0,
              {},
              "relu",
              "ReLUBackward",  //
              "relu_ext::relu",
              "relu_ext::relu_",
              "relu_ext::relu_backward"},
    Operation{Activation::hardtanh,
              0,
              {0, 6},
              "relu6",
              "ReLU6Backward",  //
              "relu_ext::relu6",
              "relu_ext::relu6_",
              "relu_ext::relu6_backward"},
    Operation{Activation::hardtanh,
              2,
              {},
              "hardtanh",
              "HardtanhBackward",  //
              "relu_ext::hardtanh",
              "relu_ext::hardtanh_",
              "relu_ext::hardtanh_backward"},
    Operation{Activation::threshold,
              2,
              {},
              "threshold",
              "ThresholdBackward",  //
              "relu_ext::threshold",
              "relu_ext::threshold_",
              "relu_ext::threshold_backward"},
    Operation{Activation::leaky_relu,
              1,
              {},
              "leaky_relu",
              "LeakyReLUBackward",  //
              "relu_ext::leaky_relu",
              "relu_ext::leaky_relu_",
              "relu_ext::leaky_relu_backward"},
};

// An operation with the scalars of one call.
struct Bound {
  const Operation* operation;
  Scalars scalars;
};

}  // namespace relu_ext
