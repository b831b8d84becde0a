// What surrounds an activation in a network: drop(act(input * scale + shift + residual)). No torch.
#pragma once
#include <cmath>
#include <utility>

#include "activations.h"
#include "kernels.h"

namespace relu_ext {

// Which parts there are, and whether input * scale + shift is rounded once. Each combination is compiled for itself.
template <bool scale_, bool shift_, bool residual_, bool dropout_, bool multiply_add_ = false>
struct Parts {
  static constexpr bool scale = scale_, shift = shift_, residual = residual_, dropout = dropout_;
  static constexpr bool multiply_add = multiply_add_;
};

// body(act): the activations that are fused with their neighbours. Each keeps bits.
template <class T, Device device, class Body>
auto with_fused_activation(Activation activation, const Scalars& scalars, Body body) {
  switch (activation) {
    case Activation::relu: return body(Relu<T, device>(scalars));
    default: __builtin_unreachable();
  }
}

// body(Parts{}) with those of this work, on elements of type T.
template <class T, class Body>
auto with_parts(const Fused& work, Body body) {
  if (work.dropout.factor) return body(Parts<false, false, false, true>{});
  if constexpr (!std::is_same_v<T, half>) {  // whose products are exact in float, and a multiply-add is faster
    if (work.scale && !work.multiply_add)
      return work.residual ? body(Parts<true, true, true, false>{}) : body(Parts<true, true, false, false>{});
  }
  if (work.scale && work.residual) return body(Parts<true, true, true, false, true>{});
  if (work.scale) return body(Parts<true, true, false, false, true>{});
  if (work.shift) return body(Parts<false, true, false, false>{});
  return body(Parts<false, false, true, false>{});
}

// Rounded, whatever is added to it: to be included where the compiler may not contract, or for a GPU.
template <class X>
RELU_EXT_INLINE X rounded_product(X a, X b) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(X) == sizeof(float))
    return __fmul_rn(a, b);
  else
    return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// What the activation is given, yet to be rounded to T. Parts that are not there are not looked at; without the
// instruction a multiply-add is a product and a sum.
template <class Parts, bool has_multiply_add, class X>
RELU_EXT_INLINE X before_activation(X input, X scale, X shift, X residual) {
  X sum = input;
  if constexpr (Parts::multiply_add && has_multiply_add)
    sum = std::fma(input, scale, shift);
  else if constexpr (Parts::scale)
    sum = rounded_product(input, scale) + shift;
  else if constexpr (Parts::shift)
    sum = sum + shift;
  if constexpr (Parts::residual) sum = sum + residual;
  return sum;
}

// What dropout leaves of a value, given its product with dropout's factor.
template <class T>
RELU_EXT_INLINE T left_of(bool keep, T product) {
  return select(keep, product, T{});
}
template <class T>
RELU_EXT_INLINE T left_of(T value, bool keep, Arithmetic<T> factor) {
  return left_of(keep, narrow<T>(widen(value) * factor));
}

// Four words of random bits: those of eight elements, or of as many times eight as a word of type W has lanes.
template <class W>
struct Words {
  W word[4];
};
using Block = Words<uint32_t>;

namespace philox {
constexpr uint32_t multiplier_0 = 0xd2511f53, multiplier_1 = 0xcd9e8d57;
constexpr uint32_t weyl_0 = 0x9e3779b9, weyl_1 = 0xbb67ae85;
constexpr int rounds = 7;

// Those of each round.
template <class K>
struct Keys {
  K key[rounds][2];
};
RELU_EXT_INLINE Keys<uint32_t> keys_of(uint64_t seed) {
  Keys<uint32_t> keys{};
  for (int round = 0; round < rounds; ++round) {
    keys.key[round][0] = uint32_t(seed) + uint32_t(round) * weyl_0;
    keys.key[round][1] = uint32_t(seed >> 32) + uint32_t(round) * weyl_1;
  }
  return keys;
}

// Both halves of the product.
RELU_EXT_INLINE void multiply(uint32_t a, uint32_t multiplier, uint32_t& high, uint32_t& low) {
  const uint64_t product = uint64_t(a) * multiplier;
  high = uint32_t(product >> 32);
  low = uint32_t(product);
}
// a ^ b ^ key
RELU_EXT_INLINE uint32_t mix(uint32_t a, uint32_t b, uint32_t key) { return a ^ b ^ key; }
}  // namespace philox

template <class W, class K>
RELU_EXT_INLINE void philox_round(W& a, W& b, W& c, W& d, const K (&key)[2]) {
  using philox::mix;  // or those of W's own namespace
  using philox::multiply;
  W high_a, low_a, high_c, low_c;
  multiply(a, philox::multiplier_0, high_a, low_a);
  multiply(c, philox::multiplier_1, high_c, low_c);
  a = mix(high_c, b, key[0]);
  c = mix(high_a, d, key[1]);
  b = low_c;
  d = low_a;
}
// counter: low half first, of the group and of the offset. Unrolled: in a loop g++ moves all that a round exchanges.
template <class W, class K, size_t... round>
RELU_EXT_INLINE Words<W> random_block(const philox::Keys<K>& keys, const W (&counter)[4],
                                      std::index_sequence<round...>) {
  W a = counter[0], b = counter[1], c = counter[2], d = counter[3];
  (philox_round(a, b, c, d, keys.key[round]), ...);
  return {{a, b, c, d}};
}
template <class W, class K>
RELU_EXT_INLINE Words<W> random_block(const philox::Keys<K>& keys, const W (&counter)[4]) {
  return random_block(keys, counter, std::make_index_sequence<philox::rounds>{});
}
// group: of eight elements.
RELU_EXT_INLINE Block random_block(uint64_t seed, uint64_t offset, uint64_t group) {
  const uint32_t counter[] = {uint32_t(group), uint32_t(group >> 32), uint32_t(offset), uint32_t(offset >> 32)};
  return random_block(philox::keys_of(seed), counter);
}

// The 16 bits of element i.
RELU_EXT_INLINE uint16_t random_of(const Block& block, int64_t i) {
  return uint16_t(block.word[i % 8 / 2] >> 16 * (i % 2));
}

}  // namespace relu_ext
