"""How `alexnet train` ends: at its end, stopped, or with an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from alexnet_cli.console import Reporter
from alexnet_cli.errors import AlexNetError, Stopped, StorageError
from alexnet_plugins.train_report import leave_report

if TYPE_CHECKING:
    from alexnet_cli.core.runs import Run
    from alexnet_cli.core.training import Training


@contextmanager
def failing(reporter: Reporter, run: Run) -> Iterator[None]:
    """While inside: an error, and a second Ctrl-C, is left in the run and told to programs before it goes its way."""
    from alexnet_cli.core.resume import EXIT_CODES

    try:
        yield
    except Stopped:  # on purpose, and said by whoever stopped
        raise
    except KeyboardInterrupt as error:
        over = [record.get("event") for record in run.records()[-1:]] == ["end"]
        lost = "the training is saved" if over else "what came after the last checkpoint is lost"
        way_on = f"alexnet {'export -w' if over else 'train --resume'} {run.quoted}"
        stopped = Stopped(f"stopped at once by a second Ctrl-C: {lost}", way_on, EXIT_CODES["Ctrl-C"])
        fail(reporter, run, stopped, "Ctrl-C", "interrupted")
        raise stopped from error
    except BaseException as error:
        fail(reporter, run, error)
        raise


def fail(reporter: Reporter, run: Run, error: BaseException, reason: str = "error", status: str = "failed") -> None:
    """Leave the error in the run, and tell it to programs."""
    from alexnet_cli.core import failure

    if run.writes and (record := failure.note(run, error, reason, status)):
        with suppress(BrokenPipeError):
            reporter.result(record.as_dict())


def finish(reporter: Reporter, training: Training, reason: str) -> None:
    """Stopped: say how to go on. Otherwise write alexnet.onnx of the best checkpoint, so that predict starts fast."""
    from alexnet_cli.core import weights
    from alexnet_cli.core.export import crops_of, export
    from alexnet_cli.core.resume import EXIT_CODES
    from alexnet_cli.core.runs import ONNX, find_weights

    run = training.run
    if reason in EXIT_CODES:
        leave_report(reporter, training)
        saved = f"checkpoint saved in {run.path}" if (run.checkpoints / "last").exists() else "nothing to save yet"
        what = f"stopped ({reason}) at step {training.step:,}, epoch {training.epoch}: {saved}"
        raise Stopped(what, f"alexnet train --resume {run.quoted}", EXIT_CODES[reason])
    try:
        model = weights.read(find_weights(str(run.path)))
        checked = export(model, run.path / ONNX, crops_of(training.data, model))
        reporter.line("saved", f"{run.path / ONNX} · differs from PyTorch by {checked.max_abs_difference:.1e} at most")
    except StorageError as error:
        raise StorageError(error.what, f"free some space, then: alexnet export -w {run.quoted}") from error
    except AlexNetError as error:
        reporter.warn(f"no {ONNX} was written: {error.what}", error.hint)
    if reason == "finished":
        run.update({"status": "finished", "reason": reason})
    leave_report(reporter, training)
    if reason == "max-steps":
        reporter.line("stopped", f"{run.path} · by --max-steps at step {training.step:,} of {training.steps:,}")
        reporter.line("next", f"alexnet train --resume {run.quoted} goes on; alexnet evaluate measures it as it is")
        return
    if training.schedule.over:
        more = f"one more: alexnet train --resume {run.quoted} --set plateau_drops={training.schedule.drops}"
        reporter.line("ended", f"the validation error has stopped falling, after the last drop of the rate too; {more}")
    reached, way_on = _reached(training)
    reporter.line("done", f"{run.path}{reached}   next: {way_on}")


def _reached(training: Training) -> tuple[str, str]:
    """The lowest error, with what it is worth, and what to do next."""
    from alexnet_cli.core import advice, baselines

    best, data, steps = training.schedule.best_error, training.data, training.step
    if best > 1:
        return "", "alexnet evaluate"
    trained, val = (baselines.count_images(data.split(name).labels, len(data.classes)) for name in ("train", "val"))
    reaches = baselines.bound_lowest_error(best, int(val.sum()), training.epochs_begun)
    guess, always = baselines.guessing_error(len(val)), baselines.majority_error(val)
    reached = f" · lowest top-1 error {best:.1%}"
    if said := baselines.describe_no_better(guess, always, reaches):
        return f"{reached}, {said} ({always:.1%})", advice.way_on(
            training.recipe, trained, steps, training.epochs_begun
        )
    return reached, "alexnet evaluate"
