// The portable loops, each under a name of its own, to be looked for in the disassembly.
#include "cpu/staged.h"
#include "dispatch.h"

namespace relu_ext::cpu {

template <class T, class Activation>
[[gnu::noinline]] void forward(const Activation& act, const T* input, T* output, int64_t numel) {
  forward_loops<Isa::portable>(act, input, output, NoBits{}, 0, numel);
}
template <class T, class Activation>
[[gnu::noinline]] void forward_bits(const Activation& act, const T* input, T* output, uint8_t* bits, int64_t numel) {
  forward_loops<Isa::portable>(act, input, output, bits, 0, numel);
}
template <class T, class Activation>
[[gnu::noinline]] void backward_bits(const Activation& act, const T* grad, const uint8_t* bits, T* output,
                                     int64_t numel) {
  backward_loops<Isa::portable, Kept::bits>(act, grad, bits, output, 0, numel);
}
template <class T, class Activation>
[[gnu::noinline]] void backward_input(const Activation& act, const T* grad, const T* input, T* output, int64_t numel) {
  backward_loops<Isa::portable, Kept::input>(act, grad, input, output, 0, numel);
}

}  // namespace relu_ext::cpu

void every_loop(const relu_ext::Scalars& scalars, const void* a, const void* b, void* c, uint8_t* bits, int64_t numel) {
  using namespace relu_ext;
  for (const auto dtype : {Dtype::float32, Dtype::float64, Dtype::float16, Dtype::bfloat16})
    for (int i = 0; i <= int(Activation::relu_squared); ++i)
      with_dtype(dtype, [&](auto element) {
        using T = decltype(element);
        const auto first = static_cast<const T*>(a), second = static_cast<const T*>(b);
        const auto output = static_cast<T*>(c);
        with_activation<T, Device::cpu>(Activation(i), scalars, [&](auto act) {
          cpu::forward(act, first, output, numel);
          if constexpr (act.keeps_bits) {
            cpu::forward_bits(act, first, output, bits, numel);
            cpu::backward_bits(act, first, bits, output, numel);
          } else {
            cpu::backward_input(act, first, second, output, numel);
          }
        });
      });
}
