// The maths, once: a struct per activation, for every backend and instruction set. No torch.
//
// Those that keep bits:
//   keep(input)            what backward needs to know of the input: one bit
//   forward(input, keep)   the output, given that bit
//   backward(grad, keep)   the input's gradient; linear in grad, so it is its own derivative
// The others, in the type X that T is computed in; what they return is yet to be rounded to T:
//   forward(input)                 the output
//   backward<kept>(grad, value)    the input's gradient from the input or the output
// effort: what it takes to make an element.
//
// T is the type of the elements: float, double, half or bfloat16. Everything is branch-free, so that the compiler can
// turn the loop around it into vectors. Predicates are ATen's, NaN included.
#pragma once
#include <type_traits>

#include "exponential.h"
#include "kernels.h"
#include "numeric.h"

namespace relu_ext {

enum class Effort { selection, product, exponential };

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
  static constexpr bool keeps_bits = true;
  static constexpr Effort effort = Effort::selection;
  explicit Relu(const Scalars&) {}

  RELU_EXT_INLINE bool keep(T input) const { return not_at_most_0(as<X>(input)); }
  RELU_EXT_INLINE T forward(T input, bool keep) const { return select(keep, input, T{}); }
  RELU_EXT_INLINE T backward(T grad, bool keep) const { return select(keep, grad, T{}); }
};

// input clamped to low..high. The gradient passes strictly between them, as in ATen's hardtanh_backward; NaN passes.
template <class T, Device device>
struct Hardtanh {
  using X = Compared<T, device>;
  static constexpr bool keeps_bits = true;
  static constexpr Effort effort = Effort::selection;
  X below, above;  // the gradient stops at these, ...
  T low, high;     // ... the output at these: the same bounds, rounded as ATen's clamp rounds them

  explicit Hardtanh(const Scalars& scalars)
      : below(at_most<X>(Arithmetic<T>(scalars[0]))),
        above(at_least<X>(Arithmetic<T>(scalars[1]))),
        low(narrow<T>(Arithmetic<T>(scalars[0]))),
        high(narrow<T>(Arithmetic<T>(scalars[1]))) {}

  RELU_EXT_INLINE bool keep(T input) const { return between_or_nan(as<X>(input), below, above); }
  RELU_EXT_INLINE T forward(T input, bool keep) const {
    if constexpr (std::is_floating_point_v<T>) return at_most_or_nan(at_least_or_nan(input, low), high);
    return select(keep, input, select(is_above(as<X>(input), below), high, low));
  }
  RELU_EXT_INLINE T backward(T grad, bool keep) const { return select(keep, grad, T{}); }
};

// input > threshold ? input : value; NaN passes.
template <class T, Device device>
struct Threshold {
  using X = Compared<T, device>;
  static constexpr bool keeps_bits = true;
  static constexpr Effort effort = Effort::selection;
  X threshold;
  T value;

  // ATen compares with the threshold as a float on the CPU, as a T on CUDA.
  explicit Threshold(const Scalars& scalars)
      : threshold(device == Device::cpu ? at_most<X>(Arithmetic<T>(scalars[0]))
                                        : as<X>(narrow<T>(Arithmetic<T>(scalars[0])))),
        value(narrow<T>(Arithmetic<T>(scalars[1]))) {}

  RELU_EXT_INLINE bool keep(T input) const { return not_at_most(as<X>(input), threshold); }
  RELU_EXT_INLINE T forward(T input, bool keep) const { return select(keep, input, value); }
  RELU_EXT_INLINE T backward(T grad, bool keep) const { return select(keep, grad, T{}); }
};

// input > 0 ? input : input * slope. Unlike relu's, the gradient at NaN is that of the slope, as in ATen.
template <class T, Device device>
struct LeakyRelu {
  using X = Compared<T, device>;
  static constexpr bool keeps_bits = true;
  static constexpr Effort effort = Effort::product;
  Arithmetic<T> slope;

  explicit LeakyRelu(const Scalars& scalars) : slope(Arithmetic<T>(scalars[0])) {}
  RELU_EXT_INLINE explicit LeakyRelu(Arithmetic<T> slope) : slope(slope) {}

  static RELU_EXT_INLINE bool keep(T input) { return is_positive(as<X>(input)); }
  RELU_EXT_INLINE T forward(T input, bool keep) const { return backward(input, keep); }
  RELU_EXT_INLINE T backward(T grad, bool keep) const { return choose(keep, grad, narrow<T>(widen(grad) * slope)); }
  static RELU_EXT_INLINE T choose(bool keep, T value, T product) { return select(keep, value, product); }
  // What this element adds to the slope's gradient.
  static RELU_EXT_INLINE Arithmetic<T> slope_gradient(Arithmetic<T> grad, Arithmetic<T> input) {
    const Arithmetic<T> product = grad * input;
    return select(is_positive(input), Arithmetic<T>{}, product);
  }
};

// input > 0 ? scale * input : scale * alpha * (exp(input_scale * input) - 1); scalars: alpha, scale, input_scale >= 0.
// Not scaling: input_scale is 1, as it is but for celu.
template <class T, bool scaling = true>
struct Elu {
  using X = Arithmetic<T>;
  static constexpr bool keeps_bits = false;
  static constexpr Effort effort = Effort::exponential;
  X positive, negative, input_scale;

  explicit Elu(const Scalars& scalars)
      : positive(X(scalars[1])), negative(X(scalars[0]) * X(scalars[1])), input_scale(X(scalars[2])) {}

  RELU_EXT_INLINE X scaled(X value) const { return scaling ? value * input_scale : value; }
  RELU_EXT_INLINE X forward(X input) const {
    return select_product(input < 0, negative, expm1_nonpositive(scaled(input)), positive, input);
  }
  // ATen's: from the output the slope is that of a value already rounded, so it is worse in the far tail.
  template <Kept kept>
  RELU_EXT_INLINE X backward(X grad, X value) const {
    const X below = kept == Kept::input ? exp_nonpositive(scaled(value)) * negative : value + negative;
    return grad * select(value <= 0, scaled(below), positive);
  }
};

// max(x, 0); NaN passes.
template <class X>
RELU_EXT_INLINE X rectified(X x) {
  return select(x <= 0, X{}, x);
}

// max(input, 0) squared. The square root of the output, rounded to T, is max(input, 0) again wherever the square is
// neither subnormal nor infinite; the gradient is that of (r = max(input, 0)) * r in ATen, twice grad * r.
template <class T>
struct ReluSquared {
  using X = Arithmetic<T>;
  static constexpr bool keeps_bits = false;
  static constexpr Effort effort = Effort::product;

  explicit ReluSquared(const Scalars&) {}

  RELU_EXT_INLINE X forward(X input) const {
    const X root = rectified(input);
    return root * root;
  }
  template <Kept kept>
  RELU_EXT_INLINE X backward(X grad, X value) const {
    const X root = kept == Kept::input ? rectified(value) : rounded<T>(square_root(value));
    const X twice = grad * root * 2;
    return select(root <= 0, X{}, twice);
  }
};

// max(gate, 0) * up; each gradient is one product, rounded once.
struct Reglu {
  template <class X>
  static RELU_EXT_INLINE X forward(X gate, X up) {
    return rectified(gate) * up;
  }
  template <class X>
  static RELU_EXT_INLINE X grad_gate(X grad, X gate, X up) {
    return masked(!(gate <= 0), X(grad * up));
  }
  template <class X>
  static RELU_EXT_INLINE X grad_up(X grad, X gate) {
    return forward(gate, grad);
  }
};

// Of one element, whatever the activation.
template <class Activation, class T>
RELU_EXT_INLINE T output_of(const Activation& act, T input) {
  if constexpr (Activation::keeps_bits)
    return act.forward(input, act.keep(input));
  else
    return narrow<T>(act.forward(widen(input)));
}
template <Kept kept, class Activation, class T>
RELU_EXT_INLINE T gradient_of(const Activation& act, T grad, T value) {
  return narrow<T>(act.template backward<kept>(widen(grad), widen(value)));
}

}  // namespace relu_ext
