"""Figure 4 (right) of the paper for a report: some validation pictures, and the training pictures nearest to each."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from alexnet_cli.core import nearest, neighbours
from alexnet_cli.core.images import Pixels
from alexnet_cli.core.patience import Patience
from alexnet_cli.core.responses import answers, pictures
from alexnet_cli.core.runs import ONNX
from alexnet_cli.core.session import Session, Source
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
    model: Model, sha256: str, run: Path | None, data: Dataset, keeps: bool, patience: Patience
) -> tuple[Neighbourhood, ...]:
    """Pictures spread evenly over the validation split. An index that is there is used; one that is made is left where
    `alexnet neighbors` looks for it if `keeps`, and thrown away otherwise.

    Raises:
        DataError, WeightsError, StorageError: as `neighbours` and `responses` do.
        Spent: there is no patience for it.
    """
    train, val = data.split("train"), data.split("val")
    if not len(train) or not len(val):
        return ()
    patience.check()
    source, weights = _source(model, sha256, run)
    folder = neighbours.place(source if isinstance(source, Path) else model.path, run, data)
    origin = neighbours.Origin(weights, data.hash, len(train))
    index = neighbours.open_index(folder, origin)
    session = Session(source, few=index is not None, layer=neighbours.LAYER)
    with ExitStack() as stack:
        if index is None:
            folder = folder if keeps else Path(stack.enter_context(tempfile.TemporaryDirectory())) / folder.name
            index = neighbours.write_index(folder, origin, train, session, patience.part(len(train)))
        rows = np.unique(np.linspace(0, len(val) - 1, min(QUERIES, len(val))).round().astype(np.int64))
        shown = list(pictures(val, rows.tolist()))
        found = nearest.search(index, neighbours.half(answers(session, shown), model.path), NEAREST)
    result = []
    for picture, row, best, distances in zip(shown, rows, found.rows, found.distances, strict=True):
        near = zip(pictures(train, best.tolist()), train.labels[best].tolist(), distances.tolist(), strict=True)
        result.append(Neighbourhood(picture, int(val.labels[row]), tuple(near)))
    return tuple(result)


def _source(model: Model, sha256: str, run: Path | None) -> tuple[Source, str]:
    """What `alexnet neighbors -w RUN` would take, if it is of this model, for then its index is of use; and its sum."""
    exported = run / ONNX if run else None
    if exported and exported.is_file():
        try:
            if Session(exported, few=True, provider="cpu").info.sha256 == sha256:
                return exported, neighbours.sha256(exported)
        except WeightsError:
            return model, sha256
    return model, sha256
