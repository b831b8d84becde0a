"""A whole model's activations fused with their neighbours."""

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from . import neighbours, rewriting, source
from .convert import replace, restore
from .report import Report
from .rewriting import NotTraceable, Trace

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FRESH = (*CONVOLUTIONS, nn.Linear, *neighbours.BATCH_NORMS)  # modules whose output is new memory


def fuse(model: nn.Module, example_inputs: Any = None) -> Report:
    """Fuses the ReLUs of ``model`` with their neighbours, in place; :func:`relu_ext.revert` undoes it.

    In place, because a model is more than its forward: it stays the object of its class that it is, with ``generate``
    and ``config``, its names, state_dict, hooks and parameters, and whatever holds a part of it. A module in whose
    forward something was fused gets a subclass of its class with another ``forward``, as a parametrization does.

    Args:
        model: any module. Each of the modules in it has its own forward traced with torch.fx, where that can be; the
            modules that it calls stay calls. A ReLU and the dropout that the source of the module's class shows to be
            called on its output, as in T5's feed-forward and nn.TransformerEncoderLayer, need no trace.
        example_inputs: None, or what ``model`` takes: a tensor, a tuple of arguments or a dict of keyword arguments.
            The model is run on it in eval mode; a module whose outputs are not the same as before, but for rounding,
            gets its forward back.

    Returns:
        A :class:`Report`: from the place (``"layer1.0.relu"``) to what was called there and what is called now.
        ``left_alone`` gives the reason for every ReLU that has such a neighbour, or might have, and was left.

    What is fused, if nobody else uses what lies between:

    - ``x + y``, then ReLU: :func:`add_relu`.
    - batch normalisation, then perhaps an addition, then ReLU. A frozen one, with buffers like torchvision's
      FrozenBatchNorm2d and that formula: :func:`scale_shift_relu`, which in float32 and float64 has torch's numbers bit
      for bit, gradients too. torch's own: :func:`fma_relu` while it is in eval mode; torch's outputs bit for bit where
      the CPU has fused multiply-adds, else and in its gradients numbers as near to the truth. torch's own in 16 bits,
      or in other types than the input, is not fused.
    - ReLU, then dropout: :func:`relu_dropout`, which has the first claim on a ReLU. In training other elements are
      dropped than by ``F.dropout``, as many.
    - linear layer, then ReLU: :func:`linear_relu`.

    The modules stay where they are, and what is fused looks at them in each call: a hook registered on one of them
    later is called, one that is replaced is used, and under torch.compile, export and TorchScript the model is what it
    was. Arguments that are no tensors or are given by name, and plain attributes with other values than now, lead to
    the forward as it was. A graph has what globals and attributes of other objects were when it was made.
    """
    report = Report()
    rewritten: dict[str, tuple[nn.Module, dict]] = {}
    traces: dict[nn.Module, list[Trace] | NotTraceable] = {}
    for name, module in model.named_modules():
        if not _has_own_forward(module):
            continue
        if pairs := _neighbours(module):
            replace(module, "__class__", source.with_pairs_fused(type(module), tuple(pairs)))
            for relu, dropout in pairs:
                report[_join(name, relu)] = f"{relu}, {dropout}", "relu_ext.relu_dropout"
            continue
        paths = _traces(module, traces)
        if isinstance(paths, NotTraceable):
            if any(_is_relu_module(child) for child in module.children()):
                report.left_alone[name] = str(paths)
        elif changes := _fuse_graphs(module, name, paths, traces, report):
            try:
                replace(module, "__class__", rewriting.rewrite(module, paths))
            except NotTraceable as reason:
                report.left_alone[name] = str(reason)
                continue
            report.update(changes)
            rewritten[name] = module, changes
    if example_inputs is not None:
        _verify(model, example_inputs, rewritten, report)
    return report


def _has_own_forward(module: nn.Module) -> bool:
    """Whether it calls others in a forward that is Python's: not torch's layers, nor what was rewritten already."""
    cls = type(module)
    if isinstance(module, torch.jit.ScriptModule | fx.GraphModule) or cls.forward is nn.Module.forward:
        return False
    package = cls.__module__.partition(".")[0]
    return package != "relu_ext" and (bool(module._modules) or package != "torch")


def _join(*names: str) -> str:
    return ".".join(name for name in names if name)


def _traces(module: nn.Module, traces: dict) -> list[Trace] | NotTraceable:
    if module not in traces:
        try:
            traces[module] = rewriting.trace(module)
        except NotTraceable as reason:
            traces[module] = reason
    return traces[module]


# Graphs


def _labels(graph: fx.Graph) -> dict[fx.Node, str]:
    """What a user calls each node: a module by its name, with a number where it is called again."""
    calls: Counter = Counter()
    labels = {}
    for node in graph.nodes:
        labels[node] = node.name
        if node.op == "call_module":
            calls[node.target] += 1
            labels[node] = node.target + (f" ({calls[node.target]})" if calls[node.target] > 1 else "")
    return labels


def _fuse_graphs(module: nn.Module, name: str, paths: list[Trace], traces: dict, report: Report) -> dict:
    """Rewrites the graphs; what was fused, by place. What was not goes into the report."""
    changes = {}
    for path in paths:
        labels = _labels(path.graph)
        for node, label in labels.items():
            if _is_relu(module, node):
                place = _join(name, label)
                outcome = _fuse_at(_Site(module, path.graph, node, labels, traces))
                if isinstance(outcome, str):
                    report.left_alone[place] = outcome
                elif outcome:
                    changes[place] = outcome
    return changes


class _Site:
    """A ReLU in a graph, with what a pattern needs to know of its surroundings."""

    def __init__(self, module: nn.Module, graph: fx.Graph, relu: fx.Node, labels: dict, traces: dict) -> None:
        self.module, self.graph, self.relu, self.labels, self.traces = module, graph, relu, labels, traces

    def names(self, *nodes: fx.Node) -> str:
        return ", ".join(self.labels[node] for node in nodes)

    def child(self, node: Any) -> nn.Module | None:
        """The module that a node calls."""
        if isinstance(node, fx.Node) and node.op == "call_module":
            return self.module.get_submodule(node.target)
        return None

    def handle(self, node: fx.Node) -> Any:
        """The module itself as a value; None where a function is called."""
        return self.graph.get_attr(node.target) if node.op == "call_module" else None

    def reason_to_keep(self, node: fx.Node) -> str | None:
        """Why a call whose output is to be fused with what follows has to stay."""
        child = self.child(node)
        if child is not None and not neighbours.is_plain(child, (type(child),)):
            return f"{self.names(node)} has hooks or a forward of its own"
        return f"{self.names(node)} is used elsewhere, too" if len(node.users) > 1 else None

    def fuse(self, at: fx.Node, last: fx.Node, function: Callable, modules: list[fx.Node], *arguments: Any) -> None:
        """Calls ``function`` in the place of ``at``; what used ``last`` uses that."""
        with self.graph.inserting_before(at):
            handles = [self.handle(node) for node in modules]
            fused = self.graph.call_function(function, (*handles, *arguments))
        last.replace_all_uses_with(fused)
        for node in reversed(list(self.graph.nodes)):
            if node in (last, self.relu, at, *modules):
                self.graph.erase_node(node)

    def is_private(self, node: fx.Node) -> bool:
        """Whether nobody but its one user sees a value."""
        return len(node.users) == 1 and _is_fresh(self.module, node, self.traces)

    def calls(self, node: fx.Node) -> int:
        """How often the module that a node calls is called."""
        return sum(other.op == node.op and other.target == node.target for other in self.graph.nodes)


def _is_fresh(module: nn.Module, node: fx.Node, traces: dict) -> bool:
    """Whether a value in the graph of ``module`` is new memory, which is held by nobody outside of the graph."""
    if node.op != "call_module":
        return node.op == "call_function" and node.target in (operator.add, operator.mul, torch.add)
    child = module.get_submodule(node.target)
    if not neighbours.is_plain(child, (type(child),)):
        return False  # a hook may keep it
    if type(child) in FRESH:
        return True
    if type(child) in (nn.Identity, *neighbours.RELUS):
        return _is_fresh(module, node.args[0], traces)
    paths = _traces(child, traces) if _has_own_forward(child) else []
    if not paths or isinstance(paths, NotTraceable):
        return False
    outputs = [path.graph.output_node().args[0] for path in paths]
    return all(isinstance(output, fx.Node) and _is_fresh(child, output, traces) for output in outputs)


def _is_relu_module(module: nn.Module | None) -> bool:
    return type(module) in neighbours.RELUS


def _is_relu(module: nn.Module, node: fx.Node) -> bool:
    if not (node.args and isinstance(node.args[0], fx.Node)):
        return False
    if node.op == "call_module":
        return _is_relu_module(module.get_submodule(node.target))
    if node.op == "call_method":
        return node.target in ("relu", "relu_")
    return node.op == "call_function" and node.target in neighbours.RELU_FUNCTIONS


def _fuse_at(site: _Site) -> tuple[str, str] | str | None:
    """What was called and what is called now; or why it was left alone; None where there is nothing to fuse."""
    relu = site.child(site.relu)
    if relu is not None and not neighbours.is_plain(relu, neighbours.RELUS):
        return f"{site.names(site.relu)} has hooks or a forward of its own"
    return _fuse_after(site) or _fuse_before(site)


def _fuse_after(site: _Site) -> tuple[str, str] | str | None:
    """With what takes the ReLU's output."""
    relu = site.relu
    dropout = next(iter(relu.users), None)
    if dropout is None or len(relu.users) > 1:
        return None
    input, before = relu.args[0], site.names(relu, dropout)
    is_private = site.is_private(input)
    if type(site.child(dropout)) in neighbours.DROPOUTS:
        if not neighbours.is_plain(site.child(dropout), neighbours.DROPOUTS):
            return f"{site.names(dropout)} has hooks or a forward of its own"
        function, modules, arguments = neighbours.relu_then_dropout, [relu, dropout], (input, is_private)
    elif p := _dropped(dropout):
        function, modules, arguments = neighbours.relu_then_dropped, [relu], (input, p, is_private)
    else:
        return None
    if not is_private and _is_in_place(site):
        return f"{site.names(relu)} changes in place what may be used elsewhere, too"
    site.fuse(relu, dropout, function, modules, *arguments)
    return before, "relu_ext.relu_dropout"


def _is_in_place(site: _Site) -> bool:
    relu = site.relu
    if relu.op == "call_module":
        return site.child(relu).inplace
    inplace = [*relu.args[1:], *relu.kwargs.values()]
    return relu.target in ("relu_", *neighbours.IN_PLACE) or inplace not in ([], [False])


def _dropped(node: fx.Node) -> float:
    """p of a call of F.dropout in training; 0 of everything else."""
    if node.op != "call_function" or node.target is not F.dropout:
        return 0
    bound = inspect.signature(F.dropout).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    p, training = bound.arguments["p"], bound.arguments["training"]
    return p if training is True and isinstance(p, float) and 0 < p <= 1 else 0


def _fuse_before(site: _Site) -> tuple[str, str] | str | None:
    """With what the ReLU rectifies."""
    relu = site.relu
    producer = relu.args[0]
    if _is_sum(producer):
        return _fuse_sum(site, producer)
    child = site.child(producer)
    eps = _eps(child)
    if type(child) not in neighbours.LINEARS and not isinstance(eps, float):
        return eps
    if reason := site.reason_to_keep(producer):
        return reason
    before, input = site.names(producer, relu), producer.args[0]
    if isinstance(eps, float):
        site.fuse(producer, relu, neighbours.norm_then_relu, [producer, relu], input, eps)
        return before, _norm_relu(child)
    site.fuse(producer, relu, neighbours.linear_then_relu, [producer, relu], input)
    return before, "relu_ext.linear_relu"


def _is_sum(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)


def _fuse_sum(site: _Site, add: fx.Node) -> tuple[str, str] | str:
    relu, in_place = site.relu, add.target in (operator.iadd, "add_")
    if len(add.args) != 2 or add.kwargs or not all(isinstance(operand, fx.Node) for operand in add.args):
        return f"{site.names(add)} does not add two tensors"
    if reason := site.reason_to_keep(add):
        return reason
    if in_place and not site.is_private(add.args[0]):
        return f"{site.names(add)} changes in place what may be used elsewhere, too"
    for norm, residual in (add.args, add.args[::-1]):
        child = site.child(norm)
        eps = _eps(child)
        # It is computed when the sum is, perhaps later than before: nothing may change its input or statistics before.
        is_last = isinstance(eps, float) and norm is not residual and not site.reason_to_keep(norm)
        if is_last and site.calls(norm) == 1 and site.is_private(norm.args[0]):
            before = site.names(norm, add, relu)
            arguments = norm.args[0], residual, eps, in_place
            site.fuse(add, relu, neighbours.norm_then_add_then_relu, [norm, relu], *arguments)
            return before, _norm_relu(child)
    before = site.names(add, relu)
    site.fuse(add, relu, neighbours.add_then_relu, [relu], *add.args, in_place)
    return before, "relu_ext.add_relu"


def _norm_relu(norm: nn.Module) -> str:
    is_frozen = neighbours.is_frozen_batch_norm(norm)
    return "relu_ext.scale_shift_relu" if is_frozen else "relu_ext.fma_relu, in eval mode"


# Batch normalisation


def _eps(norm: nn.Module | None) -> float | str | None:
    """Of a batch normalisation that may be fused; why it may not; None for all other modules."""
    if type(norm) in neighbours.BATCH_NORMS:
        return float(norm.eps) if norm.running_var is not None else f"{type(norm).__name__} has no running statistics"
    if norm is not None and neighbours.is_frozen_batch_norm(norm):
        return _frozen_eps(norm) or f"{type(norm).__name__} is not the formula of a frozen batch normalisation"
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        return f"{type(norm).__name__} may compute something else than torch's batch normalisation"
    return None


def _frozen_eps(norm: nn.Module) -> float | None:
    """Of a module with the buffers of a frozen batch normalisation, if it computes that.

    Not all keep it as an attribute. With a variance of 0 and otherwise neutral buffers it is the inverse square of what
    the module makes of 1; then the formula has to give the module's own numbers.
    """
    try:
        probe = copy.deepcopy(norm).double()
    except Exception:
        return None
    values = torch.linspace(-2, 3, 5, dtype=torch.float64, device=probe.running_var.device)
    input = values.view(1, 1, 1, -1).expand(1, probe.running_var.numel(), 1, -1)
    vectors = {name: torch.zeros_like(probe._buffers[name]) for name in neighbours.FROZEN_BUFFERS}
    vectors["weight"] += 1
    try:
        with torch.no_grad():
            _set_buffers(probe, vectors)
            ones = probe(torch.ones_like(input))
            eps = float(f"{ones.flatten()[0].item() ** -2:.6g}")
            for number, name in enumerate(sorted(neighbours.FROZEN_BUFFERS)):
                vectors[name] = torch.linspace(0.5, 1.5 + number, vectors[name].numel(), dtype=torch.float64)
            _set_buffers(probe, {name: vector.to(input.device) for name, vector in vectors.items()})
            scale, shift = neighbours.scale_and_shift(probe, eps)
            expected = input * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
            # eps was measured to 6 digits; it is far below the variances here
            return eps if torch.allclose(probe(input), expected, rtol=1e-9, atol=1e-9) else None
    except Exception:
        return None


def _set_buffers(module: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        module._buffers[name] = value


# Neighbours in the source


def _neighbours(module: nn.Module) -> list[tuple[str, str]]:
    """Attributes of a ReLU and a dropout that is called on its output."""
    attributes = {**vars(module), **module._modules}
    relus = {name for name, value in attributes.items() if neighbours.is_relu(value)}
    dropouts = {name for name, value in attributes.items() if neighbours.is_plain(value, neighbours.DROPOUTS)}
    if not (relus and dropouts):
        return []
    return [pair for pair in source.pairs_of(type(module)) if pair[0] in relus and pair[1] in dropouts]


# Verifying


def _verify(model: nn.Module, example_inputs: Any, rewritten: dict, report: Report) -> None:
    """Runs the model; what does not give what its own forward gives gets that back.

    ``rewritten`` has, by name, each module with its part of the report.
    """
    expected: dict[nn.Module, Any] = {}
    wrong: set[nn.Module] = set()

    def before(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        args, kwargs = tree_map_only(Tensor, torch.clone, (args, kwargs))
        expected[module] = type(module).__base__.forward(module, *args, **kwargs)

    def after(module: nn.Module, _args: tuple, output: Any) -> None:
        if not _are_close(output, expected.pop(module)):
            wrong.add(module)

    flags = {module: module.training for module in model.modules()}
    handles = [module.register_forward_pre_hook(before, with_kwargs=True) for module, _ in rewritten.values()]
    handles += [module.register_forward_hook(after) for module, _ in rewritten.values()]
    keywords = example_inputs if isinstance(example_inputs, Mapping) else {}
    args = (example_inputs,) if isinstance(example_inputs, Tensor) else () if keywords else example_inputs
    try:
        with torch.no_grad():
            model.eval()(*args, **keywords)
    finally:
        for handle in handles:
            handle.remove()
        for module, training in flags.items():
            module.training = training
    for name, (module, changes) in rewritten.items():
        if module in wrong:
            restore(module)
            for place in changes:
                del report[place]
            report.left_alone[name] = "the example inputs gave other outputs"


def _are_close(ours: Any, theirs: Any) -> bool:
    """But for rounding, which is a thousand times smaller than this; a wrong graph is off by the numbers' own size."""
    ours, theirs = tree_leaves(ours), tree_leaves(theirs)
    if len(ours) != len(theirs):
        return False
    for a, b in zip(ours, theirs, strict=True):
        if isinstance(a, Tensor) and a.is_floating_point():
            if a.shape != b.shape or a.dtype != b.dtype:
                return False
            both = a.double().nan_to_num(), b.double().nan_to_num()
            if a.numel() and (both[0] - both[1]).abs().max() > 1e-3 * both[1].abs().max():
                return False
    return True
