"""Compute and draw the activations of one image in every layer, and its most likely classes. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.drawing import FAINT, PAGE, TRACK, Page
from alexnet_cli.core.inference.predict import Label, rank_labels
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.architecture import CONV_LAYERS, last_step_name, list_layers, step_name
from alexnet_cli.core.model.model_file import Model, check_finite

TOP_CLASSES = 5  # as in figure 4 of the paper

Array = npt.NDArray[np.float32]
LOWEST_AND_REST = {"relu": (0.0, 0.0), "tanh": (-1.0, 0.0), "sigmoid": (0.0, 0.5)}


@dataclass(frozen=True)
class LayerActivations:
    """Activations of a layer for one image, right after the nonlinearity, wherever the recipe has it."""

    name: str
    values: Array
    """Maps x rows x columns, tower 1 first. In layers 6 and 7: units, as the next layer sees them."""
    towers: int
    lowest: float
    """The lowest possible activation: 0, or with tanh -1."""
    rest: float
    """The activation for an input of zero: 0, or with sigmoid 0.5."""

    @property
    def has_maps(self) -> bool:
        """Whether the units are arranged in maps."""
        return self.values.ndim == 3

    def unit_range(self, tower: int) -> range:
        """The indices of the maps or units of a tower; towers count from 0."""
        count = len(self.values) // self.towers
        return range(tower * count, (tower + 1) * count)

    def compute_peaks(self) -> Array:
        """The highest activation of each map or unit."""
        return self.values.max(axis=(1, 2)) if self.has_maps else self.values

    def compute_active_share(self, tower: int | None = None) -> float:
        """The share of units, of one tower or of all, above `rest`. Each position of a map counts as a unit."""
        units = self.unit_range(tower) if tower is not None else range(len(self.values))
        return float(np.mean(self.values[units.start : units.stop] > self.rest))

    def sort_units(self, tower: int) -> list[int]:
        """The maps or units of a tower, highest peak first. Equal ones keep their order."""
        units = self.unit_range(tower)
        order = np.argsort(-self.compute_peaks()[units.start : units.stop], kind="stable")
        return [units[i] for i in order.tolist()]


@dataclass(frozen=True)
class Trace:
    """The activations of one image in all layers, and its most likely classes."""

    seen: ImageArray
    """The center crop, uint8 S x S x 3 with S = 224 or 227."""
    layers: tuple[LayerActivations, ...]
    top: tuple[Label, ...]


def trace_image(model: Model, image: ImageArray) -> Trace:
    """Compute all layers for the center view of a decoded image, uint8 256 x 256 x 3.

    Raises:
        WeightsError: an activation is NaN or infinite.
    """
    recipe = model.recipe
    names = {layer: step_name(recipe, layer, "activation") for layer in list_layers(recipe) if layer in CONV_LAYERS}
    names |= {layer: last_step_name(recipe, layer) for layer in ("fc6", "fc7")}
    session = Session(model, fast_start=True, layers=list(names.values()))
    crops = make_views(image, recipe.input_size, 1)
    probabilities, activations = session.probabilities_and_activations(crops)
    check_finite(session.path, probabilities, *activations.values())
    lowest, rest = LOWEST_AND_REST[recipe.activation]
    layers = []
    for layer, name in names.items():
        factor = 1 if layer in CONV_LAYERS else recipe.dropout_factor
        layers.append(LayerActivations(layer, activations[name][0], recipe.towers, factor * lowest, factor * rest))
    return Trace(crops[0].transpose(1, 2, 0), tuple(layers), rank_labels(probabilities[0], model.classes, TOP_CLASSES))


def make_layer_records(trace: Trace, towers: list[int]) -> list[dict[str, Any]]:
    """Make the records of the layers for `--json`, with the strongest unit of each tower; None if none is active."""
    records = []
    for layer in trace.layers:
        peaks, strongest = layer.compute_peaks(), []
        for tower in towers:
            unit, active = layer.sort_units(tower)[0], layer.compute_active_share(tower)
            strongest.append({
                "tower": tower + 1, "unit": unit if active else None, "response": float(peaks[unit]), "active": active
            })  # fmt: skip
        records.append({
            "layer": layer.name,
            "units": len(layer.values),
            "side": layer.values.shape[1] if layer.has_maps else None,
            "active": layer.compute_active_share(),
            "strongest": strongest,
        })  # fmt: skip
    return records


# Drawing

Gray = npt.NDArray[np.uint8]

WIDTH, MARGIN, LEFT = 1600, 24, 300  # pixels: page width, margin, width of the column with image and classes
GUTTER, GAP = 32, 4  # between columns, between maps
COLUMNS, ROWS = 16, 2  # maps in a row (all towers together), rows of maps
TILE = 70  # side of a map
NUMBER, HEAD, STRIP = 19, 34, 68  # heights: number below a map, heading of a layer, strip of units
LARGE, NORMAL, SMALL = 26, 19, 16  # letter heights
COLUMNS_TOP = MARGIN + 64  # top of the columns


def draw_trace(trace: Trace, towers: Sequence[int], name: str, caption: Sequence[str]) -> Image.Image:
    """Draw the page, RGB, 1600 pixels wide: image and classes on the left, the layers from top to bottom on the right.

    `towers` are indices from 0; `caption` says which network it is.
    """
    blocks = [
        HEAD + (_count_rows(layer, towers) * (TILE + NUMBER) if layer.has_maps else STRIP) for layer in trace.layers
    ]
    height = max(COLUMNS_TOP + HEAD + sum(blocks) + MARGIN, 940)
    page = Page(Image.new("RGB", (WIDTH, height), PAGE))
    page.text(MARGIN, MARGIN - 4, f"{name}: activations in every layer", LARGE, WIDTH - 2 * MARGIN)
    page.text(MARGIN, MARGIN + 32, " · ".join(caption), NORMAL, WIDTH - 2 * MARGIN, FAINT)
    _draw_input(page, trace)
    left, width = MARGIN + LEFT + GUTTER, WIDTH - 2 * MARGIN - LEFT - GUTTER
    column = (width - GUTTER * (len(towers) - 1)) // len(towers)
    lefts = [left + number * (column + GUTTER) for number in range(len(towers))]
    for tower, x in zip(towers, lefts, strict=True):
        page.text(x, COLUMNS_TOP, f"tower {tower + 1} of {trace.layers[0].towers}", LARGE, column)
    top = COLUMNS_TOP + HEAD
    for layer, block in zip(trace.layers, blocks, strict=True):
        _draw_heading(page, layer, left, top, width)
        for tower, x in zip(towers, lefts, strict=True):
            if layer.has_maps:
                _draw_maps(page, layer, tower, (x, top + HEAD), COLUMNS // len(towers))
            else:
                page.image.paste(_draw_strip(layer, tower, column), (x, top + HEAD))
        top += block
    return page.image


def scale_to_gray(layer: LayerActivations) -> Gray:
    """Scale the activations of a layer to grays, 0 to 255, on one scale: white is the layer's highest activation.

    Rest is black, or mid-gray if activations can be below rest (tanh, sigmoid). Grays follow the square root of the
    activation, since otherwise one strong unit would leave all others dark.
    """
    offset = layer.values - layer.rest
    share = np.sign(offset) * np.sqrt(np.abs(offset) / (np.abs(offset).max() or 1))
    grays: Gray = np.rint(255 * (share + 1) / 2 if layer.lowest < layer.rest else 255 * share).astype(np.uint8)
    return grays


def _draw_input(page: Page, trace: Trace) -> None:
    """Draw the image, the most likely classes as in figure 4 of the paper, and the legend."""
    side = len(trace.seen)
    image = Image.fromarray(trace.seen).resize((LEFT, LEFT), Image.Resampling.LANCZOS)
    page.image.paste(image, (MARGIN, COLUMNS_TOP))
    page.text(MARGIN, COLUMNS_TOP + LEFT + 6, f"input of the network, {side} x {side}", SMALL, LEFT, FAINT)
    top = COLUMNS_TOP + LEFT + 44
    for label in trace.top:
        page.bar(MARGIN, top, LEFT, label.label, label.probability)
        top += 52
    for line in _legend_lines(trace.layers[0]):
        page.text(MARGIN, top + 8, line, NORMAL - 2, LEFT, FAINT)
        top += 25


def _legend_lines(layer: LayerActivations) -> tuple[str, ...]:
    """How to read the maps, in lines that fit the column."""
    rest = "mid-gray is zero input." if layer.lowest < layer.rest else "black is zero."
    return (
        "Each square is a feature map: where",
        "in the image a unit is active, and how",
        "strongly, after the nonlinearity. The",
        "strongest maps come first, with the",
        "number of the unit below. In fc6 and",
        "fc7 each unit is a small square.",
        "",
        "Each layer has one scale: white is its",
        f"highest activation, {rest}",
        "Grays follow the square root.",
    )


def _draw_heading(page: Page, layer: LayerActivations, left: int, top: int, width: int) -> None:
    """Write name and size of a layer, the share of active units and the highest activation."""
    count, *side = layer.values.shape
    size = f"{count:,} maps of {side[0]} x {side[1]}" if layer.has_maps else f"{count:,} units"
    active, highest = 100 * layer.compute_active_share(), float(layer.compute_peaks().max())
    page.text(left, top + 6, layer.name, LARGE - 4, 80)
    line = f"{size} · {active:.0f} % of units active · highest {highest:.3g}"
    page.text(left + 80, top + 9, line, NORMAL - 2, width - 80, FAINT)


def _count_rows(layer: LayerActivations, towers: Sequence[int]) -> int:
    """Number of rows of maps of a layer."""
    return min(ROWS, -(-len(layer.unit_range(towers[0])) // (COLUMNS // len(towers))))


def _draw_maps(page: Page, layer: LayerActivations, tower: int, corner: tuple[int, int], columns: int) -> None:
    """Draw the strongest maps of a tower, with the number of the unit below each."""
    grays = scale_to_gray(layer)
    for i, unit in enumerate(layer.sort_units(tower)[: columns * ROWS]):
        left = corner[0] + i % columns * (TILE + GAP)
        top = corner[1] + i // columns * (TILE + NUMBER)
        page.pen.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=TRACK)
        page.image.paste(_enlarge_map(grays[unit]), (left, top))
        page.text(left + TILE // 2, top + TILE + 1, str(unit), SMALL - 1, TILE, FAINT, anchor="ma")


def _enlarge_map(pixels: Gray) -> Image.Image:
    """Enlarge a map to TILE x TILE pixels: enlarge by a whole number, then average, so that no pixel looks larger."""
    height, width = pixels.shape
    factor = -(-TILE // height)
    large = Image.fromarray(pixels).resize((width * factor, height * factor), Image.Resampling.NEAREST)
    return large.resize((TILE, TILE), Image.Resampling.BOX)


def _draw_strip(layer: LayerActivations, tower: int, width: int) -> Image.Image:
    """Draw all units of a tower in order as squares, as large as the strip allows."""
    units = layer.unit_range(tower)
    values = scale_to_gray(layer)[units.start : units.stop]
    cell = next(c for c in range(24, 0, -1) if -(-len(values) // (width // c)) * c <= STRIP - 8 or c == 1)
    columns = min(len(values), width // cell)
    rows = -(-len(values) // columns)
    cells = np.full(rows * columns, PAGE[0], np.uint8)
    cells[: len(values)] = values
    return Image.fromarray(cells.reshape(rows, columns)).resize((columns * cell, rows * cell), Image.Resampling.NEAREST)
