"""Variants of the extension: the project's own build with other flags or sources, in packages below build/."""

import importlib.util
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, Extension

ROOT = Path(__file__).resolve().parents[1]


def setup_py():
    """The project's build, so that all builds have the same flags and leave the same record."""
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def link_python(package: Path) -> None:
    package.mkdir(parents=True, exist_ok=True)
    for path in package.glob("*.py"):
        path.unlink()
    for path in (ROOT / "relu_ext").glob("*.py"):
        if path.name != "_build.py":
            (package / path.name).symlink_to(path)


def build(project, folder: Path, extensions: list[Extension]) -> None:
    """Makes folder/relu_ext, the package, and what else there is. What is up to date there is left alone."""
    link_python(folder / "relu_ext")
    command = project.Build(Distribution({"ext_modules": extensions}))
    command.build_lib = str(folder)
    command.build_temp = str(folder / "objects")
    command.force = True  # leaves it to ninja, which knows every header, what is out of date
    command.ensure_finalized()
    command.run()


def run_build(script: Path, folder: Path) -> bool:
    """`script FOLDER`, which is to call build(); what it prints is shown where it fails."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])  # ninja is a program
    command = [sys.executable, script, folder]
    built = subprocess.run(command, env={**os.environ, "PATH": path}, capture_output=True, text=True)
    if built.returncode:
        print(built.stdout + built.stderr)
    return built.returncode == 0
