// The work that a backend is given: plain pointers to its device's memory, no torch.
//
// The bits. Bit i % 8 of byte i / 8 belongs to element i in memory order (numpy.packbits(bitorder="little")): 1 where
// the activation keeps its input. n elements have (n + 7) / 8 bytes; the spare bits of the last one are 0. The same on
// every backend. A worker owns multiples of 8 elements, so each byte has one writer.
#pragma once
#include <array>
#include <cstdint>

namespace relu_ext {

enum class Dtype : uint8_t { float32, float64, float16, bfloat16 };

// One name per struct of activations.h.
enum class Activation : uint8_t { relu, hardtanh, threshold, leaky_relu, elu, relu_squared };

// An activation's scalar arguments, in the order of its definition; those that it does not have are 0.
using Scalars = std::array<double, 3>;

// What backward needs beside grad: the bits, or as many elements as grad has.
enum class Kept : uint8_t { bits, input, output };

// output[i] = act(input[i]), and its bit where bits is not null. output may be input itself, else they don't overlap.
struct Forward {
  Activation activation;
  Scalars scalars;
  Dtype dtype;
  const void* input;
  void* output;
  uint8_t* bits;
};

// output[i] = the gradient that grad[i] and bit i or element i of kept give. output may be grad itself, else they don't
// overlap.
struct Backward {
  Activation activation;
  Scalars scalars;
  Dtype dtype;
  Kept kept_as;
  const void* grad;
  const void* kept;
  void* output;
};

constexpr int64_t bytes_of_bits(int64_t numel) { return numel / 8 + (numel % 8 != 0); }

namespace cpu {

// Ranges start at a multiple of this many elements, so that two workers never share a byte of bits or a vector.
constexpr int64_t alignment = 64;

// Elements begin to end - 1, on the calling thread.
void forward(const Forward&, int64_t begin, int64_t end);
void backward(const Backward&, int64_t begin, int64_t end);

// Tells the system that these bytes, not touched so far, are about to be written.
void expect_writes(void* memory, int64_t bytes);

}  // namespace cpu
}  // namespace relu_ext
