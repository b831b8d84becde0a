// From a description of the work to the loop that does it.
#include "../kernels.h"

#include <array>
#include <type_traits>

#include "../dispatch.h"
#include "loops.h"
#include "staged.h"

namespace relu_ext::cpu {
namespace {

// What computes in float16 does so in chunks of float.
template <class T, class Activation>
constexpr bool staged = std::is_same_v<T, half> && Activation::computes;

// body(T{}, act) with the types of this work.
template <class Work, class Body>
void with_types(const Work& work, Body body) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    with_activation<T, Device::cpu>(work.activation, work.scalars, [&](auto act) { body(element, act); });
  });
}

template <class Activation, class T>
void run_forward(Activation act, const T* input, T* output, uint8_t* bits, int64_t begin, int64_t end) {
  if constexpr (Activation::keeps_bits)
    if (bits)
      return vectorised([=]() RELU_EXT_INLINE_LAMBDA { forward_bits_loop(act, input, output, bits, begin, end); });
  vectorised([=]() RELU_EXT_INLINE_LAMBDA { forward_loop(act, input, output, begin, end); });
}

template <class Activation, class T, class K>
void run_backward(Activation act, Kept kept_as, const T* grad, const K* kept, T* output, int64_t begin, int64_t end) {
  with_kept<Activation>(kept_as, [&](auto from) {
    vectorised(
        [=]() RELU_EXT_INLINE_LAMBDA { backward_loop<decltype(from)::value>(act, grad, kept, output, begin, end); });
  });
}

}  // namespace

void forward(const Forward& work, int64_t begin, int64_t end) {
  with_types(work, [&](auto element, auto act) {
    using T = decltype(element);
    const auto input = static_cast<const T*>(work.input);
    const auto output = static_cast<T*>(work.output);
    if constexpr (staged<T, decltype(act)>) {
      const typename decltype(act)::InFloat act(work.scalars);
      in_chunks(std::array{input}, output, begin, end, [&](auto& wide, float* result, int64_t i, int count) {
        run_forward(act, wide[0], result, work.bits ? work.bits + i / 8 : nullptr, 0, count);
      });
    } else {
      run_forward(act, input, output, work.bits, begin, end);
    }
  });
}

void backward(const Backward& work, int64_t begin, int64_t end) {
  with_types(work, [&](auto element, auto act) {
    using T = decltype(element);
    constexpr bool from_bits = decltype(act)::keeps_bits;
    const auto grad = static_cast<const T*>(work.grad);
    const auto kept = static_cast<const std::conditional_t<from_bits, uint8_t, T>*>(work.kept);
    const auto output = static_cast<T*>(work.output);
    if constexpr (!staged<T, decltype(act)>) {
      run_backward(act, work.kept_as, grad, kept, output, begin, end);
    } else {
      const typename decltype(act)::InFloat act(work.scalars);
      if constexpr (from_bits)
        in_chunks(std::array{grad}, output, begin, end, [&](auto& wide, float* result, int64_t i, int count) {
          run_backward(act, Kept::bits, wide[0], kept + i / 8, result, 0, count);
        });
      else
        in_chunks(std::array{grad, kept}, output, begin, end, [&](auto& wide, float* result, int64_t, int count) {
          run_backward(act, work.kept_as, wide[0], wide[1], result, 0, count);
        });
    }
  });
}

}  // namespace relu_ext::cpu
