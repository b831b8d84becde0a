"""torch's own cases, with ours in the place of torch's: what its op_db and module_db have of all that relu_ext mirrors.

These are the tables that torch's tests walk. An OpInfo has the samples, the reference inputs and the errors of a
function, a ModuleInfo the inputs of a module. Whatever can be compared with torch is.
"""

import copy
import functools
import pickle
import re

import operations
import pytest
import torch
import torch.nn.functional as F
from composing import assert_near_sum
from operations import DTYPES, OPERATIONS, assert_same
from tally import TRIED
from torch.autograd import forward_ad
from torch.func import functional_call

import relu_ext

pytest.importorskip("expecttest", reason="torch.testing._internal imports it")

FUNCTIONS = [name for name in relu_ext.__all__ if hasattr(F, name) and not name.endswith("_")]
IN_PLACE = [name for name in FUNCTIONS if hasattr(relu_ext, name + "_")]
MODULES = [name for name in relu_ext.__all__ if hasattr(torch.nn, name)]
LEFT_TO_TORCH = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.complex64]
SPARSE = [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc]

over_functions = pytest.mark.parametrize("name", FUNCTIONS)
over_in_place = pytest.mark.parametrize("name", IN_PLACE)
over_modules = pytest.mark.parametrize("name", MODULES)
over_floats = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def numbers_and_tolerance_of_the_row(request, monkeypatch):
    """The numbers are torch's, the same in every run; the tolerance is the table's, for a module its function's."""
    name = request.getfixturevalue("name").lower() if "name" in request.fixturenames else ""
    torch.manual_seed(0)
    monkeypatch.setattr(operations, "ULPS", max((row.ulps for row in OPERATIONS if row.name == name), default=0))


@functools.cache
def op_infos():
    """All that there are of the functions. The import takes seconds, for which other tests need not wait."""
    from torch.testing._internal.common_methods_invocations import op_db

    def names(info):
        return {info.name.removeprefix("nn.functional."), info.aten_name}

    return {info.full_name: info for info in op_db if names(info) & set(FUNCTIONS)}


@functools.cache
def module_infos():
    from torch.testing._internal.common_modules import module_db

    classes = [getattr(torch.nn, name) for name in MODULES]
    return [info for info in module_db if info.module_cls in classes]


def op_info(name):
    return op_infos()["nn.functional." + name]


def module_info(name):
    (info,) = [info for info in module_infos() if info.module_cls is getattr(torch.nn, name)]
    return info


def tried(cases: list) -> list:
    TRIED["of torch's own cases"] += len(cases)
    return cases


def samples(name, dtype):
    return tried(list(op_info(name).sample_inputs("cpu", dtype)))


def references(name, dtype, most=1 << 16):
    """The samples are among them. Those of a million elements are for few tests: they take longer than all others."""
    return tried([sample for sample in op_info(name).reference_inputs("cpu", dtype) if sample.input.numel() <= most])


def with_leaves(sample):
    return sample.transform(lambda tensor: tensor.detach().requires_grad_())


def tensors(sample):
    """The input and, of prelu, the weight."""
    given = (sample.input, *sample.args, *sample.kwargs.values())
    return [value for value in given if isinstance(value, torch.Tensor)]


def call(function, sample):
    return function(sample.input, *sample.args, **sample.kwargs)


def outcome(function, sample):
    """The output or the error."""
    try:
        return call(function, sample)
    except Exception as error:
        return type(error), str(error)


def assert_alike(ours, theirs):
    """Outcomes: equal numbers at the same places, or one error. Strides of an empty tensor say nothing."""
    if not isinstance(theirs, torch.Tensor):
        assert ours == theirs
        return
    assert_same(ours, theirs)
    assert ours.stride() == theirs.stride() or not ours.numel()


def in_place(name):
    """Pairs of ours and torch's, if there are such forms; there is no F.relu6_."""
    if name not in IN_PLACE:
        return []
    ours, theirs = (functools.partial(getattr(package, name), inplace=True) for package in (relu_ext, F))
    return [(ours, theirs), (getattr(relu_ext, name + "_"), getattr(F, name + "_", theirs))]


def celu_by_elu(input, alpha=1.0, inplace=False):
    elu = torch.ops.aten.elu_ if inplace else torch.ops.aten.elu
    return elu(input, alpha, 1, 1 / alpha)


def is_left_to_torch(input):
    return not torch.ops.aten.is_non_overlapping_and_dense(input)


def differentiated(name, input, inplace=False):
    """torch's function, and for celu, whose gradient divides by alpha in float32, what torch computes it by."""
    function = celu_by_elu if name == "celu" and not is_left_to_torch(input) else getattr(F, name)
    return functools.partial(function, inplace=True) if inplace else function


def strided(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def assert_gradients_alike(output, expected, input, *weights):
    """The input's is torch's: at NaN that of ATen's scalar code, which a strided gradient takes. prelu's weight has a
    sum, which is compared with the true one, unless it is torch's."""
    grad = torch.randn_like(output)
    ours = torch.autograd.grad(output, (input, *weights), grad)
    (theirs,) = torch.autograd.grad(expected, input, strided(grad) if input.isnan().any() else grad)
    assert_same(ours[0], theirs)
    for grad_weight in [] if is_left_to_torch(input) else ours[1:]:
        assert_near_sum(grad_weight, input.detach(), grad)


def on_a_copy(function):
    return lambda input, *args, **kwargs: function(input.clone(), *args, **kwargs)


def copied(tensor):
    """A view of a copy of its memory, with its strides even where elements overlap."""
    memory = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage().clone())
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


# Functions


def test_every_function_has_an_op_info():
    assert len(FUNCTIONS) == 9 and len(IN_PLACE) == 8
    assert sorted(op_infos()) == sorted("nn.functional." + name for name in FUNCTIONS)


@pytest.mark.parametrize("dtype", [*DTYPES, *LEFT_TO_TORCH], ids=str)
@over_functions
def test_outputs(name, dtype):
    """Of a dtype that torch has no samples for, some are errors, and the same."""
    ours, theirs = (getattr(package, name) for package in (relu_ext, F))
    supported = op_info(name).supports_dtype(dtype, "cpu")
    cases = references(name, dtype, most=1 << 20) if supported else samples(name, torch.float32)
    assert len(cases) >= (9 if supported else 3)
    errors = 0
    for sample in cases:
        sample = sample if supported else sample.transform(lambda tensor: tensor.to(dtype))
        before = sample.input.clone()
        expected = outcome(theirs, sample)
        assert_alike(outcome(ours, sample), expected)
        assert_same(sample.input, before)
        errors += not isinstance(expected, torch.Tensor)
    assert bool(errors) != supported


@over_floats
@over_functions
def test_gradients(name, dtype):
    for sample in map(with_leaves, references(name, dtype, most=1 << 20 if dtype == torch.float32 else 1 << 16)):
        output = call(getattr(relu_ext, name), sample)
        expected = call(differentiated(name, sample.input), sample)
        assert_alike(output, expected)
        assert_gradients_alike(output, expected, *tensors(sample))


@pytest.mark.parametrize("dtype", [*DTYPES, *LEFT_TO_TORCH], ids=str)
@over_in_place
def test_in_place(name, dtype):
    """Memory, gaps included, and versions; or the error, as where elements overlap."""
    overwritten = 0
    supported = op_info(name).supports_dtype(dtype, "cpu")
    for sample in references(name, dtype) if supported else samples(name, torch.float32):
        sample = sample if supported else sample.transform(lambda tensor: tensor.to(dtype))
        for ours, theirs in in_place(name):
            given, given_torch = sample.transform(copied), sample.transform(copied)
            output, expected = outcome(ours, given), outcome(theirs, given_torch)
            assert_alike(output, expected)
            assert (output is given.input) == (expected is given_torch.input)
            overwritten += output is given.input
            assert_same(given.input._base, given_torch.input._base)
            assert given.input._version == given_torch.input._version
    assert overwritten or not supported


@over_floats
@over_in_place
def test_gradients_in_place(name, dtype):
    for sample in map(with_leaves, references(name, dtype)):
        theirs = on_a_copy(differentiated(name, sample.input.clone(), inplace=True))
        for ours, torchs in in_place(name):
            assert_gradients_alike(call(on_a_copy(ours), sample), call(theirs, sample), *tensors(sample))
            assert outcome(ours, sample) == outcome(torchs, sample)  # an error, because of the leaf


@over_floats
@over_functions
def test_second_derivatives(name, dtype):
    def derivatives(function, sample, grad):
        leaves = tensors(sample)
        first = torch.autograd.grad(call(function, sample), leaves, grad, create_graph=True)
        return torch.autograd.grad(first, [*leaves, grad], leaves, materialize_grads=True)

    for sample in map(with_leaves, samples(name, dtype)):
        grad = torch.randn_like(sample.input).requires_grad_()
        functions = getattr(relu_ext, name), differentiated(name, sample.input)
        ours, theirs = (derivatives(function, sample, grad) for function in functions)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)


@over_floats
@over_functions
def test_forward_mode(name, dtype):
    for sample in samples(name, dtype):
        with forward_ad.dual_level():
            dual = sample.transform(lambda tensor: forward_ad.make_dual(tensor, torch.randn_like(tensor)))
            outputs = (call(getattr(package, name), dual) for package in (relu_ext, F))
            for ours, theirs in zip(*map(forward_ad.unpack_dual, outputs), strict=True):
                assert_alike(ours, theirs)


@over_functions
def test_gradcheck(name):
    """As torch's TestBwdGradients and TestFwdGradients do: the same samples, checks and tolerances."""
    from torch.testing._internal.common_utils import TestGradients

    info, check = op_info(name), functools.partial(TestGradients()._check_helper, "cpu", torch.float64)
    forward = {"check_forward_ad": True, "check_batched_forward_grad": info.check_batched_forward_grad}
    assert info.supports_forward_ad and info.supports_gradgrad and info.supports_fwgrad_bwgrad
    for function in [getattr(relu_ext, name), *(on_a_copy(ours) for ours, _ in in_place(name)[1:])]:
        check(info, function, "gradcheck", **forward)
        check(info, function, "bwgrad_bwgrad")
        check(info, function, "fwgrad_bwgrad")


@over_functions
def test_compile(name):
    torch._dynamo.reset()
    compiled = torch.compile(getattr(relu_ext, name), backend="aot_eager", fullgraph=True)
    for sample in map(with_leaves, samples(name, torch.float32)[:4]):
        output, expected = call(compiled, sample), call(getattr(F, name), sample)
        assert_alike(output, expected)
        assert_gradients_alike(output, expected, *tensors(sample))


WITH_ERRORS = {"hardtanh": 1, "prelu": 3}  # how many; the other OpInfos have none


@over_functions
def test_errors(name):
    info = op_info(name)
    errors = list(info.error_inputs("cpu")) if info.error_inputs_func else []
    assert len(errors) == WITH_ERRORS.get(name, 0)
    for error in tried(errors):
        expected = outcome(getattr(F, name), error.sample_input)
        assert expected[0] is error.error_type and re.search(error.error_regex, expected[1])
        assert outcome(getattr(relu_ext, name), error.sample_input) == expected
        for ours, theirs in in_place(name):
            given, given_torch = (error.sample_input.transform(copied) for _ in range(2))
            assert_alike(outcome(ours, given), outcome(theirs, given_torch))


@over_functions
def test_sparse(name):
    """Compressed layouts are of matrices."""
    info = op_info(name)
    layouts = [layout for layout in SPARSE if info.supports_sparse_layout(layout)]
    assert layouts == (SPARSE if name == "relu" else [])
    for layout in layouts:
        block = {"blocksize": (1, 1)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
        for sample in samples(name, torch.float32):
            if sample.input.dim() == 2 or layout is torch.sparse_coo:
                sparse = sample.input.to_sparse(layout=layout, **block)
                ours, theirs = (getattr(package, name)(sparse) for package in (relu_ext, F))
                assert ours.layout == theirs.layout == layout
                assert_same(ours.to_dense(), theirs.to_dense())


# Modules


def test_every_module_has_a_module_info():
    assert len(MODULES) == 9
    assert sorted(info.name for info in module_infos()) == sorted("nn." + name for name in MODULES)


def module_inputs(name, dtype, training):
    info = module_info(name)
    assert info.module_error_inputs_func is None  # they would have to be tried
    inputs = info.module_inputs_func(info, device="cpu", dtype=dtype, requires_grad=True, training=training)
    assert len(inputs) >= 3
    return tried(inputs)


def modules(name, given, dtype, training, **more):
    """Ours and torch's, with torch's parameters."""
    ours, theirs = (
        getattr(package, name)(*given.args, **given.kwargs, **more).to(dtype).train(training)
        for package in (relu_ext, torch.nn)
    )
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def call_with_parameters(module, input, *parameters):
    names = (name for name, _ in module.named_parameters())
    return functional_call(module, dict(zip(names, parameters, strict=True)), (input,))


def layouts(input):
    """The tensor, strided, and with its channels last."""
    input = input.detach()
    yield input.clone()
    yield strided(input)
    if input.dim() in (4, 5):
        yield input.to(memory_format=torch.channels_last if input.dim() == 4 else torch.channels_last_3d)


over_training = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@over_training
@over_floats
@over_modules
def test_modules(name, dtype, training):
    for case in module_inputs(name, dtype, training):
        ours, theirs = modules(name, case.constructor_input, dtype, training)
        assert repr(ours) == repr(theirs) and vars(ours).keys() == vars(theirs).keys()
        assert list(ours.state_dict()) == list(theirs.state_dict())
        (given,) = case.forward_input.args
        if case.reference_fn and dtype in module_info(name).supported_dtypes("cpu"):  # not 16 bits, which it is not for
            torch.testing.assert_close(ours(given), case.reference_fn(ours, given))
        for module in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            for input in layouts(given):
                output, expected = module(input.requires_grad_()), theirs(input)
                assert_alike(output, expected)
                assert_gradients_alike(output, expected, input, *module.parameters())


@over_training
@over_floats
@pytest.mark.parametrize("name", [name for name in MODULES if name != "PReLU"])
def test_modules_in_place(name, dtype, training):
    for case in module_inputs(name, dtype, training):
        ours, theirs = modules(name, case.constructor_input, dtype, training, inplace=True)
        assert repr(ours) == repr(theirs)
        for input in layouts(*case.forward_input.args):
            given, given_torch = copied(input), copied(input)
            assert ours(given) is given and theirs(given_torch) is given_torch
            assert_same(given._base, given_torch._base)
            assert given._version == given_torch._version
            input.requires_grad_()
            assert_gradients_alike(ours(input.clone()), theirs(input.clone()), input)


@over_modules
def test_modules_gradcheck(name):
    from torch.testing._internal.common_utils import gradcheck, gradgradcheck

    for case in module_inputs(name, torch.float64, training=True):
        module, _ = modules(name, case.constructor_input, torch.float64, training=True)
        function = functools.partial(call_with_parameters, module)
        inputs = *case.forward_input.args, *module.parameters()
        assert gradcheck(function, inputs, check_forward_ad=True, check_batched_forward_grad=True)
        assert gradgradcheck(function, inputs, check_fwd_over_rev=True, check_rev_over_rev=True)
