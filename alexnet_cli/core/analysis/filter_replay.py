"""Replay how the first-layer filters of a run formed: frames of all towers, and the curve of their color. No torch.

`train` keeps the filters before the first step and after each epoch (`Run.keep_filters`).
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from alexnet_cli.core.analysis import filter_picture, filters
from alexnet_cli.core.analysis.filter_picture import INK, LETTERS, LINE, PAGE, Limits
from alexnet_cli.core.analysis.filters import Kernels
from alexnet_cli.core.drawing import load_font
from alexnet_cli.core.files import read_file
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError

Scale = Literal["joint", "each"]

FRAMES = 60  # at most
SECONDS = 6  # length of a replay, as far as the next line allows
SHORTEST, LONGEST, PAUSE = 100, 500, 3000  # milliseconds: of a frame, and of the last one
WIDTH, CHART, MARGIN = 560, 330, 40  # pixels: width of the filters, side of the chart, its left margin
SMOOTHING = 3  # lines are drawn larger by this factor and reduced
GRID, CURVE = (210, 210, 210), (11, 83, 148)
CURVES = {  # by number of towers: title, key in metrics.jsonl, lowest value; the highest is 1
    2: ("AUC of color{} (chance 0.5)", "specialization", 0.5),
    1: ("color share{} (noise 0.67)", "chroma_tower1", 0.0),
}


@dataclass(frozen=True)
class Replay:
    """Frames of one size, with the epoch of each, the milliseconds it is shown, and its `filters.summarize_epoch`."""

    frames: Sequence[Image.Image]
    epochs: Sequence[int]
    durations: Sequence[int]
    measured: Sequence[Mapping[str, float]]

    def encode(self, kind: Literal["webp", "gif"]) -> bytes:
        """Return an animation that repeats forever. WebP keeps every color, GIF has 256 for all frames."""
        frames = self.frames
        if kind == "gif":  # one palette, so that colors do not flicker; a 16th of the pixels is enough to choose it
            sample = Image.fromarray(np.concatenate([np.asarray(frame)[::4, ::4] for frame in frames]))
            palette = sample.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
            frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
        options = {"lossless": True, "method": 2} if kind == "webp" else {"optimize": False}
        file = io.BytesIO()
        frames[0].save(
            file, kind, save_all=True, append_images=frames[1:], duration=list(self.durations), loop=0, **options
        )
        return file.getvalue()


def read_kept_filters(run: Run, shape: tuple[int, ...]) -> dict[int, Kernels]:
    """Read the filters that `train` kept, by epoch, in order; `shape` is that of conv1.

    Raises:
        DataError: a file is damaged.
    """
    kept = {}
    for epoch, path in run.kept_filters.items():
        try:
            weight = np.lib.format.read_array(io.BytesIO(read_file(path)), allow_pickle=False)
            if weight.shape != shape or weight.dtype != np.float32 or not np.isfinite(weight).all():
                raise ValueError(f"{weight.dtype} {weight.shape}, not finite float32 {shape}")
        except Exception as error:  # numpy raises nearly anything for a damaged header
            raise DataError(f"{path} is damaged: {error}", "delete it: the replay can do without one epoch") from error
        kept[epoch] = weight
    return kept


def draw_replay(
    kept: Mapping[int, Kernels],
    towers: int,
    origin: str,
    chosen: Sequence[int] | None = None,
    scale: Scale = "joint",
    is_sorted: bool = False,
    most: int = FRAMES,
) -> Replay:
    """Draw the filters of each epoch, or of at most `most` evenly spread ones, first and last included.

    A scale holds for all epochs: a filter only changes if its weights do. `chosen` are the indices of the towers to
    draw; `is_sorted` puts those first that are most colorful in the end.
    """
    numbers = list(kept)
    chart_title, key, lowest = CURVES[towers]
    measured = {epoch: filters.summarize_epoch(weight, towers) for epoch, weight in kept.items()}
    largest = filters.split_towers(np.max([np.abs(weight) for weight in kept.values()], axis=0), towers)
    limits = filter_picture.shared_limits(largest) if scale == "joint" else filter_picture.kernel_limits(largest)
    orders = [
        np.argsort(-filters.measure_chroma(kernels), kind="stable") if is_sorted else np.arange(len(kernels))
        for kernels in filters.split_towers(kept[numbers[-1]], towers)
    ]
    scale_text = "one scale" if scale == "joint" else "a scale for each filter"
    shown = [numbers[i] for i in np.linspace(0, len(numbers) - 1, min(most, len(numbers))).round().astype(int)]
    frames = []
    for epoch in shown:
        parts = filters.split_towers(kept[epoch], towers)
        panels = [
            _make_panel(parts[i][orders[i]], limits[i][orders[i]], f"tower {i + 1} of {towers}")
            for i in (range(towers) if chosen is None else chosen)
        ]
        moment = f"epoch {epoch} of {numbers[-1]}" if epoch else "before the first step"
        title = f"{moment}, {scale_text} in all epochs, zero = mid-gray, conv1{origin}"
        figure = filter_picture.draw_figure(panels, "", WIDTH)
        page = Image.new("RGB", (figure.width + CHART, figure.height), (PAGE, PAGE, PAGE))
        page.paste(figure)
        place = figure.width // panels[0][1].shape[1], page.height - LINE - LINE // 4  # below the captions
        ImageDraw.Draw(page).text(place, title, (INK, INK, INK), load_font(LETTERS, title))
        past = [(number, values[key]) for number, values in measured.items() if number <= epoch and key in values]
        chart = _draw_curve(past, chart_title, lowest, numbers[-1], min(CHART, figure.height - 2 * LINE))
        page.paste(chart, (figure.width, 0))
        frames.append(page)
    duration = min(LONGEST, max(SHORTEST, SECONDS * 100 // len(shown) * 10))  # GIF counts hundredths of a second
    durations = [duration] * (len(shown) - 1) + [PAUSE]
    return Replay(frames, shown, durations, [measured[epoch] for epoch in shown])


def _make_panel(kernels: Kernels, limits: Limits, name: str) -> tuple[str, filter_picture.Pixels]:
    columns = filter_picture.count_columns(len(kernels))
    return f"{name}, {len(kernels)} filters", filter_picture.draw_grid(kernels, limits, columns)


def _draw_curve(points: Sequence[tuple[int, float]], title: str, lowest: float, last: int, height: int) -> Image.Image:
    """Draw the curve up to now on axes that stay: epochs 0 to `last`, values `lowest` to 1."""
    left, right, top, bottom = MARGIN, CHART - MARGIN // 2, LINE + LETTERS // 2, height - LINE

    def place(epoch: float, value: float, factor: int = 1) -> tuple[float, float]:
        x = left + (right - left) * epoch / max(1, last)
        return factor * x, factor * (bottom - (bottom - top) * (value - lowest) / (1 - lowest))

    large = Image.new("RGB", (SMOOTHING * CHART, SMOOTHING * height), (PAGE, PAGE, PAGE))
    draw = ImageDraw.Draw(large)
    ticks = (lowest, (lowest + 1) / 2, 1.0)
    for tick in ticks:
        draw.line([place(0, tick, SMOOTHING), place(last, tick, SMOOTHING)], GRID, SMOOTHING)
    line = [place(epoch, value, SMOOTHING) for epoch, value in points]
    draw.line(line, CURVE, 2 * SMOOTHING, joint="curve")
    if line:
        draw.circle(line[-1], 4 * SMOOTHING, CURVE)
    page = large.resize((CHART, height), Image.Resampling.LANCZOS)
    draw, font, ink = ImageDraw.Draw(page), load_font(LETTERS, ""), (INK, INK, INK)
    draw.text((left, 4), title.format(f" {points[-1][1]:.2f}" if points else ""), ink, font)
    for tick in ticks:
        draw.text((left - 6, place(0, tick)[1]), f"{tick:.2f}", ink, font, anchor="rm")
    draw.text((left, bottom + 6), "0", ink, font, anchor="mt")
    draw.text((right, bottom + 6), f"epoch {last}", ink, font, anchor="rt")
    return page
