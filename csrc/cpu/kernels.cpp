// From a description of the work to the loop that does it.
#include "../kernels.h"

#include "../dispatch.h"
#include "loops.h"
#include "staged.h"

namespace relu_ext::cpu {
namespace {

// What computes in float16 does so in chunks of float.
template <class T, class Activation>
constexpr bool staged = std::is_same_v<T, half> && Activation::computes;

template <class Body>
void with_types(Dtype dtype, relu_ext::Activation activation, const Scalars& scalars, Body body) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    with_activation<T, Device::cpu>(activation, scalars, [&](auto act) { body(element, act); });
  });
}

template <class Activation, class T>
void run_forward(Activation act, const T* input, T* output, uint8_t* bits, int64_t begin, int64_t end) {
  if (bits)
    vectorised([=]() RELU_EXT_INLINE_LAMBDA { forward_bits_loop(act, input, output, bits, begin, end); });
  else
    vectorised([=]() RELU_EXT_INLINE_LAMBDA { forward_loop(act, input, output, begin, end); });
}

template <class Activation, class T>
void run_backward(Activation act, const T* grad, const uint8_t* bits, T* output, int64_t begin, int64_t end) {
  vectorised([=]() RELU_EXT_INLINE_LAMBDA { backward_loop(act, grad, bits, output, begin, end); });
}

}  // namespace

void forward(const Forward& work, int64_t begin, int64_t end) {
  with_types(work.dtype, work.activation, work.scalars, [&](auto element, auto act) {
    using T = decltype(element);
    const auto input = static_cast<const T*>(work.input);
    const auto output = static_cast<T*>(work.output);
    if constexpr (staged<T, decltype(act)>) {
      with_activation<float, Device::cpu>(work.activation, work.scalars, [&](auto act) {
        in_chunks(input, output, begin, end, [&](const float* wide, float* result, int64_t i, int count) {
          run_forward(act, wide, result, work.bits ? work.bits + i / 8 : nullptr, 0, count);
        });
      });
    } else {
      run_forward(act, input, output, work.bits, begin, end);
    }
  });
}

void backward(const Backward& work, int64_t begin, int64_t end) {
  with_types(work.dtype, work.activation, work.scalars, [&](auto element, auto act) {
    using T = decltype(element);
    const auto grad = static_cast<const T*>(work.grad);
    const auto output = static_cast<T*>(work.output);
    if constexpr (staged<T, decltype(act)>) {
      with_activation<float, Device::cpu>(work.activation, work.scalars, [&](auto act) {
        in_chunks(grad, output, begin, end, [&](const float* wide, float* result, int64_t i, int count) {
          run_backward(act, wide, work.bits + i / 8, result, 0, count);
        });
      });
    } else {
      run_backward(act, grad, work.bits, output, begin, end);
    }
  });
}

}  // namespace relu_ext::cpu
