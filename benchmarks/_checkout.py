"""Imported before relu_ext: `make` builds the extension beside the sources, where no script here would look."""

import sys
from pathlib import Path

if "relu_ext" not in sys.modules:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
