// Device code of sums over channels: gradients of what has a value for each channel, beside those of the elements.
#pragma once
#include "channels.cuh"

namespace relu_ext::cuda {

// How they are summed. A tensor is items of columns; a column's items are divided into parts, and a block sums one part
// of `across` neighbouring columns, each thread every (threads / across)-th item of one.
//   by_channel   a column is a channel, its items the vectors of its runs of `inner` elements
//   otherwise    a column is a vector of the channels * inner elements that follow each other, its items the
//   repetitions
struct Sums {
  static constexpr int threads = 256;
  static constexpr int blocks = 2;  // that have room on a multiprocessor, at least
  Divisor channels, inner;
  Divisor run;                          // by_channel: vectors in a run
  Divisor groups;                       // of `across` columns each
  int64_t columns, items, part, parts;  // part: items in one
  int across;                           // a power of 2
};

template <bool by_channel, class T, int lanes>
struct Column {
  const Sums& sums;
  int64_t column, numel;

  __device__ __forceinline__ int64_t channel(int j) const {
    return by_channel ? column : sums.inner.quotient(column * lanes + j);
  }
  __device__ __forceinline__ int64_t element(int64_t item) const {
    if (!by_channel) return (item * sums.columns + column) * lanes;
    const int64_t row = sums.run.quotient(item);
    return ((row * sums.channels.value + column) * sums.run.value + item - row * sums.run.value) * lanes;
  }
  // How many elements of the vector exist: of a single channel's last one perhaps not all.
  __device__ __forceinline__ int count(int64_t element) const {
    const int64_t left = numel - element;
    return left < lanes ? int(left) : lanes;
  }
};

// Work is what is summed and what else is made of the same elements:
//   sums                                               how many a channel has
//   batch                                              a thread's items under way together
//   of_channel(channel)                                the value that is loaded once for all items of a column
//   Loaded<lanes> load<aligned, lanes>(element, count) all that is read of a vector, 0 past its end
//   finish<aligned>(loaded, own, element, count, totals)
//       stores what there is to store, and adds to totals[sum][lane]; own: the channels' values

// The items from `item` on, every step-th, as many as `batch`, and as far as they come before `end`. partial: elements
// may be missing, else items are whole vectors.
template <int batch, bool partial, bool aligned, class Work, bool by_channel, class T, int lanes>
__device__ __forceinline__ void sum_batch(const Work& work, const Column<by_channel, T, lanes>& column, int64_t item,
                                          int64_t end, int step, const Vector<T, lanes>& own,
                                          Arithmetic<T> (&totals)[Work::sums][lanes]) {
  typename Work::template Loaded<lanes> loaded[batch];
  int64_t element[batch];
  int count[batch];
#pragma unroll
  for (int k = 0; k < batch; ++k) {
    element[k] = column.element(item + k * step);
    count[k] = item + k * step >= end ? 0 : partial ? column.count(element[k]) : lanes;
  }
#pragma unroll
  for (int k = 0; k < batch; ++k) loaded[k] = work.template load<aligned, lanes>(element[k], count[k]);
#pragma unroll
  for (int k = 0; k < batch; ++k) work.template finish<aligned>(loaded[k], own, element[k], count[k], totals);
}

// A block's sums: thread i adds those of i + reach, and so on with half the reach, until one thread a column is left.
template <int values, class X>
__device__ __forceinline__ void join(X (&totals)[values], int across) {
  __shared__ X joined[Sums::threads][values];
  for (int j = 0; j < values; ++j) joined[threadIdx.x][j] = totals[j];
  for (int reach = Sums::threads / 2; reach >= across; reach /= 2) {
    __syncthreads();
    if (int(threadIdx.x) < reach)
      for (int j = 0; j < values; ++j) joined[threadIdx.x][j] += joined[threadIdx.x + reach][j];
  }
  for (int j = 0; j < values; ++j) totals[j] = joined[threadIdx.x][j];
}

// parts_of_sums[sum][part][column][lane], or [sum][part][channel]: null where they are not wanted.
template <bool by_channel, class T, int lanes, bool aligned, class Work>
__global__ void __launch_bounds__(Sums::threads, Sums::blocks)
    sums_kernel(Sums sums, Work work, Arithmetic<T>* parts_of_sums, int64_t numel) {
  const int64_t part = sums.groups.quotient(blockIdx.x), group = blockIdx.x - part * sums.groups.value;
  const Column<by_channel, T, lanes> column{sums, group * sums.across + threadIdx.x % sums.across, numel};
  const int step = Sums::threads / sums.across;
  Arithmetic<T> totals[Work::sums][lanes] = {};
  if (column.column < sums.columns) {
    Vector<T, lanes> own;
    for (int j = 0; j < lanes; ++j) own.lane[j] = work.of_channel(column.channel(j));
    const int64_t begin = part * sums.part, end = begin + sums.part < sums.items ? begin + sums.part : sums.items;
    int64_t item = begin + threadIdx.x / sums.across;
    constexpr bool in_batches = aligned || lanes == 1, may_be_partial = by_channel && lanes > 1;
    if constexpr (in_batches) {
      const int64_t whole = may_be_partial && column.count(column.element(end - 1)) < lanes ? end - 1 : end;
      for (; item < whole; item += Work::batch * step)
        sum_batch<Work::batch, false, aligned>(work, column, item, whole, step, own, totals);
      item = (whole - begin) % step == threadIdx.x / sums.across ? whole : end;
    }
    if constexpr (!in_batches || may_be_partial) {
#pragma unroll 1
      for (; item < end; item += step) sum_batch<1, true, aligned>(work, column, item, end, step, own, totals);
    }
  }
  if (!parts_of_sums) return;
  constexpr int values = by_channel ? 1 : lanes;
  Arithmetic<T> joined[Work::sums * values];
  for (int sum = 0; sum < Work::sums; ++sum) {
    if constexpr (by_channel)
      for (int j = 1; j < lanes; ++j) totals[sum][0] += totals[sum][j];
    for (int j = 0; j < values; ++j) joined[sum * values + j] = totals[sum][j];
  }
  join(joined, sums.across);
  if (int(threadIdx.x) >= sums.across || column.column >= sums.columns) return;
  for (int sum = 0; sum < Work::sums; ++sum) {
    const int64_t at = ((sum * sums.parts + part) * sums.columns + column.column) * values;
    for (int j = 0; j < values; ++j) parts_of_sums[at + j] = joined[sum * values + j];
  }
}

// Where each sum of a channel goes; null where it is not wanted.
constexpr int most_sums = 2;
template <class T>
struct Gradients {
  T* of_sum[most_sums];
};

// gradients[sum][channel] = the sum over all parts of `inner` neighbours each, in float64, rounded; a warp for each.
template <class T>
__global__ void __launch_bounds__(Sums::threads) join_kernel(const Arithmetic<T>* parts_of_sums, Gradients<T> gradients,
                                                             int64_t channels, Divisor inner, int64_t parts) {
  const int64_t one = int64_t(blockIdx.x) * (Sums::threads / warp) + threadIdx.x / warp;
  const bool second = one >= channels;
  const int64_t channel = second ? one - channels : one;
  T* const gradient = second ? gradients.of_sum[1] : gradients.of_sum[0];
  if (channel >= channels || !gradient) return;
  double total = 0;
  for (int64_t i = threadIdx.x % warp; i < parts * inner.value; i += warp) {
    const int64_t part = inner.quotient(i) + (second ? parts : 0);
    total += parts_of_sums[(part * channels + channel) * inner.value + inner.remainder(i)];
  }
  for (int lanes = warp / 2; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
  if (threadIdx.x % warp == 0) gradient[channel] = narrow<T>(Arithmetic<T>(total));
}

}  // namespace relu_ext::cuda
