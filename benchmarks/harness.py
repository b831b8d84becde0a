"""How it is measured: competitors in turns, correctness first, bytes kept for backward."""

from __future__ import annotations

import math
import random
import time
import timeit
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from cases import BACKWARD, FORWARD, Operation
from torch.utils.benchmark import Timer
from torch.utils.benchmark.utils.common import set_torch_threads

# A block of calls this long makes the clock's own cost and resolution (0.1 us) invisible, and the first calls, for
# which the caches still hold another competitor's tensors, few.
BLOCK_SECONDS = 2e-2
# No cache holds anything of what a call this long began with: nothing is to be warmed up.
LONG_SECONDS = 1e-1
# Where a virtual machine gives free memory back to its host, a huge page that it then gets again may take milliseconds:
# of so many rounds the median seldom is one with it.
LEAST_ROUNDS = 9
MOST_ROUNDS = 200
PART = 2**18  # elements

Spread = dict[str, float]
Sampler = Callable[[], float]  # seconds per layer, measured anew


class Call(NamedTuple):
    function: Callable[..., Any]
    args: tuple[Any, ...]
    layers: int = 1  # the time is reported per layer


def spread(samples: list[float]) -> Spread:
    median, low, high = torch.tensor(samples, dtype=torch.float64).quantile(
        torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
    )
    return {"median": median.item(), "q20": low.item(), "q80": high.item()}


def quotients(samples: dict[str, list[float]], of: str, over: str, factor: float = 1.0) -> Spread | None:
    """One's time divided by `factor` times that of another, round by round."""
    if over not in samples:
        return None
    return spread([a / (factor * b) for a, b in zip(samples[of], samples[over], strict=True)])


def call_statement(call: Call) -> dict[str, Any]:
    """The call as a statement, for timers that compile one."""
    names = [f"x{i}" for i in range(len(call.args))]
    variables = {"f": call.function, **dict(zip(names, call.args, strict=True))}
    return {"stmt": f"f({', '.join(names)})", "globals": variables}


def wall_clock(call: Call, threads: int, block: float = BLOCK_SECONDS) -> Sampler:
    """The time until the result is there, for the CPU; from as many calls as take `block` seconds."""
    timer = Timer(**call_statement(call), num_threads=threads)
    estimate = timer.blocked_autorange(min_run_time=1e-9).median
    if estimate > LONG_SECONDS:
        bare = timeit.Timer(**call_statement(call))

        def sample() -> float:
            with set_torch_threads(threads):
                return bare.timeit(1) / call.layers

        return sample
    if estimate > block:
        # One call to warm up and one that counts; Timer.timeit would warm up with two.
        return lambda: timer.blocked_autorange(min_run_time=block).median / call.layers
    estimate = timer.timeit(max(1, int(block / 4 / estimate))).median
    number = max(1, int(block / estimate))
    return lambda: timer.timeit(number).median / call.layers


def measure(
    calls: dict[str, Call], seconds: float, sampler: Callable[[Call], Sampler], least: int = LEAST_ROUNDS
) -> dict[str, list[float]]:
    """Seconds per layer of each call, one number per round, of which there are at least so many.

    The competitors take turns in a new order each round, so that a change of clock or a neighbour on the machine
    meets all of them, and the numbers of one round can be divided by each other.
    """
    samplers = {name: sampler(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order, shuffle = list(calls), random.Random(0).shuffle
    end = time.perf_counter() + seconds
    for done in range(MOST_ROUNDS):
        if done >= least and time.perf_counter() > end:
            break
        shuffle(order)
        for name in order:
            samples[name].append(samplers[name]())
    return samples


class Problem(NamedTuple):
    operands: tuple[torch.Tensor, ...]
    grad: torch.Tensor  # of the output
    constants: tuple[int, ...]  # places of the operands that need no gradient

    def leaves(self) -> tuple[torch.Tensor, ...]:
        found = enumerate(self.operands)
        return tuple(operand.detach().requires_grad_(place not in self.constants) for place, operand in found)


def problem(operation: Operation, dims: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Problem:
    """Operands of both signs, and a gradient of the output."""
    generator = torch.Generator(device).manual_seed(0)

    def random(*dims: int) -> torch.Tensor:
        return torch.randn(*dims, device=device, generator=generator).to(dtype)

    operands = operation.operands(random, dims)
    return Problem(tuple(operands), random(*operation.function.torch(*operands).shape), operation.constants)


def needing_grad(inputs: Iterable[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    return tuple(tensor for tensor in inputs if tensor.requires_grad)


def gradients(output: torch.Tensor, inputs: tuple[torch.Tensor, ...], grad: torch.Tensor, keep: bool = False) -> tuple:
    """torch.autograd.grad without its Python, which takes longer than many operations here and which a model pays once
    for all its layers. The engine itself, from the same entry, is measured."""
    engine = torch.autograd.Variable._execution_engine
    return engine.run_backward((output,), (grad,), keep, False, inputs, allow_unreachable=False, accumulate_grad=False)


def train(
    function: Callable[..., torch.Tensor],
    inputs: tuple[torch.Tensor, ...],
    wanted: tuple[torch.Tensor, ...],
    grad: torch.Tensor,
) -> tuple:
    return gradients(function(*inputs), wanted, grad)


def training(function: Callable[..., torch.Tensor], problem: Problem, layers: int = 1) -> Call:
    inputs = problem.leaves()
    return Call(train, (function, inputs, needing_grad(inputs), problem.grad), layers)


def chain(function: Callable[..., torch.Tensor], layers: int) -> Callable[..., torch.Tensor]:
    def apply(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        for _ in range(layers):
            x = function(x, *others)
        return x

    return apply


def chain_backward(function: Callable[..., torch.Tensor], problem: Problem, layers: int) -> Call:
    inputs = problem.leaves()
    output = chain(function, layers)(*inputs)
    return Call(partial(gradients, keep=True), (output, needing_grad(inputs), problem.grad), layers)


def is_one_node(node: torch.autograd.graph.Node) -> bool:
    return all(after is None or "AccumulateGrad" in after.name() for after, _ in node.next_functions)


def backward_calls(functions: dict[str, Callable[..., torch.Tensor]], problem: Problem) -> dict[str, Call]:
    """The backward alone. Where each graph is one node, the node is called without autograd's engine, which costs
    tens of microseconds a call and would hide the difference."""
    outputs = {name: function(*problem.leaves()) for name, function in functions.items()}
    if all(is_one_node(output.grad_fn) for output in outputs.values()):
        return {name: Call(output.grad_fn, (problem.grad,)) for name, output in outputs.items()}
    return {name: chain_backward(function, problem, 1) for name, function in functions.items()}


def step_calls(step: str, functions: dict[str, Callable[..., torch.Tensor]], problem: Problem) -> dict[str, Call]:
    if step == FORWARD:
        return {name: Call(function, problem.operands) for name, function in functions.items()}
    if step == BACKWARD:
        return backward_calls(functions, problem)
    return {name: training(function, problem) for name, function in functions.items()}


def copy_calls(source: torch.Tensor) -> dict[str, Call]:
    """The best of these is the limit. `copy_` writes to memory that it has; `clone` also asks for some, which on a GPU
    costs nothing and on a CPU page faults."""
    calls = {"copy_": Call(torch.empty_like(source).copy_, (source,))}
    return calls if source.is_cuda else {"clone": Call(torch.clone, (source,)), **calls}


def assert_equal(operation: Operation, ours: Any, expected: Any) -> None:
    # torch.equal is the quick way; assert_close has the message, the tolerance and NaN.
    if not all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(ours, expected, strict=True)):
        shape, dtype = tuple(expected[0].shape), expected[0].dtype
        tolerance = operation.ulps * torch.finfo(dtype).eps
        for a, b in zip(ours, expected, strict=True):
            # The gradient of a weight is a sum; rounding errors of n terms grow like the root of n.
            absolute = tolerance * math.sqrt(expected[0].numel() / b.numel()) + operation.cancelled
            assert a.shape == b.shape, f"relu_ext.{operation.name}: {tuple(a.shape)} instead of {tuple(b.shape)}"
            # In parts, for which assert_close's many temporaries stay in the cache.
            for part, wanted in zip(a.flatten().split(PART), b.flatten().split(PART), strict=True):
                torch.testing.assert_close(
                    part,
                    wanted,
                    rtol=tolerance,
                    atol=absolute,
                    equal_nan=True,
                    msg=lambda text: f"relu_ext.{operation.name} is not its definition at {shape}, {dtype}: {text}",
                )


def results(function: Callable[..., torch.Tensor], problem: Problem) -> tuple[torch.Tensor, ...]:
    inputs = problem.leaves()
    output = function(*inputs)
    return output.detach(), *torch.autograd.grad(output, needing_grad(inputs), problem.grad)


def check(operation: Operation, problem: Problem) -> None:
    """Output and gradients equal the definition, or AssertionError."""
    ours = results(operation.function.ours, problem)
    assert_equal(operation, ours, results(operation.definition(ours[0]), problem))
    output = operation.function.ours(*problem.operands)
    if not torch.equal(output, ours[0]):  # as where it is random
        assert_equal(operation, [output], [operation.definition(output)(*problem.operands)])


def check_other_forms(operation: Operation, problem: Problem) -> None:
    first, *others = problem.operands
    if operation.inplace:
        assert_equal(operation, *([function(first.clone(), *others)] for function in operation.inplace))
    if operation.module:
        assert_equal(operation, *([build()(first, *others)] for build in operation.module))


@contextmanager
def kept_storages(excluded: Iterable[torch.Tensor] = ()) -> Iterator[dict[int, int]]:
    """Bytes of every storage that autograd keeps for backward while the block runs, by address: each counts once."""
    known = {tensor.untyped_storage().data_ptr() for tensor in excluded}
    storages: dict[int, int] = {}
    alive = []  # a freed address could come back as another storage

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            alive.append(storage)
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield storages


class Kept(NamedTuple):
    """Bytes: all that is kept, and what would be if others kept the inputs, the output, both, or those inputs that need
    no gradient, anyway."""

    all: int
    beyond_inputs: int
    beyond_output: int
    beyond_both: int
    beyond_constants: int


def kept_bytes(function: Callable[..., torch.Tensor], problem: Problem) -> Kept:
    inputs = problem.leaves()
    with kept_storages() as storages:
        output = function(*inputs)

    def beyond(tensors: Iterable[torch.Tensor]) -> int:
        others = {tensor.untyped_storage().data_ptr() for tensor in tensors}
        return sum(count for address, count in storages.items() if address not in others)

    constants = [inputs[place] for place in problem.constants]
    return Kept(*map(beyond, ([], inputs, [output], [*inputs, output], constants)))
