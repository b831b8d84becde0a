#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

namespace relu_ext {
namespace {

// Only before the first call of a kernel, or in tests: kernels read it without ordering.
std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

std::string names_up_to(Isa last) {
  std::string names;
  for (const Isa isa : compiled_isas)
    if (isa <= last) names += (names.empty() ? "" : ", ") + std::string(name(isa));
  return names;
}

}  // namespace

const char* name(Isa isa) {
  switch (isa) {
    case Isa::portable: return "portable";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "?";
}

Isa best_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2") &&
      __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::portable;
}

Isa chosen_isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(const char* wanted) {
  const auto found = std::find_if(std::begin(compiled_isas), std::end(compiled_isas),
                                  [=](Isa isa) { return std::strcmp(name(isa), wanted) == 0; });
  if (found == std::end(compiled_isas) || *found > best_isa())
    throw std::invalid_argument(
        "relu_ext: the instruction set '" + std::string(wanted) +
        "' (RELU_EXT_ISA) is not one that this build and this CPU have: " + names_up_to(best_isa()));
  chosen().store(*found, std::memory_order_relaxed);
}

}  // namespace relu_ext
