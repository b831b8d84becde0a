// prelu: a slope for every channel, and its gradient, summed in the same pass.
#include <algorithm>
#include <array>
#include <vector>

#include "../dispatch.h"
#include "staged.h"

namespace relu_ext::cpu {
namespace {

constexpr int chunk = 512;   // elements whose slopes or sums' terms are in memory at a time: in the first-level cache
constexpr int padding = 64;  // what a block of `staged` may have beyond the end
constexpr int lanes = 16;

// The channel of element i, and how many elements from i on are of it; where inner is 1, of as many channels.
struct Run {
  int64_t channel, length;
};
Run run_at(const Channels& channels, int64_t i) {
  const auto [number, inner] = channels;
  if (inner == 1) return {i % number, number - i % number};
  return {i / inner % number, inner - i % inner};
}

Run following(const Channels& channels, const Run& run) {
  const auto [number, inner] = channels;
  if (inner == 1) return {0, number};
  return {run.channel + 1 == number ? 0 : run.channel + 1, inner};
}

// body(run, i, count): count elements of that run, from i on.
template <class Body>
void for_runs(const Channels& channels, int64_t begin, int64_t end, Body body) {
  Run run = run_at(channels, begin);
  for (int64_t i = begin; i < end; i += run.length, run = following(channels, run))
    body(run, i, std::min(run.length, end - i));
}

template <class T>
class SlopesOf {
  using X = Arithmetic<T>;
  const Channels& channels;
  const T* weight;
  int64_t begin, end;
  std::vector<X> repeated;
  alignas(64) X several[chunk + padding];

  // slopes[k] = that of element i + k.
  void spread(int64_t i, int64_t count, X* slopes) const {
    for_runs(channels, i, i + count, [&](const Run& run, int64_t j, int64_t length) {
      const auto own = weight + run.channel;
      X* const to = slopes + (j - i);
      if (channels.inner == 1)
        std::transform(own, own + length, to, [](T slope) { return widen(slope); });
      else
        std::fill_n(to, length, widen(*own));
    });
  }

 public:
  // Where channels are next to each other, the slopes of this range are there from the first on, as often as it takes
  // to read a chunk of them from any.
  SlopesOf(const Channels& channels, const void* weights, int64_t begin, int64_t end)
      : channels(channels), weight(static_cast<const T*>(weights)), begin(begin), end(end) {
    if (channels.inner != 1) return;
    const int64_t count = std::min(channels.channels + chunk, end - begin);
    repeated.resize(size_t(count + padding));
    spread(begin, count, repeated.data());
  }

  // body(act, i, count), a LeakyRelu or Slopes of X: the range in parts of no more than `most` elements, each at a
  // multiple of 64; as few of them as there can be with more slopes than one.
  template <class Body>
  void in_parts(int64_t most, Body body) {
    for (int64_t i = begin; i < end;) {
      const int64_t left = end - i;
      if (!repeated.empty()) {
        const int64_t count = std::min<int64_t>(chunk, left);
        body(Slopes<T>{repeated.data() + (i - begin) % channels.channels}, i, count);
        i += count;
        continue;
      }
      const Run run = run_at(channels, i);
      int64_t count = std::min({run.length, left, most});
      if (count >= alignment || count == left) {
        if (count < left) count -= count % alignment;
        body(LeakyRelu<T, Device::cpu>(widen(weight[run.channel])), i, count);
      } else {
        count = std::min<int64_t>(channels.inner < 2 * alignment ? chunk : alignment, left);
        spread(i, count, several);
        std::fill_n(several + count, padding, X{});
        body(Slopes<T>{several}, i, count);
      }
      i += count;
    }
  }
};

template <class X>
RELU_EXT_INLINE double sum(const X* terms, int64_t count) {
  X partial[lanes] = {};
  const int64_t whole = count / lanes * lanes;
  for (int64_t j = 0; j < whole; j += lanes) {
    RELU_EXT_LANES
    for (int lane = 0; lane < lanes; ++lane) partial[lane] += terms[j + lane];
  }
  double total = 0;
  for (int lane = 0; lane < lanes; ++lane) total += partial[lane];
  for (int64_t j = whole; j < count; ++j) total += terms[j];
  return total;
}

// sums[channel] += the terms of elements i to i + count - 1.
template <class X>
void gather(const Channels& channels, int64_t i, int64_t count, const X* terms, double* sums) {
  for_runs(channels, i, i + count, [&](const Run& run, int64_t j, int64_t length) {
    const X* const own = terms + (j - i);
    double* const to = sums + run.channel;
    if (channels.inner != 1) return vectorised([=](auto) RELU_EXT_INLINE_LAMBDA { *to += sum(own, length); });
    vectorised([=](auto) RELU_EXT_INLINE_LAMBDA {
      RELU_EXT_LANES
      for (int64_t k = 0; k < length; ++k) to[k] += own[k];
    });
  });
}

// The same in the type that T is computed in.
template <class T>
LeakyRelu<Arithmetic<T>, Device::cpu> widened(LeakyRelu<T, Device::cpu> act) {
  return LeakyRelu<Arithmetic<T>, Device::cpu>(act.slope);
}
template <class T>
Slopes<Arithmetic<T>> widened(Slopes<T> act) {
  return {act.slope};
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
    SlopesOf<T>(work.channels, work.weight, begin, end).in_parts(end - begin, [&](auto act, int64_t i, int64_t count) {
      uint8_t* const bits = work.bits ? work.bits + i / 8 : nullptr;
      vectorised([=](auto isa) RELU_EXT_INLINE_LAMBDA {
        forward_loops<decltype(isa)::value>(act, input + i, output + i, bits, 0, count);
      });
    });
  });
}

void prelu_backward(const PreluBackward& work, double* sums, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto grad = static_cast<const T*>(work.grad), input = static_cast<const T*>(work.input);
    const auto output = static_cast<T*>(work.output);
    SlopesOf<T> slopes(work.channels, work.weight, begin, end);
    if (work.bits)
      return slopes.in_parts(end - begin, [&](auto act, int64_t i, int64_t count) {
        const uint8_t* const bits = work.bits + i / 8;
        vectorised([=](auto isa) RELU_EXT_INLINE_LAMBDA {
          backward_loops<decltype(isa)::value, Kept::bits>(act, grad + i, bits, output + i, 0, count);
        });
      });
    alignas(64) Arithmetic<T> terms[chunk + padding];
    T unwanted[chunk];
    slopes.in_parts(chunk, [&](auto act, int64_t i, int64_t count) {
      const std::array inputs{grad + i, input + i};
      const std::array outputs{output ? output + i : unwanted};
      const auto wide = widened(act);
      auto* const to = terms;
      vectorised([=](auto isa) RELU_EXT_INLINE_LAMBDA {
        staged<decltype(isa)::value>(inputs, outputs, 0, count,
                                     [=](auto& in, auto& out, int64_t first, int64_t count) RELU_EXT_INLINE_LAMBDA {
                                       gradients_loop(wide, in[0], in[1], out[0], to, first, count);
                                     });
      });
      if (sums) gather(work.channels, i, count, terms, sums);
    });
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
