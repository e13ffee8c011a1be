"""What an approximation of a network costs in right answers: both judged on the same pictures. No torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Crops = npt.NDArray[np.uint8]
Logits = Callable[[Crops], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Comparison:
    """Right top-1 answers on `images` pictures: of both networks, of the reference alone, of the other alone."""

    images: int
    both: int
    reference_alone: int
    other_alone: int

    @property
    def reference(self) -> float:
        """Share of right answers of the reference."""
        return (self.both + self.reference_alone) / self.images

    @property
    def other(self) -> float:
        """Share of right answers of the approximation."""
        return (self.both + self.other_alone) / self.images

    @property
    def fewer(self) -> int:
        """How many right answers fewer the approximation gives; negative if there are more."""
        return self.reference_alone - self.other_alone

    @property
    def lost(self) -> float:
        """The share of right answers that is lost; negative if there are more now."""
        return self.fewer / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `lost`, from the pictures on which the two differ; approximate where these are few."""
        change, net = self.reference_alone + self.other_alone, self.fewer
        half = 1.96 * math.sqrt(max(change - net**2 / self.images, 0)) / self.images
        return self.lost - half, self.lost + half

    def as_dict(self) -> dict[str, Any]:
        """For files and programs."""
        return {
            "images": self.images,
            "float32": self.reference,
            "int8": self.other,
            "lost": self.lost,
            "lost_interval": list(self.interval),
        }


def compare(reference: Logits, other: Logits, batches: Iterable[tuple[Crops, npt.NDArray[np.int64]]]) -> Comparison:
    """Count the right answers of two networks over crops (uint8 N x 3 x S x S) with their labels."""
    counts = np.zeros(4, np.int64)
    for crops, labels in batches:
        right, also = (network(crops).argmax(1) == labels for network in (reference, other))
        counts += np.bincount(2 * right + also, minlength=4)
    _, other_alone, reference_alone, both = counts.tolist()
    return Comparison(sum(counts.tolist()), both, reference_alone, other_alone)
