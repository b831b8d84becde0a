// From a description of the work to the loop that does it.
#include "../kernels.h"

#include <type_traits>

#include "../dispatch.h"
#include "staged.h"

namespace relu_ext::cpu {
namespace {

// body(T{}, act) with the types of this work.
template <class Work, class Body>
void with_types(const Work& work, Body body) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    with_activation<T, Device::cpu>(work.activation, work.scalars, [&](auto act) { body(element, act); });
  });
}

}  // namespace

void forward(const Forward& work, int64_t begin, int64_t end) {
  with_types(work, [&](auto element, auto act) {
    using T = decltype(element);
    const auto input = static_cast<const T*>(work.input);
    const auto output = static_cast<T*>(work.output);
    using Activation = decltype(act);
    with_bits<Activation>(work.bits, [=](auto bits) {
      vectorised<most_of<Activation::effort, T, decltype(bits)>()>([=](auto isa) RELU_EXT_INLINE_LAMBDA {
        forward_loops<decltype(isa)::value>(act, input, output, bits, begin, end);
      });
    });
  });
}

void backward(const Backward& work, int64_t begin, int64_t end) {
  with_types(work, [&](auto element, auto act) {
    using T = decltype(element);
    with_kept<decltype(act)>(work.kept_as, [&](auto from) {
      constexpr Kept kept_as = decltype(from)::value;
      const auto grad = static_cast<const T*>(work.grad);
      const auto kept = static_cast<const std::conditional_t<kept_as == Kept::bits, uint8_t, T>*>(work.kept);
      const auto output = static_cast<T*>(work.output);
      vectorised<most_of<decltype(act)::effort, T>()>([=](auto isa) RELU_EXT_INLINE_LAMBDA {
        backward_loops<decltype(isa)::value, kept_as>(act, grad, kept, output, begin, end);
      });
    });
  });
}

}  // namespace relu_ext::cpu
