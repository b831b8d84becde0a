// The launchers and the emulator's record of launches, with a C interface.
#include "cuda/kernels.h"

#include <cuda_runtime.h>

using namespace relu_ext;

extern "C" {

int kernels_forward(const Forward& work, int64_t numel, cudaStream_t stream) {
  return cuda::forward(work, numel, stream);
}
int kernels_backward(const Backward& work, int64_t numel, cudaStream_t stream) {
  return cuda::backward(work, numel, stream);
}
int kernels_gated(const Gated& work, int64_t numel, cudaStream_t stream) { return cuda::gated(work, numel, stream); }
int kernels_gated_backward(const GatedBackward& work, int64_t numel, cudaStream_t stream) {
  return cuda::gated_backward(work, numel, stream);
}
int kernels_prelu(const Prelu& work, int64_t numel, cudaStream_t stream) { return cuda::prelu(work, numel, stream); }
int64_t kernels_prelu_workspace(const PreluBackward& work, int64_t numel) { return cuda::prelu_workspace(work, numel); }
int kernels_prelu_backward(const PreluBackward& work, int64_t numel, void* workspace, cudaStream_t stream) {
  return cuda::prelu_backward(work, numel, workspace, stream);
}
int kernels_fused(const Fused& work, int64_t numel, cudaStream_t stream) { return cuda::fused(work, numel, stream); }
int64_t kernels_fused_workspace(const FusedBackward& work, int64_t numel) { return cuda::fused_workspace(work, numel); }
int kernels_fused_backward(const FusedBackward& work, int64_t numel, void* workspace, cudaStream_t stream) {
  return cuda::fused_backward(work, numel, workspace, stream);
}
int kernels_count(const Count& work, int64_t numel, cudaStream_t stream) { return cuda::count(work, numel, stream); }
int kernels_find_nonfinite(const NonFinite& work, int64_t numel, cudaStream_t stream) {
  return cuda::find_nonfinite(work, numel, stream);
}

int64_t emulator_launches() { return emulator::launches; }
const emulator::Launch* emulator_last_launch() { return &emulator::last_launch; }

void emulator_run_all_blocks() { emulator::only_blocks.reset(); }
void emulator_run_only(const uint64_t* blocks, uint64_t count) {
  emulator::only_blocks.emplace(blocks, blocks + count);
}
}
