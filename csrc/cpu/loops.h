// The loops, in plain C++ that the compiler turns into vectors of whatever width the instruction set has.
//
// The bits of a block of elements are gathered in one integer. Where elements are 32 or 64 bits wide, a block is as
// many elements as an element has bits: every lane builds or tests its own bit, word |= keep ? bit[j] : 0, and no lane
// needs another. One body serves whole blocks (constant count) and the tail.
#pragma once
#include "../activations.h"
#include "isa.h"
#if defined(__x86_64__)
#include <emmintrin.h>
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

// Sixty-four bytes, each 0 or 255, to bits.
RELU_EXT_INLINE uint64_t pack(const uint8_t* bytes) {
  uint64_t bits = 0;
#if defined(__x86_64__)  // SSE2 is part of x86-64; no compiler finds movemask by itself
  for (int j = 0; j < 4; ++j)
    bits |= uint64_t(_mm_movemask_epi8(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes) + j))) << 16 * j;
#else
  for (int j = 0; j < 8; ++j) {  // the product gathers the eight lowest bits in the top byte
    uint64_t eight;
    std::memcpy(&eight, bytes + 8 * j, 8);
    bits |= ((eight & 0x0101010101010101u) * 0x0102040810204080u >> 56) << 8 * j;
  }
#endif
  return bits;
}

// The activation of element i: the same for all, or one that is given for each.
template <class Activation>
RELU_EXT_INLINE const Activation& at(const Activation& act, int64_t) {
  return act;
}
template <class T>
struct Slopes {
  static constexpr bool keeps_bits = true;
  static constexpr bool computes = true;
  const Arithmetic<T>* slope;
};
template <class T>
RELU_EXT_INLINE LeakyRelu<T, Device::cpu> at(Slopes<T> slopes, int64_t i) {
  return LeakyRelu<T, Device::cpu>(slopes.slope[i]);
}

template <class T, class Activation>
RELU_EXT_INLINE void forward_loop(Activation act, const T* input, T* output, int64_t begin, int64_t end) {
  RELU_EXT_LANES
  for (int64_t i = begin; i < end; ++i) output[i] = output_of(at(act, i), input[i]);
}

template <class T, class Activation>
RELU_EXT_INLINE void forward_bits_loop(Activation act, const T* input, T* output, uint8_t* bits, int64_t begin,
                                       int64_t end) {
  constexpr bool from_bytes = sizeof(T) == 2;  // or-ing sixteen short lanes together takes longer than all the rest
  for_blocks<from_bytes ? 64 : 8 * sizeof(T)>(begin, end, [=](int64_t i, int count) RELU_EXT_INLINE_LAMBDA {
    uint64_t kept = 0;
    if constexpr (from_bytes) {
      alignas(64) uint8_t bytes[64] = {};
      uint16_t byte = 0xff;
      asm("" : "+r"(byte));  // of a constant, g++ would make the negative of a bool: twice the instructions
      RELU_EXT_LANES
      for (int j = 0; j < count; ++j) {
        const T x = input[i + j];
        const bool keep = at(act, i + j).keep(x);
        output[i + j] = at(act, i + j).forward(x, keep);
        bytes[j] = uint8_t(keep ? byte : uint16_t(0));
      }
      kept = pack(bytes);
    } else {
      Word<T> lanes = 0;
      RELU_EXT_LANES
      for (int j = 0; j < count; ++j) {
        const T x = input[i + j];
        const bool keep = at(act, i + j).keep(x);
        output[i + j] = at(act, i + j).forward(x, keep);
        lanes |= keep ? single<Word<T>>.bit[j] : Word<T>(0);
      }
      kept = lanes;
    }
    std::memcpy(bits + i / 8, &kept, (count + 7) / 8);
  });
}

template <Kept, class T, class Activation>
RELU_EXT_INLINE void backward_loop(Activation act, const T* grad, const uint8_t* bits, T* output, int64_t begin,
                                   int64_t end) {
  for_blocks<8 * sizeof(T)>(begin, end, [=](int64_t i, int count) RELU_EXT_INLINE_LAMBDA {
    Word<T> kept = 0;
    std::memcpy(&kept, bits + i / 8, (count + 7) / 8);
    RELU_EXT_LANES
    for (int j = 0; j < count; ++j)
      output[i + j] = at(act, i + j).backward(grad[i + j], (kept & single<Word<T>>.bit[j]) != 0);
  });
}

template <Kept kept, class T, class Activation>
RELU_EXT_INLINE void backward_loop(Activation act, const T* grad, const T* value, T* output, int64_t begin,
                                   int64_t end) {
  RELU_EXT_LANES
  for (int64_t i = begin; i < end; ++i) output[i] = gradient_of<kept>(act, grad[i], value[i]);
}

}  // namespace relu_ext::cpu
