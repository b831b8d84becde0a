// The maths, once: a struct per activation, for every backend and instruction set. No torch.
//
//   keep(input)            what backward needs to know of the input: one bit
//   forward(input, keep)   the output, given that bit
//   backward(grad, keep)   the input's gradient; linear in grad, so it is its own derivative
//
// T is an element type: float, double, half or bfloat16. Everything is branch-free, so that the compiler can turn the
// loop around it into vectors. Predicates are ATen's, NaN included.
#pragma once
#include "numeric.h"

namespace relu_ext {

// max(input, 0); NaN passes, and so does its gradient, as in ATen's threshold_backward.
struct Relu {
  template <class T>
  RELU_EXT_INLINE bool keep(T input) const {
    return !(input <= T{});
  }
  template <class T>
  RELU_EXT_INLINE T forward(T input, bool keep) const {
    return select(keep, input, T{});
  }
  template <class T>
  RELU_EXT_INLINE T backward(T grad, bool keep) const {
    return select(keep, grad, T{});
  }
};

}  // namespace relu_ext
