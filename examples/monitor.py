"""Finds a dead layer: trains a small network on scikit-learn's handwritten digits, one layer of which cannot fire.

PYTHONPATH=. python examples/monitor.py [PICTURE.png]     needs `pip install relu_ext[bench]`
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

import relu_ext


def digits_net() -> nn.Sequential:
    model = nn.Sequential(
        *[nn.Conv2d(1, 16, 3, padding=1), relu_ext.ReLU(), nn.Conv2d(16, 32, 3, padding=1), relu_ext.ReLU()],
        *[nn.Flatten(), nn.Linear(32 * 64, 64), relu_ext.ReLU(), nn.Linear(64, 10)],
    )
    with torch.no_grad():
        model[2].bias[:24] -= 100  # a learning rate that was too high once, say
    return model


def main() -> None:
    torch.manual_seed(0)
    data = load_digits()
    images, labels = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    model = digits_net()
    optimiser = torch.optim.Adam(model.parameters(), lr=2e-3)
    with relu_ext.Monitor(model, window=20) as monitor:
        for batch in torch.randperm(len(images)).split(64):
            loss = F.cross_entropy(model(images[batch]), labels[batch])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            # To TensorBoard: for name, value in monitor.scalars().items(): writer.add_scalar(name, value, step)
    monitor.report()
    if sys.argv[1:]:
        monitor.plot(sys.argv[1])


if __name__ == "__main__":
    main()
