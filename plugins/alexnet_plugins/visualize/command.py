"""`alexnet visualize-filters`: figure 3 of the paper for one's own network, and how its towers specialize.

What excites units of later layers, and what a picture excites, is drawn by the modules beside it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import StorageError, UsageError, WeightsError
from alexnet_cli.options import JsonFlag, OwnDataOption, QuietFlag, WeightsOption
from alexnet_plugins.visualize import views

if TYPE_CHECKING:
    from alexnet_cli.core.analysis.filters import Kernels, Specialization
    from alexnet_cli.core.model.model_file import Model

CHANCE = 0.05  # p-values above this are called chance
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
    data: OwnDataOption = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="File to write: .png, or .svg for filters [default: figures/ of the run]"),
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

    mode = "--picture" if picture is not None else "--layer" if layer else None
    given = {"--layer": layer, "--unit": unit, "--data": data, "--scale": scale, "--sort": sort}
    _check_options(mode, [option for option, value in given.items() if value is not None], output)
    source = views.find_picture(picture, output) if picture is not None else None
    reporter = Reporter("visualize-filters", json=json, quiet=quiet)
    path = find_weights(weights)
    model = read_model(path)
    chosen = _choose_towers(tower, model.recipe.towers)
    reporter.line("weights", describe_weights(path, model.info))
    run = find_run_folder(path)
    part = f"-tower{chosen[0] + 1}" if len(chosen) < model.recipe.towers else ""
    if source is not None:
        name = f"{views.name_picture(source)}-layers{part}.png"
    elif layer is not None:
        name = f"{layer}-units{part}.png" if unit is None else f"{layer}-unit{unit}.png"
    else:
        name = f"conv1{part}.png"
    target = output or ((run / "figures" if run else Path()) / name)
    if source is not None or layer is not None:
        if source is not None:
            record, image = views.draw_picture_trace(reporter, model, source, chosen, _describe_run(model, run))
        elif layer is not None:
            title = _make_title(layer, model, run)
            record, image = views.draw_top_patches(reporter, model, layer, unit, chosen, data, title)
        _write_file(target, lambda: image.save(target, "PNG"))
        reporter.result({"path": str(target), "tower": tower, **record})
        reporter.line("saved", str(target))
        return
    title = _make_title("conv1", model, run)
    _draw_kernels(reporter, model, chosen, scale or "joint", sort is not None, target, title, terminal=not no_terminal)


def _check_options(mode: str | None, given: list[str], output: Path | None) -> None:
    """Refuse options that say nothing here; `mode` is the option that asks for something else than kernels."""
    for option in given:
        if mode == "--picture":
            raise UsageError(f"{option} says nothing about --picture", "leave one of the two out")
        if mode == "--layer" and option in ("--scale", "--sort"):
            raise UsageError(f"{option} is about kernels, not about --layer", "leave it out")
        if mode is None and option in ("--unit", "--data"):
            raise UsageError(f"{option} belongs to --layer", "such as --layer conv5 --unit 12")
    suffixes = (".png",) if mode else (".png", ".svg")
    if output is not None and output.suffix.lower() not in suffixes:
        raise UsageError(f"-o {output}: not a {' or '.join(suffixes)} file", f"such as -o filters{suffixes[-1]}")


def _draw_kernels(
    reporter: Reporter,
    model: Model,
    chosen: list[int],
    scale: str,
    sort: bool,
    target: Path,
    title: str,
    terminal: bool,
) -> None:
    """The kernels of the chosen towers as a picture, and the numbers."""
    import numpy as np

    from alexnet_cli.core.analysis import filter_picture, filters

    weight = model.tensors["conv1.weight"]
    if not np.isfinite(weight).all():
        what = f"{model.path}: conv1.weight holds values that are no numbers"
        raise WeightsError(what, "training broke down before it was saved: take an earlier checkpoint")
    towers = filters.split_towers(weight, model.recipe.towers)
    found = filters.measure_specialization(towers)
    limits = filter_picture.shared_limits(towers) if scale == "joint" else filter_picture.kernel_limits(towers)
    orders = [np.argsort(-t.chroma, kind="stable") if sort else np.arange(len(t.chroma)) for t in found.towers]
    grids = {i: (towers[i][orders[i]], limits[i][orders[i]]) for i in chosen}
    words = ("one scale" if scale == "joint" else "a scale for each", ", most colorful first" if sort else "")
    reporter.line("layer", f"conv1 · {_describe_kernels(towers, chosen)} · {words[0]}, zero = mid-gray{words[1]}")
    if terminal and not reporter.json and views.terminal_shows_color():
        for kernels, limit in grids.values():
            reporter.show(views.draw_kernels_in_terminal(kernels, limit))
    columns = filter_picture.count_columns(len(towers[0]))
    note = "" if scale == "joint" else f", {words[0]}"
    panels = [(_make_caption(found, i) + note, filter_picture.draw_grid(*grids[i], columns)) for i in chosen]
    if target.suffix.lower() == ".svg":
        _write_file(target, lambda: target.write_text(filter_picture.draw_svg(panels, title), encoding="utf-8"))
    else:
        _write_file(target, lambda: filter_picture.draw_figure(panels, title).save(target, "PNG"))
    numbers = filters.make_record(found) | {
        "order": {f"tower{i + 1}": orders[i].tolist() for i in chosen},
        "scale": scale,
    }
    tower = "both" if len(chosen) == len(towers) else str(chosen[0] + 1)
    count = sum(len(towers[i]) for i in chosen)
    reporter.result({"path": str(target), "tower": tower, "kernels": count} | numbers)
    _show_numbers(reporter, found, chosen, target, model)


def _choose_towers(tower: str, towers: int) -> list[int]:
    """Indices of the towers that --tower means."""
    if tower == "both":
        return list(range(towers))
    if tower in {str(i + 1) for i in range(towers)}:
        return [int(tower) - 1]
    has = "2 towers (1, 2)" if towers == 2 else "1 tower (1)"
    raise UsageError(f"--tower {tower}: this model has {has}", "--tower both shows all there is")


def _describe_kernels(towers: tuple[Kernels, ...], chosen: list[int]) -> str:
    names = " and ".join(str(i + 1) for i in chosen)
    count, _, height, width = towers[chosen[0]].shape
    each = " each" if len(chosen) > 1 else ""
    noun = "towers" if len(chosen) > 1 else "tower"
    return f"{noun} {names} of {len(towers)} · {count} kernels {height}×{width}×3{each}"


def _make_caption(found: Specialization, i: int) -> str:
    tower = found.towers[i]
    return f"tower {i + 1} of {len(found.towers)}, {len(tower.chroma)} kernels, color share {found.means[i]:.2f}"


def _make_title(layer: str, model: Model, run: Path | None) -> str:
    """What the kernels belong to: run and epoch, as far as the file knows."""
    return ", ".join([layer, *_describe_run(model, run)])


def _describe_run(model: Model, run: Path | None) -> list[str]:
    """Run and epoch."""
    known = ({"run": run.name} if run else {}) | dict(model.info)
    return [f"{word} {known[word]}" for word in ("run", "epoch") if word in known]


def _write_file(target: Path, write: Any) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write()
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}", "choose another -o") from error


def _describe_training(found: Specialization, chosen: list[int]) -> str:
    """How smooth the kernels of the layer are, and how many of the chosen towers' have learned nothing."""
    shown = replace(found, towers=tuple(found.towers[i] for i in chosen))
    count = sum(len(tower.chroma) for tower in shown.towers)
    both = "" if len(chosen) == len(found.towers) else ", both towers"
    noise = f"{shown.noisy} of {count} still noise{': train longer' if shown.noisy else ''}"
    return f"smoothness {found.smoothness:.2f} (random 0, smooth 1{both}) · {noise} · {shown.dead} dead"


def _show_numbers(reporter: Reporter, found: Specialization, chosen: list[int], target: Path, model: Model) -> None:
    """The numbers for people."""
    shares = " · ".join(f"tower {i + 1} {mean:.2f}" for i, mean in enumerate(found.means))
    reporter.show(f"color  {shares}   (gray 0, chance 0.67, opponent colors 1)")
    if found.auc is not None and found.p_value is not None and found.interval is not None:
        verdict = "no more than chance" if found.p_value > CHANCE else "the towers differ"
        verdict = "of noise, it says nothing" if found.undertrained else verdict
        low, high = found.interval
        reporter.show(
            f"towers  told apart by color: AUC {found.auc:.2f} ({low:.2f} to {high:.2f}), "
            f"p = {found.p_value:.4f} · {verdict}"
        )
    waves = " · ".join(
        f"tower {i + 1} {t.mean(t.frequency):.2f} and {t.mean(t.selectivity):.2f}" for i, t in enumerate(found.towers)
    )
    reporter.show(f"stripes {waves}   (cycles a pixel, and how far one orientation prevails, 0 to 1)")
    reporter.show(f"kernels {_describe_training(found, chosen)}")
    reporter.line("saved", str(target))
    if found.undertrained:
        epoch = f": this checkpoint is from epoch {model.info['epoch']}" if "epoch" in model.info else ""
        reporter.warn(
            f"kernels look like noise (smoothness {found.smoothness:.2f}){epoch}",
            "read nothing into color or orientation yet; more training or more pictures make them smooth",
        )
