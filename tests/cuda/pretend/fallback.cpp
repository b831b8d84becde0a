// Every ATen operator for CUDA tensors, by PyTorch's CPU kernels: arguments become CPU tensors over the same memory,
// results CUDA tensors over what the CPU kernel allocated.
#include <ATen/EmptyTensor.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::IValue;
using c10::Storage;
using c10::StorageImpl;

constexpr c10::DispatchKeySet host_keys(c10::DispatchKey::CPU);
constexpr c10::DispatchKeySet device_keys(c10::DispatchKey::CUDA);

// Numbers that are there in the reading only: they belong to a tensor, wherever it is.
constexpr c10::DispatchKeySet lazy_keys({c10::DispatchKey::Conjugate, c10::DispatchKey::Negative,
                                         c10::DispatchKey::ZeroTensor});

// A tensor of that storage with the shape and strides of this one.
template <class... Kind>
Tensor over(const Storage& storage, c10::DispatchKeySet keys, const Tensor& like, Kind... kind) {
  keys = (keys - lazy_keys) | (like.key_set() & lazy_keys);
  Tensor tensor = at::detail::make_tensor<c10::TensorImpl>(kind..., Storage(storage), keys, like.dtype());
  tensor.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return tensor;
}

Storage storage_over(c10::DataPtr memory, size_t bytes, c10::Allocator* allocator) {
  return Storage(Storage::use_byte_size_t(), bytes, std::move(memory), allocator, /*resizable=*/true);
}

// A storage's memory under another device's name.
c10::DataPtr renamed(const Storage& storage, Device device) {
  return {storage.mutable_data(), new Storage(storage), [](void* kept) { delete static_cast<Storage*>(kept); }, device};
}

// One call of an operator.
class Call {
 public:
  Call(const c10::OperatorHandle& op, torch::jit::Stack* stack) : op_(op), stack_(*stack) {}

  void run() {
    const auto& arguments = op_.schema().arguments();
    const size_t first = stack_.size() - arguments.size();
    find_device(first);
    const c10::OptionalDeviceGuard guard(device_);
    for (size_t i = first; i < stack_.size(); ++i) {
      const auto* const alias = arguments[i - first].alias_info();
      if (alias && alias->isWrite()) visit(stack_[i], [](const Tensor& tensor) { tensor.storage().mutable_data(); });
      stack_[i] = to_host(stack_[i]);
    }
    {
      const at::AutoDispatchBelowADInplaceOrView below_autograd;
      op_.redispatchBoxed(host_keys, &stack_);
    }
    for (const auto& [host, device] : tensors_)
      if (device.is_cuda()) follow(host, device);
    for (size_t i = stack_.size() - op_.schema().returns().size(); i < stack_.size(); ++i)
      stack_[i] = to_device(stack_[i]);
  }

 private:
  // The device of the call: the one asked for, if it makes a tensor, else that of its tensors.
  void find_device(size_t first) {
    const auto each_tensor = [&](auto body) {
      for (size_t i = first; i < stack_.size(); ++i) visit(stack_[i], body);
    };
    for (size_t i = first; i < stack_.size(); ++i)
      if (stack_[i].isDevice()) asked_ = stack_[i].toDevice();
    if (asked_ && asked_->is_cuda())
      device_ = asked_->has_index() ? *asked_ : c10::impl::VirtualGuardImpl(c10::kCUDA).getDevice();
    each_tensor([&](const Tensor& tensor) {
      if (tensor.is_cuda() && !device_) device_ = tensor.device();
    });
    if (device_) each_tensor([&](const Tensor& tensor) { check_device(tensor); });
  }

  template <class Body>
  static void visit(const IValue& value, Body body) {
    if (value.isTensor() && value.toTensor().defined()) return body(value.toTensor());
    if (value.isList())
      for (const IValue& item : value.toListRef()) visit(item, body);
  }

  // As on a GPU: one device, but for copies and numbers, and for the indices of an indexing.
  void check_device(const Tensor& tensor) {
    const std::string_view name = op_.schema().name();
    const bool may_be_elsewhere = tensor.is_cpu() && (tensor.dim() == 0 || name.find("index") != name.npos);
    TORCH_CHECK(may_be_elsewhere || name == "aten::copy_" || tensor.device() == *device_,
                "Expected all tensors to be on the same device, but found at least two devices, ", *device_, " and ",
                tensor.device(), " (when checking arguments of ", name, ")");
  }

  // Only what is written leaves copy-on-write memory, so the argument has done that by now.
  Storage to_host(const Storage& storage) {
    if (storage.device_type() != c10::kCUDA) return storage;
    auto& host = hosts_[storage.unsafeGetStorageImpl()];
    if (!host) {
      host = storage_over({const_cast<void*>(storage.data()), c10::kCPU}, storage.nbytes(), c10::GetCPUAllocator());
      devices_.insert_or_assign(host.unsafeGetStorageImpl(), storage);
    }
    return host;
  }

  Tensor to_host(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    for (const auto& [host, device] : tensors_)
      if (device.is_same(tensor)) return host;
    if (!tensor.is_cuda()) return tensors_.emplace_back(tensor, tensor).first;
    Tensor host = over(to_host(tensor.storage()), host_keys, tensor);
    if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) host.unsafeGetTensorImpl()->set_wrapped_number(true);
    tensors_.emplace_back(host, tensor);
    return host;
  }

  IValue to_host(const IValue& value) {
    if (value.isTensor()) return to_host(value.toTensor());
    if (value.isStorage()) return to_host(value.toStorage());
    if (value.isDevice() && value.toDevice().is_cuda()) return Device(c10::kCPU);
    TORCH_CHECK(!value.isGenerator() || asked_cpu(), "Expected a 'cuda' device type for generator but found 'cpu'");
    if (!value.isList() || !holds_tensors(value)) return value;
    auto list = value.toList().copy();
    for (size_t i = 0; i < list.size(); ++i) list.set(i, to_host(list.get(i)));
    return list;
  }

  static bool holds_tensors(const IValue& list) {
    const auto element = list.toList().elementType();
    return element->isSubtypeOf(*at::OptionalType::ofTensor());
  }

  // What a call has done to its argument's storage, shape or strides (resize_, set_, out=).
  void follow(const Tensor& host, const Tensor& device) {
    const Storage storage = to_device(host.storage());
    auto* const impl = device.unsafeGetTensorImpl();
    if (storage.unsafeGetStorageImpl() != device.storage().unsafeGetStorageImpl())
      impl->set_storage_keep_dtype(storage);
    if (host.sizes() != device.sizes() || host.strides() != device.strides() ||
        host.storage_offset() != device.storage_offset())
      impl->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
  }

  Storage to_device(const Storage& host) {
    const auto found = devices_.find(host.unsafeGetStorageImpl());
    if (found == devices_.end()) {
      return devices_[host.unsafeGetStorageImpl()] =
                 storage_over(renamed(host, *device_), host.nbytes(), c10::GetAllocator(c10::kCUDA));
    }
    const Storage& device = found->second;
    if (device.data() != host.data()) device.set_data_ptr(renamed(host, device.device()));  // it was resized
    device.set_nbytes(host.nbytes());
    return device;
  }

  Tensor to_device(const Tensor& host) {
    if (!host.defined() || asked_cpu()) return host;
    for (const auto& [ours, device] : tensors_)
      if (ours.is_same(host)) return device;
    const Storage storage = to_device(host.storage());
    for (const auto& [ours, device] : tensors_)  // of a view PyTorch expects the keys of what it views
      if (device.is_cuda() && device.storage().is_alias_of(storage))
        return over(storage, device.key_set(), host, c10::TensorImpl::VIEW);
    return over(storage, device_keys, host);
  }

  IValue to_device(const IValue& value) {
    if (value.isTensor()) return to_device(value.toTensor());
    if (!value.isList() || !holds_tensors(value)) return value;
    auto list = value.toList().copy();
    for (size_t i = 0; i < list.size(); ++i) list.set(i, to_device(list.get(i)));
    return list;
  }

  bool asked_cpu() const { return asked_ && asked_->is_cpu(); }

  const c10::OperatorHandle& op_;
  torch::jit::Stack& stack_;
  std::optional<Device> device_;
  std::optional<Device> asked_;
  std::unordered_map<const StorageImpl*, Storage> hosts_;    // by the device's storage
  std::unordered_map<const StorageImpl*, Storage> devices_;  // by the host's
  std::vector<std::pair<Tensor, Tensor>> tensors_;           // host, device
};

Tensor empty(c10::SymIntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
             std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(sizes), c10::GetAllocator(c10::kCUDA), device_keys,
                                   c10::dtype_or_default(dtype), format);
}

Tensor empty_strided(c10::SymIntArrayRef sizes, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
                     std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  const c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(sizes), C10_AS_INTARRAYREF_SLOW(stride),
                                           c10::GetAllocator(c10::kCUDA), device_keys, c10::dtype_or_default(dtype));
}

void on_host(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  TORCH_CHECK_NOT_IMPLEMENTED(op.schema().getNamespace() == "aten", "Could not run '", op.operator_name(),
                              "' with arguments from the 'CUDA' backend.");
  Call(op, stack).run();
}

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&on_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  // These have one kernel for all devices, which looks for a GPU's code inside.
  for (const char* name : {"copy_", "convolution", "convolution_backward"})
    library.impl(name, torch::CppFunction::makeFromBoxedFunction<&on_host>());
  // Fresh memory is the device's own wherever a tensor is made for its own sake.
  library.impl("empty.memory_format", empty);
  library.impl("empty_strided", empty_strided);
}

}  // namespace
