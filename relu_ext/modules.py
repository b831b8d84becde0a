"""The operations as modules: torch's own classes with another ``forward``.

Each is an instance of the torch class of its name, where torch has it, and takes its arguments; attributes, repr and
state_dict are the same.
"""

import torch
from torch import Tensor

from .functional import celu, elu, hardtanh, leaky_relu, prelu, reglu, relu, relu_squared, selu, threshold


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
