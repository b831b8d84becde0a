// The launchers of prelu.
#include <type_traits>

#include "../dispatch.h"
#include "kernels.h"
#include "launch_channels.cuh"
#include "prelu.cuh"

namespace relu_ext::cuda {
namespace {

// float64 needs as many vectors as share a byte of bits.
template <class T>
using PreluTile = Tile<256, sizeof(T) == 8 ? 4 : 2>;

// body(T{}, slopes, aligned).
template <class Work, class Body>
cudaError_t with_slopes(const Work& work, bool is_aligned, Body body) {
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto run = [&](auto spread, auto aligned) {
      constexpr Spread how = decltype(spread)::value;
      return body(element, Slopes<T, how>{by_channel<how>(work.channels), static_cast<const T*>(work.weight)}, aligned);
    };
    return with_spread(work.channels, Vector<T>::lanes, is_aligned, are_aligned({work.weight}), run);
  });
}

cudaError_t backward_from_bits(const PreluBackward& work, int64_t numel, cudaStream_t stream) {
  return with_slopes(work, are_aligned({work.grad, work.output}), [&](auto element, auto slopes, auto aligned) {
    using T = decltype(element);
    const auto kernel =
        backward_kernel<Kept::bits, T, PreluTile<T>, decltype(aligned)::value, decltype(slopes), uint8_t>;
    return launch(kernel, blocks<T, PreluTile<T>>(numel), PreluTile<T>::threads, stream, slopes,
                  static_cast<const T*>(work.grad), work.bits, static_cast<T*>(work.output), numel);
  });
}

template <class T>
cudaError_t backward_with_sums(const PreluBackward& work, int64_t numel, Arithmetic<T>* workspace,
                               cudaStream_t stream) {
  const SlopeGradients<T> gradients{static_cast<const T*>(work.weight), static_cast<const T*>(work.grad),
                                    static_cast<const T*>(work.input), static_cast<T*>(work.output)};
  const bool is_aligned = are_aligned({work.grad, work.input, work.output});
  const auto with_work = [&](auto, auto body) { return body(gradients); };
  return launch_sums<T>(work.channels, numel, is_aligned, with_work, workspace, stream);
}

}  // namespace

cudaError_t prelu(const Prelu& work, int64_t numel, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_slopes(work, are_aligned({work.input, work.output}), [&](auto element, auto slopes, auto aligned) {
    using T = decltype(element);
    constexpr bool whole = decltype(aligned)::value;
    const auto kernel = work.bits ? forward_kernel<T, PreluTile<T>, whole, true, decltype(slopes)>
                                  : forward_kernel<T, PreluTile<T>, whole, false, decltype(slopes)>;
    return launch(kernel, blocks<T, PreluTile<T>>(numel), PreluTile<T>::threads, stream, slopes,
                  static_cast<const T*>(work.input), static_cast<T*>(work.output), work.bits, numel);
  });
}

int64_t prelu_workspace(const PreluBackward& work, int64_t numel) {
  if (!work.grad_weight || numel == 0) return 0;
  return with_dtype(work.dtype, [&](auto element) { return workspace_of<decltype(element)>(work.channels, numel, 1); });
}

cudaError_t prelu_backward(const PreluBackward& work, int64_t numel, void* workspace, cudaStream_t stream) {
  if (work.bits && numel > 0) return backward_from_bits(work, numel, stream);
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto parts = static_cast<Arithmetic<T>*>(work.grad_weight ? workspace : nullptr);
    const cudaError_t error = numel ? backward_with_sums<T>(work, numel, parts, stream) : cudaSuccess;
    if (error || !work.grad_weight) return error;
    return join_sums<T>(work.channels, numel, {static_cast<T*>(work.grad_weight), nullptr}, parts, stream);
  });
}

}  // namespace relu_ext::cuda
