"""`alexnet train`: train the network of the paper, or one of its variants, on a prepared data set."""

from __future__ import annotations

import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alexnet_cli import __version__, recipe as recipes
from alexnet_cli.console import Reporter
from alexnet_cli.errors import AlexNetError, DataError, Stopped, UsageError
from alexnet_cli.options import BatchOption, DataOption, GpusOption, JobsOption, JsonFlag, QuietFlag
from alexnet_cli.recipe import Recipe

if TYPE_CHECKING:
    from alexnet_cli.core.placement import Placement
    from alexnet_cli.core.runs import Run
    from alexnet_cli.core.shards import Dataset
    from alexnet_cli.core.train import Record, Training

EXIT_CODES = {"Ctrl-C": 130, "SIGTERM": 143, "SIGUSR1": 143, "time is up": 75}
FREE_TO_CHANGE = {"epochs"}  # on resume: more of the same


def train(
    data: DataOption = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="paper, krizhevsky, caffe, fast, tiny, or a TOML file.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Change one value: key=value. Repeatable.")] = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the training set, at most.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Stop after so many steps.")] = None,
    batch_size: BatchOption = None,
    lr: Annotated[float | None, typer.Option(help="Initial learning rate.")] = None,
    gpus: GpusOption = None,
    precision: Annotated[Literal["fp32", "tf32", "bf16"] | None, typer.Option(help="Arithmetic of the matrix products.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of initial values, order, crops, dropout.")] = None,
    resume: Annotated[str | None, typer.Option(help="A run to go on with; auto: the one of --name, or the latest, if there is one to go on with.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the run. [default: date, time and recipe]")] = None,
    max_time: Annotated[str | None, typer.Option(help="Save and stop after so long, such as 8h, 30m, 1h30m.")] = None,
    jobs: JobsOption = None,
    print_config: Annotated[bool, typer.Option("--print-config", help="Show every value and where it comes from, and quit.")] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Train the two-tower network on a prepared data set.

    Without options: recipe `paper` on the data set prepared last, on the first GPU if there is one.
    """  # fmt: skip
    reporter = Reporter("train", json=json, quiet=quiet)
    options = {"epochs": epochs, "batch_size": batch_size, "learning_rate": lr, "precision": precision, "seed": seed}
    explicit = {key: value for key, value in options.items() if value is not None}
    seconds = _seconds(max_time)
    continued = _to_continue(resume, name)
    base = continued.recipe if continued and recipe is None else recipes.load(recipe or "paper")
    resolved = recipes.changed(recipes.changed(base, recipes.parsed(settings or [])), explicit)
    if print_config:
        _print_config(reporter, resolved, recipe or "paper", settings or [], explicit)
        return
    if continued:
        resolved = _agreed(continued, resolved, settings or [])
    from alexnet_cli.core.shards import find_dataset, open_dataset

    dataset = open_dataset(find_dataset(data or (str(continued.about["data_path"]) if continued else None)))
    training = _training(reporter, resolved, dataset, gpus, jobs, continued, name)
    start = training.run.checkpoints / "last"
    _train(reporter, training, start.resolve() if continued and start.exists() else None, max_steps, seconds)


def _seconds(text: str | None) -> float | None:
    """8h, 30m, 45s, 1h30m, or plain seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s?)?", text)
    if not match or not any(match.groups()):
        raise UsageError(f"--max-time {text} is not a length of time", "such as 8h, 30m, 1h30m or 90s")
    hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + seconds


def _to_continue(resume: str | None, name: str | None) -> Run | None:
    """The run to go on with, or None to start one."""
    from alexnet_cli.core.runs import Run

    if resume is None:
        return None
    if resume != "auto":
        return Run.open(resume)
    try:
        run = Run.open(name or "latest")
    except UsageError:
        return None
    return run if name or run.about.get("status") != "finished" else None


def _agreed(run: Run, wanted: Recipe, settings: list[str]) -> Recipe:
    """The recipe to go on with. What would change the result is refused unless it was said with --set."""
    saved, said = asdict(run.recipe), recipes.parsed(settings)
    for key, value in asdict(wanted).items():
        if value != saved[key] and key not in FREE_TO_CHANGE and key not in said:
            raise UsageError(
                f"{key} = {value} differs from the run {run.path.name}, which has {saved[key]}",
                f"leave it out, or go on with it all the same: --set {key}={value}",
            )
    if asdict(wanted) != saved:
        from alexnet_cli.core.runs import write_text

        write_text(run.path / "recipe.toml", wanted.to_toml())
    return wanted


def _training(
    reporter: Reporter, recipe: Recipe, data: Dataset, gpus: str | None, jobs: int | None, run: Run | None, name: str | None
) -> Training:
    """Place the network, make the run directory unless there is one, and say what is about to happen."""
    from alexnet_cli.core.network import parameters_by_name
    from alexnet_cli.core.placement import place, threads_for_decoding
    from alexnet_cli.core.runs import Run
    from alexnet_cli.core.train import Training

    if run and run.about.get("data_hash") != data.hash:
        raise DataError(f"run {run.path.name} was trained on another data set than {data.path}", "name its own with --data")
    placement = place(gpus, recipe.precision)
    about = _about(placement, data, recipe)
    run = run or Run.create(name, recipe, about)
    run.update({**about, "status": "running"})
    training = Training(recipe, data, run, placement, threads_for_decoding(jobs))
    for note in placement.notes:
        reporter.warn(note)
    count = sum(p.numel() for _, p in parameters_by_name(training.network))
    towers = "2 towers" if recipe.towers == 2 else "1 tower"
    splits = " · ".join(f"{split} {len(data.split(split)):,}" for split in ("train", "val"))
    reporter.line("run", str(run.path))
    reporter.line("data", f"{data.path} · {len(data.classes):,} classes · {splits}")
    reporter.line("model", f"AlexNet · {towers} · {count:,} parameters · {placement.name} · {placement.precision}")
    reporter.line("recipe", f"{recipe.name} · batch {recipe.batch_size} · rate {recipe.learning_rate:g} · "
                            f"{recipe.schedule} · {recipe.epochs} epochs · seed {recipe.seed}")  # fmt: skip
    return training


def _about(placement: Placement, data: Dataset, recipe: Recipe) -> dict[str, Any]:
    """What run.json says beside the status."""
    import numpy
    import torch

    return {
        "command": ["alexnet", *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "versions": {"alexnet": __version__, "python": sys.version.split()[0], "torch": torch.__version__,
                     "numpy": numpy.__version__},
        "devices": [placement.name],
        "precision": placement.precision,
        "placement": {f"tower {i + 1}": placement.name for i in range(recipe.towers)},
        "data": data.name, "data_path": str(data.path.resolve()), "data_hash": data.hash,
        "seed": recipe.seed,
    }  # fmt: skip


def _train(reporter: Reporter, training: Training, resume: Any, max_steps: int | None, seconds: float | None) -> None:
    """Run the loop, show its records, and write the ONNX file."""
    from alexnet_cli.core.train import fit

    run, status, reason = training.run, "failed", "finished"
    try:
        with _asked_to_stop(seconds) as stop:
            records = fit(training, resume, max_steps, stop=stop)
            reason = _show(reporter, training, records)
        status = "interrupted" if reason in EXIT_CODES else "finished"
    finally:
        run.update({"status": status, "reason": reason if status != "failed" else "error"})
    if status == "interrupted":
        again = f"alexnet train --resume {run.path.name}"
        raise Stopped(f"stopped ({reason}) at step {training.step}, epoch {training.epoch}; saved", again, EXIT_CODES[reason])
    _write_onnx(reporter, training)


@contextmanager
def _asked_to_stop(seconds: float | None) -> Iterator[Callable[[], str | None]]:
    """While inside: a function that gives the reason to stop, once there is one. A second Ctrl-C stops at once."""
    reasons: list[str] = []
    deadline = time.monotonic() + seconds if seconds is not None else None

    def note(number: int, _frame: object) -> None:
        if reasons and number == signal.SIGINT:
            raise KeyboardInterrupt
        reasons.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def stop() -> str | None:
        if deadline is not None and time.monotonic() >= deadline:
            reasons.append("time is up")
        return reasons[0] if reasons else None

    numbers = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _show(reporter: Reporter, training: Training, records: Iterator[Record]) -> str:
    """Print each record as it comes; returns the reason of the end."""
    recipe, per_epoch = training.recipe, training.schedule.steps_per_epoch
    reason, batch = "finished", recipe.batch_size
    with reporter.progress("train", total=recipe.epochs * per_epoch * batch) as bar:
        done = 0
        for record in records:
            reporter.result(record.as_dict())
            if record.event == "start":
                done = record.step
                bar.advance(done * batch)
                if done:
                    reporter.line("resume", f"at epoch {record.epoch}, step {done}")
            elif record.event == "step" and record.loss is not None and record.top1_error is not None:
                note = (f"epoch {record.epoch}/{recipe.epochs}  loss {record.loss:.3f}  top-1 error {record.top1_error:.1%}  "
                        f"data {record.data_wait or 0:.0%}")  # fmt: skip
                bar.advance((record.step - done) * batch, note)
                done = record.step
            elif record.event == "validation" and record.top1_error is not None and record.top5_error is not None:
                reporter.line("val", f"epoch {record.epoch}/{recipe.epochs}  top-1 error {record.top1_error:.1%}  top-5 error "
                                     f"{record.top5_error:.1%}  loss {record.loss:.3f}  rate {record.lr:.2g}  "
                                     f"{record.images_per_second:,.0f} img/s{'  best' if record.best else ''}")  # fmt: skip
            elif record.event == "end":
                reason = record.reason or "finished"
    return reason


def _write_onnx(reporter: Reporter, training: Training) -> None:
    """alexnet.onnx of the best checkpoint, so that `alexnet predict` starts fast."""
    from alexnet_cli.core import weights
    from alexnet_cli.core.export import crops_of, export
    from alexnet_cli.core.runs import ONNX, find_weights

    run = training.run
    try:
        model = weights.read(find_weights(str(run.path)))
        checked = export(model, run.path / ONNX, crops_of(training.data, model))
        reporter.line("saved", f"{run.path / ONNX} · differs from PyTorch by {checked.max_abs_difference:.1e} at most")
    except AlexNetError as error:
        reporter.warn(f"no {ONNX} was written: {error.what}", error.hint)
    best = training.schedule.best_error
    reporter.line("done", f"{run.path} · lowest top-1 error {best:.1%}   next: alexnet evaluate")


def _print_config(reporter: Reporter, recipe: Recipe, base: str, settings: list[str], explicit: dict[str, Any]) -> None:
    """Every value, where it comes from, and what the paper has."""
    from rich.table import Table

    said, paper = recipes.parsed(settings), asdict(recipes.PAPER)
    table = Table("key", "value", "from", "paper", "section", "meaning", title=f"recipe {recipe.name}", title_justify="left")
    rows = []
    for key, value in asdict(recipe).items():
        about, section = recipes.describe(key)
        source = "option" if key in explicit else "--set" if key in said else base
        rows.append({"key": key, "value": value, "from": source, "paper": paper[key], "section": section})
        mark = "" if value == paper[key] else "bold"
        table.add_row(key, str(value), source, str(paper[key]), section, about, style=mark)
    reporter.result({"event": "config", "values": rows})
    reporter.show(table)


