// From a description of the work to the loop that does it.
#include "../kernels.h"

#include "../dispatch.h"
#include "loops.h"

namespace relu_ext::cpu {

void forward(const Forward& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto input = static_cast<const T*>(work.input);
    const auto output = static_cast<T*>(work.output);
    uint8_t* const bits = work.bits;
    with_activation(work.activation, [&](auto act) {
      if (bits)
        vectorised([=]() RELU_EXT_INLINE_LAMBDA { forward_bits_loop(act, input, output, bits, begin, end); });
      else
        vectorised([=]() RELU_EXT_INLINE_LAMBDA { forward_loop(act, input, output, begin, end); });
    });
  });
}

void backward(const Backward& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto grad = static_cast<const T*>(work.grad);
    const auto output = static_cast<T*>(work.output);
    const uint8_t* const bits = work.bits;
    with_activation(work.activation, [&](auto act) {
      vectorised([=]() RELU_EXT_INLINE_LAMBDA { backward_loop(act, grad, bits, output, begin, end); });
    });
  });
}

}  // namespace relu_ext::cpu
