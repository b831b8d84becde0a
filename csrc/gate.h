// The gate: which road a tensor takes. Decided from the dispatcher's own key computation, so whatever PyTorch does to a
// call (subclasses, functorch, tracing, quantisation, ...) is seen here as a key that does not belong, and left to
// PyTorch.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <algorithm>
#include <initializer_list>
#include <optional>

#include "backend.h"
#include "operations.h"

namespace relu_ext {

enum class Road {
  kernel,      // plain: the kernels, called directly
  operators,   // plain, inside of modes that watch or of transforms of other tensors: the registered operators
  definition,  // all else: the line of ATen that defines the operation
};

inline std::optional<Dtype> dtype_of(const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Dtype::float32;
    case at::kDouble: return Dtype::float64;
    case at::kHalf: return Dtype::float16;
    case at::kBFloat16: return Dtype::bfloat16;
    default: return std::nullopt;
  }
}

// The keys that c10::Dispatcher would find for a call with this tensor in this thread.
inline c10::DispatchKeySet effective_keys(const at::Tensor& tensor) {
  const auto thread = c10::impl::tls_local_dispatch_key_set();
  return (tensor.key_set() | thread.included_) - thread.excluded_;
}

namespace keys {
using c10::DispatchKey;
using c10::DispatchKeySet;

// Autograd is ours to honour (records_history, increment_version). Autocast: most operations have no rule for it.
inline constexpr DispatchKeySet ours({DispatchKey::ADInplaceOrView, DispatchKey::BackendSelect,
                                      DispatchKey::AutogradFunctionality, DispatchKey::AutocastCPU,
                                      DispatchKey::AutocastCUDA});
inline constexpr DispatchKeySet autocast({DispatchKey::AutocastCPU, DispatchKey::AutocastCUDA});
// What a thread carries inside of dispatch modes and functorch transforms, also for tensors that have no part in them.
inline constexpr DispatchKeySet modes({DispatchKey::Python, DispatchKey::PythonTLSSnapshot,
                                       DispatchKey::FuncTorchDynamicLayerFrontMode,
                                       DispatchKey::FuncTorchDynamicLayerBackMode, DispatchKey::FuncTorchVmapMode,
                                       DispatchKey::VmapMode});
inline constexpr DispatchKeySet autograd(DispatchKey::AutogradFunctionality);
inline constexpr DispatchKeySet inplace(DispatchKey::ADInplaceOrView);
inline constexpr DispatchKeySet dense_cpu(DispatchKey::CPU);
inline constexpr DispatchKeySet dense_cuda(DispatchKey::CUDA);
}  // namespace keys

// Nothing but the dense backend of a device that this build has kernels for?
inline bool is_plain(c10::DispatchKeySet effective) {
  return effective == keys::dense_cpu || (cuda::built && effective == keys::dense_cuda);
}

// Modes that trace (fake, proxy, functional) have a slot of their own in PyTorch; all others only watch.
inline bool modes_only_watch() {
  using c10::impl::TorchDispatchModeKey;
  using c10::impl::TorchDispatchModeTLS;
  for (int key = 0; key < int(TorchDispatchModeKey::NUM_MODE_KEYS); ++key)
    if (TorchDispatchModeTLS::get_mode(TorchDispatchModeKey(key))) return false;
  return true;
}

// For a tensor whose effective keys these are. The memory's layout is the caller's question.
inline Road road(const at::Tensor& tensor, c10::DispatchKeySet effective) {
  const auto rest = effective - keys::ours;
  const bool plain = is_plain(rest);
  // Inside of a transform the thread excludes keys that are the tensor's nevertheless.
  if (!plain && (!is_plain(rest - keys::modes) || !is_plain(tensor.key_set() - keys::ours) || !modes_only_watch()))
    return Road::definition;
  if (!dtype_of(tensor)) return Road::definition;
  if (tensor._fw_grad(/*level=*/0).defined()) return Road::definition;  // a dual tensor has no key of its own
  return plain ? Road::kernel : Road::operators;
}

// Does PyTorch record a call with this tensor in the autograd graph?
inline bool records_history(const at::Tensor& tensor, c10::DispatchKeySet effective) {
  return effective.has_any(keys::autograd) && c10::GradMode::is_enabled() && tensor.requires_grad();
}

// The road of a call with several tensors, which must be alike, and whether PyTorch records it. Those that are
// undefined are not there.
struct Way {
  Road road = Road::kernel;
  bool history = false;
};
inline Way way_of(const Operation& operation, std::initializer_list<const at::Tensor*> tensors) {
  const at::Tensor& first = **tensors.begin();
  Way way;
  for (const at::Tensor* tensor : tensors) {
    if (!tensor->defined()) continue;
    const auto effective = effective_keys(*tensor);
    if (operation.autocast && effective.has_any(keys::autocast)) return {Road::definition};
    const Road own = road(*tensor, effective);
    if (own == Road::definition || tensor->scalar_type() != first.scalar_type() || tensor->device() != first.device())
      return {Road::definition};
    if (own == Road::operators) way.road = own;
    way.history = way.history || records_history(*tensor, effective);
  }
  return way;
}

// May a kernel make a gradient, one that PyTorch does not record, of grad and of what was saved?
inline bool all_plain(const at::Tensor& grad, at::ArrayRef<at::Tensor> saved) {
  const auto effective = effective_keys(grad);
  if (road(grad, effective) != Road::kernel || records_history(grad, effective)) return false;
  return std::all_of(saved.begin(), saved.end(), [&](const at::Tensor& tensor) {
    const auto own = effective_keys(tensor);
    return own - keys::ours == effective - keys::ours && !records_history(tensor, own);
  });
}

}  // namespace relu_ext
