// The CUDA backend's launchers: plain pointers to device memory, no torch.
#pragma once
#include <cuda_runtime_api.h>

#include "../kernels.h"

namespace relu_ext::cuda {

// Elements 0 to numel - 1, by one kernel on this stream of the current device; by none where there are no elements.
// Nothing waits for it. Returns what the launch returned.
cudaError_t forward(const Forward&, int64_t numel, cudaStream_t);
cudaError_t backward(const Backward&, int64_t numel, cudaStream_t);
cudaError_t gated(const Gated&, int64_t numel, cudaStream_t);
cudaError_t gated_backward(const GatedBackward&, int64_t numel, cudaStream_t);
cudaError_t prelu(const Prelu&, int64_t numel, cudaStream_t);
cudaError_t fused(const Fused&, int64_t numel, cudaStream_t);
cudaError_t count(const Count&, int64_t numel, cudaStream_t);  // bits: at a multiple of 4 bytes
cudaError_t find_nonfinite(const NonFinite&, int64_t numel, cudaStream_t);

// By two kernels where sums over channels are wanted: grad_weight, grad_scale, grad_shift. By none where nothing is.
// workspace: so many bytes, at a multiple of 16, which later work on the stream may write again.
int64_t prelu_workspace(const PreluBackward&, int64_t numel);
cudaError_t prelu_backward(const PreluBackward&, int64_t numel, void* workspace, cudaStream_t);
int64_t fused_workspace(const FusedBackward&, int64_t numel);
cudaError_t fused_backward(const FusedBackward&, int64_t numel, void* workspace, cudaStream_t);

}  // namespace relu_ext::cuda
