"""Every script of examples/ runs, and prints what it is there to show."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What a line has to be.
SHOWN = {
    "convert.py": "gradients are equal: True",
    "fuse.py": "3 replaced, 1 left alone",
    "install.py": "same gradients, bit for bit; installed now: False",
    "monitor.py": r"\W*3\W+ReLU\W+32\W+\S+%\W+24\W+0 1 2 3 .*",  # the layer whose first 24 channels cannot fire
}
NEEDED = {"monitor.py": ["rich", "sklearn"]}


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_example(name):
    for package in NEEDED.get(name, []):
        pytest.importorskip(package, reason=f"{package} is not installed")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, f"examples/{name}"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    assert any(re.fullmatch(SHOWN[name], line) for line in result.stdout.splitlines()), result.stdout
