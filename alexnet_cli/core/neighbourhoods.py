"""Figure 4 (right) of the paper for a report: some validation pictures, and the training pictures nearest to each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_cli.core import nearest, neighbours
from alexnet_cli.core.images import Pixels
from alexnet_cli.core.responses import answers, pictures
from alexnet_cli.core.runs import ONNX
from alexnet_cli.core.session import Session
from alexnet_cli.core.shards import Dataset
from alexnet_cli.core.weights import Model
from alexnet_cli.errors import WeightsError

QUERIES, NEAREST = 5, 6  # as in the paper


@dataclass(frozen=True)
class Neighbourhood:
    """A picture, uint8 256 x 256 x 3, with its class, and the nearest ones with theirs and their distances in fc7.

    Classes are numbered as in the data set.
    """

    picture: Pixels
    true: int
    near: tuple[tuple[Pixels, int, float], ...]


def find(
    model: Model,
    run: Path | None,
    data: Dataset,
    affordable: Callable[[int], bool],
    advance: Callable[[int], None] = lambda n: None,
) -> tuple[Neighbourhood, ...]:
    """Pictures spread evenly over the validation split; the index is used if it is there, and written if affordable.

    Raises:
        DataError, WeightsError, StorageError: as `neighbours` and `responses` do.
    """
    train, val = data.split("train"), data.split("val")
    if not len(train) or not len(val) or not affordable(QUERIES):
        return ()
    source, folder = _source(model, run), neighbours.place(model.path, run)
    origin = neighbours.Origin.of(source, data, train)
    index = neighbours.open_index(folder, origin)
    if index is None and not affordable(len(train)):
        return ()
    session = Session(source, few=index is not None, layer=neighbours.LAYER)
    if index is None:
        index = neighbours.write_index(folder, origin, train, session, advance)
    rows = np.unique(np.linspace(0, len(val) - 1, min(QUERIES, len(val))).round().astype(np.int64))
    shown = list(pictures(val, rows.tolist()))
    found = nearest.search(index, neighbours.half(answers(session, shown), source), NEAREST)
    result = []
    for picture, row, best, distances in zip(shown, rows, found.rows, found.distances, strict=True):
        near = zip(pictures(train, best.tolist()), train.labels[best].tolist(), distances.tolist(), strict=True)
        result.append(Neighbourhood(picture, int(val.labels[row]), tuple(near)))
    return tuple(result)


def _source(model: Model, run: Path | None) -> Path:
    """The file that `alexnet neighbors -w RUN` would take, if it is of this model: then its index is of use."""
    exported = run / ONNX if run else None
    if exported and exported.is_file():
        try:
            if Session(exported, few=True, provider="cpu").info.sha256 == neighbours.sha256(model.path):
                return exported
        except WeightsError:
            return model.path
    return model.path
