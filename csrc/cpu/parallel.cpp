#include "parallel.h"

#include <ATen/Parallel.h>

#include <algorithm>

#ifndef _OPENMP
#error "at::parallel_for is inline: without -fopenmp it silently runs on one thread"
#endif

namespace relu_ext::cpu {
namespace {

// A thread's smallest share, in elements: torch's own for elementwise operations. From two shares on, two threads take
// less time than one (benchmarks/run.py --sizes 65536 131072, --threads 1 against 2, on 2 cores of an EPYC 7003);
// parallel_for would divide anything above one share, so it is not asked below two.
constexpr int64_t grain = 32768;

template <class Work>
void parallel(void (*run)(const Work&, int64_t, int64_t), const Work& work, int64_t numel) {
  if (numel < 2 * grain) return run(work, 0, numel);
  const int64_t blocks = (numel - 1) / alignment + 1;
  at::parallel_for(0, blocks, grain / alignment,
                   [&](int64_t begin, int64_t end) { run(work, begin * alignment, std::min(end * alignment, numel)); });
}

}  // namespace

void parallel_forward(const Forward& work, int64_t numel) { parallel(forward, work, numel); }
void parallel_backward(const Backward& work, int64_t numel) { parallel(backward, work, numel); }

}  // namespace relu_ext::cpu
