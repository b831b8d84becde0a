"""A module's own forward as a torch.fx graph, and a class that runs a changed graph in its place.

Only the module's own forward is traced: the modules that it calls stay calls. So their hooks run, they may be wrapped
or replaced, and a rewritten model has the modules that it had.

A trace sees one path. What could have led it elsewhere is therefore either refused (:class:`NotTraceable`) or checked
at every call of the new forward: that the arguments are tensors, the plain attributes that were read, and the names of
the children. If one differs, the module's own forward runs.
"""

import functools
import importlib
import inspect
import keyword
import linecache
import operator
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

_IN_PLACE = ["iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"]
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"training"}


class NotTraceable(Exception):
    """Why a graph would not be what the forward is."""


class _Value(fx.Proxy):
    """A proxy that does not hide what a forward asks it: its class, and operators in place, which are not others."""

    @property
    def __class__(self) -> type:
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return _Value
        if self.node.op == "placeholder":
            return Tensor  # that it is one is checked at every call
        raise NotTraceable("its forward looks at the type of an intermediate value")


def _operator_in_place(name: str) -> Callable:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", getattr(operator, name), (self, other), {})

    return method


for _name in _IN_PLACE:
    setattr(_Value, f"__{_name}__", _operator_in_place(_name))


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)


@dataclass
class Trace:
    """The path of a module's forward that is taken while ``conditions`` hold: attributes and their values."""

    graph: fx.Graph
    conditions: dict[str, Any]


def trace(module: nn.Module) -> list[Trace]:
    """The forward of ``module`` for tensors in its required arguments and defaults in the others.

    One graph, or one for training and one for eval mode where it asks for the mode. Raises :class:`NotTraceable`.
    """
    if type(type(module)) is not type or "forward" in vars(module):
        raise NotTraceable("it has a metaclass or a forward of its own")
    traces = []
    for training in (module.training, not module.training):
        traces.append(_trace(module, training))
        if "training" not in traces[0].conditions:
            break
    return traces


def _trace(module: nn.Module, training: bool) -> Trace:
    cls, fields, read = type(module), dict(vars(module)), set()
    names = fields.keys() - _OF_EVERY_MODULE

    def reading(self: nn.Module, name: str) -> Any:
        if name in names:
            read.add(name)
        return object.__getattribute__(self, name)

    state = random.getstate(), torch.get_rng_state()
    try:
        recorder = type(cls.__name__, (cls,), {"forward": _of_tensors(cls.forward), "__getattribute__": reading})
        module.training = training
        object.__setattr__(module, "__class__", recorder)
        graph = _Tracer().trace(module)
    except NotTraceable:
        raise
    except Exception as error:  # a forward may do anything with what is no tensor
        raise NotTraceable(f"torch.fx cannot trace its forward: {str(error).partition(chr(10))[0]}") from error
    finally:
        object.__setattr__(module, "__class__", cls)
        module.training = fields["training"]
        changed = vars(module).keys() != fields.keys() or any(vars(module)[name] is not fields[name] for name in fields)
        vars(module).clear()
        vars(module).update(fields)
    if changed:
        raise NotTraceable("its forward sets attributes")
    if random.getstate() != state[0] or not torch.equal(torch.get_rng_state(), state[1]):
        raise NotTraceable("its forward draws random numbers to choose a path")
    return Trace(graph, {name: training if name == "training" else fields[name] for name in sorted(read)})


def _of_tensors(forward: Callable) -> Callable:
    """``forward`` with its required parameters alone, which torch.fx makes its placeholders."""
    parameters = list(inspect.signature(forward).parameters.values())[1:]
    required = [parameter for parameter in parameters if parameter.default is parameter.empty]
    kinds = {parameter.kind for parameter in required}
    if not required or not kinds <= {inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD}:
        raise NotTraceable("its forward has no fixed arguments")
    names = ", ".join(parameter.name for parameter in required)
    namespace: dict[str, Any] = {"forward": forward}
    exec(f"def of_tensors(self, {names}): return forward(self, {names})", namespace)
    return namespace["of_tensors"]


def rewrite(module: nn.Module, traces: list[Trace]) -> type[nn.Module]:
    """A class for ``module`` whose forward runs these graphs. Raises :class:`NotTraceable` if they cannot be text."""
    imports = _Imports()
    functions, branches = [], []
    for number, one in enumerate(traces):
        for node in one.graph.nodes:
            node.type = None  # annotations: names that the text would need
            _check_names(node)
        code = one.graph.python_code("self")
        functions.append(code.src.strip().replace("def forward(", f"def path_{number}(", 1))
        for name, value in code.globals.items():
            if name not in _Imports.ALWAYS:
                imports.add(name, value)
        conditions = [*_children_are(module, one.graph)]
        conditions += [imports.condition(name, value) for name, value in one.conditions.items()]
        branches.append(f"        if {' and '.join(conditions)}:\n            return path_{number}(self, *args)")
    count = sum(node.op == "placeholder" for node in traces[0].graph.nodes)
    tensors = " and ".join(f"isinstance(args[{i}], torch.Tensor)" for i in range(count))
    forward = [
        "def forward(self, *args, **kwargs):",
        f"    if not torch.compiler.is_compiling() and len(args) == {count} and not kwargs and {tensors}:",
        *branches,
        "    return unchanged(self, *args, **kwargs)",
    ]
    return rewritten_class(type(module), "\n\n".join([imports.text(), *functions, "\n".join(forward)]) + "\n")


def _check_names(node: fx.Node) -> None:
    """Refuses names that would run as code: keys of a ModuleDict may come from a file, and torch.fx escapes none."""
    for name in node.kwargs:
        _check_name(name)
    for name in node.target.split(".") if node.op in ("call_module", "call_method", "get_attr") else ():
        if name.isidentifier() or not name.isprintable() or '"' in name or "\\" in name:  # else getattr(self, "0")
            _check_name(name)


def _check_name(name: str) -> None:
    if not name.isidentifier() or keyword.iskeyword(name):
        raise NotTraceable(f"the name {name!r} cannot be written as Python")


class _Imports:
    """The names in the text of a graph, as lines that import them."""

    ALWAYS = ("inf", "nan", "NoneType", "torch", "device", "fx_pytree", "pytree")

    def __init__(self) -> None:
        self.lines = {"from math import inf, nan", "from types import NoneType", "import torch"}
        self.lines.add("from torch import device")

    def add(self, name: str, value: Any) -> None:
        if inspect.ismodule(value):
            self.lines.add(f"import {value.__name__} as {name}" if "." in value.__name__ else f"import {name}")
            return
        home, attribute = getattr(value, "__module__", None), getattr(value, "__qualname__", "")
        if (
            not home
            or not attribute.isidentifier()
            or getattr(importlib.import_module(home), attribute, 0) is not value
        ):
            raise NotTraceable(f"its forward needs {name}, which cannot be imported by its name")
        self.lines.add(f"from {home} import {attribute} as {name}")

    def condition(self, name: str, value: Any) -> str:
        """Text that is true while attribute ``name`` is ``value``."""
        _check_name(name)
        if value is None or isinstance(value, bool):
            return f"self.{name} is {value}"
        if type(value) in (int, str) or (type(value) is float and value == value and abs(value) < float("inf")):
            return f"self.{name} == {value!r}"
        if inspect.isfunction(value) or inspect.isbuiltin(value):
            alias = f"value_of_{name}"
            if inspect.isbuiltin(value) and getattr(torch, value.__name__, None) is value:
                return f"self.{name} is torch.{value.__name__}"
            self.add(alias, value)
            return f"self.{name} is {alias}"
        raise NotTraceable(f"its forward reads self.{name}, which may change")

    def text(self) -> str:
        return "\n".join(sorted(self.lines))


def _children_are(module: nn.Module, graph: fx.Graph) -> list[str]:
    """Conditions that no module was added to or removed from what the graph's calls were found in."""
    homes = {node.target.rpartition(".")[0] for node in graph.nodes if node.op in ("call_module", "get_attr")}
    paths = {""}.union(*({".".join(home.split(".")[: i + 1]) for i in range(home.count(".") + 1)} for home in homes))
    conditions = []
    for path in sorted(paths):
        owner = module.get_submodule(path) if _is_module(module, path) else None
        if owner is not None:
            text = "self" + "".join(f"._modules[{part!r}]" for part in path.split(".") if part)
            conditions.append(f"[*{text}._modules] == {[*owner._modules]!r}")
            empty = [name for name, child in owner._modules.items() if child is None]
            conditions += [f"{text}._modules[{name!r}] is None" for name in empty]
    return conditions


def _is_module(module: nn.Module, path: str) -> bool:
    try:
        module.get_submodule(path)
    except AttributeError:
        return False
    return True


class _RewrittenType(type):
    """Of classes for rewritten modules: a new object, as a slice of a Sequential makes, is one of the base class."""

    def __call__(cls, *args: Any, **kwargs: Any) -> nn.Module:
        return cls.__base__(*args, **kwargs)


@functools.cache
def rewritten_class(cls: type[nn.Module], text: str) -> type[nn.Module]:
    """A subclass of ``cls`` with the ``forward`` that ``text`` defines; the same one for the same text."""
    file = f"<relu_ext.fuse: {cls.__qualname__} {hash(text) & 0xFFFFFFFF:08x}>"
    linecache.cache[file] = len(text), None, text.splitlines(True), file  # for tracebacks
    namespace: dict[str, Any] = {"unchanged": cls.forward}  # no __name__, or Dynamo would look in that module
    exec(compile(text, file, "exec"), namespace)
    return subclass(cls, {"forward": namespace["forward"]}, rewritten_class, text)


def subclass(cls: type[nn.Module], methods: dict[str, Callable], make: Callable, *arguments: Any) -> type[nn.Module]:
    """A class that stands for ``cls``, with other methods; ``make(cls, *arguments)`` gives it again to a pickle."""

    def reduce(self: nn.Module, protocol: int) -> tuple:
        _, _, *state = cls.__reduce_ex__(self, protocol)
        return (new_instance, (make, cls, *arguments), *state)

    members = {
        **methods,
        "__reduce_ex__": reduce,
        "__prepare_scriptable__": _original,
        "__module__": __name__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    return _RewrittenType(cls.__name__, (cls,), members)


def new_instance(make: Callable, *arguments: Any) -> nn.Module:
    """An empty one, for copy and pickle."""
    return object.__new__(make(*arguments))


def _original(module: nn.Module) -> nn.Module:
    """With its own forward again, for TorchScript, and the same children."""
    original = object.__new__(type(module).__base__)
    vars(original).update(vars(module))
    return original
