// From the names in kernels.h to types: element type and activation are template arguments from here on.
#pragma once
#include <type_traits>

#include "activations.h"
#include "kernels.h"

namespace relu_ext {

// body(T{}), T being the element type of this name.
template <class Body>
auto with_dtype(Dtype dtype, Body body) {
  switch (dtype) {
    case Dtype::float32: return body(float{});
    case Dtype::float64: return body(double{});
    case Dtype::float16: return body(half{});
    case Dtype::bfloat16: return body(bfloat16{});
  }
  __builtin_unreachable();
}

// body(act), act being the struct of this name for elements of type T on this device.
template <class T, Device device, class Body>
auto with_activation(Activation activation, const Scalars& scalars, Body body) {
  switch (activation) {
    case Activation::relu: return body(Relu<T, device>(scalars));
    case Activation::hardtanh: return body(Hardtanh<T, device>(scalars));
    case Activation::threshold: return body(Threshold<T, device>(scalars));
    case Activation::leaky_relu: return body(LeakyRelu<T, device>(scalars));
    case Activation::elu:
      // Two products less: 0.8 to 0.9 of the time on the CPU, which they keep waiting.
      if constexpr (device == Device::cpu)
        if (scalars[2] == 1) return body(Elu<T, false>(scalars));
      return body(Elu<T>(scalars));
    case Activation::relu_squared: return body(ReluSquared<T>(scalars));
  }
  __builtin_unreachable();
}

// body(std::integral_constant<Kept, kept>{}) where this activation can be given that.
template <class Activation, class Body>
auto with_kept(Kept kept, Body body) {
  if constexpr (Activation::keeps_bits) {
    return body(std::integral_constant<Kept, Kept::bits>{});
  } else {
    if (kept == Kept::input) return body(std::integral_constant<Kept, Kept::input>{});
    return body(std::integral_constant<Kept, Kept::output>{});
  }
}

}  // namespace relu_ext
