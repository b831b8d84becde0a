// Device code: one kernel each way, for every activation, element type and tile. No torch, and nothing of CUDA but its
// language, so that g++ compiles it too where an emulator stands in for that.
//
// A block works on one tile, a thread on 16-byte vectors of it: lane l of a warp on vectors l, l + 32, ... of the
// warp's part, so that accesses coalesce and the bits of a warp lie together. All vectors are loaded before the first
// result is stored; in one loop each load would wait behind the store before it, which might be to the same memory.
#pragma once
#include <cuda_runtime.h>

#include <cstring>

#include "../activations.h"

namespace relu_ext::cuda {

constexpr int warp = 32;  // lanes

// Cache operators of PTX: none, or .cs, "likely to be accessed once".
enum class Hint { none, streaming };

// By default a thread is left 64 registers. ptxas by itself goes down to 32 and, to do so, puts a load of the 16-bit
// backward behind the wait for the first bits.
template <int threads_, int vectors_, Hint loads_ = Hint::none, Hint stores_ = Hint::none,
          int blocks_ = 1024 / threads_>
struct Tile {
  static constexpr int threads = threads_;  // of a block
  static constexpr int vectors = vectors_;  // of a thread
  static constexpr Hint loads = loads_;
  static constexpr Hint stores = stores_;
  static constexpr int blocks = blocks_;  // that have room on a multiprocessor, at least
  static_assert(threads % warp == 0 && (vectors & (vectors - 1)) == 0);
};

template <class T, int lanes_ = int(16 / sizeof(T))>
struct alignas(lanes_ * sizeof(T)) Vector {
  static constexpr int lanes = lanes_;
  T lane[lanes];
};

template <class T, class Tile, int lanes = Vector<T>::lanes>
constexpr int64_t elements_of = int64_t(Tile::threads) * Tile::vectors * lanes;

// Vectors with one byte of bits between them: those of neighbouring lanes.
template <class T>
constexpr int sharers = Vector<T>::lanes < 8 ? 8 / Vector<T>::lanes : 1;

// A thread's part of a block's tile. `full`: no element of the block is past the end.
template <class T, class Tile, bool full, int lanes = Vector<T>::lanes>
struct Part {
  int64_t first;  // vector of the whole tensor
  int64_t numel;

  __device__ __forceinline__ explicit Part(int64_t numel)
      : Part((int64_t(blockIdx.x) * Tile::threads + threadIdx.x / warp * warp) * Tile::vectors + threadIdx.x % warp,
             numel) {}
  __device__ __forceinline__ Part(int64_t first, int64_t numel) : first(first), numel(numel) {}

  // The first element of the k-th vector, how many of its elements exist, and the byte of their bits.
  __device__ __forceinline__ int64_t element(int k) const { return (first + warp * k) * lanes; }
  __device__ __forceinline__ int count(int k) const {
    if (full) return lanes;
    const int64_t left = numel - element(k);
    return left >= lanes ? lanes : left > 0 ? int(left) : 0;
  }
  __device__ __forceinline__ int64_t byte(int k) const {
    return int64_t(uint64_t(first) / sharers<T>) + warp / sharers<T> * k;
  }
};

// aligned: `from` is at a multiple of 16 bytes.
template <Hint hint, bool aligned, int lanes_ = 0, class T, int lanes = lanes_ ? lanes_ : Vector<T>::lanes>
__device__ __forceinline__ Vector<T, lanes> load(const T* from, int count) {
  Vector<T, lanes> vector{};
  if (aligned && count == lanes) {
    const auto raw = reinterpret_cast<const uint4*>(from);
    const uint4 loaded = hint == Hint::streaming ? __ldcs(raw) : *raw;
    memcpy(&vector, &loaded, sizeof(vector));
  } else {
#pragma unroll
    for (int j = 0; j < lanes; ++j)
      if (j < count) vector.lane[j] = from[j];
  }
  return vector;
}

template <Hint hint, bool aligned, class T, int lanes>
__device__ __forceinline__ void store(T* to, int count, const Vector<T, lanes>& vector) {
  if (aligned && count == lanes) {
    const auto raw = reinterpret_cast<uint4*>(to);
    uint4 stored;
    memcpy(&stored, &vector, sizeof(vector));
    if (hint == Hint::streaming)
      __stcs(raw, stored);
    else
      *raw = stored;
  } else {
#pragma unroll
    for (int j = 0; j < lanes; ++j)
      if (j < count) to[j] = vector.lane[j];
  }
}

// kept[k]: bit j is that of element j of the part's k-th vector. Where lanes share a byte, each gathers the bytes of up
// to as many vectors as there are sharers, and stores one: log2(sharers) shuffles for all of them.
template <class T, class Tile, bool full>
__device__ __forceinline__ void store_bits(const Part<T, Tile, full>& part, const uint32_t (&kept)[Tile::vectors],
                                           uint8_t* bits) {
  constexpr int gathered = sharers<T> < Tile::vectors ? sharers<T> : Tile::vectors;
  const int sharer = int(threadIdx.x % sharers<T>);
#pragma unroll
  for (int k = 0; k < Tile::vectors; k += gathered) {
    uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < gathered; ++i) bytes |= kept[k + i] << 8 * i;
    bytes <<= Vector<T>::lanes * sharer;
#pragma unroll
    for (int step = 1; step < sharers<T>; step *= 2) bytes |= __shfl_xor_sync(0xffffffffu, bytes, step);
    const int64_t byte = part.byte(k + sharer);
    const bool stores = gathered == sharers<T> || sharer < gathered;
    if (stores && (full || 8 * byte < part.numel)) bits[byte] = uint8_t(bytes >> 8 * sharer);
  }
}

// Where elements have activations of their own (Slopes), what is loaded for those of a vector, and that of element j.
struct Nothing {};
template <class Activation>
__device__ __forceinline__ Nothing load_own(const Activation&, int64_t) {
  return {};
}
template <class Activation>
__device__ __forceinline__ const Activation& own(const Activation& act, Nothing, int) {
  return act;
}

template <class T, class Tile, bool aligned, bool with_bits, bool full, class Activation>
__device__ __forceinline__ void forward_tile(Activation act, const T* input, T* output, uint8_t* bits, int64_t numel) {
  const Part<T, Tile, full> part(numel);
  Vector<T> values[Tile::vectors];
  decltype(load_own(act, 0)) owns[Tile::vectors];
  uint32_t kept[Tile::vectors] = {};
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) owns[k] = load_own(act, part.element(k));
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k)
    values[k] = load<Tile::loads, aligned>(input + part.element(k), part.count(k));
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
#pragma unroll
    for (int j = 0; j < Vector<T>::lanes; ++j) {
      T& value = values[k].lane[j];
      if constexpr (Activation::keeps_bits) {
        const auto one = own(act, owns[k], j);
        const bool keep = one.keep(value);
        value = one.forward(value, keep);
        kept[k] |= uint32_t(keep && j < part.count(k)) << j;
      } else {
        value = output_of(act, value);
      }
    }
    store<Tile::stores, aligned>(output + part.element(k), part.count(k), values[k]);
  }
  if constexpr (with_bits) store_bits<T, Tile, full>(part, kept, bits);
}

template <Kept, class T, class Tile, bool aligned, bool full, class Activation>
__device__ __forceinline__ void backward_tile(Activation act, const T* grad, const uint8_t* bits, T* output,
                                              int64_t numel) {
  const Part<T, Tile, full> part(numel);
  Vector<T> values[Tile::vectors];
  decltype(load_own(act, 0)) owns[Tile::vectors];
  uint32_t kept[Tile::vectors];
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) owns[k] = load_own(act, part.element(k));
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
    kept[k] = part.count(k) ? bits[part.byte(k)] : 0u;
    values[k] = load<Tile::loads, aligned>(grad + part.element(k), part.count(k));
  }
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
    const uint32_t bits_of_own = kept[k] >> Vector<T>::lanes * (threadIdx.x % sharers<T>);
#pragma unroll
    for (int j = 0; j < Vector<T>::lanes; ++j)
      values[k].lane[j] = own(act, owns[k], j).backward(values[k].lane[j], (bits_of_own >> j & 1u) != 0);
    store<Tile::stores, aligned>(output + part.element(k), part.count(k), values[k]);
  }
}

template <Kept from, class T, class Tile, bool aligned, bool full, class Activation>
__device__ __forceinline__ void backward_tile(Activation act, const T* grad, const T* kept, T* output, int64_t numel) {
  const Part<T, Tile, full> part(numel);
  Vector<T> values[Tile::vectors], others[Tile::vectors];
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
    values[k] = load<Tile::loads, aligned>(grad + part.element(k), part.count(k));
    others[k] = load<Tile::loads, aligned>(kept + part.element(k), part.count(k));
  }
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
#pragma unroll
    for (int j = 0; j < Vector<T>::lanes; ++j)
      values[k].lane[j] = gradient_of<from>(act, values[k].lane[j], others[k].lane[j]);
    store<Tile::stores, aligned>(output + part.element(k), part.count(k), values[k]);
  }
}

template <class T, class Tile, int lanes = Vector<T>::lanes>
__device__ __forceinline__ bool block_is_full(int64_t numel) {
  return numel - int64_t(blockIdx.x) * elements_of<T, Tile, lanes> >= elements_of<T, Tile, lanes>;
}

// A grid of one block a tile. aligned: all but the bits is at multiples of 16 bytes.
template <class T, class Tile, bool aligned, bool with_bits, class Activation>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    forward_kernel(Activation act, const T* input, T* output, uint8_t* bits, int64_t numel) {
  if (block_is_full<T, Tile>(numel))
    forward_tile<T, Tile, aligned, with_bits, true>(act, input, output, bits, numel);
  else
    forward_tile<T, Tile, aligned, with_bits, false>(act, input, output, bits, numel);
}

template <Kept from, class T, class Tile, bool aligned, class Activation, class K>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    backward_kernel(Activation act, const T* grad, const K* kept, T* output, int64_t numel) {
  if (block_is_full<T, Tile>(numel))
    backward_tile<from, T, Tile, aligned, true>(act, grad, kept, output, numel);
  else
    backward_tile<from, T, Tile, aligned, false>(act, grad, kept, output, numel);
}

}  // namespace relu_ext::cuda
