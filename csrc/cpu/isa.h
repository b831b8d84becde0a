// Instruction sets: which this build has, which this CPU has, which one runs.
//
// A loop is written once, as an always_inline lambda, and compiled again inside a function with a target attribute. So
// there are no per-file compiler flags, and no inline function of the standard library is ever compiled for a CPU that
// the program may not run on (one definition rule).
#pragma once
#include <type_traits>

namespace relu_ext {

enum class Isa { portable, avx2, avx512 };

const char* name(Isa);
// Compiled in, ascending; the best of them that this CPU runs.
#if defined(__x86_64__)
constexpr Isa compiled_isas[] = {Isa::portable, Isa::avx2, Isa::avx512};
#else
constexpr Isa compiled_isas[] = {Isa::portable};
#endif
Isa best_isa();

#ifdef __FP_FAST_FMAF
constexpr bool fma_everywhere = true;
#else
constexpr bool fma_everywhere = false;
#endif
template <Isa isa>
constexpr bool has_multiply_add = fma_everywhere || isa != Isa::portable;

// The one in use: best_isa() until set_isa names another. std::invalid_argument for one that is unknown or that this
// CPU lacks.
Isa chosen_isa();
void set_isa(const char* name);

#define RELU_EXT_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__)
template <class Loop>
[[gnu::target("avx2,fma,bmi2,f16c"), gnu::noinline]] void compiled_for_avx2(Loop loop) {
  loop(std::integral_constant<Isa, Isa::avx2>{});
}
template <class Loop>
[[gnu::target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,bmi2,f16c"), gnu::noinline]] void compiled_for_avx512(
    Loop loop) {
  loop(std::integral_constant<Isa, Isa::avx512>{});
}
#endif

// Runs loop(instruction set), a constant, compiled for the chosen one or for `most`, whichever is less.
template <Isa most = Isa::avx512, class Loop>
void vectorised(Loop loop) {
#if defined(__x86_64__)
  if constexpr (most == Isa::avx512)
    if (chosen_isa() == Isa::avx512) return compiled_for_avx512(loop);
  if (chosen_isa() != Isa::portable) return compiled_for_avx2(loop);
#endif
  loop(std::integral_constant<Isa, Isa::portable>{});
}

}  // namespace relu_ext
