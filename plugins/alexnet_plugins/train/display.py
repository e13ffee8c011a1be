"""What `alexnet train` shows, from the heading to the report at its end."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_cli import recipe as recipes
from alexnet_cli.console import Progress, Reporter, duration
from alexnet_cli.errors import AlexNetError, Stopped, StorageError, VerificationError, WeightsError
from alexnet_cli.recipe import Recipe

if TYPE_CHECKING:
    from alexnet_cli.core.parallel.placement import Placement
    from alexnet_cli.core.runs.records import Record
    from alexnet_cli.core.runs.run import Run
    from alexnet_cli.core.training.fine_tuning import Transfer
    from alexnet_cli.core.training.loop import TrainingLoop

HOUR = 3600  # seconds
IN_HEADING = {"name", "batch_size", "learning_rate", "schedule", "epochs", "seed", "frozen", "precision"}


def show_heading(reporter: Reporter, loop: TrainingLoop) -> None:
    """Show run, data, network, devices and recipe."""
    from alexnet_cli.core.model.network import parameter_count

    trainer, data = loop.trainer, loop.data
    recipe, placement = trainer.recipe, trainer.placement
    for note in placement.notes:
        reporter.line("note", note)
    if trainer.compiled:
        reporter.line("note", "torch.compile compiles the network at the first step, which takes a while")
    count = parameter_count(trainer.network)
    where = placement.name if placement.ranks.size == 1 else f"{placement.ranks.size} processes"
    towers = "2 towers" if recipe.towers == 2 else "1 tower"
    splits = " · ".join(f"{split} {len(data.split(split)):,}" for split in ("train", "val"))
    reporter.line("run", str(loop.run.path))
    reporter.line("data", f"{data.path} · {len(data.classes):,} classes · {splits}")
    reporter.line("model", f"AlexNet · {towers} · {count:,} parameters · {where} · {placement.precision}")
    if placement.ranks.size > 1:
        reporter.line("placed", _describe_placement(placement, recipe.towers))
    if loop.transfer:
        _show_transfer(reporter, loop.transfer)
    smaller = trainer.micro_batch < trainer.rank_images
    reporter.line(
        "recipe",
        f"{recipe.name} · batch {recipe.batch_size} · rate {recipe.learning_rate:g} · {recipe.schedule} · "
        f"{recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'} · seed {recipe.seed}"
        + (f" · micro-batch {trainer.micro_batch}" if smaller else "")
        + (" · conv1 to conv5 frozen" if recipe.frozen == "conv" else ""),
    )
    if changes := _describe_changes(recipe):
        reporter.line("changed", changes)


def _describe_changes(recipe: Recipe) -> str:
    """What differs from the named recipe that this one is a variant of, apart from what the heading shows."""
    named = recipes.find_closest_recipe(recipe)
    changes = " · ".join(
        f"{key} {value} instead of {other}"
        for key, (value, other) in recipes.compare_recipes(recipe, named).items()
        if key not in IN_HEADING
    )
    return changes and changes + (f" · the rest as in recipe {named.name}" if recipe.name != named.name else "")


def _describe_placement(placement: Placement, towers: int) -> str:
    """Which device holds which tower, how many replicas there are, and what else is split."""
    ranks = placement.ranks
    parts = [f"tower {tower + 1} → {', '.join(placement.tower_devices(tower))}" for tower in range(towers)]
    if ranks.towers is None:
        parts = [f"{'both towers' if towers == 2 else 'the tower'} → {', '.join(placement.tower_devices(0))}"]
    replicas = [f"{ranks.replicas} replicas, each with its share of the images"] if ranks.replicas > 1 else []
    columns = [f"layers 6 to 8 in {ranks.columns.total} columns"] if ranks.columns else []
    return " · ".join(parts + replicas + columns)


def _show_transfer(reporter: Reporter, transfer: Transfer) -> None:
    """Show which layers start from other weights, and why the others do not."""
    from alexnet_cli.core.runs.resolve import describe_weights

    reporter.line("weights", describe_weights(transfer.model.path, transfer.model.info))
    reporter.line("loaded", ", ".join(transfer.loaded))
    for layer, reason in transfer.afresh.items():
        reporter.line("afresh", f"{layer}: {reason}")


def show_start(
    reporter: Reporter, loop: TrainingLoop, start: Path | None, damaged: list[Path], max_steps: int | None
) -> None:
    """Show what the user should know before the first step, and record recipe changes in run.json."""
    from alexnet_cli.core.runs.records import failure
    from alexnet_cli.core.runs.run import RUNNING
    from alexnet_cli.core.training.resume import list_changes

    trainer, run = loop.trainer, loop.run
    rows, size = trainer.rows, trainer.recipe.batch_size
    done, last = int(start.name) if start else 0, min(trainer.total_steps, max_steps or sys.maxsize)
    if rows > size and (skipped := rows % size) and done < last:
        each = f"each epoch skips {skipped:,} of {rows:,} images (different ones each time)"
        reporter.line("note", f"{each}, so that every batch has {size}")
    if size > rows:
        smaller = max(1, rows // 10)
        reporter.warn(
            f"batch size {size:,} is larger than the training set ({rows:,} images); each step uses all of it",
            f"-b {smaller} makes {rows // smaller} steps per epoch",
        )
    for folder in damaged:
        reporter.warn(f"{folder} is damaged: continuing from {start}")
    error, hint = failure(run.about)
    if error and trainer.recipe == run.recipe:
        reporter.warn(f"this run failed before: {error}", hint)
    changes = list_changes(run, trainer.recipe, done)
    run.update({**RUNNING, "changed": changes})
    for change in changes:
        since = f"from step {change['step'] + 1:,} on"
        reporter.line("changed", f"{since}: {change['key']} {change['is']} instead of {change['was']}")
    if max_steps and done >= max_steps:
        reporter.line("note", f"--max-steps {max_steps:,} counts from the start of the run, and {done:,} are done")


def run_loop(
    reporter: Reporter,
    loop: TrainingLoop,
    start: Path | None,
    max_steps: int | None,
    stop: Callable[[], str | None],
    save_every: int,
    tensorboard: bool,
) -> str:
    """Train from the checkpoint `start` and show the records. Returns why training ended."""
    from alexnet_cli.core.training.tensorboard import INSTALL, is_installed, write_scalars

    trainer, run = loop.trainer, loop.run
    done, last = int(start.name) if start else 0, min(trainer.total_steps, max_steps or sys.maxsize)
    images = max(0, last - done) * trainer.batch_size
    records = loop.fit(start, max_steps, stop=announce_stop(reporter, stop), save_every=save_every)
    if tensorboard and not is_installed():
        reporter.warn(f"nothing is written to {run.path / 'tensorboard'}: tensorboard is not installed", INSTALL)
    elif tensorboard and run.writes:
        records = write_scalars(run, records)
    try:
        with reporter.progress("train", total=images) as bar:
            reason = show_records(reporter, loop, bar, images, records)
    except VerificationError as error:
        report_error(reporter, run, error)
        if run.writes:  # its curves show how it came to that
            write_report(reporter, loop)
        raise
    if reason != "finished":  # `finish` sets that status when all files are written
        run.update({"status": "interrupted", "reason": reason})
    return reason


def announce_stop(reporter: Reporter, stop: Callable[[], str | None]) -> Callable[[], str | None]:
    """Wrap `stop` so that its first reason is shown at once, since saving takes a while."""
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
    """Show each record as it comes; `total` is the number of images to train on. Returns the reason of the end."""
    trainer, done = loop.trainer, 0
    recipe, many = trainer.recipe, len(loop.data.classes) > 5
    for record in records:
        with suppress(BrokenPipeError):  # a closed pipe is no reason to stop training
            reporter.result(record.as_dict())
        where = f"epoch {record.epoch}/{recipe.epochs}"
        if record.event == "start" and record.step >= trainer.total_steps:
            more = f"alexnet train --resume {loop.run.quoted} --set epochs={2 * recipe.epochs}"
            reporter.line("note", f"this run has finished all its {recipe.epochs} epochs; to continue: {more}")
        elif record.event == "start" and record.step:
            reporter.line("resumed", f"at {where}, step {record.step:,}")
        elif record.event == "start" and loop.run.about.get("resumed"):
            reporter.line("resumed", "from the start: no checkpoint had been saved yet")
        elif record.event == "step":
            steady = trainer.placement.device.type == "cpu" and not trainer.compiled
            if not done and steady and record.images_per_second:
                reporter.line("time", _estimate_time(loop, total / record.images_per_second))
            shares = [record.top1_error, record.top5_error][: 2 if many else 1]
            errors = "/".join(f"{100 * (error or 0):.1f}" for error in shares)
            note = (
                f"{where}  loss {record.loss:.3g}  error {errors}%  data {record.data_wait:.0%}"  # 80 columns hold it
            )
            bar.advance((record.step - done) * trainer.batch_size, note)
        elif record.event == "warning":
            reporter.warn(record.text or "", record.hint or "")
        elif record.event == "validation":
            top5 = f"  top-5 error {record.top5_error:.1%}" if many else ""
            errors = f"top-1 error {record.top1_error:.1%}{top5}  loss {record.loss:.3f}"
            speed = f"rate {record.lr:.2g}  {record.images_per_second:,.0f} img/s"
            reporter.line("val", f"{where}  {errors}  {speed}{'  best' if record.best else ''}")
        elif record.event == "end":
            return record.reason or "finished"
        if record.event in {"start", "step"}:
            done = record.step
    return "finished"


def _estimate_time(loop: TrainingLoop, seconds: float) -> str:
    """How long the training will take and, if that is hours, a quicker recipe."""
    time, tiny = f"about {duration(seconds)} on this CPU", recipes.TINY
    if seconds < HOUR or loop.transfer or loop.trainer.recipe.width <= tiny.width:
        return time
    return f"{time}; --recipe tiny (a quarter of the width, {tiny.epochs} epochs) is far quicker"


@contextmanager
def record_errors(reporter: Reporter, run: Run) -> Iterator[None]:
    """While inside: an error or a second Ctrl-C is written to the run and to --json before it is raised."""
    from alexnet_cli.core.signals import EXIT_CODES

    try:
        yield
    except Stopped:  # on purpose
        raise
    except KeyboardInterrupt as error:
        finished = [record.get("event") for record in run.records()[-1:]] == ["end"]
        lost = "the training is saved" if finished else "progress since the last checkpoint is lost"
        hint = f"alexnet {'export -w' if finished else 'train --resume'} {run.quoted}"
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


def finish(reporter: Reporter, loop: TrainingLoop, reason: str, stop: Callable[[], str | None]) -> None:
    """If stopped, raise Stopped with the command that continues; otherwise write alexnet.onnx and the report."""
    from alexnet_cli.core.export.export import export, sample_crops
    from alexnet_cli.core.model import model_file
    from alexnet_cli.core.runs.resolve import find_weights
    from alexnet_cli.core.runs.run import ONNX
    from alexnet_cli.core.signals import EXIT_CODES

    run, trainer = loop.run, loop.trainer
    if reason in EXIT_CODES:
        write_report(reporter, loop)
        saved = f"checkpoint saved in {run.path}" if (run.checkpoints / "last").exists() else "nothing to save yet"
        what = f"stopped ({reason}) at step {trainer.steps_done:,}, epoch {trainer.epoch}: {saved}"
        raise Stopped(what, f"alexnet train --resume {run.quoted}", EXIT_CODES[reason])
    try:
        model = model_file.read_model(find_weights(str(run.path)))
        checked = export(model, run.path / ONNX, sample_crops(loop.data, model))
        reporter.line("saved", f"{run.path / ONNX} · differs from PyTorch by {checked.max_abs_difference:.1e} at most")
    except StorageError as error:
        raise StorageError(error.what, f"free some space, then: alexnet export -w {run.quoted}") from error
    except AlexNetError as error:
        reporter.warn(f"no {ONNX} was written: {error.what}", error.hint)
    if reason == "finished":
        run.update({"status": "finished", "reason": reason})
    write_report(reporter, loop)
    if reason == "max-steps":
        reporter.line(
            "stopped", f"{run.path} · by --max-steps at step {trainer.steps_done:,} of {trainer.total_steps:,}"
        )
        reporter.line(
            "next", f"alexnet train --resume {run.quoted} continues; alexnet evaluate measures the network as it is"
        )
        return
    if trainer.schedule.over:
        more = f"one more drop: alexnet train --resume {run.quoted} --set plateau_drops={trainer.schedule.drops}"
        reporter.line("ended", f"the validation error stopped falling after the last drop of the learning rate; {more}")
    reached, command = describe_result(loop)
    reporter.line("done", f"{run.path}{reached}   next: {command}")


def describe_result(loop: TrainingLoop) -> tuple[str, str]:
    """The lowest error, compared with guessing, and the next command or hint."""
    from alexnet_cli.core.evaluation import baselines
    from alexnet_cli.core.training.diagnostics import next_command

    trainer, data = loop.trainer, loop.data
    best, epochs = trainer.schedule.best_error, trainer.epochs_begun
    if best > 1:
        return "", "alexnet evaluate"
    trained, val = (baselines.count_images(data.split(name).labels, len(data.classes)) for name in ("train", "val"))
    upper_bound = baselines.bound_lowest_error(best, int(val.sum()), epochs)
    guess, always = baselines.guessing_error(len(val)), baselines.majority_error(val)
    reached = f" · lowest top-1 error {best:.1%}"
    if verdict := baselines.describe_no_better(guess, always, upper_bound):
        hint = next_command(trainer.recipe, trained, trainer.steps_done, epochs)
        return f"{reached}, {verdict} ({always:.1%})", hint
    return reached, "alexnet evaluate"


def write_report(reporter: Reporter, loop: TrainingLoop) -> None:
    """Write report.html into the run, without what needs a forward pass: `alexnet report` adds that.

    A failure is only a warning, since the training is safe.
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
    except Exception as error:  # drawing, disk: nothing may lose a training
        what = error.what if isinstance(error, AlexNetError) else f"{type(error).__name__}: {error}"
        reporter.warn(f"no report was written: {what}", f"the training is safe; alexnet report -w {run.quoted}")
    except KeyboardInterrupt:  # a second Ctrl-C; the message about what is saved follows
        reporter.warn("no report was written: interrupted", f"alexnet report -w {run.quoted} writes it")
    else:
        reporter.line("report", str(run.path / page.FILE))
