// The launchers and the emulator's record of launches, with a C interface.
#include "cuda/kernels.cu"

#include <cuda_runtime.h>

using namespace relu_ext;

extern "C" {

int kernels_forward(int activation, const double* scalars, int dtype, const void* input, void* output, uint8_t* bits,
                    int64_t numel, cudaStream_t stream) {
  const Forward work{Activation(activation), {scalars[0], scalars[1]}, Dtype(dtype), input, output, bits};
  return cuda::forward(work, numel, stream);
}

int kernels_backward(int activation, const double* scalars, int dtype, const void* grad, const uint8_t* bits,
                     void* output, int64_t numel, cudaStream_t stream) {
  const Backward work{Activation(activation), {scalars[0], scalars[1]}, Dtype(dtype), grad, bits, output};
  return cuda::backward(work, numel, stream);
}

int64_t emulator_launches() { return emulator::launches; }
const emulator::Launch* emulator_last_launch() { return &emulator::last_launch; }

void emulator_run_all_blocks() { emulator::only_blocks.reset(); }
void emulator_run_only(const uint64_t* blocks, uint64_t count) {
  emulator::only_blocks.emplace(blocks, blocks + count);
}
}
