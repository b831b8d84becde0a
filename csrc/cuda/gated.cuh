// Device code of the gated operations. Rows may lie apart, so a vector's place takes one division; where rows do not
// divide into vectors of 16 bytes, a vector is one element.
#pragma once
#include "division.h"
#include "kernels.cuh"

namespace relu_ext::cuda {

// Rows of typed elements. gap: stride - columns, which may be negative.
template <class Pointer>
struct Spaced {
  Pointer data;
  int64_t gap;

  // element: of all rows together, which is in this row.
  __device__ __forceinline__ Pointer at(int64_t element, int64_t row) const { return data + element + row * gap; }
};

// A thread's vectors: as in the elementwise kernels, and the row of each.
template <class T, class Tile, bool full, int lanes>
struct PartOfRows : Part<T, Tile, full, lanes> {
  using Part = cuda::Part<T, Tile, full, lanes>;
  using Vector = cuda::Vector<T, lanes>;
  int64_t row[Tile::vectors];

  __device__ __forceinline__ PartOfRows(int64_t numel, const Divisor& columns) : Part(numel) {
#pragma unroll
    for (int k = 0; k < Tile::vectors; ++k) row[k] = columns.quotient(Part::element(k));
  }
  __device__ __forceinline__ Vector load(const Spaced<const T*>& rows, int k) const {
    return cuda::load<Tile::loads, lanes != 1, lanes>(rows.at(Part::element(k), row[k]), Part::count(k));
  }
  __device__ __forceinline__ void store(const Spaced<T*>& rows, int k, const Vector& vector) const {
    cuda::store<Tile::stores, lanes != 1>(rows.at(Part::element(k), row[k]), Part::count(k), vector);
  }
};

template <class T, class Tile, bool full, int lanes>
__device__ __forceinline__ void gated_tile(const Spaced<const T*>& gate, const Spaced<const T*>& up,
                                           const Spaced<T*>& output, const Divisor& columns, int64_t numel) {
  const PartOfRows<T, Tile, full, lanes> part(numel, columns);
  Vector<T, lanes> gates[Tile::vectors], ups[Tile::vectors];
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
    gates[k] = part.load(gate, k);
    ups[k] = part.load(up, k);
  }
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
#pragma unroll
    for (int j = 0; j < lanes; ++j)
      gates[k].lane[j] = narrow<T>(Reglu::forward(widen(gates[k].lane[j]), widen(ups[k].lane[j])));
    part.store(output, k, gates[k]);
  }
}

// up is read where to_gate.
template <class T, class Tile, bool full, int lanes, bool to_gate, bool to_up>
__device__ __forceinline__ void gated_backward_tile(const Spaced<const T*>& grad, const Spaced<const T*>& gate,
                                                    const Spaced<const T*>& up, const Spaced<T*>& grad_gate,
                                                    const Spaced<T*>& grad_up, const Divisor& columns, int64_t numel) {
  const PartOfRows<T, Tile, full, lanes> part(numel, columns);
  Vector<T, lanes> grads[Tile::vectors], gates[Tile::vectors], ups[Tile::vectors];
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
    grads[k] = part.load(grad, k);
    gates[k] = part.load(gate, k);
    if constexpr (to_gate) ups[k] = part.load(up, k);
  }
#pragma unroll
  for (int k = 0; k < Tile::vectors; ++k) {
#pragma unroll
    for (int j = 0; j < lanes; ++j) {
      const Arithmetic<T> g = widen(grads[k].lane[j]), x = widen(gates[k].lane[j]);
      if constexpr (to_gate) ups[k].lane[j] = narrow<T>(Reglu::grad_gate(g, x, widen(ups[k].lane[j])));
      if constexpr (to_up) grads[k].lane[j] = narrow<T>(Reglu::grad_up(g, x));
    }
    if constexpr (to_gate) part.store(grad_gate, k, ups[k]);
    if constexpr (to_up) part.store(grad_up, k, grads[k]);
  }
}

// columns: of a row; where there is one row alone, any number from numel on.
template <class T, class Tile, int lanes>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    gated_kernel(Spaced<const T*> gate, Spaced<const T*> up, Spaced<T*> output, Divisor columns, int64_t numel) {
  if (block_is_full<T, Tile, lanes>(numel))
    gated_tile<T, Tile, true, lanes>(gate, up, output, columns, numel);
  else
    gated_tile<T, Tile, false, lanes>(gate, up, output, columns, numel);
}

template <class T, class Tile, int lanes, bool to_gate, bool to_up>
__global__ void __launch_bounds__(Tile::threads, Tile::blocks)
    gated_backward_kernel(Spaced<const T*> grad, Spaced<const T*> gate, Spaced<const T*> up, Spaced<T*> grad_gate,
                          Spaced<T*> grad_up, Divisor columns, int64_t numel) {
  if (block_is_full<T, Tile, lanes>(numel))
    gated_backward_tile<T, Tile, true, lanes, to_gate, to_up>(grad, gate, up, grad_gate, grad_up, columns, numel);
  else
    gated_backward_tile<T, Tile, false, lanes, to_gate, to_up>(grad, gate, up, grad_gate, grad_up, columns, numel);
}

}  // namespace relu_ext::cuda
