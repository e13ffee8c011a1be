"""Set up a training: choose and check recipe, run, data and devices; show --print-config."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_cli import recipe_io
from alexnet_cli.console import Reporter
from alexnet_cli.core.model.architecture import layer_widths
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import (
    CAFFE,
    FAST,
    KRIZHEVSKY,
    PAPER,
    PAPER_TEXT_VALUES,
    TINY,
    Recipe,
    describe_setting,
    format_toml,
)
from alexnet_cli.recipe_io import read_recipe

SHOWN_NAMES = 5  # in a message

if TYPE_CHECKING:
    from alexnet_cli.core.model.model_file import Model
    from alexnet_cli.core.parallel.placement import Placement
    from alexnet_cli.core.parallel.process_group import ProcessMesh
    from alexnet_cli.core.runs.run import Run
    from alexnet_cli.core.training.loop import TrainingLoop


LINEAGE = {  # named recipe -> (source of a change, recipe with it, recipe without it), latest change first
    "krizhevsky": (("code", KRIZHEVSKY, PAPER),),
    "caffe": (("Caffe", CAFFE, PAPER),),
    "fast": (("fast", FAST, PAPER),),
    "tiny": (("tiny", TINY, FAST), ("fast", FAST, PAPER)),
}
LEGEND = """\
value    in TOML, as in a recipe file; to change one: --set KEY=VALUE (without quotes)
from     paper, code (the authors' code), Caffe, recipe fast or tiny, --set, option, or a file, run or weights
section  of the paper; code: only the authors' code has the value
-        no source: the paper has no such value"""


def load_base_recipe(name: str | None, run: Run | None, initial: Model | None) -> tuple[Recipe, dict[str, str]]:
    """The recipe before --set and options, and the source of each of its values."""
    if name is None and run:
        return run.recipe, dict.fromkeys(vars(run.recipe), run.path.name)
    if name is None and initial:
        recipe = recipe_io.apply_changes(initial.recipe, {"frozen": "none"})
        return recipe, dict.fromkeys(vars(recipe), "weights")
    return recipe_io.load_recipe(name or "paper"), find_sources(name or "paper")


def merge_saved_options(run: Run | None, typed: dict[str, Any]) -> dict[str, Any]:
    """Options that a run remembers, such as --save-every. Those `typed` now override the saved ones."""
    saved = run.about if run else {}
    return {key: saved.get(key) if value is None else value for key, value in typed.items()}


def find_run(ranks: ProcessMesh, resume: str | None, name: str | None) -> Run | None:
    """The run to resume, or None to start a new one. Rank 0 decides: other ranks might find the run it creates."""
    from alexnet_cli.core.runs.run import Run
    from alexnet_cli.core.training.resume import find_run_to_resume

    run = find_run_to_resume(resume, name) if ranks.is_main else None
    path = ranks.broadcast(str(run.path) if run else None, "finding the run")
    return Run(Path(path), writes=ranks.is_main) if path else None


def choose_data(data: str | None, run: Run | None) -> tuple[Path, str]:
    """The prepared data set to train on, and a note if there are several and none was named."""
    from alexnet_cli.core.data.shards import find_dataset, list_datasets
    from alexnet_cli.core.runs.resolve import find_recorded_data

    recorded = (find_recorded_data(run) or run.about.get("data_path")) if run else None
    spec = data or (str(recorded) if recorded else None)
    path = find_dataset(spec)
    others = [name for name in list_datasets() if name != path.name]
    if spec or os.environ.get("ALEXNET_DATA") or not others:
        return path, ""
    listed = f"{', '.join(others[:SHOWN_NAMES])}{' …' if len(others) > SHOWN_NAMES else ''}"
    return path, f"{path} is the newest prepared data set; --data selects another: {listed}"


def check_max_steps(run: Run, max_steps: int | None) -> None:
    """Raise UsageError if a run has already done more steps than --max-steps."""
    from alexnet_cli.core.training.checkpoint import find_step_beyond

    if max_steps and (done := find_step_beyond(run, max_steps)):
        what = f"--max-steps {max_steps:,} counts from the start of the run, and {run.name} has done {done:,} steps"
        raise UsageError(what, f"to train {max_steps:,} more: --max-steps {done + max_steps}")


def find_start(loop: TrainingLoop) -> tuple[Path | None, list[Path]]:
    """The checkpoint to continue from, and damaged newer ones. Rank 0 looks, and repairs what a crash left."""
    from alexnet_cli.core.training.checkpoint import find_newest

    newest = find_newest(loop.run) if loop.run.writes else None
    return loop.trainer.placement.ranks.broadcast(newest, "finding the checkpoint") or (None, [])


def check_placement(placement: Placement, recipe: Recipe, rows: int, micro_batch: int | None, compile: bool) -> None:
    """Raise UsageError for options that do not work on these devices."""
    ranks, batch = placement.ranks, min(recipe.batch_size, rows)
    if ranks.size > 1 and compile:
        raise UsageError("--compile works on one device only", "remove it, or train on one device")
    if batch < ranks.replicas:
        raise UsageError(f"a batch of {batch} images cannot be split over {ranks.replicas} replicas", "increase -b")
    if ranks.columns and micro_batch:
        raise UsageError("--micro-batch does not work with --parallel hybrid", "remove it, or use --parallel data")
    units = recipe.towers * layer_widths(recipe)["fc6"]
    if ranks.columns and units % ranks.size:
        raise UsageError(
            f"the {units:,} units of fc6 cannot be split evenly over {ranks.size} devices",
            "use another number of devices",
        )
    if ranks.columns and ranks.size % recipe.towers and not {"fc6", "fc7"} <= set(recipe.cross_talk):
        what = f"{ranks.size} devices cannot hold whole towers of fc6 and fc7 without cross-talk"
        raise UsageError(what, "use an even number of devices, or --parallel data")


def find_sources(name_or_file: str) -> dict[str, str]:
    """The source of each recipe value: the file that sets it, or the recipe, code or paper that introduced it."""
    base, values = read_recipe(name_or_file)
    return {key: _find_source(key, base) for key in vars(base)} | dict.fromkeys(values, name_or_file)


def _find_source(key: str, named: Recipe) -> str:
    if (named.name, key) == ("caffe", "epochs"):  # 450,000 steps of 256 images happen to be the paper's 90 epochs
        return "Caffe"
    for source, recipe, before in LINEAGE.get(named.name, ()):
        if getattr(recipe, key) != getattr(before, key):
            return source
    source = describe_setting(key)[1]
    return "paper" if source[0].isdigit() else source


def show_config(reporter: Reporter, recipe: Recipe, sources: Mapping[str, str]) -> None:
    """Show every recipe value and its source; values that differ from the paper come last, with the paper's."""
    paper = asdict(PAPER) | PAPER_TEXT_VALUES
    rows: list[dict[str, Any]] = []
    for key, value in asdict(recipe).items():
        about, section = describe_setting(key)
        row = {"value": value, "from": sources[key], "paper": paper[key], "section": section, "meaning": about}
        rows.append({"key": key, **row})
    reporter.result({"event": "config", "values": rows})
    changed = [row for row in rows if row["value"] != row["paper"]]
    columns = ["value", "from", "section", "meaning"]
    _show_table(
        reporter,
        f"recipe {recipe.name}: equal to the paper's",
        columns,
        [row for row in rows if row not in changed],
    )
    if changed:
        _show_table(
            reporter, f"recipe {recipe.name}: different from the paper", ["value", "paper", *columns[1:]], changed
        )
    reporter.show(LEGEND)


def _show_table(reporter: Reporter, title: str, columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("key", no_wrap=True)
    for column in columns:
        table.add_column(column)
    for row in rows:
        cells = (format_toml(row[column]) if column in {"value", "paper"} else row[column] for column in columns)
        table.add_row(row["key"], *(Text(text) for text in cells))
    reporter.show(table)
    reporter.show("")
