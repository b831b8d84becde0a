// Every CPU kernel on several threads at once, each with its share of the same arrays, as csrc/cpu/backend.cpp has
// them. For ThreadSanitizer, which is to find nothing where shares are multiples of cpu::alignment, and bytes of bits
// with two writers where they are not multiples of 8.
//
// threads ELEMENTS: of a share. Prints how many kernels ran.
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "dispatch.h"
#include "works.h"

namespace {

using namespace relu_ext;

constexpr int workers = 4;
constexpr int64_t channels = 5, rest = 13;  // elements that the last one has more

// The arrays of elements `begin` and after; sums are of a worker alone.
template <class T>
Arrays from(const Arrays& all, int64_t begin, double* totals, int64_t* counts) {
  const auto read = [=](const void* array) { return static_cast<const T*>(array) + begin; };
  const auto written = [=](void* array) { return static_cast<T*>(array) + begin; };
  return {
      read(all.input),         read(all.other),         read(all.grad),       all.scale, all.shift, written(all.output),
      written(all.grad_input), written(all.grad_other), all.bits + begin / 8, totals,    counts};
}

template <class T>
int every_kernel(Dtype dtype, int64_t share, int64_t inner) {
  const int64_t numel = workers * share + rest;
  const std::vector<T> read(size_t(numel), narrow<T>(Arithmetic<T>(0.75)));
  std::vector<T> output(read), grad_input(read), grad_other(read);
  std::vector<uint8_t> bits(size_t(bytes_of_bits(numel)));
  const Arrays all{read.data(),       read.data(),       read.data(), read.data(), read.data(), output.data(),
                   grad_input.data(), grad_other.data(), bits.data(), nullptr,     nullptr};
  int count = 0;
  for_works([&](const char*, auto run) {
    for (const Step step : {Step::forward, Step::forward_with_bits, Step::backward}) {
      std::vector<std::thread> threads;
      for (int worker = 0; worker < workers; ++worker)
        threads.emplace_back([&, worker] {
          double totals[2 * channels] = {};
          int64_t counts[channels] = {};
          const int64_t own = share + (worker + 1 == workers ? rest : 0);
          run(step, dtype, own, Channels{channels, inner}, from<T>(all, worker * share, totals, counts));
        });
      for (std::thread& thread : threads) thread.join();
      ++count;
    }
  });
  return count;
}

}  // namespace

int main(int, char** words) {
  const int64_t share = std::atoll(words[1]);
  int count = 0;
  for (const Isa isa : compiled_isas) {
    if (isa > best_isa()) break;
    set_isa(name(isa));
    for (const auto dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
      for (const int64_t inner : {int64_t(1), int64_t(130)})
        with_dtype(dtype, [&](auto element) { count += every_kernel<decltype(element)>(dtype, share, inner); });
  }
  std::printf("%d kernels on %d threads\n", count, workers);
}
