// Where a call's random numbers come from.
#pragma once
#include <ATen/core/Generator.h>

#include <optional>

#include "../kernels.h"

namespace relu_ext::cuda {

// Of this generator, or of the current device's. May be captured in a CUDA graph, each replay of which has others.
Stream next_stream(const std::optional<at::Generator>&);

}  // namespace relu_ext::cuda
