// Preloaded: one allocation of a tensor's memory, or a large one of operator new, fails when it is told to.
#include <dlfcn.h>

#include <cerrno>
#include <cstdlib>
#include <new>

namespace {

constexpr std::size_t large = 4096;  // bytes: sums over channels, but not PyTorch's own objects
thread_local long before = -1;       // how many succeed until one fails; negative: all do

bool fails() { return before >= 0 && before-- == 0; }

}  // namespace

// Of this thread's allocations from now on the one after `count` others fails.
extern "C" void fail_after(long count) { before = count; }

extern "C" int posix_memalign(void** memory, std::size_t alignment, std::size_t size) {
  static const auto next =
      reinterpret_cast<int (*)(void**, std::size_t, std::size_t)>(dlsym(RTLD_NEXT, "posix_memalign"));
  return fails() ? ENOMEM : next(memory, alignment, size);
}

void* operator new(std::size_t size) {
  void* const memory = size >= large && fails() ? nullptr : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}
