// The project's launchers and kernels, unchanged, over the emulated CUDA language; every launch is shown to the
// pretended device before it runs.
#include <cuda_runtime.h>

#include "launch.h"

namespace relu_ext::cuda {

// The launchers find this before CUDA's function. An object, because a function would be found together with that one.
inline constexpr auto cudaLaunchKernel = [](auto kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                                            cudaStream_t stream) {
  const cudaError_t error = pretend::before_launch(stream);
  return error ? error : ::cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
};

}  // namespace relu_ext::cuda

#include "../../../csrc/cuda/fused.cu"
#include "../../../csrc/cuda/gated.cu"
#include "../../../csrc/cuda/kernels.cu"
#include "../../../csrc/cuda/monitor.cu"
#include "../../../csrc/cuda/prelu.cu"
