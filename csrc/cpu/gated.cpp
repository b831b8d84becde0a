// The gated operations: rows of two inputs, which may be halves of one tensor.
#include <array>
#include <type_traits>

#include "../dispatch.h"
#include "staged.h"

namespace relu_ext::cpu {
namespace {

template <class T>
using Element = std::conditional_t<std::is_same_v<T, half>, float, T>;  // of a chunk

// body(row, begin, end): columns begin to end - 1 of that row, for elements begin to end - 1 of all.
template <class Body>
void for_rows(int64_t columns, int64_t begin, int64_t end, Body body) {
  for (int64_t row = begin / columns; row * columns < end; ++row)
    body(row, std::max(begin - row * columns, int64_t(0)), std::min(end - row * columns, columns));
}

template <class T>
const T* row_of(const Rows<const void*>& rows, int64_t row) {
  return static_cast<const T*>(rows.data) + row * rows.stride;
}
template <class T>
T* row_of(const Rows<void*>& rows, int64_t row) {
  return static_cast<T*>(rows.data) + row * rows.stride;
}

template <class T>
RELU_EXT_INLINE void gated_loop(const T* gate, const T* up, T* output, int count) {
  RELU_EXT_LANES
  for (int j = 0; j < count; ++j) output[j] = Reglu<T>::forward(gate[j], up[j]);
}
template <class T>
RELU_EXT_INLINE void grad_gate_loop(const T* grad, const T* gate, const T* up, T* output, int count) {
  RELU_EXT_LANES
  for (int j = 0; j < count; ++j) output[j] = Reglu<T>::grad_gate(grad[j], gate[j], up[j]);
}
template <class T>
RELU_EXT_INLINE void grad_up_loop(const T* grad, const T* gate, T* output, int count) {
  RELU_EXT_LANES
  for (int j = 0; j < count; ++j) output[j] = Reglu<T>::grad_up(grad[j], gate[j]);
}

}  // namespace

void gated(const Gated& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(work.columns, begin, end, [&](int64_t row, int64_t begin, int64_t end) {
      const std::array inputs{row_of<T>(work.gate, row), row_of<T>(work.up, row)};
      in_chunks(inputs, row_of<T>(work.output, row), begin, end, [](auto& in, auto* out, int64_t, int count) {
        const auto *gate = in[0], *up = in[1];
        vectorised([=]() RELU_EXT_INLINE_LAMBDA { gated_loop(gate, up, out, count); });
      });
    });
  });
}

// A chunk of gate and grad is still in the first-level cache when the second gradient reads it.
void gated_backward(const GatedBackward& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    for_rows(work.columns, begin, end, [&](int64_t row, int64_t begin, int64_t end) {
      const T *grad = row_of<T>(work.grad, row), *gate = row_of<T>(work.gate, row);
      for (int64_t i = begin; i < end; i += chunk) {
        const int64_t stop = std::min(i + chunk, end);
        if (work.grad_gate.data)
          in_chunks(std::array{grad, gate, row_of<T>(work.up, row)}, row_of<T>(work.grad_gate, row), i, stop,
                    [](auto& in, auto* out, int64_t, int count) {
                      const auto *grad = in[0], *gate = in[1], *up = in[2];
                      vectorised([=]() RELU_EXT_INLINE_LAMBDA { grad_gate_loop(grad, gate, up, out, count); });
                    });
        if (work.grad_up.data)
          in_chunks(std::array{grad, gate}, row_of<T>(work.grad_up, row), i, stop,
                    [](auto& in, auto* out, int64_t, int count) {
                      const auto *grad = in[0], *gate = in[1];
                      vectorised([=]() RELU_EXT_INLINE_LAMBDA { grad_up_loop(grad, gate, out, count); });
                    });
      }
    });
  });
}

}  // namespace relu_ext::cpu
