"""One picture on its way through the network, for `visualize-filters --picture`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_cli.console import Reporter, visible
from alexnet_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from alexnet_cli.core.activations import Activation
    from alexnet_cli.core.inputs import Source
    from alexnet_cli.core.weights import Model

BAR, NAME = 24, 20  # characters: a full bar, a name at least


def source(text: str, output: Path | None) -> Source:
    """The one picture that is meant, as `predict` takes it: a path, or - for standard input."""
    from alexnet_cli.core.inputs import expand

    try:
        found = expand([text], getattr(sys.stdin, "buffer", None))
    except DataError as error:
        raise DataError(error.what, "give the path of a picture; curl -s URL | ... --picture - takes one") from error
    if len(found) != 1:
        raise UsageError(f"--picture {text}: {len(found):,} pictures", "one at a time, such as --picture cat.jpg")
    if output is not None and isinstance(found[0], str) and os.path.realpath(found[0]) == os.path.realpath(output):
        raise UsageError(f"-o {output} is the picture itself", "choose another file for the drawing")
    return found[0]


def name(source: Source) -> str:
    """What the drawing's file is called after."""
    return Path(source).stem if isinstance(source, str) else "stdin"


def way(
    reporter: Reporter, model: Model, source: Source, towers: list[int], caption: Sequence[str]
) -> tuple[dict[str, Any], Image.Image]:
    """The picture through all layers: the record for programs, and the page."""
    from alexnet_cli.core.activations import course, layer_records
    from alexnet_cli.core.activations_picture import draw
    from alexnet_cli.core.inputs import STANDARD, load
    from alexnet_cli.core.memory import Memory

    path = source if isinstance(source, str) else STANDARD
    picture = load(source, model.exif_rotate, Memory())
    if isinstance(picture, str):
        raise DataError(f"{path} cannot be read: {picture}", "look at the file, or choose another picture")
    found = course(model, picture)
    reporter.line("picture", f"{path} · shorter side to 256, the middle {len(found.seen)}×{len(found.seen)}")
    for part in found.layers:
        reporter.show(_told(part, towers))
    block = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    names = [visible(label.label) for label in found.top]
    width = max([NAME, *map(len, names)])
    for text, label in zip(names, found.top, strict=True):
        bar = block * round(BAR * label.probability)
        reporter.show(f"answer  {text:<{width}}  {label.probability:.2f}  {bar}".rstrip())
    record = {
        "picture": path, "layers": layer_records(found, towers), "top": [asdict(label) for label in found.top]
    }  # fmt: skip
    title = Path(path).name if isinstance(source, str) else "A picture from standard input"
    recipe = model.recipe
    network = (
        f"recipe {recipe.name}, {'two towers' if recipe.towers > 1 else 'one tower'}, {len(model.classes):,} classes"
    )
    return record, draw(found, towers, title, [*caption, network])


def _told(part: Activation, towers: list[int]) -> str:
    """A layer for people: size, share of active units, the strongest of each tower."""
    count = f"{len(part.values):,}"
    size = f"{count:>5} maps {part.values.shape[1]}×{part.values.shape[2]}" if part.maps else f"{count:>5} units"
    peaks, words = part.peaks(), []
    for tower in towers:
        unit = part.strongest(tower)[0]
        best = f"unit {unit} ({peaks[unit]:.3g})" if part.active(tower) else "at rest"
        words.append(f"tower {tower + 1} {best}" if part.towers > 1 else best)
    return f"{part.layer:<7} {size:<17}{100 * part.active():>3.0f} % active   strongest: {' · '.join(words)}"
