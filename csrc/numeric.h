// Element types without torch: 16-bit floats as their bits, and the branch-free selection that every activation is made
// of. Plain C++17 that g++, clang and nvcc turn into vectors.
#pragma once
#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define RELU_EXT_INLINE __host__ __device__ __forceinline__
#else
#define RELU_EXT_INLINE __attribute__((always_inline)) inline
#endif

namespace relu_ext {

// A 16-bit float is compared as IEEE compares it, in 16-bit integers: as many lanes to a vector as there are elements,
// and no conversion. `infinity` is the bit pattern of infinity; greater magnitudes are NaN.
template <uint16_t infinity>
struct Float16 {
  uint16_t bits;

  RELU_EXT_INLINE bool is_nan() const { return uint16_t(bits & 0x7fff) > infinity; }

  // Grows with the value from 0 for -infinity, the same for both zeros; every NaN ranks above +infinity, the negative
  // ones by wrapping around.
  RELU_EXT_INLINE uint16_t rank() const {
    const int16_t sign = int16_t(int16_t(bits) >> 15);                      // 0 or -1
    const int16_t order = int16_t((int16_t(bits & 0x7fff) ^ sign) - sign);  // sign and magnitude to two's complement
    return uint16_t(order + infinity);
  }
};

// `&`, not `&&`: a branch would keep the loop around it scalar.
template <uint16_t infinity>
RELU_EXT_INLINE bool operator<=(Float16<infinity> a, Float16<infinity> b) {
  return (a.rank() <= b.rank()) & !b.is_nan();
}

using half = Float16<0x7c00>;
using bfloat16 = Float16<0x7f80>;

template <int bytes>
struct WordOf;
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<8> {
  using type = uint64_t;
};
// The unsigned integer as wide as T.
template <class T>
using Word = typename WordOf<sizeof(T)>::type;

// keep ? a : b. Both are values already computed, so a loop around it becomes a vector blend. On integers, because
// g++ 12 does not vectorise a conditional of structs.
template <class T>
RELU_EXT_INLINE T select(bool keep, T a, T b) {
  Word<T> bits_a, bits_b;
  std::memcpy(&bits_a, &a, sizeof(T));
  std::memcpy(&bits_b, &b, sizeof(T));
  const Word<T> bits = keep ? bits_a : bits_b;
  T selected;
  std::memcpy(&selected, &bits, sizeof(T));
  return selected;
}

}  // namespace relu_ext
