"""What the units of a layer answer to the pictures of a prepared split, batch by batch in bounded memory. No torch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from itertools import islice
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.images import Pixels
from alexnet_cli.core.inputs import ahead
from alexnet_cli.core.session import Session
from alexnet_cli.core.shards import Split
from alexnet_cli.core.views import views
from alexnet_cli.errors import DataError, WeightsError

BATCH = 32  # pictures in one pass of the network


class Responses(NamedTuple):
    """`values` are float32 B x units, or B x maps x rows x columns, for the pictures of `rows` int64 B."""

    rows: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]


def pictures(split: Split, rows: Sequence[int]) -> Generator[Pixels]:
    """Uint8 256 x 256 x 3 of the rows, in order, the next ones decoded meanwhile.

    Raises:
        DataError: a picture of the data set is damaged; the message names it.
    """
    with closing(ahead((bytes(split.jpeg(row)) for row in rows), 2 * BATCH, exif_rotate=False)) as decoded:
        for row, (_, picture) in zip(rows, decoded, strict=True):
            if isinstance(picture, str):
                raise DataError(
                    f"picture {split.key(row)} (row {row}) of split {split.name} cannot be decoded: {picture}",
                    "the shard is damaged: prepare the data set again with --overwrite",
                )
            yield picture


def responses(split: Split, session: Session) -> Generator[Responses]:
    """The answers of the layer that the session was opened with to every picture's centre view, in order.

    Raises:
        DataError: a picture of the data set is damaged.
        WeightsError: what the network computes is no number.
    """
    first = 0
    with closing(pictures(split, range(len(split)))) as remaining:
        while batch := list(islice(remaining, BATCH)):
            values = answers(session, batch)
            yield Responses(np.arange(first, first + len(batch)), values)
            first += len(batch)


def answers(session: Session, batch: Sequence[Pixels]) -> npt.NDArray[np.float32]:
    """The same for decoded pictures: uint8 256 x 256 x 3 each.

    Raises:
        WeightsError: what the network computes is no number.
    """
    values = session.responses(np.concatenate([views(picture, session.crop, 1) for picture in batch]))
    if not np.isfinite(values).all():
        raise WeightsError(f"{session.path}: what the network computes is no number", "its weights are damaged")
    return values
