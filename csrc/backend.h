// What a device does for the torch-facing code: a table of functions for each. Below launch.cpp nothing else differs.
#pragma once
#include <ATen/core/Generator.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "kernels.h"

namespace relu_ext {

struct Backend {
  // Uninitialised memory of the current device.
  at::Tensor (*empty)(at::IntArrayRef sizes, at::ScalarType, at::MemoryFormat);
  at::Tensor (*empty_strided)(at::IntArrayRef sizes, at::IntArrayRef stride, at::ScalarType);
  // Elements 0 to numel - 1, in the current device's memory. On return the work is done or in its current queue.
  void (*forward)(const Forward&, int64_t numel);
  void (*backward)(const Backward&, int64_t numel);
  void (*gated)(const Gated&, int64_t numel);
  void (*gated_backward)(const GatedBackward&, int64_t numel);
  void (*prelu)(const Prelu&, int64_t numel);
  void (*prelu_backward)(const PreluBackward&, int64_t numel);
  void (*fused)(const Fused&, int64_t numel);
  void (*fused_backward)(const FusedBackward&, int64_t numel);
  void (*count)(const Count&, int64_t numel);
  void (*find_nonfinite)(const NonFinite&, int64_t numel);
  // Numbers that no other call has had, of this generator or the device's own. Throws for one of another device.
  Stream (*next_stream)(const std::optional<at::Generator>&);
};

namespace cpu {
extern const Backend backend;
}

namespace cuda {
#ifdef RELU_EXT_CUDA
inline constexpr bool built = true;
#else
inline constexpr bool built = false;
#endif
extern const Backend backend;  // defined where built
}  // namespace cuda

inline const Backend& backend_of(const at::Tensor& tensor) {
  if constexpr (cuda::built)
    if (tensor.is_cuda()) return cuda::backend;
  return cpu::backend;
}

}  // namespace relu_ext
