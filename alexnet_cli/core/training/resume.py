"""Resuming a run: find it, check the recipe against its own, and list the changes. No torch."""

from __future__ import annotations

import shlex
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

from alexnet_cli.core.model.architecture import SHAPE_KEYS
from alexnet_cli.core.runs.records import epochs_begun
from alexnet_cli.core.runs.resolve import find_run_folder
from alexnet_cli.core.runs.run import Run, runs_root
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import Recipe, compare_recipes, format_set_option, format_toml


def find_run_to_resume(resume: str | None, name: str | None) -> Run | None:
    """The run to resume, or None to start a new one.

    `resume` is a run or "auto": the run `name` if that is given, otherwise the newest one unless it has finished.
    """
    if resume is None:
        return None
    if resume != "auto":
        run = _open_run(resume)
        if name not in (None, run.path.name):
            raise UsageError(f"--resume {resume} and --name {name} are different runs", f"remove --name {name}")
        return _check_trained(run)
    try:
        run = Run.open(name or "latest")
    except UsageError:
        return None
    return _check_trained(run) if name or run.about.get("status") != "finished" else None


def _open_run(spec: str) -> Run:
    """The run of that name or path. Raises UsageError, which explains a checkpoint or weights file in its place."""
    try:
        return Run.open(spec)
    except UsageError as error:
        for path in (runs_root() / spec, Path(spec)):
            if folder := find_run_folder(path):
                what = f"{spec} belongs to run {Run(folder).name}, and --resume takes a run"
                raise UsageError(what, f"did you mean --resume {Run(folder).quoted}?") from error
        if Path(spec).suffix == ".safetensors":
            what = f"{spec} is a file of weights, and --resume continues a run"
            raise UsageError(what, f"to start from these weights: --init-from {shlex.quote(spec)}") from error
        raise


def _check_trained(run: Run) -> Run:
    """The run. Raises UsageError if its weights were imported: then there is no training to resume."""
    if "imported" in run.about:
        name = run.path.name
        raise UsageError(f"{name} was imported, not trained", f"start from its weights: --init-from {run.quoted}")
    return run


def check_recipe(run: Run, wanted: Recipe, forced: Collection[str], from_file: Collection[str] = ()) -> Recipe:
    """The recipe to resume with. It may have more epochs than the run's recipe, and other values of `forced` keys.

    `from_file` are the keys whose values came from --recipe; if one is refused, the hint is to remove that option.

    Raises:
        UsageError: another key differs and would change the result.
    """
    saved, name = run.recipe, run.path.name
    differences = compare_recipes(wanted, saved)

    def remove_option(*keys: str) -> str:
        return f"remove --recipe ({name} has its own)" if set(keys) & set(from_file) else "remove it"

    for key in (key for key in SHAPE_KEYS if key in differences):
        here, there = map(format_toml, differences[key])
        what = f"{key} = {here} makes another network than that of run {name} ({key} = {there})"
        raise UsageError(what, f"{remove_option(key)}, or start a new run")
    if "batch_size" in differences:
        here, there = differences["batch_size"]
        what = f"batch_size = {here}, but run {name} counts its steps in batches of {there}"
        raise UsageError(what, f"{remove_option('batch_size')}, or start a new run: --init-from {run.quoted}")
    # In a one-cycle schedule, another number of epochs changes every learning rate.
    planned = wanted.schedule == saved.schedule == "one-cycle"
    refused = [key for key in differences if key not in forced and (planned or key != "epochs")]
    listed = ", ".join(
        f"{key} = {here} instead of {there}" for key, (here, there) in differences.items() if key in refused[:4]
    )
    if len(refused) > 1:
        more = f", and {len(refused) - 4} more" if len(refused) > 4 else ""
        what = f"the recipe differs from that of run {name}: {listed}{more}"
        raise UsageError(what, f"{remove_option(*refused)}; to change a value from here on: --set KEY=VALUE")
    begun = epochs_begun(run.records())
    if wanted.epochs < begun:
        least = format_set_option("epochs", begun) if planned else f"--epochs {begun}"
        raise UsageError(f"epochs = {wanted.epochs}, but run {name} has begun epoch {begun}", f"{least} or more")
    if refused == ["epochs"]:
        what = f"the one-cycle schedule of run {name} is planned for {saved.epochs} epochs, not {wanted.epochs}"
        force = f"force it (this changes every later learning rate): --set epochs={wanted.epochs}"
        raise UsageError(what, f"{remove_option('epochs')}, or {force}")
    if refused:
        force = f"force it: {format_set_option(refused[0], getattr(wanted, refused[0]))}"
        raise UsageError(
            f"the recipe differs from that of run {name}: {listed}", f"{remove_option(*refused)}, or {force}"
        )
    return wanted


def list_changes(run: Run, recipe: Recipe, step: int) -> list[dict[str, Any]]:
    """The recipe changes in run.json up to `step`, and those that `recipe` makes there: the new value of "changed".

    Each change has the `step` after which it holds, the `key`, and the values before (`was`) and after (`is`). A
    recorded change at `step` or later holds for no step that is left, so the weights were trained with its `was`.
    """
    if not step:
        return []
    recorded = run.about.get("changed")
    known = [c for c in recorded if _is_change(c)] if isinstance(recorded, list) else []
    before = {key: _to_json(value) for key, value in vars(run.recipe).items()}
    before |= {c["key"]: c["was"] for c in reversed(known) if c["step"] >= step}
    after = {key: _to_json(value) for key, value in vars(recipe).items()}
    made = [{"step": step, "key": k, "was": was, "is": after[k]} for k, was in before.items() if was != after[k]]
    return [c for c in known if c["step"] < step] + made


def _is_change(value: Any) -> bool:
    """Whether a value from run.json is a change as `list_changes` returns them."""
    return (
        isinstance(value, dict) and set(value) == {"step", "key", "was", "is"}
        and type(value["step"]) is int and value["key"] in {field.name for field in fields(Recipe)}
    )  # fmt: skip


def _to_json(value: Any) -> Any:
    """The value as it is after writing and reading JSON."""
    return list(value) if isinstance(value, tuple) else value
