"""A training step of one process, alone or of several, as something to time: from pictures in memory to new weights.

The pictures are noise, decoded already; crops, colour, exchange and update are what `alexnet train` does.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from alexnet_cli.core.augment import Pixels
from alexnet_cli.core.loader import Batch
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.stopwatch import least_seconds
from alexnet_cli.core.trainer import Trainer
from alexnet_cli.recipe import SIDE, Recipe

CLASSES = 1000
RATE = 1e-4  # small: what is learned from noise should not run away, and takes as long
POOLED = {"conv3": 13 * 13, "fc6": 6 * 6}  # pixels of the maps that towers share before these layers


class Step:
    """One rank's part of the steps."""

    def __init__(self, recipe: Recipe, images: int, steps: int, placed: Placement) -> None:
        """Of a batch of so many images over all ranks; `steps` steps are a pass."""
        ranks, device = placed.ranks, placed.device
        self.images, self.steps, self.placed = images, steps, placed
        generator, share = np.random.default_rng(0), ranks.share(images)
        pictures = generator.integers(0, 256, (images, SIDE, SIDE, 3), np.uint8)[share]
        labels = generator.integers(0, CLASSES, images)[share]
        rows = np.arange(images)[share]
        self.batch = Batch(torch.from_numpy(pictures).to(device), torch.from_numpy(labels), rows)
        mean = np.full((3, SIDE, SIDE), 128, np.float32)
        pixels = Pixels(recipe, mean, np.ones(3, np.float32), np.eye(3, dtype=np.float32), device, placed.dtype)
        recipe = replace(recipe, batch_size=images, learning_rate=RATE)
        self.trainer = Trainer(recipe, CLASSES, images, pixels, placed)
        self.trainer.begin_epoch()

    def run(self) -> None:
        """A pass; the device is done with it when this returns."""
        for _ in range(self.steps):
            self.trainer.step(self.batch)
        self._finish()

    def sent(self) -> dict[str, int]:
        """The bytes that this rank sends in a step, by what for."""
        traffic = self.placed.ranks.traffic
        traffic.clear()
        self.trainer.step(self.batch)
        return dict(traffic)

    def exchange(self, layer: str) -> float:
        """Seconds that it takes to share what comes before a layer, and to send back its gradient."""
        network, side = self.trainer.network, int(POOLED[layer] ** 0.5)
        before = {"conv3": "conv2", "fc6": "conv5"}[layer]
        channels = network.get_submodule(before).get_parameter("bias").numel()
        dtype = torch.bfloat16 if self.placed.precision == "bf16" else torch.float32
        own = torch.zeros(self.images, channels, side, side, dtype=dtype, device=self.placed.device)
        own = own.contiguous(memory_format=torch.channels_last).requires_grad_()

        def both_ways() -> None:
            shared = network.towers.share(own, layer)
            shared.backward(shared.detach())
            self._finish()

        both_ways()
        return least_seconds(both_ways, 5)

    def _finish(self) -> None:
        if self.placed.device.type == "cuda":
            torch.cuda.synchronize(self.placed.device)
