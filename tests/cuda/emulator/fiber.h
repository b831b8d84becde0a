// A call with a stack of its own, which can stop anywhere and go on later.
#pragma once
#include <ucontext.h>

#include <cstddef>
#include <memory>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulator {

// Runs work(), again and again: each resume() goes on where the last pause() was, pause() returns to resume(). GCC's
// built-in jumps, because swapcontext enters the kernel on every switch; it is used only to get onto a new stack.
class Fiber {
 public:
  explicit Fiber(void (*work)()) : work_(work) {}
  Fiber(const Fiber&) = delete;

  void resume() {
    if (!stack_) return start();
    announce(&resumer_.fake_stack, stack_.get(), bytes);
    swap(resumer_, fiber_);
    arrived(resumer_.fake_stack);
  }

  // Called on the fiber.
  void pause() {
    announce(&fiber_.fake_stack, resumer_stack_, resumer_bytes_);
    swap(fiber_, resumer_);
    arrived_on_fiber();
  }

 private:
  static constexpr size_t bytes = 128 * 1024;

  struct Place {
    void* jump[5];
    void* fake_stack = nullptr;  // AddressSanitizer's, of the stack that is left
  };

  void start() {
    stack_.reset(new char[bytes]);
    starting() = this;
    ucontext_t fresh, unused;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = stack_.get();
    fresh.uc_stack.ss_size = bytes;
    makecontext(&fresh, entry, 0);
    announce(&resumer_.fake_stack, stack_.get(), bytes);
    if (__builtin_setjmp(resumer_.jump) == 0) swapcontext(&unused, &fresh);
    arrived(resumer_.fake_stack);
  }

  static void entry() {
    Fiber& fiber = *starting();
    fiber.arrived_on_fiber();
    for (;;) {
      fiber.work_();
      fiber.pause();
    }
  }

  static Fiber*& starting() {
    static Fiber* fiber;
    return fiber;
  }

  // AddressSanitizer takes a jump for the end of what is on the stack, unless told that there is none.
  [[gnu::noinline, gnu::no_sanitize_address]] static void swap(Place& from, Place& to) {
    if (__builtin_setjmp(from.jump) == 0) jump(to);
  }
  [[gnu::noinline, gnu::no_sanitize_address, noreturn]] static void jump(Place& to) { __builtin_longjmp(to.jump, 1); }

#ifdef __SANITIZE_ADDRESS__
  static void announce(void** fake_stack, const void* stack, size_t bytes) {
    __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
  }
  static void arrived(void* fake_stack) { __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr); }
  void arrived_on_fiber() { __sanitizer_finish_switch_fiber(fiber_.fake_stack, &resumer_stack_, &resumer_bytes_); }
#else
  static void announce(void**, const void*, size_t) {}
  static void arrived(void*) {}
  void arrived_on_fiber() {}
#endif

  void (*const work_)();
  std::unique_ptr<char[]> stack_;
  Place fiber_, resumer_;
  const void* resumer_stack_ = nullptr;
  size_t resumer_bytes_ = 0;
};

}  // namespace emulator
