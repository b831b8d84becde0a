"""Fixtures that every test shares: each operation, device and instruction set in turn."""

import operations
import pytest
import torch
from operations import OPERATIONS

import relu_ext
from relu_ext import _C

DEVICES = ["cpu"] + (["cuda"] if relu_ext.build_info()["cuda"] and torch.cuda.is_available() else [])


def pytest_generate_tests(metafunc):
    """Every row of the table, or those that the test or its file names."""
    named = any(marker.args[0] == "operation" for marker in metafunc.definition.iter_markers("parametrize"))
    if "operation" in metafunc.fixturenames and not named:
        metafunc.parametrize("operation", getattr(metafunc.module, "ROWS", OPERATIONS), ids=str)


@pytest.fixture(autouse=True)
def nan_where_torch_has_one_gradient(request, monkeypatch):
    """hardtanh's at NaN differs between ATen's vector code and its scalar code. test_values.py compares the formula."""
    rows = getattr(request.node, "callspec", None) and request.node.callspec.params
    if rows and "operation" in rows and not rows["operation"].gradient_at_nan:
        values = operations.special_values
        monkeypatch.setattr(operations, "special_values", lambda dtype: values(dtype)[[*range(6), *range(9, 15)]])


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=relu_ext.build_info()["isas_compiled"])
def isa(request):
    """Runs the test on one instruction set of the CPU kernels."""
    if request.param not in relu_ext.build_info()["isas_supported"]:
        pytest.skip(f"this CPU has no {request.param}")
    chosen = relu_ext.build_info()["isa"]
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(chosen)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
