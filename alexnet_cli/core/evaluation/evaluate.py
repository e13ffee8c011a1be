"""Evaluation (section 6): top-1 and top-5 error over a split with one view or ten, and the confusion matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from alexnet_cli.core.data.augment import Augment
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.loader import Batch
from alexnet_cli.core.model.model_file import Model, check_finite
from alexnet_cli.core.model.network import evaluation_mode, network_from_model
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.errors import DataError, MissingError, UsageError, is_out_of_memory

Classify = Callable[[Tensor], npt.NDArray[np.float32]]
"""Uint8 B x 256 x 256 x 3 -> float32 probabilities B x classes."""


@dataclass
class Evaluation:
    """Counts over the images so far: `confusion[true, predicted]`, `top5_hits` per class, `loss_sum` in nats."""

    confusion: npt.NDArray[np.int64]
    top5_hits: npt.NDArray[np.int64]
    loss_sum: float = 0.0

    def __repr__(self) -> str:
        errors = f": top-1 error {self.top1_error:.1%}, top-5 error {self.top5_error:.1%}" if self.images else ""
        return f"<Evaluation of {self.images:,} images{errors}>"

    @classmethod
    def empty(cls, classes: int) -> Evaluation:
        """Return zero counts for so many classes."""
        return cls(np.zeros((classes, classes), np.int64), np.zeros(classes, np.int64))

    def add(self, probabilities: npt.NDArray[np.float32], labels: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Count a batch. Returns B x min(5, classes): the most probable classes of each image, highest first."""
        top = rank_classes(probabilities, 5)
        np.add.at(self.confusion, (labels, top[:, 0]), 1)
        np.add.at(self.top5_hits, labels, (top == labels[:, None]).any(1).astype(np.int64))
        true = probabilities[np.arange(len(labels)), labels].astype(np.float64)
        self.loss_sum -= float(np.log(np.maximum(true, 1e-30)).sum())
        return top

    def check_finite(self, path: Path) -> None:
        """Raise WeightsError if a probability was NaN: the ranking of such classes means nothing."""
        check_finite(path, self.loss_sum)

    def sum_over_ranks(self, all_reduce: Callable[[npt.NDArray[Any]], npt.NDArray[Any]]) -> Evaluation:
        """Return the counts of all ranks; `all_reduce` sums an array over them."""
        loss_sum = float(all_reduce(np.array([self.loss_sum]))[0])
        return Evaluation(all_reduce(self.confusion), all_reduce(self.top5_hits), loss_sum)

    @property
    def images(self) -> int:
        """Number of images counted."""
        return int(self.confusion.sum())

    @property
    def top1_error(self) -> float:
        """Share of images whose most probable class is wrong."""
        return 1 - float(self.confusion.trace()) / self.images

    @property
    def top5_error(self) -> float:
        """Share of images whose class is not among the five most probable."""
        return 1 - float(self.top5_hits.sum()) / self.images

    @property
    def class_errors(self) -> npt.NDArray[np.float64]:
        """Share of the images of each class that are classified wrongly; NaN for a class without images."""
        with np.errstate(invalid="ignore"):
            errors: npt.NDArray[np.float64] = 1 - self.confusion.diagonal() / self.confusion.sum(1)
        return errors

    @property
    def loss(self) -> float:
        """Mean of -log p of the true class, in nats."""
        return self.loss_sum / self.images


def rank_classes(probabilities: npt.NDArray[np.float32], k: int) -> npt.NDArray[np.int64]:
    """Return B x min(k, classes) indices of the highest values, highest first, equal ones in class order."""
    left, rows = probabilities.copy(), np.arange(len(probabilities))
    best: list[npt.NDArray[np.int64]] = []
    for _ in range(min(k, probabilities.shape[1])):  # sorting 1000 classes takes 80 times as long
        best.append(left.argmax(axis=1))
        left[rows, best[-1]] = -np.inf
    return np.stack(best, axis=1)


def to_gray(images: Tensor) -> Tensor:
    """Uint8 N x H x W x 3, the same in gray: the luma of ITU-R BT.601 in each channel, as Pillow's convert("L")."""
    red, green, blue = (channel.int() for channel in images.unbind(-1))
    luma = (red * 19595 + green * 38470 + blue * 7471 + 0x8000) >> 16
    return luma.to(torch.uint8).unsqueeze(-1).repeat(1, 1, 1, 3)


class TorchClassifier:
    """A network as a function from images to probabilities, averaged over `views` views (section 4.1)."""

    def __init__(self, network: nn.Module, augment: Augment, placement: Placement, views: int = 1) -> None:
        if views not in (1, 10):
            raise UsageError(f"--views {views} is not supported", "use 1 (center view) or 10 (the paper's ten views)")
        self.network, self.augment, self.placement, self.views = network, augment, placement, views

    @classmethod
    def from_model(cls, model: Model, placement: Placement, views: int = 1) -> TorchClassifier:
        """Return the classifier of a model file, on the device of `placement`."""
        augment = Augment(model.recipe, model.mean, None, None, placement.device)
        return cls(network_from_model(model).to(placement.device), augment, placement, views)

    def __call__(self, images: Tensor) -> npt.NDArray[np.float32]:
        """Return float32 B x classes for uint8 B x 256 x 256 x 3."""
        with evaluation_mode(self.network), torch.inference_mode(), self.placement.precision_context():
            views: Iterable[Tensor] = (
                [self.augment.center_view(images)] if self.views == 1 else self.augment.ten_views(images)
            )
            total = sum(torch.softmax(self.network(view).float(), 1) for view in views)
            assert isinstance(total, Tensor)
            result: npt.NDArray[np.float32] = (total / self.views).cpu().numpy()
            return result


class HalvingClassifier:
    """A classifier that halves its batch when memory runs out, on any device.

    `report` is called with the batch size that fits, once it is known.
    """

    def __init__(
        self, classify: Callable[[Any], npt.NDArray[np.float32]], report: Callable[[int], None] = lambda n: None
    ) -> None:
        self.classify, self.report = classify, report
        self.batch_size: int | None = None  # the largest that may fit, once a batch did not
        self.reported: int | None = None

    def __call__(self, images: Any) -> npt.NDArray[np.float32]:
        """Return the classifier's result, computed in pieces if need be.

        Raises:
            MissingError: not even one image fits.
        """
        while (result := self._try(images)) is None:  # the memory of the failed attempt is free by now
            batch_size = min(self.batch_size or len(images), len(images))
            if batch_size == 1:
                raise MissingError("out of memory with a batch of one image", "use the CPU: --gpus none")
            self.batch_size = (batch_size + 1) // 2
        if self.batch_size is not None and self.batch_size != self.reported:
            self.reported = self.batch_size
            self.report(self.batch_size)
        return result

    def _try(self, images: Any) -> npt.NDArray[np.float32] | None:
        """Return the result, or None if memory ran out."""
        size = self.batch_size or len(images)
        try:
            return np.concatenate([self.classify(images[i : i + size]) for i in range(0, len(images), size)])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return None


def evaluate(
    classify: Classify, batches: Iterable[Batch], counts: Evaluation, output_of: npt.NDArray[np.int64] | None = None
) -> Iterator[tuple[Batch, npt.NDArray[np.int64], npt.NDArray[np.float32]]]:
    """Count every batch in `counts`, and yield it with its five most probable classes and their probabilities.

    Classes are numbered as the network's outputs; `output_of[class of the data set]` translates to them.
    """
    for batch in batches:
        probabilities = classify(batch.images)  # an empty batch too: other ranks wait for this one
        labels = batch.labels.numpy()
        top = counts.add(probabilities, labels if output_of is None else output_of[labels])
        yield batch, top, np.take_along_axis(probabilities, top, 1)


def match_classes(model: Sequence[ClassName], data: Sequence[ClassName], path: Path) -> npt.NDArray[np.int64] | None:
    """Return for each class of the data set the network's output: by wnid, else by name, never by position.

    Returns None if both number their classes alike.

    Raises:
        DataError: the network does not know a class, or it could be one of several.
    """
    if list(model) == list(data):
        return None
    by_wnid = {c.wnid: i for i, c in enumerate(model) if c.wnid}
    by_name = {c.name: i for i, c in enumerate(model)}
    name_counts = Counter(c.name for c in model)
    outputs = [by_wnid.get(c.wnid) if c.wnid and by_wnid else by_name.get(c.name) for c in data]
    unknown = [c.name for c, i in zip(data, outputs, strict=True) if i is None]
    if unknown:
        raise DataError(
            f"{path}: {len(unknown)} of the data set's {len(data)} classes are unknown to the network, "
            f"such as {unknown[0]}",
            "use the data set it was trained on, or train on this one",
        )
    ambiguous = [c.name for c in data if not (c.wnid and by_wnid) and name_counts[c.name] > 1]
    ambiguous += [model[i].name for i, count in Counter(outputs).items() if i is not None and count > 1]
    if ambiguous:
        raise DataError(
            f"{path}: {ambiguous[0]} is the name of several classes",
            "use the data set it was trained on, or give each class a unique name",
        )
    return np.array(outputs, dtype=np.int64)
