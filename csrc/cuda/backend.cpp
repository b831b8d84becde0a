// CUDA for the torch-facing code: memory of PyTorch's caching allocator, kernels on its current stream. Nothing here
// waits for the device, so all of it may be captured in a CUDA graph.
#include "../backend.h"

#include <ATen/EmptyTensor.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels.h"
#include "random.h"

namespace relu_ext::cuda {
namespace {

constexpr c10::DispatchKeySet keys(c10::DispatchKey::CUDA);

at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, at::MemoryFormat format) {
  return at::Tensor(at::detail::empty_generic(sizes, c10::cuda::CUDACachingAllocator::get(), keys, dtype, format));
}

at::Tensor empty_strided(at::IntArrayRef sizes, at::IntArrayRef stride, at::ScalarType dtype) {
  return at::Tensor(
      at::detail::empty_strided_generic(sizes, stride, c10::cuda::CUDACachingAllocator::get(), keys, dtype));
}

template <class Work, cudaError_t (*launch)(const Work&, int64_t, cudaStream_t)>
void queue(const Work& work, int64_t numel) {
  C10_CUDA_CHECK(launch(work, numel, c10::cuda::getCurrentCUDAStream()));
}

// With a workspace.
template <class Work, int64_t (*bytes)(const Work&, int64_t),
          cudaError_t (*launch)(const Work&, int64_t, void*, cudaStream_t)>
void queue_sums(const Work& work, int64_t numel) {
  const at::Tensor workspace = empty({bytes(work, numel)}, at::kByte, at::MemoryFormat::Contiguous);
  C10_CUDA_CHECK(launch(work, numel, workspace.mutable_data_ptr(), c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

const Backend backend{empty,
                      empty_strided,
                      queue<Forward, forward>,
                      queue<Backward, backward>,
                      queue<Gated, gated>,
                      queue<GatedBackward, gated_backward>,
                      queue<Prelu, prelu>,
                      queue_sums<PreluBackward, prelu_workspace, prelu_backward>,
                      queue<Fused, fused>,
                      queue_sums<FusedBackward, fused_workspace, fused_backward>,
                      queue<Count, count>,
                      queue<NonFinite, find_nonfinite>,
                      next_stream};

}  // namespace relu_ext::cuda
