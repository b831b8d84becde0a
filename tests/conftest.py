"""Fixtures that every test shares: each operation, device and instruction set in turn."""

import gc

import operations
import pytest
import tally
import torch
from operations import OPERATIONS

import relu_ext
from relu_ext import _C

DEVICES = ["cpu"] + (["cuda"] if relu_ext.build_info()["cuda"] and torch.cuda.is_available() else [])


def pytest_configure(config):
    config.pluginmanager.register(tally)


def pytest_generate_tests(metafunc):
    """Every row of the table, or those that the test or its file names, and of these those that the test can take."""
    marks = {marker.name: marker for marker in metafunc.definition.iter_markers()}
    named = any(marker.args[0] == "operation" for marker in metafunc.definition.iter_markers("parametrize"))
    if "operation" in metafunc.fixturenames and not named:
        rows = getattr(metafunc.module, "ROWS", OPERATIONS)
        if "keeps_bits" in marks:
            rows = [row for row in rows if row.keep]
        if "in_place" in marks:
            rows = [row for row in rows if row.in_place]
        if "one_node" in marks:
            rows = [row for row in rows if row.name != "relu_squared"]
        metafunc.parametrize("operation", rows, ids=str)


def pytest_collection_modifyitems(config, items):
    """Forms in place are not for operations that have none."""

    def exists(item):
        parameters = getattr(item, "callspec", None) and item.callspec.params
        if not parameters or "operation" not in parameters or parameters["operation"].in_place:
            return True
        form = parameters.get("form")
        name = form if isinstance(form, str) else getattr(form, "__name__", "")
        return not name.startswith(("in place", "in_place")) and not parameters.get("inplace")

    items[:] = [item for item in items if exists(item)]


@pytest.fixture(autouse=True)
def numbers_and_tolerance_of_the_row(request, monkeypatch):
    """Where ours and torch's may differ is not looked at, but in test_values.py, which has all numbers and formulas."""
    rows = getattr(request.node, "callspec", None) and request.node.callspec.params
    operation = rows and rows.get("operation")
    if operation:
        values, kinds = operations.special_values, operation.special
        places = [*kinds, *(kind + len(operations.SPECIAL) for kind in kinds)]
        monkeypatch.setattr(operations, "special_values", lambda dtype: values(dtype)[places])
        monkeypatch.setattr(operations, "ULPS", operation.ulps)


@pytest.fixture
def no_garbage_collection():
    """What is freed then is freed by reference counts alone."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


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


@pytest.fixture
def isas():
    """The instruction sets of this CPU, each of them in use until the next is asked for."""
    chosen, supported = (relu_ext.build_info()[key] for key in ("isa", "isas_supported"))
    if len(supported) == 1:
        pytest.skip("this CPU has one instruction set")
    yield (name for name in supported if _C.set_isa(name) is None)
    _C.set_isa(chosen)


@pytest.fixture(params=[1, 2], ids=["1thread", "2threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
