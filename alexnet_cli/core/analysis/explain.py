"""Where a network looked: occlusion maps, Grad-CAM and LayerCAM of one image. Only the last two import torch.

Each map is made for the whole network, and for each tower with the other one switched off.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import map_coordinates

from alexnet_cli.core.data.classes import ClassName, make_names_unique
from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.drawing import BAR, FAINT, PAGE, Page
from alexnet_cli.core.inference.predict import Label, rank_labels
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.architecture import layer_specs, receptive_field, step_name
from alexnet_cli.core.model.model_file import Model, check_finite, name_towers, silence_tower
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import SIDE

Method = Literal["occlusion", "gradcam", "layercam"]
Array = npt.NDArray[np.float32]
Crop = npt.NDArray[np.uint8]
"""The center view, 3 x S x S, RGB."""

SQUARE, STRIDE = 48, 28  # pixels: side of the gray square, about how far it moves
TOP_CLASSES = 5


@dataclass(frozen=True)
class Attribution:
    """What the whole network, or one tower alone, made of an image, and where it saw evidence for a class."""

    without_tower: int | None
    """The tower that is switched off, from 1; None for the whole network."""
    top: tuple[Label, ...]
    probability: float
    """Of the class that is explained."""
    values: Array
    """Evidence by place, rows x columns."""

    @property
    def highest(self) -> float:
        """The strongest evidence, that at the peak."""
        return float(self.values.max())

    def find_peak(self) -> tuple[int, int]:
        """Row and column of the strongest evidence."""
        row, column = divmod(int(self.values.argmax()), self.values.shape[1])
        return row, column


@dataclass(frozen=True)
class Explanation:
    """Where a network looked in one image."""

    method: Method
    seen: ImageArray
    """The center crop, uint8 S x S x 3."""
    index: int
    """The class that is explained."""
    name: ClassName
    centers: npt.NDArray[np.float64]
    """The pixel of the 256 x 256 image in the middle of each row, and of each column, of the maps."""
    attributions: tuple[Attribution, ...]
    """Of the whole network first, then of each tower alone."""


class _Network(Protocol):
    """A network and a method. `centers` is as in `Explanation`."""

    centers: npt.NDArray[np.float64]

    def explain(self, crop: Crop, index: int | None) -> tuple[Array, Array]:
        """Return the probabilities of all classes, and a map for one class: by default the most probable one."""


class Explainer:
    """Explains images by one method, with the whole network or with one tower alone, or with several of these."""

    def __init__(
        self, model: Model, method: Method = "occlusion", silenced: Sequence[int | None] | None = None
    ) -> None:
        """Open the networks.

        Args:
            model: the whole network.
            method: how to find the evidence.
            silenced: for each network the tower to switch off, None for the whole network. By default the whole
                network and, if there are two towers, each of them alone.

        Raises:
            UsageError: the network has no such tower, or only one.
        """
        self.model, self.method = model, method
        everything = (None, 2, 1) if model.recipe.towers == 2 else (None,)
        self.networks: list[tuple[int | None, _Network]] = []
        for silent in everything if silenced is None else silenced:
            part = model if silent is None else silence_tower(model, silent)
            network = _OccludedNetwork(part) if method == "occlusion" else _GradientNetwork(part, method)
            self.networks.append((silent, network))

    def explain(self, image: ImageArray, index: int | None = None) -> Explanation:
        """Explain a class in a decoded image, uint8 256 x 256 x 3; by default the most probable class.

        That is the first network's.

        Raises:
            WeightsError: the network computes NaN or infinity.
        """
        [crop] = make_views(image, self.model.recipe.input_size, 1)
        attributions = []
        for silent, network in self.networks:
            probabilities, values = network.explain(crop, index)
            check_finite(self.model.path, probabilities, values)
            index = int(probabilities.argmax()) if index is None else index
            top = rank_labels(probabilities, self.model.classes, TOP_CLASSES)
            attributions.append(Attribution(silent, top, float(probabilities[index]), values))
        assert index is not None
        seen, name, centers = crop.transpose(1, 2, 0), self.model.classes[index], self.networks[0][1].centers
        return Explanation(self.method, seen, index, name, centers, tuple(attributions))


class _OccludedNetwork:
    """Covers one place after the other with a gray square: the mean image, which is zero after subtraction."""

    def __init__(self, model: Model) -> None:
        self.session, side = Session(model), int(model.recipe.input_size)
        low, last = (SIDE - side) // 2, side - SQUARE
        mean = model.mean.mean((1, 2), keepdims=True) if model.recipe.mean == "rgb" else model.mean
        self.gray = np.broadcast_to(mean, model.mean.shape)[:, low : low + side, low : low + side]
        self.starts = np.rint(np.linspace(0, last, 1 + round(last / STRIDE))).astype(int)
        self.centers = low + self.starts + SQUARE / 2

    def explain(self, crop: Crop, index: int | None) -> tuple[Array, Array]:
        places = [(top, left) for top in self.starts for left in self.starts]
        crops = np.repeat(crop[None].astype(np.float32), 1 + len(places), axis=0)  # the first stays as it is
        for covered, (top, left) in zip(crops[1:], places, strict=True):
            window = (slice(None), slice(top, top + SQUARE), slice(left, left + SQUARE))
            covered[window] = self.gray[window]
        probabilities = self.session.probabilities(crops)
        index = int(probabilities[0].argmax()) if index is None else index
        drops = probabilities[0, index] - probabilities[1:, index]
        return probabilities[0], drops.reshape(len(self.starts), -1)


class _GradientNetwork:
    """Weighs the maps of layer 5, after the nonlinearity, by the gradient of the class's logit.

    Grad-CAM: each map times its mean gradient, summed over maps, zero where negative (Selvaraju et al. 2017).
    LayerCAM: each place of a map times its own gradient where that is positive, summed (Jiang et al. 2021).
    """

    def __init__(self, model: Model, method: Method) -> None:
        from alexnet_cli.core.inference.torch_session import TorchSession

        self.session, self.method = TorchSession(model), method
        self.layer = step_name(model.recipe, "conv5", "activation")
        [spec] = [spec for spec in layer_specs(model.recipe, 1) if spec.name == "conv5"]
        fields = [receptive_field(model.recipe, "conv5", place, clipped=False) for place in range(spec.side)]
        self.centers = np.mean(fields, axis=1)

    def explain(self, crop: Crop, index: int | None) -> tuple[Array, Array]:
        import torch

        network = self.session.network
        x = network.subtract_mean(torch.from_numpy(crop[None]).to(self.session.device))
        outputs = network.activations(x, [self.layer, "fc8"])
        logits, maps = outputs["fc8"][0], outputs[self.layer]
        chosen = logits[int(logits.argmax()) if index is None else index]
        [gradients] = torch.autograd.grad(chosen, maps)
        weights = gradients.mean((2, 3), keepdim=True) if self.method == "gradcam" else gradients.clamp(min=0)
        values = (weights * maps).sum(1)[0].clamp(min=0)
        return logits.softmax(0).detach().cpu().numpy(), values.detach().cpu().numpy()


def find_class(classes: Sequence[ClassName], text: str) -> int:
    """Return the index of the class that has this name, wnid or index. Names may be in any case.

    Raises:
        UsageError: there is no such class, or several have the name.
    """
    unique, lower = make_names_unique(classes), text.strip().lower()
    kinds = (unique, [name.lower() for name in unique], [name.lower() for name, _ in classes])
    for names in (*kinds, [wnid for _, wnid in classes], [str(index) for index in range(len(classes))]):
        matches = [index for index, name in enumerate(names) if name == (text if names is unique else lower)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise UsageError(f"several classes are named {text}", f"use {' or '.join(unique[i] for i in matches)}")
    near = [name for name in unique if lower and lower in name.lower()] or [
        unique[kinds[1].index(name)] for name in get_close_matches(lower, kinds[1], 3, 0.5)
    ]
    more = " ..." if len(unique) > 10 else ""
    listed = f"classes 0 to {len(unique) - 1}: {', '.join(unique[:10])}{more}"
    hint = f"did you mean {' or '.join(near[:3])}?" if near else listed
    raise UsageError(f"the network has no class {text!r} among its {len(classes):,}", hint)


def make_record(explanation: Explanation) -> dict[str, Any]:
    """Make the record of an image for `--json`. Places are pixels of the 256 x 256 image."""
    centers, records = explanation.centers.tolist(), []
    for attribution in explanation.attributions:
        row, column = attribution.find_peak()
        records.append({
            "without_tower": attribution.without_tower,
            "probability": attribution.probability,
            "map": [[float(f"{value:.6g}") for value in row] for row in attribution.values.tolist()],
            "peak": {"x": centers[column], "y": centers[row], "value": attribution.highest},
            "top": [asdict(label) for label in attribution.top],
        })  # fmt: skip
    name, wnid = explanation.name
    return {
        "method": explanation.method, "label": name, "wnid": wnid, "index": explanation.index, "centers": centers,
        "networks": records,
    }  # fmt: skip


# Drawing

MARGIN, GUTTER, LARGE, NORMAL, SMALL = 24, 32, 26, 19, 17  # pixels: margins, between columns, letter heights
SHOWN, TOP = 360, 104  # side of an image on the page, and where images begin
TILE, GAP, ROW_HEIGHT = 192, 8, 338  # of a sheet: side of an image, space between images, height of a row
SHEET_WIDTH, LEGEND_TOP = 864, 66  # of a sheet: least width, where the legend begins
SCALE_HEIGHT = 62  # of the color scale with its words and the space below
SCREEN = 16 / 9  # width by height
LEGEND_LETTERS = 44  # in a line
BAR_HEIGHT = 50  # of a class, its probability and the space below
EXPLAINED = (190, 60, 50)  # color of the bar of the explained class
LEAST_DROP = 0.05  # of probability: a map whose largest drop is smaller has no full color and no square
LEAST_NAMED = 0.01  # of probability: a smaller drop gets no number
INFERNO = np.array([
    (0, 0, 4), (31, 12, 72), (85, 15, 109), (136, 34, 106), (186, 54, 85), (227, 89, 51), (249, 140, 10),
    (249, 201, 50), (252, 255, 164),
])  # fmt: skip
"""Every eighth part of matplotlib's color map of that name, which is perceptually even."""


def draw_page(explanation: Explanation, image: str, caption: str) -> Image.Image:
    """Draw the image, then for each network the map over it and the most likely classes. `caption`: which network."""
    parts = explanation.attributions
    width = 2 * MARGIN + (1 + len(parts)) * (SHOWN + GUTTER) - GUTTER
    legend, top = _legend_lines(explanation), TOP + SHOWN + 50
    height = top + max(SCALE_HEIGHT + 25 * len(legend), BAR_HEIGHT * (TOP_CLASSES + 1))
    page = Page(Image.new("RGB", (width, height + GUTTER + MARGIN), PAGE))
    title = f"{image}: where the network sees “{explanation.name.name}”"
    page.text(MARGIN, MARGIN - 4, title, LARGE, width - 2 * MARGIN)
    page.text(MARGIN, TOP - 32, "image", NORMAL, SHOWN)
    seen = Image.fromarray(explanation.seen).resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)
    page.image.paste(seen, (MARGIN, TOP))
    size = f"{len(explanation.seen)} x {len(explanation.seen)}"
    page.text(MARGIN, TOP + SHOWN + 8, f"as the network sees it, {size}", SMALL, SHOWN, FAINT)
    _draw_scale(page, explanation, MARGIN, top)
    for number, line in enumerate(legend):
        page.text(MARGIN, top + SCALE_HEIGHT + 25 * number, line, SMALL, SHOWN)
    for number, attribution in enumerate(parts, 1):
        left = MARGIN + number * (SHOWN + GUTTER)
        page.text(left, TOP - 32, name_towers(attribution.without_tower), NORMAL, SHOWN)
        page.image.paste(Image.fromarray(draw_overlay(explanation, attribution, SHOWN)), (left, TOP))
        if explanation.method == "occlusion":
            _draw_square(page, explanation, attribution, (left, TOP), SHOWN)
        page.text(left, TOP + SHOWN + 8, describe_evidence(explanation, attribution), SMALL, SHOWN, FAINT)
        _draw_classes(page, explanation, attribution, left, top)
    page.text(MARGIN, height + GUTTER // 2, caption, SMALL, width - 2 * MARGIN, FAINT)
    return page.image


def draw_sheet(explained: Sequence[tuple[str, Explanation]], caption: str, classes: Sequence[ClassName]) -> Image.Image:
    """Draw several images, each with its path: a row for each, in columns that fill a screen.

    A row has the image and the map of each network over it. `caption`, at the bottom, says which network. Where the
    image's folder has the name of one of the network's `classes`, the row says that the answer is wrong, if it is.
    """
    first = explained[0][1]
    lefts = [0, *(TILE + GUTTER + n * (TILE + GAP) for n in range(len(first.attributions)))]
    row_width = lefts[-1] + TILE
    columns = max(1, round(math.sqrt(SCREEN * len(explained) * ROW_HEIGHT / row_width)))
    rows = -(-len(explained) // columns)
    width = max(SHEET_WIDTH, 2 * MARGIN + columns * (row_width + 2 * GUTTER) - 2 * GUTTER)
    legend = textwrap.wrap(
        _describe_sheet([explanation for _, explanation in explained]), LEGEND_LETTERS * (width - 2 * MARGIN) // SHOWN
    )
    top = LEGEND_TOP + 25 * len(legend) + SCALE_HEIGHT + GUTTER
    bottom = top + ROW_HEIGHT * rows
    page = Page(Image.new("RGB", (width, bottom + GUTTER + MARGIN), PAGE))
    page.text(MARGIN, MARGIN - 4, "Where the network looks", LARGE, width - 2 * MARGIN)
    for number, line in enumerate(legend):
        page.text(MARGIN, LEGEND_TOP + 25 * number, line, SMALL, width - 2 * MARGIN)
    _draw_scale(page, first, MARGIN, LEGEND_TOP + 25 * len(legend) + 12)
    for number, (path, explanation) in enumerate(explained):
        left = MARGIN + number // rows * (row_width + 2 * GUTTER)
        heading = _title_row(explanation, _find_folder_class(path, classes))
        _draw_row(page, explanation, heading, Path(path).name, left, top + number % rows * ROW_HEIGHT, lefts)
    page.text(MARGIN, bottom + GUTTER // 2, caption, SMALL, width - 2 * MARGIN, FAINT)
    return page.image


def _is_own_answer(explanation: Explanation) -> bool:
    return explanation.attributions[0].top[0].index == explanation.index


def _describe_sheet(explanations: Sequence[Explanation]) -> str:
    above = "what the network says" if all(map(_is_own_answer, explanations)) else "the class explained"
    return " ".join([f"Above each image: {above}.", *_describe_map(explanations[0])])


def _find_folder_class(path: str, classes: Sequence[ClassName]) -> ClassName | None:
    """The class whose name or wnid the image's folder has, if it is the only one."""
    folder = Path(path).absolute().parent.name
    found = [name for name in classes if folder in name]
    return found[0] if len(found) == 1 else None


def _title_row(explanation: Explanation, true: ClassName | None) -> str:
    if true and true != explanation.name and _is_own_answer(explanation):
        return f"{explanation.name.name} (wrong, is {true.name})"
    return explanation.name.name


def _draw_row(
    page: Page, explanation: Explanation, heading: str, image: str, left: int, top: int, lefts: Sequence[int]
) -> None:
    """Draw a row of a sheet. The tiles begin at `lefts`, counted from `left`."""
    width = lefts[-1] + TILE
    page.text(left, top, heading, LARGE, 2 * width // 3)
    page.text(left + width, top + 8, image, SMALL, width // 3 - GAP, FAINT, anchor="ra")
    top += 36
    seen = Image.fromarray(explanation.seen).resize((TILE, TILE), Image.Resampling.LANCZOS)
    page.image.paste(seen, (left, top))
    for place, attribution in zip(lefts[1:], explanation.attributions, strict=True):
        page.image.paste(Image.fromarray(draw_overlay(explanation, attribution, TILE)), (left + place, top))
        lines, answer = [f"{100 * attribution.probability:.0f} % {explanation.name.name}"], attribution.top[0]
        if explanation.method == "occlusion":
            lines.append(_describe_fall(attribution))
            _draw_square(page, explanation, attribution, (left + place, top), TILE)
        if answer.index != explanation.index:
            lines.append(f"answer: {100 * answer.probability:.0f} % {answer.label}")
        page.text(left + place, top + TILE + 4, name_towers(attribution.without_tower), SMALL, TILE)
        for number, line in enumerate(lines, 1):
            page.text(left + place, top + TILE + 4 + 21 * number, line, SMALL, TILE, FAINT)


def draw_overlay(explanation: Explanation, attribution: Attribution, side: int) -> npt.NDArray[np.uint8]:
    """Draw the evidence in color over the image in gray: side x side x 3."""
    gray = Image.fromarray(explanation.seen).convert("L").resize((side, side), Image.Resampling.LANCZOS)
    crop = len(explanation.seen)
    pixels = (SIDE - crop) // 2 + (np.arange(side) + 0.5) * crop / side
    places = np.interp(pixels, explanation.centers, np.arange(len(explanation.centers)))
    values = map_coordinates(attribution.values, np.meshgrid(places, places, indexing="ij"), order=1, mode="nearest")
    end = max(float(values.max()), LEAST_DROP if explanation.method == "occlusion" else np.finfo(np.float32).tiny)
    share = np.clip(values / end, 0, 1)
    alpha = 0.9 * share[..., None] ** 0.6
    overlay: npt.NDArray[np.uint8] = np.rint(
        (1 - alpha) * 0.65 * np.asarray(gray, np.float64)[..., None] + alpha * _color(share)
    ).astype(np.uint8)
    return overlay


def describe_method(method: Method) -> str:
    """Name the method as people do."""
    return {"occlusion": "occlusion map", "gradcam": "Grad-CAM", "layercam": "LayerCAM"}[method]


def describe_evidence(explanation: Explanation, attribution: Attribution, place: str = "") -> str:
    """Say how strong the evidence at the peak is: "98 % falls to 31 % if a square at (66, 90) is gray".

    `place` is what to say of the place of the peak, such as " at (66, 90)".
    """
    before = f"{100 * attribution.probability:.0f} %"
    if explanation.method == "occlusion":
        return f"{before} {_describe_fall(attribution)} if a square{place} is gray"
    evidence = f"strongest evidence {attribution.highest:.2g}{place}" if attribution.highest > 0 else "no evidence"
    return f"{before}, {evidence}"


def _describe_fall(attribution: Attribution) -> str:
    """Say to what the gray square lowers the probability; a small fall gets no number, since that would be noise."""
    if attribution.highest < LEAST_NAMED:
        return "falls by less than 1 point"
    return f"falls to {100 * (attribution.probability - attribution.highest):.0f} %"


def _legend_lines(explanation: Explanation) -> list[str]:
    """How to read the page, in lines that fit the column."""
    paragraphs = (
        *_describe_map(explanation),
        "Bars: what each network takes the image for. Red is the class explained.",
    )
    return [line for paragraph in paragraphs for line in (*textwrap.wrap(paragraph, LEGEND_LETTERS), "")][:-1]


def _describe_map(explanation: Explanation) -> list[str]:
    """What is below a map, what full color is, and what a tower alone is."""
    if explanation.method == "occlusion":
        least = f"{100 * LEAST_DROP:.0f} points"
        below = (
            "A gray square slides over the image. Below each map: the probability of the class, and to what it falls "
            f"with the square at the brightest place (outlined if it falls by {least} or more)."
        )
        full = f"its largest drop, but at least {least}"
    else:
        what = "their mean gradient" if explanation.method == "gradcam" else "the gradient there"
        below = f"Bright: here the maps of layer 5, times {what}, speak for the class."
        full = "its strongest evidence"
    alone = ["Tower 1 alone: tower 2 is switched off."] if len(explanation.attributions) > 1 else []
    return [below, f"Each map has its own scale: full color is {full}.", *alone]


def _draw_scale(page: Page, explanation: Explanation, left: int, top: int) -> None:
    """Draw the color scale with the meaning of its ends below it."""
    is_drop = explanation.method == "occlusion"
    low, high = ("no drop", "largest drop in the map") if is_drop else ("no evidence", "strongest in the map")
    colors = np.rint(_color(np.linspace(0, 1, SHOWN))).astype(np.uint8)
    page.image.paste(Image.fromarray(np.repeat(colors[None], 16, axis=0)), (left, top))
    page.text(left, top + 20, low, SMALL, SHOWN // 2, FAINT)
    page.text(left + SHOWN, top + 20, high, SMALL, 2 * SHOWN // 3, FAINT, anchor="ra")


def _draw_square(
    page: Page, explanation: Explanation, attribution: Attribution, corner: tuple[int, int], side: int
) -> None:
    """Draw the outline of the gray square where it lowers the probability most, if that is enough to mean something.

    The map is drawn from `corner`, x and y, `side` pixels wide and high.
    """
    if attribution.highest < LEAST_DROP:
        return
    crop = len(explanation.seen)
    row, column = attribution.find_peak()
    x, y = corner + (explanation.centers[[column, row]] - (SIDE - crop) / 2 - SQUARE / 2) * side / crop
    length = SQUARE * side / crop - 1
    page.pen.rectangle((x, y, x + length, y + length), outline=PAGE, width=2)


def _draw_classes(page: Page, explanation: Explanation, attribution: Attribution, left: int, top: int) -> None:
    """Draw the most likely classes as bars, and the explained one even if it is not among them."""
    bars = [(label.label, label.probability, label.index) for label in attribution.top]
    if explanation.index not in (index for _, _, index in bars):
        bars.append((explanation.name.name, attribution.probability, explanation.index))
    for number, (name, probability, index) in enumerate(bars):
        color = EXPLAINED if index == explanation.index else BAR
        page.bar(left, top + BAR_HEIGHT * number, SHOWN, name, probability, color)


def _color(share: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Color numbers from 0 to 1: red, green and blue in a further dimension."""
    places = np.linspace(0, 1, len(INFERNO))
    return np.stack([np.interp(share, places, INFERNO[:, channel]) for channel in range(3)], -1)
