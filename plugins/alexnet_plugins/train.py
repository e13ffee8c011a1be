"""`alexnet train`: train the network of the paper, or one of its variants, on a prepared data set."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alexnet_cli import __version__
from alexnet_cli import recipe as recipes
from alexnet_cli.console import Reporter
from alexnet_cli.errors import AlexNetError, DataError, Stopped, StorageError
from alexnet_cli.options import BatchOption, DataOption, GpusOption, JobsOption, JsonFlag, Precision, QuietFlag
from alexnet_cli.recipe import Recipe
from alexnet_plugins.train_display import heading, show_config, show_records

if TYPE_CHECKING:
    from alexnet_cli.core.fine_tuning import Transfer
    from alexnet_cli.core.placement import Placement
    from alexnet_cli.core.runs import Run
    from alexnet_cli.core.shards import Dataset
    from alexnet_cli.core.training import Training
    from alexnet_cli.core.weights import Model

Cache = Literal["auto", "device", "none"]
Frozen = Literal["none", "conv"]
NAMES = "paper, krizhevsky, caffe, fast, tiny, or a TOML file. [default: paper, or that of --init-from]"


def train(
    data: DataOption = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help=NAMES)] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Change one value: key=value. Repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training set, at most.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    batch_size: BatchOption = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images computed at once, for a small GPU; the batch stays. [default: all of it]"),
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Initial learning rate.")] = None,
    gpus: GpusOption = None,
    precision: Annotated[Precision | None, typer.Option(help="Arithmetic of the matrix products.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial values, order, crops and dropout.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(help="A run to go on with; auto: that of --name, or the newest if unfinished, or a new one."),
    ] = None,
    init_from: Annotated[
        str | None,
        typer.Option(metavar="W", help="Start from these weights (as -w takes them); what does not fit starts afresh."),
    ] = None,
    freeze: Annotated[Frozen | None, typer.Option(help="Layers that keep their values: conv is 1 to 5.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run. [default: date, time and recipe]")] = None,
    max_time: Annotated[str | None, typer.Option(help="Save and stop after so long, such as 8h or 1h30m.")] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, metavar="STEPS", help="Save so often too, not only after each epoch.")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(min=1, help="Newest checkpoints to keep, beside the best. [default: 1]")
    ] = None,
    jobs: JobsOption = None,
    cache: Annotated[
        Cache, typer.Option(help="Keep the decoded pictures: on the device, nowhere, or there if they easily fit.")
    ] = "auto",
    compile: Annotated[
        bool, typer.Option("--compile/--no-compile", help="Have torch.compile make code for the network first.")
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write RUN/tensorboard too.", show_default=False)
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every value and its source, and quit.")
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train the two-tower network on a prepared data set.

    Without options: recipe `paper`, the only prepared data set, the first GPU if there is one.
    """  # fmt: skip
    from alexnet_cli.core.fine_tuning import compare, source
    from alexnet_cli.core.resume import agreed, asked_to_stop, seconds, to_continue
    from alexnet_cli.core.shards import find_dataset, open_dataset
    from alexnet_cli.core.tensorboard import check_installed

    reporter = Reporter("train", json=json, quiet=quiet)
    limit, run = seconds(max_time), to_continue(resume, name)
    first = source(init_from, run)
    options = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "precision": precision, "seed": seed}
    explicit = {key: value for key, value in {**options, "frozen": freeze}.items() if value is not None}
    said = recipes.parsed(settings or [])
    base, base_name = _base(recipe, run, first)
    resolved = recipes.changed(recipes.changed(base, said), explicit)
    if print_config:
        sources = recipes.listed(recipe) | dict.fromkeys(said, "--set") | dict.fromkeys(explicit, "option")
        show_config(reporter, resolved, sources, base_name)
        return
    if run:
        resolved = agreed(run, resolved, said)
    dataset = open_dataset(find_dataset(data or (run.about.get("data_path") if run else None)))
    transfer = compare(init_from, first, resolved, dataset.classes) if first else None
    habits = _habits(run, {"save_every": save_every, "keep": keep, "micro_batch": micro_batch})
    if tensorboard:
        check_installed()
    with ExitStack() as stack:
        stop = stack.enter_context(asked_to_stop(limit))
        if run:
            stack.enter_context(run.locked())
        training = _begin(reporter, resolved, dataset, gpus, jobs, cache, compile, run, name, transfer, habits)
        if not run:
            stack.enter_context(training.run.locked())
        reason = _run(reporter, training, max_steps, stop, habits["save_every"] or sys.maxsize, tensorboard)
        _finish(reporter, training, reason)


def _begin(
    reporter: Reporter,
    recipe: Recipe,
    data: Dataset,
    gpus: str | None,
    jobs: int | None,
    cache: Cache,
    compile: bool,
    run: Run | None,
    name: str | None,
    transfer: Transfer | None,
    habits: dict[str, int | None],
) -> Training:
    """Place the network, make the run directory unless there is one, and say what is about to happen."""  # fmt: skip
    from alexnet_cli.core.placement import place, threads_for_decoding
    from alexnet_cli.core.runs import Run
    from alexnet_cli.core.training import Training

    if run and run.about.get("data_hash") != data.hash:
        raise DataError(f"run {run.path.name} was trained on other data than {data.path}", "name its own with --data")
    for split in ("train", "val"):
        if not len(data.split(split)):
            raise DataError(f"{data.path}: split {split} holds no images", "prepare it anew with --val-fraction 0.1")
    placement = place(gpus, recipe.precision)
    about = _about(placement, data, recipe)
    data.mean_image()  # raises where it is damaged, before there is a run
    if run:
        run.update({"resumed": [*run.about.get("resumed", []), about], **habits})
    else:
        run = Run.create(name, recipe, about | ({"init_from": transfer.about()} if transfer else {}) | habits)
    micro_batch, keep, decoders = habits["micro_batch"], habits["keep"] or 1, threads_for_decoding(jobs)
    training = Training(recipe, data, run, placement, decoders, cache, compile, transfer, micro_batch, keep)
    heading(reporter, training)
    return training


def _base(name: str | None, run: Run | None, first: Model | None) -> tuple[Recipe, str]:
    """The recipe that --set and options change, and where it is from: a run's own, the weights', or a named one."""
    if name is None and run:
        return run.recipe, run.path.name
    if name is None and first:
        return recipes.changed(first.recipe, {"frozen": "none"}), "weights"
    recipe = recipes.load(name or "paper")
    return recipe, recipe.name


def _habits(run: Run | None, typed: dict[str, int | None]) -> dict[str, int | None]:
    """What a run keeps to until it is told otherwise: how often it saves, and the like."""
    known = run.about if run else {}
    return {key: known.get(key) if value is None else value for key, value in typed.items()}


def _about(placement: Placement, data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """What run.json says beside the status."""
    packages = ("torch", "torchvision", "numpy", "simplejpeg")
    versions = {"alexnet": __version__, "python": sys.version.split()[0]}
    return {
        "command": ["alexnet", *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": versions | {name: version(name) for name in packages},
        "devices": [placement.name],
        "precision": placement.precision,
        "placement": {f"tower {i + 1}": placement.name for i in range(recipe.towers)},
        "data": data.name,
        "data_path": str(data.path.resolve()),
        "data_hash": data.hash,
        "seed": recipe.seed,
    }


def _run(
    reporter: Reporter,
    training: Training,
    max_steps: int | None,
    stop: Callable[[], str | None],
    save_every: int,
    tensorboard: bool,
) -> str:
    """Run the loop and show its records. Returns why it ended."""
    from alexnet_cli.core.checkpoint import newest
    from alexnet_cli.core.tensorboard import recorded
    from alexnet_cli.core.train import fit

    start, damaged = newest(training.run)
    rows, size = training.rows, training.recipe.batch_size
    if rows > size and (left_out := rows % size) > rows // 10:
        reporter.line(
            "note", f"{left_out:,} of {rows:,} pictures sit out each epoch, which has whole batches of {size}"
        )
    if size > rows:
        what = f"a batch of {size:,} is not to be had from {rows:,} training pictures: every step takes them all"
        reporter.warn(what, f"-b {max(1, rows // 10)} makes ten steps an epoch or more")
    for folder in damaged:
        reporter.warn(f"{folder} is damaged: going on from {start}")
    training.run.update({"status": "running"})
    steps = min(training.steps, max_steps or sys.maxsize)
    total = max(0, steps - (int(start.name) if start else 0)) * training.batch
    try:
        with reporter.progress("train", total=total) as bar:
            records = fit(training, start, max_steps, stop=stop, save_every=save_every)
            records = recorded(training.run, records) if tensorboard else records
            reason = show_records(reporter, training, bar, total, records)
    except BaseException:
        with suppress(StorageError):  # what stopped us is what the user needs to know
            training.run.update({"status": "failed", "reason": "error"})
        raise
    if reason != "finished":  # that it is only when all its files are there
        training.run.update({"status": "interrupted", "reason": reason})
    return reason


def _finish(reporter: Reporter, training: Training, reason: str) -> None:
    """Stopped: say how to go on. Otherwise write alexnet.onnx of the best checkpoint, so that predict starts fast."""
    from alexnet_cli.core import weights
    from alexnet_cli.core.export import crops_of, export
    from alexnet_cli.core.resume import EXIT_CODES
    from alexnet_cli.core.runs import ONNX, find_weights

    run = training.run
    if reason in EXIT_CODES:
        saved = f"checkpoint saved in {run.path}" if (run.checkpoints / "last").exists() else "nothing to save yet"
        what = f"stopped ({reason}) at step {training.step:,}, epoch {training.epoch}: {saved}"
        raise Stopped(what, f"alexnet train --resume {run.path.name}", EXIT_CODES[reason])
    try:
        model = weights.read(find_weights(str(run.path)))
        checked = export(model, run.path / ONNX, crops_of(training.data, model))
        reporter.line("saved", f"{run.path / ONNX} · differs from PyTorch by {checked.max_abs_difference:.1e} at most")
    except StorageError as error:
        raise StorageError(error.what, f"free some space, then: alexnet export -w {run.path.name}") from error
    except AlexNetError as error:
        reporter.warn(f"no {ONNX} was written: {error.what}", error.hint)
    if reason == "finished":
        run.update({"status": "finished", "reason": reason})
    if reason == "max-steps":
        reporter.line(
            "stopped", f"after --max-steps, at step {training.step:,}; alexnet train --resume {run.path.name}"
        )
    if training.schedule.over:
        reporter.line("ended", "the validation error has stopped falling, after the last drop of the rate too")
    best = training.schedule.best_error
    reached = f" · lowest top-1 error {best:.1%}" if best <= 1 else ""
    reporter.line("done", f"{run.path}{reached}   next: alexnet evaluate")
