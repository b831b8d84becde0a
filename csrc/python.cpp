// What Python sees: for every row of the table NAME(tensors..., scalars..., inplace) and NAME_(input, scalars...),
// which return NotImplemented where the operation's ATen line must run instead; and the facts of this build.
//
// The entries use the C API: every call of a layer goes through them, and pybind11 would add to its time.
#include <ATen/PythonTorchFunctionTLS.h>
#include <pybind11/gil_safe_call_once.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/Generator.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "autograd.h"
#include "cpu/isa.h"
#include "install.h"
#include "monitor.h"

namespace py = pybind11;

namespace relu_ext {
namespace {

// torch.set_default_device() leaves this function mode on for good. It concerns calls that make tensors, not ours.
bool is_device_context(PyObject* mode) {
  // While it is imported other threads may run: a static object's guard would keep them waiting for the import, and the
  // import for the interpreter lock that they have.
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<py::object> type;
  const auto imported = [] { return py::object(py::module_::import("torch.utils._device").attr("DeviceContext")); };
  const py::object& context = type.call_once_and_store_result(imported).get_stored();
  return reinterpret_cast<PyObject*>(Py_TYPE(mode)) == context.ptr();
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

// The interpreter lock, given away for a time. When the interpreter has exited meanwhile, Python before 3.14 ends a
// daemon thread where it asks for the lock, by unwinding its stack. Through a destructor that may not throw, such as
// that of pybind11::gil_scoped_release, this would end the process.
class WithoutGil {
 public:
  explicit WithoutGil(bool wanted) : state_(wanted ? PyEval_SaveThread() : nullptr) {}
  WithoutGil(const WithoutGil&) = delete;
  ~WithoutGil() noexcept(false) {
    if (state_) PyEval_RestoreThread(state_);
  }

 private:
  PyThreadState* const state_;
};

template <class Call>
auto without_gil(const at::Tensor& input, Call call) {
  const WithoutGil release(input.numel() > short_work || !input.is_cpu());
  return call();
}

// Nothing for a bool, and for an int that is no double.
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

// An argument that may be None: a tensor, undefined for None. False: neither.
bool optional_tensor(PyObject* object, const at::Tensor*& tensor) {
  static const at::Tensor none;
  tensor = &none;
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  tensor = &THPVariable_Unpack(object);
  return true;
}

// NAME(input, those beside it ..., dim where some are of channels, scalars...).
template <size_t row>
PyObject* call_fused(PyObject* const* args) {
  constexpr const Operation& operation = operations[row];
  constexpr Beside beside = operation.beside;
  const at::Tensor* tensors[4];
  int next = 0;
  if (!THPVariable_CheckExact(args[next]) || !optional_tensor(args[next++], tensors[0])) return nullptr;
  const bool has[] = {beside.scale, beside.shift, beside.residual};
  for (int i = 0; i < 3; ++i) {
    PyObject* const given = has[i] ? args[next++] : Py_None;
    if (!optional_tensor(given, tensors[i + 1])) return nullptr;
    const bool may_be_none = !has[i] || (i == 2 && beside.scale);
    if (given == Py_None && !may_be_none) return nullptr;
  }
  int64_t dim = 0;
  if (beside.scale || beside.shift) {
    const auto given = number(args[next]);
    if (!given || !PyLong_CheckExact(args[next++])) return nullptr;
    dim = int64_t(*given) + (*given < 0 ? tensors[0]->dim() : 0);
    if (dim < 0) return nullptr;
  }
  const auto bound = bind(operation, args + next);
  if (!bound || !function_modes_allow()) return nullptr;
  const FusedInputs inputs{*tensors[0], *tensors[1], *tensors[2], *tensors[3], dim};
  auto output = without_gil(inputs.input, [&] { return apply_fused(*bound, inputs); });
  return output ? THPVariable_Wrap(std::move(*output)) : nullptr;
}

// NAME(input, p, training, generator).
template <size_t row>
PyObject* call_dropout(PyObject* const* args) {
  constexpr Bound bound{&operations[row], {}};
  const auto p = number(args[1]);
  if (!THPVariable_CheckExact(args[0]) || !PyBool_Check(args[2]) || !p || !(*p >= 0 && *p <= 1) ||
      !(args[3] == Py_None || THPGenerator_Check(args[3])) || !function_modes_allow())
    return nullptr;
  std::optional<at::Generator> generator;
  if (args[3] != Py_None) generator = THPGenerator_Unwrap(args[3]);
  const at::Tensor& input = THPVariable_Unpack(args[0]);
  constexpr Bound relu{operation_of(bound.operation->activation, Form::elementwise), {}};
  auto output = without_gil(input, [&] {
    return args[2] == Py_True && *p > 0 ? apply_dropout(bound, input, *p, generator) : apply(relu, input);
  });
  return output ? THPVariable_Wrap(std::move(*output)) : nullptr;
}

// NAME(input, weight, bias).
template <size_t row>
PyObject* call_linear(PyObject* const* args) {
  const at::Tensor* tensors[3];
  for (int i = 0; i < 3; ++i)
    if (!optional_tensor(args[i], tensors[i]) || (i < 2 && !tensors[i]->defined())) return nullptr;
  if (!function_modes_allow()) return nullptr;
  auto output = without_gil(
      *tensors[0], [&] { return apply_linear({&operations[row], {}}, *tensors[0], *tensors[1], *tensors[2]); });
  return output ? THPVariable_Wrap(std::move(*output)) : nullptr;
}

std::optional<at::Tensor> apply(const Bound& bound, const at::Tensor& first, const at::Tensor& second) {
  return bound.operation->form == Form::gated ? apply_reglu(bound, first, second) : apply_prelu(bound, first, second);
}

// How many arguments are tensors or None, and how many are not.
constexpr int tensors_of(const Operation& operation) {
  switch (operation.form) {
    case Form::elementwise:
    case Form::dropout: return 1;
    case Form::linear: return 3;
    case Form::fused: return 1 + operation.beside.scale + operation.beside.shift + operation.beside.residual;
    default: return 2;
  }
}
constexpr int others_of(const Operation& operation) {
  if (operation.form == Form::dropout) return 3;
  return operation.arguments + operation.in_place + (operation.beside.scale || operation.beside.shift);
}

// All of these give nullptr where the operation's ATen line must run. args: as many as there are.
template <size_t row>
PyObject* call(PyObject* const* args) {
  constexpr const Operation& operation = operations[row];
  constexpr int tensors = tensors_of(operation);
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

// NAME(tensors..., scalars..., inplace), without inplace where there is no such form, or as above. An inplace that is
// no bool (a symbol of torch.fx, say) is left to the ATen line.
template <size_t row>
PyObject* entry(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  constexpr const Operation& operation = operations[row];
  PyObject* output = nullptr;
  if (count == tensors_of(operation) + others_of(operation)) {
    if constexpr (operation.form == Form::fused)
      output = call_fused<row>(args);
    else if constexpr (operation.form == Form::dropout)
      output = call_dropout<row>(args);
    else if constexpr (operation.form == Form::linear)
      output = call_linear<row>(args);
    else if (!operation.in_place || args[count - 1] == Py_False)
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
  module.def("install", &install);
  module.def("uninstall", &uninstall);
  module.def("is_installed", &is_installed);
  module.def("installable", &installable);
  module.def("is_observable", &monitor::is_observable);
  module.def("in_backward", &monitor::in_backward);
  module.def("cells", &monitor::cells);
  module.def("count_bits", &monitor::count_bits);
  module.def("count_bits_of", &monitor::count_bits_of);
  module.def("find_nonfinite", &monitor::find_nonfinite);
  module.def("watch_gradient", &monitor::watch_gradient);
}
