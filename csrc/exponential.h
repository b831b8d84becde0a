// exp and expm1 for arguments that are not positive, branch-free, so that loops around them become vectors.
//
// x = k ln2 + r with |r| <= ln2 / 2, and e^r - 1 = r + r^2 q(r), where q is a polynomial: the interpolation of
// (e^r - 1 - r) / r^2 at the Chebyshev points of that interval, its coefficients computed in 60 digits. Nothing
// cancels: for k = 0 the result is r + r^2 q(r) itself. Largest errors, in units in the last place of the true value
// rounded: float, of all arguments, 1.2 for expm1 and 1.1 for exp; double, of 2e7 arguments, 1.3 and 1.2. CUDA has
// functions of its own.
#pragma once
#include <iterator>
#include <type_traits>

#include "numeric.h"

namespace relu_ext {

template <class X>
struct ExponentialConstants;

template <>
struct ExponentialConstants<float> {
  static constexpr float to_integer = 0x1.8p23f;  // added, the sum's lowest bits are the nearest integer
  static constexpr int mantissa = 23, bias = 127;
  static constexpr float per_ln2 = 0x1.715476p+0f;
  static constexpr float ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;  // k * ln2_high is exact
  static constexpr float exp_is_0 = -104.5f, expm1_is_minus_1 = -18;          // below these
  static constexpr float q[] = {0x1p-1f, 0x1.5554dcp-3f, 0x1.55551ap-5f, 0x1.120ba2p-7f, 0x1.6d113cp-10f};
};

template <>
struct ExponentialConstants<double> {
  static constexpr double to_integer = 0x1.8p52;
  static constexpr int mantissa = 52, bias = 1023;
  static constexpr double per_ln2 = 0x1.71547652b82fep+0;
  static constexpr double ln2_high = 0x1.62e42fefa4p-1, ln2_low = -0x1.8432a1b0e2634p-43;
  static constexpr double exp_is_0 = -746, expm1_is_minus_1 = -38;
  static constexpr double q[] = {0x1.0000000000001p-1,  0x1.5555555555556p-3,  0x1.5555555553d4fp-5,
                                 0x1.11111111109adp-7,  0x1.6c16c17893833p-10, 0x1.a01a01a7c8d47p-13,
                                 0x1.a019b8ef67c6cp-16, 0x1.71de0d9c145d0p-19, 0x1.2891a8c1d838dp-22,
                                 0x1.af38d53857513p-26};
};

// e^x = 2^k (1 + fraction).
template <class X>
struct Exponential {
  using Constants = ExponentialConstants<X>;
  Word<X> k;  // two's complement
  X fraction;

  // For x <= 0; what is below lowest counts as that.
  RELU_EXT_INLINE Exponential(X x, X lowest) {
    x = x > lowest ? x : lowest;  // one instruction, which select() would not be
    const X shifted = x * Constants::per_ln2 + Constants::to_integer;
    const X rounded = shifted - Constants::to_integer;
    k = bit_cast<Word<X>>(shifted) - bit_cast<Word<X>>(Constants::to_integer);
    const X r = (x - rounded * Constants::ln2_high) - rounded * Constants::ln2_low;
    fraction = r + r * r * polynomial<0, int(std::size(Constants::q))>(r);
  }

  // Of the coefficients q[first], ..., in halves: a chain of log2(count) products, not of as many as there are.
  template <int first, int count>
  static RELU_EXT_INLINE X polynomial(X r) {
    if constexpr (count == 1) {
      return Constants::q[first];
    } else {
      constexpr int low = count > 8 ? 8 : count > 4 ? 4 : count > 2 ? 2 : 1;
      return polynomial<first, low>(r) + power<low>(r) * polynomial<first + low, count - low>(r);
    }
  }
  template <int exponent>
  static RELU_EXT_INLINE X power(X r) {
    if constexpr (exponent == 1)
      return r;
    else
      return power<exponent / 2>(r) * power<exponent / 2>(r);
  }

  static RELU_EXT_INLINE X power_of_2(Word<X> exponent) {
    return bit_cast<X>(Word<X>((exponent + Constants::bias) << Constants::mantissa));
  }
};

// e^x - 1 for x <= 0, as x itself where it is close to 0; anything for NaN and x > 0.
template <class X>
RELU_EXT_INLINE X expm1_nonpositive(X x) {
#ifdef __CUDA_ARCH__
  return expm1(x);
#else
  const Exponential<X> e(x, ExponentialConstants<X>::expm1_is_minus_1);
  const X power = e.power_of_2(e.k);
  return power * e.fraction + (power - 1);
#endif
}

// e^x for x <= 0; anything for NaN and x > 0. The power of 2 in two steps, so that subnormal results are rounded once.
template <class X>
RELU_EXT_INLINE X exp_nonpositive(X x) {
#ifdef __CUDA_ARCH__
  return exp(x);
#else
  const Exponential<X> e(x, ExponentialConstants<X>::exp_is_0);
  const Word<X> half = Word<X>(std::make_signed_t<Word<X>>(e.k) >> 1);
  return (1 + e.fraction) * e.power_of_2(half) * e.power_of_2(e.k - half);
#endif
}

}  // namespace relu_ext
