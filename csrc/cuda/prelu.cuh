// Device code of prelu: the elementwise kernels with a slope for each element, and the slopes' gradients.
#pragma once
#include "division.h"
#include "kernels.cuh"

namespace relu_ext::cuda {

// Of the elements of a 16-byte vector: all of one channel; of consecutive channels, the first being a multiple of their
// number, weight at a multiple of 16 bytes; whatever else.
enum class Spread { one, consecutive, any };

// In the place of an activation.
template <class T, Spread spread>
struct Slopes {
  static constexpr bool keeps_bits = true;
  Divisor channels, inner;
  const T* weight;

  __device__ __forceinline__ int64_t channel(int64_t element) const {
    return channels.remainder(inner.quotient(element));
  }
};

// Also past the end: those are slopes too, of channels that there are.
template <class T, Spread spread>
__device__ __forceinline__ Vector<T> load_own(const Slopes<T, spread>& slopes, int64_t element) {
  Vector<T> own{};
  int64_t channel = slopes.channel(element);
  if constexpr (spread == Spread::consecutive) {
    own = load<Hint::none, true>(slopes.weight + channel, Vector<T>::lanes);
  } else {
    int64_t left = spread == Spread::one ? Vector<T>::lanes : slopes.inner.value - slopes.inner.remainder(element);
#pragma unroll
    for (int j = 0; j < Vector<T>::lanes; ++j, --left) {
      const bool next = left == 0;
      channel = next ? channel + 1 == slopes.channels.value ? 0 : channel + 1 : channel;
      left = next ? slopes.inner.value : left;
      own.lane[j] = slopes.weight[channel];
    }
  }
  return own;
}
template <class T, Spread spread>
__device__ __forceinline__ LeakyRelu<T, Device::cuda> own(const Slopes<T, spread>&, const Vector<T>& own, int j) {
  return LeakyRelu<T, Device::cuda>(widen(own.lane[j]));
}

// How the gradients are summed. A tensor is items of columns; a column's items are divided into parts, and a block sums
// one part of `across` neighbouring columns, each thread every (threads / across)-th item of one.
//   by_channel   a column is a channel, its items the vectors of its runs of `inner` elements
//   otherwise    a column is a vector of the channels * inner elements that follow each other, its items the
//   repetitions
struct Sums {
  static constexpr int threads = 256;
  static constexpr int batch = 4;  // items of a thread under way together
  Divisor channels, inner;
  Divisor run;                   // by_channel: vectors in a run
  Divisor groups;                // of `across` columns each
  int64_t columns, items, part;  // part: items in one
  int across;                    // a power of 2
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
  // How many elements of the vector exist: that of a single channel may be the last.
  __device__ __forceinline__ int count(int64_t element) const {
    const int64_t left = numel - element;
    return left < lanes ? int(left) : lanes;
  }
};

// The items from `item` on, every step-th, as many as a batch has; `full`: all are there, with all their elements.
template <bool full, bool aligned, bool by_channel, class T, int lanes>
__device__ __forceinline__ void backward_batch(const Column<by_channel, T, lanes>& column, int64_t item, int64_t end,
                                               int step, const Vector<T, lanes>& weights, const T* grad, const T* input,
                                               T* output, Arithmetic<T> (&totals)[lanes]) {
  constexpr int batch = Sums::batch;
  Vector<T, lanes> grads[batch], inputs[batch];
  int64_t element[batch];
  int count[batch];
#pragma unroll
  for (int k = 0; k < batch; ++k) {
    element[k] = column.element(item + k * step);
    count[k] = full ? lanes : item + k * step < end ? column.count(element[k]) : 0;
  }
#pragma unroll
  for (int k = 0; k < batch; ++k) {
    grads[k] = load<Hint::none, aligned, lanes>(grad + element[k], count[k]);
    inputs[k] = load<Hint::none, aligned, lanes>(input + element[k], count[k]);
  }
#pragma unroll
  for (int k = 0; k < batch; ++k) {
#pragma unroll
    for (int j = 0; j < lanes; ++j) {
      const LeakyRelu<T, Device::cuda> act(widen(weights.lane[j]));
      const T x = inputs[k].lane[j], g = grads[k].lane[j];
      const bool keep = act.keep(x);
      totals[j] += act.slope_gradient(g, x, keep);
      grads[k].lane[j] = act.backward(g, keep);
    }
    if (output) store<Hint::none, aligned>(output + element[k], count[k], grads[k]);
  }
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

// parts_of_sums[part][column][lane], or [part][channel]: null where they are not wanted. output may be null too.
template <bool by_channel, class T, int lanes, bool aligned>
__global__ void __launch_bounds__(Sums::threads)
    prelu_backward_kernel(Sums sums, const T* weight, const T* grad, const T* input, T* output,
                          Arithmetic<T>* parts_of_sums, int64_t numel) {
  const int64_t part = sums.groups.quotient(blockIdx.x), group = blockIdx.x - part * sums.groups.value;
  const Column<by_channel, T, lanes> column{sums, group * sums.across + threadIdx.x % sums.across, numel};
  const int step = Sums::threads / sums.across;
  Arithmetic<T> totals[lanes] = {};
  if (column.column < sums.columns) {
    Vector<T, lanes> weights;
    for (int j = 0; j < lanes; ++j) weights.lane[j] = weight[column.channel(j)];
    const int64_t end = part * sums.part + sums.part < sums.items ? part * sums.part + sums.part : sums.items;
    for (int64_t item = part * sums.part + threadIdx.x / sums.across; item < end; item += Sums::batch * step) {
      const int64_t last = item + (Sums::batch - 1) * step;
      if ((aligned || lanes == 1) && last < end && numel - column.element(last) >= lanes)
        backward_batch<true, aligned>(column, item, end, step, weights, grad, input, output, totals);
      else
        backward_batch<false, aligned>(column, item, end, step, weights, grad, input, output, totals);
    }
  }
  if (!parts_of_sums) return;
  constexpr int values = by_channel ? 1 : lanes;
  if constexpr (by_channel)
    for (int j = 1; j < lanes; ++j) totals[0] += totals[j];
  Arithmetic<T> own[values];
  for (int j = 0; j < values; ++j) own[j] = totals[j];
  join(own, sums.across);
  if (int(threadIdx.x) >= sums.across || column.column >= sums.columns) return;
  for (int j = 0; j < values; ++j) parts_of_sums[(part * sums.columns + column.column) * values + j] = own[j];
}

// grad_weight[channel] = the sum over all parts of `inner` neighbours each, in float64, rounded; a warp a channel.
template <class T>
__global__ void __launch_bounds__(Sums::threads) prelu_join_kernel(const Arithmetic<T>* parts_of_sums, T* grad_weight,
                                                                   int64_t channels, Divisor inner, int64_t parts) {
  const int64_t channel = int64_t(blockIdx.x) * (Sums::threads / warp) + threadIdx.x / warp;
  if (channel >= channels) return;
  double total = 0;
  for (int64_t i = threadIdx.x % warp; i < parts * inner.value; i += warp) {
    const int64_t part = inner.quotient(i);
    total += parts_of_sums[(part * channels + channel) * inner.value + i - part * inner.value];
  }
  for (int lanes = warp / 2; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
  if (threadIdx.x % warp == 0) grad_weight[channel] = narrow<T>(Arithmetic<T>(total));
}

}  // namespace relu_ext::cuda
