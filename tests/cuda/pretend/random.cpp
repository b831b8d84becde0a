// Random numbers for the pretended device: torch's generator of the CPU, in the place of csrc/cuda/random.cpp.
#include "cuda/random.h"

#include <ATen/CPUGeneratorImpl.h>

#include <mutex>

namespace relu_ext::cuda {

Stream next_stream(const std::optional<at::Generator>& generator) {
  TORCH_CHECK(!generator, "Expected a 'cuda' device type for generator but found 'cpu'");
  auto* const own = at::get_generator_or_default<at::CPUGeneratorImpl>({}, at::detail::getDefaultCPUGenerator());
  const std::lock_guard<std::mutex> lock(own->mutex_);
  return {own->random64(), 0, nullptr, nullptr};
}

}  // namespace relu_ext::cuda
