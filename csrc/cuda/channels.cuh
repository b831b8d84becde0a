// Device code for what has a value for each channel: the values that belong to the elements of a vector.
#pragma once
#include "division.h"
#include "kernels.cuh"

namespace relu_ext::cuda {

// Of the elements of a 16-byte vector: all of one channel; of consecutive channels, the first being a multiple of their
// number, values at a multiple of 16 bytes; whatever else.
enum class Spread { one, consecutive, any };

template <Spread spread_>
struct ByChannel {
  static constexpr Spread spread = spread_;
  Divisor channels, inner;

  // values: one a channel, next to each other. Also past the end: those are values too, of channels that there are.
  template <class T>
  __device__ __forceinline__ Vector<T> load(const T* values, int64_t element) const {
    Vector<T> own{};
    int64_t channel = channels.remainder(inner.quotient(element));
    if constexpr (spread == Spread::consecutive) {
      own = cuda::load<Hint::none, true>(values + channel, Vector<T>::lanes);
    } else {
      int64_t left = spread == Spread::one ? Vector<T>::lanes : inner.value - inner.remainder(element);
#pragma unroll
      for (int j = 0; j < Vector<T>::lanes; ++j, --left) {
        const bool next = left == 0;
        channel = next ? channel + 1 == channels.value ? 0 : channel + 1 : channel;
        left = next ? inner.value : left;
        own.lane[j] = values[channel];
      }
    }
    return own;
  }
};

}  // namespace relu_ext::cuda
