// Activations fused with what surrounds them.
#pragma GCC optimize("fp-contract=off")  // a product that is not meant to be part of a multiply-add is rounded
#include <algorithm>
#include <array>

#include "../dispatch.h"
#include "../epilogue.h"
#include "channels.h"
#include "random.h"

namespace relu_ext::cpu {
namespace {

// input * scale + shift + residual of element j, `in` being the arrays of values, of input and of residual.
template <Isa isa, class Parts, class Values, class In>
RELU_EXT_INLINE auto sum_of(const Values& values, const In& in, int64_t j) {
  constexpr size_t own = Values::of_each;
  std::decay_t<decltype(in[0][0])> scale{}, shift{}, residual{};
  if constexpr (Parts::scale) scale = value<0>(values, in, j);
  if constexpr (Parts::shift) shift = value<Parts::scale>(values, in, j);
  if constexpr (Parts::residual) residual = in[own + 1][j];
  return before_activation<Parts, has_multiply_add<isa>>(in[own][j], scale, shift, residual);
}

// Of 16-bit floats the sums are made first, in `output`, and the activation is one of 16-bit floats like any other.
template <Isa isa, class Parts, class T, class Activation, class Values, size_t inputs, class Bits>
RELU_EXT_INLINE void fused_loops(Activation act, const Values& values, const std::array<const T*, inputs>& input,
                                 T* output, Bits bits, int64_t count) {
  const auto sum = [=](const auto& in, int64_t j) RELU_EXT_INLINE_LAMBDA { return sum_of<isa, Parts>(values, in, j); };
  if constexpr (!is_16_bit<T>) {
    selecting_loop<isa>(act, [=](int64_t j) RELU_EXT_INLINE_LAMBDA { return sum(input, j); }, output, bits, count);
  } else if constexpr (Parts::scale || Parts::shift || Parts::residual) {
    staged<isa>(input, std::array{output}, 0, count, [=](auto& in, auto& out, int64_t count) RELU_EXT_INLINE_LAMBDA {
      RELU_EXT_LANES
      for (int64_t j = 0; j < count; ++j) out[0][j] = sum(in, j);
    });
    forward_loops<isa>(act, output, output, bits, 0, count);
  } else {
    forward_loops<isa>(act, input[0], output, bits, 0, count);
  }
}

// What dropout leaves, and its gradient, in the place of the activation's: of an element that is not kept nothing.
template <class T>
struct Dropped {
  static constexpr Effort effort = Effort::product;
  Arithmetic<T> factor;

  RELU_EXT_INLINE T backward(T grad, bool keep) const { return left_of(grad, keep, factor); }
  static RELU_EXT_INLINE T choose(bool keep, T, T product) { return left_of(keep, product); }
};
template <class T>
RELU_EXT_INLINE Arithmetic<T> factors_from(const Dropped<T>& dropped, int64_t) {
  return dropped.factor;
}

// Of more than a chunk, because drawing has to make its constants first: 0.95 of the time in bfloat16.
constexpr int64_t drawn_at_once = 4096;

// Drops from output and bits what has none of the bits drawn.
template <Isa isa, class T, class Bits>
RELU_EXT_INLINE void drop(const Dropout& dropout, int64_t i, int64_t count, T* output, Bits bits) {
  alignas(64) uint8_t drawn[drawn_at_once / 8 + most_groups];
  draw<isa>(dropout, i, count, drawn);
  if constexpr (!std::is_same_v<Bits, NoBits>)
    for (int64_t k = 0; k < bytes_of_bits(count); ++k) bits[k] &= drawn[k];
  backward_loops<isa, Kept::bits>(Dropped<T>{Arithmetic<T>(dropout.factor)}, output, drawn, output, 0, count);
}

// body(isa, i, count) for elements begin to begin + count - 1, so many at a time.
template <int64_t at_once, Isa most, class Body>
void in_chunks(int64_t begin, int64_t count, Body body) {
  vectorised<most>([=](auto isa) RELU_EXT_INLINE_LAMBDA {
    for (int64_t i = begin; i < begin + count; i += at_once) body(isa, i, std::min(at_once, begin + count - i));
  });
}

template <class T, class Parts, class Activation, class Bits>
void forward_parts(Activation act, const Fused& work, Bits bits, int64_t begin, int64_t end) {
  const auto input = static_cast<const T*>(work.input), residual = static_cast<const T*>(work.residual);
  const auto output = static_cast<T*>(work.output);
  std::array<const T*, Parts::scale + Parts::shift> vectors{};
  if constexpr (Parts::scale) vectors[0] = static_cast<const T*>(work.scale);
  if constexpr (Parts::shift) vectors[Parts::scale] = static_cast<const T*>(work.shift);
  PerChannel<T, vectors.size()> channels(work.channels, vectors, begin, end);
  channels.in_parts(end - begin, [&](auto values, int64_t first, int64_t count) {
    in_chunks<Parts::dropout ? drawn_at_once : chunk, most_of<Effort::product, T, Bits>()>(
        first, count, [=, &work](auto isa, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
          constexpr Isa own = decltype(isa)::value;
          for_values(values, i, count, [=](auto values, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
            std::array<const T*, 1 + Parts::residual> inputs{input + i};
            if constexpr (Parts::residual) inputs[1] = residual + i;
            fused_loops<own, Parts>(act, values, joined(values.arrays, inputs), output + i, bits_from(bits, i), count);
          });
          if constexpr (Parts::dropout) drop<own>(work.dropout, i, count, output + i, bits_from(bits, i));
        });
  });
}

// masked and masked * scale.
template <Isa isa, class T, class Activation, class Values>
RELU_EXT_INLINE void backward_scaled(Activation act, const Values& scale, const T* grad, const uint8_t* bits, T* masked,
                                     T* scaled, int64_t count) {
  if constexpr (is_16_bit<T>) {
    backward_loops<isa, Kept::bits>(act, grad, bits, masked, 0, count);
    multiply<isa>(masked, factor_of(scale), scaled, count);
  } else {
    const auto store = [=](int64_t k, T value) RELU_EXT_INLINE_LAMBDA {
      masked[k] = value;
      scaled[k] = value * cpu::value<0>(scale, scale.arrays, k);
    };
    backward_bits_loop<isa>(act, grad, bits, store, 0, count);
  }
}

// What a backward pass is made from, beside grad.
template <Kept kept_, bool scale_, bool dropout_ = false>
struct BackwardParts {
  static constexpr Kept kept = kept_;
  static constexpr bool scale = scale_, dropout = dropout_;
};

template <class T, class Parts, class Activation>
void backward_parts(Activation act, const FusedBackward& work, double* totals, int64_t begin, int64_t end) {
  const auto grad = static_cast<const T*>(work.grad), input = static_cast<const T*>(work.input);
  const auto grad_input = static_cast<T*>(work.grad_input), grad_residual = static_cast<T*>(work.grad_residual);
  T* const to_masked = Parts::scale ? grad_residual : grad_input;
  std::array<const T*, Parts::scale> vectors{};
  if constexpr (Parts::scale) vectors[0] = static_cast<const T*>(work.scale);
  double* const of_scale = work.grad_scale ? totals : nullptr;
  double* const of_shift = work.grad_shift ? totals + (of_scale ? work.channels.channels : 0) : nullptr;
  Sums<T> scale_sums(work.channels, of_scale), shift_sums(work.channels, of_shift);
  const auto product = [](auto grad, auto input) RELU_EXT_INLINE_LAMBDA { return grad * input; };
  PerChannel<T, Parts::scale> channels(work.channels, vectors, begin, end);
  channels.in_parts(end - begin, [&](auto values, int64_t first, int64_t count) {
    in_chunks<chunk, most_of<Effort::product, T>()>(
        first, count, [=, &work, &scale_sums, &shift_sums](auto isa, int64_t i, int64_t count) RELU_EXT_INLINE_LAMBDA {
          constexpr Isa own = decltype(isa)::value;
          alignas(64) T unwanted[2][chunk];
          T* const masked = to_masked ? to_masked + i : unwanted[0];
          T* const scaled = grad_input ? grad_input + i : unwanted[1];
          const auto bits = static_cast<const uint8_t*>(work.kept) + i / 8;
          if constexpr (Parts::dropout)
            backward_loops<own, Kept::bits>(Dropped<T>{Arithmetic<T>(work.factor)}, grad + i, bits, masked, 0, count);
          else if constexpr (Parts::scale)
            for_values(values, i, count, [=](auto scale, int64_t k, int64_t count) RELU_EXT_INLINE_LAMBDA {
              backward_scaled<own>(act, scale, grad + k, bits + (k - i) / 8, masked + (k - i), scaled + (k - i), count);
            });
          else if constexpr (Parts::kept == Kept::bits)
            backward_loops<own, Kept::bits>(act, grad + i, bits, masked, 0, count);
          else
            backward_by_value_loops<own>(act, grad + i, static_cast<const T*>(work.kept) + i, masked, count);
          if (scale_sums) scale_sums.template gather<own>(i, count, product, masked, input + i);
          if (shift_sums) shift_sums.template gather<own>(i, count, masked);
        });
  });
}

// body(BackwardParts{}) with those of this work.
template <class Body>
void with_backward_parts(const FusedBackward& work, Body body) {
  if (work.factor) return body(BackwardParts<Kept::bits, false, true>{});
  if (work.kept_as == Kept::output) return body(BackwardParts<Kept::output, false>{});
  if (work.scale) return body(BackwardParts<Kept::bits, true>{});
  body(BackwardParts<Kept::bits, false>{});
}

// body(T{}, act) with the types of this work.
template <class Work, class Body>
void with_fused(const Work& work, Body body) {
  with_dtype(work.dtype, [&](auto element) {
    with_fused_activation<decltype(element), Device::cpu>(work.activation, work.scalars,
                                                          [&](auto act) { body(element, act); });
  });
}

}  // namespace

void fused(const Fused& work, int64_t begin, int64_t end) {
  with_fused(work, [&](auto element, auto act) {
    with_parts<decltype(element)>(work, [&](auto parts) {
      with_bits<decltype(act)>(work.bits, [&](auto bits) {
        forward_parts<decltype(element), decltype(parts)>(act, work, bits, begin, end);
      });
    });
  });
}

void fused_backward(const FusedBackward& work, double* sums, int64_t begin, int64_t end) {
  with_fused(work, [&](auto element, auto act) {
    with_backward_parts(
        work, [&](auto parts) { backward_parts<decltype(element), decltype(parts)>(act, work, sums, begin, end); });
  });
}

}  // namespace relu_ext::cpu
