// prelu: a slope for every channel, and its gradient, summed in the same pass.
#include <algorithm>
#include <array>

#include "../dispatch.h"
#include "channels.h"

namespace relu_ext::cpu {
namespace {

// The slopes as an activation.
template <class T>
LeakyRelu<T, Device::cpu> activation(const OfAll<T, 1>& slopes) {
  return LeakyRelu<T, Device::cpu>(slopes.values[0]);
}
template <class T>
Slopes<T> activation(const OfEach<T, 1>& slopes) {
  return {slopes.arrays[0]};
}

template <class T, class Work>
PerChannel<T, 1> slopes_of(const Work& work, int64_t begin, int64_t end) {
  return {work.channels, {static_cast<const T*>(work.weight)}, begin, end};
}

}  // namespace

void prelu(const Prelu& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto input = static_cast<const T*>(work.input);
    const auto output = static_cast<T*>(work.output);
    slopes_of<T>(work, begin, end).in_parts(end - begin, [&](auto slopes, int64_t i, int64_t count) {
      with_bits<LeakyRelu<T, Device::cpu>>(work.bits, [=](auto bits) {
        vectorised<most_of<Effort::product, T, decltype(bits)>()>([=](auto isa) RELU_EXT_INLINE_LAMBDA {
          for_values(slopes, i, count, [=](auto slopes, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
            forward_loops<decltype(isa)::value>(activation(slopes), input + i, output + i, bits_from(bits, i), 0,
                                                count);
          });
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
        vectorised<most_of<Effort::product, T>()>([=, bits = work.bits](auto isa) RELU_EXT_INLINE_LAMBDA {
          for_values(slopes, i, count, [=](auto slopes, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
            backward_loops<decltype(isa)::value, Kept::bits>(activation(slopes), grad + i, bits + i / 8, output + i, 0,
                                                             count);
          });
        });
      });
    Sums<T> gathered(work.channels, sums);
    parts.in_parts(chunk, [&](auto slopes, int64_t i, int64_t count) {
      vectorised<most_of<Effort::product, T>()>([=, &gathered](auto isa) RELU_EXT_INLINE_LAMBDA {
        constexpr Isa own = decltype(isa)::value;
        const auto term = [](auto grad, auto input)
                              RELU_EXT_INLINE_LAMBDA { return LeakyRelu<T, Device::cpu>::slope_gradient(grad, input); };
        if (gathered) gathered.template gather<own>(i, count, term, grad + i, input + i);
        if (!output) return;
        for_values(slopes, i, count, [=](auto slopes, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
          backward_by_value_loops<own>(activation(slopes), grad + i, input + i, output + i, count);
        });
      });
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
