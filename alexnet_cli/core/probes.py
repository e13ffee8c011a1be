"""Pictures to probe a network with: evenly spaced over a split, the same ones every time. No torch."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from alexnet_cli.core import images
from alexnet_cli.core.shards import Split
from alexnet_cli.core.views import views

Crops = npt.NDArray[np.uint8]


def evenly(split: Split, count: int) -> list[int]:
    """At most `count` rows, evenly spaced; a split's order is random already."""
    rows: list[int] = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)).tolist()
    return rows


def centres(split: Split, rows: Iterable[int], side: int) -> Crops:
    """uint8 N x 3 x side x side: the middles of these pictures."""
    return np.concatenate([views(images.decode(bytes(split.jpeg(row))), side, 1) for row in rows])
