"""The ReLU family for PyTorch in hand-written kernels: one bit an element is kept for backward.

>>> import torch, relu_ext
>>> relu_ext.relu(torch.tensor([-1.0, 2.0]))
tensor([0., 2.])
"""

from . import loading

loading.check_build()

from .autograd import ReLUFunction  # noqa: E402
from .convert import convert, revert  # noqa: E402
from .functional import (  # noqa: E402
    add_relu,
    bias_relu,
    celu,
    celu_,
    elu,
    elu_,
    fma_relu,
    hardtanh,
    hardtanh_,
    leaky_relu,
    leaky_relu_,
    linear_relu,
    prelu,
    reglu,
    relu,
    relu6,
    relu6_,
    relu_,
    relu_dropout,
    relu_squared,
    scale_shift_relu,
    selu,
    selu_,
    threshold,
    threshold_,
)
from .fuse import fuse  # noqa: E402
from .info import build_info  # noqa: E402
from .installing import install, installed, is_installed, uninstall  # noqa: E402
from .modules import (  # noqa: E402
    CELU,
    ELU,
    SELU,
    AddReLU,
    BiasReLU,
    FrozenBatchNormReLU2d,
    Hardtanh,
    LeakyReLU,
    LinearReLU,
    PReLU,
    ReGLU,
    ReLU,
    ReLU6,
    ReLUDropout,
    ReLUSquared,
    Threshold,
)
from .monitor import Monitor  # noqa: E402
from .report import Report  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = [
    "CELU",
    "ELU",
    "SELU",
    "AddReLU",
    "BiasReLU",
    "FrozenBatchNormReLU2d",
    "Hardtanh",
    "LeakyReLU",
    "LinearReLU",
    "Monitor",
    "PReLU",
    "ReGLU",
    "ReLU",
    "ReLU6",
    "ReLUDropout",
    "ReLUFunction",
    "ReLUSquared",
    "Report",
    "Threshold",
    "__version__",
    "add_relu",
    "bias_relu",
    "build_info",
    "celu",
    "celu_",
    "convert",
    "elu",
    "elu_",
    "fma_relu",
    "fuse",
    "hardtanh",
    "hardtanh_",
    "install",
    "installed",
    "is_installed",
    "leaky_relu",
    "leaky_relu_",
    "linear_relu",
    "prelu",
    "reglu",
    "relu",
    "relu6",
    "relu6_",
    "relu_",
    "relu_dropout",
    "relu_squared",
    "revert",
    "scale_shift_relu",
    "selu",
    "selu_",
    "threshold",
    "threshold_",
    "uninstall",
]
