// Half precision as far as the project's kernels use it.
#pragma once
#include "cuda_runtime.h"

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }
inline float __half2float(__half value) { return float(emulator::bit_cast<_Float16>(value)); }
