// The launchers of what Monitor asks of a layer.
#include <algorithm>
#include <numeric>

#include "../dispatch.h"
#include "kernels.h"
#include "launch.cuh"
#include "monitor.cuh"

namespace relu_ext::cuda {
namespace {

// Reckoned, not yet measured, as are the numbers below. Words of a run that one lane counts at most, so that a long run
// has many warps; pieces for each group of lanes and words for each thread, so that few atomic sums are left.
constexpr int64_t words_of_lane = 8, pieces_of_group = 8;
constexpr int64_t least_rows = 8, most_rows = 1024, columns_threads = 16384;
constexpr int64_t run_to_count = 32;  // elements

cudaError_t count_runs(const Count& work, int64_t numel, cudaStream_t stream) {
  const auto [channels, inner] = work.channels;
  int across = 1;
  while (across < warp && 32 * across < inner) across *= 2;
  const int64_t piece = std::min(inner, 32 * words_of_lane * across), pieces = (inner - 1) / piece + 1;
  const int64_t of_channel = numel / (channels * inner) * pieces, part = pieces_of_group * warp / across;
  const int64_t parts = (of_channel - 1) / part + 1;
  const CountRuns how{Divisor(channels), Divisor(pieces), inner, piece, of_channel, part, parts, across};
  const int64_t blocks = (channels * parts - 1) / (counting_threads / warp) + 1;
  return launch(count_runs_kernel, blocks, counting_threads, stream, how, work, numel);
}

cudaError_t count_columns(const Count& work, int64_t numel, cudaStream_t stream) {
  const auto [channels, inner] = work.channels;
  const int64_t words = (numel - 1) / 32 + 1, period = std::lcm(channels * inner, int64_t(32)) / 32;
  const int64_t all_rows = (words - 1) / period + 1;
  const int64_t rows = std::clamp(words / columns_threads, least_rows, most_rows), parts = (all_rows - 1) / rows + 1;
  const CountColumns how{Divisor(channels), Divisor(inner), Divisor(period), rows};
  const int64_t blocks = (parts * period - 1) / counting_threads + 1;
  return launch(count_columns_kernel, blocks, counting_threads, stream, how, work, numel);
}

}  // namespace

cudaError_t count(const Count& work, int64_t numel, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return work.channels.inner >= run_to_count ? count_runs(work, numel, stream) : count_columns(work, numel, stream);
}

cudaError_t find_nonfinite(const NonFinite& work, int64_t numel, cudaStream_t stream) {
  if (numel == 0) return cudaSuccess;
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    using Large = Tile<256, 4>;
    using Small = Tile<256, 1>;
    const auto run = [&](auto tile, auto aligned) {
      using Tile = decltype(tile);
      return launch(nonfinite_kernel<T, Tile, decltype(aligned)::value>, blocks<T, Tile>(numel), Tile::threads, stream,
                    static_cast<const T*>(work.input), work.step, work.first, numel);
    };
    if (!are_aligned({work.input})) return run(Small{}, std::false_type{});
    if (numel < blocks_at_once * elements_of<T, Large>) return run(Small{}, std::true_type{});
    return run(Large{}, std::true_type{});
  });
}

}  // namespace relu_ext::cuda
