// Fresh memory: what a large output costs beyond its bytes.
#include "../kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace relu_ext::cpu {
namespace {

// From this size on glibc maps fresh memory for every allocation (DEFAULT_MMAP_THRESHOLD_MAX), and a page fault for
// each 4 KiB of it takes longer than the kernel's own work. Below, memory is used again, and the call would be for
// nothing.
[[maybe_unused]] constexpr int64_t always_fresh = int64_t(32) << 20;
[[maybe_unused]] constexpr uintptr_t page = 4096;

}  // namespace

void expect_writes([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(MADV_HUGEPAGE)
  if (bytes < always_fresh) return;
  const auto begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
  const auto end = (reinterpret_cast<uintptr_t>(memory) + uintptr_t(bytes)) / page * page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a wish: failure changes nothing
#endif
}

}  // namespace relu_ext::cpu
