// What launchers of work by channel need: how its vectors lie, and how its sums are divided.
#pragma once
#include <algorithm>
#include <type_traits>

#include "launch.cuh"
#include "sums.cuh"

namespace relu_ext::cuda {

// body(spread, aligned). is_aligned: elements are at multiples of 16 bytes; values_are: those of the channels.
template <class Body>
cudaError_t with_spread(const Channels& channels, int lanes, bool is_aligned, bool values_are, Body body) {
  using Any = std::integral_constant<Spread, Spread::any>;
  if (!is_aligned) return body(Any{}, std::false_type{});
  if (channels.channels == 1 || channels.inner % lanes == 0)
    return body(std::integral_constant<Spread, Spread::one>{}, std::true_type{});
  if (channels.inner == 1 && channels.channels % lanes == 0 && values_are)
    return body(std::integral_constant<Spread, Spread::consecutive>{}, std::true_type{});
  return body(Any{}, std::true_type{});
}

template <Spread spread>
ByChannel<spread> by_channel(const Channels& channels) {
  return {Divisor(channels.channels), Divisor(channels.inner)};
}

// From so many on a run is long enough for a block of its own, though it does not divide into sectors of 32 bytes.
constexpr int64_t long_run = 32;

inline bool is_by_channel(const Channels& channels) { return channels.inner >= long_run || channels.channels == 1; }

// Elements of a vector of which none crosses from one column into another.
inline int lanes_of(const Channels& channels, int most) {
  if (channels.channels == 1) return most;
  const int64_t whole = is_by_channel(channels) ? channels.inner : channels.channels * channels.inner;
  return whole % most == 0 ? most : 1;
}

// A thread's items: up to so many, so that a sum of floats stays short; fewer, where that makes more blocks than run at
// once, but no less than so many. These depend on the shape alone.
constexpr int64_t most_items = 64, least_items = 4;

inline Sums divided(const Channels& shape, int64_t numel, int lanes) {
  const auto [channels, inner] = shape;
  const bool by_channel = is_by_channel(shape);
  const int64_t run = channels == 1 ? (numel - 1) / lanes + 1 : std::max<int64_t>(inner / lanes, 1);
  const int64_t rows = channels == 1 ? 1 : numel / channels / inner;
  const int64_t columns = by_channel ? channels : channels * inner / lanes, items = by_channel ? rows * run : rows;
  int across = 1;
  while (!by_channel && across < warp && across < columns) across *= 2;
  const int64_t each = std::clamp(columns * items / (blocks_at_once * Sums::threads), least_items, most_items);
  const int64_t wanted = (items - 1) / (each * Sums::threads / across) + 1, part = (items - 1) / wanted + 1;
  return {
      Divisor(channels),      Divisor(inner), Divisor(run), Divisor((columns - 1) / across + 1), columns, items, part,
      (items - 1) / part + 1, across};
}
template <class T>
Sums divided(const Channels& channels, int64_t numel) {
  return divided(channels, numel, lanes_of(channels, Vector<T>::lanes));
}

// The neighbours whose sums are of one channel.
inline int64_t neighbours(const Channels& channels) { return is_by_channel(channels) ? 1 : channels.inner; }

// Bytes for the parts of so many sums a channel; numel is not 0.
template <class T>
int64_t workspace_of(const Channels& channels, int64_t numel, int sums) {
  return sums * divided<T>(channels, numel).parts * channels.channels * neighbours(channels) *
         int64_t(sizeof(Arithmetic<T>));
}

// with_work(aligned, body) calls body with a work of sums_kernel. workspace may be null: then there are no sums.
template <class T, class WithWork>
cudaError_t launch_sums(const Channels& channels, int64_t numel, bool is_aligned, WithWork with_work,
                        Arithmetic<T>* workspace, cudaStream_t stream) {
  const Sums sums = divided<T>(channels, numel);
  const auto run = [&](auto by_channel, auto lanes, auto aligned) {
    return with_work(aligned, [&](auto work) {
      const auto kernel =
          sums_kernel<decltype(by_channel)::value, T, decltype(lanes)::value, decltype(aligned)::value, decltype(work)>;
      return launch(kernel, sums.groups.value * sums.parts, Sums::threads, stream, sums, work, workspace, numel);
    });
  };
  const auto run_lanes = [&](auto by_channel) {
    constexpr int most = Vector<T>::lanes;
    if (lanes_of(channels, most) == 1) return run(by_channel, std::integral_constant<int, 1>{}, std::false_type{});
    if (is_aligned) return run(by_channel, std::integral_constant<int, most>{}, std::true_type{});
    return run(by_channel, std::integral_constant<int, most>{}, std::false_type{});
  };
  return is_by_channel(channels) ? run_lanes(std::true_type{}) : run_lanes(std::false_type{});
}

// Of what launch_sums left in the workspace; zeros where there are no elements.
template <class T>
cudaError_t join_sums(const Channels& channels, int64_t numel, const Gradients<T>& gradients,
                      const Arithmetic<T>* workspace, cudaStream_t stream) {
  constexpr int channels_a_block = Sums::threads / warp;
  const int64_t sums = gradients.of_sum[1] ? 2 : 1, parts = numel ? divided<T>(channels, numel).parts : 0;
  return launch(join_kernel<T>, (sums * channels.channels - 1) / channels_a_block + 1, Sums::threads, stream, workspace,
                gradients, channels.channels, Divisor(std::max<int64_t>(neighbours(channels), 1)), parts);
}

}  // namespace relu_ext::cuda
