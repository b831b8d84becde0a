"""ReLU for PyTorch in hand-written kernels: one bit an element is kept for backward.

>>> import torch, relu_ext
>>> relu_ext.relu(torch.tensor([-1.0, 2.0]))
tensor([0., 2.])
"""

from . import loading

loading.check_build()

from .autograd import ReLUFunction  # noqa: E402
from .functional import relu, relu_  # noqa: E402
from .info import build_info  # noqa: E402
from .modules import ReLU  # noqa: E402
from .version import __version__  # noqa: E402

__all__ = ["ReLU", "ReLUFunction", "__version__", "build_info", "relu", "relu_"]
