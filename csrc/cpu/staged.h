// Work in chunks that stay in the first-level cache. float16 in operations that compute becomes float for a chunk, goes
// through the loops as such, and is rounded back: compilers do not use the instructions for it by themselves.
#pragma once
#include <algorithm>
#include <array>

#include "loops.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace relu_ext::cpu {

constexpr int chunk = 512;  // elements, a multiple of 64

#if defined(__x86_64__)
[[gnu::target("avx2,f16c")]] inline void widen_avx2(const half* from, float* to) {
  for (int j = 0; j < chunk; j += 8)
    _mm256_storeu_ps(to + j, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j))));
}
[[gnu::target("avx2,f16c")]] inline void narrow_avx2(const float* from, half* to) {
  for (int j = 0; j < chunk; j += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + j), _mm256_cvtps_ph(_mm256_loadu_ps(from + j), 0));
}
[[gnu::target("avx512f")]] inline void widen_avx512(const half* from, float* to) {
  for (int j = 0; j < chunk; j += 16)
    _mm512_storeu_ps(to + j, _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + j))));
}
[[gnu::target("avx512f")]] inline void narrow_avx512(const float* from, half* to) {
  for (int j = 0; j < chunk; j += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j), _mm512_cvtps_ph(_mm512_loadu_ps(from + j), 0));
}
#endif

inline void widen_chunk(const half* from, float* to) {
#if defined(__x86_64__)
  if (chosen_isa() == Isa::avx512) return widen_avx512(from, to);
  if (chosen_isa() == Isa::avx2) return widen_avx2(from, to);
#endif
  RELU_EXT_LANES
  for (int j = 0; j < chunk; ++j) to[j] = widen(from[j]);
}
inline void narrow_chunk(const float* from, half* to) {
#if defined(__x86_64__)
  if (chosen_isa() == Isa::avx512) return narrow_avx512(from, to);
  if (chosen_isa() == Isa::avx2) return narrow_avx2(from, to);
#endif
  RELU_EXT_LANES
  for (int j = 0; j < chunk; ++j) to[j] = narrow<half>(from[j]);
}

// loop(inputs, output, i, count): floats of elements i to i + count - 1, where i is a multiple of 64.
template <class Inputs, class Loop>
void in_chunks(const Inputs& inputs, half* output, int64_t begin, int64_t end, Loop loop) {
  constexpr size_t operands = std::tuple_size_v<Inputs>;
  alignas(64) float wide[operands][chunk], result[chunk];
  alignas(64) half part[chunk] = {};
  for (int64_t i = begin; i < end; i += chunk) {
    const int count = int(std::min<int64_t>(chunk, end - i));
    const bool whole = count == chunk;
    for (size_t operand = 0; operand < operands; ++operand) {
      if (!whole) std::memcpy(part, inputs[operand] + i, size_t(count) * sizeof(half));
      widen_chunk(whole ? inputs[operand] + i : part, wide[operand]);
    }
    loop(wide, result, i, count);
    narrow_chunk(result, whole ? output + i : part);
    if (!whole) std::memcpy(output + i, part, size_t(count) * sizeof(half));
  }
}

// The same for every type: those but half are not copied.
template <class Inputs, class T, class Loop>
void in_chunks(const Inputs& inputs, T* output, int64_t begin, int64_t end, Loop loop) {
  for (int64_t i = begin; i < end; i += chunk) {
    Inputs here = inputs;
    for (auto& input : here) input += i;
    loop(here, output + i, i, int(std::min<int64_t>(chunk, end - i)));
  }
}

}  // namespace relu_ext::cpu
