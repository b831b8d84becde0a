// Dropout's random bits, by the vector.
#pragma once
#include <algorithm>

#include "../epilogue.h"
#include "staged.h"

namespace relu_ext::cpu {

// The words of so many groups of eight elements, in any instruction set.
template <Isa>
struct Random {
  static constexpr int groups = 8;
  static void words(const Stream& stream, uint64_t group, uint32_t (&word)[4][groups]) {
    for (int g = 0; g < groups; ++g) {
      const Block block = random_block(stream.seed, stream.offset, group + g);
      for (int k = 0; k < 4; ++k) word[k][g] = block.word[k];
    }
  }
};

#if defined(__x86_64__)
namespace avx2 {

// g++ 12 makes twice as many instructions of the products' halves.
struct Lanes {
  __m256i words;
};
[[gnu::target("avx2")]] inline void multiply(const Lanes& a, uint32_t multiplier, Lanes& high, Lanes& low) {
  const __m256i by = _mm256_set1_epi32(int(multiplier));
  const __m256i even = _mm256_mul_epu32(a.words, by), odd = _mm256_mul_epu32(_mm256_srli_epi64(a.words, 32), by);
  high.words = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0b10101010);
  low.words = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0b10101010);
}
[[gnu::target("avx2")]] inline Lanes mix(const Lanes& a, const Lanes& b, uint32_t key) {
  return {_mm256_xor_si256(_mm256_xor_si256(a.words, b.words), _mm256_set1_epi32(int(key)))};
}

}  // namespace avx2

template <>
struct Random<Isa::avx2> {
  // Four vectors under way hide each other's latency: 0.6 of the time of one.
  static constexpr int vectors = 4, lanes = 8, groups = vectors * lanes;
  [[gnu::target("avx2")]] static void words(const Stream& stream, uint64_t group, uint32_t (&word)[4][groups]) {
#pragma GCC unroll 4
    for (int first = 0; first < groups; first += lanes) {
      alignas(32) uint32_t counters[4][lanes];
      for (int g = 0; g < lanes; ++g) {
        const uint64_t own = group + uint64_t(first + g);
        counters[0][g] = uint32_t(own);
        counters[1][g] = uint32_t(own >> 32);
        counters[2][g] = uint32_t(stream.offset);
        counters[3][g] = uint32_t(stream.offset >> 32);
      }
      avx2::Lanes counter[4];
      std::memcpy(counter, counters, sizeof(counter));
      Words<avx2::Lanes> block;
      random_block(stream.seed, counter, block);
      for (int k = 0; k < 4; ++k) std::memcpy(&word[k][first], &block.word[k], sizeof(block.word[k]));
    }
  }
};
template <>
struct Random<Isa::avx512> : Random<Isa::avx2> {};
#endif

constexpr int most_groups = 32;  // of a call of words

// Bit i of `drawn`: whether dropout leaves element begin + i. begin and count are multiples of 8; up to most_groups - 1
// bytes more are written.
inline void draw(const Dropout& dropout, int64_t begin, int64_t count, uint8_t* drawn) {
  vectorised([=, &dropout](auto isa) RELU_EXT_INLINE_LAMBDA {
    using Own = Random<decltype(isa)::value>;
    static_assert(Own::groups <= most_groups);
    const uint32_t last = dropout.last;
    for (int64_t group = 0; group < count / 8; group += Own::groups) {
      alignas(64) uint32_t word[4][Own::groups];
      Own::words(dropout.stream, uint64_t(begin / 8 + group), word);
      uint8_t* const to = drawn + group;
      RELU_EXT_LANES
      for (int g = 0; g < Own::groups; ++g) {
        uint32_t byte = 0;
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) {
          byte |= (word[k][g] & 0xffffu) <= last ? 1u << 2 * k : 0u;
          byte |= word[k][g] >> 16 <= last ? 2u << 2 * k : 0u;
        }
        to[g] = uint8_t(byte);
      }
    }
  });
}

}  // namespace relu_ext::cpu
