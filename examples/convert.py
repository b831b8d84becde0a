"""A model that somebody else wrote, with relu_ext's activations: the same numbers, less kept for backward."""

import copy

import torch
from torch import nn

import relu_ext


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU6()
        self.activation = nn.functional.relu

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.activation(self.relu(self.norm(self.conv(input))) + input)


def kept_mib(model: nn.Module, input: torch.Tensor) -> float:
    """What a training step keeps for backward, every storage once."""
    storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input).mean()
    loss.backward()
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), Block(32), Block(32), nn.AdaptiveAvgPool2d(1))
stock, input = copy.deepcopy(model), torch.randn(8, 3, 64, 64)

print(relu_ext.convert(model))

for name, network in ("torch", stock), ("relu_ext", model):
    print(f"{name:9} keeps {kept_mib(network, input):.1f} MiB for backward")
pairs = zip(model.parameters(), stock.parameters(), strict=True)
print("gradients are equal:", all(torch.equal(ours.grad, theirs.grad) for ours, theirs in pairs))

relu_ext.revert(model)
print("and back:", type(model[1].relu), model[1].activation)
