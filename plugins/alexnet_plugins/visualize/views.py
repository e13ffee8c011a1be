"""What `visualize-filters` shows besides the kernels: the parts of images that excite units (`--layer`), an image on
its way through all layers (`--picture`), and kernels in a terminal of 16 million colors, two pixels in a character.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_cli.console import Reporter, make_printable
from alexnet_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image
    from rich.text import Text

    from alexnet_cli.core.analysis.activations import LayerActivations
    from alexnet_cli.core.analysis.filter_picture import Limits, Pixels
    from alexnet_cli.core.analysis.filters import Kernels
    from alexnet_cli.core.analysis.units import ActivationBatch
    from alexnet_cli.core.data.shards import Split
    from alexnet_cli.core.inference.inputs import ImageInput
    from alexnet_cli.core.inference.session import ConvLayer, FeatureLayer, Session
    from alexnet_cli.core.model.model_file import Model

PATCHES, UNITS = 9, 12  # of a unit; on a page
BAR_WIDTH, MIN_NAME = 24, 20  # characters: of a full bar, of a class name at least


def draw_top_patches(
    reporter: Reporter,
    model: Model,
    layer: FeatureLayer | ConvLayer,
    unit: int | None,
    towers: list[int],
    data: str | None,
    title: str,
) -> tuple[dict[str, Any], Image.Image]:
    """One pass over the validation split: the record for programs, and the page."""
    import numpy as np

    from alexnet_cli.core.analysis.units import find_top_activations, make_records, make_sheet_rows
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.drawing import draw_sheet
    from alexnet_cli.core.inference.session import Session
    from alexnet_cli.core.runs.resolve import find_training_data

    width = len(model.tensors[f"{layer}.bias"])
    chosen = _choose_units(unit, towers, width, model.recipe.towers, layer)
    dataset = open_dataset(find_dataset(data or find_training_data(model.path)))
    split = dataset.split("val")
    reporter.line("data", f"{dataset.path} · val · {len(split):,} images")
    ranked = f"{width:,} units"
    if unit is None and len(chosen) < width:
        ranked = f"tower {towers[0] + 1} of {model.recipe.towers} · {len(chosen):,} of {width:,} units"
    compared = "highest response before the nonlinearity" if layer.startswith("conv") else "highest activation"
    reporter.line("layer", f"{layer} · {ranked} · center views, {compared}")
    top = find_top_activations(_compute_with_progress(reporter, split, Session(model, layer=layer)), PATCHES)
    if top is None:
        raise DataError(f"{dataset.path}: split val holds no images", "prepare it anew with --val-fraction 0.1")
    units = top.sort_units(np.array(chosen))[:UNITS].tolist()
    reporter.show(f"        {'unit':<6}{'response':<10}the three pictures that excite it most")
    for number in units:
        names = [dataset.classes[split.labels[row]].name for row in top.rows[number][:3]]
        reporter.show(make_printable(f"unit    {number:<6}{top.values[number, 0]:<10.3g}{', '.join(names)}"))
    inputs = (top, units, split, dataset.classes, model.recipe, layer)
    record = {"layer": layer, "data": str(dataset.path), "units": make_records(*inputs)}
    return record, draw_sheet(make_sheet_rows(*inputs), f"{title}, validation pictures of {dataset.name}")


def _choose_units(unit: int | None, towers: list[int], width: int, of: int, layer: str) -> list[int]:
    """The units to choose from: one, or those of some towers."""
    if unit is None:
        return [number for tower in towers for number in range(tower * width // of, (tower + 1) * width // of)]
    if unit >= width:
        raise UsageError(f"--unit {unit}: {layer} has units 0 to {width - 1}", f"such as --unit {width - 1}")
    if unit * of // width not in towers:
        raise UsageError(f"--unit {unit} is in tower {unit * of // width + 1}", "leave --tower out")
    return [unit]


def _compute_with_progress(reporter: Reporter, split: Split, session: Session) -> Iterator[ActivationBatch]:
    """The activations of a split, batch by batch, with a progress bar."""
    from alexnet_cli.core.analysis.units import iterate_activations

    if session.fallback_reason:
        reporter.warn(f"the network runs on the CPU: {session.fallback_reason}", "see `alexnet doctor`")
    with reporter.progress("val", len(split)) as progress:
        for batch in iterate_activations(split, session):
            yield batch
            progress.advance(len(batch.rows))


def find_picture(text: str, output: Path | None) -> ImageInput:
    """The one picture that is meant, as `predict` takes it: a path, or - for standard input."""
    from alexnet_cli.core.inference.inputs import expand_inputs

    try:
        found = expand_inputs([text], getattr(sys.stdin, "buffer", None))
    except DataError as error:
        raise DataError(error.what, "give the path of a picture; curl -s URL | ... --picture - takes one") from error
    if len(found) != 1:
        raise UsageError(f"--picture {text}: {len(found):,} pictures", "one at a time, such as --picture cat.jpg")
    if output is not None and isinstance(found[0], str) and os.path.realpath(found[0]) == os.path.realpath(output):
        raise UsageError(f"-o {output} is the picture itself", "choose another file for the drawing")
    return found[0]


def name_picture(source: ImageInput) -> str:
    """What the drawing's file is called after."""
    return Path(source).stem if isinstance(source, str) else "stdin"


def draw_picture_trace(
    reporter: Reporter, model: Model, source: ImageInput, towers: list[int], caption: Sequence[str]
) -> tuple[dict[str, Any], Image.Image]:
    """The picture through all layers: the record for programs, and the page."""
    from alexnet_cli.core.analysis.activations import draw_trace, make_layer_records, trace_image
    from alexnet_cli.core.data.images import PixelBudget
    from alexnet_cli.core.inference.inputs import STDIN, load_image

    path = source if isinstance(source, str) else STDIN
    picture = load_image(source, model.exif_rotate, PixelBudget())
    if isinstance(picture, str):
        raise DataError(f"{path} cannot be read: {picture}", "look at the file, or choose another picture")
    trace = trace_image(model, picture)
    reporter.line("picture", f"{path} · shorter side to 256, the middle {len(trace.seen)}×{len(trace.seen)}")
    for layer in trace.layers:
        reporter.show(_format_layer(layer, towers))
    block = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    names = [make_printable(label.label) for label in trace.top]
    width = max([MIN_NAME, *map(len, names)])
    for text, label in zip(names, trace.top, strict=True):
        bar = block * round(BAR_WIDTH * label.probability)
        reporter.show(f"answer  {text:<{width}}  {label.probability:.2f}  {bar}".rstrip())
    record = {
        "picture": path, "layers": make_layer_records(trace, towers), "top": [asdict(label) for label in trace.top]
    }  # fmt: skip
    title = Path(path).name if isinstance(source, str) else "A picture from standard input"
    recipe = model.recipe
    network = (
        f"recipe {recipe.name}, {'two towers' if recipe.towers > 1 else 'one tower'}, {len(model.classes):,} classes"
    )
    return record, draw_trace(trace, towers, title, [*caption, network])


def _format_layer(layer: LayerActivations, towers: list[int]) -> str:
    """A layer for people: size, share of active units, the strongest of each tower."""
    count = f"{len(layer.values):,}"
    size = f"{count:>5} maps {layer.values.shape[1]}×{layer.values.shape[2]}" if layer.has_maps else f"{count:>5} units"
    peaks, words = layer.compute_peaks(), []
    for tower in towers:
        unit = layer.sort_units(tower)[0]
        best = f"unit {unit} ({peaks[unit]:.3g})" if layer.compute_active_share(tower) else "at rest"
        words.append(f"tower {tower + 1} {best}" if layer.towers > 1 else best)
    active = 100 * layer.compute_active_share()
    return f"{layer.name:<7} {size:<17}{active:>3.0f} % active   strongest: {' · '.join(words)}"


def terminal_shows_color() -> bool:
    """Whether stdout is a terminal that shows 16 million colors and may."""
    from rich.console import Console

    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and Console().color_system == "truecolor"


def draw_kernels_in_terminal(kernels: Kernels, limits: Limits) -> Text:
    """As many kernels in a row as the terminal has room for, at most those of the figure."""
    from alexnet_cli.core.analysis.filter_picture import count_columns, draw_grid

    room = (shutil.get_terminal_size().columns - 1) // (int(kernels.shape[-1]) + 1)
    return draw_half_blocks(draw_grid(kernels, limits, max(1, min(count_columns(len(kernels)), room))))


def draw_half_blocks(pixels: Pixels) -> Text:
    """Two pixels in a character: the upper one is the ink of U+2580, the lower one its ground."""
    from rich.style import Style
    from rich.text import Text

    rows = [[f"#{r:02x}{g:02x}{b:02x}" for r, g, b in row] for row in pixels.tolist()]
    if len(rows) % 2:
        rows.append(rows[0])  # the page around the tiles
    text = Text(no_wrap=True)
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        for ink, ground in zip(upper, lower, strict=True):
            text.append("▀", Style(color=ink, bgcolor=ground))
        text.append("\n")
    return text
