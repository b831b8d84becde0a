// Vectors with a value for each channel beside a tensor's elements, and sums over each channel.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "../kernels.h"
#include "staged.h"

namespace relu_ext::cpu {

constexpr int chunk = 1024;  // elements whose values or sums' terms are in memory at a time: in the first-level cache
constexpr int padding = 64;  // what a block of `staged` may have beyond the end

// The channel of element i, and how many elements from i on are of it; where inner is 1, of as many channels.
struct Run {
  int64_t channel, length;
};
inline Run run_at(const Channels& channels, int64_t i) {
  const auto [number, inner] = channels;
  if (inner == 1) return {i % number, number - i % number};
  return {i / inner % number, inner - i % inner};
}

inline Run following(const Channels& channels, const Run& run) {
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

// The values of `number` vectors, in the type that T is computed in: the same for all elements of a part, or an array
// of those of each. value<k>(values, j): that of vector k for element j of the part.
template <class X, size_t number>
struct OfAll {
  std::array<X, number> values;
};
template <class X, size_t number>
struct OfEach {
  std::array<const X*, number> values;
};
template <size_t k, class X, size_t number>
RELU_EXT_INLINE X value(const OfAll<X, number>& of, int64_t) {
  return of.values[k];
}
template <size_t k, class X, size_t number>
RELU_EXT_INLINE X value(const OfEach<X, number>& of, int64_t j) {
  return of.values[k][j];
}

template <class T, size_t number>
class PerChannel {
  using X = Arithmetic<T>;
  const Channels& channels;
  const std::array<const T*, number> vectors;
  int64_t begin, end;
  std::array<std::vector<X>, number> repeated;
  alignas(64) X several[number + 1][chunk + padding];  // + 1: there may be none

  // to[j] = that of element i + j.
  void spread(const T* vector, int64_t i, int64_t count, X* to) const {
    for_runs(channels, i, i + count, [&](const Run& run, int64_t j, int64_t length) {
      const auto own = vector + run.channel;
      if (channels.inner == 1)
        std::transform(own, own + length, to + (j - i), [](T value) { return widen(value); });
      else
        std::fill_n(to + (j - i), length, widen(*own));
    });
  }

  OfEach<X, number> from_repeated(int64_t i) const {
    OfEach<X, number> of;
    for (size_t k = 0; k < number; ++k) of.values[k] = repeated[k].data() + (i - begin) % channels.channels;
    return of;
  }
  OfEach<X, number> spread_over(int64_t i, int64_t count) {
    OfEach<X, number> of;
    for (size_t k = 0; k < number; ++k) {
      spread(vectors[k], i, count, several[k]);
      std::fill_n(several[k] + count, padding, X{});
      of.values[k] = several[k];
    }
    return of;
  }
  OfAll<X, number> of_channel(int64_t channel) const {
    OfAll<X, number> of;
    for (size_t k = 0; k < number; ++k) of.values[k] = widen(vectors[k][channel]);
    return of;
  }

 public:
  // Where channels are next to each other, the values of this range are there from the first on, as often as it takes
  // to read a chunk of them from any.
  PerChannel(const Channels& channels, std::array<const T*, number> vectors, int64_t begin, int64_t end)
      : channels(channels), vectors(vectors), begin(begin), end(end) {
    if (channels.inner != 1) return;
    const int64_t count = std::min(channels.channels + chunk, end - begin);
    for (size_t k = 0; k < number; ++k) {
      repeated[k].resize(size_t(count + padding));
      spread(vectors[k], begin, count, repeated[k].data());
    }
  }

  // body(values, i, count): the range in parts of no more than `most` elements, each at a multiple of 64; as few of
  // them as there can be with values of more than one channel.
  template <class Body>
  void in_parts(int64_t most, Body body) {
    for (int64_t i = begin; i < end;) i += part(i, most, body);
  }

 private:
  // body for the part that begins at element i. Its length.
  template <class Body>
  int64_t part(int64_t i, int64_t most, Body body) {
    const int64_t left = end - i;
    if constexpr (number == 0) {
      const int64_t count = std::min(most, left);
      body(OfAll<X, 0>{}, i, count);
      return count;
    } else if (channels.inner == 1) {
      const int64_t count = std::min<int64_t>(chunk, left);
      body(from_repeated(i), i, count);
      return count;
    } else {
      const Run run = run_at(channels, i);
      int64_t count = std::min({run.length, left, most});
      if (count >= alignment || count == left) {
        if (count < left) count -= count % alignment;
        body(of_channel(run.channel), i, count);
      } else {
        count = std::min<int64_t>(channels.inner < 2 * alignment ? chunk : alignment, left);
        body(spread_over(i, count), i, count);
      }
      return count;
    }
  }
};

// By eight vectors of partial sums, which hide the latency of an addition; the same ones for every instruction set. In
// the compiler's vector type: it leaves arrays of numbers in memory.
template <class X>
RELU_EXT_INLINE double sum(const X* terms, int64_t count) {
  constexpr int lanes = 32 / sizeof(X);
  typedef X Vector __attribute__((vector_size(32), aligned(sizeof(X)), may_alias));
  Vector a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{};
  int64_t j = 0;
  for (; j + 8 * lanes <= count; j += 8 * lanes) {
    const Vector* const own = reinterpret_cast<const Vector*>(terms + j);
    a += own[0], b += own[1], c += own[2], d += own[3], e += own[4], f += own[5], g += own[6], h += own[7];
  }
  const Vector all = ((a + b) + (c + d)) + ((e + f) + (g + h));
  double total = 0;
  for (int lane = 0; lane < lanes; ++lane) total += all[lane];
  for (; j < count; ++j) total += terms[j];
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

}  // namespace relu_ext::cpu
