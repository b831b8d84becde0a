// Memory between pages that trap.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <vector>

namespace relu_ext {

enum class Place { before_a_trap, behind_a_trap };

// So many elements of 0, all bits, next to a page that traps.
template <class T>
class Guarded {
  const size_t page_ = size_t(sysconf(_SC_PAGESIZE));
  const size_t size_, own_;  // elements; bytes of the pages that they are in
  char* const pages_;
  T* const elements_;

 public:
  Guarded(int64_t numel, Place place)
      : size_(size_t(numel)),
        own_((size_ * sizeof(T) + page_ - 1) / page_ * page_),
        pages_(static_cast<char*>(
            mmap(nullptr, own_ + 2 * page_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0))),
        elements_(
            reinterpret_cast<T*>(pages_ + page_ + (place == Place::before_a_trap ? own_ - size_ * sizeof(T) : 0))) {
    // qemu refuses to protect nothing.
    if (pages_ == MAP_FAILED || (own_ && mprotect(pages_ + page_, own_, PROT_READ | PROT_WRITE))) std::abort();
  }
  ~Guarded() { munmap(pages_, own_ + 2 * page_); }
  Guarded(const Guarded&) = delete;

  T* data() { return elements_; }
  size_t size() const { return size_; }
};

}  // namespace relu_ext
