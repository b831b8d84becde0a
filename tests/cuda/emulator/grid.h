// Runs grids on the CPU: a fiber for each thread of a block, one block after another, one launch at a time.
//
// A thread runs until it must wait for others. EMULATOR_ORDER says who is next: 0 (the default) the first of those that
// can run, 1 the last, any other number a random one, seeded with it; the same for blocks. A kernel whose result
// depends on it lacks a barrier. What is undefined on a GPU ends the run with a message: a barrier or a warp's exchange
// that some thread does not reach, an access that is not aligned.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <random>
#include <vector>

#include "cuda_runtime_api.h"
#include "fiber.h"

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulator {

constexpr unsigned warp = 32;
constexpr unsigned max_threads = 1024;

[[noreturn]] inline void fail(const char* what, unsigned line = 0) {
  std::fprintf(stderr, "CUDA emulator: %s (thread %u,%u,%u of block %u,%u,%u", what, threadIdx.x, threadIdx.y,
               threadIdx.z, blockIdx.x, blockIdx.y, blockIdx.z);
  std::fprintf(stderr, line ? ", line %u)\n" : ")\n", line);
  std::abort();
}

// The GPU traps where the CPU does not care. The address passes through assembly, because a compiler may take for
// granted that a T* is aligned.
template <class T>
T* aligned(T* pointer) {
  auto address = reinterpret_cast<uintptr_t>(pointer);
  __asm__("" : "+r"(address));
  if (address % alignof(T)) fail("a misaligned access");
  return pointer;
}

// What tests look at: those of this thread.
struct Launch {
  cudaStream_t stream;
  dim3 grid, block;
};
inline thread_local int64_t launches;  // so far
inline thread_local Launch last_launch;
// The only blocks to be run, by their index in the grid: for grids that are too large for a CPU.
inline std::optional<std::vector<uint64_t>> only_blocks;

enum class State { ready, at_barrier, in_exchange, done };

// Of a warp: each lane gives a value and gets that of another, or one bit of each.
struct Exchange {
  static constexpr unsigned every = ~0u;  // as source: the lowest bits of all values, a bit a lane
  unsigned mask, source, line;
  uint64_t value;
};

struct Thread {
  State state;
  Fiber* fiber;
  uint3 index;
  unsigned line;  // of the barrier
  Exchange exchange;
};

inline std::mutex mutex;
inline std::function<void()> body;
inline std::vector<Thread> threads;  // of the block
inline Thread* current;
inline std::vector<std::unique_ptr<Fiber>> fibers;
inline std::vector<Fiber*> idle;

inline void run_current() {
  body();
  current->state = State::done;
  idle.push_back(current->fiber);
}

inline Fiber* idle_fiber() {
  if (idle.empty()) idle.push_back(fibers.emplace_back(std::make_unique<Fiber>(run_current)).get());
  Fiber* const fiber = idle.back();
  idle.pop_back();
  return fiber;
}

inline void resume(Thread& thread) {
  if (!thread.fiber) thread.fiber = idle_fiber();
  current = &thread;
  threadIdx = thread.index;
  thread.fiber->resume();
}

inline void barrier(unsigned line) {
  current->state = State::at_barrier;
  current->line = line;
  current->fiber->pause();
}

// The last lane to come serves all.
inline void complete(Thread* lanes, unsigned mask) {
  uint64_t ballot = 0;
  for (unsigned lane = 0; lane < warp; ++lane)
    if (mask >> lane & 1) ballot |= (lanes[lane].exchange.value & 1) << lane;
  uint64_t received[warp];
  for (unsigned lane = 0; lane < warp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    const unsigned source = lanes[lane].exchange.source;
    if (source != Exchange::every && !(mask >> source & 1)) fail("a value from a lane outside of the mask");
    received[lane] = source == Exchange::every ? ballot : lanes[source].exchange.value;
  }
  for (unsigned lane = 0; lane < warp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    lanes[lane].exchange.value = received[lane];
    lanes[lane].state = State::ready;
  }
}

inline unsigned lane() { return unsigned(current - threads.data()) % warp; }

inline uint64_t exchange(unsigned mask, unsigned source, uint64_t value, unsigned line) {
  Thread* const self = current;
  Thread* const lanes = self - lane();
  if (!(mask >> lane() & 1)) fail("a lane is not in its own mask", line);
  self->exchange = {mask, source, line, value};
  self->state = State::in_exchange;
  bool complete_now = true;
  for (unsigned other = 0; other < warp; ++other) {
    if (!(mask >> other & 1)) continue;
    if (lanes + other >= threads.data() + threads.size()) fail("the mask names lanes that the block has not", line);
    const Thread& thread = lanes[other];
    if (thread.state != State::in_exchange)
      complete_now = false;
    else if (thread.exchange.mask != mask || thread.exchange.line != line)
      fail("lanes of one warp in different exchanges", line);
  }
  if (complete_now)
    complete(lanes, mask);
  else
    self->fiber->pause();
  return self->exchange.value;
}

// Of threads in a block, or blocks in a grid.
class Order {
 public:
  explicit Order(unsigned seed) : seed_(seed), random_(seed) {}

  bool is_random() const { return seed_ > 1; }

  template <class Number>
  void arrange(std::vector<Number>& numbers) {
    if (seed_ == 1) std::reverse(numbers.begin(), numbers.end());
    if (is_random()) std::shuffle(numbers.begin(), numbers.end(), random_);
  }

 private:
  unsigned seed_;
  std::mt19937 random_;
};

template <class Number>
std::vector<Number> count_to(Number n) {
  std::vector<Number> numbers(n);
  std::iota(numbers.begin(), numbers.end(), Number(0));
  return numbers;
}

// Threads between two barriers: each runs as far as it can, warp by warp unless the order is random.
inline void run_to_barrier(const std::vector<unsigned>& turns, bool by_warp) {
  const size_t group = by_warp ? warp : turns.size();
  for (size_t first = 0; first < turns.size(); first += group) {
    for (bool moved = true; moved;) {
      moved = false;
      for (size_t i = first; i < std::min(first + group, turns.size()); ++i) {
        if (threads[turns[i]].state != State::ready) continue;
        resume(threads[turns[i]]);
        moved = true;
      }
    }
  }
}

// Lets the threads go on if all are at one barrier; true: all are done.
inline bool pass_barrier() {
  const State state = threads[0].state;
  for (Thread& thread : threads) {
    threadIdx = thread.index;
    if (thread.state == State::in_exchange)
      fail("an exchange that not every lane of the mask reached", thread.exchange.line);
    if (thread.state != state || (state == State::at_barrier && thread.line != threads[0].line))
      fail("a barrier that not every thread of the block reached",
           thread.state == State::at_barrier ? thread.line : threads[0].line);
  }
  if (state == State::done) return true;
  for (Thread& thread : threads) thread.state = State::ready;
  return false;
}

inline void run_block(Order& order) {
  threads.resize(blockDim.x * blockDim.y * blockDim.z);
  for (unsigned i = 0; i < threads.size(); ++i)
    threads[i] = {
        State::ready, nullptr, {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y}, 0, {}};
  std::vector<unsigned> turns = count_to(unsigned(threads.size()));
  order.arrange(turns);
  do run_to_barrier(turns, !order.is_random());
  while (!pass_barrier());
}

inline void run_grid() {
  const char* const seed = std::getenv("EMULATOR_ORDER");
  Order order(seed ? unsigned(std::strtoul(seed, nullptr, 10)) : 0);
  const uint64_t count = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  auto blocks = only_blocks ? *only_blocks : count_to(count);
  order.arrange(blocks);
  for (const uint64_t block : blocks) {
    if (block >= count) fail("only_blocks names a block that the grid has not");
    blockIdx = {unsigned(block % gridDim.x), unsigned(block / gridDim.x % gridDim.y),
                unsigned(block / gridDim.x / gridDim.y)};
    run_block(order);
  }
}

// The limits of every architecture since compute capability 3.0 ("Technical Specifications per Compute Capability" of
// the CUDA C++ Programming Guide); shared memory beyond 48 KiB must be asked for by an attribute.
inline cudaError_t check_launch(dim3 grid, dim3 block, size_t shared) {
  const uint64_t size = uint64_t(block.x) * block.y * block.z;
  if (size == 0 || size > max_threads || block.z > 64) return cudaErrorInvalidConfiguration;
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return cudaErrorInvalidConfiguration;
  return shared > 48 * 1024 ? cudaErrorInvalidValue : cudaSuccess;
}

inline void run(std::function<void()> kernel, dim3 grid, dim3 block, cudaStream_t stream) {
  const std::lock_guard<std::mutex> lock(mutex);
  ++launches;
  last_launch = {stream, grid, block};
  body = std::move(kernel);
  gridDim = grid;
  blockDim = block;
  run_grid();
}

}  // namespace emulator
