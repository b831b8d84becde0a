"""Residual blocks and a feed-forward layer with their ReLUs fused: what became one call, what was left alone, and what
a training step keeps."""

import copy

import torch
from torch import nn

import relu_ext


class Residual(nn.Module):
    """A residual block whose batch normalisation stays in eval mode, as in fine-tuning."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels).eval()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        output = self.norm(self.conv(input))
        output += input
        return self.relu(output)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        doubled = input + input
        return self.relu(doubled) * doubled


def kept_mib(model: nn.Module, input: torch.Tensor) -> float:
    """What a training step keeps for backward beside the model, every storage once."""
    storages: dict[int, torch.UntypedStorage] = {}  # alive, so that no address comes twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(input).mean().backward()
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    return sum(storage.nbytes() for address, storage in storages.items() if address not in own) / 2**20


torch.manual_seed(0)
blocks = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), Residual(32), Residual(32), Scaled(), nn.Flatten(2))
model = nn.Sequential(blocks, nn.Linear(32 * 32, 256), nn.ReLU(), nn.Dropout(0.1), nn.Linear(256, 10))
stock, input = copy.deepcopy(model), torch.randn(16, 3, 32, 32)

print(relu_ext.fuse(model, input))

for name, network in ("torch", stock), ("relu_ext", model):
    print(f"{name:9} keeps {kept_mib(network, input):.1f} MiB for backward")
with torch.no_grad():
    difference = (model.eval()(input) - stock.eval()(input)).abs().max()
print(f"largest difference of the outputs in eval mode: {difference:.1e}")
