// Device code of the gated operations: a thread has one vector of a row. The vector has as many elements as 16 bytes
// where `whole`, that is where all rows begin and end at multiples of 16 bytes, else one.
#pragma once
#include "kernels.cuh"

namespace relu_ext::cuda {

template <bool whole, class T>
constexpr int width = whole ? Vector<T>::lanes : 1;

// Where a thread's vector is: its row and its first column.
struct Place {
  int64_t row, column;
};
template <int lanes>
__device__ __forceinline__ Place place(int64_t columns) {
  const auto [row, vector] = divide(int64_t(blockIdx.x) * blockDim.x + threadIdx.x, columns / lanes);
  return {row, vector * lanes};
}

template <bool whole, class T>
__device__ __forceinline__ Vector<T> read(const Rows<const void*>& rows, Place at) {
  return load<Hint::none, whole>(static_cast<const T*>(rows.data) + at.row * rows.stride + at.column, width<whole, T>);
}
template <bool whole, class T>
__device__ __forceinline__ void write(const Rows<void*>& rows, Place at, const Vector<T>& vector) {
  store<Hint::none, whole>(static_cast<T*>(rows.data) + at.row * rows.stride + at.column, width<whole, T>, vector);
}

template <class T, bool whole>
__global__ void gated_kernel(Gated work, int64_t vectors) {
  if (int64_t(blockIdx.x) * blockDim.x + threadIdx.x >= vectors) return;
  const Place at = place<width<whole, T>>(work.columns);
  Vector<T> gate = read<whole, T>(work.gate, at);
  const Vector<T> up = read<whole, T>(work.up, at);
#pragma unroll
  for (int j = 0; j < width<whole, T>; ++j) gate.lane[j] = Reglu<T>::forward(gate.lane[j], up.lane[j]);
  write<whole, T>(work.output, at, gate);
}

template <class T, bool whole>
__global__ void gated_backward_kernel(GatedBackward work, int64_t vectors) {
  if (int64_t(blockIdx.x) * blockDim.x + threadIdx.x >= vectors) return;
  const Place at = place<width<whole, T>>(work.columns);
  const Vector<T> grad = read<whole, T>(work.grad, at), gate = read<whole, T>(work.gate, at);
  Vector<T> result;
  if (work.grad_gate.data) {
    const Vector<T> up = read<whole, T>(work.up, at);
#pragma unroll
    for (int j = 0; j < width<whole, T>; ++j)
      result.lane[j] = Reglu<T>::grad_gate(grad.lane[j], gate.lane[j], up.lane[j]);
    write<whole, T>(work.grad_gate, at, result);
  }
  if (work.grad_up.data) {
#pragma unroll
    for (int j = 0; j < width<whole, T>; ++j) result.lane[j] = Reglu<T>::grad_up(grad.lane[j], gate.lane[j]);
    write<whole, T>(work.grad_up, at, result);
  }
}

}  // namespace relu_ext::cuda
