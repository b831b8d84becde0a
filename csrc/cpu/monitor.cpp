// Bits counted by channel, and numbers that are not finite.
#include <numeric>
#include <utility>
#include <vector>

#include "../dispatch.h"
#include "channels.h"

namespace relu_ext::cpu {
namespace {

// Runs of so many elements of a channel are counted by the word, shorter ones by counters for neighbouring elements.
constexpr int64_t long_run = 32;

// Bits first to first + count - 1, no more than 64, as the lowest of a word; no other byte is read.
RELU_EXT_INLINE uint64_t word_at(const uint8_t* bits, int64_t first, int64_t count) {
  const int shift = int(first % 8);
  const int64_t bytes = (shift + count + 7) / 8;
  uint64_t word = 0;
  std::memcpy(&word, bits + first / 8, size_t(std::min<int64_t>(bytes, 8)));
  word >>= shift;
  if (bytes > 8) word |= uint64_t(bits[first / 8 + 8]) << (64 - shift);
  return count < 64 ? word & ((uint64_t(1) << count) - 1) : word;
}

void count_runs(const Count& work, int64_t* counts, int64_t begin, int64_t end) {
  vectorised([=, &work](auto) RELU_EXT_INLINE_LAMBDA {
    for_runs(work.channels, begin, end, [=, &work](const Run& run, int64_t i, int64_t length) RELU_EXT_INLINE_LAMBDA {
      for_blocks<64>(i, i + length, [=, &work](int64_t first, int count) RELU_EXT_INLINE_LAMBDA {
        counts[run.channel] += __builtin_popcountll(word_at(work.bits, first, count));
      });
    });
  });
}

// counters[i] += bit begin + i; up to a multiple of 64, for which spare bits are 0.
RELU_EXT_INLINE void add_bits(const uint8_t* bits, uint16_t* counters, int64_t begin, int64_t end) {
  for_blocks<64>(begin, end, [=](int64_t i, int count) RELU_EXT_INLINE_LAMBDA {
    uint16_t words[4] = {};
    std::memcpy(words, bits + i / 8, size_t(count + 7) / 8);
    uint16_t* const own = counters + (i - begin);
    for_vectors<16>(64, [&](int first, int) RELU_EXT_INLINE_LAMBDA {
      RELU_EXT_LANES
      for (int j = 0; j < 16; ++j) {
        const bool one = (words[first / 16] & single<uint16_t>.bit[j]) != 0;
        own[first + j] = uint16_t(own[first + j] + one);
      }
    });
  });
}

// As many counters as come to be of the same channels again at a multiple of 64 elements.
void count_columns(const Count& work, int64_t* counts, int64_t begin, int64_t end) {
  const Channels& shape = work.channels;
  const int64_t repeating = std::lcm(shape.channels * shape.inner, int64_t(64));
  const int64_t period = std::min(repeating, (end - begin + 63) / 64 * 64);
  std::vector<uint16_t> counters(size_t(period), 0);
  const int64_t most = UINT16_MAX * period;  // elements
  for (int64_t first = begin; first < end; first += most) {
    const int64_t last = std::min(first + most, end);
    vectorised([=, bits = work.bits, counters = counters.data()](auto) RELU_EXT_INLINE_LAMBDA {
      for (int64_t row = first; row < last; row += period) add_bits(bits, counters, row, std::min(row + period, last));
    });
    for_runs(shape, begin, begin + period, [&](const Run& run, int64_t i, int64_t length) {
      for (int64_t k = 0; k < length; ++k)
        counts[run.channel + (shape.inner == 1 ? k : 0)] += std::exchange(counters[size_t(i - begin + k)], uint16_t(0));
    });
  }
}

}  // namespace

void count(const Count& work, int64_t* counts, int64_t begin, int64_t end) {
  return (work.channels.inner < long_run ? count_columns : count_runs)(work, counts, begin, end);
}

bool is_finite(const NonFinite& work, int64_t begin, int64_t end) {
  return with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    const auto input = static_cast<const T*>(work.input);
    Word<T> found = 0;
    vectorised([=, &found](auto) RELU_EXT_INLINE_LAMBDA {
      Word<T> any = 0;
      RELU_EXT_LANES
      for (int64_t i = begin; i < end; ++i) any |= relu_ext::is_finite(input[i]) ? Word<T>(0) : Word<T>(-1);
      found = any;
    });
    return found == 0;
  });
}

}  // namespace relu_ext::cpu
