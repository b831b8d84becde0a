"""pytest plugin: torch.cuda over the pretended device, and which of the project's tests run on it."""

import re
from types import SimpleNamespace

import pytest
from run import load_device

load_device()
import torch  # noqa: E402

# Of the tests that take `device`, those that cannot run here, by a pattern of their names, each with its reason.
LEFT_OUT = {
    r"^test_inductor_fuses_it_with_its_neighbours": "Inductor writes Triton for a GPU, and there is nothing to run it",
    r"^test_strided_nested_tensor": "torch's strided nested tensors have kernels of their own, which a CPU build lacks",
    r"^test_gradient_that_torch_refuses.*sparse": "so have its sparse tensors",
    r"^test_grads_of_any_kind": "sparse gradients are among these",
    r"^test_.*generator": "torch.Generator has no pretended device",
    r"threshold\(0.*float16": "ATen on CUDA rounds the threshold to 16 bits; the CPU's, here, does not",
}


def pretend_cuda() -> None:
    """What torch.cuda answers from a CUDA build's own Python bindings, answered by torch.accelerator."""
    cuda, accelerator = torch.cuda, torch.accelerator
    cuda._lazy_init = lambda: None
    cuda.is_available = cuda.is_initialized = lambda: True
    cuda.device_count = torch.ops.pretend.device_count
    cuda.current_device = accelerator.current_device_index
    cuda._exchange_device = exchange_device
    cuda._maybe_exchange_device = lambda index: exchange_device(index)
    cuda.set_device = lambda device: accelerator.set_device_index(device)
    cuda.synchronize = lambda device=None: None
    cuda.is_current_stream_capturing = lambda: False
    cuda._get_device_properties = lambda index: SimpleNamespace(name="pretended", major=8, minor=0)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)


def exchange_device(index: int) -> int:
    before = torch.accelerator.current_device_index()
    torch.accelerator.set_device_index(index)
    return before


pretend_cuda()


def runs_here(item) -> bool:
    """With `device` as "cuda", and once: instruction sets and threads are the CPU's.

    Of the operations those that represent the others: what tells these apart is in the kernels, whose tests are
    kernels.py's.
    """
    from operations import REPRESENTATIVE  # found from the first test's folder on

    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return (
        parameters.get("device") == "cuda"
        and parameters.get("isa", "portable") == "portable"
        and parameters.get("threads", 1) == 1
        and parameters.get("operation", REPRESENTATIVE[0]) in REPRESENTATIVE
        and not any(re.search(pattern, item.name) for pattern in LEFT_OUT)
    )


def pytest_collection_modifyitems(config, items):
    config.hook.pytest_deselected(items=[item for item in items if not runs_here(item)])
    items[:] = filter(runs_here, items)


@pytest.fixture(autouse=True)
def writes_stay_inside():
    yield
    assert torch.ops.pretend.take_broken_fences() == 0, "memory was written outside of a tensor's own"
