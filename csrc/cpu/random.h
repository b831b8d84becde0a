// Dropout's random bits, by the vector.
#pragma once
#include <algorithm>

#include "../epilogue.h"
#include "staged.h"

namespace relu_ext::cpu {

// A byte for each group of eight elements from `group` on, which is a multiple of 8, to end - 1: its bits are those of
// the elements whose number is at most `last`. Up to `groups` - 1 bytes more are written.
template <Isa>
struct Random {
  static constexpr int groups = 1;
  static void draw(const Stream& stream, uint64_t group, uint64_t end, uint16_t last, uint8_t* drawn) {
    for (; group < end; ++group) {
      const Block block = random_block(stream.seed, stream.offset, group);
      uint8_t byte = 0;
      for (int i = 0; i < 8; ++i) byte |= uint8_t((random_of(block, i) <= last) << i);
      *drawn++ = byte;
    }
  }
};

#if defined(__x86_64__)
namespace avx2 {

// Two vectors, step by step side by side, hide each other's latency. By hand, because g++ 12 makes twice as many
// instructions of the products' halves.
constexpr int vectors = 2, lanes = 8;
struct Lanes {
  __m256i words[vectors];
};
[[gnu::target("avx2")]] inline void multiply(const Lanes& a, uint32_t multiplier, Lanes& high, Lanes& low) {
  const __m256i by = _mm256_set1_epi32(int(multiplier));
  for (int i = 0; i < vectors; ++i) {
    const __m256i even = _mm256_mul_epu32(a.words[i], by);
    const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.words[i], 32), by);
    high.words[i] = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0b10101010);
    low.words[i] = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0b10101010);
  }
}
[[gnu::target("avx2")]] inline Lanes mix(const Lanes& a, const Lanes& b, uint32_t key) {
  Lanes mixed;
  for (int i = 0; i < vectors; ++i)
    mixed.words[i] = _mm256_xor_si256(_mm256_xor_si256(a.words[i], b.words[i]), _mm256_set1_epi32(int(key)));
  return mixed;
}
[[gnu::target("avx2")]] inline Lanes same(uint32_t word) {
  return {{_mm256_set1_epi32(int(word)), _mm256_set1_epi32(int(word))}};
}
// group is a multiple of 8: no lane's number carries into the upper half.
[[gnu::target("avx2")]] inline Lanes numbered(uint64_t group) {
  const __m256i number = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  return {{_mm256_or_si256(_mm256_set1_epi32(int(group)), number),
           _mm256_or_si256(_mm256_set1_epi32(int(group + lanes)), number)}};
}
[[gnu::target("avx2")]] inline Lanes upper(uint64_t group) {
  return {{_mm256_set1_epi32(int(group >> 32)), _mm256_set1_epi32(int((group + lanes) >> 32))}};
}

// Bit i of byte g: whether the i-th number of group g is at most `last`.
[[gnu::target("avx2")]] inline uint64_t at_most(const __m256i (&words)[4], uint16_t last) {
  __m256i bits = _mm256_setzero_si256();  // of even elements in the lower half of a word, of odd ones in the upper
  for (int k = 0; k < 4; ++k) {
    const __m256i least = _mm256_min_epu16(words[k], _mm256_set1_epi16(int16_t(last)));
    const __m256i own = _mm256_set1_epi32(int(1u << 2 * k | 2u << (2 * k + 16)));
    bits = _mm256_or_si256(bits, _mm256_and_si256(_mm256_cmpeq_epi16(least, words[k]), own));
  }
  bits = _mm256_or_si256(bits, _mm256_srli_epi32(bits, 16));
  const __m256i bytes = _mm256_shuffle_epi8(bits, _mm256_set1_epi64x(0x0c080400));  // of each half's four words
  return uint32_t(_mm256_extract_epi32(bytes, 0)) | uint64_t(uint32_t(_mm256_extract_epi32(bytes, 4))) << 32;
}

}  // namespace avx2

template <>
struct Random<Isa::avx2> {
  static constexpr int groups = avx2::vectors * avx2::lanes;
  [[gnu::target("avx2")]] static void draw(const Stream& stream, uint64_t group, uint64_t end, uint16_t last,
                                           uint8_t* drawn) {
    for (; group < end; group += groups, drawn += groups) {
      const avx2::Lanes counter[] = {avx2::numbered(group), avx2::upper(group), avx2::same(uint32_t(stream.offset)),
                                     avx2::same(uint32_t(stream.offset >> 32))};
      Words<avx2::Lanes> block;
      random_block(stream.seed, counter, block);
      for (int i = 0; i < avx2::vectors; ++i) {
        const __m256i words[] = {block.word[0].words[i], block.word[1].words[i], block.word[2].words[i],
                                 block.word[3].words[i]};
        const uint64_t bytes = avx2::at_most(words, last);
        std::memcpy(drawn + avx2::lanes * i, &bytes, sizeof(bytes));
      }
    }
  }
};
template <>
struct Random<Isa::avx512> : Random<Isa::avx2> {};
#endif

constexpr int most_groups = 16;  // that an instruction set draws at once

// Bit i of `drawn`: whether dropout leaves element begin + i. begin is a multiple of 64, count of 8; up to most_groups
// - 1 bytes more are written.
inline void draw(const Dropout& dropout, int64_t begin, int64_t count, uint8_t* drawn) {
  vectorised([=, &dropout](auto isa) RELU_EXT_INLINE_LAMBDA {
    using Own = Random<decltype(isa)::value>;
    static_assert(Own::groups <= most_groups);
    Own::draw(dropout.stream, uint64_t(begin / 8), uint64_t((begin + count) / 8), dropout.last, drawn);
  });
}

}  // namespace relu_ext::cpu
