"""What was built and what is used."""

from typing import Any

import torch

from . import _C, _build
from .version import __version__


def build_info() -> dict[str, Any]:
    """Facts of this build and of what runs, as ``python -m relu_ext`` prints them.

    ``cuda`` is the CUDA version of the kernels or None, ``cuda_archs`` what they were compiled for (``sm_90`` machine
    code, ``compute_120`` PTX for later GPUs), ``cuda_note`` why they were or were not built; ``isas_compiled`` are the
    instruction sets in the extension, ``isas_supported`` those of them that this CPU has, ``isa`` the one in use: the
    best, or what the environment variable ``RELU_EXT_ISA`` names.
    """
    return {
        "version": __version__,
        "torch_built": _build.TORCH,
        "torch": torch.__version__,
        "python": ".".join(_build.PYTHON),
        "compiler": _build.COMPILER,
        "cuda": _build.CUDA,
        "cuda_archs": list(_build.CUDA_ARCHS),
        "cuda_note": _build.CUDA_NOTE,
        "isas_compiled": _C.isas_compiled(),
        "isas_supported": _C.isas_supported(),
        "isa": _C.isa(),
    }
