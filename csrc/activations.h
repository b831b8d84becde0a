// The maths, once: a struct per activation, for every backend and instruction set. No torch.
//
//   keep(input)            what backward needs to know of the input: one bit
//   forward(input, keep)   the output, given that bit
//   backward(grad, keep)   the input's gradient; linear in grad, so it is its own derivative
//   computes               whether forward or backward do more than select
//
// T is the type of the elements: float, double, half or bfloat16. Everything is branch-free, so that the compiler can
// turn the loop around it into vectors. Predicates are ATen's, NaN included.
#pragma once
#include <type_traits>

#include "kernels.h"
#include "numeric.h"

namespace relu_ext {

// Which type a comparison is made in, and a scalar rounded to, depends on the device.
enum class Device { cpu, cuda };

// On the CPU 16-bit floats are compared as they are, as many to a vector as there are. On CUDA a 16-bit float is
// compared as the float of equal value: one instruction to convert and one to compare, where integers take six.
template <class T, Device device>
using Compared = std::conditional_t<device == Device::cpu, T, Arithmetic<T>>;

template <class X, class T>
RELU_EXT_INLINE X as(T value) {
  if constexpr (std::is_same_v<X, T>)
    return value;
  else
    return widen(value);
}

// max(input, 0); NaN passes, and so does its gradient, as in ATen's threshold_backward.
template <class T, Device device>
struct Relu {
  using X = Compared<T, device>;
  static constexpr bool computes = false;
  explicit Relu(const Scalars&) {}

  RELU_EXT_INLINE bool keep(T input) const { return !(as<X>(input) <= X{}); }
  RELU_EXT_INLINE T forward(T input, bool keep) const { return select(keep, input, T{}); }
  RELU_EXT_INLINE T backward(T grad, bool keep) const { return select(keep, grad, T{}); }
};

// input clamped to low..high. The gradient passes strictly between them, as in ATen's hardtanh_backward; NaN passes.
template <class T, Device device>
struct Hardtanh {
  using X = Compared<T, device>;
  static constexpr bool computes = false;
  X below, above;  // the gradient stops at these, ...
  T low, high;     // ... the output at these: the same bounds, rounded as ATen's clamp rounds them

  explicit Hardtanh(const Scalars& scalars)
      : below(at_most<X>(Arithmetic<T>(scalars[0]))),
        above(at_least<X>(Arithmetic<T>(scalars[1]))),
        low(narrow<T>(Arithmetic<T>(scalars[0]))),
        high(narrow<T>(Arithmetic<T>(scalars[1]))) {}

  RELU_EXT_INLINE bool keep(T input) const {
    const X x = as<X>(input);
    return !((x <= below) | (above <= x));
  }
  RELU_EXT_INLINE T forward(T input, bool keep) const {
    const T bound = select(as<X>(input) <= below, low, high);
    return select(keep, input, bound);
  }
  RELU_EXT_INLINE T backward(T grad, bool keep) const { return select(keep, grad, T{}); }
};

// input > threshold ? input : value; NaN passes.
template <class T, Device device>
struct Threshold {
  using X = Compared<T, device>;
  static constexpr bool computes = false;
  X threshold;
  T value;

  // ATen compares with the threshold as a float on the CPU, as a T on CUDA.
  explicit Threshold(const Scalars& scalars)
      : threshold(device == Device::cpu ? at_most<X>(Arithmetic<T>(scalars[0]))
                                        : as<X>(narrow<T>(Arithmetic<T>(scalars[0])))),
        value(narrow<T>(Arithmetic<T>(scalars[1]))) {}

  RELU_EXT_INLINE bool keep(T input) const { return !(as<X>(input) <= threshold); }
  RELU_EXT_INLINE T forward(T input, bool keep) const { return select(keep, input, value); }
  RELU_EXT_INLINE T backward(T grad, bool keep) const { return select(keep, grad, T{}); }
};

// input > 0 ? input : input * slope. Unlike relu's, the gradient at NaN is that of the slope, as in ATen.
template <class T, Device device>
struct LeakyRelu {
  using X = Compared<T, device>;
  static constexpr bool computes = true;
  Arithmetic<T> slope;

  explicit LeakyRelu(const Scalars& scalars) : slope(Arithmetic<T>(scalars[0])) {}

  RELU_EXT_INLINE bool keep(T input) const { return is_positive(as<X>(input)); }
  RELU_EXT_INLINE T forward(T input, bool keep) const { return backward(input, keep); }
  RELU_EXT_INLINE T backward(T grad, bool keep) const {
    const T scaled = narrow<T>(widen(grad) * slope);
    return select(keep, grad, scaled);
  }
};

}  // namespace relu_ext
