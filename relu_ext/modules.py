"""The operations as modules: torch's own classes with another ``forward``.

Each is an instance of the torch class of its name, where torch has it, and takes its arguments; attributes, repr and
state_dict are the same. Those at the end are a ReLU and its neighbours in one.
"""

from typing import Any

import torch
from torch import Tensor
from torch.types import Device

from .functional import (
    add_relu,
    bias_relu,
    celu,
    elu,
    hardtanh,
    leaky_relu,
    linear_relu,
    prelu,
    reglu,
    relu,
    relu_dropout,
    relu_squared,
    scale_shift_relu,
    selu,
    threshold,
)


class ReLU(torch.nn.ReLU):
    """A drop-in for :class:`torch.nn.ReLU`; see :func:`relu_ext.relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace)


class Hardtanh(torch.nn.Hardtanh):
    """A drop-in for :class:`torch.nn.Hardtanh`; see :func:`relu_ext.hardtanh`."""

    def forward(self, input: Tensor) -> Tensor:
        return hardtanh(input, self.min_val, self.max_val, self.inplace)


class ReLU6(torch.nn.ReLU6):
    """A drop-in for :class:`torch.nn.ReLU6`; see :func:`relu_ext.relu6`."""

    def forward(self, input: Tensor) -> Tensor:
        return hardtanh(input, self.min_val, self.max_val, self.inplace)


class Threshold(torch.nn.Threshold):
    """A drop-in for :class:`torch.nn.Threshold`; see :func:`relu_ext.threshold`."""

    def forward(self, input: Tensor) -> Tensor:
        return threshold(input, self.threshold, self.value, self.inplace)


class LeakyReLU(torch.nn.LeakyReLU):
    """A drop-in for :class:`torch.nn.LeakyReLU`; see :func:`relu_ext.leaky_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return leaky_relu(input, self.negative_slope, self.inplace)


class ELU(torch.nn.ELU):
    """A drop-in for :class:`torch.nn.ELU`; see :func:`relu_ext.elu`."""

    def forward(self, input: Tensor) -> Tensor:
        return elu(input, self.alpha, self.inplace)


class CELU(torch.nn.CELU):
    """A drop-in for :class:`torch.nn.CELU`; see :func:`relu_ext.celu`."""

    def forward(self, input: Tensor) -> Tensor:
        return celu(input, self.alpha, self.inplace)


class SELU(torch.nn.SELU):
    """A drop-in for :class:`torch.nn.SELU`; see :func:`relu_ext.selu`."""

    def forward(self, input: Tensor) -> Tensor:
        return selu(input, self.inplace)


class PReLU(torch.nn.PReLU):
    """A drop-in for :class:`torch.nn.PReLU`; see :func:`relu_ext.prelu`."""

    def forward(self, input: Tensor) -> Tensor:
        return prelu(input, self.weight)


class ReLUSquared(torch.nn.Module):
    """``max(input, 0) ** 2`` as a layer; see :func:`relu_ext.relu_squared`."""

    def forward(self, input: Tensor) -> Tensor:
        return relu_squared(input)


class ReGLU(torch.nn.Module):
    """The first half of ``input`` along ``dim``, rectified, times the second; see :func:`relu_ext.reglu`.

    Arguments as :class:`torch.nn.GLU`. Raises RuntimeError where the size along ``dim`` is odd.
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, input: Tensor) -> Tensor:
        halves = input.unflatten(self.dim, (2, -1)).unbind(self.dim if self.dim >= 0 else self.dim - 1)
        return reglu(halves[0], halves[1])

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class AddReLU(torch.nn.Module):
    """``relu(input + residual)`` as a layer; see :func:`relu_ext.add_relu`."""

    def forward(self, input: Tensor, residual: Tensor) -> Tensor:
        return add_relu(input, residual)


class BiasReLU(torch.nn.Module):
    """``relu(input + bias)`` with a learned bias for each of ``num_features`` indices of dimension ``dim``, at first 0;
    see :func:`relu_ext.bias_relu`."""

    def __init__(
        self, num_features: int, dim: int = 1, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features, self.dim = num_features, dim
        self.bias = torch.nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))

    def forward(self, input: Tensor) -> Tensor:
        return bias_relu(input, self.bias, self.dim)

    def extra_repr(self) -> str:
        return f"{self.num_features}, dim={self.dim}"


class FrozenBatchNormReLU2d(torch.nn.Module):
    """Batch normalisation with fixed statistics and parameters, and ReLU; ``forward`` takes a residual, too.

    Loads the state_dict of a :class:`torch.nn.BatchNorm2d`: ``weight``, ``bias``, ``running_mean`` and ``running_var``
    are buffers here, ``num_batches_tracked`` is left out. See :func:`relu_ext.scale_shift_relu`; scale and shift are
    made of the buffers in each call, in the buffers' dtype, and used in the input's.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, num_features: int, eps: float = 1e-5, device: Device = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((num_features,), value, device=device, dtype=dtype))

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return scale_shift_relu(input, scale.to(input.dtype), shift.to(input.dtype), residual)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"


class ReLUDropout(torch.nn.Module):
    """``dropout(relu(input), p)`` while training, ``relu(input)`` in eval mode; see :func:`relu_ext.relu_dropout`."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        if not 0 <= p <= 1:
            raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
        self.p = p

    def forward(self, input: Tensor) -> Tensor:
        return relu_dropout(input, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}"


class LinearReLU(torch.nn.Linear):
    """A :class:`torch.nn.Linear` with a ReLU behind it, and its state_dict; see :func:`relu_ext.linear_relu`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear_relu(input, self.weight, self.bias)
