// Times the CUDA kernels in other tiles than the shipped ones; prints one JSON line a configuration. sweep.py builds
// and runs it and draws the table: sweep MEGABYTES... (of one tensor).
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <type_traits>
#include <vector>

#include "activations.h"
#include "cuda/kernels.cuh"

namespace {

using namespace relu_ext;
using namespace relu_ext::cuda;

constexpr int rounds = 31;
// Written between two measurements, so that each begins with nothing of its own in the L2 cache (126 MB in a B200).
constexpr size_t flushed_bytes = size_t(512) << 20;

void check(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
  std::exit(1);
}

struct Memory {
  void* from;
  void* to;
  uint8_t* bits;
  void* flushed;
  int64_t bytes;  // of the tensor in use

  explicit Memory(int64_t most) : bytes(most) {
    check(cudaMalloc(&from, size_t(most)));
    check(cudaMalloc(&to, size_t(most)));
    check(cudaMalloc(&bits, size_t(most) / 8));
    check(cudaMalloc(&flushed, flushed_bytes));
    // Numbers of both signs that do not compress: any pattern will do, special values included.
    std::vector<uint32_t> pattern(size_t(most) / 4);
    uint32_t state = 1;
    for (auto& word : pattern) word = state = state * 1664525u + 1013904223u;
    check(cudaMemcpy(from, pattern.data(), size_t(most), cudaMemcpyHostToDevice));
    check(cudaMemset(bits, 0x5a, size_t(most) / 8));
  }
};

// Median, in microseconds, of what `work` queues.
template <class Work>
double time(const Memory& memory, Work work) {
  static cudaEvent_t begin = nullptr, end = nullptr;
  if (!begin) {
    check(cudaEventCreate(&begin));
    check(cudaEventCreate(&end));
  }
  std::vector<float> milliseconds(rounds);
  work();
  for (float& sample : milliseconds) {
    check(cudaMemsetAsync(memory.flushed, 0, flushed_bytes));
    check(cudaEventRecord(begin));
    work();
    check(cudaEventRecord(end));
    check(cudaEventSynchronize(end));
    check(cudaGetLastError());
    check(cudaEventElapsedTime(&sample, begin, end));
  }
  std::nth_element(milliseconds.begin(), milliseconds.begin() + rounds / 2, milliseconds.end());
  return 1e3 * milliseconds[rounds / 2];
}

void print(const char* step, const char* dtype, const Memory& memory, int threads, int vectors, const char* loads,
           const char* stores, double microseconds, int64_t moved) {
  std::printf(
      "{\"step\": \"%s\", \"dtype\": \"%s\", \"tensor_bytes\": %lld, \"threads\": %d, \"vectors\": %d, \"loads\": "
      "\"%s\", "
      "\"stores\": \"%s\", \"microseconds\": %.3f, \"moved_bytes\": %lld}\n",
      step, dtype, static_cast<long long>(memory.bytes), threads, vectors, loads, stores, microseconds,
      static_cast<long long>(moved));
  std::fflush(stdout);
}

const char* name(Hint hint) { return hint == Hint::streaming ? "streaming" : "plain"; }

template <class T, class Tile>
void sweep_tile(const char* dtype, const Memory& memory) {
  const int64_t numel = memory.bytes / int64_t(sizeof(T));
  const auto blocks = unsigned((numel - 1) / elements_of<T, Tile> + 1);
  const auto from = static_cast<const T*>(memory.from);
  const auto to = static_cast<T*>(memory.to);
  const auto report = [&](const char* step, double microseconds, int64_t moved) {
    print(step, dtype, memory, Tile::threads, Tile::vectors, name(Tile::loads), name(Tile::stores), microseconds,
          moved);
  };
  const Relu<T, Device::cuda> relu{Scalars{}};
  const auto forward = [&](auto with_bits) {
    forward_kernel<T, Tile, true, with_bits><<<blocks, Tile::threads>>>(relu, from, to, memory.bits, numel);
  };
  const auto backward = [&] {
    const uint8_t* const bits = memory.bits;
    backward_kernel<Kept::bits, T, Tile, true><<<blocks, Tile::threads>>>(relu, from, bits, to, numel);
  };
  const int64_t moved = 2 * memory.bytes, with_bits = moved + numel / 8;
  report("forward", time(memory, [&] { forward(std::false_type{}); }), moved);
  report("forward with bits", time(memory, [&] { forward(std::true_type{}); }), with_bits);
  report("backward", time(memory, backward), with_bits);
}

template <class T, int threads, int vectors>
void sweep_hints(const char* dtype, const Memory& memory) {
  sweep_tile<T, Tile<threads, vectors, Hint::none, Hint::none>>(dtype, memory);
  sweep_tile<T, Tile<threads, vectors, Hint::streaming, Hint::none>>(dtype, memory);
  sweep_tile<T, Tile<threads, vectors, Hint::none, Hint::streaming>>(dtype, memory);
  sweep_tile<T, Tile<threads, vectors, Hint::streaming, Hint::streaming>>(dtype, memory);
}

template <class T, int threads>
void sweep_vectors(const char* dtype, const Memory& memory) {
  sweep_hints<T, threads, 1>(dtype, memory);
  sweep_hints<T, threads, 2>(dtype, memory);
  sweep_hints<T, threads, 4>(dtype, memory);
  sweep_hints<T, threads, 8>(dtype, memory);
}

template <class T>
void sweep_threads(const char* dtype, const Memory& memory) {
  sweep_vectors<T, 128>(dtype, memory);
  sweep_vectors<T, 256>(dtype, memory);
  sweep_vectors<T, 512>(dtype, memory);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<int64_t> sizes;
  for (int i = 1; i < count; ++i) sizes.push_back(int64_t(std::stod(arguments[i]) * (1 << 20)));
  if (sizes.empty()) return 2;
  Memory memory(*std::max_element(sizes.begin(), sizes.end()));
  for (const int64_t bytes : sizes) {
    memory.bytes = bytes;
    print(
        "copy", "", memory, 0, 0, "", "",
        time(memory, [&] { check(cudaMemcpyAsync(memory.to, memory.from, size_t(bytes), cudaMemcpyDeviceToDevice)); }),
        2 * bytes);
    sweep_threads<float>("float32", memory);
    sweep_threads<bfloat16>("bfloat16", memory);
  }
  return 0;
}
