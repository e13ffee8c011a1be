"""The output of `alexnet train`: heading, notes and warnings, progress, errors, and the files written at the end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_cli import recipe as recipes
from alexnet_cli.console import Progress, Reporter, format_duration
from alexnet_cli.errors import AlexNetError, Stopped, StorageError, VerificationError, WeightsError
from alexnet_cli.recipe import Recipe

if TYPE_CHECKING:
    from alexnet_cli.core.parallel.placement import Placement
    from alexnet_cli.core.runs.records import Record
    from alexnet_cli.core.runs.run import Run
    from alexnet_cli.core.training.fine_tuning import Transfer
    from alexnet_cli.core.training.loop import TrainingLoop
    from alexnet_cli.core.training.trainer import Trainer

HOUR = 3600  # seconds
IN_HEADING = {"name", "batch_size", "learning_rate", "schedule", "epochs", "seed", "frozen", "precision"}


def show_heading(reporter: Reporter, loop: TrainingLoop) -> None:
    """Show the run, data, network, devices and recipe."""
    from alexnet_cli.core.model.architecture import layer_specs

    trainer, data = loop.trainer, loop.data
    recipe, placement = trainer.recipe, trainer.placement
    for note in placement.notes:
        reporter.line("note", note)
    if trainer.compiled:
        reporter.line("note", "torch.compile compiles the network in the first step, which takes a while")
    count = sum(spec.parameters for spec in layer_specs(recipe, len(data.classes)))
    where = placement.name if placement.ranks.size == 1 else f"{placement.ranks.size} processes"
    towers = "2 towers" if recipe.towers == 2 else "1 tower"
    splits = " · ".join(f"{split} {len(data.split(split)):,}" for split in ("train", "val"))
    reporter.line("run", str(loop.run.path))
    reporter.line("data", f"{data.path} · {len(data.classes):,} classes · {splits}")
    reporter.line("model", f"AlexNet · {towers} · {count:,} parameters · {where} · {placement.precision}")
    if placement.ranks.size > 1:
        reporter.line("devices", _describe_placement(placement, recipe.towers))
    if loop.transfer:
        _show_transfer(reporter, loop.transfer)
    parts = [recipe.name, f"batch {recipe.batch_size}", f"lr {recipe.learning_rate:g}", recipe.schedule]
    parts += [f"{recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'}", f"seed {recipe.seed}"]
    if trainer.micro_batch < trainer.rank_images:
        parts.append(f"micro-batch {trainer.micro_batch}")
    if recipe.frozen == "conv":
        parts.append("conv1 to conv5 frozen")
    reporter.line("recipe", " · ".join(parts))
    if changes := _describe_changes(recipe):
        reporter.line("changed", changes)


def _describe_changes(recipe: Recipe) -> str:
    """The values that differ from the closest named recipe, without those that the heading shows anyway."""
    named = recipes.find_closest_recipe(recipe)
    changes = [
        f"{key} {value} instead of {other}"
        for key, (value, other) in recipes.compare_recipes(recipe, named).items()
        if key not in IN_HEADING
    ]
    if changes and recipe.name != named.name:
        changes.append(f"otherwise as recipe {named.name}")
    return " · ".join(changes)


def _describe_placement(placement: Placement, towers: int) -> str:
    """The devices of each tower, the number of replicas, and whether the FC layers are split."""
    ranks = placement.ranks
    parts = [f"tower {tower + 1} → {', '.join(placement.tower_devices(tower))}" for tower in range(towers)]
    if ranks.towers is None:
        parts = [f"{'both towers' if towers == 2 else 'the tower'} → {', '.join(placement.tower_devices(0))}"]
    if ranks.replicas > 1:
        parts.append(f"{ranks.replicas} replicas share each batch")
    if ranks.columns:
        parts.append(f"fc6 to fc8 split into {ranks.columns.total}")
    return " · ".join(parts)


def _show_transfer(reporter: Reporter, transfer: Transfer) -> None:
    """Show which layers were loaded, and why the others start from random weights."""
    from alexnet_cli.core.runs.resolve import describe_weights

    reporter.line("weights", describe_weights(transfer.model.path, transfer.model.info))
    reporter.line("loaded", ", ".join(transfer.loaded))
    for layer, reason in transfer.initialized.items():
        reporter.line("random", f"{layer}: {reason}")


def show_unused_options(reporter: Reporter, trainer: Trainer, parallel: str, micro_batch: int | None) -> None:
    """Show a note for each option that has no effect on these devices."""
    if parallel != "auto" and trainer.placement.ranks.size == 1:
        reporter.line("note", f"--parallel {parallel} has no effect on one device; give several with --gpus")
    if micro_batch and micro_batch > trainer.rank_images:
        images = trainer.rank_images
        reporter.line("note", f"--micro-batch {micro_batch} has no effect: each step computes only {images} images")


def show_start(
    reporter: Reporter, loop: TrainingLoop, start: Path | None, damaged: list[Path], max_steps: int | None
) -> None:
    """Show notes and warnings before the first step, and record recipe changes in run.json."""
    from alexnet_cli.core.runs.records import get_failure
    from alexnet_cli.core.runs.run import RUNNING
    from alexnet_cli.core.training.resume import list_changes

    trainer, run = loop.trainer, loop.run
    images, size = trainer.train_images, trainer.recipe.batch_size
    done, last = int(start.name) if start else 0, min(trainer.total_steps, max_steps or sys.maxsize)
    if images > size and (skipped := images % size) and done < last:
        skips = f"each epoch skips {skipped:,} of {images:,} images (a different {skipped:,} each time)"
        reporter.line("note", f"{skips}, so that every batch has {size}")
    for folder in damaged:
        reporter.warn(f"checkpoint {folder} is damaged; training continues from {start}")
    error, hint = get_failure(run.about)
    if error and trainer.recipe == run.recipe:
        reporter.warn(f"this run failed before: {error}", hint)
    changes = list_changes(run, trainer.recipe, done)
    run.update({**RUNNING, "changed": changes})
    for change in changes:
        since = f"from step {change['step'] + 1:,} on"
        reporter.line("changed", f"{since}: {change['key']} {change['is']} instead of {change['was']}")
    if max_steps and done >= max_steps:
        reporter.line("note", f"nothing to train: the run has done {done:,} steps, as many as --max-steps")


def run_loop(
    reporter: Reporter,
    loop: TrainingLoop,
    start: Path | None,
    max_steps: int | None,
    stop: Callable[[], str | None],
    save_every: int,
    tensorboard: bool,
) -> str:
    """Train from the checkpoint `start` and show the records. Returns the reason for the end."""
    from alexnet_cli.core.training.tensorboard import INSTALL, is_installed, write_scalars

    trainer, run = loop.trainer, loop.run
    done, last = int(start.name) if start else 0, min(trainer.total_steps, max_steps or sys.maxsize)
    images = max(0, last - done) * trainer.batch_size
    records = loop.fit(start, max_steps, stop=announce_stop(reporter, stop), save_every=save_every)
    if tensorboard and not is_installed():
        reporter.warn("no TensorBoard files are written: the package tensorboard is not installed", INSTALL)
    elif tensorboard and run.writes:
        records = write_scalars(run, records)
    try:
        with reporter.progress("train", total=images) as bar:
            reason = show_records(reporter, loop, bar, images, records)
    except VerificationError as error:
        report_error(reporter, run, error)
        if run.writes:  # its curves show how the training diverged
            write_report(reporter, loop)
        raise
    if reason != "finished":  # `finish` sets that status when all files are written
        run.update({"status": "interrupted", "reason": reason})
    return reason


def announce_stop(reporter: Reporter, stop: Callable[[], str | None]) -> Callable[[], str | None]:
    """Wrap `stop` to show its first reason at once, because saving takes a while."""
    is_shown = False

    def ask() -> str | None:
        nonlocal is_shown
        if (reason := stop()) and not is_shown:
            is_shown = True
            another = "another Ctrl-C" if reason == "Ctrl-C" else "Ctrl-C"
            reporter.line("stop", f"{reason}: saving a checkpoint; {another} stops without saving")
        return reason

    return ask


def show_records(reporter: Reporter, loop: TrainingLoop, bar: Progress, total: int, records: Iterator[Record]) -> str:
    """Show each record as it comes; `total` is the number of images to train on. Returns the reason for the end."""
    trainer, steps_shown = loop.trainer, 0
    has_steady_speed = trainer.placement.device.type == "cpu" and not trainer.compiled
    for record in records:
        with suppress(BrokenPipeError):  # a closed pipe does not stop the training
            reporter.result(record.as_dict())
        if record.event == "start":
            steps_shown = record.step
            _show_resumed(reporter, loop, record)
        elif record.event == "step":
            if has_steady_speed and not steps_shown and record.images_per_second:
                reporter.line("time", _estimate_time(loop, total / record.images_per_second))
            bar.advance((record.step - steps_shown) * trainer.batch_size, _format_step(loop, record))
            steps_shown = record.step
        elif record.event == "warning":
            reporter.warn(record.text or "", record.hint or "")
        elif record.event == "validation":
            reporter.line("val", _format_validation(loop, record))
        elif record.event == "end":
            return record.reason or "finished"
    return "finished"


def _show_resumed(reporter: Reporter, loop: TrainingLoop, start: Record) -> None:
    """Show where a resumed run continues; nothing for a new run."""
    epochs = loop.trainer.recipe.epochs
    if start.step >= loop.trainer.total_steps:
        longer = f"alexnet train --resume {loop.run.quoted} --set epochs={2 * epochs}"
        reporter.line("note", f"this run has finished its {epochs} epochs; to train longer: {longer}")
    elif start.step:
        reporter.line("resumed", f"at epoch {start.epoch}/{epochs}, step {start.step:,}")
    elif loop.run.about.get("resumed"):
        reporter.line("resumed", "from the start: no checkpoint had been saved yet")


def _format_step(loop: TrainingLoop, record: Record) -> str:
    """The progress note of a step record, short enough for 80 columns. Top-5 is shown for more than 5 classes."""
    shares = [record.top1_error, record.top5_error] if len(loop.data.classes) > 5 else [record.top1_error]
    errors = "/".join(f"{100 * (share or 0):.1f}" for share in shares)
    where = f"epoch {record.epoch}/{loop.trainer.recipe.epochs}"
    return f"{where}  loss {record.loss:.3g}  error {errors}%  data {record.data_wait:.0%}"


def _format_validation(loop: TrainingLoop, record: Record) -> str:
    """The line of a validation record."""
    top5 = f"  top-5 error {record.top5_error:.1%}" if len(loop.data.classes) > 5 else ""
    errors = f"top-1 error {record.top1_error:.1%}{top5}  loss {record.loss:.3f}"
    speed = f"lr {record.lr:.2g}  {record.images_per_second:,.0f} img/s"
    return f"epoch {record.epoch}/{loop.trainer.recipe.epochs}  {errors}  {speed}{'  best' if record.best else ''}"


def _estimate_time(loop: TrainingLoop, seconds: float) -> str:
    """The time that the training will take and, if that is over an hour, a faster recipe."""
    time, tiny = f"about {format_duration(seconds)} on this CPU", recipes.TINY
    if seconds < HOUR or loop.transfer or loop.trainer.recipe.width <= tiny.width:
        return time
    return f"{time}; --recipe tiny (a quarter of the width, {tiny.epochs} epochs) is much faster"


@contextmanager
def record_errors(reporter: Reporter, run: Run) -> Iterator[None]:
    """Write an error or a second Ctrl-C inside the block to the run and to --json before it is raised."""
    from alexnet_cli.core.signals import EXIT_CODES

    try:
        yield
    except Stopped:  # on purpose
        raise
    except KeyboardInterrupt as error:
        has_ended = [record.get("event") for record in run.records()[-1:]] == ["end"]
        lost = "the training is saved" if has_ended else "progress since the last checkpoint is lost"
        hint = f"alexnet {'export -w' if has_ended else 'train --resume'} {run.quoted}"
        stopped = Stopped(f"stopped by a second Ctrl-C: {lost}", hint, EXIT_CODES["Ctrl-C"])
        report_error(reporter, run, stopped, "Ctrl-C", "interrupted")
        raise stopped from error
    except BaseException as error:
        report_error(reporter, run, error)
        raise


def report_error(
    reporter: Reporter, run: Run, error: BaseException, reason: str = "error", status: str = "failed"
) -> None:
    """Write the error to the run and to --json."""
    from alexnet_cli.core.runs.run import record_failure

    if run.writes and (record := record_failure(run, error, reason, status)):
        with suppress(BrokenPipeError):
            reporter.result(record.as_dict())


def finish(reporter: Reporter, loop: TrainingLoop, reason: str) -> None:
    """Write alexnet.onnx and the report. If training was stopped, raise Stopped with the command that continues."""
    from alexnet_cli.core.signals import EXIT_CODES

    run, trainer = loop.run, loop.trainer
    if reason in EXIT_CODES:
        write_report(reporter, loop)
        saved = f"checkpoint saved in {run.path}" if (run.checkpoints / "last").exists() else "nothing to save yet"
        what = f"stopped ({reason}) at step {trainer.steps_done:,}, epoch {trainer.epoch}: {saved}"
        raise Stopped(what, f"alexnet train --resume {run.quoted}", EXIT_CODES[reason])
    write_onnx(reporter, loop)
    if reason == "finished":
        run.update({"status": "finished", "reason": reason})
    if trainer.steps_done > loop.first_step:  # otherwise the report may have more: what `alexnet report` has added
        write_report(reporter, loop)
    if reason == "max-steps":
        steps = f"step {trainer.steps_done:,} of {trainer.total_steps:,}"
        reporter.line("stopped", f"{run.path} · at {steps} (--max-steps)")
        reporter.line("next", f"alexnet evaluate; to continue: alexnet train --resume {run.quoted}")
        return
    if trainer.schedule.is_finished:
        more = f"alexnet train --resume {run.quoted} --set plateau_drops={trainer.schedule.drops}"
        ended = "the validation error no longer falls after the last drop of the learning rate"
        reporter.line("ended", f"{ended}; for one more drop: {more}")
    reached, command = describe_result(loop)
    reporter.line("done", f"{run.path}{reached}   next: {command}")


def write_onnx(reporter: Reporter, loop: TrainingLoop) -> None:
    """Write alexnet.onnx into the run. Only a disk error is an error; anything else is a warning."""
    from alexnet_cli.core.export.export import export, sample_crops, write_names
    from alexnet_cli.core.model import model_file
    from alexnet_cli.core.runs.resolve import find_weights
    from alexnet_cli.core.runs.run import ONNX

    path = loop.run.path / ONNX
    try:
        model = model_file.read_model(find_weights(str(loop.run.path)))
        checked = export(model, path, sample_crops(loop.data, model))
        write_names(model, path)
        reporter.line("saved", f"{path} · differs from PyTorch by {checked.max_abs_difference:.1e} at most")
    except StorageError as error:
        raise StorageError(error.what, f"free some space, then: alexnet export -w {loop.run.quoted}") from error
    except AlexNetError as error:
        reporter.warn(f"{ONNX} was not written: {error.what}", error.hint)


def describe_result(loop: TrainingLoop) -> tuple[str, str]:
    """The error of the best epoch, compared with guessing if it is no better, and the next command or a hint."""
    from alexnet_cli.core.evaluation import baselines
    from alexnet_cli.core.intervals import wilson_interval
    from alexnet_cli.core.training.diagnostics import next_command

    trainer, data = loop.trainer, loop.data
    if loop.best is None:
        return "", "alexnet evaluate"
    (error, _), epochs = loop.best, trainer.epochs_begun
    train, val = (baselines.count_images(data.split(name).labels, len(data.classes)) for name in ("train", "val"))
    reached, images = f" · best epoch: top-1 error {error:.1%}", int(val.sum())
    if images < baselines.FEW_IMAGES:
        low, high = wilson_interval(error, images)
        reached += f" of {images} image{'' if images == 1 else 's'} (95 % interval {low:.1%} to {high:.1%})"
    upper_bound = baselines.bound_lowest_error(error, images, epochs)
    guessing, majority = baselines.guessing_error(len(val)), baselines.majority_error(val)
    if verdict := baselines.describe_no_better(error, upper_bound, guessing, majority):
        hint = next_command(trainer.recipe, train, val, error, trainer.steps_done, epochs, loop.is_fine_tuning)
        return f"{reached}, {verdict}", hint
    return reached, "alexnet evaluate"


def write_report(reporter: Reporter, loop: TrainingLoop) -> None:
    """Write report.html into the run, without the sections that need a forward pass (`alexnet report` adds them).

    A failure is only a warning, because the training is saved.
    """
    run = loop.run
    try:
        from alexnet_cli.core.report import page
        from alexnet_cli.core.report.collect import collect_report, open_model
        from alexnet_cli.core.runs.resolve import find_weights

        try:
            network = open_model(find_weights(str(run.path)))
        except WeightsError:  # before the first checkpoint
            network = None
        page.write_page(collect_report(run, network, loop.data), run.path / page.FILE)
    except Exception as error:  # nothing here may make a finished training fail
        what = error.what if isinstance(error, AlexNetError) else f"{type(error).__name__}: {error}"
        reporter.warn(f"no report was written: {what}", f"the training is saved; try alexnet report -w {run.quoted}")
    except KeyboardInterrupt:  # a second Ctrl-C; the message about the saved training follows
        reporter.warn("no report was written: interrupted", f"write it with: alexnet report -w {run.quoted}")
    else:
        reporter.line("report", str(run.path / page.FILE))
