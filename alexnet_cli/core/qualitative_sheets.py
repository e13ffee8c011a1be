"""Contact sheets of section 6.1: what excites units, and figure 4 (right), what is near to a picture. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.contact_sheet import Row, Tile
from alexnet_cli.core.images import Pixels
from alexnet_cli.core.receptive_field import extent, patch
from alexnet_cli.core.responses import pictures
from alexnet_cli.core.shards import Split
from alexnet_cli.core.sources import ClassName
from alexnet_cli.core.stimuli import Stimuli
from alexnet_cli.recipe import Recipe


def decoded(split: Split, rows: npt.NDArray[np.int64]) -> dict[int, Pixels]:
    """The pictures of some rows, each once, uint8 256 x 256 x 3."""
    each = np.unique(rows).tolist()
    return dict(zip(each, pictures(split, each), strict=True))


def unit_rows(
    found: Stimuli, units: Sequence[int], split: Split, classes: Sequence[ClassName], recipe: Recipe, layer: str
) -> list[Row]:
    """A row for each unit: the parts of pictures that excite it most, with response and class."""
    rows = []
    for unit in units:
        shown = decoded(split, found.rows[unit])
        tiles = [
            Tile(
                patch(shown[int(row)], recipe, layer, (int(y), int(x))),
                f"{response:.3g} {classes[split.labels[row]].name}",
            )
            for response, row, (y, x) in zip(found.responses[unit], found.rows[unit], found.places[unit], strict=True)
        ]
        rows.append(Row(f"{layer} unit {unit}, {tower_of(unit, len(found.rows), recipe)}", tiles))
    return rows


def tower_of(unit: int, units: int, recipe: Recipe) -> str:
    """Such as "tower 2 of 2"."""
    return f"tower {1 + unit * recipe.towers // units} of {recipe.towers}"


def unit_records(
    found: Stimuli, units: Sequence[int], split: Split, classes: Sequence[ClassName], recipe: Recipe, layer: str
) -> list[dict[str, Any]]:
    """The same for programs; `box` is left, top, right, bottom in the 256 x 256 picture, the ends excluded."""
    records = []
    for unit in units:
        patches = []
        for response, row, place in zip(found.responses[unit], found.rows[unit], found.places[unit], strict=True):
            (top, bottom), (left, right) = (extent(recipe, layer, int(p)) for p in place)
            patches.append({
                "response": float(response), "row": int(row), "key": split.key(int(row)),
                "label": classes[split.labels[row]].name, "box": [left, top, right, bottom],
            })  # fmt: skip
        tower = 1 + unit * recipe.towers // len(found.rows)
        records.append({"unit": unit, "tower": tower, "patches": patches})
    return records


def neighbour_row(
    name: str,
    picture: Pixels,
    rows: npt.NDArray[np.int64],
    distances: npt.NDArray[np.float64],
    split: Split,
    classes: Sequence[ClassName],
) -> Row:
    """A picture, apart, and what is nearest to it, with distance and class."""
    shown = decoded(split, rows)
    tiles = [
        Tile(shown[int(row)], f"{distance:.3g} {classes[split.labels[row]].name}")
        for row, distance in zip(rows, distances, strict=True)
    ]
    return Row(name, [Tile(picture), *tiles], apart=True)


def neighbour_records(
    rows: npt.NDArray[np.int64], distances: npt.NDArray[np.float64], split: Split, classes: Sequence[ClassName]
) -> list[dict[str, Any]]:
    """The same for programs; `source` is the picture's folder and name before it was prepared, as far as kept."""
    labels = split.labels[rows].tolist()
    return [
        {
            "rank": rank, "distance": float(distance), "label": classes[label].name, "wnid": classes[label].wnid,
            "index": label, "row": int(row), "key": (key := split.key(int(row))),
            "source": f"{classes[label].wnid or classes[label].name}/{key.partition('_')[2]}",
        }
        for rank, (row, distance, label) in enumerate(zip(rows, distances, labels, strict=True), 1)
    ]  # fmt: skip
