// What every launcher needs.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels.cuh"

namespace relu_ext::cuda {

// Blocks of 256 threads that run at once on the largest chips of today: 2048 threads on each of 108 (A100), 132 (H100,
// H200) or 148 (B200) multiprocessors.
constexpr int64_t blocks_at_once = 1024;

template <class... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, cudaStream_t stream,
                   std::common_type_t<Parameters>... arguments) {
  void* pointers[] = {&arguments...};
  return cudaLaunchKernel(kernel, dim3(unsigned(blocks)), dim3(unsigned(threads)), pointers, 0, stream);
}

inline bool are_aligned(std::initializer_list<const void*> pointers) {
  uintptr_t all = 0;
  for (const void* pointer : pointers) all |= reinterpret_cast<uintptr_t>(pointer);
  return all % 16 == 0;
}

template <class T, class Tile, int lanes = Vector<T>::lanes>
int64_t blocks(int64_t numel) {
  return (numel - 1) / elements_of<T, Tile, lanes> + 1;
}

}  // namespace relu_ext::cuda
