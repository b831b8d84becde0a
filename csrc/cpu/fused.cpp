// Activations fused with what surrounds them.
#include <algorithm>
#include <array>

#include "../dispatch.h"
#include "../epilogue.h"
#include "channels.h"
#include "random.h"

namespace relu_ext::cpu {
namespace {

// Elements whose random bits are drawn before they are used.
constexpr int64_t drawn_at_once = 4096;

// The bits of elements i to i + count - 1 of `total`, i being a multiple of 8 and count no more than 64. A block of
// `staged` may go beyond the end. By way of a register: what has been stored in parts keeps a load of the whole
// waiting.
RELU_EXT_INLINE uint64_t load_bits(const uint8_t* bits, int64_t i, int count, int64_t total) {
  if (count == 8) return i < total ? bits[i / 8] : 0;
  uint64_t kept = 0;
  if (i < total) std::memcpy(&kept, bits + i / 8, (std::min<int64_t>(count, total - i) + 7) / 8);
  return kept;
}
RELU_EXT_INLINE void store_bits(uint8_t* bits, int64_t i, int count, int64_t total, uint64_t kept) {
  if (i + count <= total) {
    std::memcpy(bits + i / 8, &kept, (count + 7) / 8);
  } else if (i < total) {
    kept &= ~uint64_t(0) >> (64 - (total - i));
    std::memcpy(bits + i / 8, &kept, (total - i + 7) / 8);
  }
}

// Elements first to first + count - 1 of a part, in the type X that T is computed in. input: the arrays of input and,
// where there is one, residual. bits may be null. drawn: where there is dropout.
template <Isa isa, class T, class Parts, class Activation, class Values, class Inputs, class X>
RELU_EXT_INLINE void forward_loop(Activation act, Values values, X factor, const Inputs& input, X* output,
                                  const uint8_t* drawn, uint8_t* bits, int64_t first, int64_t count, int64_t total) {
  using W = Word<X>;
  constexpr int word = 8 * sizeof(W), lanes = Masks<isa>::template lanes<W>;
  for_blocks<64>(0, count, [=](int64_t i, int count) RELU_EXT_INLINE_LAMBDA {
    uint64_t kept = 0, left = 0;
    if constexpr (Parts::dropout) left = load_bits(drawn, first + i, count, total);
    for_vectors<lanes>(count, [=, &kept](int part, int count) RELU_EXT_INLINE_LAMBDA {
      alignas(64) W mask[lanes] = {};
      const W own = W(left >> part / word * word);
      RELU_EXT_LANES
      for (int j = 0; j < count; ++j) {
        const int64_t k = i + part + j;
        X scale{}, shift{}, residual{};
        if constexpr (Parts::scale) scale = value<0>(values, first + k);
        if constexpr (Parts::shift) shift = value<Parts::scale>(values, first + k);
        if constexpr (Parts::residual) residual = input[1][k];
        const X before = before_activation<T, Parts, Activation>(input[0][k], scale, shift, residual);
        const bool keep = act.keep(before);
        W own_mask = keep ? W(-1) : W(0);
        if constexpr (Parts::dropout) {
          // What is not kept is 0, like what is dropped: one mask does for both.
          own_mask &= (own & single<W>.bit[part % word + j]) != 0 ? W(-1) : W(0);
          output[k] = bit_cast<X>(bit_cast<W>(act.forward(before, true) * factor) & own_mask);
        } else {
          output[k] = act.forward(before, keep);
        }
        mask[j] = own_mask;
      }
      kept |= uint64_t(Masks<isa>::bits(mask)) << part;
    });
    if (bits) store_bits(bits, first + i, count, total, kept);
  });
}

template <class T, class Parts, class Activation>
void forward_parts(Activation act, const Fused& work, int64_t begin, int64_t end) {
  using X = Arithmetic<T>;
  const auto input = static_cast<const T*>(work.input), residual = static_cast<const T*>(work.residual);
  const auto scale = static_cast<const T*>(work.scale), shift = static_cast<const T*>(work.shift);
  const auto output = static_cast<T*>(work.output);
  std::array<const T*, Parts::scale + Parts::shift> vectors{};
  if constexpr (Parts::scale) vectors[0] = scale;
  if constexpr (Parts::shift) vectors[Parts::scale] = shift;
  alignas(64) uint8_t left[drawn_at_once / 8 + most_groups];
  const X factor = X(work.dropout.factor);
  PerChannel<T, vectors.size()> channels(work.channels, vectors, begin, end);
  channels.in_parts(Parts::dropout ? drawn_at_once : end - begin, [&](auto values, int64_t i, int64_t count) {
    std::array<const T*, 1 + Parts::residual> inputs{input + i};
    if constexpr (Parts::residual) inputs[1] = residual + i;
    const std::array outputs{output + i};
    uint8_t *const drawn = left, *const bits = work.bits ? work.bits + i / 8 : nullptr;
    if constexpr (Parts::dropout) draw(work.dropout, i, (count + 7) / 8 * 8, drawn);
    vectorised([=, total = count](auto isa) RELU_EXT_INLINE_LAMBDA {
      constexpr Isa own = decltype(isa)::value;
      staged<own>(inputs, outputs, 0, total,
                  [=](auto& in, auto& out, int64_t first, int64_t count) RELU_EXT_INLINE_LAMBDA {
                    forward_loop<own, T, Parts>(act, values, factor, in, out[0], drawn, bits, first, count, total);
                  });
    });
  });
}

// What a backward pass has beside grad and what was kept, and whether it sums over channels.
template <Kept kept_, bool scale_, bool input_, bool sums_, bool dropout_ = false>
struct BackwardParts {
  static constexpr Kept kept = kept_;
  static constexpr bool scale = scale_, input = input_, sums = sums_, dropout = dropout_;
};

// Terms of the sums over channels, of a part.
template <class X>
struct Terms {
  X *scale, *shift;
};

// input: the arrays of grad, then of the input or of the output that was kept. output: of grad_input, grad_residual.
template <Isa isa, class Parts, class Activation, class Values, class Inputs, class Outputs, class X>
RELU_EXT_INLINE void backward_loop(Activation act, Values values, X factor, const Inputs& input, const Outputs& output,
                                   const uint8_t* bits, Terms<X> terms, int64_t first, int64_t count, int64_t total) {
  using W = Word<X>;
  constexpr int word = 8 * sizeof(W), lanes = Masks<isa>::vector / int(sizeof(W));
  for_blocks<64>(0, count, [=](int64_t i, int count) RELU_EXT_INLINE_LAMBDA {
    uint64_t kept = 0;
    if constexpr (Parts::kept == Kept::bits) kept = load_bits(bits, first + i, count, total);
    for_vectors<lanes>(count, [=](int part, int count) RELU_EXT_INLINE_LAMBDA {
      // As wide as an element: vectors of one word test it against other constants, and share it in a register.
      const W own = W(kept >> part / word * word);
      RELU_EXT_LANES
      for (int j = 0; j < count; ++j) {
        const int64_t k = i + part + j;
        bool keep;
        if constexpr (Parts::kept == Kept::bits)
          keep = (own & single<W>.bit[part % word + j]) != 0;
        else
          keep = act.keep(input[1][k]);
        X masked = act.backward(input[0][k], keep);
        if constexpr (Parts::dropout) masked = select(keep, masked * factor, X{});
        if constexpr (Parts::scale) {
          output[0][k] = masked * value<0>(values, first + k);
          output[1][k] = masked;
        } else {
          output[0][k] = masked;
        }
        if constexpr (Parts::sums) terms.shift[first + k] = masked;
        if constexpr (Parts::input) terms.scale[first + k] = masked * input[1][k];
      }
    });
  });
}

template <class T, class Parts, class Activation>
void backward_parts(Activation act, const FusedBackward& work, double* sums, int64_t begin, int64_t end) {
  using X = Arithmetic<T>;
  const auto grad = static_cast<const T*>(work.grad);
  const auto other = static_cast<const T*>(Parts::input ? work.input : work.kept);
  const auto bits = static_cast<const uint8_t*>(work.kept);
  const auto grad_input = static_cast<T*>(work.grad_input), grad_residual = static_cast<T*>(work.grad_residual);
  std::array<const T*, Parts::scale> vectors{};
  if constexpr (Parts::scale) vectors[0] = static_cast<const T*>(work.scale);
  double* const of_scale = work.grad_scale ? sums : nullptr;
  double* const of_shift = work.grad_shift ? sums + (of_scale ? work.channels.channels : 0) : nullptr;
  const X factor = X(work.factor);
  T unwanted[chunk];
  alignas(64) X terms[2][chunk + padding];
  const Terms<X> to{terms[0], terms[1]};
  PerChannel<T, Parts::scale> channels(work.channels, vectors, begin, end);
  channels.in_parts(chunk, [&](auto values, int64_t i, int64_t count) {
    constexpr bool second = Parts::input || Parts::kept == Kept::output;
    std::array<const T*, 1 + second> inputs{grad + i};
    if constexpr (second) inputs[1] = other + i;
    std::array<T*, 1 + Parts::scale> outputs{grad_input ? grad_input + i : unwanted};
    if constexpr (Parts::scale) outputs[1] = grad_residual ? grad_residual + i : unwanted;
    const uint8_t* const own_bits = Parts::kept == Kept::bits ? bits + i / 8 : nullptr;
    vectorised([=, total = count](auto isa) RELU_EXT_INLINE_LAMBDA {
      constexpr Isa own = decltype(isa)::value;
      staged<own>(inputs, outputs, 0, total,
                  [=](auto& in, auto& out, int64_t first, int64_t count) RELU_EXT_INLINE_LAMBDA {
                    backward_loop<own, Parts>(act, values, factor, in, out, own_bits, to, first, count, total);
                  });
    });
    if (of_scale) gather(work.channels, i, count, to.scale, of_scale);
    if (of_shift) gather(work.channels, i, count, to.shift, of_shift);
  });
}

// body(BackwardParts{}) with those of this work.
template <class Body>
void with_backward_parts(const FusedBackward& work, Body body) {
  if (work.factor) return body(BackwardParts<Kept::bits, false, false, false, true>{});
  if (work.kept_as == Kept::output) return body(BackwardParts<Kept::output, false, false, true>{});
  if (work.scale && work.input) return body(BackwardParts<Kept::bits, true, true, true>{});
  if (work.scale && work.grad_shift) return body(BackwardParts<Kept::bits, true, false, true>{});
  if (work.scale) return body(BackwardParts<Kept::bits, true, false, false>{});
  body(BackwardParts<Kept::bits, false, false, true>{});
}

// body(T{}, act): computed in X, whatever T is.
template <class Work, class Body>
void with_fused(const Work& work, Body body) {
  with_dtype(work.dtype, [&](auto element) {
    with_fused_activation<Arithmetic<decltype(element)>, Device::cpu>(work.activation, work.scalars,
                                                                      [&](auto act) { body(element, act); });
  });
}

}  // namespace

void fused(const Fused& work, int64_t begin, int64_t end) {
  with_fused(work, [&](auto element, auto act) {
    with_parts(work, [&](auto parts) { forward_parts<decltype(element), decltype(parts)>(act, work, begin, end); });
  });
}

void fused_backward(const FusedBackward& work, double* sums, int64_t begin, int64_t end) {
  with_fused(work, [&](auto element, auto act) {
    with_backward_parts(
        work, [&](auto parts) { backward_parts<decltype(element), decltype(parts)>(act, work, sums, begin, end); });
  });
}

}  // namespace relu_ext::cpu
