// Division by a number that the host knows, where the device would take a hundred instructions for 64 bits.
#pragma once
#include <cstdint>

#include "../numeric.h"

namespace relu_ext::cuda {

// n / divisor = floor(n (2^64 + magic) / 2^(64 + shift)) where 2^shift is the first power of 2 not below divisor: exact
// for all n < 2^63 (Granlund and Montgomery, "Division by Invariant Integers using Multiplication", 1994, figure 4.1).
struct Divisor {
  int64_t value;
  uint64_t magic;
  int shift;

  explicit Divisor(int64_t value) : value(value), magic(0), shift(0) {
    while (uint64_t(1) << shift < uint64_t(value)) ++shift;
    const auto above = static_cast<unsigned __int128>((uint64_t(1) << shift) - uint64_t(value)) << 64;
    magic = uint64_t(above / uint64_t(value)) + 1;
  }

  RELU_EXT_INLINE int64_t quotient(int64_t n) const {
    const auto high = uint64_t(static_cast<unsigned __int128>(uint64_t(n)) * magic >> 64);
    return int64_t((high + uint64_t(n)) >> shift);
  }
  RELU_EXT_INLINE int64_t remainder(int64_t n) const { return n - quotient(n) * value; }
};

}  // namespace relu_ext::cuda
