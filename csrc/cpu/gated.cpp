// The gated operations: rows of two inputs, which may be halves of one tensor.
#include <algorithm>
#include <array>

#include "../dispatch.h"
#include "staged.h"

namespace relu_ext::cpu {
namespace {

// body(row, begin, end): columns begin to end - 1 of that row, for elements begin to end - 1 of all.
template <class Body>
RELU_EXT_INLINE void for_rows(int64_t columns, int64_t begin, int64_t end, Body body) {
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

template <class X>
RELU_EXT_INLINE void gated_loop(const X* gate, const X* up, X* output, int64_t count) {
  RELU_EXT_LANES
  for (int64_t j = 0; j < count; ++j) output[j] = Reglu::forward(gate[j], up[j]);
}
template <class X>
RELU_EXT_INLINE void gradients_loop(const X* grad, const X* gate, const X* up, X* grad_gate, X* grad_up,
                                    int64_t count) {
  RELU_EXT_LANES
  for (int64_t j = 0; j < count; ++j) {
    const X g = grad[j], x = gate[j];
    grad_gate[j] = Reglu::grad_gate(g, x, up[j]);
    grad_up[j] = Reglu::grad_up(g, x);
  }
}
template <class X>
RELU_EXT_INLINE void grad_gate_loop(const X* grad, const X* gate, const X* up, X* output, int64_t count) {
  RELU_EXT_LANES
  for (int64_t j = 0; j < count; ++j) output[j] = Reglu::grad_gate(grad[j], gate[j], up[j]);
}

// What is wanted of one row.
template <Isa isa, class T>
RELU_EXT_INLINE void gradients(const GatedBackward& work, int64_t row, int64_t begin, int64_t end) {
  const T *grad = row_of<T>(work.grad, row), *gate = row_of<T>(work.gate, row);
  if (!work.grad_gate.data)
    return staged<isa>(std::array{gate, grad}, std::array{row_of<T>(work.grad_up, row)}, begin, end,
                       [](auto& in, auto& out, int64_t count)
                           RELU_EXT_INLINE_LAMBDA { gated_loop(in[0], in[1], out[0], count); });
  const std::array inputs{grad, gate, row_of<T>(work.up, row)};
  if (!work.grad_up.data)
    return staged<isa>(inputs, std::array{row_of<T>(work.grad_gate, row)}, begin, end,
                       [](auto& in, auto& out, int64_t count)
                           RELU_EXT_INLINE_LAMBDA { grad_gate_loop(in[0], in[1], in[2], out[0], count); });
  staged<isa>(inputs, std::array{row_of<T>(work.grad_gate, row), row_of<T>(work.grad_up, row)}, begin, end,
              [](auto& in, auto& out, int64_t count)
                  RELU_EXT_INLINE_LAMBDA { gradients_loop(in[0], in[1], in[2], out[0], out[1], count); });
}

}  // namespace

void gated(const Gated& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    vectorised<most_of<Effort::product, T>()>([&](auto isa) RELU_EXT_INLINE_LAMBDA {
      for_rows(work.columns, begin, end, [&](int64_t row, int64_t begin, int64_t end) RELU_EXT_INLINE_LAMBDA {
        const std::array inputs{row_of<T>(work.gate, row), row_of<T>(work.up, row)};
        staged<decltype(isa)::value>(inputs, std::array{row_of<T>(work.output, row)}, begin, end,
                                     [](auto& in, auto& out, int64_t count)
                                         RELU_EXT_INLINE_LAMBDA { gated_loop(in[0], in[1], out[0], count); });
      });
    });
  });
}

void gated_backward(const GatedBackward& work, int64_t begin, int64_t end) {
  with_dtype(work.dtype, [&](auto element) {
    using T = decltype(element);
    vectorised<most_of<Effort::product, T>()>([&](auto isa) RELU_EXT_INLINE_LAMBDA {
      for_rows(work.columns, begin, end, [&](int64_t row, int64_t begin, int64_t end) RELU_EXT_INLINE_LAMBDA {
        gradients<decltype(isa)::value, T>(work, row, begin, end);
      });
    });
  });
}

}  // namespace relu_ext::cpu
