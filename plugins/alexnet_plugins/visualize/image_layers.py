"""`visualize-filters --picture`: the activations of one image in all layers, and its most likely classes."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_cli.console import format_probabilities
from alexnet_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from alexnet_cli.core.analysis.activations import LayerActivations
    from alexnet_cli.core.inference.inputs import ImageInput
    from alexnet_plugins.visualize.figure import FigureRequest


def find_image(text: str, output: Path | None) -> ImageInput:
    """The one image that --picture names: a path, or - for standard input.

    Raises:
        DataError: there is no image.
        UsageError: there are several, or the output would overwrite it.
    """
    from alexnet_cli.core.inference.inputs import expand_inputs

    try:
        images = expand_inputs([text], getattr(sys.stdin, "buffer", None))
    except DataError as error:
        raise DataError(error.what, "give the path of an image, or - to read one from standard input") from error
    if len(images) != 1:
        raise UsageError(f"--picture {text}: {len(images):,} images", "name a single one, such as --picture cat.jpg")
    [image] = images
    if output is not None and isinstance(image, str) and os.path.realpath(image) == os.path.realpath(output):
        raise UsageError(f"-o {output} is the image itself", "choose another file for the figure")
    return image


def draw_image_layers(request: FigureRequest, source: ImageInput, tower: str) -> None:
    """Run the image through the network, and draw the strongest maps of each layer."""
    from alexnet_cli.core.analysis.activations import draw_trace, make_layer_records, trace_image
    from alexnet_cli.core.data.images import PixelBudget
    from alexnet_cli.core.inference.inputs import STDIN, load_image, name_inputs

    reporter, model = request.reporter, request.model
    path = source if isinstance(source, str) else STDIN
    image = load_image(source, model.exif_rotate, PixelBudget())
    if isinstance(image, str):
        raise DataError(f"{path} cannot be read: {image}", "check the file, or use another image")
    trace = trace_image(model, image)
    reporter.line("image", f"{path} · shorter side to 256, center {len(trace.seen)}×{len(trace.seen)}")
    for layer in trace.layers:
        reporter.show(_format_layer(layer, request.towers))
    for line in format_probabilities((label.label, label.probability) for label in trace.top):
        reporter.show(f"class   {line}")
    towers = "two towers" if model.recipe.towers > 1 else "one tower"
    caption = [*request.origin, f"recipe {model.recipe.name}, {towers}, {len(model.classes):,} classes"]
    title = Path(path).name if isinstance(source, str) else "image from standard input"
    request.save(
        draw_trace(trace, request.towers, title, caption),
        request.choose_path(name_inputs([path]), "layers", request.tower_name),
        {
            "tower": tower,
            "picture": path,
            "layers": make_layer_records(trace, request.towers),
            "top": [asdict(label) for label in trace.top],
        },
    )


def _format_layer(layer: LayerActivations, towers: list[int]) -> str:
    """A line about a layer: size, share of active units, the strongest unit of each tower."""
    count = f"{len(layer.values):,}"
    size = f"{count:>5} maps {layer.values.shape[1]}×{layer.values.shape[2]}" if layer.has_maps else f"{count:>5} units"
    peaks, strongest = layer.compute_peaks(), []
    for tower in towers:
        unit = layer.sort_units(tower)[0]
        text = f"unit {unit} ({peaks[unit]:.3g})" if layer.compute_active_share(tower) else "none active"
        strongest.append(f"tower {tower + 1} {text}" if layer.towers > 1 else text)
    active = 100 * layer.compute_active_share()
    return f"{layer.name:<7} {size:<17}{active:>3.0f} % active   strongest: {' · '.join(strongest)}"
