// The launchers of prelu, and how its sums are divided.
#include <algorithm>
#include <type_traits>

#include "../dispatch.h"
#include "kernels.h"
#include "launch.cuh"
#include "prelu.cuh"

namespace relu_ext::cuda {
namespace {

// float64 needs as many vectors as share a byte of bits.
template <class T>
using PreluTile = Tile<256, sizeof(T) == 8 ? 4 : 2>;

// From so many on a run is long enough for a block of its own, though it does not divide into sectors of 32 bytes.
constexpr int64_t long_run = 32;

bool is_by_channel(const Channels& channels) { return channels.inner >= long_run || channels.channels == 1; }

// Elements of a vector of which none crosses from one column into another.
int lanes_of(const Channels& channels, int most) {
  if (channels.channels == 1) return most;
  const int64_t whole = is_by_channel(channels) ? channels.inner : channels.channels * channels.inner;
  return whole % most == 0 ? most : 1;
}

// A thread's items: up to so many, so that a sum of floats stays short; fewer, where that makes more blocks than run at
// once, but no less than a batch. These depend on the shape alone.
constexpr int64_t most_items = 64;

Sums divided(const Channels& shape, int64_t numel, int lanes) {
  const auto [channels, inner] = shape;
  const bool by_channel = is_by_channel(shape);
  const int64_t run = channels == 1 ? (numel - 1) / lanes + 1 : std::max<int64_t>(inner / lanes, 1);
  const int64_t rows = channels == 1 ? 1 : numel / channels / inner;
  const int64_t columns = by_channel ? channels : channels * inner / lanes, items = by_channel ? rows * run : rows;
  int across = 1;
  while (!by_channel && across < warp && across < columns) across *= 2;
  const int64_t each = std::clamp(columns * items / (blocks_at_once * Sums::threads), int64_t(Sums::batch), most_items);
  const int64_t parts = (items - 1) / (each * Sums::threads / across) + 1;
  return {Divisor(channels),       Divisor(inner), Divisor(run), Divisor((columns - 1) / across + 1), columns, items,
          (items - 1) / parts + 1, across};
}
int64_t parts_of(const Sums& sums) { return (sums.items - 1) / sums.part + 1; }

// The neighbours whose sums are of one channel.
int64_t neighbours(const Channels& channels) { return is_by_channel(channels) ? 1 : channels.inner; }

template <class T>
Sums divided(const PreluBackward& work, int64_t numel) {
  return divided(work.channels, numel, lanes_of(work.channels, Vector<T>::lanes));
}

template <class Work>
bool is_one(const Work& work, int lanes) {
  return work.channels.channels == 1 || work.channels.inner % lanes == 0;
}

// body(T{}, slopes, aligned).
template <class Work, class Body>
cudaError_t with_slopes(const Work& work, bool is_aligned, Body body) {
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int lanes = Vector<T>::lanes;
    const int64_t channels = work.channels.channels, inner = work.channels.inner;
    const auto run = [&](auto spread, auto aligned) {
      return body(
          element,
          Slopes<T, decltype(spread)::value>{Divisor(channels), Divisor(inner), static_cast<const T*>(work.weight)},
          aligned);
    };
    using Any = std::integral_constant<Spread, Spread::any>;
    if (!is_aligned) return run(Any{}, std::false_type{});
    if (is_one(work, lanes)) return run(std::integral_constant<Spread, Spread::one>{}, std::true_type{});
    if (inner == 1 && channels % lanes == 0 && are_aligned({work.weight}))
      return run(std::integral_constant<Spread, Spread::consecutive>{}, std::true_type{});
    return run(Any{}, std::true_type{});
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

template <bool by_channel, class T>
cudaError_t backward_with_sums(const PreluBackward& work, int64_t numel, const Sums& sums, Arithmetic<T>* workspace,
                               cudaStream_t stream) {
  constexpr int most = Vector<T>::lanes;
  const bool aligned = are_aligned({work.grad, work.input, work.output});
  const auto kernel = lanes_of(work.channels, most) == 1 ? prelu_backward_kernel<by_channel, T, 1, false>
                      : aligned                          ? prelu_backward_kernel<by_channel, T, most, true>
                                                         : prelu_backward_kernel<by_channel, T, most, false>;
  return launch(kernel, sums.groups.value * parts_of(sums), Sums::threads, stream, sums,
                static_cast<const T*>(work.weight), static_cast<const T*>(work.grad), static_cast<const T*>(work.input),
                static_cast<T*>(work.output), workspace, numel);
}

template <class T>
cudaError_t join_sums(const PreluBackward& work, int64_t parts, const Arithmetic<T>* workspace, cudaStream_t stream) {
  constexpr int channels_a_block = Sums::threads / warp;
  return launch(prelu_join_kernel<T>, (work.channels.channels - 1) / channels_a_block + 1, Sums::threads, stream,
                workspace, static_cast<T*>(work.grad_weight), work.channels.channels,
                Divisor(neighbours(work.channels)), parts);
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
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    return parts_of(divided<T>(work, numel)) * work.channels.channels * neighbours(work.channels) *
           int64_t(sizeof(Arithmetic<T>));
  });
}

cudaError_t prelu_backward(const PreluBackward& work, int64_t numel, void* workspace, cudaStream_t stream) {
  if (work.bits && numel > 0) return backward_from_bits(work, numel, stream);
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto parts = static_cast<Arithmetic<T>*>(work.grad_weight ? workspace : nullptr);
    if (numel == 0) return work.grad_weight ? join_sums<T>(work, 0, parts, stream) : cudaSuccess;
    const Sums sums = divided<T>(work, numel);
    const auto run = is_by_channel(work.channels) ? backward_with_sums<true, T> : backward_with_sums<false, T>;
    const cudaError_t error = run(work, numel, sums, parts, stream);
    return error || !work.grad_weight ? error : join_sums<T>(work, parts_of(sums), parts, stream);
  });
}

}  // namespace relu_ext::cuda
