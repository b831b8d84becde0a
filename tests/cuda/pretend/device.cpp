// A device called "cuda" in a CPU build of torch, with host memory: device guard, streams, hooks and allocator, and
// those symbols of libc10_cuda that csrc/cuda/backend.cpp uses. What can go wrong unseen on a GPU is noted and told to
// Python: on which device and stream each kernel was launched, and blocks whose surroundings were written to.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "launch.h"

namespace pretend {
namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::kCUDA;
using c10::Stream;
using c10::StreamId;

constexpr DeviceIndex device_count = 2;  // with one, a missing device guard would not show

// As in CUDA, both belong to the thread.
thread_local DeviceIndex current_device = 0;
thread_local std::array<StreamId, device_count> current_streams{};

std::atomic<StreamId> last_stream = 0;

DeviceIndex checked(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < device_count, "CUDA error: invalid device ordinal ", int(index));
  return index;
}

Device with_index(Device device) {
  return Device(kCUDA, device.has_index() ? checked(device.index()) : current_device);
}

// The default stream of every device is null; any other's handle tells its device.
cudaStream_t handle(DeviceIndex device, StreamId id) {
  return id == 0 ? nullptr : reinterpret_cast<cudaStream_t>(id * device_count + device);
}
StreamId id_of(cudaStream_t stream) { return reinterpret_cast<StreamId>(stream) / device_count; }
bool is_of_current_device(cudaStream_t stream) {
  return stream == nullptr || reinterpret_cast<uintptr_t>(stream) % device_count == uintptr_t(current_device);
}

// Work is done when it is queued, so there is nothing to wait for.
struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return kCUDA; }
  DeviceIndex deviceCount() const noexcept override { return device_count; }

  Device getDevice() const override { return Device(kCUDA, current_device); }
  void setDevice(Device device) const override { current_device = checked(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current_device = device.index(); }
  Device exchangeDevice(Device device) const override {
    const Device before = getDevice();
    setDevice(device);
    return before;
  }

  Stream getStream(Device device) const override {
    device = with_index(device);
    return Stream(Stream::UNSAFE, device, current_streams[device.index()]);
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::DEFAULT, with_index(device)); }
  Stream getNewStream(Device device, int) const override {
    return Stream(Stream::UNSAFE, with_index(device), ++last_stream);
  }
  Stream getStreamFromGlobalPool(Device device, bool) const override { return getNewStream(device, 0); }
  Stream exchangeStream(Stream stream) const override {
    const Stream before = getStream(stream.device());
    current_streams[stream.device_index()] = stream.id();
    return before;
  }
  void* getStreamNativeHandle(Stream stream) const override { return handle(stream.device_index(), stream.id()); }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override {}
  void synchronizeDevice(DeviceIndex) const override {}

  void record(void**, const Stream&, DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// With these PyTorch takes CUDA for its accelerator: autograd gives it threads and follows its streams.
struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return device_count; }
  int getNumGPUs() const override { return device_count; }
  DeviceIndex current_device() const override { return pretend::current_device; }
  DeviceIndex getCurrentDevice() const override { return pretend::current_device; }
  void setCurrentDevice(DeviceIndex device) const override { pretend::current_device = checked(device); }
  DeviceIndex exchangeDevice(DeviceIndex device) const override {
    const DeviceIndex before = pretend::current_device;
    setCurrentDevice(device);
    return before;
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex device) const override {
    return device < 0 ? pretend::current_device : exchangeDevice(device);
  }
  void deviceSynchronize(DeviceIndex) const override {}
};

}  // namespace
}  // namespace pretend

// The registry makes class names from tokens, so it needs one without a namespace.
namespace at {
using PretendedHooks = pretend::Hooks;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, PretendedHooks)
}  // namespace at

namespace pretend {
namespace {

// Memory is poisoned, so that what nobody wrote is no number that a test expects (NaN equals NaN there), and has a
// fence on both sides, which is looked at when it is freed. Addresses are as even as the caching allocator's.
constexpr size_t fence = 512;
constexpr unsigned char poison = 0xa5;
std::atomic<int64_t> broken_fences = 0;

// A header that holds the size, fence, memory, fence.
void* allocate_memory(size_t bytes) {
  const size_t total = 3 * fence + bytes;
  auto* const header = static_cast<unsigned char*>(std::aligned_alloc(fence, (total + fence - 1) / fence * fence));
  TORCH_CHECK(header, "the pretended device is out of memory");
  std::memcpy(header, &bytes, sizeof(bytes));
  std::memset(header + fence, poison, total - fence);
  return header + 2 * fence;
}

void free_memory(void* memory) {
  const auto intact = [](const unsigned char* from) {
    return std::all_of(from, from + fence, [](unsigned char byte) { return byte == poison; });
  };
  auto* const begin = static_cast<unsigned char*>(memory);
  size_t bytes;
  std::memcpy(&bytes, begin - 2 * fence, sizeof(bytes));
  if (!intact(begin - fence) || !intact(begin + bytes)) ++broken_fences;
  std::memset(begin, poison, bytes);  // whoever still reads it gets no number that a test expects
  std::free(begin - 2 * fence);
}

[[noreturn]] void not_pretended() { TORCH_CHECK(false, "the pretended CUDA allocator has no such function"); }

// Not every release of torch knows all of these functions, so none says `override`.
struct Allocator final : c10::cuda::CUDACachingAllocator::CUDAAllocator {
  using Pool = c10::MempoolId_t;

  c10::DataPtr allocate(size_t bytes) {
    const Device device(kCUDA, current_device);
    void* const memory = bytes ? allocate_memory(bytes) : nullptr;
    return {memory, memory, &free_memory, device};
  }
  c10::DeleterFnPtr raw_deleter() const { return &free_memory; }
  void copy_data(void* to, const void* from, size_t bytes) const { std::memcpy(to, from, bytes); }
  std::string name() { return "pretended"; }
  bool initialized() { return true; }
  void init(int) {}
  bool isEnabled() const { return true; }
  void enable(bool) {}
  void emptyCache(Pool) {}
  void recordStream(const c10::DataPtr&, c10::cuda::CUDAStream) {}

  void* raw_alloc(size_t) { not_pretended(); }
  void* raw_alloc_with_stream(size_t, cudaStream_t) { not_pretended(); }
  void raw_delete(void*) { not_pretended(); }
  double getMemoryFraction(DeviceIndex) { not_pretended(); }
  void setMemoryFraction(double, DeviceIndex) { not_pretended(); }
  std::vector<c10::cuda::CUDACachingAllocator::StreamSegmentSize> getExpandableSegmentSizes(DeviceIndex) {
    not_pretended();
  }
  void cacheInfo(DeviceIndex, size_t*) { not_pretended(); }
  void* getBaseAllocation(void*, size_t*) { not_pretended(); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) { not_pretended(); }
  void resetAccumulatedStats(DeviceIndex) { not_pretended(); }
  void resetPeakStats(DeviceIndex) { not_pretended(); }
  c10::cuda::CUDACachingAllocator::SnapshotInfo snapshot(Pool, bool) { not_pretended(); }
  void beginAllocateToPool(DeviceIndex, Pool, std::function<bool(cudaStream_t)>) { not_pretended(); }
  void endAllocateToPool(DeviceIndex, Pool) { not_pretended(); }
  void releasePool(DeviceIndex, Pool) { not_pretended(); }
  c10::cuda::CUDACachingAllocator::ShareableHandle shareIpcHandle(void*) { not_pretended(); }
  std::shared_ptr<void> getIpcDevPtr(std::string) { not_pretended(); }
  void recordHistory(bool, c10::cuda::CUDACachingAllocator::CreateContextFn, size_t,
                     c10::cuda::CUDACachingAllocator::RecordContext, bool, const std::vector<std::string>&) {
    not_pretended();
  }
  void attachOutOfMemoryObserver(c10::cuda::CUDACachingAllocator::OutOfMemoryObserver) { not_pretended(); }
  void attachOomRejectionObserver(std::function<void(int64_t, size_t, size_t, size_t)>) { not_pretended(); }
  void attachAllocatorTraceTracker(c10::cuda::CUDACachingAllocator::AllocatorTraceTracker) { not_pretended(); }
  void enablePeerAccess(DeviceIndex, DeviceIndex) { not_pretended(); }
  cudaError_t memcpyAsync(void*, int, const void*, int, size_t, cudaStream_t, bool) { not_pretended(); }
  std::shared_ptr<c10::cuda::CUDACachingAllocator::AllocatorState> getCheckpointState(DeviceIndex, Pool) {
    not_pretended();
  }
  c10::cuda::CUDACachingAllocator::CheckpointDelta setCheckpointPoolState(
      DeviceIndex, std::shared_ptr<c10::cuda::CUDACachingAllocator::AllocatorState>) {
    not_pretended();
  }
};

Allocator allocator_of_host_memory;
[[maybe_unused]] const bool allocator_is_set = [] {
  c10::SetAllocator(kCUDA, &allocator_of_host_memory);
  return true;
}();

std::mutex launches_mutex;
std::vector<std::vector<int64_t>> launches;
std::atomic<bool> refuses_next = false;

TORCH_LIBRARY(pretend, library) {
  library.def("device_count", [] { return int64_t(device_count); });
  // Of every launch since the last question: device, stream.
  library.def("take_launches", [] {
    const std::lock_guard<std::mutex> lock(launches_mutex);
    return std::exchange(launches, {});
  });
  library.def("refuse_next_launch", [] { refuses_next = true; });
  // How many blocks of memory, among those freed since the last question, were written past an end.
  library.def("take_broken_fences", [] { return broken_fences.exchange(0); });
}

}  // namespace

cudaError_t before_launch(cudaStream_t stream) {
  if (refuses_next.exchange(false)) return cudaErrorInvalidConfiguration;
  if (!is_of_current_device(stream)) return cudaErrorInvalidResourceHandle;
  const std::lock_guard<std::mutex> lock(launches_mutex);
  launches.push_back({current_device, id_of(stream)});
  return cudaSuccess;
}

}  // namespace pretend

cudaError_t cudaMemGetInfo(size_t*, size_t*) { return cudaErrorNotSupported; }

namespace c10::cuda {

namespace CUDACachingAllocator {
std::atomic<CUDAAllocator*> allocator = &pretend::allocator_of_host_memory;
}

CUDAStream getCurrentCUDAStream(DeviceIndex index) {
  return CUDAStream(pretend::Guard{}.getStream(c10::Device(c10::kCUDA, index)));
}

cudaStream_t CUDAStream::stream() const { return pretend::handle(device_index(), id()); }

void c10_cuda_check_implementation(int32_t error, const char* file, const char* function, uint32_t line, bool) {
  if (error == cudaSuccess) return;
  throw AcceleratorError({function, file, line}, error, c10::str("CUDA error: ", error));
}

}  // namespace c10::cuda
