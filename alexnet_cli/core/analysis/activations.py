"""The activations of one image in every layer, its most likely classes, and a page that shows both. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from alexnet_cli.core.analysis.units import compute_activations
from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.drawing import INK, PAGE, fit_text, load_font
from alexnet_cli.core.inference.predict import Label, rank_labels
from alexnet_cli.core.inference.session import ConvLayer, FeatureLayer, Session
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.errors import WeightsError

TOP_CLASSES = 5  # as in figure 4 of the paper

Array = npt.NDArray[np.float32]
NONLINEAR: dict[str, Callable[[Array], Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "sigmoid": lambda x: (0.5 + 0.5 * np.tanh(0.5 * x)).astype(np.float32),  # where exp(-x) would overflow, too
}
LOWEST_AND_REST = {"relu": (0.0, 0.0), "tanh": (-1.0, 0.0), "sigmoid": (0.0, 0.5)}


@dataclass(frozen=True)
class LayerActivations:
    """Activations of a layer for one image, right after the nonlinearity: before normalization and pooling."""

    name: ConvLayer | FeatureLayer
    values: Array
    """Maps x rows x columns, tower 1 first; layers 6 and 7: units, as the next layer sees them."""
    towers: int
    lowest: float
    """The lowest possible activation: 0, or with tanh as far below 0 as above."""
    rest: float
    """The activation for an input of zero: 0, or half of the maximum of a sigmoid."""

    @property
    def has_maps(self) -> bool:
        """Whether the units are arranged in maps."""
        return self.values.ndim == 3

    def unit_range(self, tower: int) -> range:
        """The numbers of a tower's maps or units; towers count from 0."""
        each = len(self.values) // self.towers
        return range(tower * each, (tower + 1) * each)

    def compute_peaks(self) -> Array:
        """The highest activation of each map; of a unit its own."""
        return self.values.max(axis=(1, 2)) if self.has_maps else self.values

    def compute_active_share(self, tower: int | None = None) -> float:
        """The share of units, of a tower or of all, above rest; each position of a map counts as a unit."""
        units = self.unit_range(tower) if tower is not None else range(len(self.values))
        return float(np.mean(self.values[units.start : units.stop] > self.rest))

    def sort_units(self, tower: int) -> list[int]:
        """A tower's maps or units by their highest activation, highest first; equal ones in their order."""
        units = self.unit_range(tower)
        order = np.argsort(-self.compute_peaks()[units.start : units.stop], kind="stable")
        return [units[i] for i in order.tolist()]


@dataclass(frozen=True)
class Trace:
    """One image on its way through the network."""

    seen: ImageArray
    """uint8 S x S x 3: the center crop, 224 x 224 or 227 x 227."""
    layers: tuple[LayerActivations, ...]
    top: tuple[Label, ...]


def trace_image(model: Model, picture: ImageArray) -> Trace:
    """Compute all layers for the center view of a decoded image, uint8 256 x 256 x 3.

    Raises:
        WeightsError: what the network computes is no number.
    """
    layers = tuple(_trace_convolutions(model, picture))
    six, _ = _trace_units(model, picture, "fc6")
    seven, chances = _trace_units(model, picture, "fc7")
    seen = make_views(picture, model.recipe.input_size, 1)[0].transpose(1, 2, 0)
    return Trace(seen, (*layers, six, seven), rank_labels(chances, model.classes, TOP_CLASSES))


def _trace_convolutions(model: Model, picture: ImageArray) -> Iterator[LayerActivations]:
    recipe = model.recipe
    for layer in get_args(ConvLayer):
        before = compute_activations(Session(model, fast_start=True, layer=layer), [picture])[0]
        values = NONLINEAR[recipe.activation](before)
        yield LayerActivations(layer, values, recipe.towers, *LOWEST_AND_REST[recipe.activation])


def _trace_units(model: Model, picture: ImageArray, layer: FeatureLayer) -> tuple[LayerActivations, Array]:
    """Layer 6 or 7, and the probabilities of the classes."""
    session, recipe = Session(model, fast_start=True, layer=layer), model.recipe
    chances, units = (
        values[0] for values in session.probabilities_and_activations(make_views(picture, session.recipe.input_size, 1))
    )
    if not (np.isfinite(units).all() and np.isfinite(chances).all()):
        raise WeightsError(f"{session.path}: what the network computes is no number", "its weights are damaged")
    factor = 1 if recipe.dropout_inverted else 1 - recipe.dropout
    lowest, rest = LOWEST_AND_REST[recipe.activation]
    return LayerActivations(layer, units, recipe.towers, factor * lowest, factor * rest), chances


def make_layer_records(trace: Trace, towers: list[int]) -> list[dict[str, Any]]:
    """The layers for programs; the strongest unit of each of these towers, none where all are at rest."""
    records = []
    for layer in trace.layers:
        best = [(tower, layer.sort_units(tower)[0]) for tower in towers]
        peaks = layer.compute_peaks()
        records.append({
            "layer": layer.name,
            "units": len(layer.values),
            "side": layer.values.shape[1] if layer.has_maps else None,
            "active": layer.compute_active_share(),
            "strongest": [
                {
                    "tower": tower + 1,
                    "unit": unit if layer.compute_active_share(tower) else None,
                    "response": float(peaks[unit]),
                    "active": layer.compute_active_share(tower),
                }
                for tower, unit in best
            ],
        })  # fmt: skip
    return records


# Drawing

Gray = npt.NDArray[np.uint8]

WIDTH, MARGIN, LEFT = 1600, 24, 300  # pixels: of the page, around it, of the column with picture and answers
GUTTER, GAP = 32, 4  # between columns, between maps
COLUMNS, ROWS = 16, 2  # maps in a row, of all towers together; rows of them
TILE = 70  # side of a map
NUMBER, HEAD, STRIP = 19, 34, 68  # heights: of a map's number, of a layer's heading, of a strip of units
LARGE, NORMAL, SMALL = 26, 19, 16  # heights of letters
FAINT, BAR, TRACK = (95, 95, 95), (36, 92, 150), (228, 232, 238)
COLUMNS_TOP = MARGIN + 64  # where the columns begin


def draw_trace(trace: Trace, towers: Sequence[int], name: str, caption: Sequence[str]) -> Image.Image:
    """RGB, 1600 pixels wide: left the picture and its answers as figure 4 has them, right the layers from the top.

    `towers` are those to show, from 0; `caption` are lines about the network.
    """
    blocks = [
        HEAD + (_count_rows(layer, towers) * (TILE + NUMBER) if layer.has_maps else STRIP) for layer in trace.layers
    ]
    height = max(COLUMNS_TOP + HEAD + sum(blocks) + MARGIN, 940)
    page = _Page(Image.new("RGB", (WIDTH, height), PAGE))
    page.text(MARGIN, MARGIN - 4, f"{name} on its way through the network", LARGE, WIDTH - 2 * MARGIN)
    page.text(MARGIN, MARGIN + 32, " · ".join(caption), NORMAL, WIDTH - 2 * MARGIN, FAINT)
    _draw_input(page, trace)
    left, width = MARGIN + LEFT + GUTTER, WIDTH - 2 * MARGIN - LEFT - GUTTER
    each = (width - GUTTER * (len(towers) - 1)) // len(towers)
    top = COLUMNS_TOP + HEAD
    for number, tower in enumerate(towers):
        heading = f"tower {tower + 1} of {trace.layers[0].towers}"
        page.text(left + number * (each + GUTTER), COLUMNS_TOP, heading, LARGE, each)
    for layer, block in zip(trace.layers, blocks, strict=True):
        _draw_heading(page, layer, left, top, width)
        for number, tower in enumerate(towers):
            place = (left + number * (each + GUTTER), top + HEAD)
            if layer.has_maps:
                _draw_maps(page, layer, tower, place, COLUMNS // len(towers))
            else:
                page.image.paste(_draw_strip(layer, tower, each), place)
        top += block
    return page.image


def scale_to_gray(layer: LayerActivations) -> Gray:
    """The values of a layer as grays, 0 to 255, all on one scale: white is the layer's strongest answer.

    Black is none; where units can answer below rest (tanh, sigmoid), that is mid-gray. A gray goes with the root of
    an answer, or a single strong unit would leave all others in the dark.
    """
    answer = layer.values - layer.rest
    share = np.sign(answer) * np.sqrt(np.abs(answer) / (np.abs(answer).max() or 1))
    grays: Gray = np.rint(255 * (share + 1) / 2 if layer.lowest < layer.rest else 255 * share).astype(np.uint8)
    return grays


class _Page:
    """An image to write on; text is cut where it would not fit."""

    def __init__(self, image: Image.Image) -> None:
        self.image, self.pen = image, ImageDraw.Draw(image)

    def text(
        self, left: int, top: int, text: str, size: int, width: int, ink: tuple[int, int, int] = INK, anchor: str = "la"
    ) -> None:
        font = load_font(size, text)
        self.pen.text((left, top), fit_text(text, width, font), ink, font, anchor=anchor)


def _draw_input(page: _Page, trace: Trace) -> None:
    """The picture, its answers below it as in figure 4 of the paper, and how to read the rest."""
    side = len(trace.seen)
    picture = Image.fromarray(trace.seen).resize((LEFT, LEFT), Image.Resampling.LANCZOS)
    page.image.paste(picture, (MARGIN, COLUMNS_TOP))
    page.text(MARGIN, COLUMNS_TOP + LEFT + 6, f"what the network sees, {side} x {side}", SMALL, LEFT, FAINT)
    top = COLUMNS_TOP + LEFT + 44
    for label in trace.top:
        _draw_class(page, label, top)
        top += 52
    for line in _legend_lines(trace.layers[0]):
        page.text(MARGIN, top + 8, line, NORMAL - 2, LEFT, FAINT)
        top += 25


def _legend_lines(layer: LayerActivations) -> tuple[str, ...]:
    """How to read the maps, in lines that fit the column."""
    nothing = "mid-gray none." if layer.lowest < layer.rest else "black none at all."
    return (
        "A square is a map: where in the",
        "picture a unit answers, and how",
        "strongly, right after the nonlinearity.",
        "The strongest maps come first, the",
        "unit's number below each. In fc6 and",
        "fc7 every unit is a small square.",
        "",
        "A layer has one scale: white is its",
        f"highest answer, {nothing}",
        "Grays go with the root of an answer.",
    )


def _draw_class(page: _Page, label: Label, top: int) -> None:
    """A class with its probability, and a bar."""
    right = MARGIN + LEFT
    page.text(MARGIN, top, label.label, NORMAL, LEFT - 60)
    page.text(right, top, f"{100 * label.probability:.0f} %", NORMAL, 60, anchor="ra")
    page.pen.rectangle((MARGIN, top + 27, right - 1, top + 40), TRACK)
    if length := round(LEFT * label.probability):
        page.pen.rectangle((MARGIN, top + 27, MARGIN + length - 1, top + 40), BAR)


def _draw_heading(page: _Page, layer: LayerActivations, left: int, top: int, width: int) -> None:
    """Name and size of a layer, the share of active units, the highest activation."""
    count, *side = layer.values.shape
    size = f"{count:,} maps of {side[0]} x {side[1]}" if layer.has_maps else f"{count:,} units"
    active, highest = 100 * layer.compute_active_share(), float(layer.compute_peaks().max())
    page.text(left, top + 6, layer.name, LARGE - 4, 80)
    line = f"{size} · {active:.0f} % of units active · highest {highest:.3g}"
    page.text(left + 80, top + 9, line, NORMAL - 2, width - 80, FAINT)


def _count_rows(layer: LayerActivations, towers: Sequence[int]) -> int:
    """Rows of maps that a layer fills."""
    return min(ROWS, -(-len(layer.unit_range(towers[0])) // (COLUMNS // len(towers))))


def _draw_maps(page: _Page, layer: LayerActivations, tower: int, place: tuple[int, int], columns: int) -> None:
    """The strongest maps of a tower, below each the number of its unit."""
    grays = scale_to_gray(layer)
    for i, unit in enumerate(layer.sort_units(tower)[: columns * ROWS]):
        left = place[0] + i % columns * (TILE + GAP)
        top = place[1] + i // columns * (TILE + NUMBER)
        page.pen.rectangle((left - 1, top - 1, left + TILE, top + TILE), outline=TRACK)
        page.image.paste(_enlarge_map(grays[unit]), (left, top))
        page.text(left + TILE // 2, top + TILE + 1, str(unit), SMALL - 1, TILE, FAINT, anchor="ma")


def _enlarge_map(pixels: Gray) -> Image.Image:
    """A map as a square of TILE pixels, its own pixels all of one size: first more than enough, then averaged."""
    height, width = pixels.shape
    times = -(-TILE // height)
    large = Image.fromarray(pixels).resize((width * times, height * times), Image.Resampling.NEAREST)
    return large.resize((TILE, TILE), Image.Resampling.BOX)


def _draw_strip(layer: LayerActivations, tower: int, width: int) -> Image.Image:
    """All units of a tower in their order, a square each, as large as the strip allows."""
    units = layer.unit_range(tower)
    values = scale_to_gray(layer)[units.start : units.stop]
    cell = next(c for c in range(24, 0, -1) if -(-len(values) // (width // c)) * c <= STRIP - 8 or c == 1)
    columns = min(len(values), width // cell)
    rows = -(-len(values) // columns)
    cells = np.full(rows * columns, PAGE[0], np.uint8)
    cells[: len(values)] = values
    return Image.fromarray(cells.reshape(rows, columns)).resize((columns * cell, rows * cell), Image.Resampling.NEAREST)
