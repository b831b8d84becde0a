"""install(): a model that knows nothing of relu_ext trains with its kernels. PYTHONPATH=. python examples/install.py"""

import copy

import torch
from torch import nn

import relu_ext


class Residual(nn.Module):
    """What follows the ReLU keeps nothing of its output, so torch keeps it for the ReLU alone."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.linear(x))


def step(model: nn.Module, batch: torch.Tensor) -> tuple[float, int]:
    """One step of training: the loss, and the bytes that are kept for backward beside the parameters."""
    storages = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(batch).square().mean()
    loss.backward()
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return loss.item(), sum(size for place, size in storages.items() if place not in parameters)


def main() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(256) for _ in range(8)))
    batch = torch.randn(512, 256)
    other = copy.deepcopy(model)

    loss, kept = step(model, batch)
    print(f"torch     loss {loss:.6f}  kept for backward {kept / 2**20:.2f} MiB")
    with relu_ext.installed():
        other_loss, other_kept = step(other, batch)
    print(f"installed loss {other_loss:.6f}  kept for backward {other_kept / 2**20:.2f} MiB")

    assert other_loss == loss
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    print(f"same gradients, bit for bit; installed now: {relu_ext.is_installed()}")


if __name__ == "__main__":
    main()
