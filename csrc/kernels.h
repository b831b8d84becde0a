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

// The halves of a projection, each in rows of `columns` elements: from the first element of a row to that of the next
// there are `stride`. A dense tensor is one row. Where data is null, nothing is read or wanted.
template <class Pointer>
struct Rows {
  Pointer data;
  int64_t stride;
};

// output = max(gate, 0) * up.
struct Gated {
  Dtype dtype;
  int64_t columns;
  Rows<const void*> gate, up;
  Rows<void*> output;
};
// The gradients of gate, for which up is read too, and of up.
struct GatedBackward {
  Dtype dtype;
  int64_t columns;
  Rows<const void*> grad, gate, up;
  Rows<void*> grad_gate, grad_up;
};

// Element i belongs to channel i / inner % channels.
struct Channels {
  int64_t channels, inner;
};

// output[i] = input[i] > 0 ? input[i] : weight[channel] * input[i], and its bit where bits is not null.
struct Prelu {
  Dtype dtype;
  Channels channels;
  const void* input;
  const void* weight;  // dense, one a channel
  void* output;
  uint8_t* bits;
};
// output[i] = input[i] > 0 ? grad[i] : weight[channel] * grad[i]; grad_weight[channel] = the sum of input[i] * grad[i]
// where not (input[i] > 0). Either may be null: not wanted. Where bits is not null it is read in the place of input,
// and grad_weight is null. output may be grad itself.
struct PreluBackward {
  Dtype dtype;
  Channels channels;
  const void* grad;
  const void* input;
  const uint8_t* bits;
  const void* weight;
  void* output;
  void* grad_weight;
};

// Random numbers of Philox4x32-7 (Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", 2011:
// of seven rounds on it passes all of TestU01's BigCrush), 16 bits an element: those of elements 8 g to 8 g + 7 are the
// block of counter (g, offset) and key seed, low halves of words first. So the numbers hang on nothing but seed, offset
// and place.
struct Stream {
  uint64_t seed, offset;
  // While a CUDA graph is captured, where a replay will find the seed, and what is to be added to offset; else null.
  const int64_t *seed_at, *offset_at;
};

// An element is dropped where its random number is above `last`, else multiplied by `factor`.
struct Dropout {
  Stream stream;
  uint16_t last;
  double factor;  // 0: there is no dropout
};

// output = drop(act(input * scale + shift + residual)), and the bits where bits is not null; a dropped element has
// none. The product is rounded, unless multiply_add and the device has that instruction. scale and shift have a value
// for each channel, next to each other. What is null is not there; input * scale without shift, and residual or shift
// with dropout, are not among the combinations. output may be input or residual, else they don't overlap.
struct Fused {
  Activation activation;
  Scalars scalars;
  Dtype dtype;
  Channels channels;
  const void* input;
  const void* scale;
  const void* shift;
  const void* residual;
  bool multiply_add;
  Dropout dropout;
  void* output;
  uint8_t* bits;
};

// masked = the gradient that grad and the bits give, or the forward's output where its activation is relu, times
// factor. grad_input = masked * scale; grad_residual = masked; grad_shift and grad_scale = the sums of masked and of
// masked * input over each channel. Without scale grad_residual is null, being grad_input. Null are those that are not
// wanted, and input and scale where they are not needed. grad_input or grad_residual may be grad itself.
struct FusedBackward {
  Activation activation;
  Scalars scalars;
  Dtype dtype;
  Channels channels;
  Kept kept_as;
  const void* grad;
  const void* kept;
  const void* input;
  const void* scale;
  double factor;  // of dropout, else 0
  void* grad_input;
  void* grad_residual;
  void* grad_scale;
  void* grad_shift;
};

// What a layer's bits add up to: kept[channel] += how many of its bits are 1, and last[channel] = step where any is.
struct Count {
  Channels channels;
  const uint8_t* bits;
  int64_t step;
  int64_t *kept, *last;  // one a channel
};
// *first = step where an element is infinite or NaN and *first is 0: steps begin at 1.
struct NonFinite {
  Dtype dtype;
  const void* input;
  int64_t step;
  int64_t* first;
};

constexpr int64_t bytes_of_bits(int64_t numel) { return numel / 8 + (numel % 8 != 0); }

namespace cpu {

// Ranges start at a multiple of this many elements, so that two workers never share a byte of bits or a vector.
constexpr int64_t alignment = 64;

// Elements begin to end - 1, on the calling thread.
void forward(const Forward&, int64_t begin, int64_t end);
void backward(const Backward&, int64_t begin, int64_t end);
void gated(const Gated&, int64_t begin, int64_t end);
void gated_backward(const GatedBackward&, int64_t begin, int64_t end);
void prelu(const Prelu&, int64_t begin, int64_t end);
void fused(const Fused&, int64_t begin, int64_t end);

// sums: of this range alone, one a channel, is added to; null where grad_weight is. grad_weight itself is not written.
void prelu_backward(const PreluBackward&, double* sums, int64_t begin, int64_t end);

// sums: of this range alone, is added to: a value a channel for each of the vectors of channels whose gradients are
// wanted, in the order of the struct's members. Those gradients themselves are not written.
void fused_backward(const FusedBackward&, double* sums, int64_t begin, int64_t end);

// gradient[channel] = sums[channel], rounded.
void round_sums(Dtype, const double* sums, int64_t channels, void* gradient);

// counts: of this range alone, one a channel, are added to. work's own are not written.
void count(const Count&, int64_t* counts, int64_t begin, int64_t end);
// first is not written.
bool is_finite(const NonFinite&, int64_t begin, int64_t end);

// Tells the system that these bytes, not touched so far, are about to be written.
void expect_writes(void* memory, int64_t bytes);

}  // namespace cpu
}  // namespace relu_ext
