// What Python sees: for every row of the table NAME(tensors..., scalars..., inplace) and NAME_(input, scalars...),
// which return NotImplemented where the operation's ATen line must run instead; and the facts of this build.
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
#include <vector>

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

// An int beyond this is not a double, and a bool no number.
constexpr long long exact_in_double = 1ll << 53;

std::optional<double> number(PyObject* object) {
  if (PyFloat_CheckExact(object)) return PyFloat_AS_DOUBLE(object);
  if (!PyLong_CheckExact(object)) return std::nullopt;
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(object, &overflow);
  if (overflow || value > exact_in_double || value < -exact_in_double) return std::nullopt;
  return double(value);
}

// The operation with the scalars that a caller gives; nullopt where one is no plain number, or where ATen has an error.
std::optional<Bound> bind(const Operation& operation, PyObject* const* scalars) {
  Scalars given;
  for (int i = 0; i < operation.arguments; ++i) {
    const auto value = number(scalars[i]);
    if (!value) return std::nullopt;
    given[i] = *value;
  }
  return relu_ext::bind(operation, given.data());
}

std::optional<at::Tensor> apply(const Bound& bound, const at::Tensor& first, const at::Tensor& second) {
  return bound.operation->form == Form::gated ? apply_reglu(bound, first, second) : apply_prelu(bound, first, second);
}

// Both give nullptr where the operation's ATen line must run. args: the tensors and the scalars.
template <size_t row>
PyObject* call(PyObject* const* args) {
  constexpr const Operation& operation = operations[row];
  constexpr int tensors = tensors_of(operation.form);
  for (int i = 0; i < tensors; ++i)
    if (!THPVariable_CheckExact(args[i])) return nullptr;
  if (!function_modes_allow()) return nullptr;
  const auto bound = bind(operation, args + tensors);
  if (!bound) return nullptr;
  const at::Tensor& input = THPVariable_Unpack(args[0]);
  auto output = without_gil(input, [&] {
    if constexpr (tensors == 1)
      return apply(*bound, input);
    else
      return apply(*bound, input, THPVariable_Unpack(args[1]));
  });
  return output ? THPVariable_Wrap(std::move(*output)) : nullptr;
}
template <size_t row>
PyObject* call_(PyObject* const* args) {
  if (!THPVariable_CheckExact(args[0]) || !function_modes_allow()) return nullptr;
  const auto bound = bind(operations[row], args + 1);
  if (!bound) return nullptr;
  const at::Tensor& input = THPVariable_Unpack(args[0]);
  return without_gil(input, [&] { return apply_(*bound, input); }) ? Py_NewRef(args[0]) : nullptr;
}

// NAME(tensors..., scalars..., inplace), without inplace where there is no such form. An inplace that is no bool (a
// symbol of torch.fx, say) is left to the ATen line.
template <size_t row>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr const Operation& operation = operations[row];
  PyObject* output = nullptr;
  if (count == tensors_of(operation.form) + operation.arguments + operation.in_place) {
    if (!operation.in_place || args[count - 1] == Py_False)
      output = call<row>(args);
    else if (args[count - 1] == Py_True)
      output = call_<row>(args);
  }
  if (output) return output;
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

// NAME_(input, scalars...).
template <size_t row>
PyObject* entry_(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  if (count == operations[row].arguments + 1)
    if (PyObject* output = call_<row>(args)) return output;
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

template <PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)>
PyMethodDef method(const char* name) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), METH_FASTCALL, nullptr};
}

template <size_t... rows>
PyMethodDef* methods(std::index_sequence<rows...>) {
  static const std::string names_[] = {std::string(operations[rows].name) + "_" ...};
  static std::vector<PyMethodDef> table{method<entry<rows>>(operations[rows].name)...};
  ((operations[rows].in_place ? table.push_back(method<entry_<rows>>(names_[rows].c_str())) : void()), ...);
  table.push_back({nullptr, nullptr, 0, nullptr});
  return table.data();
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
