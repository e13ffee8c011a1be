"""How `alexnet train` begins: which run, on which devices, from what."""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alexnet_cli import __version__, recipe_io
from alexnet_cli.core.architecture import layer_widths
from alexnet_cli.errors import DataError, UsageError
from alexnet_cli.recipe import Recipe
from alexnet_plugins.train_config import origins

SHOWN = 5  # names in a message

if TYPE_CHECKING:
    from alexnet_cli.core.fine_tuning import Transfer
    from alexnet_cli.core.placement import Placement
    from alexnet_cli.core.process_group import ProcessMesh
    from alexnet_cli.core.runs import Run
    from alexnet_cli.core.shards import Dataset
    from alexnet_cli.core.weights import Model


def base_of(name: str | None, run: Run | None, first: Model | None) -> tuple[Recipe, dict[str, str]]:
    """The recipe that --set and options change, and where each of its values is from."""
    if name is None and run:
        return run.recipe, dict.fromkeys(vars(run.recipe), run.path.name)
    if name is None and first:
        return recipe_io.apply_changes(first.recipe, {"frozen": "none"}), dict.fromkeys(vars(first.recipe), "weights")
    return recipe_io.load_recipe(name or "paper"), origins(name or "paper")


def habits_of(run: Run | None, typed: dict[str, int | None]) -> dict[str, int | None]:
    """What a run keeps to until it is told otherwise: how often it saves, and the like."""
    known = run.about if run else {}
    return {key: known.get(key) if value is None else value for key, value in typed.items()}


def to_continue(ranks: ProcessMesh, resume: str | None, name: str | None) -> Run | None:
    """The run to go on with, or None to start one. Rank 0 decides: it may be about to make what others would find."""
    from alexnet_cli.core import resume as resuming
    from alexnet_cli.core.runs import Run

    run = resuming.to_continue(resume, name) if ranks.first else None
    path = ranks.broadcast(str(run.path) if run else None, "finding the run")
    return Run(Path(path), writes=ranks.first) if path else None


def chosen(data: str | None, run: Run | None) -> tuple[Path, str]:
    """The prepared set to train on, and, where it is one of several and nobody named it, how to choose another."""
    from alexnet_cli.core.shards import find_dataset, names

    spec = data or (run.about.get("data_path") if run else None)
    path = find_dataset(spec)
    others = [name for name in names() if name != path.name]
    if spec or os.environ.get("ALEXNET_DATA") or not others:
        return path, ""
    listed = f"{', '.join(others[:SHOWN])}{' …' if len(others) > SHOWN else ''}"
    return path, f"{path} is the set prepared last; --data chooses another: {listed}"


def check_steps(run: Run | None, max_steps: int | None) -> None:
    """Raise UsageError where a run goes on from more steps already than it is to have."""
    from alexnet_cli.core.checkpoint import step_beyond

    if run and max_steps and (done := step_beyond(run, max_steps)):
        what = f"--max-steps {max_steps:,} counts from the run's start, and {run.name} has done {done:,}"
        raise UsageError(
            what, f"--max-steps {done + max_steps} does {max_steps:,} more; without it, the run goes to its end"
        )


def check(recipe: Recipe, data: Dataset, run: Run | None) -> None:
    """Raise DataError for data that cannot be trained on, before there is a run."""
    if run and run.about.get("data_hash") != data.hash:
        raise DataError(f"run {run.path.name} was trained on other data than {data.path}", "name its own with --data")
    for split in ("train", "val"):
        if not len(data.split(split)):
            most = max(Counter(data.split("train").labels.tolist()).values(), default=0)
            again = f"prepare it anew, with --overwrite{' --val-fraction 0.1' if most > 1 else ''}"
            few = "" if most > 1 else "each class needs at least two pictures, one of them to be kept for validation: "
            raise DataError(f"{data.path}: split {split} holds no images", few + again)
    data.mean_image()  # raises where it is damaged


def check_placement(placement: Placement, recipe: Recipe, rows: int, micro_batch: int | None, compile: bool) -> None:
    """Raise UsageError for what several devices cannot do."""
    ranks, batch = placement.ranks, min(recipe.batch_size, rows)
    if ranks.size > 1 and compile:
        raise UsageError("--compile makes code for one device", "leave it out, or train on one")
    if batch < ranks.replicas:
        raise UsageError(f"a batch of {batch} is not to be had from {ranks.replicas} replicas", "-b takes more")
    if ranks.columns and micro_batch:
        raise UsageError("--parallel hybrid computes whole batches", "leave --micro-batch out, or use --parallel data")
    units = recipe.towers * layer_widths(recipe)["fc6"]
    if ranks.columns and units % ranks.size:
        raise UsageError(f"{units:,} units of layer 6 do not divide by {ranks.size}", "use another number of devices")


def opened(
    run: Run | None,
    name: str | None,
    recipe: Recipe,
    placement: Placement,
    data: Dataset,
    transfer: Transfer | None,
    habits: dict[str, Any],
) -> Run:
    """The run, made by rank 0 unless it is there, and saying how it is trained now."""
    from alexnet_cli.core.runs import Run

    about, ranks = _about(placement, data, recipe), placement.ranks
    if run:
        run.update({"resumed": [*run.about.get("resumed", []), about], **habits})
        return run
    origin = {"init_from": transfer.about()} if transfer else {}
    made = Run.create(name, recipe, about | origin | habits) if ranks.first else None
    return Run(Path(ranks.broadcast(str(made.path) if made else "", "making the run")), writes=ranks.first)


def _about(placement: Placement, data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """What run.json says beside the status."""
    packages = ("torch", "torchvision", "numpy", "simplejpeg")
    versions = {"alexnet": __version__, "python": sys.version.split()[0]}
    return {
        "command": ["alexnet", *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions | {name: version(name) for name in packages},
        "devices": list(placement.names) or [placement.name],
        "precision": placement.precision,
        "placement": {f"tower {i + 1}": ", ".join(placement.of_tower(i)) for i in range(recipe.towers)},
        "replicas": placement.ranks.replicas,
        "data": data.name,
        "data_path": str(data.path.resolve()),
        "data_hash": data.hash,
        "seed": recipe.seed,
    }
