"""Fixtures that every test shares: each operation, device and instruction set in turn."""

import pytest
import torch
from operations import OPERATIONS

import relu_ext
from relu_ext import _C

DEVICES = ["cpu"] + (["cuda"] if relu_ext.build_info()["cuda"] and torch.cuda.is_available() else [])


@pytest.fixture(params=OPERATIONS, ids=str)
def operation(request):
    return request.param


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
