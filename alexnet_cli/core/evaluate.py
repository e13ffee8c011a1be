"""Evaluation (section 6): top-1 and top-5 error over a split, one view or ten, per class, and the confusion matrix."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alexnet_cli.core.augment import Pixels
from alexnet_cli.core.loader import Batch
from alexnet_cli.core.network import Network
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.sources import ClassName
from alexnet_cli.errors import DataError, UsageError, WeightsError

Classify = Callable[[Tensor], npt.NDArray[np.float32]]
"""Uint8 B x 256 x 256 x 3 -> probabilities B x classes."""


@dataclass
class Evaluation:
    """Counts over the images seen so far. `confusion[true, predicted]` and `loss_sum` (nats) grow with `add`."""

    confusion: npt.NDArray[np.int64]
    top5_hits: npt.NDArray[np.int64]
    loss_sum: float = 0.0

    @classmethod
    def empty(cls, classes: int) -> Evaluation:
        """Before the first image."""
        return cls(np.zeros((classes, classes), np.int64), np.zeros(classes, np.int64))

    def add(self, probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count a batch. Returns B x min(5, classes): the likeliest classes of each image, likeliest first."""
        top = ranking(probabilities, 5)
        np.add.at(self.confusion, (labels, top[:, 0]), 1)
        np.add.at(self.top5_hits, labels, (top == labels[:, None]).any(1).astype(np.int64))
        true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
        self.loss_sum -= float(np.log(np.maximum(true, 1e-30)).sum())
        return top

    def check(self, where: Path) -> None:
        """Raise WeightsError if some probability was no number: the likeliest of such classes says nothing."""
        if not math.isfinite(self.loss_sum):
            raise WeightsError(f"{where}: what the network computes is no number", "its weights are damaged")

    def summed(self, total: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Evaluation:
        """The counts of several, where `total` adds up an array over all of them."""
        loss = float(total(np.array([self.loss_sum]))[0])
        return Evaluation(total(self.confusion), total(self.top5_hits), loss)

    @property
    def images(self) -> int:
        """How many images were counted."""
        return int(self.confusion.sum())

    @property
    def top1_error(self) -> float:
        """Share of images whose likeliest class is wrong."""
        return 1 - float(self.confusion.trace()) / self.images

    @property
    def top5_error(self) -> float:
        """Share of images whose class is not among the five likeliest."""
        return 1 - float(self.top5_hits.sum()) / self.images

    @property
    def loss(self) -> float:
        """Mean of -log p of the true class."""
        return self.loss_sum / self.images


def ranking(probabilities: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """B x min(k, classes): the indices of the highest values, highest first; equal ones in class order."""
    k = min(k, probabilities.shape[1])
    order: npt.NDArray[np.int64] = np.argsort(-probabilities, axis=1, kind="stable")[:, :k]
    return order


class TorchClassifier:
    """A network as a function from pictures to probabilities, averaged over `views` views (section 4.1)."""

    def __init__(self, network: Network, pixels: Pixels, placement: Placement, views: int = 1) -> None:
        if views not in (1, 10):
            raise UsageError(f"--views {views}: there is the centre view, 1, and the paper's ten", "use 1 or 10")
        self.network, self.pixels, self.placement, self.views = network, pixels, placement, views

    def __call__(self, images: Tensor) -> npt.NDArray[np.float32]:
        """Uint8 B x 256 x 256 x 3 -> float32 B x classes."""
        was_training = self.network.training
        self.network.eval()
        try:
            with torch.inference_mode(), self.placement.arithmetic():
                views: Iterable[Tensor] = (
                    [self.pixels.centre_view(images)] if self.views == 1 else self.pixels.ten_views(images)
                )
                total = sum(torch.softmax(self.network(view).float(), 1) for view in views)
                assert isinstance(total, Tensor)
                result: npt.NDArray[np.float32] = (total / self.views).cpu().numpy()
                return result
        finally:
            self.network.train(was_training)


def evaluate(
    classify: Classify, batches: Iterable[Batch], counts: Evaluation, output_of: npt.NDArray[np.int64] | None = None
) -> Iterator[tuple[Batch, npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Count every batch in `counts`, and yield it with its five likeliest classes and their probabilities.

    Classes are numbered as the network's outputs; `output_of[class of the data set]` translates, if need be.
    """
    for batch in batches:
        probabilities = classify(batch.images)  # of no image too: other ranks may have one, and wait for this one
        labels = batch.labels.numpy()
        top = counts.add(probabilities, labels if output_of is None else output_of[labels])
        yield batch, top, np.take_along_axis(probabilities, top, 1)


def matching(model: Sequence[ClassName], data: Sequence[ClassName], where: Path) -> npt.NDArray[np.int64] | None:
    """For each class of the data set, the network's output for it: by wnid, else by name, never by position.

    Returns None where both number their classes alike. Raises DataError for a class that the network does not know,
    or that could be several.
    """
    if list(model) == list(data):
        return None
    by_wnid = {c.wnid: i for i, c in enumerate(model) if c.wnid}
    by_name = {c.name: i for i, c in enumerate(model)}
    times = Counter(c.name for c in model)
    found = [by_wnid.get(c.wnid) if c.wnid and by_wnid else by_name.get(c.name) for c in data]
    unknown = [c.name for c, i in zip(data, found, strict=True) if i is None]
    if unknown:
        raise DataError(
            f"{where}: {len(unknown)} of the data set's {len(data)} classes are unknown to the network, "
            f"such as {unknown[0]}",
            "evaluate it on the data set it was trained on, or train on this one",
        )
    doubtful = [c.name for c in data if not (c.wnid and by_wnid) and times[c.name] > 1]
    doubtful += [model[i].name for i, count in Counter(found).items() if i is not None and count > 1]
    if doubtful:
        raise DataError(
            f"{where}: {doubtful[0]} is the name of several classes, and which is which cannot be told",
            "evaluate it on the data set it was trained on, or give the classes names of their own",
        )
    return np.array(found, dtype=np.int64)
