// Device code of prelu: the elementwise kernels with a slope for each element, and what is summed for the slopes.
#pragma once
#include "sums.cuh"

namespace relu_ext::cuda {

// In the place of an activation.
template <class T, Spread spread>
struct Slopes {
  static constexpr bool keeps_bits = true;
  ByChannel<spread> channels;
  const T* weight;
};

template <class T, Spread spread>
__device__ __forceinline__ Vector<T> load_own(const Slopes<T, spread>& slopes, int64_t element) {
  return slopes.channels.load(slopes.weight, element);
}
template <class T, Spread spread>
__device__ __forceinline__ LeakyRelu<T, Device::cuda> own(const Slopes<T, spread>&, const Vector<T>& own, int j) {
  return LeakyRelu<T, Device::cuda>(widen(own.lane[j]));
}

// A work of sums_kernel. output may be null.
template <class T>
struct SlopeGradients {
  static constexpr int sums = 1, batch = 4;
  const T *weight, *grad, *input;
  T* output;

  template <int lanes>
  struct Loaded {
    Vector<T, lanes> grad, input;
  };

  __device__ __forceinline__ T of_channel(int64_t channel) const { return weight[channel]; }
  template <bool aligned, int lanes>
  __device__ __forceinline__ Loaded<lanes> load(int64_t element, int count) const {
    return {cuda::load<Hint::none, aligned, lanes>(grad + element, count),
            cuda::load<Hint::none, aligned, lanes>(input + element, count)};
  }
  template <bool aligned, int lanes>
  __device__ __forceinline__ void finish(Loaded<lanes>& loaded, const Vector<T, lanes>& weights, int64_t element,
                                         int count, Arithmetic<T> (&totals)[sums][lanes]) const {
#pragma unroll
    for (int j = 0; j < lanes; ++j) {
      const LeakyRelu<T, Device::cuda> act(widen(weights.lane[j]));
      const T x = loaded.input.lane[j], g = loaded.grad.lane[j];
      const bool keep = act.keep(x);
      totals[0][j] += act.slope_gradient(widen(g), widen(x));
      loaded.grad.lane[j] = act.backward(g, keep);
    }
    if (output) store<Hint::none, aligned>(output + element, count, loaded.grad);
  }
};

}  // namespace relu_ext::cuda
