"""`alexnet train`: train the network of the paper, or one of its variants, on a prepared data set."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alexnet_cli import recipe_io
from alexnet_cli.console import Reporter
from alexnet_cli.errors import VerificationError
from alexnet_cli.options import (
    DataOption,
    DevicesOption,
    JobsOption,
    JsonFlag,
    Parallel,
    Precision,
    QuietFlag,
    SettingsOption,
    complete_recipe,
)
from alexnet_plugins.train_config import show_config
from alexnet_plugins.train_display import heading, show_records, told_once
from alexnet_plugins.train_end import fail, failing, finish
from alexnet_plugins.train_report import leave_report
from alexnet_plugins.train_setup import (
    base_of,
    check,
    check_placement,
    check_steps,
    chosen,
    habits_of,
    opened,
    to_continue,
)

if TYPE_CHECKING:
    from alexnet_cli.core.tensorboard import State
    from alexnet_cli.core.training import Training

Cache = Literal["auto", "device", "none"]
Frozen = Literal["none", "conv"]
NAMES = "paper, krizhevsky, caffe, fast, tiny (for a CPU), or a TOML file. [default: paper, or that of --init-from]"
OWN = "[default: the recipe's]"


def train(
    data: DataOption = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help=NAMES, autocompletion=complete_recipe)] = None,
    settings: SettingsOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help=f"Passes over the training set, at most. {OWN}")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", "-b", min=1, help=f"Images a step, over all devices. {OWN}")
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(min=1, help="Images computed at once, for a small GPU; the batch stays. [default: all of it]"),
    ] = None,
    lr: Annotated[
        float | None, typer.Option(help=f"Learning rate to begin with, or the highest one if one-cycle. {OWN}")
    ] = None,
    gpus: DevicesOption = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="With --gpus none: so many processes, as if each were a device.")
    ] = None,
    parallel: Annotated[
        Parallel,
        typer.Option(help="Several devices: a tower each, images each, or (hybrid) images first and units then."),
    ] = "auto",
    compress: Annotated[
        bool, typer.Option("--compress", help="Send gradients between replicas as bf16.", show_default=False)
    ] = False,
    precision: Annotated[Precision | None, typer.Option(help=f"Arithmetic of the matrix products. {OWN}")] = None,
    seed: Annotated[int | None, typer.Option(help=f"Of initial values, order, crops and dropout. {OWN}")] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            help="A run to go on with, by its own recipe: an option that would change the result is refused with the "
            "difference, and --set forces it. auto: that of --name, or the newest if unfinished, or a new one."
        ),
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
        bool, typer.Option("--tensorboard", help="Write RUN/tensorboard too, also when resumed.", show_default=False)
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show every value and its source, and quit.")
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train the two-tower network on a prepared data set.

    Without options: recipe `paper`, the only prepared data set, the first GPU if there is one. Without a GPU `paper`
    takes hours on a few thousand pictures, and `--recipe tiny` minutes.
    """  # fmt: skip
    from alexnet_cli.core.resume import agreed, asked_to_stop, seconds

    limit, said = seconds(max_time), recipe_io.parse_settings(settings or [])
    if recipe:
        recipe_io.apply_changes(recipe_io.load_recipe(recipe), said)  # what is mistyped is told before torch is loaded

    from alexnet_cli.core import placement as devices
    from alexnet_cli.core.fine_tuning import compare, source
    from alexnet_cli.core.process_group import join_process_group, launcher_pid, mesh_shape, read_rank_info
    from alexnet_cli.core.shards import open_dataset
    from alexnet_cli.core.tensorboard import check_installed, states
    from alexnet_cli.core.training import Training

    options = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "precision": precision, "seed": seed}
    explicit = {key: value for key, value in {**options, "frozen": freeze}.items() if value is not None}
    if tensorboard:
        check_installed()
    if not print_config and (count := devices.processes(gpus, processes)) > 1:
        from alexnet_cli.core.launch import launch

        # what is wrong is wrong before
        tried = recipe_io.apply_changes(recipe_io.load_recipe(recipe or "paper"), {**said, **explicit})
        mesh_shape(count, parallel, tried.towers)
        raise typer.Exit(launch(sys.argv[1:], count))
    with ExitStack() as stack:
        ranks = stack.enter_context(join_process_group(read_rank_info(), devices.backend(gpus)))
        reporter = Reporter("train", json=json, quiet=quiet, speaks=ranks.first)
        run = to_continue(ranks, resume, name)
        first = source(init_from, run)
        base, sources = base_of(recipe, run, first)
        resolved = recipe_io.apply_changes(recipe_io.apply_changes(base, said), explicit)
        if print_config:
            show_config(reporter, resolved, sources | dict.fromkeys(said, "--set") | dict.fromkeys(explicit, "option"))
            return
        if run:
            resolved = agreed(run, resolved, said, vars(base).keys() - said.keys() - explicit.keys() if recipe else ())
        check_steps(run, max_steps)
        path, remark = chosen(data, run)
        dataset = open_dataset(path)
        transfer = compare(init_from, first, resolved, dataset.classes) if first else None
        habits = habits_of(run, {"save_every": save_every, "keep": keep, "micro_batch": micro_batch})
        events = states(run, tensorboard)
        check(resolved, dataset, run)
        stop = stack.enter_context(asked_to_stop(limit, launcher_pid()))
        placed = devices.place_ranks(ranks, gpus, resolved.precision, parallel, resolved.towers)
        check_placement(placed, resolved, len(dataset.split("train")), habits["micro_batch"], compile)
        if run:
            stack.enter_context(run.locked())
        to_say = {**habits, "tensorboard": events[0] and "behind"}  # until what was missed is made up for
        opened_run = opened(run, name, resolved, placed, dataset, transfer, to_say)
        if not run:
            stack.enter_context(opened_run.locked())
        stack.enter_context(failing(reporter, opened_run))
        training = Training(
            resolved, dataset, opened_run, placed, devices.threads_for_decoding(jobs), cache, compile, transfer,
            habits["micro_batch"], habits["keep"] or 1, compress,
        )  # fmt: skip
        heading(reporter, training)
        for note in _notes(training, remark, parallel, micro_batch):
            reporter.line("note", note)
        reason = _run(reporter, training, max_steps, stop, habits["save_every"] or sys.maxsize, events)
        if ranks.first:
            finish(reporter, training, reason)


def _notes(training: Training, remark: str, parallel: str, micro_batch: int | None) -> Iterator[str]:
    """What was chosen without being asked for, and what was asked for and changes nothing."""
    if remark:
        yield remark
    if parallel != "auto" and training.placement.ranks.size == 1:
        yield f"--parallel {parallel} is for several devices, and there is one: --gpus names more"
    if micro_batch and micro_batch > training.share:
        yield f"--micro-batch {micro_batch} changes nothing: a step computes {training.share} images"


def _run(
    reporter: Reporter,
    training: Training,
    max_steps: int | None,
    stop: Callable[[], str | None],
    save_every: int,
    events: tuple[State | None, State | None],
) -> str:
    """Run the loop and show its records. Returns why it ended."""
    from alexnet_cli.core.failure import NONE
    from alexnet_cli.core.records import failure
    from alexnet_cli.core.resume import changes
    from alexnet_cli.core.tensorboard import INSTALL, recorded
    from alexnet_cli.core.train import fit

    start, damaged = _newest(training)
    now, before = events
    if now == "behind":
        reporter.warn("its tensorboard/ stays behind: the package tensorboard is not installed", INSTALL)
    rows, size = training.rows, training.recipe.batch_size
    steps, done = min(training.steps, max_steps or sys.maxsize), int(start.name) if start else 0
    if rows > size and (left_out := rows % size) and done < steps:
        rest = f"{left_out:,} of {rows:,} pictures, others each time, sit out each epoch"
        reporter.line("note", f"{rest}, which has whole batches of {size}")
    if size > rows:
        what, fewer = f"a batch of {size:,} is not to be had from {rows:,} training pictures", max(1, rows // 10)
        reporter.warn(f"{what}: every step takes them all", f"-b {fewer} makes {rows // fewer} steps an epoch")
    for folder in damaged:
        reporter.warn(f"{folder} is damaged: going on from {start}")
    failed, cure = failure(training.run.about)
    if failed and training.recipe == training.run.recipe:
        reporter.warn(f"this run failed before: {failed}", cure)
    changed = changes(training.run, training.recipe, done)
    training.run.update({**NONE, "changed": changed})
    for change in changed:
        since = f"from step {change['step'] + 1:,} on"
        reporter.line("changed", f"{since}: {change['key']} {change['is']} instead of {change['was']}")
    if max_steps and done >= max_steps:
        reporter.line("note", f"--max-steps {max_steps:,} counts from the run's start, and {done:,} are done")
    total = max(0, steps - done) * training.batch
    try:
        with reporter.progress("train", total=total) as bar:
            records = fit(training, start, max_steps, stop=told_once(reporter, stop), save_every=save_every)
            records = recorded(training.run, records, before) if now == "whole" and training.run.writes else records
            reason = show_records(reporter, training, bar, total, records)
    except VerificationError as error:
        fail(reporter, training.run, error)
        if training.run.writes:  # how it came to that is in the curves
            leave_report(reporter, training)
        raise
    if reason != "finished":  # that it is only when all its files are there
        training.run.update({"status": "interrupted", "reason": reason})
    return reason


def _newest(training: Training) -> tuple[Path | None, list[Path]]:
    """The checkpoint to go on from and damaged ones after it, as rank 0 finds them and puts them in order."""
    from alexnet_cli.core.checkpoint import newest

    found = newest(training.run) if training.run.writes else None
    return training.placement.ranks.broadcast(found, "finding the checkpoint") or (None, [])
