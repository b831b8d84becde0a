// prelu: a slope for every channel, and its gradient, summed in the same pass.
#include <algorithm>
#include <array>

#include "../dispatch.h"
#include "channels.h"

namespace relu_ext::cpu {
namespace {

// The slopes as an activation.
template <class T, class X>
LeakyRelu<T, Device::cpu> activation(const OfAll<X, 1>& slopes) {
  return LeakyRelu<T, Device::cpu>(slopes.values[0]);
}
template <class T, class X>
Slopes<T> activation(const OfEach<X, 1>& slopes) {
  return {slopes.values[0]};
}

template <class T, class Work>
PerChannel<T, 1> slopes_of(const Work& work, int64_t begin, int64_t end) {
  return {work.channels, {static_cast<const T*>(work.weight)}, begin, end};
}

// terms: what each element adds to its slope's gradient.
template <class Activation, class X>
RELU_EXT_INLINE void gradients_loop(Activation act, const X* grad, const X* input, X* output, X* terms, int64_t first,
                                    int64_t count) {
  RELU_EXT_LANES
  for (int64_t j = 0; j < count; ++j) {
    const auto own = at(act, first + j);
    const bool keep = own.keep(input[j]);
    terms[first + j] = own.slope_gradient(grad[j], input[j], keep);
    output[j] = own.backward(grad[j], keep);
  }
}

}  // namespace

void prelu(const Prelu& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto input = static_cast<const T*>(work.input);
    const auto output = static_cast<T*>(work.output);
    slopes_of<T>(work, begin, end).in_parts(end - begin, [&](auto slopes, int64_t i, int64_t count) {
      const auto act = activation<T>(slopes);
      with_bits<decltype(act)>(work.bits ? work.bits + i / 8 : nullptr, [=](auto bits) {
        vectorised([=](auto isa) RELU_EXT_INLINE_LAMBDA {
          forward_loops<decltype(isa)::value>(act, input + i, output + i, bits, 0, count);
        });
      });
    });
  });
}

void prelu_backward(const PreluBackward& work, double* sums, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto grad = static_cast<const T*>(work.grad), input = static_cast<const T*>(work.input);
    const auto output = static_cast<T*>(work.output);
    auto parts = slopes_of<T>(work, begin, end);
    if (work.bits)
      return parts.in_parts(end - begin, [&](auto slopes, int64_t i, int64_t count) {
        const auto act = activation<T>(slopes);
        const uint8_t* const bits = work.bits + i / 8;
        vectorised([=](auto isa) RELU_EXT_INLINE_LAMBDA {
          backward_loops<decltype(isa)::value, Kept::bits>(act, grad + i, bits, output + i, 0, count);
        });
      });
    alignas(64) Arithmetic<T> terms[chunk + padding];
    T unwanted[chunk];
    parts.in_parts(chunk, [&](auto slopes, int64_t i, int64_t count) {
      const std::array inputs{grad + i, input + i};
      const std::array outputs{output ? output + i : unwanted};
      const auto act = activation<Arithmetic<T>>(slopes);
      auto* const to = terms;
      vectorised([=](auto isa) RELU_EXT_INLINE_LAMBDA {
        staged<decltype(isa)::value>(inputs, outputs, 0, count,
                                     [=](auto& in, auto& out, int64_t first, int64_t count) RELU_EXT_INLINE_LAMBDA {
                                       gradients_loop(act, in[0], in[1], out[0], to, first, count);
                                     });
      });
      if (sums) gather(work.channels, i, count, terms, sums);
    });
  });
}

void round_sums(Dtype dtype, const double* sums, int64_t channels, void* gradient) {
  with_dtype(dtype, [&](auto element) {
    using T = decltype(element);
    std::transform(sums, sums + channels, static_cast<T*>(gradient),
                   [](double sum) { return narrow<T>(Arithmetic<T>(sum)); });
  });
}

}  // namespace relu_ext::cpu
