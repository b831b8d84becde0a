"""What a user sees: torch's names, arguments, attributes and errors; the build's facts, and errors of a wrong build."""

import copy
import inspect
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operations import WITH_DEFAULTS, assert_same

import relu_ext

PACKAGE = Path(relu_ext.__file__).parent
# The functions, not what calls them; all of them take inplace.
with_defaults = pytest.mark.parametrize("operation", [row for row in WITH_DEFAULTS if row.in_place], ids=str)


def example(device="cpu"):
    return torch.tensor([-1.5, 0.0, 2.5], device=device)


def error_of(function, *inputs, **keywords):
    with pytest.raises(Exception) as error:
        function(*inputs, **keywords)
    return error.type, str(error.value)


def python(*arguments, path=PACKAGE.parent, **environment):
    """Another Python, with what it printed."""
    inherited = {name: value for name, value in os.environ.items() if name != "RELU_EXT_ISA"}
    environment = {**inherited, "PYTHONPATH": str(path), **environment}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=path, capture_output=True, text=True)


# Modules


@pytest.mark.in_place
@pytest.mark.parametrize("inplace", [False, True])
def test_module_is_torchs(operation, inplace):
    ours, theirs = operation.module(inplace=inplace), operation.torch_module(inplace=inplace)
    assert isinstance(ours, type(theirs))
    assert repr(ours) == repr(theirs)
    assert ours.extra_repr() == theirs.extra_repr()
    assert type(ours).__constants__ == type(theirs).__constants__
    assert vars(ours).keys() == vars(theirs).keys()
    assert ours.inplace is inplace
    assert [*ours.state_dict(), *ours.parameters(), *ours.buffers()] == []
    assert operation.module(inplace=inplace).inplace is inplace


@pytest.mark.in_place
@with_defaults
def test_module_signature(operation):
    ours, theirs = (inspect.signature(module) for module in (operation.module, operation.torch_module))
    assert list(ours.parameters.items()) == list(theirs.parameters.items())
    assert operation.module().inplace is operation.torch_module().inplace


def test_module_forward(operation, device):
    module, input = operation.module(), example(device)
    output = module(input)
    assert_same(output, operation.definition(example(device)))
    assert_same(input, example(device))
    assert_same(module(input=input), output)


@pytest.mark.in_place
def test_module_inplace(operation, device):
    module, input = operation.module(inplace=True), example(device)
    assert module(input) is input
    assert_same(input, operation.definition(example(device)))


@pytest.mark.in_place
def test_module_inplace_may_be_changed(operation):
    module, input = operation.module(inplace=True), example()
    module.inplace = False
    assert module(input) is not input
    assert repr(module) == repr(operation.torch_module())


@pytest.mark.parametrize("inplace", [False, True])
def test_module_in_a_network(operation, device, inplace):
    torch.manual_seed(0)
    first, last = torch.nn.Linear(5, 7, device=device), torch.nn.Linear(7, 3, device=device)
    theirs_in_place = {"inplace": inplace and operation.torch_has_gradient_in_place} if operation.in_place else {}
    theirs = torch.nn.Sequential(first, operation.torch_module(**theirs_in_place), last)
    ours = copy.deepcopy(theirs)
    ours[1] = operation.module(**({"inplace": inplace} if operation.in_place else {}))
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    ours.load_state_dict(theirs.state_dict())
    input = torch.randn(4, 5, device=device)
    for network in (ours, theirs):
        network(input).square().sum().backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_same(a.grad, b.grad)


def test_module_hooks(operation):
    module, seen = operation.module(), []
    module.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    module.register_forward_hook(lambda module, inputs, output: seen.append("after"))
    module.register_full_backward_hook(lambda module, grad_inputs, grad_outputs: seen.append("backward"))
    module(example().requires_grad_()).sum().backward()
    assert seen == ["before", "after", "backward"]


# Functions


@pytest.mark.in_place
@with_defaults
def test_function_signature(operation):
    assert inspect.signature(operation.function) == inspect.signature(operation.definition)
    assert operation.function.__name__ == operation.definition.__name__
    assert operation.function_.__name__ == operation.name + "_"


@pytest.mark.in_place
def test_function_by_keyword(operation, device):
    expected = operation.definition(example(device))
    assert_same(operation.function(input=example(device)), expected)
    assert_same(operation.function(inplace=False, input=example(device)), expected)
    assert_same(operation.function_(input=example(device)), expected)


@pytest.mark.in_place
@pytest.mark.parametrize("inplace", [True, 1, "yes", [0], torch.tensor(1)], ids=repr)
def test_function_in_place_if_true(operation, device, inplace):
    input = example(device)
    assert operation.function(input, inplace=inplace) is input
    assert_same(input, operation.definition(example(device)))
    input = example(device)
    assert operation.function(input, inplace=inplace) is input


@pytest.mark.in_place
@pytest.mark.parametrize("inplace", [False, 0, None, "", [], torch.tensor(0)], ids=repr)
def test_function_not_in_place_if_false(operation, device, inplace):
    input = example(device)
    assert_same(operation.function(input, inplace=inplace), operation.definition(example(device)))
    assert_same(input, example(device))


@pytest.mark.in_place
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64], ids=str)
def test_integers_as_in_torch(operation, device, dtype):
    """Values, or the same error: leaky_relu takes none, hardtanh no unsigned ones with a negative bound."""

    def result(function):
        try:
            return function(torch.tensor([-3, 0, 3], device=device).to(dtype)).tolist()
        except (RuntimeError, NotImplementedError) as error:
            return type(error), str(error)

    assert result(operation.function) == result(operation.definition)
    assert result(operation.function_) == result(operation.definition_)


WRONG_INPUTS = {
    "number": 3,
    "None": None,
    "list": [1.0],
    "str": "a",
    "bool tensor": torch.ones(2, dtype=torch.bool),
    "8-bit float tensor": torch.ones(2).to(torch.float8_e4m3fn),
    "complex tensor": torch.ones(2, dtype=torch.complex64),
}


@pytest.mark.in_place
@pytest.mark.parametrize("wrong", WRONG_INPUTS.values(), ids=WRONG_INPUTS)
def test_wrong_input_raises_what_torch_raises(operation, wrong):
    for inplace in (False, True):
        assert error_of(operation.function, wrong, inplace=inplace) == error_of(
            operation.definition, wrong, inplace=inplace
        )
        ours, theirs = operation.module(inplace=inplace), operation.torch_module(inplace=inplace)
        assert error_of(ours, wrong) == error_of(theirs, wrong)
    assert error_of(operation.function_, wrong) == error_of(operation.definition_, wrong)


@pytest.mark.in_place
@with_defaults
def test_wrong_call_raises_what_torch_raises(operation):
    x = example()
    for arguments, keywords in [((), {}), ((x, 1, 2, True, 3), {}), ((x,), {"inplac": True}), ((x,), {"input": x})]:
        ours, theirs = (error_of(f, *arguments, **keywords) for f in (operation.function, operation.definition))
        assert ours == theirs
        ours, theirs = (error_of(f, *arguments, **keywords) for f in (operation.function_, operation.definition_))
        assert ours[0] == theirs[0]  # torch's comes from C++ and words it otherwise
    assert error_of(operation.module, 1, 2, True, None, None, 3)[0] is TypeError


@pytest.mark.in_place
@with_defaults
def test_everything_public_is_documented(operation):
    for name in relu_ext.__all__:
        assert getattr(relu_ext, name).__doc__, name
    for part in (relu_ext, operation.function, operation.function_, operation.module):
        assert part.__doc__.strip()


@pytest.mark.in_place
@with_defaults
def test_public_names(operation):
    assert {operation.name, operation.name + "_", operation.module.__name__} <= set(relu_ext.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+", relu_ext.__version__)


# The build


def test_build_info():
    info = relu_ext.build_info()
    assert info["version"] == relu_ext.__version__
    assert info["torch_built"] == info["torch"] == torch.__version__
    assert info["python"] == f"{sys.version_info.major}.{sys.version_info.minor}"
    assert info["isas_compiled"][0] == info["isas_supported"][0] == "portable"
    assert info["isas_supported"] == info["isas_compiled"][: len(info["isas_supported"])]
    assert info["isa"] in info["isas_supported"]
    assert info["compiler"]
    assert (info["cuda"] is None) == (info["cuda_archs"] == [])


def test_build_info_is_a_copy():
    relu_ext.build_info()["isas_compiled"].clear()
    assert relu_ext.build_info()["isas_compiled"]


def test_command_prints_build_info():
    info = {**relu_ext.build_info(), "isa": relu_ext.build_info()["isas_supported"][-1]}
    result = python("-m", "relu_ext")
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(info)
    for line, value in zip(lines, info.values(), strict=True):
        text = ", ".join(value) if isinstance(value, list) else str(value or "")
        assert line.split(maxsplit=1)[1] == (text or "none")


RUN = "import torch, relu_ext; print(relu_ext.build_info()['isa'], relu_ext.relu(torch.tensor([-1., 2.])).tolist())"


@pytest.mark.parametrize("isa", relu_ext.build_info()["isas_compiled"])
def test_environment_chooses_the_instruction_set(isa):
    if isa not in relu_ext.build_info()["isas_supported"]:
        pytest.skip(f"this CPU has no {isa}")
    assert python("-c", RUN, RELU_EXT_ISA=isa).stdout == f"{isa} [0.0, 2.0]\n"


def test_empty_isa_is_none_chosen():
    assert python("-c", RUN, RELU_EXT_ISA="").stdout == python("-c", RUN).stdout


@pytest.mark.parametrize("isa", ["sse9", "AVX2", "avx2 "])
def test_environment_names_an_unknown_instruction_set(isa):
    result = python("-c", RUN, RELU_EXT_ISA=isa)
    assert result.returncode == 1
    assert result.stdout == ""
    message = result.stderr.strip().splitlines()[-1]
    assert f"'{isa}'" in message
    assert ", ".join(relu_ext.build_info()["isas_supported"]) in message


def test_unsupported_instruction_set_is_refused():
    info = relu_ext.build_info()
    for isa in (*(set(info["isas_compiled"]) - set(info["isas_supported"])), "sse9", ""):
        with pytest.raises(ValueError, match=re.escape(f"'{isa}'")):
            relu_ext._C.set_isa(isa)
    assert relu_ext.build_info()["isa"] == info["isa"]


@pytest.fixture
def package(tmp_path):
    """A copy to spoil."""
    shutil.copytree(PACKAGE, tmp_path / "relu_ext", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "relu_ext"


def import_error(package):
    """The last line of what Python prints; the whole of it must be one error, not one caused by another."""
    result = python("-c", "import relu_ext", path=package.parent)
    assert result.returncode == 1
    assert result.stderr.count("Traceback") == 1
    message = result.stderr.strip().splitlines()[-1]
    assert message.startswith("ImportError: ")
    assert "python setup.py build_ext --inplace" in message
    assert "pip install --no-build-isolation ." in message
    return message


def test_copy_of_the_package_imports(package):
    result = python("-c", "import relu_ext; print(relu_ext.__file__)", path=package.parent)
    assert result.stdout.strip() == str(package / "__init__.py")


def running():
    return torch.__version__, f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.mark.parametrize("built", ["2.4.1+cu121", torch.__version__.split("+")[0] + "+other"])
def test_built_for_another_torch(package, built):
    record = package / "_build.py"
    record.write_text(re.sub(r"(?m)^TORCH = .*$", f"TORCH = {built!r}", record.read_text()))
    message = import_error(package)
    assert built in message
    assert torch.__version__ in message


def test_built_for_another_python(package):
    """As it looks from there: the record names another Python, and the extension's file name is that one's."""
    record = package / "_build.py"
    record.write_text(re.sub(r"(?m)^PYTHON = .*$", "PYTHON = ('3', '9')", record.read_text()))
    for library in package.glob("_C*"):
        library.rename(package / "_C.cpython-39-x86_64-linux-gnu.so")
    message = import_error(package)
    assert "Python 3.9" in message
    assert all(part in message for part in running())


def test_versions_are_looked_at_before_the_extension(package):
    """An extension of another torch fails with an undefined symbol, or crashes, when it is loaded."""
    record = package / "_build.py"
    record.write_text(re.sub(r"(?m)^TORCH = .*$", "TORCH = '2.4.1'", record.read_text()))
    for library in package.glob("_C*"):
        library.write_bytes(b"not a library")
    assert "2.4.1" in import_error(package)


def test_nothing_is_built(package):
    for built in [*package.glob("_C*"), package / "_build.py"]:
        built.unlink()
    assert "not built" in import_error(package)


def test_record_without_an_extension(package):
    for library in package.glob("_C*"):
        library.unlink()
    assert "not built" in import_error(package)


def test_extension_without_a_record(package):
    (package / "_build.py").unlink()
    assert "not built" in import_error(package)
