// Element types without torch: 16-bit floats as their bits, their conversions, and the branch-free selection that every
// activation is made of. Plain C++17 that g++, clang and nvcc turn into vectors.
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

#ifdef __CUDACC__
#define RELU_EXT_INLINE __host__ __device__ __forceinline__
#else
#define RELU_EXT_INLINE __attribute__((always_inline)) inline
#endif

namespace relu_ext {

template <class To, class From>
RELU_EXT_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// A 16-bit float is compared as IEEE compares it, in 16-bit integers: as many lanes to a vector as there are elements,
// and no conversion. `infinity` is the bit pattern of infinity; greater magnitudes are NaN.
template <uint16_t infinity>
struct Float16 {
  uint16_t bits;

  RELU_EXT_INLINE bool is_nan() const { return magnitude() > int16_t(infinity); }
  RELU_EXT_INLINE bool is_zero() const { return magnitude() == 0; }
  RELU_EXT_INLINE int16_t magnitude() const { return int16_t(bits & 0x7fffu); }

  // Grows with the value from -2^15 for -infinity, the same for both zeros; every NaN ranks above +infinity, the
  // negative ones by wrapping around. Signed, because SSE and AVX2 compare signed integers only.
  RELU_EXT_INLINE int16_t rank() const {
    constexpr uint16_t zero = 0x8000u + infinity;
    const uint16_t positive = zero + bits, negative = zero + 0x8000u - bits;
    return int16_t(bits & 0x8000u ? negative : positive);
  }

  // Grows with the value, too, but -0 is just below +0 and NaN are beyond both infinities: fewer instructions where
  // NaN are told apart anyway.
  RELU_EXT_INLINE int16_t order() const { return int16_t(int16_t(bits) ^ (int16_t(int16_t(bits) >> 15) & 0x7fff)); }
  // Of a bound: that of one zero for both.
  RELU_EXT_INLINE int16_t order_or(int16_t zero) const { return is_zero() ? zero : order(); }
};

template <class T>
constexpr bool is_16_bit = sizeof(T) == 2;

// !(value <= bound), so true for NaN; the bound is a number. `>` alone, which is one instruction where `<=` takes two.
RELU_EXT_INLINE bool not_at_most(float value, float bound) { return !(value <= bound); }
RELU_EXT_INLINE bool not_at_most(double value, double bound) { return !(value <= bound); }
template <uint16_t infinity>
RELU_EXT_INLINE bool not_at_most(Float16<infinity> value, Float16<infinity> bound) {
  return value.rank() > bound.rank();
}

// !(value <= low) & !(value >= high), so true for NaN. `&`, not `&&`: a branch would keep the loop around it scalar.
template <class X>
RELU_EXT_INLINE bool between_or_nan(X value, X low, X high) {
  return !(value <= low) & !(value >= high);
}
template <uint16_t infinity>
RELU_EXT_INLINE bool between_or_nan(Float16<infinity> value, Float16<infinity> low, Float16<infinity> high) {
  return ((value.order() > low.order_or(0)) & (value.order() < high.order_or(-1))) | value.is_nan();
}

// value > bound, of numbers.
template <class X>
RELU_EXT_INLINE bool is_above(X value, X bound) {
  return value > bound;
}
template <uint16_t infinity>
RELU_EXT_INLINE bool is_above(Float16<infinity> value, Float16<infinity> bound) {
  return value.order() > bound.order_or(0);
}

// The greater and the lesser of both, or a value that is NaN: one instruction of x86, whose second operand this is.
template <class X>
RELU_EXT_INLINE X at_least_or_nan(X value, X bound) {
  return bound > value ? bound : value;
}
template <class X>
RELU_EXT_INLINE X at_most_or_nan(X value, X bound) {
  return bound < value ? bound : value;
}

// !(value <= 0)
RELU_EXT_INLINE bool not_at_most_0(float value) { return !(value <= 0); }
RELU_EXT_INLINE bool not_at_most_0(double value) { return !(value <= 0); }
template <uint16_t infinity>
RELU_EXT_INLINE bool not_at_most_0(Float16<infinity> value) {
  return !((int16_t(value.bits) <= int16_t(0x8000u | infinity)) | (value.bits == 0));
}

// value > 0
RELU_EXT_INLINE bool is_positive(float value) { return value > 0; }
RELU_EXT_INLINE bool is_positive(double value) { return value > 0; }
template <uint16_t infinity>
RELU_EXT_INLINE bool is_positive(Float16<infinity> value) {
  return (int16_t(value.bits) > 0) & (int16_t(value.bits) <= int16_t(infinity));
}

RELU_EXT_INLINE bool is_finite(float value) { return (bit_cast<uint32_t>(value) & 0x7f800000u) != 0x7f800000u; }
RELU_EXT_INLINE bool is_finite(double value) {
  constexpr uint64_t infinity = 0x7ffull << 52;
  return (bit_cast<uint64_t>(value) & infinity) != infinity;
}
template <uint16_t infinity>
RELU_EXT_INLINE bool is_finite(Float16<infinity> value) {
  return (value.bits & infinity) != infinity;
}

using half = Float16<0x7c00>;
using bfloat16 = Float16<0x7f80>;

// What a type is computed in: float for the 16-bit ones.
template <class T>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class T>
using Arithmetic = typename ArithmeticOf<T>::type;

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
  const Word<T> bits_a = bit_cast<Word<T>>(a), bits_b = bit_cast<Word<T>>(b);
  return bit_cast<T>(keep ? bits_a : bits_b);
}

// keep ? a * x : b * y. elu takes 0.9 of the time on the CPU with one product; on CUDA, which waits for memory, that
// would take registers that float16 does not have.
template <class X>
RELU_EXT_INLINE X select_product(bool keep, X a, X x, X b, X y) {
#ifdef __CUDA_ARCH__
  return select(keep, a * x, b * y);
#else
  const X value = select(keep, x, y);
  return value * select(keep, a, b);
#endif
}

// keep ? value : 0, by a mask. Of a selection g++ makes a load, where keep is true alone, of what value is computed
// from: with that from memory just stored, reglu's backward took 1.2 times as long in 16 bits.
template <class T>
RELU_EXT_INLINE T masked(bool keep, T value) {
  const Word<T> mask = keep ? Word<T>(-1) : Word<T>(0);
  return bit_cast<T>(Word<T>(bit_cast<Word<T>>(value) & mask));
}

// widen<T>: the same value in the type that T is computed in. narrow<T>: to T, to the nearest, ties to even; a NaN
// stays one. No step makes a subnormal float, so torch.set_flush_denormal changes nothing.
RELU_EXT_INLINE float widen(float value) { return value; }
RELU_EXT_INLINE double widen(double value) { return value; }
RELU_EXT_INLINE float widen(bfloat16 value) { return bit_cast<float>(uint32_t(value.bits) << 16); }
RELU_EXT_INLINE float widen(half value) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t magnitude = value.bits & 0x7fffu, sign = uint32_t(value.bits & 0x8000u) << 16;
  const uint32_t bias =
      select(magnitude >= 0x7c00u, 0x70000000u, 0x38000000u);  // 112 << 23; twice for infinity and NaN
  const uint32_t normal = (magnitude << 13) + bias;
  const uint32_t subnormal = bit_cast<uint32_t>(float(int32_t(magnitude)) * 0x1p-24f);  // so many times 2^-24
  return bit_cast<float>(sign | select(magnitude < 0x400u, subnormal, normal));
#endif
}

template <class T>
RELU_EXT_INLINE T narrow(Arithmetic<T> value) {
  return value;
}
// The nearest bfloat16 in the upper half, whatever in the lower.
RELU_EXT_INLINE uint32_t rounded_above(float value) {
  const uint32_t bits = bit_cast<uint32_t>(value);
  return bits + 0x7fffu + (bits >> 16 & 1u);
}
template <>
RELU_EXT_INLINE bfloat16 narrow<bfloat16>(float value) {
#ifdef __CUDA_ARCH__
  return {__bfloat16_as_ushort(__float2bfloat16_rn(value))};
#else
  return {uint16_t(rounded_above(value) >> 16)};
#endif
}
template <>
RELU_EXT_INLINE half narrow<half>(float value) {
#ifdef __CUDA_ARCH__
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bit_cast<uint32_t>(value), magnitude = bits & 0x7fffffffu;
  const uint32_t capped = select(magnitude < 0x47800000u, magnitude, 0x47800000u);  // from 2^16 on: infinity
  const uint32_t normal = (capped + 0xfffu + (capped >> 13 & 1u) - 0x38000000u) >> 13;
  const uint32_t subnormal = bit_cast<uint32_t>(bit_cast<float>(capped) + 0.5f) - 0x3f000000u;  // steps of 2^-24 there
  const uint32_t finite = select(magnitude < 0x38800000u, subnormal, normal);                   // 2^-14
  return {uint16_t((bits >> 16 & 0x8000u) | select(magnitude > 0x7f800000u, 0x7e00u, finite))};
#endif
}

// To T and back.
template <class T>
RELU_EXT_INLINE Arithmetic<T> rounded(Arithmetic<T> value) {
#ifndef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, bfloat16>) return bit_cast<float>(rounded_above(value) & 0xffff0000u);
#endif
  return widen(narrow<T>(value));
}

RELU_EXT_INLINE float square_root(float value) {
#ifdef __CUDA_ARCH__
  return __fsqrt_rn(value);
#else
  return __builtin_sqrtf(value);
#endif
}
RELU_EXT_INLINE double square_root(double value) {
#ifdef __CUDA_ARCH__
  return __dsqrt_rn(value);
#else
  return __builtin_sqrt(value);
#endif
}

// The greatest T that is not above value, the least that is not below: input <= value if and only if input <=
// at_most<T>.
template <class T>
T at_most(Arithmetic<T> value) {
  T nearest = narrow<T>(value);
  if constexpr (sizeof(T) == 2)
    if (widen(nearest) > value) nearest.bits = uint16_t(nearest.bits + (nearest.bits & 0x8000u ? 1 : -1));
  return nearest;
}
template <class T>
T at_least(Arithmetic<T> value) {
  T nearest = narrow<T>(value);
  if constexpr (sizeof(T) == 2)
    if (widen(nearest) < value) nearest.bits = uint16_t(nearest.bits + (nearest.bits & 0x8000u ? -1 : 1));
  return nearest;
}

}  // namespace relu_ext
