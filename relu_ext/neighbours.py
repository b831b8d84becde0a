"""Modules called as one: what :func:`relu_ext.fuse` puts in the place of several calls.

Each function is given the modules that it stands for, and looks at every call whether they still are what was fused.
Where one has a hook, another class or a forward of its own, trains (batch normalisation) or does not fit the input, the
modules are called one by one: that is the definition.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import functional, modules

RELUS = (nn.ReLU, modules.ReLU)
IN_PLACE = (torch.relu_, functional.relu_)
RELU_FUNCTIONS = (F.relu, torch.relu, functional.relu, *IN_PLACE)
LINEARS = (nn.Linear,)
DROPOUTS = (nn.Dropout,)
BATCH_NORMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}  # with the dimensions they take
FROZEN_BUFFERS = {"weight", "bias", "running_mean", "running_var"}


Activation = Callable[[Tensor], Tensor]  # a module or a function


def is_plain(module: Any, kinds: tuple[type, ...]) -> bool:
    """Whether calling ``module`` does what its class, one of ``kinds``, does, and nothing else."""
    return (
        type(module) in kinds
        and not (module._forward_pre_hooks or module._forward_hooks)
        and not (module._backward_pre_hooks or module._backward_hooks)
        and "forward" not in module.__dict__
    )


def is_frozen_batch_norm(module: nn.Module) -> bool:
    """By its buffers: torchvision's, transformers' and detectron2's classes have these and no parameters."""
    return module._buffers.keys() >= FROZEN_BUFFERS and not module._parameters and not module._modules


def is_relu(activation: Any) -> bool:
    return is_plain(activation, RELUS) or (inspect.isroutine(activation) and activation in RELU_FUNCTIONS)


def _may_fuse(relu: Activation | None, *others: tuple[nn.Module, tuple[type, ...]]) -> bool:
    if torch.compiler.is_compiling():
        return False
    return (relu is None or is_relu(relu)) and all(is_plain(*other) for other in others)


def _rectified(relu: Activation | None, input: Tensor) -> Tensor:
    """A ``relu`` of None is the function."""
    return functional.relu(input) if relu is None else relu(input)


def linear_then_relu(linear: nn.Module, relu: Activation | None, input: Tensor) -> Tensor:
    """``relu(linear(input))``."""
    if _may_fuse(relu, (linear, LINEARS)):
        return functional.linear_relu(input, linear.weight, linear.bias)
    return _rectified(relu, linear(input))


def relu_then_dropout(relu: Activation | None, dropout: nn.Module, input: Tensor, is_private: bool = False) -> Tensor:
    """``dropout(relu(input))``; ``is_private``: nobody would see that a ReLU in place has changed ``input``."""
    if (is_private or not _is_in_place(relu)) and _may_fuse(relu, (dropout, DROPOUTS)):
        return functional.relu_dropout(input, dropout.p, dropout.training)
    return dropout(_rectified(relu, input))


def relu_then_dropped(relu: Activation | None, input: Tensor, p: float, is_private: bool) -> Tensor:
    """``dropout(relu(input), p)`` with dropout as a function, in training."""
    if (is_private or not _is_in_place(relu)) and _may_fuse(relu):
        return functional.relu_dropout(input, p)
    return F.dropout(_rectified(relu, input), p)


def _is_in_place(relu: Activation | None) -> bool:
    return relu in IN_PLACE or getattr(relu, "inplace", False)


def add_then_relu(relu: Activation | None, input: Tensor, residual: Tensor, in_place: bool) -> Tensor:
    """``relu(input + residual)``. In place ``input`` keeps its dtype and shape, and nobody sees it afterwards."""
    if _may_fuse(relu) and _is_alike(input, residual):
        return functional.add_relu(input, residual)
    return _rectified(relu, input.add_(residual) if in_place else input + residual)


def norm_then_relu(norm: nn.Module, relu: Activation | None, input: Tensor, eps: float) -> Tensor:
    """``relu(norm(input))`` for a batch normalisation with fixed statistics."""
    if _may_fuse(relu) and _is_fixed(norm, input):
        return _norm_relu(norm, input, eps)
    return _rectified(relu, norm(input))


def norm_then_add_then_relu(
    norm: nn.Module, relu: Activation | None, input: Tensor, residual: Tensor, eps: float, in_place: bool
) -> Tensor:
    """``relu(norm(input) + residual)``."""
    if _may_fuse(relu) and _is_fixed(norm, input) and _is_alike(input, residual):
        return _norm_relu(norm, input, eps, residual)
    return add_then_relu(relu, norm(input), residual, in_place)


def _is_alike(input: Tensor, residual: Tensor) -> bool:
    """Two tensors, with nothing to broadcast and nothing to promote."""
    if not (isinstance(input, Tensor) and isinstance(residual, Tensor)):
        return False
    return input.dtype == residual.dtype and input.shape == residual.shape


def _is_fixed(norm: nn.Module, input: Tensor) -> bool:
    """Whether ``norm`` is a scale and a shift a channel, computed in the type of the input.

    torch computes its own batch normalisation of 16-bit types in float32; a scale rounded to 16 bits would be farther
    from the truth. A frozen one's formula rounds it.
    """
    variance = norm._buffers.get("running_var")
    if variance is None or not isinstance(input, Tensor) or input.dtype != variance.dtype:
        return False
    if input.dim() < 2 or input.shape[1] != variance.numel():
        return False
    if is_plain(norm, tuple(BATCH_NORMS)):
        is_wide = input.dtype in (torch.float32, torch.float64)
        return is_wide and not norm.training and input.dim() in BATCH_NORMS[type(norm)]
    return input.dim() == 4 and is_plain(norm, (type(norm),)) and is_frozen_batch_norm(norm)


def _norm_relu(norm: nn.Module, input: Tensor, eps: float, residual: Tensor | None = None) -> Tensor:
    """Rounded where the frozen modules round, which multiply and add, or where ATen's kernel for the CPU does."""
    kernel = functional.fma_relu if type(norm) in BATCH_NORMS else functional.scale_shift_relu
    return kernel(input, *scale_and_shift(norm, eps), residual)


def scale_and_shift(norm: nn.Module, eps: float) -> tuple[Tensor, Tensor]:
    """``(input - running_mean) * (running_var + eps).rsqrt() * weight + bias`` as two vectors.

    ``eps`` is for a module that has no attribute of this name.
    """
    scale = (norm.running_var + norm.__dict__.get("eps", eps)).rsqrt()
    if norm.weight is not None:
        scale = norm.weight * scale
    if norm.bias is None:
        return scale, -norm.running_mean * scale
    if type(norm) in BATCH_NORMS:
        return scale, torch.addcmul(norm.bias, norm.running_mean, scale, value=-1)
    return scale, norm.bias - norm.running_mean * scale
