// One kernel that is right and many that are wrong, each by its name: what the emulator must run, and what it must not.
#include <cuda_runtime.h>

#include <cstdio>
#include <map>
#include <string>

namespace {

constexpr int threads = 256;
constexpr unsigned all = 0xffffffffu;

// Adds up a block's numbers: in warps by shuffles, then over shared memory. A barrier is missing unless `correct`.
template <bool correct>
__global__ void sum(const int* numbers, int* total) {
  __shared__ int of_warp[threads / 32];
  int mine = numbers[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) mine += __shfl_xor_sync(all, mine, lanes);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = mine;
  if (correct) __syncthreads();
  if (threadIdx.x >= 32) return;
  int sums = threadIdx.x < threads / 32 ? of_warp[threadIdx.x] : 0;
  for (int lanes = 16; lanes > 0; lanes /= 2) sums += __shfl_down_sync(all, sums, lanes);
  const unsigned positive = __ballot_sync(all, sums > 0);
  __syncwarp();
  if (threadIdx.x == 0) *total = __popc(positive) > 0 ? sums : -1;
}

__global__ void nothing(const int*, int*) {}
__global__ void barrier_in_a_branch(const int*, int*) {
  if (threadIdx.x < 100) __syncthreads();
}
__global__ void two_barriers(const int*, int*) {
  if (threadIdx.x < 128)
    __syncthreads();
  else
    __syncthreads();
}
__global__ void shuffle_in_a_branch(const int* numbers, int* total) {
  if (threadIdx.x != 77) *total = __shfl_xor_sync(all, numbers[threadIdx.x], 1);
}
__global__ void two_shuffles(const int* numbers, int* total) {
  if (threadIdx.x % 2)
    *total = __shfl_xor_sync(all, numbers[threadIdx.x], 1);
  else
    *total = __shfl_xor_sync(all, numbers[threadIdx.x], 2);
}
__global__ void lane_outside_of_the_mask(const int* numbers, int* total) {
  if (threadIdx.x % 32 < 16) *total = __shfl_xor_sync(0xffffu, numbers[threadIdx.x], 16);
}
__global__ void misaligned_load(const int* numbers, int* total) {
  const uint4 loaded = *reinterpret_cast<const uint4*>(numbers + 1);
  *total = int(loaded.x);
}
__global__ void misaligned_streaming_load(const int* numbers, int* total) {
  *total = int(__ldcs(reinterpret_cast<const uint4*>(numbers + 2)).x);
}
__global__ void misaligned_store(const int*, int* total) { *reinterpret_cast<uint4*>(total + 3) = uint4{1, 2, 3, 4}; }

using Kernel = void (*)(const int*, int*);
const std::map<std::string, Kernel> kernels = {
    {"sum", sum<true>},
    {"sum_without_barrier", sum<false>},
    {"nothing", nothing},
    {"barrier_in_a_branch", barrier_in_a_branch},
    {"two_barriers", two_barriers},
    {"shuffle_in_a_branch", shuffle_in_a_branch},
    {"two_shuffles", two_shuffles},
    {"lane_outside_of_the_mask", lane_outside_of_the_mask},
    {"misaligned_load", misaligned_load},
    {"misaligned_streaming_load", misaligned_streaming_load},
    {"misaligned_store", misaligned_store},
};

int launch(Kernel kernel, dim3 grid, dim3 block, size_t shared) {
  alignas(16) static int numbers[threads];
  alignas(16) static int total[16];
  for (int i = 0; i < threads; ++i) numbers[i] = i;
  const int* input = numbers;
  int* output = total;
  void* arguments[] = {&input, &output};
  const int error = cudaLaunchKernel(kernel, grid, block, arguments, shared, nullptr);
  std::printf("error %d, total %d, launches %d\n", error, total[0], int(emulator::launches));
  return 0;
}

}  // namespace

// cases KERNEL [grid x y z, block x y z, bytes of shared memory]
int main(int count, char** words) {
  unsigned sizes[] = {1, 1, 1, threads, 1, 1, 0};
  for (int i = 2; i < count; ++i) sizes[i - 2] = unsigned(std::stoul(words[i]));
  return launch(kernels.at(words[1]), {sizes[0], sizes[1], sizes[2]}, {sizes[3], sizes[4], sizes[5]}, sizes[6]);
}
