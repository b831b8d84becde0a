"""The operations as modules: torch's own classes with another ``forward``."""

import torch
from torch import Tensor

from .functional import relu


class ReLU(torch.nn.ReLU):
    """A drop-in for :class:`torch.nn.ReLU`, which it is an instance of; see :func:`relu_ext.relu`.

    Args:
        inplace: overwrite the input.
    """

    def forward(self, input: Tensor) -> Tensor:
        return relu(input, self.inplace)
