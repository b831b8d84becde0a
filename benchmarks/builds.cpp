// What builds.py calls: the kernels of the sources that this is compiled with, timed.
#include <chrono>
#include <cstring>

#include "../tests/portable/works.h"

// Seconds of one call of the kernel, or of `copy`, in so many. Negative: there is no such kernel.
extern "C" [[gnu::visibility("default")]] double seconds(const char* name, int step, int dtype, int64_t numel,
                                                         int64_t channels, int64_t inner,
                                                         const relu_ext::Arrays* arrays, int64_t bytes, int calls) {
  using namespace relu_ext;
  const auto timed = [calls](auto call) {
    const auto start = std::chrono::steady_clock::now();
    for (int i = 0; i < calls; ++i) {
      call();
      asm volatile("" ::: "memory");
    }
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count() / calls;
  };
  if (std::strcmp(name, "copy") == 0) return timed([=] { std::memcpy(arrays->output, arrays->input, size_t(bytes)); });
  double found = -1;
  for_works([&](const char* own, auto run) {
    if (std::strcmp(name, own) == 0)
      found = timed([&] { run(Step(step), Dtype(dtype), numel, Channels{channels, inner}, *arrays); });
  });
  return found;
}
