"""The ReLU family for PyTorch in hand-written kernels: one bit an element is kept for backward.

>>> import torch, relu_ext
>>> relu_ext.relu(torch.tensor([-1.0, 2.0]))
tensor([0., 2.])
"""

from . import loading

loading.check_build()

from .autograd import ReLUFunction  # noqa: E402
from .functional import (  # noqa: E402
    hardtanh,
    hardtanh_,
    leaky_relu,
    leaky_relu_,
    relu,
    relu6,
    relu6_,
    relu_,
    threshold,
    threshold_,
)
from .info import build_info  # noqa: E402
from .modules import Hardtanh, LeakyReLU, ReLU, ReLU6, Threshold  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    "Hardtanh",
    "LeakyReLU",
    "ReLU",
    "ReLU6",
    "ReLUFunction",
    "Threshold",
    "__version__",
    "build_info",
    "hardtanh",
    "hardtanh_",
    "leaky_relu",
    "leaky_relu_",
    "relu",
    "relu6",
    "relu6_",
    "relu_",
    "threshold",
    "threshold_",
]
