// Device code of prelu: the slope of every element, and the sums over channels.
#pragma once
#include "kernels.cuh"

namespace relu_ext::cuda {

// An activation for every element. The channel is found by division at the first of neighbours, then counted on.
template <class T>
struct ChannelSlopes {
  static constexpr bool keeps_bits = true;
  const T* weight;
  Channels channels;

  struct Cursor {
    const ChannelSlopes& slopes;
    int64_t channel, begun;

    __device__ __forceinline__ LeakyRelu<T, Device::cuda> next() {
      const LeakyRelu<T, Device::cuda> act(widen(slopes.weight[channel]));
      if (++begun == slopes.channels.inner) {
        begun = 0;
        if (++channel == slopes.channels.channels) channel = 0;
      }
      return act;
    }
  };
};

template <class T>
__device__ __forceinline__ typename ChannelSlopes<T>::Cursor cursor(const ChannelSlopes<T>& slopes, int64_t element) {
  const auto [run, begun] = divide(element, slopes.channels.inner);
  return {slopes, divide(run, slopes.channels.channels).remainder, begun};
}

// A channel has `length` places in memory: `inner` next to each other, then those after all other channels' ones. A
// part is `places` of them. What each part adds up to depends on the shape alone, so the sums do.
struct Parts {
  int64_t number, places, length;
};

constexpr int summing = 256;                  // threads of a block that sums
constexpr int rows_at_once = summing / warp;  // where inner is 1: a warp has 32 channels of a row

// The sum of `value` over the block, in thread 0: within a warp, then over the warps.
template <class X>
__device__ __forceinline__ X block_sum(X value) {
  __shared__ X of_warp[summing / warp];
#pragma unroll
  for (int step = warp / 2; step; step /= 2) value += __shfl_down_sync(0xffffffffu, value, step);
  if (threadIdx.x % warp == 0) of_warp[threadIdx.x / warp] = value;
  __syncthreads();
  if (threadIdx.x) return X{};
  X total{};
#pragma unroll
  for (int i = 0; i < summing / warp; ++i) total += of_warp[i];
  return total;
}

// Writes the gradient of element i, returns what it adds to its slope's.
template <class T>
__device__ __forceinline__ Arithmetic<T> backward_of(const PreluBackward& work, Arithmetic<T> slope, int64_t i) {
  const T grad = static_cast<const T*>(work.grad)[i], input = static_cast<const T*>(work.input)[i];
  const LeakyRelu<T, Device::cuda> act(slope);
  const bool keep = act.keep(input);
  if (work.output) static_cast<T*>(work.output)[i] = act.backward(grad, keep);
  return keep ? Arithmetic<T>{} : widen(grad) * widen(input);
}

__device__ __forceinline__ int64_t place_in_memory(const Channels& channels, int64_t channel, int64_t place) {
  const auto [outer, within] = divide(place, channels.inner);
  return (outer * channels.channels + channel) * channels.inner + within;
}

// A block for each part of each channel: sums[part * channels + channel].
template <class T>
__global__ void __launch_bounds__(summing) prelu_runs_kernel(PreluBackward work, Parts parts, Arithmetic<T>* sums) {
  const auto [part, channel] = divide(blockIdx.x, work.channels.channels);
  const int64_t begin = part * parts.places;
  const int64_t end = begin + parts.places < parts.length ? begin + parts.places : parts.length;
  const Arithmetic<T> slope = widen(static_cast<const T*>(work.weight)[channel]);
  Arithmetic<T> sum{};
  for (int64_t place = begin + threadIdx.x; place < end; place += summing)
    sum += backward_of<T>(work, slope, place_in_memory(work.channels, channel, place));
  sum = block_sum(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

// Where inner is 1: a block for each part of 32 neighbouring channels.
template <class T>
__global__ void __launch_bounds__(summing) prelu_columns_kernel(PreluBackward work, Parts parts, Arithmetic<T>* sums) {
  __shared__ Arithmetic<T> of_row[rows_at_once][warp];
  const int64_t channels = work.channels.channels, groups = (channels - 1) / warp + 1;
  const int lane = int(threadIdx.x) % warp, own_row = int(threadIdx.x) / warp;
  const auto [part, group] = divide(blockIdx.x, groups);
  const int64_t channel = group * warp + lane;
  const int64_t begin = part * parts.places;
  const int64_t end = begin + parts.places < parts.length ? begin + parts.places : parts.length;
  Arithmetic<T> sum{};
  if (channel < channels) {
    const Arithmetic<T> slope = widen(static_cast<const T*>(work.weight)[channel]);
#pragma unroll 4
    for (int64_t row = begin + own_row; row < end; row += rows_at_once)
      sum += backward_of<T>(work, slope, row * channels + channel);
  }
  of_row[own_row][lane] = sum;
  __syncthreads();
  if (own_row || channel >= channels) return;
#pragma unroll
  for (int row = 1; row < rows_at_once; ++row) sum += of_row[row][lane];
  sums[part * channels + channel] = sum;
}

// A thread for each channel.
template <class T>
__global__ void prelu_total_kernel(const Arithmetic<T>* sums, int64_t parts, int64_t channels, T* grad_weight) {
  const int64_t channel = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (channel >= channels) return;
  double total = 0;
  for (int64_t part = 0; part < parts; ++part) total += double(sums[part * channels + channel]);
  grad_weight[channel] = narrow<T>(Arithmetic<T>(total));
}

}  // namespace relu_ext::cuda
