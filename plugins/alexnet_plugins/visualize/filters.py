"""`visualize-filters`: the first-layer filters of each tower (figure 3 of the paper), drawn and measured.

With `--replay`, an animation of how they formed.
"""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from alexnet_cli.errors import DataError, WeightsError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.text import Text

    from alexnet_cli.console import Reporter
    from alexnet_cli.core.analysis.filter_picture import Limits, Pixels
    from alexnet_cli.core.analysis.filter_replay import Scale
    from alexnet_cli.core.analysis.filters import Kernels, Specialization
    from alexnet_plugins.visualize.figure import FigureRequest


def draw_filters(request: FigureRequest, scale: Scale, *, is_sorted: bool, in_terminal: bool) -> None:
    """Draw the filters of the chosen towers, and report their measurements."""
    import numpy as np

    from alexnet_cli.core.analysis import filter_picture, filters

    reporter, model, chosen = request.reporter, request.model, request.towers
    weight = model.tensors["conv1.weight"]
    if not np.isfinite(weight).all():
        what = f"{model.path}: conv1.weight has values that are NaN or infinite"
        raise WeightsError(what, "use an earlier checkpoint, from before training diverged")
    towers = filters.split_towers(weight, model.recipe.towers)
    measured = filters.measure_specialization(towers)
    limits = filter_picture.shared_limits(towers) if scale == "joint" else filter_picture.kernel_limits(towers)
    orders = [np.argsort(-t.chroma, kind="stable") if is_sorted else np.arange(len(t.chroma)) for t in measured.towers]
    scale_text = "one scale" if scale == "joint" else "a scale for each"
    order_text = ", most colorful first" if is_sorted else ""
    reporter.line("layer", f"conv1 · {_describe_towers(towers, chosen)} · {scale_text}, zero = mid-gray{order_text}")
    panels = []
    for i in chosen:
        kernels, limit = towers[i][orders[i]], limits[i][orders[i]]
        if in_terminal and not reporter.json and _is_color_terminal():
            reporter.show(_draw_in_terminal(kernels, limit))
        caption = f"tower {i + 1} of {len(towers)}, {len(kernels)} filters, color share {measured.means[i]:.2f}"
        caption += "" if scale == "joint" else f", {scale_text}"
        panels.append((caption, filter_picture.draw_grid(kernels, limit, filter_picture.count_columns(len(kernels)))))
    _show_measurements(reporter, measured, chosen)
    options = ("" if scale == "joint" else f"scale-{scale}", "sort-chroma" if is_sorted else "")
    path = request.choose_path("conv1", request.tower_name, *options)
    title = ", ".join(["conv1", *request.origin])
    draw = filter_picture.draw_svg if path.suffix.lower() == ".svg" else filter_picture.draw_figure
    request.save(draw(panels, title), path, {
        "tower": "both" if len(chosen) == len(towers) else str(chosen[0] + 1),
        "kernels": sum(len(towers[i]) for i in chosen),
        **filters.make_record(measured),
        "order": {f"tower{i + 1}": orders[i].tolist() for i in chosen},
        "scale": scale,
    })  # fmt: skip
    if measured.undertrained:
        epoch = f": this checkpoint is from epoch {model.info['epoch']}" if "epoch" in model.info else ""
        reporter.warn(
            f"the filters look like noise (smoothness {measured.smoothness:.2f}){epoch}",
            "color and orientation mean nothing yet; train longer or on more images",
        )


def draw_filter_replay(request: FigureRequest, scale: Scale, *, is_sorted: bool) -> None:
    """Draw the filters that `train` kept of each epoch as an animation, WebP unless -o names a .gif file.

    Raises:
        DataError: the run has none, or a file is damaged.
    """
    from alexnet_cli.core.analysis.filter_replay import draw_replay, read_kept_filters
    from alexnet_cli.core.runs.run import Run

    reporter, model, chosen = request.reporter, request.model, request.towers
    kept = read_kept_filters(Run(request.run), model.tensors["conv1.weight"].shape) if request.run else {}
    if len(kept) < 2:
        what = f"{request.run or model.path} has no filters of its epochs to replay"
        raise DataError(what, "train keeps them in conv1/ of a run; older and imported runs have none: train a new one")
    options = ("" if scale == "joint" else f"scale-{scale}", "sort-chroma" if is_sorted else "")
    usual = request.choose_path("conv1-replay", request.tower_name, *options)
    path = request.output or usual.with_suffix(".webp")
    origin = f", run {request.run.name}" if request.run else ""
    replay = draw_replay(kept, model.recipe.towers, origin, chosen, scale, is_sorted)
    animation = replay.encode("gif" if path.suffix.lower() == ".gif" else "webp")
    seconds = sum(replay.durations) / 1000
    epochs = f"epochs {min(kept)} to {max(kept)} · {len(replay.frames)} frames, {seconds:.1f} s"
    reporter.line("replay", f"conv1 · {epochs} · {len(animation) / 1e6:.2f} MB")
    request.save(animation, path, {
        "bytes": len(animation),
        "tower": "both" if len(chosen) == model.recipe.towers else str(chosen[0] + 1),
        "scale": scale,
        "frames": [
            {"epoch": epoch, "milliseconds": duration, **measured}
            for epoch, duration, measured in zip(replay.epochs, replay.durations, replay.measured, strict=True)
        ],
    })  # fmt: skip


def _describe_towers(towers: Sequence[Kernels], chosen: list[int]) -> str:
    """For example "towers 1 and 2 of 2 · 48 filters 11×11×3 each"."""
    count, _, height, width = towers[chosen[0]].shape
    size = f"{count} filters {height}×{width}×3"
    if len(chosen) > 1:
        return f"towers {' and '.join(str(i + 1) for i in chosen)} of {len(towers)} · {size} each"
    return f"tower {chosen[0] + 1} of {len(towers)} · {size}"


def _show_measurements(reporter: Reporter, measured: Specialization, chosen: list[int]) -> None:
    """Print color, separation of the towers, waves and smoothness."""
    shares = " · ".join(f"tower {i} {mean:.2f}" for i, mean in enumerate(measured.means, 1))
    reporter.show(f"color   {shares}   (color share: gray 0, noise 0.67, opponent colors 1)")
    if measured.auc is not None and measured.p_value is not None and measured.interval is not None:
        low, high = measured.interval
        verdict = "the towers differ" if measured.is_significant else "no more than chance"
        verdict = "the filters are still noise" if measured.undertrained else verdict
        interval = f"95 % interval {low:.2f} to {high:.2f}"
        reporter.show(f"towers  AUC of color {measured.auc:.2f} ({interval}), p = {measured.p_value:.4f} · {verdict}")
    waves = " · ".join(
        f"tower {i} {t.mean(t.frequency):.2f} and {t.mean(t.selectivity):.2f}" for i, t in enumerate(measured.towers, 1)
    )
    reporter.show(f"waves   {waves}   (cycles per pixel, and orientation selectivity 0 to 1)")
    shown = replace(measured, towers=tuple(measured.towers[i] for i in chosen))
    count = sum(len(tower.chroma) for tower in shown.towers)
    both = "" if len(chosen) == len(measured.towers) else ", both towers"
    noise = f"{shown.noisy} of {count} still noise{': train longer' if shown.noisy else ''}"
    reporter.show(
        f"filters smoothness {measured.smoothness:.2f} (noise 0, smooth 1{both}) · {noise} · {shown.dead} dead"
    )


def _is_color_terminal() -> bool:
    """Whether stdout is a terminal with 16 million colors, and NO_COLOR is not set."""
    from rich.console import Console

    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and Console().color_system == "truecolor"


def _draw_in_terminal(kernels: Kernels, limits: Limits) -> Text:
    """Draw the filters with as many in a row as the terminal is wide, and at most as many as in the figure."""
    from alexnet_cli.core.analysis.filter_picture import count_columns, draw_grid

    room = (shutil.get_terminal_size().columns - 1) // (int(kernels.shape[-1]) + 1)
    return draw_half_blocks(draw_grid(kernels, limits, max(1, min(count_columns(len(kernels)), room))))


def draw_half_blocks(pixels: Pixels) -> Text:
    """Draw two pixels per character: U+2580 in the color of the upper one, on the color of the lower one."""
    from rich.style import Style
    from rich.text import Text

    rows = [[f"#{r:02x}{g:02x}{b:02x}" for r, g, b in row] for row in pixels.tolist()]
    if len(rows) % 2:
        rows.append(rows[0])  # the margin
    text = Text(no_wrap=True)
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        for color, background in zip(upper, lower, strict=True):
            text.append("▀", Style(color=color, bgcolor=background))
        text.append("\n")
    return text
