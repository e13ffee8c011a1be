"""Find the images of a split that most activate the units of a layer (section 6.1 of the paper). No torch.

Activations are computed batch by batch, in bounded memory. Each unit keeps the images with its highest activations
and the positions in its map. They become rows of a contact sheet.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.shards import Split
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.drawing import Row, Tile
from alexnet_cli.core.inference.inputs import prefetch
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.architecture import receptive_field
from alexnet_cli.core.model.model_file import check_finite
from alexnet_cli.errors import DataError
from alexnet_cli.recipe import Recipe

BATCH = 32  # images per forward pass
OUTSIDE = 128  # gray level outside the image

Rows = npt.NDArray[np.int64]


class ActivationBatch(NamedTuple):
    """Activations `values`, float32 B x units or B x maps x height x width, of the images in `rows`, int64 B."""

    rows: Rows
    values: npt.NDArray[np.float32]


def read_images(split: Split, rows: Sequence[int]) -> Generator[ImageArray]:
    """Yield images of a split, uint8 256 x 256 x 3, in the order of `rows`. Threads decode ahead.

    Raises:
        DataError: an image is damaged.
    """
    with closing(prefetch((bytes(split.jpeg(row)) for row in rows), 2 * BATCH, exif_rotate=False)) as decoded:
        for row, (_, image) in zip(rows, decoded, strict=True):
            if isinstance(image, str):
                raise DataError(
                    f"image {split.key(row)} (row {row}) of split {split.name} cannot be decoded: {image}",
                    "the shard is damaged: prepare the data set again with --overwrite",
                )
            yield image


def read_images_by_row(split: Split, rows: Rows) -> dict[int, ImageArray]:
    """Return the images of these rows by row, each decoded once."""
    unique = np.unique(rows).tolist()
    return dict(zip(unique, read_images(split, unique), strict=True))


def compute_activations(session: Session, images: Sequence[ImageArray]) -> npt.NDArray[np.float32]:
    """Return the activations of the session's only layer for the center view of each image, uint8 256 x 256 x 3.

    Raises:
        WeightsError: activations are NaN or infinite.
    """
    crops = np.concatenate([make_views(image, session.recipe.input_size, 1) for image in images])
    [values] = session.activations(crops).values()
    check_finite(session.path, values)
    return values


def iterate_activations(split: Split, session: Session) -> Generator[ActivationBatch]:
    """Yield the activations of the session's only layer for every image of a split, in order.

    Raises:
        DataError: an image is damaged.
        WeightsError: activations are NaN or infinite.
    """
    first = 0
    with closing(read_images(split, range(len(split)))) as images:
        while batch := list(islice(images, BATCH)):
            yield ActivationBatch(np.arange(first, first + len(batch)), compute_activations(session, batch))
            first += len(batch)


@dataclass(frozen=True)
class TopActivations:
    """For each of U units the `k` images with the highest activation, highest first. Each image counts once."""

    values: npt.NDArray[np.float32]
    """U x k activations: before the nonlinearity in convolutions, as the next layer sees them in fc6 and fc7."""
    rows: Rows
    """U x k: rows of the images in the split."""
    positions: npt.NDArray[np.int64]
    """U x k x 2: row and column in the unit's map; 0, 0 in layers without maps."""

    def sort_units(self, units: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Sort these units by their highest activation, highest first. Equal ones keep their order."""
        order: npt.NDArray[np.int64] = units[np.argsort(-self.values[units, 0], kind="stable")]
        return order


def find_top_activations(batches: Iterable[ActivationBatch], k: int) -> TopActivations | None:
    """Find the top `k` images of each unit in one pass. Returns None if there is no image."""
    best: TopActivations | None = None
    for batch in batches:
        best = update_top_activations(best, batch, k)
    return best


def update_top_activations(best: TopActivations | None, batch: ActivationBatch, k: int) -> TopActivations:
    """Return the top `k` images of each unit among those found so far and those of a batch."""
    new = _reduce_batch(*batch)
    if best:
        new = TopActivations(
            np.concatenate([best.values, new.values], axis=1),
            np.concatenate([best.rows, new.rows], axis=1),
            np.concatenate([best.positions, new.positions], axis=1),
        )
    order = np.argsort(-new.values, axis=1, kind="stable")[:, :k]
    return TopActivations(
        np.take_along_axis(new.values, order, 1),
        np.take_along_axis(new.rows, order, 1),
        np.take_along_axis(new.positions, order[:, :, None], 1),
    )


def _reduce_batch(rows: Rows, values: npt.NDArray[np.float32]) -> TopActivations:
    """Find the highest activation of each unit in every image of a batch, with its position."""
    width = values.shape[3] if values.ndim == 4 else 1
    maps = values.reshape(*values.shape[:2], -1)
    peaks = maps.argmax(axis=2)
    highest = np.take_along_axis(maps, peaks[:, :, None], axis=2)[:, :, 0].T
    positions = np.stack(np.divmod(peaks.T, width), axis=-1)
    return TopActivations(highest, np.broadcast_to(rows, highest.shape), positions)


def cut_receptive_field(image: ImageArray, recipe: Recipe, layer: str, position: tuple[int, int]) -> ImageArray:
    """Cut out the receptive field of a position (row, column), S x S x 3; gray outside the image."""
    (top, bottom), (left, right) = (receptive_field(recipe, layer, p, clipped=False) for p in position)
    patch = np.full((bottom - top, right - left, 3), OUTSIDE, np.uint8)
    (y, y_end), (x, x_end) = (receptive_field(recipe, layer, p) for p in position)
    patch[y - top : y_end - top, x - left : x_end - left] = image[y:y_end, x:x_end]
    return patch


def make_sheet_rows(
    top: TopActivations, units: Sequence[int], split: Split, classes: Sequence[ClassName], recipe: Recipe, layer: str
) -> list[Row]:
    """Make a row of a contact sheet for each unit: its top patches, with activation and class."""
    sheet_rows = []
    for unit in units:
        images = read_images_by_row(split, top.rows[unit])
        tiles = []
        for value, row, (y, x) in zip(top.values[unit], top.rows[unit].tolist(), top.positions[unit], strict=True):
            patch = cut_receptive_field(images[row], recipe, layer, (int(y), int(x)))
            tiles.append(Tile(patch, f"{value:.3g} {classes[split.labels[row]].name}"))
        tower = _tower_number(unit, len(top.rows), recipe)
        sheet_rows.append(Row(f"{layer} unit {unit}, tower {tower} of {recipe.towers}", tiles))
    return sheet_rows


def make_records(
    top: TopActivations, units: Sequence[int], split: Split, classes: Sequence[ClassName], recipe: Recipe, layer: str
) -> list[dict[str, Any]]:
    """Make the records for `--json`; `box` is left, top, right, bottom in the 256 x 256 image, ends excluded."""
    records = []
    for unit in units:
        patches = []
        for value, row, position in zip(top.values[unit], top.rows[unit].tolist(), top.positions[unit], strict=True):
            (y, y_end), (x, x_end) = (receptive_field(recipe, layer, int(p)) for p in position)
            patches.append({
                "response": float(value), "row": row, "key": split.key(row),
                "label": classes[split.labels[row]].name, "box": [x, y, x_end, y_end],
            })  # fmt: skip
        records.append({"unit": unit, "tower": _tower_number(unit, len(top.rows), recipe), "patches": patches})
    return records


def _tower_number(unit: int, units: int, recipe: Recipe) -> int:
    """The tower of a unit, counted from 1."""
    return 1 + unit * recipe.towers // units
