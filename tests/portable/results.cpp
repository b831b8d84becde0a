// Prints a line for each kernel, dtype and length: a hash of all that it wrote. Arguments: the instruction set.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/isa.h"
#include "dispatch.h"

namespace {

using namespace relu_ext;

constexpr int64_t lengths[] = {1, 7, 63, 64, 65, 1000, 5003};
constexpr int64_t channels = 5;
constexpr const char* names[] = {"float32", "float64", "float16", "bfloat16"};

// A mantissa, sign and exponent of their own for each element; every eleventh is special.
double element(uint64_t seed, int64_t i) {
  constexpr double special[] = {0.0, -0.0, INFINITY, -INFINITY, NAN, 1e-40, -6e-8, 6.0};
  uint64_t x = (seed + 1) * 0x9e3779b97f4a7c15u + uint64_t(i) * 0xbf58476d1ce4e5b9u;
  x ^= x >> 31, x *= 0x94d049bb133111ebu, x ^= x >> 29;
  if (x % 11 == 0) return special[x / 11 % 8];
  return std::ldexp(double(int64_t(x)) * 0x1p-63, int(x >> 8 & 15) - 8);
}

template <class T>
class Memory {
  std::vector<T> elements_;

 public:
  Memory(int64_t numel, uint64_t seed) : elements_(size_t(numel)) {
    for (int64_t i = 0; i < numel; ++i) elements_[size_t(i)] = narrow<T>(Arithmetic<T>(element(seed, i)));
  }
  T* data() { return elements_.data(); }
  size_t size() const { return elements_.size(); }
};

class Hash {
  uint64_t state_ = 0xcbf29ce484222325u;

  void add_word(uint64_t word) { state_ = (state_ ^ word) * 0x100000001b3u; }

 public:
  // What a NaN looks like is the instruction set's affair.
  template <class T>
  void add(Memory<T>& memory) {
    for (size_t i = 0; i < memory.size(); ++i) {
      const auto value = widen(memory.data()[i]);
      add_word(value != value ? ~uint64_t(0) : uint64_t(bit_cast<Word<T>>(memory.data()[i])));
    }
  }
  void add(const std::vector<uint8_t>& bytes) {
    for (const uint8_t byte : bytes) add_word(byte);
  }
  void print(const char* kernel, Dtype dtype, int64_t numel) const {
    std::printf("%s %s %lld %016llx\n", kernel, names[int(dtype)], (long long)numel, (unsigned long long)state_);
  }
};

template <class T>
void activations(Dtype dtype, int64_t numel) {
  constexpr const char* kernels[] = {"relu", "hardtanh", "threshold", "leaky_relu", "elu", "relu_squared"};
  constexpr Scalars scalars[] = {{}, {-1, 6, 0}, {0.1, -3, 0}, {0.01, 0, 0}, {1.5, 1, 1}, {}};
  for (int i = 0; i < 6; ++i) {
    Memory<T> input(numel, 1), grad(numel, 2), output(numel, 3), grad_input(numel, 4);
    std::vector<uint8_t> bits(size_t(bytes_of_bits(numel)));
    const Activation act = Activation(i);
    const Kept kept = act == Activation::elu            ? Kept::input
                      : act == Activation::relu_squared ? Kept::output
                                                        : Kept::bits;
    cpu::forward({act, scalars[i], dtype, input.data(), output.data(), kept == Kept::bits ? bits.data() : nullptr}, 0,
                 numel);
    const void* const values = kept == Kept::input ? input.data() : output.data();
    cpu::backward(
        {act, scalars[i], dtype, kept, grad.data(), kept == Kept::bits ? bits.data() : values, grad_input.data()}, 0,
        numel);
    Hash hash;
    hash.add(output), hash.add(grad_input), hash.add(bits);
    hash.print(kernels[i], dtype, numel);
  }
}

template <class T>
void reglu(Dtype dtype, int64_t numel) {
  Memory<T> gate(numel, 1), up(numel, 2), grad(numel, 3), output(numel, 4), grad_gate(numel, 5), grad_up(numel, 6);
  cpu::gated({dtype, numel, {gate.data(), numel}, {up.data(), numel}, {output.data(), numel}}, 0, numel);
  cpu::gated_backward({dtype,
                       numel,
                       {grad.data(), numel},
                       {gate.data(), numel},
                       {up.data(), numel},
                       {grad_gate.data(), numel},
                       {grad_up.data(), numel}},
                      0, numel);
  Hash hash;
  hash.add(output), hash.add(grad_gate), hash.add(grad_up);
  hash.print("reglu", dtype, numel);
}

template <class T>
void prelu(Dtype dtype, int64_t numel, int64_t inner) {
  const Channels of{channels, inner};
  Memory<T> input(numel, 1), weight(channels, 2), grad(numel, 3), output(numel, 4), grad_input(numel, 5), sums(5, 6);
  std::vector<uint8_t> bits(size_t(bytes_of_bits(numel)));
  std::vector<double> totals(channels);
  cpu::prelu({dtype, of, input.data(), weight.data(), output.data(), bits.data()}, 0, numel);
  cpu::prelu_backward({dtype, of, grad.data(), input.data(), nullptr, weight.data(), grad_input.data(), sums.data()},
                      totals.data(), 0, numel);
  cpu::round_sums(dtype, totals.data(), channels, sums.data());
  Hash hash;
  hash.add(output), hash.add(grad_input), hash.add(sums), hash.add(bits);
  hash.print(inner == 1 ? "prelu, channels last" : "prelu", dtype, numel);
}

template <class T>
void fused(Dtype dtype, int64_t numel, int64_t inner) {
  constexpr const char* kernels[] = {"add_relu", "bias_relu", "scale_shift_relu", "scale_shift_add_relu",
                                     "relu_dropout"};
  for (int i = 0; i < 5; ++i) {
    const bool scale = i == 2 || i == 3, shift = scale || i == 1, residual = i == 0 || i == 3, dropout = i == 4;
    Memory<T> input(numel, 1), other(numel, 2), scales(channels, 3), shifts(channels, 4), output(numel, 5);
    Memory<T> grad(numel, 6), grad_input(numel, 7), grad_residual(numel, 8), grad_scale(5, 9), grad_shift(5, 10);
    std::vector<uint8_t> bits(size_t(bytes_of_bits(numel)));
    std::vector<double> totals(2 * channels);
    Fused work{};
    work.dtype = dtype, work.channels = {channels, inner}, work.input = input.data(), work.output = output.data();
    work.bits = bits.data();
    if (scale) work.scale = scales.data();
    if (shift) work.shift = shifts.data();
    if (residual) work.residual = other.data();
    if (dropout) work.dropout = {{42, 7, nullptr, nullptr}, 58981, 1 / 0.9};
    cpu::fused(work, 0, numel);
    FusedBackward back{};
    back.dtype = dtype, back.channels = work.channels, back.kept_as = Kept::bits, back.grad = grad.data();
    back.kept = bits.data(), back.grad_input = grad_input.data();
    if (scale) back.scale = scales.data(), back.input = input.data(), back.grad_residual = grad_residual.data();
    if (scale) back.grad_scale = grad_scale.data();
    if (shift) back.grad_shift = grad_shift.data();
    if (dropout) back.factor = 1 / 0.9;
    cpu::fused_backward(back, totals.data(), 0, numel);
    Memory<double> sums(2 * channels, 11);
    std::copy(totals.begin(), totals.end(), sums.data());
    Hash hash;
    hash.add(output), hash.add(grad_input), hash.add(grad_residual), hash.add(sums), hash.add(bits);
    hash.print(kernels[i], dtype, numel);
  }
}

}  // namespace

int main(int, char** arguments) {
  set_isa(arguments[1]);
  for (const auto dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
    for (const int64_t numel : lengths)
      with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        activations<T>(dtype, numel);
        reglu<T>(dtype, numel);
        for (const int64_t inner : {int64_t(1), int64_t(130)}) {
          prelu<T>(dtype, numel, inner);
          fused<T>(dtype, numel, inner);
        }
      });
}
