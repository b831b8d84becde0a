// Prints a line for each instruction set of this processor, kernel, dtype and length: a hash of all that was written.
// All memory is next to pages that trap.
#include <signal.h>

#include <cmath>
#include <cstdio>
#include <vector>

#include "cpu/isa.h"
#include "dispatch.h"
#include "guarded.h"
#include "works.h"

namespace {

using namespace relu_ext;

// And all from 0 to 130. Chunks are of 512 or 1024 elements, pages of 1024 floats.
constexpr int64_t long_ones[] = {511, 512, 513, 1000, 1023, 1024, 1025, 4095, 4096, 4097, 5003};
constexpr int64_t inners[] = {1, 130, 600};  // neighbours, chunks with several channels, and chunks of one
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
struct Memory : Guarded<T> {
  Memory(int64_t numel, uint64_t seed, Place place) : Guarded<T>(numel, place) {
    for (int64_t i = 0; i < numel; ++i) this->data()[i] = narrow<T>(Arithmetic<T>(element(seed, i)));
  }
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
  template <class Integer>
  void add(Guarded<Integer>& memory) {
    for (size_t i = 0; i < memory.size(); ++i) add_word(uint64_t(memory.data()[i]));
  }
  uint64_t state() const { return state_; }
};

char running[200];
void trapped(int) {
  std::fprintf(stderr, "outside of its memory: %s\n", running);
  std::_Exit(1);
}

template <class T>
void every_kernel(Dtype dtype, int64_t numel, int64_t inner) {
  for_works([&](const char* kernel, auto run) {
    std::snprintf(running, sizeof(running), "%s: %s %s %lld %lld", name(chosen_isa()), kernel, names[int(dtype)],
                  (long long)numel, (long long)inner);
    Hash hash;
    for (const Place place : {Place::before_a_trap, Place::behind_a_trap}) {
      Memory<T> input(numel, 1, place), other(numel, 2, place), grad(numel, 3, place);
      Memory<T> scale(channels, 4, place), shift(channels, 5, place);
      Memory<T> output(numel, 6, place), grad_input(numel, 7, place), grad_other(numel, 8, place);
      Memory<double> totals(2 * channels, 9, place);
      Guarded<uint8_t> bits(bytes_of_bits(numel), place);
      Guarded<int64_t> counts(channels, place);
      const Arrays arrays{input.data(),      other.data(),      grad.data(), scale.data(),  shift.data(), output.data(),
                          grad_input.data(), grad_other.data(), bits.data(), totals.data(), counts.data()};
      for (const Step step : {Step::forward, Step::forward_with_bits, Step::backward})
        run(step, dtype, numel, Channels{channels, inner}, arrays);
      hash.add(output), hash.add(grad_input), hash.add(grad_other), hash.add(totals), hash.add(bits), hash.add(counts);
    }
    std::printf("%s %016llx\n", running, (unsigned long long)hash.state());
  });
}

void every_dtype(int64_t numel) {
  for (const auto dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
    for (const int64_t inner : inners)
      with_dtype(dtype, [&](auto element) { every_kernel<decltype(element)>(dtype, numel, inner); });
}

}  // namespace

int main() {
  signal(SIGSEGV, trapped);
  for (const Isa isa : compiled_isas) {
    if (isa > best_isa()) break;
    set_isa(name(isa));
    for (int64_t numel = 0; numel <= 130; ++numel) every_dtype(numel);
    for (const int64_t numel : long_ones) every_dtype(numel);
  }
}
