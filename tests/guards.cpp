// To be preloaded: torch's CPU tensors, whose memory comes from posix_memalign, each alone between pages that trap.
//
// A tensor ends where a page does that may not be touched, or begins where one ends. What is read or written between it
// and the other end of its own pages is not seen, so both places are needed. Tensors that end at a page are aligned to
// their elements alone, not to 64 bytes.
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>

extern "C" {
// glibc's own.
void* __libc_memalign(size_t alignment, size_t size);
void __libc_free(void* memory);

// Set by the program when it has started.
int guard_place = 0;
}

namespace {

enum { nowhere, traps_behind, traps_before };
constexpr size_t page = 4096, most_pages = 4096, all = size_t(1) << 36;

// Addresses alone, until a block has some of them; how many pages the block has that begins in a page; and the blocks
// of so many pages that have been freed, each of which begins with a pointer to the next.
char* addresses;
size_t taken = page;
uint16_t pages_at[all / page];
void* freed[most_pages + 1];

std::atomic_flag busy = ATOMIC_FLAG_INIT;
struct Lock {
  Lock() {
    while (busy.test_and_set(std::memory_order_acquire)) continue;
  }
  ~Lock() { busy.clear(std::memory_order_release); }
};

__attribute__((constructor)) void reserve() {
  void* const reserved = mmap(nullptr, all, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (reserved == MAP_FAILED) __builtin_trap();
  addresses = static_cast<char*>(reserved);
}

char* block_of(size_t pages) {
  const Lock lock;
  if (void* const again = freed[pages]) {
    freed[pages] = *static_cast<void**>(again);
    return static_cast<char*>(again);
  }
  char* const block = addresses + taken;
  if (taken + (pages + 1) * page > all || mprotect(block, pages * page, PROT_READ | PROT_WRITE)) return nullptr;
  pages_at[taken / page] = uint16_t(pages);
  taken += (pages + 1) * page;  // the last one traps
  return block;
}

}  // namespace

extern "C" int posix_memalign(void** memory, size_t alignment, size_t size) noexcept {
  const size_t pages = (size + page - 1) / page;
  if (guard_place == nowhere || pages == 0 || pages > most_pages)
    return (*memory = __libc_memalign(alignment, size)) ? 0 : ENOMEM;
  char* const block = block_of(pages);
  *memory = guard_place == traps_behind ? block + pages * page - size : block;
  return block ? 0 : ENOMEM;
}

extern "C" void free(void* memory) noexcept {
  const size_t at = size_t(static_cast<char*>(memory) - addresses);
  if (!memory || at >= all) return __libc_free(memory);
  const Lock lock;
  void** const block = reinterpret_cast<void**>(addresses + at / page * page);
  void*& last = freed[pages_at[at / page]];
  *block = last;
  last = block;
}
