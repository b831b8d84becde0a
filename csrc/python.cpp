// What Python sees: for every row of the table NAME(input, inplace) and NAME_(input), which return NotImplemented where
// the operation's ATen line must run instead; and the facts of this build.
//
// The entries use the C API: every call of a layer goes through them, and pybind11 would add to its time.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <utility>

#include "autograd.h"
#include "cpu/isa.h"

namespace py = pybind11;

namespace relu_ext {
namespace {

// torch.set_default_device() leaves this function mode on for good. It concerns calls that make tensors, not ours.
bool is_device_context(PyObject* mode) {
  static const py::object type = py::object(py::module_::import("torch.utils._device").attr("DeviceContext"));
  return reinterpret_cast<PyObject*>(Py_TYPE(mode)) == type.ptr();
}

bool function_modes_allow() {
  if (!at::impl::torch_function_mode_enabled()) return true;
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t i = 0; i < Modes::stack_len(); ++i)
    if (!is_device_context(Modes::get_stack_at(i)->ptr(getPyInterpreter()))) return false;
  return true;
}

// Below this many elements a CPU kernel ends sooner than other threads could use the interpreter lock. A call on a GPU
// may always wait, for memory.
constexpr int64_t short_work = 4096;

template <class Call>
auto without_gil(const at::Tensor& input, Call call) {
  std::optional<py::gil_scoped_release> release;
  if (input.numel() > short_work || !input.is_cpu()) release.emplace();
  return call();
}

// Both give nullptr where the operation's ATen line must run.
PyObject* call(const Operation& operation, PyObject* input) {
  if (!THPVariable_CheckExact(input) || !function_modes_allow()) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(input);
  auto output = without_gil(tensor, [&] { return apply(operation, tensor); });
  return output ? THPVariable_Wrap(std::move(*output)) : nullptr;
}
PyObject* call_(const Operation& operation, PyObject* input) {
  if (!THPVariable_CheckExact(input) || !function_modes_allow()) return nullptr;
  const at::Tensor& tensor = THPVariable_Unpack(input);
  return without_gil(tensor, [&] { return apply_(operation, tensor); }) ? Py_NewRef(input) : nullptr;
}

// NAME(input, inplace). An inplace that is no bool (a symbol of torch.fx, say) is left to the ATen line.
template <size_t row>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  PyObject* output = nullptr;
  if (count == 2 && args[1] == Py_False) output = call(operations[row], args[0]);
  if (count == 2 && args[1] == Py_True) output = call_(operations[row], args[0]);
  if (output) return output;
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

// NAME_(input).
template <size_t row>
PyObject* entry_(PyObject*, PyObject* input) {
  HANDLE_TH_ERRORS
  if (PyObject* output = call_(operations[row], input)) return output;
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

template <size_t... rows>
PyMethodDef* methods(std::index_sequence<rows...>) {
  static const std::string names_[] = {std::string(operations[rows].name) + "_" ...};
  static PyMethodDef table[] = {
      {operations[rows].name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(entry<rows>)), METH_FASTCALL,
       nullptr}...,
      {names_[rows].c_str(), entry_<rows>, METH_O, nullptr}...,
      {nullptr, nullptr, 0, nullptr}};
  return table;
}

py::list isas_up_to(Isa last) {
  py::list names;
  for (const Isa isa : compiled_isas)
    if (isa <= last) names.append(name(isa));
  return names;
}

}  // namespace
}  // namespace relu_ext

PYBIND11_MODULE(_C, module) {
  using namespace relu_ext;
  const char* const wanted = std::getenv("RELU_EXT_ISA");
  if (wanted && *wanted) set_isa(wanted);  // a throw here is an ImportError with its text
  PyModule_AddFunctions(module.ptr(), methods(std::make_index_sequence<operations.size()>{}));
  module.def("isas_compiled", [] { return isas_up_to(Isa::avx512); });
  module.def("isas_supported", [] { return isas_up_to(best_isa()); });
  module.def("isa", [] { return name(chosen_isa()); });
  module.def("set_isa", [](const std::string& name) { set_isa(name.c_str()); });
}
