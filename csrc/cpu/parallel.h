// The CPU backend on all threads of torch's pool.
#pragma once
#include "../kernels.h"

namespace relu_ext::cpu {

void parallel_forward(const Forward&, int64_t numel);
void parallel_backward(const Backward&, int64_t numel);

}  // namespace relu_ext::cpu
