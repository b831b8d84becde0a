// Vectors with a value for each channel beside a tensor's elements, and sums over each channel.
#pragma once
#include <algorithm>
#include <array>
#include <vector>

#include "../kernels.h"
#include "staged.h"

namespace relu_ext::cpu {

// Elements that go through one loop and then the next: in the first-level cache all the while.
constexpr int64_t chunk = 1024;
// Where runs of a channel are shorter, and not whole words of bits, values are spread over chunks. Without that
// scale_shift_relu at 14 x 14 takes 1.3 to 1.4 of the time in bfloat16, 0.9 to 1.3 in float32 (benchmarks/builds.py
// --inner 196, few = 0).
constexpr int64_t few = 512;

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
RELU_EXT_INLINE void for_runs(const Channels& channels, int64_t begin, int64_t end, Body body) {
  Run run = run_at(channels, begin);
  for (int64_t i = begin; i < end; i += run.length, run = following(channels, run))
    body(run, i, std::min(run.length, end - i));
}

// The values of `number` vectors, the same for all elements of a part, or arrays of those of each element. value<k>
// (values, in, j): that of vector k for element j, `in` beginning with the arrays, in the type that T is computed in.
template <class T, size_t number>
struct OfAll {
  static constexpr size_t of_each = 0;
  std::array<Arithmetic<T>, number> values;
  std::array<const T*, of_each> arrays;
};
template <class T, size_t number>
struct OfEach {
  static constexpr size_t of_each = number;
  std::array<const T*, of_each> arrays;
};
template <size_t k, class T, size_t number, class In>
RELU_EXT_INLINE Arithmetic<T> value(const OfAll<T, number>& of, const In&, int64_t) {
  return of.values[k];
}
template <size_t k, class T, size_t number, class In>
RELU_EXT_INLINE Arithmetic<T> value(const OfEach<T, number>&, const In& in, int64_t j) {
  return in[k][j];
}
// The values of runs of one channel each.
template <class T, size_t number>
struct OfRuns {
  Channels channels;
  std::array<const T*, number> vectors;
};

// body(values, i, count) for elements of one channel, or with values of each.
template <class T, class Body>
RELU_EXT_INLINE void for_values(const OfAll<T, 0>& none, int64_t i, int64_t count, Body body) {
  body(none, i, count);
}
template <class T, size_t number, class Body>
RELU_EXT_INLINE void for_values(const OfEach<T, number>& of, int64_t i, int64_t count, Body body) {
  body(of, i, count);
}
template <class T, size_t number, class Body>
RELU_EXT_INLINE void for_values(const OfRuns<T, number>& of, int64_t i, int64_t count, Body body) {
  for_runs(of.channels, i, i + count, [=](const Run& run, int64_t i, int64_t length) RELU_EXT_INLINE_LAMBDA {
    OfAll<T, number> all;
    for (size_t k = 0; k < number; ++k) all.values[k] = widen(of.vectors[k][run.channel]);
    body(all, i, length);
  });
}

// What `multiply` takes.
template <class T>
RELU_EXT_INLINE Arithmetic<T> factor_of(const OfAll<T, 1>& of) {
  return of.values[0];
}
template <class T>
RELU_EXT_INLINE const T* factor_of(const OfEach<T, 1>& of) {
  return of.arrays[0];
}

// Those of both.
template <class A, size_t n, size_t m>
RELU_EXT_INLINE std::array<A, n + m> joined(const std::array<A, n>& first, const std::array<A, m>& second) {
  std::array<A, n + m> all{};
  for (size_t k = 0; k < n; ++k) all[k] = first[k];
  for (size_t k = 0; k < m; ++k) all[n + k] = second[k];
  return all;
}

// `value`, `length` times, and up to a vector more.
constexpr int longest_vector = 64;  // bytes
template <Isa isa, class T>
RELU_EXT_INLINE void repeat(T value, int64_t length, T* to) {
  using W = Word<T>;
  constexpr int bytes = Masks<isa>::vector;
  static_assert(bytes <= longest_vector);
  typedef W Vector __attribute__((vector_size(bytes), aligned(sizeof(W)), may_alias));
  const Vector all = bit_cast<W>(value) - Vector{};
  for (int64_t k = 0; k < length; k += bytes / sizeof(W)) *reinterpret_cast<Vector*>(to + k) = all;
}

template <class T, size_t number>
class PerChannel {
  const Channels& channels;
  const std::array<const T*, number> vectors;
  int64_t begin, end;
  std::array<std::vector<T>, number> repeated;
  alignas(64) T several[number + 1][chunk + longest_vector / sizeof(T)];  // + 1: there may be none

  OfEach<T, number> from_repeated(int64_t i) const {
    OfEach<T, number> of;
    for (size_t k = 0; k < number; ++k) of.arrays[k] = repeated[k].data() + (i - begin) % channels.channels;
    return of;
  }
  OfEach<T, number> spread_over(int64_t i, int64_t count) {
    vectorised([&](auto isa) RELU_EXT_INLINE_LAMBDA {
      for_runs(channels, i, i + count, [&](const Run& run, int64_t j, int64_t length) RELU_EXT_INLINE_LAMBDA {
        for (size_t k = 0; k < number; ++k)
          repeat<decltype(isa)::value>(vectors[k][run.channel], length, several[k] + (j - i));
      });
    });
    OfEach<T, number> of;
    for (size_t k = 0; k < number; ++k) of.arrays[k] = several[k];
    return of;
  }

 public:
  // Where channels are next to each other, the values of this range are there from the first on, as often as it takes
  // to read a chunk of them from any.
  PerChannel(const Channels& channels, std::array<const T*, number> vectors, int64_t begin, int64_t end)
      : channels(channels), vectors(vectors), begin(begin), end(end) {
    if (channels.inner != 1 || begin == end) return;  // of no elements there may be no channel
    const int64_t count = std::min(channels.channels + chunk, end - begin);
    for (size_t k = 0; k < number; ++k) {
      repeated[k].resize(size_t(count));
      for_runs(channels, begin, begin + count, [&](const Run& run, int64_t i, int64_t length) {
        std::copy_n(vectors[k] + run.channel, length, repeated[k].data() + (i - begin));
      });
    }
  }

  // body(values, i, count), with values for for_values: the range in parts of no more than `most` elements, each at a
  // multiple of 64, as are the runs in it; those with values of each element are no longer than a chunk.
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
      body(OfAll<T, 0>{}, i, count);
      return count;
    } else if (channels.inner == 1) {
      const int64_t count = std::min(chunk, left);
      body(from_repeated(i), i, count);
      return count;
    } else if (const bool whole_words = channels.inner % alignment == 0; !whole_words && channels.inner < few) {
      const int64_t count = std::min(chunk, left);
      body(spread_over(i, count), i, count);
      return count;
    } else {
      int64_t count = std::min({whole_words ? left : run_at(channels, i).length, left, most});
      if (count >= alignment || count == left) {
        if (count < left) count -= count % alignment;
        body(OfRuns<T, number>{channels, vectors}, i, count);
      } else {
        count = std::min(alignment, left);
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
  for (; j + lanes <= count; j += lanes) a += *reinterpret_cast<const Vector*>(terms + j);
  const Vector all = ((a + b) + (c + d)) + ((e + f) + (g + h));
  double total = 0;
  for (int lane = 0; lane < lanes; ++lane) total += all[lane];
  for (; j < count; ++j) total += terms[j];
  return total;
}

// Sums over channels of terms that come a chunk at a time.
template <class T>
class Sums {
  using X = Arithmetic<T>;
  // Where channels are next to each other, so many rows are summed in float before they are added to the totals.
  static constexpr int64_t most_rows = 16;
  const Channels& channels;
  double* const totals;
  std::vector<float> rows;
  int64_t in_rows = 0;  // elements
  alignas(64) X wide[2][chunk];

  // As floats in the elements' order, so that sums are the same for every instruction set.
  template <Isa isa>
  RELU_EXT_INLINE const X* in_order(const T* from, X* to, int64_t count) {
    if constexpr (!is_16_bit<T>) {
      return from;
    } else {
      int64_t i = 0;
      if constexpr (std::is_same_v<T, half>) {
        constexpr int block = Conversion<isa, T>::block;
        for (; i + block <= count; i += block) Conversion<isa, T>::widen(from + i, to + i);
      }
      RELU_EXT_LANES
      for (int64_t j = i; j < count; ++j) to[j] = widen(from[j]);
      return to;
    }
  }

  template <class To>
  RELU_EXT_INLINE void add_rows(int64_t i, int64_t count, const X* own, To* to) {
    for_runs(channels, i, i + count, [=](const Run& run, int64_t j, int64_t length) RELU_EXT_INLINE_LAMBDA {
      RELU_EXT_LANES
      for (int64_t k = 0; k < length; ++k) to[run.channel + k] += own[j - i + k];
    });
  }
  RELU_EXT_INLINE void add(int64_t i, int64_t count, const X* own) {
    if (channels.inner != 1)
      return for_runs(channels, i, i + count, [&](const Run& run, int64_t j, int64_t length) RELU_EXT_INLINE_LAMBDA {
        totals[run.channel] += sum(own + (j - i), length);
      });
    if (rows.empty()) return add_rows(i, count, own, totals);
    add_rows(i, count, own, rows.data());
    in_rows += count;
    if (in_rows >= most_rows * channels.channels) add_to_totals();
  }
  void add_to_totals() {
    std::transform(rows.begin(), rows.end(), totals, totals, [](float sum, double total) { return total + sum; });
    std::fill(rows.begin(), rows.end(), 0.f);
    in_rows = 0;
  }

 public:
  // totals: one a channel, are added to. Null: nothing is summed.
  Sums(const Channels& channels, double* totals) : channels(channels), totals(totals) {
    const bool many = channels.inner == 1 && channels.channels * most_rows >= chunk;
    if (totals && sizeof(X) == sizeof(float) && many) rows.resize(size_t(channels.channels));
  }
  ~Sums() { add_to_totals(); }

  explicit operator bool() const { return totals; }

  // The terms of elements i to i + count - 1, no more than a chunk: those of a, or term(of a, of b).
  template <Isa isa>
  RELU_EXT_INLINE void gather(int64_t i, int64_t count, const T* a) {
    add(i, count, in_order<isa>(a, wide[0], count));
  }
  template <Isa isa, class Term>
  RELU_EXT_INLINE void gather(int64_t i, int64_t count, Term term, const T* a, const T* b) {
    const X *const first = in_order<isa>(a, wide[0], count), *const second = in_order<isa>(b, wide[1], count);
    RELU_EXT_LANES
    for (int64_t j = 0; j < count; ++j) wide[0][j] = term(first[j], second[j]);
    add(i, count, wide[0]);
  }
};

}  // namespace relu_ext::cpu
