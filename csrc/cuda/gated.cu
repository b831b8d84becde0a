// The launchers of the gated operations.
#include <initializer_list>
#include <type_traits>

#include "../dispatch.h"
#include "gated.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace relu_ext::cuda {
namespace {

// Two or three operands with two vectors each: as many bytes in flight as the elementwise kernels have.
// The hint makes a store one instruction of 128 bits: without it nvcc 13.0 makes four of every other one.
using GatedTile = Tile<256, 2, Hint::none, Hint::streaming>;

template <class T, class Pointer>
auto spaced(const Rows<Pointer>& rows, int64_t columns) {
  using Element = std::conditional_t<std::is_same_v<Pointer, void*>, T, const T>;
  return Spaced<Element*>{static_cast<Element*>(rows.data), rows.stride - columns};
}

// Do vectors of so many lanes make up all rows? One row alone may end in a part of one.
bool divide(int lanes, int64_t columns, int64_t numel, std::initializer_list<const void*> pointers,
            std::initializer_list<int64_t> strides) {
  if (!are_aligned(pointers)) return false;
  if (columns >= numel) return true;
  bool whole = columns % lanes == 0;
  for (const int64_t stride : strides) whole &= stride % lanes == 0;
  return whole;
}

// body(T{}, lanes).
template <class Body>
cudaError_t with_lanes(Dtype dtype, int64_t columns, int64_t numel, std::initializer_list<const void*> pointers,
                       std::initializer_list<int64_t> strides, Body body) {
  if (numel == 0) return cudaSuccess;
  return with_dtype(dtype, [&](auto element) {
    constexpr int lanes = Vector<decltype(element)>::lanes;
    if (divide(lanes, columns, numel, pointers, strides)) return body(element, std::integral_constant<int, lanes>{});
    return body(element, std::integral_constant<int, 1>{});
  });
}

}  // namespace

cudaError_t gated(const Gated& work, int64_t numel, cudaStream_t stream) {
  const auto& [dtype, columns, gate, up, output] = work;
  return with_lanes(dtype, columns, numel, {gate.data, up.data, output.data}, {gate.stride, up.stride, output.stride},
                    [&, columns = columns](auto element, auto lanes_) {
                      using T = decltype(element);
                      constexpr int lanes = decltype(lanes_)::value;
                      return launch(gated_kernel<T, GatedTile, lanes>, blocks<T, GatedTile, lanes>(numel),
                                    GatedTile::threads, stream, spaced<T>(work.gate, columns),
                                    spaced<T>(work.up, columns), spaced<T>(work.output, columns), Divisor(columns),
                                    numel);
                    });
}

cudaError_t gated_backward(const GatedBackward& work, int64_t numel, cudaStream_t stream) {
  const bool to_gate = work.grad_gate.data, to_up = work.grad_up.data;
  if (!to_gate && !to_up) return cudaSuccess;
  const auto used = [](bool is, int64_t stride) { return is ? stride : 0; };
  return with_lanes(
      work.dtype, work.columns, numel,
      {work.grad.data, work.gate.data, to_gate ? work.up.data : nullptr, work.grad_gate.data, work.grad_up.data},
      {work.grad.stride, work.gate.stride, used(to_gate, work.up.stride), used(to_gate, work.grad_gate.stride),
       used(to_up, work.grad_up.stride)},
      [&](auto element, auto lanes_) {
        using T = decltype(element);
        constexpr int lanes = decltype(lanes_)::value;
        const auto kernel = to_gate && to_up ? gated_backward_kernel<T, GatedTile, lanes, true, true>
                            : to_gate        ? gated_backward_kernel<T, GatedTile, lanes, true, false>
                                             : gated_backward_kernel<T, GatedTile, lanes, false, true>;
        return launch(kernel, blocks<T, GatedTile, lanes>(numel), GatedTile::threads, stream,
                      spaced<T>(work.grad, work.columns), spaced<T>(work.gate, work.columns),
                      spaced<T>(work.up, work.columns), spaced<T>(work.grad_gate, work.columns),
                      spaced<T>(work.grad_up, work.columns), Divisor(work.columns), numel);
      });
}

}  // namespace relu_ext::cuda
