"""What is measured: one row per operation, the shapes, and the numbers to reach."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import _checkout  # noqa: F401
import torch
from machine import last_level_cache, memory_bytes
from torch import Tensor, nn
from torch.nn import functional as F

import relu_ext

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OURS, EAGER, COMPILED = "relu_ext", "torch", "torch.compile"  # the competitors
FORWARD, BACKWARD, TRAINING = "forward", "backward", "forward + backward"
STEPS = (FORWARD, BACKWARD, TRAINING)


class Pair(NamedTuple):
    ours: Callable[..., Any]
    torch: Callable[..., Any]


Random = Callable[..., Tensor]  # random(*dims)


def one_input(random: Random, dims: tuple[int, ...]) -> list[Tensor]:
    return [random(*dims)]


def halves(random: Random, dims: tuple[int, ...]) -> list[Tensor]:
    """As they leave the linear layer that makes both: rows of one are not next to each other."""
    return list(random(*dims[:-1], 2 * dims[-1]).chunk(2, -1))


def one_weight(random: Random, dims: tuple[int, ...]) -> list[Tensor]:
    return [random(*dims), random(1)]


def channel_weights(random: Random, dims: tuple[int, ...]) -> list[Tensor]:
    """As many elements as in `dims`, in planes: up to 16 images of up to 64 channels."""
    elements = math.prod(dims)
    channels = math.gcd(elements, 64)
    images = math.gcd(elements // channels, 16)
    return [random(images, channels, elements // channels // images), random(channels)]


@dataclass(frozen=True)
class Operation:
    """A row of every table. `function.torch` is the definition that `function.ours` must equal, but for so many `ulps`.

    A pass is one tensor of the input's size, read or written. Where the result of a layer is kept for backward, that
    is no pass of its own; packed bits are, `bits` of them an element, written in forward and read in backward.
    """

    name: str
    torch_name: str
    function: Pair
    inplace: Pair | None = None
    module: Pair | None = None
    operands: Callable[[Random, tuple[int, ...]], list[Tensor]] = one_input  # the first has the output's shape
    curve: dict[str, Callable[[Tensor], Tensor]] | None = None  # what is drawn; None: the function
    every_shape: bool = False  # else few shapes, and of the host time a call alone: the default run stays short
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    forward_passes: int = 2
    backward_passes: int = 2
    bits: int = 0
    ulps: int = 0

    def passes(self, step: str, itemsize: int) -> float:
        bits = self.bits / (8 * itemsize)
        return {
            FORWARD: self.forward_passes,
            BACKWARD: self.backward_passes + bits,
            TRAINING: self.forward_passes + self.backward_passes + 2 * bits,
        }[step]


PRELU = Operation(
    name="prelu",
    torch_name="F.prelu",
    function=Pair(relu_ext.prelu, F.prelu),
    operands=one_weight,
    curve={"prelu, weight 0.25": lambda x: relu_ext.prelu(x, x.new_tensor([0.25]))},
    backward_passes=3,
    ulps=4,
)

RELU_SQUARED = Operation(
    name="relu_squared",
    torch_name="relu(x).square()",  # as models write it; in float16 on a CPU torch squares with a scalar pow
    function=Pair(relu_ext.relu_squared, lambda x: torch.relu(x).square()),
    dtypes=tuple(DTYPES),
    backward_passes=3,
    ulps=1,
)

OPERATIONS = (
    Operation(
        name="relu",
        torch_name="torch.relu",
        function=Pair(relu_ext.relu, torch.relu),
        inplace=Pair(relu_ext.relu_, torch.relu_),
        module=Pair(relu_ext.ReLU, nn.ReLU),
        every_shape=True,
        dtypes=tuple(DTYPES),
        bits=1,
    ),
    Operation(
        name="relu6",
        torch_name="F.relu6",
        function=Pair(relu_ext.relu6, F.relu6),
        inplace=Pair(relu_ext.relu6_, partial(F.relu6, inplace=True)),
        module=Pair(relu_ext.ReLU6, nn.ReLU6),
        bits=1,
    ),
    Operation(
        name="hardtanh",
        torch_name="F.hardtanh",
        function=Pair(relu_ext.hardtanh, F.hardtanh),
        inplace=Pair(relu_ext.hardtanh_, F.hardtanh_),
        module=Pair(relu_ext.Hardtanh, nn.Hardtanh),
        bits=1,
    ),
    Operation(
        name="threshold",
        torch_name="F.threshold",
        function=Pair(*(partial(f, threshold=0.1, value=0.0) for f in (relu_ext.threshold, F.threshold))),
        inplace=Pair(*(partial(f, threshold=0.1, value=0.0) for f in (relu_ext.threshold_, torch.threshold_))),
        module=Pair(*(partial(module, 0.1, 0.0) for module in (relu_ext.Threshold, nn.Threshold))),
        bits=1,
    ),
    Operation(
        name="leaky_relu",
        torch_name="F.leaky_relu",
        function=Pair(relu_ext.leaky_relu, F.leaky_relu),
        inplace=Pair(relu_ext.leaky_relu_, F.leaky_relu_),
        module=Pair(relu_ext.LeakyReLU, nn.LeakyReLU),
        bits=1,
    ),
    Operation(
        name="elu",
        torch_name="F.elu",
        function=Pair(relu_ext.elu, F.elu),
        inplace=Pair(relu_ext.elu_, F.elu_),
        module=Pair(relu_ext.ELU, nn.ELU),
        backward_passes=3,
        ulps=4,
    ),
    Operation(
        name="celu",
        torch_name="F.celu",
        function=Pair(relu_ext.celu, F.celu),
        inplace=Pair(relu_ext.celu_, torch.celu_),
        module=Pair(relu_ext.CELU, nn.CELU),
        backward_passes=3,
        ulps=4,
    ),
    Operation(
        name="selu",
        torch_name="F.selu",
        function=Pair(relu_ext.selu, F.selu),
        inplace=Pair(relu_ext.selu_, torch.selu_),
        module=Pair(relu_ext.SELU, nn.SELU),
        backward_passes=3,
        ulps=4,
    ),
    RELU_SQUARED,
    replace(
        RELU_SQUARED,
        name="relu_squared_product",
        torch_name="(r := relu(x)) * r",
        function=Pair(relu_ext.relu_squared, lambda x: (r := torch.relu(x)) * r),
        curve={},
    ),
    PRELU,
    replace(PRELU, name="prelu_channels", operands=channel_weights, curve={}),
    Operation(
        name="reglu",
        torch_name="relu(gate) * up",
        function=Pair(relu_ext.reglu, lambda gate, up: torch.relu(gate) * up),
        operands=halves,
        curve={"reglu, up = 1": lambda x: relu_ext.reglu(x, torch.ones_like(x))},
        forward_passes=3,
        backward_passes=5,
    ),
)


@dataclass(frozen=True)
class Shape:
    name: str
    dims: tuple[int, ...]
    # Inductor specialises on the shape, which costs 3 s of g++ per shape and dtype for forward and training.
    compiled: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.dims)


NETWORK_SHAPES = (
    # OPT-125M: 8 sequences of 512 tokens, feed-forward width 3072, ReLU (arXiv:2205.01068, table 1).
    Shape("OPT-125M ffn", (8, 512, 3072), compiled=True),
    # ResNet-50: what leaves stage conv3_x (arXiv:1512.03385, table 1), batch 32. conv2_x, twice as large, is past
    # the cache like the largest of the sizes and would cost the default run half a minute.
    Shape("ResNet-50 stage", (32, 512, 28, 28), compiled=True),
)


SMALL = 2**20  # elements; in the last-level cache of most machines


def size_name(elements: int) -> str:
    for factor, unit in ((2**20, "M"), (2**10, "K")):
        if elements >= factor and elements % factor == 0:
            return f"{elements // factor}{unit}"
    return str(elements)


ROW = 2**10


def sized(elements: int, compiled: bool) -> Shape:
    rows = (elements // ROW, ROW) if elements >= SMALL and elements % ROW == 0 else (elements,)
    return Shape(size_name(elements), rows, compiled)


def largest_size(device: torch.device) -> int:
    # Training keeps six such tensors alive at most: a sixteenth of the memory each leaves room.
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 16 // 4
    return 2 ** int(math.log2(min(4 * last_level_cache(), memory_bytes() // 16) // 4))


def shapes(device: torch.device) -> list[Shape]:
    """Powers of two from 64 elements to far past the last-level cache, then real networks."""
    largest = largest_size(device)
    if device.type == "cuda":
        # Past every L2 cache from 64M elements on.
        sizes = [64, 2**10, 2**14, 2**17, 2**20, 2**22, 2**24, 2**26, 2**27, 2**28]
        sizes = [size for size in sizes if size <= largest]
    else:
        sizes = [size for size in (64, 2**10, 2**14, 2**17, 2**20, 2**22) if size < largest] + [largest]
    return [sized(size, compiled=size in (64, 2**20, 2**27)) for size in sizes] + list(NETWORK_SHAPES)


def few_shapes(device: torch.device) -> list[Shape]:
    """One in the last-level cache, one far past it."""
    past = min(2**26, largest_size(device)) if device.type == "cuda" else largest_size(device) // 2
    return [sized(SMALL, compiled=True), sized(past, compiled=False)]


HOST_ELEMENTS = 64
CHAIN = 200  # layers
CALL, CALL_GRAD, MODULE, MODULE_GRAD = "call", "call, input with grad", "module", "module, input with grad"
CALLS = (CALL, CALL_GRAD)
INPLACE, CHAIN_BACKWARD, CHAIN_TRAINING = "in place", "backward, a layer of 200", "forward + backward, a layer of 200"

LARGE = 256 * 2**20  # bytes of a tensor


@dataclass(frozen=True)
class Target:
    """`quantity` of every record that agrees with `where` has to be at most `limit`.

    A value in `where` is the record's, or a predicate of it.
    """

    text: str
    limit: float
    operation: str
    where: dict[str, Any]
    quantity: str = "ratio"

    def covers(self, record: dict[str, Any]) -> bool:
        def agrees(key: str, wanted: Any) -> bool:
            return key in record and (wanted(record[key]) if callable(wanted) else wanted == record[key])

        return all(agrees(key, wanted) for key, wanted in {"operation": self.operation, **self.where}.items())


def kept(name: str, what: str, limit: float, quantity: str, **where: Any) -> Target:
    return Target(f"{name}: kept{what}", limit, name, {"section": "kept", **where}, quantity)


def in_cache(name: str, step: str, limit: float, *dtypes: str) -> Target:
    """At 1M elements, in these dtypes or in all."""
    where = {"section": "speed", "step": step, "elements": SMALL, "in_cache": True}
    where |= {"dtype": dtypes.__contains__} if dtypes else {}
    what = step.replace("forward + backward", "fwd + bwd")
    return Target(f"{name}: {', '.join((what, *dtypes))}, 1M", limit, name, where)


BITS = tuple(operation.name for operation in OPERATIONS if operation.bits)
KEPT_TARGETS = (
    Target("relu: kept, float32", 1 / 32, "relu", {"section": "kept", "dtype": "float32"}, "share_of_input"),
    Target("relu: kept, bfloat16", 1 / 16, "relu", {"section": "kept", "dtype": "bfloat16"}, "share_of_input"),
    Target("relu: kept, float16", 1 / 16, "relu", {"section": "kept", "dtype": "float16"}, "share_of_input"),
    *(kept(name, ", bytes an element", 1 / 8, "kept_per_element") for name in BITS if name != "relu"),
    *(kept(name, " beyond the input", 0, "beyond_inputs") for name in ("elu", "celu", "selu")),
    kept("relu_squared", " beyond the output", 0, "beyond_output", dtype=("float32", "bfloat16").__contains__),
    kept("relu_squared", " beyond the input, float16", 0, "beyond_inputs", dtype="float16"),
    *(kept(name, " beyond the inputs", 0, "beyond_inputs") for name in ("prelu", "prelu_channels", "reglu")),
)
FAMILY_CPU_TARGETS = (
    *(
        Target(f"{o.name}: call, with and without grad", 0.8, o.name, {"section": "host", "step": CALLS.__contains__})
        for o in OPERATIONS
        if o.name != "relu"
    ),
    *(in_cache(name, TRAINING, 0.9, "float32") for name in BITS),
    *(in_cache(name, TRAINING, 0.85 if name == "leaky_relu" else 0.6, "bfloat16") for name in BITS),
    in_cache("elu", FORWARD, 0.25),
    in_cache("relu_squared", FORWARD, 0.6, "float32"),
    in_cache("relu_squared", FORWARD, 0.06, "float16"),
    in_cache("relu_squared", TRAINING, 0.5, "float32"),
    in_cache("reglu", TRAINING, 0.6),
)
CPU_TARGETS = (
    Target("relu: call, 64 elements", 0.65, "relu", {"section": "host", "step": CALL}),
    Target("relu: call with grad, 64 elements", 0.80, "relu", {"section": "host", "step": CALL_GRAD}),
    Target("relu: module, 64 elements", 0.80, "relu", {"section": "host", "step": MODULE}),
    Target("relu: backward per layer, 64 elements", 0.90, "relu", {"section": "host", "step": CHAIN_BACKWARD}),
    Target("relu: forward in cache", 1.0, "relu", {"section": "speed", "step": FORWARD, "in_cache": True}),
    Target("relu: backward from bits, every size", 1.0, "relu", {"section": "speed", "step": BACKWARD}),
    *FAMILY_CPU_TARGETS,
    *KEPT_TARGETS,
)


def large(step: str, **where: Any) -> dict[str, Any]:
    return {"section": "speed", "step": step, "tensor_bytes": lambda size: size >= LARGE, **where}


SMALL_CELLS = {"section": "speed", "elements": lambda count: count <= SMALL}
CUDA_TARGETS = (
    # 95 % of the copy's bandwidth.
    Target("relu: forward over a copy, 256 MB and more", 1 / 0.95, "relu", large(FORWARD), "over_copy"),
    Target("relu: backward over a copy, 256 MB and more", 1 / 0.95, "relu", large(BACKWARD), "over_copy"),
    Target("relu: fwd + bwd, float32, 256 MB and more", 0.83, "relu", large(TRAINING, dtype="float32")),
    Target("relu: fwd + bwd, bfloat16, 256 MB and more", 0.85, "relu", large(TRAINING, dtype="bfloat16")),
    Target("relu: every step, 64 to 1M elements", 1.0, "relu", SMALL_CELLS),
    Target("relu: call, 64 elements", 0.85, "relu", {"section": "host", "step": CALL}),
    Target("relu: call with grad, 64 elements", 0.85, "relu", {"section": "host", "step": CALL_GRAD}),
    Target("relu: kernels of a forward", 1, "relu", {"section": "kernels", "step": FORWARD}, "kernels"),
    Target("relu: kernels of a backward", 1, "relu", {"section": "kernels", "step": BACKWARD}, "kernels"),
    *KEPT_TARGETS,
)
TARGETS = {"cpu": CPU_TARGETS, "cuda": CUDA_TARGETS}
