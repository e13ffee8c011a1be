"""The paper's network from PyTorch's own layers, and a script that classifies an image with it.

    python stock_network.py WEIGHTS IMAGE

`alexnet benchmark` times both. This file imports nothing of this package, so that the script starts as fast as a
user's own.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
GRAY = 120  # subtracted instead of a mean image


class TowerNorm(nn.LocalResponseNorm):
    """Response normalization of the paper inside each of two towers, which become images of their own."""

    def __init__(self) -> None:
        super().__init__(5, alpha=5e-4, beta=0.75, k=2.0)  # PyTorch divides alpha by the size, the paper does not

    def forward(self, x: Tensor) -> Tensor:
        """Return the same shape as `x`, N x C x H x W."""
        n, c, h, w = x.shape
        return super().forward(x.reshape(2 * n, c // 2, h, w)).reshape(n, c, h, w)


def build_stock_network(widths: Sequence[int]) -> nn.Sequential:
    """Return the network with `widths` channels (units) in its eight layers; its parameters have the names of ours."""
    conv1, conv2, conv3, conv4, conv5, fc6, fc7, fc8 = widths
    layers: dict[str, nn.Module] = {
        "pad": nn.ZeroPad2d((0, 3, 0, 3)),
        "conv1": nn.Conv2d(3, conv1, 11, stride=4),
        "relu1": nn.ReLU(inplace=True),
        "norm1": TowerNorm(),
        "pool1": nn.MaxPool2d(3, 2),
        "conv2": nn.Conv2d(conv1, conv2, 5, padding=2, groups=2),
        "relu2": nn.ReLU(inplace=True),
        "norm2": TowerNorm(),
        "pool2": nn.MaxPool2d(3, 2),
        "conv3": nn.Conv2d(conv2, conv3, 3, padding=1),
        "relu3": nn.ReLU(inplace=True),
        "conv4": nn.Conv2d(conv3, conv4, 3, padding=1, groups=2),
        "relu4": nn.ReLU(inplace=True),
        "conv5": nn.Conv2d(conv4, conv5, 3, padding=1, groups=2),
        "relu5": nn.ReLU(inplace=True),
        "pool5": nn.MaxPool2d(3, 2),
        "flat": nn.Flatten(),
        "fc6": nn.Linear(conv5 * 6 * 6, fc6),
        "relu6": nn.ReLU(inplace=True),
        "drop6": nn.Dropout(0.5),
        "fc7": nn.Linear(fc6, fc7),
        "relu7": nn.ReLU(inplace=True),
        "drop7": nn.Dropout(0.5),
        "fc8": nn.Linear(fc7, fc8),
    }
    return nn.Sequential(OrderedDict(layers))


def classify(weights: str, image: str) -> None:
    """Print the five most probable classes of an image."""
    from PIL import Image
    from torchvision import transforms

    state = torch.load(weights)
    network = build_stock_network([len(state[f"{layer}.bias"]) for layer in LAYERS])
    network.load_state_dict(state)
    network.eval()
    to_tensor = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
    with torch.inference_mode():
        crop = to_tensor(Image.open(image).convert("RGB")).float() - GRAY
        top = network(crop[None]).softmax(1)[0].topk(5)
    for index, probability in zip(top.indices.tolist(), top.values.tolist(), strict=True):
        sys.stdout.write(f"class {index:4}  {probability:.2f}\n")


if __name__ == "__main__":
    classify(*sys.argv[1:])
