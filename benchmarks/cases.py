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


def beside(vectors: int, residuals: int = 0) -> Callable[[Random, tuple[int, ...]], list[Tensor]]:
    """An input, so many vectors of a value for each of its channels, and so many tensors like it."""

    def operands(random: Random, dims: tuple[int, ...]) -> list[Tensor]:
        more = [dims[1:2]] * vectors + [dims] * residuals
        return [random(*size) for size in (dims, *more)]

    return operands


def feed_forward(random: Random, dims: tuple[int, ...]) -> list[Tensor]:
    """Input, weight and bias of a linear layer four times as wide behind as before, as transformers have it."""
    width = dims[-1]
    return [random(math.prod(dims[:-1]), width // 4), random(width, width // 4), random(width)]


SMALL = 2**20  # elements; in the last-level cache of most machines
ROW = 2**10


def rows(elements: int) -> tuple[int, ...]:
    return (elements // ROW, ROW) if elements >= SMALL and elements % ROW == 0 else (elements,)


def planes(elements: int) -> tuple[int, ...]:
    """Up to 16 images of up to 64 channels."""
    channels = math.gcd(elements, 64)
    images = math.gcd(elements // channels, 16)
    return images, channels, elements // channels // images


def size_name(elements: int) -> str:
    for factor, unit in ((2**20, "M"), (2**10, "K")):
        if elements >= factor and elements % factor == 0:
            return f"{elements // factor}{unit}"
    return str(elements)


@dataclass(frozen=True)
class Shape:
    name: str
    dims: tuple[int, ...]  # of the output
    # Inductor specialises on the shape, which costs 3 s of g++ per shape and dtype for forward and training.
    compiled: bool = False
    steps: tuple[str, ...] = STEPS

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


def networks(shapes: dict[str, tuple[int, ...]]) -> tuple[Shape, ...]:
    """What a model pays for, inference and training; the backward alone is measured at the sizes."""
    return tuple(Shape(name, dims, steps=(FORWARD, TRAINING)) for name, dims in shapes.items())


# The ends of residual blocks, stage by stage (arXiv:1512.03385, table 1), batch 32.
RESIDUAL_SHAPES = networks(
    {
        "ResNet-50 conv2_x": (32, 256, 56, 56),
        "ResNet-50 conv3_x": (32, 512, 28, 28),
        "ResNet-50 conv4_x": (32, 1024, 14, 14),
        "ResNet-50 conv5_x": (32, 2048, 7, 7),
    }
)
# Detectors freeze the batch normalisation of their backbones (arXiv:1512.03385, appendix A). Two images of 800 x 1088
# in ResNet-50: after its first convolution, and within the blocks of two stages.
FROZEN_SHAPES = networks(
    {
        "Mask R-CNN conv1": (2, 64, 400, 544),
        "Mask R-CNN conv2_x": (2, 64, 200, 272),
        "Mask R-CNN conv4_x": (2, 256, 50, 68),
    }
)
TOKEN_SHAPES = networks({"OPT-125M ffn": (8, 512, 3072)})
TOKEN_ROWS = networks({"OPT-125M ffn": (8 * 512, 3072)})
LINEAR_ROWS = networks({"OPT-125M 512 rows": (512, 3072), "OPT-125M 4096 rows": (4096, 3072)})


@dataclass(frozen=True)
class Operation:
    """A row of every table. `function.torch` is the definition that `function.ours` must equal, but for so many `ulps`.

    A pass is one tensor of the input's size, read or written. Where the result of a layer is kept for backward, that
    is no pass of its own; packed bits are, `bits` of them an element, written in forward and read in backward. Without
    passes it is arithmetic that takes the time, and there is no copy to compare with.
    """

    name: str
    torch_name: str
    function: Pair
    inplace: Pair | None = None
    module: Pair | None = None
    operands: Callable[[Random, tuple[int, ...]], list[Tensor]] = one_input  # for an output of these dims
    constants: tuple[int, ...] = ()  # places of the operands that need no gradient
    dims: Callable[[int], tuple[int, ...]] = rows  # of so many elements
    networks: tuple[Shape, ...] = ()  # measured beside the sizes
    # What the output must equal, of it and the operands, where that is not what function.torch makes of the operands.
    expected: Callable[..., Tensor] | None = None
    curve: dict[str, Callable[[Tensor], Tensor]] | None = None  # what is drawn; None: the function
    every_shape: bool = False  # else few shapes, and of the host time a call alone: the default run stays short
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    forward_passes: int | None = 2
    backward_passes: int | None = 2
    bits: int = 0
    ulps: int = 0
    cancelled: float = 0.0  # the absolute error of a sum of terms larger than itself, in float32

    def definition(self, output: Tensor) -> Callable[..., Tensor]:
        return partial(self.expected, output) if self.expected else self.function.torch

    def passes(self, step: str, itemsize: int) -> float | None:
        if self.forward_passes is None or self.backward_passes is None:
            return None
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

FAMILY = (
    Operation(
        name="relu",
        torch_name="torch.relu",
        function=Pair(relu_ext.relu, torch.relu),
        inplace=Pair(relu_ext.relu_, torch.relu_),
        module=Pair(relu_ext.ReLU, nn.ReLU),
        networks=NETWORK_SHAPES,
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
    replace(PRELU, name="prelu_channels", operands=beside(vectors=1), dims=planes, curve={}),
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


CHANNELS = {2: (1, -1), 3: (1, -1, 1), 4: (1, -1, 1, 1)}  # a vector's view beside a tensor of so many dimensions
# A CPU without instructions for bfloat16 takes ten times as long for the product: minutes a cell.
HAS_BFLOAT16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
MATRIX_DTYPES = ("float32", "bfloat16") if HAS_BFLOAT16 else ("float32",)
DROPPED = 0.1  # as OPT was trained (arXiv:2205.01068, section 2.2)


def scale_shift(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale.view(CHANNELS[x.dim()]) + shift.view(CHANNELS[x.dim()])


def rounded_once(output: Tensor, *operands: Tensor) -> Tensor:
    """relu(x * scale + shift + residual) in float32, where torch would round to 16 bits after each step. A sum so near
    0 that rounding decides on its sign has a gradient where `output` is above 0."""
    x, scale, shift, *residual = (operand.float() for operand in operands)
    total = sum(residual, scale_shift(x, scale, shift))
    return torch.where(output > 0, total, torch.relu(total.detach())).to(output.dtype)


def dropped_alike(output: Tensor, x: Tensor) -> Tensor:
    """relu(x) / (1 - p) where `output` is not 0: that must be 1 - p of all, within six standard deviations."""
    stays, positive = output != 0, int((x > 0).sum())
    share, deviation = int(stays.sum()) / positive, math.sqrt(DROPPED * (1 - DROPPED) / positive)
    assert abs(share - (1 - DROPPED)) <= 6 * deviation, f"{share:.4f} of the elements stay, not {1 - DROPPED}"
    return torch.relu(x) * stays / (1 - DROPPED)


SCALE_SHIFT_RELU = Operation(
    name="scale_shift_relu",
    torch_name="relu(x * scale + shift)",
    function=Pair(relu_ext.scale_shift_relu, lambda x, scale, shift: torch.relu(scale_shift(x, scale, shift))),
    operands=beside(vectors=2),
    constants=(1, 2),  # a frozen batch norm's
    dims=planes,
    networks=FROZEN_SHAPES,
    expected=rounded_once,
    curve={},
    bits=1,
    ulps=1,
    cancelled=4e-6,  # products up to 30, each step of a side rounded or not
)

FUSED = (
    Operation(
        name="add_relu",
        torch_name="relu(x + residual)",
        function=Pair(relu_ext.add_relu, lambda x, residual: torch.relu(x + residual)),
        operands=beside(vectors=0, residuals=1),
        dims=planes,
        networks=RESIDUAL_SHAPES,
        curve={},
        forward_passes=3,
        bits=1,
    ),
    Operation(
        name="bias_relu",
        torch_name="relu(x + bias)",
        function=Pair(relu_ext.bias_relu, lambda x, bias: torch.relu(x + bias.view(CHANNELS[x.dim()]))),
        operands=beside(vectors=1),
        dims=planes,
        networks=TOKEN_ROWS,
        curve={},
        bits=1,
        ulps=4,
    ),
    SCALE_SHIFT_RELU,
    replace(
        SCALE_SHIFT_RELU,
        name="scale_shift_add_relu",
        torch_name="relu(x * scale + shift + residual)",
        function=Pair(relu_ext.scale_shift_relu, lambda x, a, b, residual: torch.relu(scale_shift(x, a, b) + residual)),
        operands=beside(vectors=2, residuals=1),
        networks=RESIDUAL_SHAPES,
        forward_passes=3,
        backward_passes=3,
    ),
    Operation(
        name="relu_dropout",
        torch_name="F.dropout(relu(x))",
        function=Pair(partial(relu_ext.relu_dropout, p=DROPPED), lambda x: F.dropout(torch.relu(x), DROPPED)),
        networks=TOKEN_SHAPES,
        expected=dropped_alike,
        curve={},
        bits=1,
        ulps=1,
    ),
    Operation(
        name="linear_relu",
        torch_name="relu(F.linear(x, weight, bias))",
        function=Pair(relu_ext.linear_relu, lambda x, weight, bias: torch.relu(F.linear(x, weight, bias))),
        operands=feed_forward,
        networks=LINEAR_ROWS,
        curve={},
        dtypes=MATRIX_DTYPES,
        forward_passes=None,
        backward_passes=None,
        ulps=4,
    ),
)
OPERATIONS = FAMILY + FUSED


def sized(operation: Operation, elements: int, compiled: bool) -> Shape:
    return Shape(size_name(elements), operation.dims(elements), compiled)


def largest_size(device: torch.device) -> int:
    # Training keeps six such tensors alive at most: a sixteenth of the memory each leaves room.
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 16 // 4
    return 2 ** int(math.log2(min(4 * last_level_cache(), memory_bytes() // 16) // 4))


def shapes(operation: Operation, device: torch.device) -> list[Shape]:
    """Powers of two from 64 elements to far past the last-level cache, then real networks."""
    largest = largest_size(device)
    if device.type == "cuda":
        # Past every L2 cache from 64M elements on.
        sizes = [64, 2**10, 2**14, 2**17, 2**20, 2**22, 2**24, 2**26, 2**27, 2**28]
        sizes = [size for size in sizes if size <= largest]
    else:
        sizes = [size for size in (64, 2**10, 2**14, 2**17, 2**20, 2**22) if size < largest] + [largest]
    found = [sized(operation, size, compiled=size in (64, 2**20, 2**27)) for size in sizes]
    return found + list(operation.networks)


def few_shapes(operation: Operation, device: torch.device) -> list[Shape]:
    """One in the last-level cache, one far past it where bytes decide and no network's is, then real networks."""
    past = min(2**26, largest_size(device)) if device.type == "cuda" else largest_size(device) // 2
    past_is_needed = operation.forward_passes and all(shape.elements < past for shape in operation.networks)
    sizes = [SMALL, past] if past_is_needed else [SMALL]
    return [sized(operation, size, compiled=size == SMALL) for size in sizes] + list(operation.networks)


HOST_ELEMENTS = 64
CHAIN = 200  # layers
CALL, CALL_GRAD, MODULE, MODULE_GRAD = "call", "call, input with grad", "module", "module, input with grad"
CALLS = (CALL, CALL_GRAD)
INPLACE, CHAIN_BACKWARD, CHAIN_TRAINING = "in place", "backward, a layer of 200", "forward + backward, a layer of 200"

PAST, LARGE = 64 * 2**20, 256 * 2**20  # bytes of a tensor


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


def large(step: str, least: int = LARGE, **where: Any) -> dict[str, Any]:
    return {"section": "speed", "step": step, "tensor_bytes": lambda size: size >= least, **where}


def in_cache(name: str, step: str, limit: float, *dtypes: str) -> Target:
    """At 1M elements, in these dtypes or in all."""
    where = {"section": "speed", "step": step, "elements": SMALL, "in_cache": True}
    where |= {"dtype": dtypes.__contains__} if dtypes else {}
    what = step.replace("forward + backward", "fwd + bwd")
    return Target(f"{name}: {', '.join((what, *dtypes))}, 1M", limit, name, where)


def past_cache(name: str, step: str, limit: float) -> Target:
    what = step.replace("forward + backward", "fwd + bwd")
    return Target(f"{name}: {what}, 64 MB and more", limit, name, large(step, PAST))


BITS = tuple(operation.name for operation in FAMILY if operation.bits)
KEPT_TARGETS = (
    Target("relu: kept, float32", 1 / 32, "relu", {"section": "kept", "dtype": "float32"}, "share_of_input"),
    Target("relu: kept, bfloat16", 1 / 16, "relu", {"section": "kept", "dtype": "bfloat16"}, "share_of_input"),
    Target("relu: kept, float16", 1 / 16, "relu", {"section": "kept", "dtype": "float16"}, "share_of_input"),
    *(kept(name, ", bytes an element", 1 / 8, "kept_per_element") for name in BITS if name != "relu"),
    *(kept(name, " beyond the input", 0, "beyond_inputs") for name in ("elu", "celu", "selu")),
    kept("relu_squared", " beyond the output", 0, "beyond_output", dtype=("float32", "bfloat16").__contains__),
    kept("relu_squared", " beyond the input, float16", 0, "beyond_inputs", dtype="float16"),
    *(kept(name, " beyond the inputs", 0, "beyond_inputs") for name in ("prelu", "prelu_channels", "reglu")),
    *(kept(o.name, ", bytes an element", 1 / 8, "beyond_constants") for o in FUSED if o.bits),
    kept("linear_relu", " beyond inputs and output", 0, "beyond_both"),
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
FUSED_TRAINING = {"add_relu": 0.7, "bias_relu": 0.6, "scale_shift_relu": 0.5, "scale_shift_add_relu": 0.5}
FUSED_CPU_TARGETS = (
    *(in_cache(name, TRAINING, limit) for name, limit in FUSED_TRAINING.items()),
    *(past_cache(name, TRAINING, limit) for name, limit in FUSED_TRAINING.items()),
    in_cache("relu_dropout", FORWARD, 0.03),
    in_cache("relu_dropout", TRAINING, 0.05),
    Target("linear_relu: every shape and step", 1.0, "linear_relu", {"section": "speed"}),
)
CPU_TARGETS = (
    Target("relu: call, 64 elements", 0.65, "relu", {"section": "host", "step": CALL}),
    Target("relu: call with grad, 64 elements", 0.80, "relu", {"section": "host", "step": CALL_GRAD}),
    Target("relu: module, 64 elements", 0.80, "relu", {"section": "host", "step": MODULE}),
    Target("relu: backward per layer, 64 elements", 0.90, "relu", {"section": "host", "step": CHAIN_BACKWARD}),
    Target("relu: forward in cache", 1.0, "relu", {"section": "speed", "step": FORWARD, "in_cache": True}),
    Target("relu: backward from bits, every size", 1.0, "relu", {"section": "speed", "step": BACKWARD}),
    *FAMILY_CPU_TARGETS,
    *FUSED_CPU_TARGETS,
    *KEPT_TARGETS,
)


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
# What roofline.py measures: from 256K to 4M elements over a copy of the same bytes, past the cache, and against torch.
WITH_GRAD = "forward, with grad"
STOCK, HUGE = "as torch comes", "THP_MEM_ALLOC_ENABLE=1"  # pages of large tensors
FULL, HALF = ("float32", "float64"), ("bfloat16", "float16")
BACKWARD_OR_BITS = (BACKWARD, WITH_GRAD)


def over_copy(name: str, limit: float, dtypes: tuple[str, ...], steps: tuple[str, ...] = BACKWARD_OR_BITS) -> Target:
    where = {"elements": lambda count: 2**18 <= count <= 2**22, "pages": STOCK}
    where |= {"dtype": dtypes.__contains__, "step": steps.__contains__}
    text = f"{name}: {' and '.join(steps)} over a copy, {', '.join(dtypes)}, 256K to 4M"
    return Target(text, limit, name, where, "over_copy")


def past_cache_over_copy(name: str) -> Target:
    where = {"pages": HUGE}
    return Target(f"{name}: over clone, 64 MB, huge pages for both", 1.25, name, where, "over_copy")


def large_output(name: str) -> Target:
    where = {"tensor_bytes": lambda size: size > PAST // 2, "pages": STOCK}
    return Target(
        f"{name}: out of place, 64 MB, as torch comes", 1 / 2.5, name, where | {"step": lambda s: s != INPLACE}
    )


ROOFLINE_TARGETS = (
    *(over_copy(name, 1.1, FULL) for name in (*BITS, "add_relu")),
    over_copy("relu", 1.2, HALF, BACKWARD_OR_BITS[1:]),
    over_copy("relu", 0.9, HALF, BACKWARD_OR_BITS[:1]),
    *(over_copy(name, 1.5, HALF) for name in ("relu6", "threshold")),
    over_copy("leaky_relu", 2.0, HALF),
    over_copy("add_relu", 1.8, HALF),
    over_copy("elu", 2.5, ("float32",)),
    *(past_cache_over_copy(o.name) for o in OPERATIONS if o.forward_passes),
    *(large_output(o.name) for o in OPERATIONS if o.forward_passes),
    Target("relu: against torch, bfloat16, 1M", 1 / 3, "relu", {"elements": SMALL, "dtype": "bfloat16"}),
    *(Target(f"{o.name}: against torch, everywhere", 1.03, o.name, {}) for o in OPERATIONS if o.forward_passes),
)
TARGETS = {"cpu": CPU_TARGETS, "cuda": CUDA_TARGETS, "roofline": ROOFLINE_TARGETS}
