#pragma once
#include <cuda_runtime_api.h>

namespace pretend {

// Notes a launch on this stream of the current device. An error where the stream is another device's, or once if a test
// has asked for one.
__attribute__((visibility("default"))) cudaError_t before_launch(cudaStream_t);

}  // namespace pretend
