// The loops, in plain C++ that the compiler turns into vectors of whatever width the instruction set has.
//
// The bits of 64 elements are gathered in one integer, a vector of them at a time: forward, every lane leaves a mask
// and one instruction makes bits of a vector of masks; backward, every lane tests its own bit of a word as wide as an
// element. One body serves whole blocks (constant count) and the tail.
#pragma once
#include <algorithm>

#include "../activations.h"
#include "isa.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace relu_ext::cpu {

// No lane depends on another, also where output is input; unrolled before it is vectorised, g++ would not see the loop.
#if defined(__clang__)
#define RELU_EXT_LANES _Pragma("clang loop vectorize(assume_safety) unroll(disable)")
#else
#define RELU_EXT_LANES _Pragma("GCC ivdep") _Pragma("GCC unroll 1")
#endif

// A table of single bits rather than 1 << j: SSE2 has no shift with a count for each lane.
template <class W>
struct SingleBits {
  W bit[8 * sizeof(W)];
  constexpr SingleBits() : bit() {
    for (unsigned j = 0; j < 8 * sizeof(W); ++j) bit[j] = W(W(1) << j);
  }
};
template <class W>
alignas(64) inline constexpr SingleBits<W> single{};

// body(i, count): count is the constant `block` for all but the last call.
template <int block, class Body>
RELU_EXT_INLINE void for_blocks(int64_t begin, int64_t end, Body body) {
  int64_t i = begin;
  for (; i + block <= end; i += block) body(i, block);
  if (i < end) body(i, int(end - i));
}

// body(i, count): as for_blocks for the elements 0 to count - 1 of a block; where count is a constant, unrolled, by no
// more than eight: compiling takes 0.7 of the time, and running no longer.
template <int lanes, class Body>
RELU_EXT_INLINE void for_vectors(int count, Body body) {
  if (__builtin_constant_p(count)) {
#pragma GCC unroll 8
    for (int i = 0; i < count; i += lanes) body(i, lanes);
  } else {
#pragma GCC unroll 1
    for (int i = 0; i < count; i += lanes) body(i, std::min(count - i, lanes));
  }
}

// The bits of `lanes` elements from their masks, each all ones or zeros. Nothing here is always_inline, see Conversion.
template <Isa>
struct Masks {
  static constexpr int vector = 16;  // bytes
#if defined(__x86_64__)              // SSE2 is part of x86-64; no compiler finds movemask by itself
  template <class W>
  static constexpr int lanes = sizeof(W) == 2 ? 16 : 16 / sizeof(W);
  static uint32_t bits(const uint16_t* mask) {
    const auto half = reinterpret_cast<const __m128i*>(mask);
    return _mm_movemask_epi8(_mm_packs_epi16(_mm_loadu_si128(half), _mm_loadu_si128(half + 1)));
  }
  static uint32_t bits(const uint32_t* mask) {
    return _mm_movemask_ps(_mm_loadu_ps(reinterpret_cast<const float*>(mask)));
  }
  static uint32_t bits(const uint64_t* mask) {
    return _mm_movemask_pd(_mm_loadu_pd(reinterpret_cast<const double*>(mask)));
  }
#else
  template <class W>
  static constexpr int lanes = 8 * sizeof(W);
  template <class W>
  static W bits(const W* mask) {
    W bits = 0;
    RELU_EXT_LANES
    for (int j = 0; j < lanes<W>; ++j) bits |= mask[j] & single<W>.bit[j];
    return bits;
  }
#endif
};

#if defined(__x86_64__)
template <>
struct Masks<Isa::avx2> {
  static constexpr int vector = 32;
  template <class W>
  static constexpr int lanes = sizeof(W) == 2 ? 32 : 32 / sizeof(W);
  [[gnu::target("avx2")]] static uint32_t bits(const uint16_t* mask) {
    const auto half = reinterpret_cast<const __m256i*>(mask);
    const __m256i packed = _mm256_packs_epi16(_mm256_loadu_si256(half), _mm256_loadu_si256(half + 1));
    return _mm256_movemask_epi8(_mm256_permute4x64_epi64(packed, 0b11011000));  // 64 bits each: 0 2 1 3
  }
  [[gnu::target("avx2")]] static uint32_t bits(const uint32_t* mask) {
    return _mm256_movemask_ps(_mm256_loadu_ps(reinterpret_cast<const float*>(mask)));
  }
  [[gnu::target("avx2")]] static uint32_t bits(const uint64_t* mask) {
    return _mm256_movemask_pd(_mm256_loadu_pd(reinterpret_cast<const double*>(mask)));
  }
};
template <>
struct Masks<Isa::avx512> {
  static constexpr int vector = 64;
  template <class W>
  static constexpr int lanes = 64 / sizeof(W);
  [[gnu::target("avx512bw")]] static uint32_t bits(const uint16_t* mask) {
    return _mm512_movepi16_mask(_mm512_loadu_si512(mask));
  }
  [[gnu::target("avx512dq")]] static uint32_t bits(const uint32_t* mask) {
    return _mm512_movepi32_mask(_mm512_loadu_si512(mask));
  }
  [[gnu::target("avx512dq")]] static uint32_t bits(const uint64_t* mask) {
    return _mm512_movepi64_mask(_mm512_loadu_si512(mask));
  }
};
#endif

// The activation of element i: the same for all, or one that is given for each.
template <class Activation>
RELU_EXT_INLINE const Activation& at(const Activation& act, int64_t) {
  return act;
}
template <class T>
struct Slopes {
  static constexpr bool keeps_bits = true;
  static constexpr Effort effort = Effort::product;
  const T* slope;
};
template <class T>
RELU_EXT_INLINE LeakyRelu<T, Device::cpu> at(Slopes<T> slopes, int64_t i) {
  return LeakyRelu<T, Device::cpu>(widen(slopes.slope[i]));
}

// Element k of an array, as a function of k.
template <class T>
RELU_EXT_INLINE auto elements(const T* input) {
  return [=](int64_t k) RELU_EXT_INLINE_LAMBDA { return input[k]; };
}

template <class T>
RELU_EXT_INLINE auto into(T* output) {
  return [=](int64_t k, T value) RELU_EXT_INLINE_LAMBDA { output[k] = value; };
}

// input(k): element k, in memory or made on the way.
template <class T, class Activation, class Input>
RELU_EXT_INLINE void forward_loop(Activation act, Input input, T* output, int64_t begin, int64_t end) {
  RELU_EXT_LANES
  for (int64_t i = begin; i < end; ++i) output[i] = output_of(at(act, i), input(i));
}

template <Isa isa, class T, class Activation, class Input>
RELU_EXT_INLINE void forward_bits_loop(Activation act, Input input, T* output, uint8_t* bits, int64_t begin,
                                       int64_t end) {
  using W = Word<T>;
  constexpr int lanes = Masks<isa>::template lanes<W>;
  for_blocks<64>(begin, end, [=](int64_t i, int count) RELU_EXT_INLINE_LAMBDA {
    uint64_t kept = 0;
    for_vectors<lanes>(count, [=, &kept](int first, int count) RELU_EXT_INLINE_LAMBDA {
      alignas(64) W mask[lanes] = {};
      RELU_EXT_LANES
      for (int j = 0; j < count; ++j) {
        const int64_t k = i + first + j;
        const T x = input(k);
        const bool keep = at(act, k).keep(x);
        output[k] = at(act, k).forward(x, keep);
        mask[j] = keep ? W(-1) : W(0);
      }
      kept |= uint64_t(Masks<isa>::bits(mask)) << first;
    });
    std::memcpy(bits + i / 8, &kept, (count + 7) / 8);
  });
}

// store(k, gradient of element k)
template <Isa isa, class T, class Activation, class Store>
RELU_EXT_INLINE void backward_bits_loop(Activation act, const T* grad, const uint8_t* bits, Store store, int64_t begin,
                                        int64_t end) {
  using W = Word<T>;
  constexpr int word = 8 * sizeof(W), lanes = std::min(word, Masks<isa>::vector / int(sizeof(W)));
  for_blocks<64>(begin, end, [=](int64_t i, int count) RELU_EXT_INLINE_LAMBDA {
    W kept[64 / word] = {};
    std::memcpy(kept, bits + i / 8, (count + 7) / 8);
    for_vectors<lanes>(count, [=, &kept](int first, int count) RELU_EXT_INLINE_LAMBDA {
      RELU_EXT_LANES
      for (int j = 0; j < count; ++j) {
        const int64_t k = i + first + j;
        store(k, at(act, k).backward(grad[k], (kept[first / word] & single<W>.bit[first % word + j]) != 0));
      }
    });
  });
}

template <Kept kept, class T, class Activation>
RELU_EXT_INLINE void backward_loop(Activation act, const T* grad, const T* value, T* output, int64_t begin,
                                   int64_t end) {
  RELU_EXT_LANES
  for (int64_t i = begin; i < end; ++i) output[i] = gradient_of<kept>(act, grad[i], value[i]);
}

}  // namespace relu_ext::cpu
