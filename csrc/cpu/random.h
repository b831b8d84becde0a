// Dropout's random bits, by the vector.
#pragma once
#include <algorithm>

#include "../epilogue.h"
#include "staged.h"

namespace relu_ext::cpu {

// A byte for each group of eight elements from `group` to end - 1, whose upper halves are the same: its bits are those
// of the elements whose number is at most `last`. Up to `groups` - 1 bytes more are written.
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

// Words in the lower halves of 64 bits, where a product needs no more than a shift; the upper halves are of no account.
// Three vectors, step by step side by side, hide each other's latency (of 1 to 4, the least time on an EPYC 7003). By
// hand, because g++ 12 makes twice as many instructions of the products.
constexpr int vectors = 3, lanes = 4;
struct Lanes {
  __m256i words[vectors];
};
[[gnu::target("avx2")]] inline void multiply(const Lanes& a, uint32_t multiplier, Lanes& high, Lanes& low) {
  for (int i = 0; i < vectors; ++i) {
    low.words[i] = _mm256_mul_epu32(a.words[i], _mm256_set1_epi64x(multiplier));
    high.words[i] = _mm256_srli_epi64(low.words[i], 32);
  }
}
struct Key {
  __m256i lanes;
};
[[gnu::target("avx2")]] inline Lanes mix(const Lanes& a, const Lanes& b, const Key& key) {
  Lanes mixed;
  for (int i = 0; i < vectors; ++i)
    mixed.words[i] = _mm256_xor_si256(a.words[i], _mm256_xor_si256(b.words[i], key.lanes));
  return mixed;
}
[[gnu::target("avx2")]] inline Lanes same(uint64_t word) {
  Lanes all;
  for (auto& words : all.words) words = _mm256_set1_epi64x(int64_t(word));
  return all;
}
[[gnu::target("avx2")]] inline Lanes numbered(uint64_t group) {
  Lanes numbers;
  for (int i = 0; i < vectors; ++i)
    numbers.words[i] = _mm256_add_epi64(_mm256_set1_epi64x(int64_t(group)), _mm256_set_epi64x(3, 2, 1, 0) + lanes * i);
  return numbers;
}
[[gnu::target("avx2")]] inline philox::Keys<Key> in_all_lanes(const philox::Keys<uint32_t>& keys) {
  philox::Keys<Key> wide;
  for (int round = 0; round < philox::rounds; ++round)
    for (int i = 0; i < 2; ++i) wide.key[round][i].lanes = _mm256_set1_epi64x(keys.key[round][i]);
  return wide;
}

// All ones or zeros for each 16 bits of 32 of a and then 32 of b: whether they are at most `last`.
[[gnu::target("avx2")]] inline __m256i at_most(__m256i a, __m256i b, uint16_t last) {
  const __m256i numbers = _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0b10101010);
  return _mm256_cmpeq_epi16(_mm256_min_epu16(numbers, _mm256_set1_epi16(int16_t(last))), numbers);
}
// Bit i of byte g: of the i-th number of group g.
[[gnu::target("avx2")]] inline uint32_t bits(__m256i first_four, __m256i last_four) {
  const __m256i bytes = _mm256_packs_epi16(first_four, last_four);  // of 128 bits each: first fours, last fours
  return uint32_t(_mm256_movemask_epi8(_mm256_shuffle_epi32(bytes, 0b11011000)));
}

}  // namespace avx2

template <>
struct Random<Isa::avx2> {
  static constexpr int groups = avx2::vectors * avx2::lanes;
  [[gnu::target("avx2")]] static void draw(const Stream& stream, uint64_t group, uint64_t end, uint16_t last,
                                           uint8_t* drawn) {
    const auto keys = avx2::in_all_lanes(philox::keys_of(stream.seed));
    const avx2::Lanes upper = avx2::same(group >> 32);
    const avx2::Lanes offset[] = {avx2::same(uint32_t(stream.offset)), avx2::same(stream.offset >> 32)};
    for (; group < end; group += groups, drawn += groups) {
      const auto [a, b, c, d] = random_block(keys, {avx2::numbered(group), upper, offset[0], offset[1]}).word;
      for (int i = 0; i < avx2::vectors; ++i) {
        const uint32_t bytes =
            avx2::bits(avx2::at_most(a.words[i], b.words[i], last), avx2::at_most(c.words[i], d.words[i], last));
        std::memcpy(drawn + avx2::lanes * i, &bytes, sizeof(bytes));
      }
    }
  }
};
template <>
struct Random<Isa::avx512> : Random<Isa::avx2> {};
#endif

constexpr int most_groups = 16;  // that an instruction set draws at once

// Bit i of `drawn`: whether dropout leaves element begin + i. begin is a multiple of 8, count no more than elements
// have bits in `drawn`, of which up to most_groups - 1 bytes more are written.
template <Isa isa>
void draw(const Dropout& dropout, int64_t begin, int64_t count, uint8_t* drawn) {
  using Own = Random<isa>;
  static_assert(Own::groups <= most_groups);
  const uint64_t end = uint64_t(begin + count + 7) / 8;
  for (uint64_t group = uint64_t(begin) / 8, stop; group < end; drawn += stop - group, group = stop) {
    stop = std::min(end, (group | ~uint32_t(0)) + 1);
    Own::draw(dropout.stream, group, stop, dropout.last, drawn);
  }
}

}  // namespace relu_ext::cpu
