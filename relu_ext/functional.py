"""The operations. The body of each function is its definition: a line or two of ATen.

That line is what the operation means. It runs whenever the kernels do not take the input, and compilers, exporters and
TorchScript see nothing else; plain dense tensors in eager mode take the kernels.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _C

Definition = TypeVar("Definition", bound=Callable)


def _seen_by_compilers(function: Definition, definition: Definition) -> Definition:
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


def _kernel(kernel: Callable) -> Callable[[Definition], Definition]:
    """Decorates an operation's definition: the function made of it asks ``kernel`` first.

    ``kernel`` takes the same arguments in the same order, and returns NotImplemented for what it leaves to the
    definition. The function is written out, as :mod:`dataclasses` does: its signature is the definition's, and a call
    goes through no frame but its own.
    """

    def decorate(definition: Definition) -> Definition:
        parameters = inspect.signature(definition).parameters
        arguments = ", ".join(parameters)
        source = (
            f"def function({arguments}):\n"
            f"    output = kernel({arguments})\n"
            f"    return definition({arguments}) if output is NotImplemented else output\n"
        )
        names: dict[str, Any] = {"kernel": kernel, "definition": definition}
        exec(compile(source, __file__, "exec"), names)
        function = names["function"]
        function.__defaults__ = definition.__defaults__
        return _seen_by_compilers(function, definition)

    return decorate


@_kernel(_C.relu)
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


@_kernel(_C.relu_)
def relu_(input: Tensor) -> Tensor:
    """:func:`relu` in place; a drop-in for :func:`torch.relu_`."""
    return torch.relu_(input)


@_kernel(_C.relu6)
def relu6(input: Tensor, inplace: bool = False) -> Tensor:
    """``min(max(input, 0), 6)``; a drop-in for :func:`torch.nn.functional.relu6`: :func:`hardtanh` from 0 to 6."""
    return F.relu6(input, inplace)


@_kernel(_C.relu6_)
def relu6_(input: Tensor) -> Tensor:
    """:func:`relu6` in place."""
    return F.relu6(input, inplace=True)


@_kernel(_C.hardtanh)
def hardtanh(input: Tensor, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Tensor:
    """``min(max(input, min_val), max_val)``; a drop-in for :func:`torch.nn.functional.hardtanh`.

    Input, result and ``inplace`` as in :func:`relu`. NaN stays NaN.

    Gradient: ``grad`` where ``not (input <= min_val or input >= max_val)``, else 0; as ATen's ``hardtanh_backward``, of
    whose two answers for NaN (they depend on the place in memory) it is the one of the scalar code: NaN passes.
    It needs one bit an element, which is all that is kept.

    Raises:
        What ``torch.nn.functional.hardtanh`` raises, for instance ValueError for ``min_val > max_val``.
    """
    return F.hardtanh(input, min_val, max_val, inplace)


@_kernel(_C.hardtanh_)
def hardtanh_(input: Tensor, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    """:func:`hardtanh` in place; a drop-in for :func:`torch.nn.functional.hardtanh_`."""
    return F.hardtanh_(input, min_val, max_val)


@_kernel(_C.threshold)
def threshold(input: Tensor, threshold: float, value: float, inplace: bool = False) -> Tensor:
    """``input`` where it is above ``threshold``, else ``value``; a drop-in for :func:`torch.nn.functional.threshold`.

    With ``value`` 0 it is FATReLU (arXiv:2002.00776). Input, result and ``inplace`` as in :func:`relu`. NaN stays NaN.

    Gradient: ``grad`` where ``not (input <= threshold)``, else 0, so NaN passes; as ATen's ``threshold_backward``. It
    needs one bit an element, which is all that is kept.
    """
    return F.threshold(input, threshold, value, inplace)


@_kernel(_C.threshold_)
def threshold_(input: Tensor, threshold: float, value: float) -> Tensor:
    """:func:`threshold` in place; a drop-in for :func:`torch.threshold_`."""
    return torch.threshold_(input, threshold, value)


@_kernel(_C.leaky_relu)
def leaky_relu(input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    """``input`` where it is above 0, else ``input * negative_slope``; a drop-in for
    :func:`torch.nn.functional.leaky_relu`.

    Input, result and ``inplace`` as in :func:`relu`. 16-bit types are multiplied in float32.

    Gradient: ``grad`` where ``input > 0``, else ``grad * negative_slope``, also at NaN; as ATen's
    ``leaky_relu_backward``. It needs one bit an element, which is all that is kept, so a negative slope works in place
    too, where torch raises in backward.
    """
    return F.leaky_relu(input, negative_slope, inplace)


@_kernel(_C.leaky_relu_)
def leaky_relu_(input: Tensor, negative_slope: float = 0.01) -> Tensor:
    """:func:`leaky_relu` in place; a drop-in for :func:`torch.nn.functional.leaky_relu_`."""
    return F.leaky_relu_(input, negative_slope)


@_kernel(_C.elu)
def elu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``input`` where it is above 0, else ``alpha * (exp(input) - 1)``; a drop-in for :func:`torch.nn.functional.elu`.

    Input, result and ``inplace`` as in :func:`relu`; arXiv:1511.07289. 16-bit types are computed in float32. In float32
    the exponential is at most 2 units in the last place from the rounded true one, and nothing cancels near 0.

    Gradient: ``grad`` where ``not (input <= 0)``, else ``grad * alpha * exp(input)``; as ATen's ``elu_backward``. The
    input is kept for it; in place the output, from which the far tail's gradient is less exact, as in torch.

    Raises:
        What ``torch.nn.functional.elu`` raises: in the backward pass of the form in place for ``alpha < 0``, too.
    """
    return F.elu(input, alpha, inplace)


@_kernel(_C.elu_)
def elu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """:func:`elu` in place; a drop-in for :func:`torch.nn.functional.elu_`."""
    return F.elu_(input, alpha)


@_kernel(_C.celu)
def celu(input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    """``max(input, 0) + min(0, alpha * (exp(input / alpha) - 1))``; a drop-in for :func:`torch.nn.functional.celu`.

    :func:`elu` with a slope that is continuous for every ``alpha`` (arXiv:1704.07483), else the same. ``alpha < 0`` is
    left to torch, and so is its error for 0.
    """
    return F.celu(input, alpha, inplace)


@_kernel(_C.celu_)
def celu_(input: Tensor, alpha: float = 1.0) -> Tensor:
    """:func:`celu` in place; a drop-in for :func:`torch.celu_`."""
    return torch.celu_(input, alpha)


@_kernel(_C.selu)
def selu(input: Tensor, inplace: bool = False) -> Tensor:
    """``scale * elu(input, alpha)``; a drop-in for :func:`torch.nn.functional.selu`.

    With the two constants that keep mean 0 and variance 1 (arXiv:1706.02515), else the same as :func:`elu`.
    """
    return F.selu(input, inplace)


@_kernel(_C.selu_)
def selu_(input: Tensor) -> Tensor:
    """:func:`selu` in place; a drop-in for :func:`torch.selu_`."""
    return torch.selu_(input)


@_kernel(_C.relu_squared)
def relu_squared(input: Tensor) -> Tensor:
    """``max(input, 0) ** 2`` (arXiv:2109.08668), rounded once.

    Input and result as in :func:`relu`. 16-bit types are multiplied in float32.

    Gradient: ``2 * grad * max(input, 0)``. The output is all that is kept, which a linear layer that follows keeps
    anyway, so it may not be changed in place before the backward pass. Its square root, rounded to the dtype, is
    ``max(input, 0)`` again wherever that is between 2^-60 and 2^60, in float32, float64 and bfloat16; beyond these,
    where the square loses digits or leaves the dtype's range, so does the gradient, down to 0 and up to inf. float16,
    whose squares underflow, keeps the input.
    """
    root = torch.relu(input)
    return root * root


@_kernel(_C.prelu)
def prelu(input: Tensor, weight: Tensor) -> Tensor:
    """``input`` where it is above 0, else ``weight * input``; a drop-in for :func:`torch.nn.functional.prelu`.

    Args:
        input: as in :func:`relu`; its channels are dimension 1.
        weight: one value, or one for each channel; of the input's dtype.

    Gradient (arXiv:1502.01852): of the input, ``grad`` where it is above 0, else ``weight * grad``; of the weight, the
    sum over a channel of ``input * grad`` where the input is not above 0: in float32 and float64, always in the same
    order. The input is kept, or one bit an element where the weight needs no gradient.

    Raises:
        What ``torch.nn.functional.prelu`` raises, for instance for a weight of another size or dtype.
    """
    return F.prelu(input, weight)


@_kernel(_C.reglu)
def reglu(gate: Tensor, up: Tensor) -> Tensor:
    """``max(gate, 0) * up``, the gated linear unit with a ReLU (arXiv:2002.05202).

    Args:
        gate, up: of one shape and dtype, otherwise as torch broadcasts and promotes them. The kernels take dense
            tensors with equal strides, and the halves of a projection, ``projection.chunk(2, -1)``, without a copy.

    Gradient: of gate, ``grad * up`` where ``not (gate <= 0)``, else 0; of up, ``grad * max(gate, 0)``. Both inputs are
    kept, up only if gate needs a gradient. The gradients of halves of one tensor are halves of one tensor.
    """
    return torch.relu(gate) * up


def _along(vector: Tensor, dims: int, dim: int) -> Tensor:
    """A vector as it stands beside a tensor of ``dims`` dimensions whose dimension ``dim`` is its own."""
    shape = [1] * dims
    shape[dim] = -1
    return vector.reshape(shape)


@_kernel(_C.add_relu)
def add_relu(input: Tensor, residual: Tensor) -> Tensor:
    """``relu(input + residual)``, the end of a residual block (arXiv:1512.03385).

    Args:
        input, residual: as torch adds them. The kernels take two of one shape, dtype and layout, dense as in
            :func:`relu`; others are added by torch.

    Returns:
        The same numbers as ``torch.relu(input + residual)``.

    Gradient: of both, one tensor: ``grad`` where ``not (input + residual <= 0)``, else 0. One bit an element is all
    that is kept.
    """
    return torch.relu(input + residual)


@_kernel(_C.bias_relu)
def bias_relu(input: Tensor, bias: Tensor, dim: int = 1) -> Tensor:
    """``relu(input + bias)``, with a value of ``bias`` for each index of dimension ``dim``.

    Args:
        input: as in :func:`relu`, in any dense layout: contiguous, channels_last, ``[M, N]``.
        bias: ``[input.shape[dim]]``.

    Returns:
        The same numbers as ``torch.relu(input + bias)``.

    Gradient: of the input, ``grad`` where ``not (input + bias <= 0)``, else 0; of the bias, the sums of that, made in
    the same pass in float32 or better (float64 for float64), always in the same order. One bit an element is all that
    is kept.

    Raises:
        What torch raises where ``bias`` does not fit; IndexError for a ``dim`` that there is not.
    """
    return torch.relu(input + _along(bias, input.dim(), dim))


@_kernel(_C.scale_shift_relu)
def scale_shift_relu(
    input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, dim: int = 1
) -> Tensor:
    """``relu(input * scale + shift + residual)``: frozen or folded batch normalisation, a residual where there is one,
    and ReLU.

    Args:
        input: as in :func:`bias_relu`.
        scale, shift: ``[input.shape[dim]]`` each.
        residual: as in :func:`add_relu`.

    Returns:
        In float32 and float64 the same numbers as ``torch.relu(input * scale + shift + residual)``. 16-bit types are
        computed in float32 and rounded once, so that a sum next to 0 may have another sign than torch's.

    Gradient: with ``masked`` being ``grad`` where ``not (input * scale + shift + residual <= 0)``, else 0: of the
    input, ``masked * scale``; of the residual, ``masked``; of scale and shift, the sums of ``masked * input`` and of
    ``masked``, made as in :func:`bias_relu`. One bit an element is kept, and the input only if scale needs a gradient.
    """
    result = input * _along(scale, input.dim(), dim) + _along(shift, input.dim(), dim)
    return torch.relu(result if residual is None else result + residual)


@_kernel(_C.fma_relu)
def fma_relu(input: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None = None, dim: int = 1) -> Tensor:
    """:func:`scale_shift_relu` with ``input * scale + shift`` rounded once: ``relu(addcmul(shift, input, scale))``.

    That is how ATen computes batch normalisation with fixed statistics, and ``addcmul``, on a CPU with fused
    multiply-adds; on one without, the product is rounded. Arguments and gradients as of :func:`scale_shift_relu`.
    """
    result = torch.addcmul(_along(shift, input.dim(), dim), input, _along(scale, input.dim(), dim))
    return torch.relu(result if residual is None else result + residual)


@_kernel(_C.relu_dropout)
def relu_dropout(
    input: Tensor, p: float = 0.5, training: bool = True, generator: torch.Generator | None = None
) -> Tensor:
    """``dropout(relu(input), p)`` (arXiv:1207.0580), in one pass.

    Args:
        input: as in :func:`relu`.
        p: the probability of an element to be dropped, in steps of 2^-16.
        training: False: ``relu(input)``.
        generator: to draw from, instead of the device's own, which ``torch.manual_seed`` sets.

    Returns:
        ``relu(input) / (1 - p)`` where an element stays, and 0 where it is dropped, also if it is NaN or infinite.
        Which stay hangs on nothing but the generator's state, the place in memory and p: not on the instruction set or
        the number of threads. It is another choice than ``torch.nn.functional.dropout``'s for the same seed. With p = 0
        or without training nothing is drawn.

    Gradient: ``grad / (1 - p)`` where an element stays and was ``not (input <= 0)``, else 0. One bit an element is all
    that is kept.

    Raises:
        ValueError for a p that is no probability; RuntimeError for a generator where the kernels do not take the input:
        torch's dropout has none.
    """
    if generator is not None:
        raise RuntimeError("relu_dropout draws from a generator for dense tensors in eager mode only")
    return F.dropout(torch.relu(input), p, training)


@_kernel(_C.linear_relu)
def linear_relu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``relu(input @ weight.T + bias)``: a linear layer, whose product is torch's, and ReLU in the same memory.

    Args:
        input: ``[..., in]``.
        weight: ``[out, in]``.
        bias: ``[out]``, or None.

    Gradient: that of the product for ``grad`` where ``not (output <= 0)``, else 0; the sums for the bias are made in
    the pass that masks, as in :func:`bias_relu`. The output is kept, the input and the weight.
    """
    return torch.relu(F.linear(input, weight, bias))
