"""The operations. The body of each function is its definition: one line of ATen.

That line is what the operation means. It runs whenever the kernels do not take the input, and compilers, exporters and
TorchScript see nothing else; plain dense tensors in eager mode take the kernels.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C


def _seen_by_compilers(function: Callable, definition: Callable) -> Callable:
    """Gives ``function`` the name of ``definition`` and lets compilers compile the latter in its place.

    They look for this on any function, so nothing need be asked at each call. Without it Dynamo would break its graph
    at the C entry, with the same results.
    """
    functools.update_wrapper(function, definition)
    function.__prepare_scriptable__ = lambda: definition  # torch.jit.script
    function._torchdynamo_inline = definition  # Dynamo, where it meets a call
    function._torchdynamo_orig_callable = definition  # torch.compile(function)
    function._torchdynamo_wrapper_id = id(function)  # says that the line above is no functools.wraps copy
    # A frame that Dynamo has left to Python may call the function: that call is Python's too.
    frames = torch._C._dynamo.eval_frame
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(function.__code__, skip)
    return function


def _unary(kernel: Callable) -> Callable:
    """Decorates the definition of ``operation(input, inplace=False)``.

    ``kernel(input, inplace)`` returns NotImplemented for what it leaves to the definition.
    """

    def decorate(definition: Callable) -> Callable:
        def function(input, inplace=False):
            output = kernel(input, inplace)
            return definition(input, inplace) if output is NotImplemented else output

        return _seen_by_compilers(function, definition)

    return decorate


def _unary_(kernel_: Callable) -> Callable:
    """The same for ``operation_(input)``, always in place."""

    def decorate(definition: Callable) -> Callable:
        def function(input):
            output = kernel_(input)
            return definition(input) if output is NotImplemented else output

        return _seen_by_compilers(function, definition)

    return decorate


@_unary(_C.relu)
def relu(input: Tensor, inplace: bool = False) -> Tensor:
    """``max(input, 0)`` element by element; a drop-in for :func:`torch.nn.functional.relu`.

    Args:
        input: any shape, layout, dtype and device that ``torch.relu`` takes. Dense float32, float64, float16 and
            bfloat16 tensors on the CPU, and on CUDA devices where the build has kernels for them, take the kernels,
            everything else ``torch.relu`` itself.
        inplace: overwrite ``input`` and return it.

    Returns:
        A tensor like ``input``. NaN stays NaN.

    Gradient: ``grad`` where ``not (input <= 0)``, else 0, so NaN passes; as ATen's ``threshold_backward``. It needs one
    bit an element, which is all that is kept, so the output may be changed in place afterwards.

    Raises:
        What ``torch.nn.functional.relu`` raises, for instance for a bool or complex ``input``, or in place for a leaf
        that requires grad.
    """
    return F.relu(input, inplace)


@_unary_(_C.relu_)
def relu_(input: Tensor) -> Tensor:
    """:func:`relu` in place; a drop-in for :func:`torch.relu_`."""
    return torch.relu_(input)
