// From a description of the work to the kernel that does it, and its launch.
#include <cstdint>
#include <type_traits>

#include "../dispatch.h"
#include "kernels.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace relu_ext::cuda {
namespace {

// Reckoned, not yet measured: benchmarks/sweep.py times these tiles among others. Four vectors a thread keep 64 bytes
// of it in flight; where that leaves multiprocessors without a block, one vector a thread makes four times as many
// blocks.
using Large = Tile<256, 4>;
using Small = Tile<256, 1>;

// body(T{}, act, Tile{}, aligned), all of them types but for what act holds.
template <class Work, class Body>
cudaError_t with_types(const Work& work, int64_t numel, bool is_aligned, Body body) {
  if (numel == 0) return cudaSuccess;
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    return with_activation<T, Device::cuda>(work.activation, work.scalars, [&](auto act) {
      if (!is_aligned) return body(element, act, Small{}, std::false_type{});
      if (numel < blocks_at_once * elements_of<T, Large>) return body(element, act, Small{}, std::true_type{});
      return body(element, act, Large{}, std::true_type{});
    });
  });
}

}  // namespace

cudaError_t forward(const Forward& work, int64_t numel, cudaStream_t stream) {
  const bool is_aligned = are_aligned({work.input, work.output});
  return with_types(work, numel, is_aligned, [&](auto element, auto act, auto tile, auto aligned) {
    using T = decltype(element);
    using Tile = decltype(tile);
    using Act = decltype(act);
    constexpr bool whole = decltype(aligned)::value;
    const auto kernel =
        work.bits ? forward_kernel<T, Tile, whole, Act::keeps_bits, Act> : forward_kernel<T, Tile, whole, false, Act>;
    return launch(kernel, blocks<T, Tile>(numel), Tile::threads, stream, act, static_cast<const T*>(work.input),
                  static_cast<T*>(work.output), work.bits, numel);
  });
}

cudaError_t backward(const Backward& work, int64_t numel, cudaStream_t stream) {
  const bool from_bits = work.kept_as == Kept::bits;
  const bool is_aligned = are_aligned({work.grad, from_bits ? nullptr : work.kept, work.output});
  return with_types(work, numel, is_aligned, [&](auto element, auto act, auto tile, auto aligned) {
    using T = decltype(element);
    using Tile = decltype(tile);
    using K = std::conditional_t<decltype(act)::keeps_bits, uint8_t, T>;
    return with_kept<decltype(act)>(work.kept_as, [&](auto from) {
      const auto kernel = backward_kernel<decltype(from)::value, T, Tile, decltype(aligned)::value, decltype(act), K>;
      return launch(kernel, blocks<T, Tile>(numel), Tile::threads, stream, act, static_cast<const T*>(work.grad),
                    static_cast<const K*>(work.kept), static_cast<T*>(work.output), numel);
    });
  });
}

}  // namespace relu_ext::cuda
