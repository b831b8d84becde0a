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

template <class T>
constexpr bool is_16_bit = sizeof(T) == 2;

// A block is widened by so many `lanes` at once and narrowed as a whole: what is read next is a vector of 16-bit
// floats, and two stores of half a vector each would keep it waiting. Not always_inline: g++ would inline them into a
// lambda before that is inlined where these instructions exist, and refuse.
template <Isa>
struct Conversion {
  static constexpr int lanes = 64, block = 64;
  template <class T>
  static void widen(const T* from, float* to) {
    RELU_EXT_LANES
    for (int j = 0; j < lanes; ++j) to[j] = relu_ext::widen(from[j]);
  }
  template <class T>
  static void narrow(const float* from, T* to) {
    RELU_EXT_LANES
    for (int j = 0; j < block; ++j) to[j] = relu_ext::narrow<T>(from[j]);
  }
};

#if defined(__x86_64__)
template <>
struct Conversion<Isa::avx2> {
  static constexpr int lanes = 8, block = 16;
  [[gnu::target("avx2,f16c")]] static void widen(const half* from, float* to) {
    _mm256_storeu_ps(to, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  [[gnu::target("avx2,f16c")]] static void narrow(const float* from, half* to) {
    const __m128i low = _mm256_cvtps_ph(_mm256_loadu_ps(from), 0), high = _mm256_cvtps_ph(_mm256_loadu_ps(from + 8), 0);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_set_m128i(high, low));
  }
  [[gnu::target("avx2,f16c")]] static void widen(const bfloat16* from, float* to) {
    const __m256i bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_slli_epi32(bits, 16));
  }
  [[gnu::target("avx2,f16c")]] static void narrow(const float* from, bfloat16* to) {
    const __m256i pairs = _mm256_packus_epi32(rounded(from), rounded(from + 8));  // of 128 bits each: 0 2 1 3
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(pairs, 0b11011000));
  }
  [[gnu::target("avx2,f16c")]] static __m256i rounded(const float* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  }
};
template <>
struct Conversion<Isa::avx512> {
  static constexpr int lanes = 16, block = 16;
  [[gnu::target("avx512f")]] static void widen(const half* from, float* to) {
    _mm512_storeu_ps(to, _mm512_maskz_cvtph_ps(all, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
  }
  [[gnu::target("avx512f")]] static void narrow(const float* from, half* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_maskz_cvtps_ph(all, _mm512_loadu_ps(from), 0));
  }
  [[gnu::target("avx512f")]] static void widen(const bfloat16* from, float* to) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    _mm512_storeu_si512(to, _mm512_maskz_slli_epi32(all, _mm512_maskz_cvtepu16_epi32(all, bits), 16));
  }
  [[gnu::target("avx512f")]] static void narrow(const float* from, bfloat16* to) {
    const __m512i bits = _mm512_loadu_si512(from);
    const __m512i odd = _mm512_and_si512(_mm512_maskz_srli_epi32(all, bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                        _mm512_maskz_cvtepi32_epi16(all, _mm512_maskz_srli_epi32(all, rounded, 16)));
  }
  static constexpr __mmask16 all = 0xffff;  // g++ 12 warns of uninitialised values in the forms without a mask
};
#endif

// body(inputs, outputs, i, count): arrays of pointers to elements i to i + count - 1, in the type that T is computed
// in. In the last block of 16-bit floats those beyond `end` are zeros, and results that nobody sees.
template <Isa isa, class T, size_t inputs, size_t outputs, class Body>
RELU_EXT_INLINE void staged(std::array<const T*, inputs> input, std::array<T*, outputs> output, int64_t begin,
                            int64_t end, Body body) {
  if constexpr (!is_16_bit<T>) {
    for (auto& pointer : input) pointer += begin;
    for (auto& pointer : output) pointer += begin;
    body(input, output, begin, end - begin);
  } else {
    using Convert = Conversion<isa>;
    constexpr int block = Convert::block, lanes = Convert::lanes;
    alignas(64) float result[outputs][block];
    const auto compute = [&](const auto& input, int64_t i) RELU_EXT_INLINE_LAMBDA {
      for (int part = 0; part < block; part += lanes) {
        alignas(64) float wide[inputs][lanes];
        std::array<const float*, inputs> from;
        std::array<float*, outputs> to;
        for (size_t k = 0; k < inputs; ++k) Convert::widen(input[k] + part, wide[k]);
        for (size_t k = 0; k < inputs; ++k) from[k] = wide[k];
        for (size_t k = 0; k < outputs; ++k) to[k] = result[k] + part;
        body(from, to, i + part, lanes);
      }
    };
    int64_t i = begin;
    for (; i + block <= end; i += block) {
      std::array<const T*, inputs> here = input;
      for (auto& pointer : here) pointer += i;
      compute(here, i);
      for (size_t k = 0; k < outputs; ++k) Convert::narrow(result[k], output[k] + i);
    }
    if (i == end) return;
    const size_t bytes = size_t(end - i) * sizeof(T);
    T last[inputs][block] = {}, part[block];
    for (size_t k = 0; k < inputs; ++k) std::memcpy(last[k], input[k] + i, bytes);
    compute(last, i);
    for (size_t k = 0; k < outputs; ++k) {
      Convert::narrow(result[k], part);
      std::memcpy(output[k] + i, part, bytes);
    }
  }
}

// LeakyRelu of 16-bit floats: its products, a block of them at a time, then a selection like any other.
template <class T>
struct Products {
  const T* product;
};
template <class T>
struct ProductOf {
  static constexpr bool keeps_bits = true;
  T product;

  static RELU_EXT_INLINE bool keep(T input) { return LeakyRelu<T, Device::cpu>::keep(input); }
  RELU_EXT_INLINE T forward(T input, bool keep) const { return select(keep, input, product); }
  RELU_EXT_INLINE T backward(T grad, bool keep) const { return forward(grad, keep); }
};
template <class T>
RELU_EXT_INLINE ProductOf<T> at(Products<T> products, int64_t i) {
  return {products.product[i]};
}

// body(act, i, count) for all elements at once, or for the blocks of which there are products.
template <Isa isa, class Activation, class T, class Body>
RELU_EXT_INLINE void with_products(Activation act, const T* factor, int64_t begin, int64_t end, Body body) {
  if constexpr (!Activation::computes || !is_16_bit<T>)
    return body(act, begin, end - begin);
  else
    for_blocks<64>(begin, end, [=](int64_t i, int count) RELU_EXT_INLINE_LAMBDA {
      alignas(64) T product[64];
      staged<isa>(std::array{factor + i}, std::array{&product[0]}, 0, count,
                  [=](auto& from, auto& to, int64_t first, int64_t count) RELU_EXT_INLINE_LAMBDA {
                    RELU_EXT_LANES
                    for (int64_t j = 0; j < count; ++j) to[0][j] = from[0][j] * at(act, i + first + j).slope;
                  });
      body(Products<T>{product}, i, count);
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

template <Isa isa, class Activation, class T, class Bits>
RELU_EXT_INLINE void forward_loops(Activation act, const T* input, T* output, Bits bits, int64_t begin, int64_t end) {
  if constexpr (Activation::keeps_bits)
    with_products<isa>(act, input, begin, end, [=](auto act, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
      if constexpr (std::is_same_v<Bits, NoBits>)
        forward_loop(act, input + i, output + i, 0, count);
      else
        forward_bits_loop<isa>(act, input + i, output + i, bits + i / 8, 0, count);
    });
  else
    staged<isa>(std::array{input}, std::array{output}, begin, end,
                [=](auto& from, auto& to, int64_t, int64_t count)
                    RELU_EXT_INLINE_LAMBDA { forward_loop(act, from[0], to[0], 0, count); });
}

template <Isa isa, Kept kept, class Activation, class T, class K>
RELU_EXT_INLINE void backward_loops(Activation act, const T* grad, const K* value, T* output, int64_t begin,
                                    int64_t end) {
  if constexpr (kept == Kept::bits)
    with_products<isa>(act, grad, begin, end, [=](auto act, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
      backward_loop<isa, kept>(act, grad + i, value + i / 8, output + i, 0, count);
    });
  else
    staged<isa>(std::array{grad, value}, std::array{output}, begin, end,
                [=](auto& from, auto& to, int64_t, int64_t count)
                    RELU_EXT_INLINE_LAMBDA { backward_loop<isa, kept>(act, from[0], from[1], to[0], 0, count); });
}

}  // namespace relu_ext::cpu
