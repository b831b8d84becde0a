"""python -m relu_ext: what was built and what is used."""

from .info import build_info

for name, value in build_info().items():
    text = ", ".join(value) if isinstance(value, list) else value
    print(f"{name:15} {text or 'none'}")
