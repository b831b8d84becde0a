// From a description of the work to the kernel that does it, and its launch.
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "../dispatch.h"
#include "gated.cuh"
#include "kernels.h"
#include "prelu.cuh"

namespace relu_ext::cuda {
namespace {

// Reckoned, not yet measured: benchmarks/sweep.py times these tiles among others. Four vectors a thread keep 64 bytes
// of it in flight; where that leaves multiprocessors without a block, one vector a thread makes four times as many
// blocks.
using Large = Tile<256, 4>;
using Small = Tile<256, 1>;

// Blocks of 256 threads that run at once on the largest chips of today: 2048 threads on each of 108 (A100), 132 (H100,
// H200) or 148 (B200) multiprocessors.
constexpr int64_t blocks_at_once = 1024;

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   std::common_type_t<Parameters>... arguments) {
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, 0, stream);
}

bool are_aligned(std::initializer_list<const void*> pointers) {
  uintptr_t all = 0;
  for (const void* pointer : pointers) all |= reinterpret_cast<uintptr_t>(pointer);
  return all % 16 == 0;
}

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
// The same for prelu, whose activation is another for every channel: its cursors leave no registers for large tiles.
template <class Work, class Body>
cudaError_t with_slopes(const Work& work, int64_t numel, bool is_aligned, Body body) {
  if (numel == 0) return cudaSuccess;
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const ChannelSlopes<T> slopes{static_cast<const T*>(work.weight), work.channels};
    if (is_aligned) return body(element, slopes, Small{}, std::true_type{});
    return body(element, slopes, Small{}, std::false_type{});
  });
}

template <class T, class Tile>
int64_t blocks(int64_t numel) {
  return (numel - 1) / elements_of<T, Tile> + 1;
}

// What a kernel of any activation is launched with.
template <class Work>
auto forward_launch(const Work& work, int64_t numel, cudaStream_t stream) {
  return [&work, numel, stream](auto element, auto act, auto tile, auto aligned) {
    using T = decltype(element);
    using Tile = decltype(tile);
    using Act = decltype(act);
    constexpr bool whole = decltype(aligned)::value;
    const auto kernel =
        work.bits ? forward_kernel<T, Tile, whole, Act::keeps_bits, Act> : forward_kernel<T, Tile, whole, false, Act>;
    return launch(kernel, blocks<T, Tile>(numel), Tile::threads, stream, act, static_cast<const T*>(work.input),
                  static_cast<T*>(work.output), work.bits, numel);
  };
}
template <class Work>
auto backward_launch(const Work& work, Kept kept_as, const void* kept, int64_t numel, cudaStream_t stream) {
  return [&work, kept_as, kept, numel, stream](auto element, auto act, auto tile, auto aligned) {
    using T = decltype(element);
    using Tile = decltype(tile);
    using K = std::conditional_t<decltype(act)::keeps_bits, uint8_t, T>;
    return with_kept<decltype(act)>(kept_as, [&](auto from) {
      const auto kernel = backward_kernel<decltype(from)::value, T, Tile, decltype(aligned)::value, decltype(act), K>;
      return launch(kernel, blocks<T, Tile>(numel), Tile::threads, stream, act, static_cast<const T*>(work.grad),
                    static_cast<const K*>(kept), static_cast<T*>(work.output), numel);
    });
  };
}

// Elements to a vector of the gated kernels: as many as 16 bytes have where all rows begin at multiples of these.
template <class T>
bool whole_rows(int64_t columns, std::initializer_list<Rows<const void*>> all) {
  constexpr int lanes = Vector<T>::lanes;
  bool whole = columns % lanes == 0;
  for (const auto& rows : all) whole &= are_aligned({rows.data}) && rows.stride % lanes == 0;
  return whole;
}
Rows<const void*> read_only(const Rows<void*>& rows) { return {rows.data, rows.stride}; }

template <class T, class Work>
cudaError_t launch_gated(void (*vectors)(Work, int64_t), void (*scalars)(Work, int64_t), bool whole, const Work& work,
                         int64_t numel, cudaStream_t stream) {
  constexpr int threads = 256;
  const int64_t count = whole ? numel / Vector<T>::lanes : numel;
  return launch(whole ? vectors : scalars, (count - 1) / threads + 1, threads, stream, work, count);
}

// Parts of the channels' sums: reckoned, not yet measured, to make about so many blocks of at least so many places.
constexpr int64_t summing_blocks = 2048, fewest_places = 1024;

Parts parts_of(const Channels& channels, int64_t numel) {
  const int64_t length = numel / channels.channels;
  const int64_t side_by_side = channels.inner == 1 ? (channels.channels - 1) / warp + 1 : channels.channels;
  const int64_t wanted = std::max<int64_t>(summing_blocks / side_by_side, 1);
  const int64_t fewest = channels.inner == 1 ? fewest_places / warp : fewest_places;
  const int64_t places = std::max((length - 1) / wanted + 1, fewest);
  return {(length - 1) / places + 1, places, length};
}

}  // namespace

cudaError_t forward(const Forward& work, int64_t numel, cudaStream_t stream) {
  return with_types(work, numel, are_aligned({work.input, work.output}), forward_launch(work, numel, stream));
}

cudaError_t backward(const Backward& work, int64_t numel, cudaStream_t stream) {
  const bool is_aligned = are_aligned({work.grad, work.kept_as == Kept::bits ? nullptr : work.kept, work.output});
  return with_types(work, numel, is_aligned, backward_launch(work, work.kept_as, work.kept, numel, stream));
}

cudaError_t gated(const Gated& work, int64_t numel, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const bool whole = whole_rows<T>(work.columns, {work.gate, work.up, read_only(work.output)});
    return launch_gated<T>(gated_kernel<T, true>, gated_kernel<T, false>, whole, work, numel, stream);
  });
}

cudaError_t gated_backward(const GatedBackward& work, int64_t numel, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const bool whole = whole_rows<T>(
        work.columns, {work.grad, work.gate, work.up, read_only(work.grad_gate), read_only(work.grad_up)});
    return launch_gated<T>(gated_backward_kernel<T, true>, gated_backward_kernel<T, false>, whole, work, numel, stream);
  });
}

cudaError_t prelu(const Prelu& work, int64_t numel, cudaStream_t stream) {
  return with_slopes(work, numel, are_aligned({work.input, work.output}), forward_launch(work, numel, stream));
}

int64_t prelu_workspace(const PreluBackward& work, int64_t numel) {
  if (work.bits || numel == 0) return 0;
  return parts_of(work.channels, numel).number * work.channels.channels * int64_t(sizeof(double));
}

cudaError_t prelu_backward(const PreluBackward& work, int64_t numel, void* workspace, cudaStream_t stream) {
  if (work.bits)
    return with_slopes(work, numel, are_aligned({work.grad, work.output}),
                       backward_launch(work, Kept::bits, work.bits, numel, stream));
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto sums = static_cast<Arithmetic<T>*>(workspace);
    const int64_t channels = work.channels.channels;
    int64_t number = 0;
    if (numel) {
      const Parts parts = parts_of(work.channels, numel);
      number = parts.number;
      const bool columns = work.channels.inner == 1 && channels > 1;
      const int64_t side_by_side = columns ? (channels - 1) / warp + 1 : channels;
      const cudaError_t error = launch(columns ? prelu_columns_kernel<T> : prelu_runs_kernel<T>, number * side_by_side,
                                       summing, stream, work, parts, sums);
      if (error != cudaSuccess) return error;
    }
    if (!work.grad_weight || !channels) return cudaSuccess;
    return launch(prelu_total_kernel<T>, (channels - 1) / summing + 1, summing, stream, sums, number, channels,
                  static_cast<T*>(work.grad_weight));
  });
}

}  // namespace relu_ext::cuda
