// The part of the CUDA language that the project's kernels use, for g++ on the CPU; in the place of NVIDIA's header by
// the order of -I. Wants -fno-strict-aliasing and -Wno-unknown-pragmas (#pragma unroll).
#pragma once
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cuda_runtime_api.h"
#include "grid.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __shared__ static  // blocks run one after another
#define __launch_bounds__(...)

// In CUDA these are plain structs. Here a copy looks at both addresses, so kernels may still copy their bytes.
#pragma GCC diagnostic ignored "-Wclass-memaccess"

namespace emulator {

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T x, y, z, w;
  Four() = default;
  constexpr Four(T x, T y, T z, T w) : x(x), y(y), z(z), w(w) {}
  Four(const Four& other) : x(aligned(&other)->x), y(other.y), z(other.z), w(other.w) {}
  Four& operator=(const Four& other) {
    aligned(this)->x = aligned(&other)->x;
    y = other.y, z = other.z, w = other.w;
    return *this;
  }
};

template <class To, class From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) >= sizeof(From));
  To to{};
  std::memcpy(static_cast<void*>(&to), &from, sizeof(From));
  return to;
}

template <class T>
T shuffle(unsigned mask, unsigned source, T value, unsigned line) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "CUDA shuffles words of 4 and 8 bytes");
  const uint64_t received = exchange(mask, source, bit_cast<uint64_t>(value), line);
  T result;
  std::memcpy(&result, &received, sizeof(T));
  return result;
}

template <class... Parameters, size_t... i>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<i...>) {
  kernel(*static_cast<std::remove_const_t<Parameters>*>(arguments[i])...);
}

}  // namespace emulator

using uint4 = emulator::Four<unsigned>;

template <class T>
T __ldcs(const T* from) {
  return *emulator::aligned(from);
}
template <class T>
void __stcs(T* to, T value) {
  *emulator::aligned(to) = value;
}

// Threads take turns.
inline unsigned long long atomicAdd(unsigned long long* to, unsigned long long value) {
  return std::exchange(*emulator::aligned(to), *to + value);
}

inline int __popc(unsigned word) { return __builtin_popcount(word); }

inline void __syncthreads(unsigned line = __builtin_LINE()) { emulator::barrier(line); }
inline void __syncwarp(unsigned mask = 0xffffffffu, unsigned line = __builtin_LINE()) {
  emulator::exchange(mask, emulator::lane(), 0, line);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, unsigned line = __builtin_LINE()) {
  return unsigned(emulator::exchange(mask, emulator::Exchange::every, predicate != 0, line));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, unsigned line = __builtin_LINE()) {
  return emulator::shuffle(mask, (emulator::lane() ^ unsigned(lanes)) % emulator::warp, value, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes, unsigned line = __builtin_LINE()) {
  const unsigned source = emulator::lane() + lanes;
  return emulator::shuffle(mask, source < emulator::warp ? source : emulator::lane(), value, line);
}

// Runs the kernel before it returns, whatever the stream.
template <class... Parameters>
cudaError_t cudaLaunchKernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, void** arguments, size_t shared = 0,
                             cudaStream_t stream = nullptr) {
  static_assert((sizeof(Parameters) + ... + 0) <= 4096, "CUDA takes 4 KiB of arguments");
  const cudaError_t error = emulator::check_launch(grid, block, shared);
  if (error != cudaSuccess) return error;
  emulator::run([=] { emulator::call(kernel, arguments, std::index_sequence_for<Parameters...>{}); }, grid, block,
                stream);
  return cudaSuccess;
}
