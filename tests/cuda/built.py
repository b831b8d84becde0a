"""Imports an extension that was built for CUDA, on a machine that need not have a GPU: python built.py FOLDER."""

import sys
from pathlib import Path

FOLDER = Path(sys.argv[1]).resolve()
sys.path.insert(0, str(FOLDER))

import torch  # noqa: E402

import relu_ext  # noqa: E402


def main() -> None:
    info = relu_ext.build_info()
    for name, value in info.items():
        print(f"{name:15} {value}")
    assert FOLDER in Path(relu_ext.__file__).parents, relu_ext.__file__
    assert info["cuda"] and info["cuda_archs"], "built without CUDA"
    for operator in ("relu_forward", "relu_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"relu_ext::{operator}", "CUDA"), operator
    input = torch.randn(1000, requires_grad=True)
    (ours,), (theirs,) = (torch.autograd.grad(f(input).sum(), input) for f in (relu_ext.relu, torch.relu))
    assert torch.equal(relu_ext.relu(input), torch.relu(input)) and torch.equal(ours, theirs)
    print("built, linked and imported; its CPU kernels run")


if __name__ == "__main__":
    main()
