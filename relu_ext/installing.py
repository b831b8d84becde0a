"""The kernels behind PyTorch's own functions, for every model of the process. An experiment."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from . import _C


def install() -> None:
    """Experimental: puts the kernels behind ``torch.relu`` and its family, for the whole process.

    Until :func:`uninstall`, ``relu``, ``threshold``, ``hardtanh``, ``leaky_relu``, ``elu``, ``celu`` and their forms in
    place, ``prelu``, and ``relu6`` and ``selu``, which PyTorch makes of these, do what the functions of that name in
    relu_ext do, however they are called: ``torch.relu``, ``torch.nn.functional``, methods, modules, TorchScript, other
    C++. No model is changed, and a graph that was made before or after is not either. Twice is as good as once.

    Left to PyTorch's own kernels is all that relu_ext leaves alone: other dtypes, layouts and devices, subclasses, what
    ``torch.compile``, export, functorch or FakeTensor traces; and calls in ``torch.inference_mode()``, the forms with
    ``out=``, and calls below autograd (of another operator's kernel, say).

    To know before:

    - Where gradients are recorded, a ``TorchDispatchMode`` sees ``torch.ops.relu_ext.relu_forward`` and its like in
      place of ``torch.ops.aten.relu``: what is kept for backward does not depend on modes. A policy of selective
      checkpointing that names ``aten.relu`` has to name that.
    - It is not inherited by processes that are spawned.
    - Calls of these operators may go on in other threads meanwhile; registrations of operators may not.

    Raises:
        RuntimeError: for one of these operators and the key AutogradCPU or AutogradCUDA another library has registered
            a kernel. Nothing is installed.
    """
    _C.install()
    _forget_what_was_resolved()


def uninstall() -> None:
    """Undoes :func:`install`: PyTorch's own kernels are back. Nothing happens where it is not installed.

    Graphs that were recorded meanwhile keep their nodes and what these keep, and go backward as before.
    """
    _C.uninstall()
    _forget_what_was_resolved()


def is_installed() -> bool:
    """Whether :func:`install` is in effect."""
    return _C.is_installed()


@contextmanager
def installed() -> Iterator[None]:
    """A context, or a decorator, in which :func:`install` is in effect: for all threads. It leaves what it found."""
    before = is_installed()
    install()
    try:
        yield
    finally:
        if not before:
            uninstall()


def _forget_what_was_resolved() -> None:
    """PyTorch's dispatcher in Python keeps which kernel an operator has for a key; registrations in C++ pass it by."""
    for name in _C.installable():
        operator = getattr(torch.ops.aten, name.removeprefix("aten::"))
        for overload in operator.overloads():
            getattr(operator, overload)._dispatch_cache.clear()
