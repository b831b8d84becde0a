// prelu: a slope for every channel, and its gradient, summed in the same pass.
#include <algorithm>
#include <array>

#include "../dispatch.h"
#include "staged.h"

namespace relu_ext::cpu {
namespace {

constexpr int lanes = 16;

// body(channel, j, count): elements i + j to i + j + count - 1 are of that channel; where inner is 1, of as many
// channels from that one on.
template <class Body>
void for_runs(const Channels& channels, int64_t i, int count, Body body) {
  const auto [number, inner] = channels;
  const int64_t length = inner == 1 ? number : inner;
  for (int j = 0; j < count;) {
    const int64_t run = (i + j) / length, begun = (i + j) % length;
    const int left = int(std::min<int64_t>(length - begun, count - j));
    body(inner == 1 ? begun : run % number, j, left);
    j += left;
  }
}

// slopes[j] = that of element i + j.
template <class T, class X>
void spread(const Channels& channels, const void* weights, int64_t i, int count, X* slopes) {
  const auto weight = static_cast<const T*>(weights);
  for_runs(channels, i, count, [&](int64_t channel, int j, int left) {
    if (channels.inner == 1)
      std::transform(weight + channel, weight + channel + left, slopes + j, [](T slope) { return widen(slope); });
    else
      std::fill_n(slopes + j, left, widen(weight[channel]));
  });
}

template <class X>
RELU_EXT_INLINE double sum(const X* terms, int count) {
  X partial[lanes] = {};
  const int whole = count / lanes * lanes;
  for (int j = 0; j < whole; j += lanes) {
    RELU_EXT_LANES
    for (int lane = 0; lane < lanes; ++lane) partial[lane] += terms[j + lane];
  }
  double total = 0;
  for (int lane = 0; lane < lanes; ++lane) total += partial[lane];
  for (int j = whole; j < count; ++j) total += terms[j];
  return total;
}

// sums[channel] += the terms of elements i to i + count - 1.
template <class X>
void gather(const Channels& channels, int64_t i, int count, const X* terms, double* sums) {
  for_runs(channels, i, count, [&](int64_t channel, int j, int left) {
    const X* const run = terms + j;
    double* const own = sums + channel;
    if (channels.inner != 1) return vectorised([=]() RELU_EXT_INLINE_LAMBDA { *own += sum(run, left); });
    vectorised([=]() RELU_EXT_INLINE_LAMBDA {
      RELU_EXT_LANES
      for (int k = 0; k < left; ++k) own[k] += run[k];
    });
  });
}

// terms: what each element adds to its slope's gradient.
template <class T, class X>
RELU_EXT_INLINE void backward_loop(const X* slopes, const T* grad, const T* input, T* output, X* terms, int count) {
  RELU_EXT_LANES
  for (int j = 0; j < count; ++j) {
    const LeakyRelu<T, Device::cpu> act(slopes[j]);
    const bool keep = act.keep(input[j]);
    terms[j] = act.slope_gradient(grad[j], input[j], keep);
    output[j] = act.backward(grad[j], keep);
  }
}

}  // namespace

void prelu(const Prelu& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    alignas(64) Arithmetic<T> slopes[chunk];
    in_chunks(std::array{static_cast<const T*>(work.input)}, static_cast<T*>(work.output), begin, end,
              [&](auto& in, auto* output, int64_t i, int count) {
                using E = std::remove_reference_t<decltype(*output)>;
                spread<T>(work.channels, work.weight, i, count, slopes);
                const E* input = in[0];
                const Slopes<E> act{slopes};
                uint8_t* const bits = work.bits ? work.bits + i / 8 : nullptr;
                if (bits)
                  vectorised([=]() RELU_EXT_INLINE_LAMBDA { forward_bits_loop(act, input, output, bits, 0, count); });
                else
                  vectorised([=]() RELU_EXT_INLINE_LAMBDA { forward_loop(act, input, output, 0, count); });
              });
  });
}

void prelu_backward(const PreluBackward& work, double* sums, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    alignas(64) Arithmetic<T> slopes[chunk], terms[chunk];
    const auto grad = static_cast<const T*>(work.grad), input = static_cast<const T*>(work.input);
    const auto output = static_cast<T*>(work.output);
    if (work.bits)
      return in_chunks(std::array{grad}, output, begin, end, [&](auto& in, auto* output, int64_t i, int count) {
        using E = std::remove_reference_t<decltype(*output)>;
        spread<T>(work.channels, work.weight, i, count, slopes);
        const E* grad = in[0];
        const Slopes<E> act{slopes};
        const uint8_t* const bits = work.bits + i / 8;
        vectorised([=]() RELU_EXT_INLINE_LAMBDA { cpu::backward_loop<Kept::bits>(act, grad, bits, output, 0, count); });
      });
    const auto elements = [&](int64_t first, T* output, int64_t length) {
      in_chunks(
          std::array{grad + first, input + first}, output, 0, length, [&](auto& in, auto* out, int64_t i, int count) {
            spread<T>(work.channels, work.weight, first + i, count, slopes);
            const auto *grad = in[0], *input = in[1];
            vectorised([&, out]() RELU_EXT_INLINE_LAMBDA { backward_loop(slopes, grad, input, out, terms, count); });
            if (sums) gather(work.channels, first + i, count, terms, sums);
          });
    };
    if (output) return elements(begin, output + begin, end - begin);
    T unwanted[chunk];
    for (int64_t i = begin; i < end; i += chunk) elements(i, unwanted, std::min<int64_t>(chunk, end - i));
  });
}

void round_sums(const PreluBackward& work, const double* sums) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto grad_weight = static_cast<T*>(work.grad_weight);
    for (int64_t channel = 0; channel < work.channels.channels; ++channel)
      grad_weight[channel] = narrow<T>(Arithmetic<T>(sums[channel]));
  });
}

}  // namespace relu_ext::cpu
