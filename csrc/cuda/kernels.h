// The CUDA backend's launchers: plain pointers to device memory, no torch.
#pragma once
#include <cuda_runtime_api.h>

#include "../kernels.h"

namespace relu_ext::cuda {

// Elements 0 to numel - 1, by one kernel on this stream of the current device; by none where there are no elements.
// Nothing waits for it. Returns what the launch returned.
cudaError_t forward(const Forward&, int64_t numel, cudaStream_t);
cudaError_t backward(const Backward&, int64_t numel, cudaStream_t);

}  // namespace relu_ext::cuda
