"""What `alexnet train` shows: the heading, a line for each thing that happens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

from alexnet_cli import recipe as recipes
from alexnet_cli.console import Progress, Reporter, duration
from alexnet_cli.recipe import Recipe

if TYPE_CHECKING:
    from alexnet_cli.core.fine_tuning import Transfer
    from alexnet_cli.core.placement import Placement
    from alexnet_cli.core.records import Record
    from alexnet_cli.core.training import Training

HOUR = 3600  # seconds
SHOWN = {"name", "batch_size", "learning_rate", "schedule", "epochs", "seed", "frozen", "precision"}  # in the heading


def heading(reporter: Reporter, training: Training) -> None:
    """Run, data, network, recipe: what is about to happen."""
    from alexnet_cli.core.network import parameter_count

    recipe, data, placement = training.recipe, training.data, training.placement
    for note in (
        *placement.notes,
        *(["the network is compiled at the first step, which takes long"] * training.compile),
    ):
        reporter.line("note", note)
    count = parameter_count(training.network)
    where = placement.name if placement.ranks.size == 1 else f"{placement.ranks.size} processes"
    towers = "2 towers" if recipe.towers == 2 else "1 tower"
    splits = " · ".join(f"{split} {len(data.split(split)):,}" for split in ("train", "val"))
    reporter.line("run", str(training.run.path))
    reporter.line("data", f"{data.path} · {len(data.classes):,} classes · {splits}")
    reporter.line("model", f"AlexNet · {towers} · {count:,} parameters · {where} · {placement.precision}")
    if placement.ranks.size > 1:
        reporter.line("placed", _placed(placement, recipe.towers))
    if training.transfer:
        _taken_over(reporter, training.transfer)
    reporter.line(
        "recipe",
        f"{recipe.name} · batch {recipe.batch_size} · rate {recipe.learning_rate:g} · {recipe.schedule} · "
        f"{recipe.epochs} epoch{'' if recipe.epochs == 1 else 's'} · seed {recipe.seed}"
        + (f" · in pieces of {training.gradient.piece}" if training.gradient.piece < training.share else "")
        + (" · conv1 to conv5 frozen" if recipe.frozen == "conv" else ""),
    )
    if changes := _changes(recipe):
        reporter.line("changed", changes)


def _changes(recipe: Recipe) -> str:
    """What differs from the named recipe that this is a variant of, and is not shown beside it."""
    named = recipes.find_closest_recipe(recipe)
    told = " · ".join(
        f"{key} {value} instead of {other}"
        for key, (value, other) in recipes.compare_recipes(recipe, named).items()
        if key not in SHOWN
    )
    return told and told + (f" · otherwise as recipe {named.name}" if recipe.name != named.name else "")


def _placed(placement: Placement, towers: int) -> str:
    """Which device has which tower, how many replicas there are, and what else is split."""
    ranks = placement.ranks
    parts = [f"tower {tower + 1} → {', '.join(placement.of_tower(tower))}" for tower in range(towers)]
    if ranks.towers is None:
        parts = [f"{'both towers' if towers == 2 else 'the tower'} → {', '.join(placement.of_tower(0))}"]
    replicas = [f"{ranks.replicas} replicas, each with its share of the images"] if ranks.replicas > 1 else []
    columns = [f"layers 6 to 8 in {ranks.columns.total} columns"] if ranks.columns else []
    return " · ".join(parts + replicas + columns)


def _taken_over(reporter: Reporter, transfer: Transfer) -> None:
    """Say which layers start from other weights, and why the others do not."""
    from alexnet_cli.core.origin import told

    reporter.line("weights", told(transfer.model.path, transfer.model.info))
    reporter.line("loaded", ", ".join(transfer.loaded))
    for layer, reason in transfer.afresh.items():
        reporter.line("afresh", f"{layer}: {reason}")


def told_once(reporter: Reporter, stop: Callable[[], str | None]) -> Callable[[], str | None]:
    """The same question; the first time that there is a reason to stop, it is said: saving takes a while."""
    said = False

    def ask() -> str | None:
        nonlocal said
        if (reason := stop()) and not said:
            said = True
            another = "another Ctrl-C" if reason == "Ctrl-C" else "Ctrl-C"
            reporter.line("stop", f"{reason}: saving what was learned; {another} stops without that")
        return reason

    return ask


def show_records(reporter: Reporter, training: Training, bar: Progress, total: int, records: Iterator[Record]) -> str:
    """Show each record as it comes. Returns the reason of the end."""
    recipe, done = training.recipe, 0
    for record in records:
        with suppress(BrokenPipeError):  # nobody reads on: no reason to stop training
            reporter.result(record.as_dict())
        where = f"epoch {record.epoch}/{recipe.epochs}"
        if record.event == "start" and record.step >= training.steps:
            more = f"alexnet train --resume {training.run.quoted} --set epochs={2 * recipe.epochs}"
            reporter.line("note", f"this run is finished, all {recipe.epochs} epochs of it; to go on: {more}")
        elif record.event == "start" and record.step:
            reporter.line("resumed", f"at {where}, step {record.step:,}")
        elif record.event == "start" and training.run.about.get("resumed"):
            reporter.line("resumed", "from the beginning: no checkpoint had been saved yet")
        elif record.event == "step":
            steady = training.placement.device.type == "cpu" and not training.compile
            if not done and steady and record.images_per_second:
                reporter.line("time", _expected(training, total / record.images_per_second))
            shares = [record.top1_error, record.top5_error][: 2 if len(training.data.classes) > 5 else 1]
            told = "/".join(f"{100 * (error or 0):.1f}" for error in shares)
            note = f"{where}  loss {record.loss:.3g}  error {told}%  data {record.data_wait:.0%}"  # 80 columns hold it
            bar.advance((record.step - done) * training.batch, note)
        elif record.event == "warning":
            reporter.warn(record.text or "", record.hint or "")
        elif record.event == "validation":
            top5 = f"  top-5 error {record.top5_error:.1%}" if len(training.data.classes) > 5 else ""
            errors = f"top-1 error {record.top1_error:.1%}{top5}  loss {record.loss:.3f}"
            speed = f"rate {record.lr:.2g}  {record.images_per_second:,.0f} img/s"
            reporter.line("val", f"{where}  {errors}  {speed}{'  best' if record.best else ''}")
        elif record.event == "end":
            return record.reason or "finished"
        if record.event in {"start", "step"}:
            done = record.step
    return "finished"


def _expected(training: Training, seconds: float) -> str:
    """How long a training will take, and, where that is hours, what is quicker."""
    told, tiny = f"about {duration(seconds)} on this CPU", recipes.TINY
    if seconds < HOUR or training.transfer or training.recipe.width <= tiny.width:
        return told
    return f"{told}; --recipe tiny, of a quarter of the width and {tiny.epochs} epochs, is far quicker"
