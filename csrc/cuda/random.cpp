// Random numbers of PyTorch's CUDA generators.
#include "random.h"

#include <ATen/cuda/CUDAGeneratorImpl.h>

#include <mutex>

namespace relu_ext::cuda {
namespace {

// Philox counters of ATen's kernels have the number of a thread where ours have the offset; none has this bit.
constexpr uint64_t ours = uint64_t(1) << 63;
constexpr uint64_t increment = 4;  // what the generator counts in

}  // namespace

Stream next_stream(const std::optional<at::Generator>& generator) {
  auto* const own =
      at::get_generator_or_default<at::CUDAGeneratorImpl>(generator, at::cuda::detail::getDefaultCUDAGenerator());
  const std::lock_guard<std::mutex> lock(own->mutex_);
  const at::PhiloxCudaState state = own->philox_cuda_state(increment);
  if (state.captured_) return {0, ours + state.offset_intragraph_, state.seed_.ptr, state.offset_.ptr};
  return {state.seed_.val, ours + state.offset_.val, nullptr, nullptr};
}

}  // namespace relu_ext::cuda
