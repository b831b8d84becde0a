// exp and expm1 for arguments that are not positive, branch-free, so that loops around them become vectors.
//
// x = k ln2 + r with |r| <= ln2 / 2, and e^r - 1 = r + r^2 q(r), where q is a polynomial: the interpolation of
// (e^r - 1 - r) / r^2 at the Chebyshev points of that interval, its coefficients computed in 60 digits. Nothing
// cancels: for k = 0 the result is r + r^2 q(r) itself. Largest errors, in units in the last place of the true value
// rounded: float, of all arguments, 1.2 for expm1 and 1.1 for exp; double, of 2e7 arguments, the same. CUDA has
// functions of its own.
#pragma once
#include <cstddef>
#include <iterator>
#include <type_traits>

#include "numeric.h"

namespace relu_ext {

template <class X>
struct ExponentialConstants;

template <>
struct ExponentialConstants<float> {
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float to_integer = 0x1.8p23f + bias;  // added, the sum's lowest bits are the nearest integer + bias
  static constexpr float per_ln2 = 0x1.715476p+0f;
  static constexpr float ln2 = 0x1.62e43p-1f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // k * ln2_high is exact
  static constexpr float exp_is_0 = -104.5f, expm1_is_minus_1 = -18;          // below these
  static constexpr float q[] = {0x1p-1f, 0x1.5554dcp-3f, 0x1.55551ap-5f, 0x1.120ba2p-7f, 0x1.6d113cp-10f};
};

template <>
struct ExponentialConstants<double> {
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double to_integer = 0x1.8p52 + bias;
  static constexpr double per_ln2 = 0x1.71547652b82fep+0;
  static constexpr double ln2 = 0x1.62e42fefa39efp-1;
  static constexpr double ln2_high = 0x1.62e42fefa4p-1, ln2_low = -0x1.8432a1b0e2634p-43;
  static constexpr double exp_is_0 = -746, expm1_is_minus_1 = -38;
  static constexpr double q[] = {0x1.0000000000001p-1,  0x1.5555555555556p-3,  0x1.5555555553d4fp-5,
                                 0x1.11111111109adp-7,  0x1.6c16c17893833p-10, 0x1.a01a01a7c8d47p-13,
                                 0x1.a019b8ef67c6cp-16, 0x1.71de0d9c145d0p-19, 0x1.2891a8c1d838dp-22,
                                 0x1.af38d53857513p-26};
};

// Of the coefficients from q[first] on, by pairs: no more products than in Horner's scheme, in a chain of half as many.
template <class X, size_t first = 0>
RELU_EXT_INLINE X polynomial(X r, X square) {
  constexpr auto& q = ExponentialConstants<X>::q;
  constexpr size_t left = std::size(q) - first;
  if constexpr (left == 1)
    return q[first];
  else if constexpr (left == 2)
    return q[first] + r * q[first + 1];
  else
    return (q[first] + r * q[first + 1]) + square * polynomial<X, first + 2>(r, square);
}
// e^r - 1 for |r| <= ln2 / 2.
template <class X>
RELU_EXT_INLINE X fraction(X r) {
  const X square = r * r;
  return r + square * polynomial(r, square);
}

// The nearest integer to x / ln2: as a number, and in the lowest bits of `shifted` with the exponent's bias added.
template <class X>
struct Nearest {
  X shifted, k;

  RELU_EXT_INLINE explicit Nearest(X x)
      : shifted(x * ExponentialConstants<X>::per_ln2 + ExponentialConstants<X>::to_integer),
        k(shifted - ExponentialConstants<X>::to_integer) {}

  RELU_EXT_INLINE Word<X> biased() const { return bit_cast<Word<X>>(shifted); }
};
// 2^k, of k with its bias in the lowest bits.
template <class X>
RELU_EXT_INLINE X power_of_2(Word<X> biased) {
  return bit_cast<X>(Word<X>(biased << ExponentialConstants<X>::mantissa));
}

// e^x - 1 for x <= 0, as x itself where it is close to 0; NaN for NaN, anything for x > 0. One product by ln2 serves:
// its error, which grows with k, is multiplied by 2^k.
template <class X>
RELU_EXT_INLINE X expm1_nonpositive(X x) {
#ifdef __CUDA_ARCH__
  return expm1(x);
#else
  using Constants = ExponentialConstants<X>;
  x = at_least_or_nan(x, X(Constants::expm1_is_minus_1));
  const Nearest<X> nearest(x);
  const X power = power_of_2<X>(nearest.biased());
  return power * fraction(x - nearest.k * Constants::ln2) + (power - 1);
#endif
}

// e^x for x <= 0; NaN for NaN, anything for x > 0. The power of 2 in two steps, so that subnormal results are rounded
// once.
template <class X>
RELU_EXT_INLINE X exp_nonpositive(X x) {
#ifdef __CUDA_ARCH__
  return exp(x);
#else
  using Constants = ExponentialConstants<X>;
  using Signed = std::make_signed_t<Word<X>>;
  x = at_least_or_nan(x, X(Constants::exp_is_0));
  const Nearest<X> nearest(x);
  const X r = (x - nearest.k * Constants::ln2_high) - nearest.k * Constants::ln2_low;
  const Word<X> k = nearest.biased() - bit_cast<Word<X>>(Constants::to_integer), half = Word<X>(Signed(k) >> 1);
  return (1 + fraction(r)) * power_of_2<X>(half + Constants::bias) * power_of_2<X>(k - half + Constants::bias);
#endif
}

}  // namespace relu_ext
