// 16-bit floats in loops that compute: widened to float, computed with, and rounded back, a block at a time. Where the
// instruction set converts by the vector, a block is a vector or two and nothing leaves the registers.
#pragma once
#include <array>
#include <cstddef>
#include <type_traits>

#include "loops.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace relu_ext::cpu {

// A block of elements as floats and back, in an order of its own: what is done between must not look at an element's
// place. It is narrowed as a whole: what is read next is a vector of 16-bit floats, and two stores of half a vector
// each would keep it waiting.
template <Isa isa, class T>
struct Conversion;

// The even elements first, then the odd ones: halves of words need no shuffling. In the elements' order add_relu took
// 1.4 times as long in the first-level cache.
template <Isa isa>
struct Conversion<isa, bfloat16> {
  static constexpr int lanes = Masks<isa>::vector / 4, block = 2 * lanes;
  // A word at a time: g++ would copy a block by vectors shorter than those that are read next, which then wait.
  static RELU_EXT_INLINE uint32_t pair(const bfloat16* from, int j) {
    uint32_t word;
    std::memcpy(&word, from + 2 * j, sizeof(word));
    return word;
  }
  static RELU_EXT_INLINE void widen(const bfloat16* from, float* to) {
    RELU_EXT_LANES
    for (int j = 0; j < lanes; ++j) to[j] = bit_cast<float>(pair(from, j) << 16);
    RELU_EXT_LANES
    for (int j = 0; j < lanes; ++j) to[lanes + j] = bit_cast<float>(pair(from, j) & 0xffff0000u);
  }
  // rounded_above of upper and lower halves apart, so that what is added is added to 16 bits at a time: the carry out
  // of lower + 0x7fff + (upper & 1) is the highest bit of a mean, for which there is an instruction. add_relu with bits
  // takes 0.90 of the time of rounding each float, leaky_relu 0.86.
  static RELU_EXT_INLINE void narrow(const float* from, bfloat16* to) {
    typedef uint16_t Half __attribute__((may_alias));
    alignas(64) uint32_t above[lanes], below[lanes];
    RELU_EXT_LANES
    for (int j = 0; j < lanes; ++j) {
      const uint32_t even = bit_cast<uint32_t>(from[j]), odd = bit_cast<uint32_t>(from[lanes + j]);
      above[j] = even >> 16 | (odd & 0xffff0000u);
      below[j] = (even & 0xffffu) | odd << 16;
    }
    const auto upper = reinterpret_cast<const Half*>(above), lower = reinterpret_cast<const Half*>(below);
    const auto output = reinterpret_cast<Half*>(to);
    RELU_EXT_LANES
    for (int j = 0; j < block; ++j) {
      const uint16_t most = uint16_t(0x7ffeu | (upper[j] & 1u));
      const uint16_t mean = uint16_t((lower[j] + most + 1) >> 1);
      output[j] = uint16_t(upper[j] + (mean >> 15));
    }
  }
};

// In the elements' order. Those with intrinsics are not always_inline: g++ would inline them into a lambda before that
// is inlined where these instructions exist, and refuse.
template <Isa isa>
struct Conversion<isa, half> {
  static constexpr int lanes = 64, block = 64;
  static RELU_EXT_INLINE void widen(const half* from, float* to) {
    RELU_EXT_LANES
    for (int j = 0; j < block; ++j) to[j] = relu_ext::widen(from[j]);
  }
  static RELU_EXT_INLINE void narrow(const float* from, half* to) {
    RELU_EXT_LANES
    for (int j = 0; j < block; ++j) to[j] = relu_ext::narrow<half>(from[j]);
  }
};

#if defined(__x86_64__)
template <>
struct Conversion<Isa::avx2, half> {
  static constexpr int lanes = 8, block = 16;
  [[gnu::target("avx2,f16c")]] static void widen(const half* from, float* to) {
    const auto halves = reinterpret_cast<const __m128i*>(from);
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(halves)));
    _mm256_storeu_ps(to + lanes, _mm256_cvtph_ps(_mm_loadu_si128(halves + 1)));
  }
  [[gnu::target("avx2,f16c")]] static void narrow(const float* from, half* to) {
    const __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(from), 0);
    const __m128i high = _mm256_cvtps_ph(_mm256_loadu_ps(from + lanes), 0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_set_m128i(high, low));
  }
};
template <>
struct Conversion<Isa::avx512, half> {
  static constexpr int lanes = 16, block = 16;
  [[gnu::target("avx512f")]] static void widen(const half* from, float* to) {
    _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(all, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
  [[gnu::target("avx512f")]] static void narrow(const float* from, half* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(all, _mm512_loadu_ps(from), 0));
  }
  static constexpr __mmask16 all = 0xffff;  // g++ 12 warns of uninitialised values in the forms without a mask
};
#endif

// body(inputs, outputs, count): arrays of pointers to `count` elements in the type that T is computed in, for elements
// begin to end - 1 part by part, in an order within each part that is the same for all arrays. In the last part of
// 16-bit floats there are zeros beyond `end`, and results that nobody sees.
template <Isa isa, class T, size_t inputs, size_t outputs, class Body>
RELU_EXT_INLINE void staged(std::array<const T*, inputs> input, std::array<T*, outputs> output, int64_t begin,
                            int64_t end, Body body) {
  if constexpr (!is_16_bit<T>) {
    for (auto& pointer : input) pointer += begin;
    for (auto& pointer : output) pointer += begin;
    body(input, output, end - begin);
  } else {
    using Convert = Conversion<isa, T>;
    constexpr int block = Convert::block, lanes = Convert::lanes;
    alignas(64) float result[outputs][block];
    const auto compute = [&](const auto& input) RELU_EXT_INLINE_LAMBDA {
      alignas(64) float wide[inputs][block];
#pragma GCC unroll 8
      for (size_t k = 0; k < inputs; ++k) Convert::widen(input[k], wide[k]);
      for (int part = 0; part < block; part += lanes) {
        std::array<const float*, inputs> from;
        std::array<float*, outputs> to;
#pragma GCC unroll 8
        for (size_t k = 0; k < inputs; ++k) from[k] = wide[k] + part;
        for (size_t k = 0; k < outputs; ++k) to[k] = result[k] + part;
        body(from, to, lanes);
      }
    };
    int64_t i = begin;
    for (; i + block <= end; i += block) {
      std::array<const T*, inputs> here = input;
      for (auto& pointer : here) pointer += i;
      compute(here);
      for (size_t k = 0; k < outputs; ++k) Convert::narrow(result[k], output[k] + i);
    }
    if (i == end) return;
    const size_t bytes = size_t(end - i) * sizeof(T);
    T last[inputs][block] = {}, part[block];
    for (size_t k = 0; k < inputs; ++k) std::memcpy(last[k], input[k] + i, bytes);
    compute(last);
    for (size_t k = 0; k < outputs; ++k) {
      Convert::narrow(result[k], part);
      std::memcpy(output[k] + i, part, bytes);
    }
  }
}

// output[i] = a[i] * b for elements 0 to count - 1, b being one factor for all or one for each.
template <Isa isa, class T>
RELU_EXT_INLINE void multiply(const T* a, Arithmetic<T> b, T* output, int64_t count) {
  staged<isa>(std::array{a}, std::array{output}, 0, count,
              [=](auto& from, auto& to, int64_t count) RELU_EXT_INLINE_LAMBDA {
                RELU_EXT_LANES
                for (int64_t j = 0; j < count; ++j) to[0][j] = from[0][j] * b;
              });
}
template <Isa isa, class T>
RELU_EXT_INLINE void multiply(const T* a, const T* b, T* output, int64_t count) {
  staged<isa>(std::array{a, b}, std::array{output}, 0, count,
              [=](auto& from, auto& to, int64_t count) RELU_EXT_INLINE_LAMBDA {
                RELU_EXT_LANES
                for (int64_t j = 0; j < count; ++j) to[0][j] = from[0][j] * from[1][j];
              });
}

// Activations that choose between an element and its product with a factor; of 16-bit floats the products are made a
// block at a time, and what is left is a selection like any other.
template <class T, class Activation>
struct Products {
  const T* product;
};
template <class T, class Activation>
struct ProductOf {
  static constexpr bool keeps_bits = true;
  T product;

  static RELU_EXT_INLINE bool keep(T input) { return Activation::keep(input); }
  RELU_EXT_INLINE T forward(T input, bool keep) const { return Activation::choose(keep, input, product); }
  RELU_EXT_INLINE T backward(T grad, bool keep) const { return forward(grad, keep); }
};
template <class T, class Activation>
RELU_EXT_INLINE ProductOf<T, Activation> at(Products<T, Activation> products, int64_t i) {
  return {products.product[i]};
}

// The factors from element i on: one for all, or one for each.
template <class T>
RELU_EXT_INLINE Arithmetic<T> factors_from(const LeakyRelu<T, Device::cpu>& act, int64_t) {
  return act.slope;
}
template <class T>
RELU_EXT_INLINE const T* factors_from(Slopes<T> slopes, int64_t i) {
  return slopes.slope + i;
}

// body(act, i, count) for all elements at once, or for the blocks of which there are products.
template <Isa isa, class Activation, class T, class Body>
RELU_EXT_INLINE void with_products(Activation act, const T* factor, int64_t begin, int64_t end, Body body) {
  if constexpr (Activation::effort == Effort::selection || !is_16_bit<T>)
    return body(act, begin, end - begin);
  else
    for_blocks<64>(begin, end, [=](int64_t i, int count) RELU_EXT_INLINE_LAMBDA {
      alignas(64) T product[64];
      multiply<isa>(factor + i, factors_from(act, i), &product[0], count);
      body(Products<T, std::decay_t<decltype(at(act, i))>>{product}, i, count);
    });
}

// body(bits), or body(NoBits{}) where they are null: a function for each. In one, g++ takes null for unlikely and does
// not align the loop that follows, which cost relu_ in float64 twice its time.
struct NoBits {};
template <class Activation, class Body>
void with_bits(uint8_t* bits, Body body) {
  if constexpr (Activation::keeps_bits)
    if (bits) return body(bits);
  body(NoBits{});
}

// What a kernel runs by at most: AVX-512 where there is much to be done for each byte. What waits for memory gains
// nothing by it, and loses where an output lies 64 bytes further in its page than the input, as where glibc places one
// tensor behind another: a load of a whole line then waits for the store before it, whose address has the same lowest
// bits. On Zen 4 (benchmarks/builds.py --apart), 128K elements, AVX2 takes 0.63 to 0.98 of the time there and 0.97 to
// 1.13 elsewhere (relu_squared's backward pass in float64 1.05 and 1.12). Where 16-bit floats are computed with it
// takes 1.0 to 1.9; in float16 with bits 0.86 to 1.0, as a comparison into a mask is slow.
template <Effort effort, class T, class Bits = NoBits>
constexpr Isa most_of() {
  if (effort == Effort::exponential) return Isa::avx512;
  const bool slow_in_masks = std::is_same_v<T, half> && !std::is_same_v<Bits, NoBits>;
  return effort == Effort::product && is_16_bit<T> && !slow_in_masks ? Isa::avx512 : Isa::avx2;
}

// Of an activation that keeps bits and does not compute, or not in 16 bits. input: see forward_loop.
template <Isa isa, class Activation, class Input, class T>
RELU_EXT_INLINE void selecting_loop(Activation act, Input input, T* output, NoBits, int64_t count) {
  forward_loop(act, input, output, 0, count);
}
template <Isa isa, class Activation, class Input, class T>
RELU_EXT_INLINE void selecting_loop(Activation act, Input input, T* output, uint8_t* bits, int64_t count) {
  forward_bits_loop<isa>(act, input, output, bits, 0, count);
}
RELU_EXT_INLINE NoBits bits_from(NoBits, int64_t) { return {}; }
RELU_EXT_INLINE uint8_t* bits_from(uint8_t* bits, int64_t i) { return bits + i / 8; }

template <Isa isa, class Activation, class T, class Bits>
RELU_EXT_INLINE void forward_loops(Activation act, const T* input, T* output, Bits bits, int64_t begin, int64_t end) {
  if constexpr (Activation::keeps_bits)
    with_products<isa>(act, input, begin, end, [=](auto act, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
      selecting_loop<isa>(act, elements(input + i), output + i, bits_from(bits, i), count);
    });
  else
    staged<isa>(std::array{input}, std::array{output}, begin, end,
                [=](auto& from, auto& to, int64_t count)
                    RELU_EXT_INLINE_LAMBDA { forward_loop(act, elements(from[0]), to[0], 0, count); });
}

template <Isa isa, Kept kept, class Activation, class T, class K>
RELU_EXT_INLINE void backward_loops(Activation act, const T* grad, const K* value, T* output, int64_t begin,
                                    int64_t end) {
  if constexpr (kept == Kept::bits)
    with_products<isa>(act, grad, begin, end, [=](auto act, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
      backward_bits_loop<isa>(act, grad + i, value + i / 8, into(output + i), 0, count);
    });
  else
    staged<isa>(std::array{grad, value}, std::array{output}, begin, end,
                [=](auto& from, auto& to, int64_t count)
                    RELU_EXT_INLINE_LAMBDA { backward_loop<kept>(act, from[0], from[1], to[0], 0, count); });
}

// By the bit that keep makes of the value: the forward's input, or an output of which it makes the same.
template <Isa isa, class Activation, class T>
RELU_EXT_INLINE void backward_by_value_loops(Activation act, const T* grad, const T* value, T* output, int64_t count) {
  with_products<isa>(act, grad, 0, count, [=](auto act, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
    RELU_EXT_LANES
    for (int64_t k = i; k < i + count; ++k) output[k] = at(act, k - i).backward(grad[k], at(act, k - i).keep(value[k]));
  });
}

}  // namespace relu_ext::cpu
