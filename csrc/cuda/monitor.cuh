// Device code of what Monitor asks of a layer: bits counted by channel, and numbers that are not finite.
#pragma once
#include "division.h"
#include "kernels.cuh"

namespace relu_ext::cuda {

// Threads of a block that counts.
constexpr int counting_threads = 256;

// 32 bits, the first being bit 32 * word; past the last byte there are zeros.
__device__ __forceinline__ uint32_t load_word(const uint8_t* bits, int64_t word, int64_t bytes) {
  if (4 * word + 4 <= bytes) return reinterpret_cast<const uint32_t*>(bits)[word];
  uint32_t loaded = 0;
  for (int64_t byte = 4 * word; byte < bytes; ++byte) loaded |= uint32_t(bits[byte]) << 8 * (byte - 4 * word);
  return loaded;
}

// Sums of integers: the same in whatever order.
__device__ __forceinline__ void add_count(const Count& work, int64_t channel, int64_t count) {
  if (count == 0) return;
  using Cell = unsigned long long;
  atomicAdd(reinterpret_cast<Cell*>(work.kept + channel), Cell(count));
  work.last[channel] = work.step;
}

// How long runs are counted. A run is divided into pieces; a channel's pieces, over all its runs, into parts, and a
// warp counts one part: `across` lanes a piece.
struct CountRuns {
  Divisor channels, pieces;         // pieces: of a run
  int64_t inner, piece;             // elements of a run and of a piece
  int64_t of_channel, part, parts;  // pieces of a channel and of a part
  int across;                       // a power of 2
};

__global__ void __launch_bounds__(counting_threads) count_runs_kernel(CountRuns how, Count work, int64_t numel) {
  const int64_t one = (int64_t(blockIdx.x) * counting_threads + threadIdx.x) / warp;
  const int64_t part = how.channels.quotient(one), channel = one - part * how.channels.value;
  if (part >= how.parts) return;  // the whole warp
  const int lane = int(threadIdx.x % warp);
  const int64_t bytes = (numel + 7) / 8;
  const int64_t last = part * how.part + how.part < how.of_channel ? part * how.part + how.part : how.of_channel;
  int64_t count = 0;
  for (int64_t item = part * how.part + lane / how.across; item < last; item += warp / how.across) {
    const int64_t row = how.pieces.quotient(item), offset = (item - row * how.pieces.value) * how.piece;
    const int64_t begin = (row * how.channels.value + channel) * how.inner + offset;
    const int64_t end = begin + (offset + how.piece < how.inner ? how.piece : how.inner - offset);
    for (int64_t word = begin / 32 + lane % how.across; 32 * word < end; word += how.across) {
      uint32_t own = load_word(work.bits, word, bytes);
      if (32 * word < begin) own &= ~0u << (begin - 32 * word);
      if (32 * word + 32 > end) own &= ~0u >> (32 * word + 32 - end);
      count += __popc(own);
    }
  }
  for (int lanes = warp / 2; lanes > 0; lanes /= 2) count += __shfl_xor_sync(0xffffffffu, count, lanes);
  if (lane == 0) add_count(work, channel, count);
}

// How short runs are counted: a thread counts the bits of one word's place, `rows` words that are `period` apart. The
// period is a multiple of channels * inner elements.
struct CountColumns {
  Divisor channels, inner, period;
  int64_t rows;
};

__global__ void __launch_bounds__(counting_threads) count_columns_kernel(CountColumns how, Count work, int64_t numel) {
  const int64_t thread = int64_t(blockIdx.x) * counting_threads + threadIdx.x;
  const int64_t part = how.period.quotient(thread), column = thread - part * how.period.value;
  const int64_t bytes = (numel + 7) / 8;
  int counts[32] = {};
  int64_t word = part * how.rows * how.period.value + column;
  for (int64_t row = 0; row < how.rows && 4 * word < bytes; ++row, word += how.period.value) {
    const uint32_t own = load_word(work.bits, word, bytes);
#pragma unroll
    for (int j = 0; j < 32; ++j) counts[j] += int(own >> j & 1u);
  }
#pragma unroll
  for (int j = 0; j < 32; ++j) add_count(work, how.channels.remainder(how.inner.quotient(32 * column + j)), counts[j]);
}

template <class T, class Tile, bool aligned, bool full>
__device__ __forceinline__ bool tile_is_finite(const T* input, int64_t numel) {
  const Part<T, Tile, full> part(numel);
  Vector<T> values[Tile::vectors];
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k)
    values[k] = load<Tile::loads, aligned>(input + part.element(k), part.count(k));
  bool finite = true;
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k)
#pragma unroll
    for (int j = 0; j < Vector<T>::lanes; ++j) finite &= is_finite(values[k].lane[j]);
  return finite;
}

// All threads that write, write the same.
template <class T, class Tile, bool aligned>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    nonfinite_kernel(const T* input, int64_t step, int64_t* first, int64_t numel) {
  const bool finite = block_is_full<T, Tile>(numel) ? tile_is_finite<T, Tile, aligned, true>(input, numel)
                                                    : tile_is_finite<T, Tile, aligned, false>(input, numel);
  if (!finite && *first == 0) *first = step;
}

}  // namespace relu_ext::cuda
