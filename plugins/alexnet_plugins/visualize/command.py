"""`alexnet visualize-filters`: options, and which of the figures to draw.

`filters` draws the first-layer filters and their replay, `unit_patches` what activates a unit, `image_layers` one image
in all layers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import UsageError
from alexnet_cli.options import JsonFlag, OwnDataOption, QuietFlag, WeightsOption
from alexnet_plugins.visualize.figure import FigureRequest
from alexnet_plugins.visualize.filters import draw_filter_replay, draw_filters
from alexnet_plugins.visualize.image_layers import draw_image_layers, find_image
from alexnet_plugins.visualize.unit_patches import draw_unit_patches

Layer = Literal["conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7"]


def visualize_filters(
    weights: WeightsOption = None,
    tower: Annotated[
        str,
        typer.Option(help="Tower to draw: 1, 2 or both", autocompletion=lambda: ["1", "2", "both"]),
    ] = "both",
    scale: Annotated[
        Literal["joint", "each"] | None,
        typer.Option(help="One scale for all filters, or one for each, to see faint ones [default: joint]"),
    ] = None,
    sort: Annotated[
        Literal["chroma"] | None, typer.Option(help="Draw the most colorful filters first [default: by number]")
    ] = None,
    layer: Annotated[
        Layer | None,
        typer.Option(help="Draw the validation images that most activate units of this layer, instead of filters"),
    ] = None,
    unit: Annotated[
        int | None, typer.Option(min=0, help="Draw only this unit of --layer [default: the strongest ones]")
    ] = None,
    picture: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE",
            help="Draw the activations of this image in all layers, instead of filters; - reads stdin",
        ),
    ] = None,
    replay: Annotated[
        bool,
        typer.Option("--replay", help="Animate the filters over the epochs of the run", show_default=False),
    ] = False,
    data: OwnDataOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write: .png, .svg for filters, .webp or .gif for --replay [default: figures/ of the run]",
        ),
    ] = None,
    no_terminal: Annotated[
        bool, typer.Option("--no-terminal", help="Do not draw in the terminal", show_default=False)
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Draw the first-layer filters of each tower.

    Measures how strongly the towers differ in color. All filters share one scale, and zero is mid-gray.
    """
    from alexnet_cli.core.model.model_file import read_model
    from alexnet_cli.core.runs.resolve import describe_weights, find_run_folder, find_weights

    options = {"--layer": layer, "--unit": unit, "--data": data, "--scale": scale, "--sort": sort}
    _check_options([name for name, value in options.items() if value is not None], picture is not None, replay)
    filter_suffixes = (".webp", ".gif") if replay else (".png", ".svg")
    _check_suffix(output, filter_suffixes if picture is None and layer is None else (".png",))
    image = find_image(picture, output) if picture is not None else None
    reporter = Reporter("visualize-filters", json=json, quiet=quiet)
    path = find_weights(weights)
    model = read_model(path)
    towers = _choose_towers(tower, model.recipe.towers)
    reporter.line("weights", describe_weights(path, model.info), always=weights is None)
    request = FigureRequest(reporter, model, find_run_folder(path), towers, output)
    if image is not None:
        draw_image_layers(request, image, tower)
    elif layer is not None:
        draw_unit_patches(request, layer, unit, data, tower)
    elif replay:
        draw_filter_replay(request, scale or "joint", is_sorted=sort is not None)
    else:
        draw_filters(request, scale or "joint", is_sorted=sort is not None, in_terminal=not no_terminal)


def _check_options(given: list[str], has_picture: bool, is_replay: bool) -> None:
    """Refuse options without effect on the figure that was asked for."""
    if has_picture and is_replay:
        raise UsageError("--replay has no effect with --picture", "use only one of the two")
    for option in given:
        if is_replay and option not in ("--scale", "--sort"):
            raise UsageError(f"{option} has no effect with --replay", "use only one of the two")
        if has_picture:
            raise UsageError(f"{option} has no effect with --picture", "use only one of the two")
        if "--layer" in given and option in ("--scale", "--sort"):
            raise UsageError(f"{option} has no effect with --layer", "use only one of the two")
        if "--layer" not in given and option in ("--unit", "--data"):
            raise UsageError(f"{option} needs --layer", "for example: --layer conv5 --unit 12")


def _check_suffix(output: Path | None, suffixes: tuple[str, ...]) -> None:
    if output is not None and output.suffix.lower() not in suffixes:
        raise UsageError(f"-o {output}: not a {' or '.join(suffixes)} file", f"for example: -o filters{suffixes[-1]}")


def _choose_towers(tower: str, towers: int) -> list[int]:
    """Indices of the towers that --tower names, from 0."""
    if tower == "both":
        return list(range(towers))
    if tower in {str(i + 1) for i in range(towers)}:
        return [int(tower) - 1]
    known = "2 towers (1, 2)" if towers == 2 else "1 tower (1)"
    raise UsageError(f"--tower {tower}: this model has {known}", "--tower both draws all of them")
