// The CPU for the torch-facing code: its memory, and the kernels on all threads of torch's pool.
#include "../backend.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

#ifndef _OPENMP
#error "at::parallel_for is inline: without -fopenmp it silently runs on one thread"
#endif

namespace relu_ext::cpu {
namespace {

at::Tensor expecting_writes(at::Tensor output) {
  expect_writes(output.mutable_data_ptr(), int64_t(output.nbytes()));
  return output;
}

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  return expecting_writes(at::detail::empty_cpu(sizes, dtype, /*pin_memory=*/false, format));
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef stride, at::ScalarType dtype) {
  return expecting_writes(at::detail::empty_strided_cpu(sizes, stride, dtype));
}

// A thread's smallest share, in elements: torch's own for elementwise operations. From two shares on, two threads take
// less time than one (benchmarks/run.py --sizes 65536 131072, --threads 1 against 2, on 2 cores of an EPYC 7003);
// parallel_for would divide anything above one share, so it is not asked below two.
constexpr int64_t grain = 32768;

// body(begin, end) for shares of no less than `smallest` elements.
template <class Body>
void in_shares(int64_t numel, int64_t smallest, Body body) {
  if (numel < 2 * smallest) return body(0, numel);
  const int64_t blocks = (numel - 1) / alignment + 1;
  at::parallel_for(0, blocks, smallest / alignment,
                   [&](int64_t begin, int64_t end) { body(begin * alignment, std::min(end * alignment, numel)); });
}

template <class Work, void (*run)(const Work&, int64_t, int64_t)>
void parallel(const Work& work, int64_t numel) {
  in_shares(numel, grain, [&](int64_t begin, int64_t end) { run(work, begin, end); });
}

// Sums over channels are made in parts that depend on the shape alone, of which there are no more than this.
constexpr int64_t most_parts = 64;

// run(sums, begin, end) for each part, with `count` sums of its own; the parts' sums are joined in a fixed tree.
template <class Run>
std::vector<double> summed(int64_t numel, int64_t channels, int64_t count, Run run) {
  const int64_t smallest = std::max({grain, 8 * channels, numel / most_parts});
  const int64_t part = (smallest / alignment + 1) * alignment;
  const int64_t parts = std::max<int64_t>((numel + part - 1) / part, 1);
  std::vector<double> sums(size_t(parts * count));
  const auto of = [&](int64_t i) { return sums.data() + i * count; };
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(of(i), i * part, std::min((i + 1) * part, numel));
  });
  for (int64_t step = 1; step < parts; step *= 2)
    for (int64_t i = 0; i + step < parts; i += 2 * step)
      std::transform(of(i), of(i) + count, of(i + step), of(i), std::plus<>());
  return sums;
}

void prelu_backward(const PreluBackward& work, int64_t numel) {
  const int64_t channels = work.channels.channels, count = work.grad_weight ? channels : 0;
  const auto sums = summed(numel, channels, count, [&](double* sums, int64_t begin, int64_t end) {
    cpu::prelu_backward(work, count ? sums : nullptr, begin, end);
  });
  if (count) round_sums(work.dtype, sums.data(), channels, work.grad_weight);
}

void fused_backward(const FusedBackward& work, int64_t numel) {
  const int64_t channels = work.channels.channels;
  const auto wanted = {work.grad_scale, work.grad_shift};
  const int64_t count = channels * std::count_if(wanted.begin(), wanted.end(), [](void* sum) { return sum; });
  const auto sums = summed(numel, channels, count, [&](double* sums, int64_t begin, int64_t end) {
    cpu::fused_backward(work, sums, begin, end);
  });
  const double* next = sums.data();
  for (void* gradient : wanted)
    if (gradient) round_sums(work.dtype, std::exchange(next, next + channels), channels, gradient);
}

// A thread's smallest share of bits that are counted: as many bytes as grain has of float32.
constexpr int64_t grain_of_bits = 32 * grain;

void count(const Count& work, int64_t numel) {
  const auto channels = size_t(work.channels.channels);
  std::vector<int64_t> counts(channels);
  std::mutex mutex;
  in_shares(numel, grain_of_bits, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> own(channels);
    cpu::count(work, own.data(), begin, end);
    const std::lock_guard<std::mutex> lock(mutex);
    std::transform(own.begin(), own.end(), counts.begin(), counts.begin(), std::plus<>());
  });
  for (size_t channel = 0; channel < channels; ++channel) {
    work.kept[channel] += counts[channel];
    if (counts[channel]) work.last[channel] = work.step;
  }
}

void find_nonfinite(const NonFinite& work, int64_t numel) {
  std::atomic<bool> finite = true;
  in_shares(numel, grain, [&](int64_t begin, int64_t end) {
    if (!cpu::is_finite(work, begin, end)) finite = false;
  });
  if (!finite && *work.first == 0) *work.first = work.step;
}

// A call's own seed; torch.manual_seed makes them the same again.
Stream next_stream(const std::optional<at::Generator>& generator) {
  auto* const own = at::get_generator_or_default<at::CPUGeneratorImpl>(generator, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(own->mutex_);
  return {own->random64(), 0, nullptr, nullptr};
}

}  // namespace

const Backend backend{empty,
                      empty_strided,
                      parallel<Forward, forward>,
                      parallel<Backward, backward>,
                      parallel<Gated, gated>,
                      parallel<GatedBackward, gated_backward>,
                      parallel<Prelu, prelu>,
                      prelu_backward,
                      parallel<Fused, fused>,
                      fused_backward,
                      count,
                      find_nonfinite,
                      next_stream};

}  // namespace relu_ext::cpu
