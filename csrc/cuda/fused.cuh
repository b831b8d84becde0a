// Device code of an activation fused with its neighbours: drop(act(input * scale + shift + residual)), and back.
#pragma once
#include "../epilogue.h"
#include "sums.cuh"

namespace relu_ext::cuda {

// body(part): all of a thread's vectors together, or where vectors are not sure to be accessed whole, one after the
// other: that takes many instructions for each. `aligned` as for the kernels.
template <class T, class Tile, bool aligned, class Body>
__device__ __forceinline__ void in_parts(int64_t numel, const Body& body) {
  const Part<T, Tile, true> part(numel);
  if constexpr (aligned)
    if (block_is_full<T, Tile>(numel)) return body(part);
#pragma unroll 1
  for (int k = 0; k < Tile::vectors; ++k)
    body(Part<T, cuda::Tile<Tile::threads, 1, Tile::loads, Tile::stores>, false>(part.first + warp * k, numel));
}

// Known when this is compiled, or asked by the kernel: where speed does not matter, so that there are fewer kernels.
enum class Choice { no, yes, asked };
template <Choice choice_>
struct Chosen {
  static constexpr Choice choice = choice_;
  bool asked;

  __device__ __forceinline__ explicit operator bool() const {
    return choice == Choice::asked ? asked : choice == Choice::yes;
  }
};

// Those of a captured graph are in memory, where each replay finds others.
__device__ __forceinline__ Stream resolved(Stream stream) {
  if (stream.seed_at) {
    stream.seed = uint64_t(*stream.seed_at);
    stream.offset += uint64_t(*stream.offset_at);
  }
  return stream;
}

// The random numbers of the vector from `element` on, the first of them in the lower half of the first word.
template <class T>
__device__ __forceinline__ Block random_of_vector(const Stream& stream, int64_t element) {
  constexpr int words = Vector<T>::lanes / 2;
  const Block all = random_block(stream.seed, stream.offset, uint64_t(element) / 8);
  const int sharer = int(threadIdx.x % sharers<T>);
  Block own{};
#pragma unroll
  for (int word = 0; word < words; ++word) {
    own.word[word] = all.word[word];
#pragma unroll
    for (int other = 1; other < sharers<T>; ++other)
      if (sharer == other) own.word[word] = all.word[other * words + word];
  }
  return own;
}

// The operands beside input. Those that there are not among Parts are not looked at.
template <class T, Spread spread>
struct Operands {
  ByChannel<spread> channels;
  const T *scale, *shift, *residual;
  Stream stream;
  uint16_t last;
  Arithmetic<T> factor;
};

template <class Parts, bool aligned, class T, class Tile, bool full, Spread spread, Choice bits_too, class Activation>
__device__ __forceinline__ void fused_part(const Part<T, Tile, full>& part, const Activation& act,
                                           const Operands<T, spread>& operands, Chosen<bits_too> with_bits,
                                           const T* input, T* output, uint8_t* bits) {
  Vector<T> values[Tile::vectors], scales[Tile::vectors] = {}, shifts[Tile::vectors] = {},
                                   residuals[Tile::vectors] = {};
  uint32_t kept[Tile::vectors] = {};
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
    if constexpr (Parts::scale) scales[k] = operands.channels.load(operands.scale, part.element(k));
    if constexpr (Parts::shift) shifts[k] = operands.channels.load(operands.shift, part.element(k));
  }
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
    values[k] = load<Tile::loads, aligned>(input + part.element(k), part.count(k));
    if constexpr (Parts::residual)
      residuals[k] = load<Tile::loads, aligned>(operands.residual + part.element(k), part.count(k));
  }
  Block random[Tile::vectors] = {};
  if constexpr (Parts::dropout) {
    __syncwarp();  // keeps the loads before the arithmetic, which hides their latency: ptxas puts the last behind it
    const Stream stream = resolved(operands.stream);
#pragma unroll
    for (int k = 0; k < Tile::vectors; ++k) random[k] = random_of_vector<T>(stream, part.element(k));
  }
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
#pragma unroll
    for (int j = 0; j < Vector<T>::lanes; ++j) {
      T& value = values[k].lane[j];
      value = narrow<T>(before_activation<Parts, true>(widen(value), widen(scales[k].lane[j]), widen(shifts[k].lane[j]),
                                                       widen(residuals[k].lane[j])));
      bool keep = act.keep(value);
      value = act.forward(value, keep);
      if constexpr (Parts::dropout) {
        keep = keep && random_of(random[k], j) <= operands.last;
        value = left_of(value, keep, operands.factor);
      }
      kept[k] |= uint32_t(keep && j < part.count(k)) << j;
    }
    store<Tile::stores, aligned>(output + part.element(k), part.count(k), values[k]);
  }
  if (with_bits) store_bits<T, Tile, full>(part, kept, bits);
}

template <class Parts, class T, class Tile, bool aligned, Spread spread, Choice bits_too, class Activation>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    fused_kernel(Activation act, Operands<T, spread> operands, Chosen<bits_too> with_bits, const T* input, T* output,
                 uint8_t* bits, int64_t numel) {
  in_parts<T, Tile, aligned>(numel, [&](const auto& part) {
    fused_part<Parts, aligned>(part, act, operands, with_bits, input, output, bits);
  });
}

// Backward, what is made of a gradient is act.backward(grad, keep), or with dropout this in the place of act's.
template <class T, class Activation>
struct Dropped {
  Activation act;
  Arithmetic<T> factor;

  __device__ __forceinline__ bool keep(T output) const { return act.keep(output); }
  __device__ __forceinline__ T backward(T grad, bool keep) const { return left_of(grad, keep, factor); }
};

// What forward kept: bits or its outputs.
template <Choice by_bits, class T>
struct KeptAs {
  Chosen<by_bits> from_bits;
  const void* data;

  template <int lanes>
  struct Loaded {
    uint32_t bits;
    Vector<T, lanes> outputs;
  };

  template <bool aligned, int lanes>
  __device__ __forceinline__ Loaded<lanes> load(int64_t element, int64_t byte, int count) const {
    Loaded<lanes> loaded{};
    if (from_bits)
      loaded.bits = count ? static_cast<const uint8_t*>(data)[byte] : 0u;
    else
      loaded.outputs = cuda::load<Hint::none, aligned, lanes>(static_cast<const T*>(data) + element, count);
    return loaded;
  }
  // element: the vector's first.
  template <class Activation, int lanes>
  __device__ __forceinline__ bool keep(const Activation& act, const Loaded<lanes>& loaded, int64_t element,
                                       int j) const {
    return from_bits ? (loaded.bits >> element % 8 >> j & 1u) != 0 : act.keep(loaded.outputs.lane[j]);
  }
};

// masked * scale goes to grad_input, masked alone to grad_residual.
template <class T, class Channels, Choice by_bits, bool scaled_, Choice residual>
struct ElementGradients {
  static constexpr bool scaled = scaled_;
  Chosen<residual> to_residual;
  KeptAs<by_bits, T> kept;
  Channels channels;
  const T *scale, *grad;
  T *grad_input, *grad_residual;
};

template <bool aligned, class T, class Tile, bool full, class Activation, class Work>
__device__ __forceinline__ void fused_backward_part(const Part<T, Tile, full>& part, const Activation& act,
                                                    const Work& work) {
  constexpr int lanes = Vector<T>::lanes;
  Vector<T> grads[Tile::vectors], scales[Tile::vectors] = {}, masked[Tile::vectors];
  typename decltype(work.kept)::template Loaded<lanes> kept[Tile::vectors];
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k)
    if constexpr (Work::scaled) scales[k] = work.channels.load(work.scale, part.element(k));
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
    kept[k] = work.kept.template load<aligned, lanes>(part.element(k), part.byte(k), part.count(k));
    grads[k] = load<Tile::loads, aligned>(work.grad + part.element(k), part.count(k));
  }
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
#pragma unroll
    for (int j = 0; j < lanes; ++j) {
      const T one = act.backward(grads[k].lane[j], work.kept.keep(act, kept[k], part.element(k), j));
      masked[k].lane[j] = one;
      grads[k].lane[j] = Work::scaled ? narrow<T>(widen(one) * widen(scales[k].lane[j])) : one;
    }
    store<Tile::stores, aligned>(work.grad_input + part.element(k), part.count(k), grads[k]);
    if (work.to_residual) store<Tile::stores, aligned>(work.grad_residual + part.element(k), part.count(k), masked[k]);
  }
}

template <class T, class Tile, bool aligned, class Activation, class Work>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    fused_backward_kernel(Activation act, Work work, int64_t numel) {
  in_parts<T, Tile, aligned>(numel, [&](const auto& part) { fused_backward_part<aligned>(part, act, work); });
}

// A work of sums_kernel: of masked, and of masked * input where that is wanted. scale, grad_input and grad_residual may
// be null.
template <class T, Choice by_bits, Choice input_too, class Activation>
struct FusedSums {
  static constexpr int sums = input_too == Choice::no ? 1 : 2, batch = 4 / sums;
  Activation act;
  Chosen<input_too> with_input;
  KeptAs<by_bits, T> kept;
  const T *scale, *grad, *input;
  T *grad_input, *grad_residual;

  template <int lanes>
  struct Loaded {
    Vector<T, lanes> grad, input;
    typename KeptAs<by_bits, T>::template Loaded<lanes> kept;
  };

  __device__ __forceinline__ T of_channel(int64_t channel) const { return scale ? scale[channel] : T{}; }
  template <bool aligned, int lanes>
  __device__ __forceinline__ Loaded<lanes> load(int64_t element, int count) const {
    Loaded<lanes> loaded{};
    loaded.grad = cuda::load<Hint::none, aligned, lanes>(grad + element, count);
    if (with_input) loaded.input = cuda::load<Hint::none, aligned, lanes>(input + element, count);
    loaded.kept = kept.template load<aligned, lanes>(element, int64_t(uint64_t(element) / 8), count);
    return loaded;
  }
  template <bool aligned, int lanes>
  __device__ __forceinline__ void finish(Loaded<lanes>& loaded, const Vector<T, lanes>& scales, int64_t element,
                                         int count, Arithmetic<T> (&totals)[sums][lanes]) const {
    Vector<T, lanes> masked;
#pragma unroll
    for (int j = 0; j < lanes; ++j) {
      const T one = act.backward(loaded.grad.lane[j], kept.keep(act, loaded.kept, element, j));
      totals[0][j] += widen(one);
      if constexpr (sums == 2) totals[1][j] += widen(one) * widen(loaded.input.lane[j]);
      masked.lane[j] = one;
      loaded.grad.lane[j] = scale ? narrow<T>(widen(one) * widen(scales.lane[j])) : one;
    }
    if (grad_input) store<Hint::none, aligned>(grad_input + element, count, loaded.grad);
    if (grad_residual) store<Hint::none, aligned>(grad_residual + element, count, masked);
  }
};

}  // namespace relu_ext::cuda
