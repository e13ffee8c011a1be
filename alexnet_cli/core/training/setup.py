"""Set up a training: check data and devices, create or continue its run, find the checkpoint to start from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.model.architecture import layer_widths
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training.checkpoint import find_newest, find_step_beyond
from alexnet_cli.core.training.fine_tuning import Transfer
from alexnet_cli.core.training.loop import TrainingLoop, describe_training
from alexnet_cli.errors import DataError, UsageError
from alexnet_cli.recipe import Recipe


def check_max_steps(run: Run, max_steps: int | None) -> None:
    """Raise UsageError if a run has already done more steps than --max-steps."""
    if max_steps and (done := find_step_beyond(run, max_steps)):
        what = f"--max-steps {max_steps:,} counts from the start of the run, and {run.name} has done {done:,} steps"
        raise UsageError(what, f"to train {max_steps:,} more: --max-steps {done + max_steps}")


def check_data(data: Dataset, run: Run | None) -> None:
    """Raise DataError if the data cannot be trained on, before a run is created."""
    if run and run.about.get("data_hash") != data.hash:
        own_data = f"its data set was {run.about.get('data_path')}"
        raise DataError(
            f"run {run.path.name} was not trained on {data.path}", f"{own_data}; give that, or start a new run"
        )
    for split in ("train", "val"):
        if not len(data.split(split)):
            hint = "prepare it again with --overwrite --val-fraction 0.1"
            if max(Counter(data.split("train").labels.tolist()).values(), default=0) < 2:
                hint = "prepare it again with --overwrite and at least two images per class, one for validation"
            raise DataError(f"{data.path}: split {split} has no images", hint)
    data.mean_image()  # raises DataError if it is damaged


def find_start(loop: TrainingLoop) -> tuple[Path | None, list[Path]]:
    """The checkpoint to continue from, and damaged newer ones. Rank 0 looks, and repairs what a crash left."""
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


def open_run(
    run: Run | None,
    name: str | None,
    recipe: Recipe,
    placement: Placement,
    data: Dataset,
    transfer: Transfer | None,
    saved_options: dict[str, Any],
    command: Sequence[str],
) -> Run:
    """The resumed run, or a new one created by rank 0. Writes the description of this training to run.json."""
    about, ranks = describe_training(command, placement, data, recipe), placement.ranks
    if run:
        run.update({"resumed": [*run.about.get("resumed", []), about], **saved_options})
        return run
    origin = {"init_from": transfer.about()} if transfer else {}
    created = Run.create(name, recipe, about | origin | saved_options) if ranks.is_main else None
    return Run(Path(ranks.broadcast(str(created.path) if created else "", "creating the run")), writes=ranks.is_main)
