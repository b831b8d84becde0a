// Prints a line for each instruction set of this processor, kernel, dtype and length: a hash of all that was written.
#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/isa.h"
#include "dispatch.h"
#include "works.h"

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
  void print(const char* kernel, Dtype dtype, int64_t numel, int64_t inner) const {
    std::printf("%s: %s %s %lld %lld %016llx\n", name(chosen_isa()), kernel, names[int(dtype)], (long long)numel,
                (long long)inner, (unsigned long long)state_);
  }
};

template <class T>
void every_kernel(Dtype dtype, int64_t numel, int64_t inner) {
  for_works([&](const char* kernel, auto run) {
    Memory<T> input(numel, 1), other(numel, 2), grad(numel, 3), scale(channels, 4), shift(channels, 5);
    Memory<T> output(numel, 6), grad_input(numel, 7), grad_other(numel, 8);
    Memory<double> totals(2 * channels, 9);
    std::vector<uint8_t> bits(size_t(bytes_of_bits(numel)));
    const Arrays arrays{input.data(),  other.data(),      grad.data(),       scale.data(), shift.data(),
                        output.data(), grad_input.data(), grad_other.data(), bits.data(),  totals.data()};
    for (const Step step : {Step::forward_with_bits, Step::backward})
      run(step, dtype, numel, Channels{channels, inner}, arrays);
    Hash hash;
    hash.add(output), hash.add(grad_input), hash.add(grad_other), hash.add(totals), hash.add(bits);
    hash.print(kernel, dtype, numel, inner);
  });
}

}  // namespace

int main() {
  for (const Isa isa : compiled_isas) {
    if (isa > best_isa()) break;
    set_isa(name(isa));
    for (const auto dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
      for (const int64_t numel : lengths)
        for (const int64_t inner : {int64_t(1), int64_t(130)})
          with_dtype(dtype, [&](auto element) { every_kernel<decltype(element)>(dtype, numel, inner); });
  }
}
