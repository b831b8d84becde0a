"""Refuses an extension that was built for another torch or Python, before it fails with an undefined symbol."""

import platform
from importlib.util import find_spec

import torch

REBUILD = "python setup.py build_ext --inplace (in the source folder), or: pip install --no-build-isolation ."
NOT_BUILT = f"relu_ext's extension is not built. Build it with: {REBUILD}"


def check_build() -> None:
    """Raises ImportError where the extension is missing or belongs to another torch or Python.

    The extension links to torch's C++ library, whose symbols and layouts change with every release, so the versions
    must be equal. What it was built for stands in ``_build.py``, which ``setup.py`` writes next to it.
    """
    if not find_spec("relu_ext._build"):
        raise ImportError(NOT_BUILT)
    from . import _build as built

    running = (str(torch.__version__), platform.python_version_tuple()[:2])
    if running != (built.TORCH, built.PYTHON):
        raise ImportError(
            f"relu_ext was built for torch {built.TORCH} and Python {'.'.join(built.PYTHON)}, "
            f"but this is torch {running[0]} and Python {'.'.join(running[1])}. Rebuild it with: {REBUILD}"
        )
    if not find_spec("relu_ext._C"):
        raise ImportError(NOT_BUILT)
