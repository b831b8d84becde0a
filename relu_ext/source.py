"""A ReLU and the dropout after it, found in the source of a class: for forwards that torch.fx cannot trace.

What shows that nobody else has the ReLU's output is the text itself: ``self.b(self.a(x))``, or ``x = self.a(...)`` and
``x = self.b(x)`` in succession. Both become one call of :func:`relu_ext.neighbours.relu_then_dropout` with the two
modules, wherever the path of the forward goes; all else is compiled as it stands.
"""

import ast
import functools
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import NamedTuple

from torch import nn

from . import neighbours, rewriting

Pair = tuple[str, str]  # attributes: of the activation, of the dropout
_FUSED = "relu_ext_relu_then_dropout"  # the name of the fused call, as a method


@functools.cache
def pairs_of(cls: type[nn.Module]) -> list[Pair]:
    """Attributes of which methods of ``cls`` call the second on what the first returns."""
    found = [match.pair for _, _, tree in _methods(cls) for node in ast.walk(tree) for match in _matches(node)]
    return list(dict.fromkeys(found))


@functools.cache
def with_pairs_fused(cls: type[nn.Module], pairs: tuple[Pair, ...]) -> type[nn.Module]:
    """A subclass of ``cls`` in whose methods each of ``pairs`` is one call."""
    methods = {_FUSED: staticmethod(neighbours.relu_then_dropout)}
    for name, method, tree in _methods(cls):
        if any(match.pair in pairs for node in ast.walk(tree) for match in _matches(node)):
            methods[name] = _compiled(method, _Fuse(pairs).visit(tree))
    return rewriting.subclass(cls, methods, with_pairs_fused, pairs)


def _methods(cls: type[nn.Module]) -> Iterator[tuple[str, FunctionType, ast.Module]]:
    """What ``cls`` has beside nn.Module, with its source; without what would mean something else elsewhere."""
    for name in dir(cls):
        method = inspect.getattr_static(cls, name)
        if not isinstance(method, FunctionType) or getattr(nn.Module, name, None) is method:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, SyntaxError):
            continue
        definition = tree.body[0]
        is_function = isinstance(definition, ast.FunctionDef) and definition.name == method.__name__
        if is_function and not (definition.decorator_list or method.__code__.co_freevars or _has_private_names(tree)):
            yield name, method, tree


def _has_private_names(tree: ast.Module) -> bool:
    """Names that Python mixes with that of the class."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return any(name.startswith("__") and not name.endswith("__") for name in names)


def _compiled(method: FunctionType, tree: ast.Module) -> FunctionType:
    """``method`` with the code of ``tree``, in the same file and lines."""
    ast.increment_lineno(ast.fix_missing_locations(tree), method.__code__.co_firstlineno - 1)
    module = compile(tree, method.__code__.co_filename, "exec", dont_inherit=True)
    code = next(c for c in module.co_consts if isinstance(c, CodeType) and c.co_name == method.__name__)
    function = FunctionType(code, method.__globals__, method.__name__, method.__defaults__)
    function.__kwdefaults__ = method.__kwdefaults__
    return functools.update_wrapper(function, method)


class _Match(NamedTuple):
    pair: Pair
    argument: ast.expr  # of the activation


def _called(node: ast.AST) -> tuple[str | None, ast.expr | None]:
    """(name, argument) of ``self.name(argument)``."""
    if isinstance(node, ast.Call) and len(node.args) == 1 and not node.keywords:
        function, argument = node.func, node.args[0]
        if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name) and function.value.id == "self":
            return function.attr, argument
    return None, None


def _nested(node: ast.AST) -> _Match | None:
    """``self.b(self.a(...))``."""
    second, inner = _called(node)
    first, argument = _called(inner)
    return _Match((first, second), argument) if first and second else None


def _in_succession(one: ast.stmt, two: ast.stmt) -> _Match | None:
    """``x = self.a(...)`` and ``x = self.b(x)``: the first x is gone."""
    if not (isinstance(one, ast.Assign) and isinstance(two, ast.Assign)):
        return None
    (first, argument), (second, name) = _called(one.value), _called(two.value)
    if not (first and second and isinstance(name, ast.Name)):
        return None
    targets = {ast.unparse(target) for target in (*one.targets, *two.targets)}
    return _Match((first, second), argument) if targets == {name.id} else None


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    for field in ("body", "orelse", "finalbody"):
        if isinstance(statements := getattr(node, field, None), list):
            yield statements


def _matches(node: ast.AST) -> Iterator[_Match]:
    matches = [_nested(node)]
    for statements in _blocks(node):
        matches += itertools.starmap(_in_succession, itertools.pairwise(statements))
    yield from filter(None, matches)


class _Fuse(ast.NodeTransformer):
    def __init__(self, pairs: tuple[Pair, ...]) -> None:
        self.pairs = pairs

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        match = _nested(node)
        return self.fused(match, node) if match and match.pair in self.pairs else node

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for statements in _blocks(node):
            for one, two in list(itertools.pairwise(statements)):
                match = _in_succession(one, two)
                if match and match.pair in self.pairs:
                    one.value = self.fused(match, one.value)
                    statements.remove(two)
        return super().generic_visit(node)

    @staticmethod
    def fused(match: _Match, place: ast.AST) -> ast.Call:
        first, second = match.pair
        call = ast.parse(f"self.{_FUSED}(self.{first}, self.{second}, None)", mode="eval").body
        call.args[2] = match.argument
        for node in (call, call.func, call.func.value, *call.args[:2], *(arg.value for arg in call.args[:2])):
            ast.copy_location(node, place)
        return call
