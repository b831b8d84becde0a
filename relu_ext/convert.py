"""A whole model's activations replaced by ours, and back.

A module of ours is torch's module with another ``forward`` and no state of its own, so it is converted by its class
alone: the object stays, with its parameters, buffers, hooks and flags, and with everybody who holds it.
"""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import resolve_name

from . import functional, modules
from .report import Report


class ReLUSquaredActivation(modules.ReLUSquared):
    """A drop-in for transformers' class of this name, whose square is ATen's power: float32 in CUDA's autocast."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_autocast_enabled(input.device.type):
            return torch.square(torch.relu(input))
        return functional.relu_squared(input)


FAMILY = ("ReLU", "ReLU6", "LeakyReLU", "PReLU", "ELU", "CELU", "SELU", "Hardtanh", "Threshold")
MODULES: dict[type[nn.Module], type[nn.Module]] = {getattr(nn, name): getattr(modules, name) for name in FAMILY}
# By name, so that nothing is imported: the class is there if a model has it.
FOREIGN_MODULES = {"transformers.activations.ReLUSquaredActivation": ReLUSquaredActivation}

_NAMES = ["relu", "leaky_relu", "elu", "celu", "selu", "threshold", "hardtanh"]
FUNCTIONS: dict[Callable, Callable] = {
    getattr(home, name): getattr(functional, name)
    for home, names in (
        (F, [*_NAMES, *(name + "_" for name in _NAMES), "relu6", "prelu"]),
        (torch, ["relu", "celu", "selu"]),  # not threshold, which takes out=
        (torch.Tensor, ["relu", "relu_", "prelu"]),
    )
    for name in names
}

_BEFORE = "_before_relu_ext"  # in a converted module's __dict__: {attribute, or "__class__": what it was}


def convert(model: nn.Module) -> Report:
    """Replaces the activations of ``model`` by relu_ext's, in place; see :func:`revert`.

    Args:
        model: any module. In it and in all that ``model.modules()`` gives, these are replaced:

            - modules that are exactly torch's ReLU, ReLU6, LeakyReLU, PReLU, ELU, CELU, SELU, Hardtanh or Threshold, or
              transformers' ReLUSquaredActivation. Each stays the object that it is and changes its class: parameters,
              hooks, flags, sharing, names and whatever else holds it are untouched.
            - attributes that are torch's functions of these names (``self.activation = F.relu``), forms in place,
              ``torch.relu`` and ``torch.Tensor.relu`` included.

    Returns:
        A :class:`Report`: a dict from the place (``"layers.0.activation"``) to the names before and after. Its
        ``left_alone`` names activations of the family that were left as they are, with the reason: subclasses, also
        those that a parametrization makes, modules with a ``forward`` of their own, those that are being quantised, and
        those that TorchScript has compiled.

    Calls to functions in a ``forward`` are not replaced, nor modules that ``model.modules()`` does not know. Converting
    twice is converting once. The model can be copied, pickled and compiled as before; what is pickled needs relu_ext
    to be loaded.
    """
    report = Report()
    for name, module in model.named_modules():
        if reason := _reason_to_leave(module):
            report.left_alone[name] = reason
            continue
        for attribute, before, after in list(_replacements(module)):
            replace(module, attribute, after)
            report[_place(name, attribute)] = _name(before), _name(after)
    return report


def revert(model: nn.Module) -> Report:
    """Undoes :func:`convert` and :func:`fuse`: also in a copy of the model, after training, or loaded from a pickle.

    What was of relu_ext before it was converted stays, and so does what has been replaced by something else since.

    Returns:
        A :class:`Report` of what is torch's again. Its ``left_alone`` names converted modules whose class was changed
        since, for instance by a parametrization or ``fully_shard``: remove that first.
    """
    report = Report()
    for name, module in model.named_modules():
        for attribute, (after, before) in restore(module).items():
            report[_place(name, attribute)] = _name(after), _name(before)
        if "__class__" in vars(module).get(_BEFORE, {}):
            report.left_alone[name] = f"its class is now {_name(type(module))}"
    return report


def replace(module: nn.Module, attribute: str, value: Any) -> None:
    """Sets an attribute, or the class, so that :func:`restore` undoes it."""
    now, before = getattr(module, attribute), vars(module).get(_BEFORE, {})
    if attribute not in before or not _is_ours(now):
        # A new dict: a shallow copy of the module, as DataParallel makes, shares the old one.
        vars(module)[_BEFORE] = {**before, attribute: now}
    object.__setattr__(module, attribute, value)  # past the module's own __setattr__, which may do more


def restore(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Undoes every :func:`replace`: {attribute: (what it was now, what it is again)}.

    An attribute that somebody else has set since stays. So does such a class, and what it was is kept in mind: it may
    be undone later.
    """
    restored = {}
    for attribute, before in vars(module).pop(_BEFORE, {}).items():
        now = getattr(module, attribute, None)
        if _is_ours(now):
            object.__setattr__(module, attribute, before)
            restored[attribute] = now, before
        elif attribute == "__class__":
            vars(module)[_BEFORE] = {attribute: before}
    return restored


def _is_ours(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "").partition(".")[0] == __package__


def _ours(torchs: Any) -> Any:
    """What replaces a class or a function; None for all others."""
    if isinstance(torchs, type):
        return MODULES.get(torchs) or FOREIGN_MODULES.get(f"{torchs.__module__}.{torchs.__qualname__}")
    return FUNCTIONS.get(torchs) if inspect.isroutine(torchs) else None


def _replacements(module: nn.Module) -> Iterator[tuple[str, Any, Any]]:
    """(attribute, what it is, what it is to be), the class first."""
    for attribute, value in {"__class__": type(module), **vars(module)}.items():
        if ours := _ours(value):
            yield attribute, value, ours


def _reason_to_leave(module: nn.Module) -> str | None:
    """Why a module that is an activation of the family, or began as one, must stay what it is; None for all others."""
    exact = _ours(type(module)) is not None
    if isinstance(module, torch.jit.ScriptModule):
        return "compiled by TorchScript" if getattr(module, "original_name", None) in FAMILY else None
    if not exact and isinstance(module, tuple(MODULES)) and not isinstance(module, tuple(MODULES.values())):
        return f"{type(module).__qualname__} is a subclass, which may compute something else"
    if exact and "forward" in vars(module):
        return "it has a forward of its own"
    if exact and getattr(module, "qconfig", None) is not None:
        return "it has a qconfig: quantisation looks for torch's classes"
    return None


def _place(name: str, attribute: str) -> str:
    return name if attribute == "__class__" else f"{name}.{attribute}".lstrip(".")


def _name(value: Any) -> str:
    """As a user would write it: ``torch.nn.ReLU``, ``torch.nn.functional.relu``, ``relu_ext.relu``."""
    if not isinstance(value, type) and (name := resolve_name(value)):
        return name
    package = value.__module__.partition(".")[0]
    home = {"torch": "torch.nn", "relu_ext": "relu_ext"}.get(package, value.__module__)
    return f"{home}.{value.__qualname__}"
