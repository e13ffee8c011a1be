"""Options that several commands share, and the completion of their values in the shell."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from typing import Annotated, Literal

import typer

Parallel = Literal["auto", "tower", "data", "hybrid"]
Precision = Literal["fp32", "tf32", "bf16"]


def complete_weights(incomplete: str) -> list[str]:
    """Return the runs for -w, or else the paths, that start with what was typed. Any failure means no completions."""
    try:
        from alexnet_cli.core.runs.run import runs_root

        return _match((path.parent.name for path in runs_root().glob("*/run.json")), incomplete)
    except Exception:  # an error message would end up in the command line that the user is typing
        return []


def complete_data(incomplete: str) -> list[str]:
    """Return the prepared data sets for --data, or else the paths, that start with what was typed."""
    try:
        from alexnet_cli.core.data.shards import list_datasets

        return _match(list_datasets(), incomplete)
    except Exception:
        return []


def complete_recipe(incomplete: str) -> list[str]:
    """Return the named recipes, or else the paths, that start with what was typed."""
    from alexnet_cli.recipe import RECIPES

    return _match(RECIPES, incomplete)


def complete_setting(incomplete: str) -> list[tuple[str, str]]:
    """Return `key=` and its meaning for every recipe key that starts with what was typed after --set."""
    from alexnet_cli.recipe import FIELDS, describe_setting

    return [(f"{key}=", describe_setting(key)[0]) for key in FIELDS if key.startswith(incomplete)]


def complete_layers(incomplete: str) -> list[str]:
    """Return the layers of any named recipe for --features; those before the last comma stay as they are."""
    from alexnet_cli.core.model.architecture import layer_names
    from alexnet_cli.recipe import RECIPES

    before, comma, last = incomplete.rpartition(",")
    names = dict.fromkeys(name for recipe in RECIPES.values() for name in layer_names(recipe))
    return [f"{before}{comma}{name}" for name in names if name.startswith(last)]


def _match(names: Iterable[str], incomplete: str) -> list[str]:
    matching = sorted(name for name in names if name.startswith(incomplete))
    return matching or sorted(path + os.sep * os.path.isdir(path) for path in glob.glob(f"{glob.escape(incomplete)}*"))


def _check_views(views: int) -> int:
    if views not in (1, 10):
        raise typer.BadParameter("use 1 (center view) or 10 (the paper's ten views)")
    return views


JsonFlag = Annotated[bool, typer.Option("--json", help="Write the result to stdout as JSON", show_default=False)]
QuietFlag = Annotated[
    bool, typer.Option("--quiet", "-q", help="Show only warnings, errors and the result", show_default=False)
]
WeightsOption = Annotated[
    str | None,
    typer.Option(
        "--weights",
        "-w",
        metavar="W",
        help="Weights: a run, a checkpoint folder or a model file [default: newest run]",
        autocompletion=complete_weights,
    ),
]
_PREPARED = "Prepared data set: a folder, or a name under prepared/"
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="D",
        help=f"{_PREPARED} [default: the newest]",
        autocompletion=complete_data,
    ),
]
OwnDataOption = Annotated[  # of commands that take weights
    str | None,
    typer.Option(
        "--data",
        metavar="D",
        help=f"{_PREPARED} [default: the one the weights were trained on, else the newest]",
        autocompletion=complete_data,
    ),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a value of the recipe; `alexnet train --print-config` lists all (repeatable)",
        autocompletion=complete_setting,
    ),
]
ImagesArgument = Annotated[
    list[str],
    typer.Argument(metavar="IMAGE...", help="Images, folders or patterns; @FILE reads paths from a file, - from stdin"),
]
WithoutTowerOption = Annotated[
    int | None,
    typer.Option("--without-tower", metavar="1|2", help="Switch this tower off", show_default=False),
]
BatchOption = Annotated[int | None, typer.Option("--batch-size", "-b", min=1, help="Images per batch")]
GpusOption = Annotated[
    str | None,
    typer.Option(
        "--gpus", metavar="ID", help="GPU to use: its id, all, or none [default: the first GPU, else the CPU]"
    ),
]
DevicesOption = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="IDS",
        help="GPUs to use: 0 (both towers on it), 0,1 (a tower each), 0,1,2,3 (two pairs), all, or none "
        "[default: the first GPU, else the CPU]",
    ),
]
JobsOption = Annotated[
    int | None, typer.Option("--jobs", "-j", min=1, help="Threads that decode images [default: one per core]")
]
ViewsOption = Annotated[
    int,
    typer.Option(
        "--views",
        callback=_check_views,
        help="Views per image: 1 (center) or 10 (corners, center and their mirror images)",
    ),
]
