"""`alexnet ablate`: the paper's ideas switched off one at a time, on one's own data, as one table."""

from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from alexnet_cli import recipe as recipes
from alexnet_cli.console import Progress, Reporter
from alexnet_cli.errors import PartialError, Stopped
from alexnet_cli.options import DataOption, GpusOption, JobsOption, JsonFlag, QuietFlag
from alexnet_plugins.ablate_table import report

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from alexnet_cli.core.ablation import Ablation, Cell
    from alexnet_cli.core.switches import Switch
    from alexnet_cli.recipe import Recipe


def ablate(
    data: DataOption = None,
    recipe: Annotated[
        str, typer.Option("--recipe", help="The base: paper, krizhevsky, caffe, fast, tiny, or a TOML file.")
    ] = "tiny",
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one value of the base. Repeatable.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the training set, each time.")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=30, help="Trainings of each, from the base's seed on.")] = 3,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Train these switches alone, with the base: no-norm, norm-within-map, pool-2x2, one-tower, "
            "no-crops-flips, no-colour-shift, no-dropout, tanh, sigmoid. [default: all]",
        ),
    ] = None,
    training_error: Annotated[
        float, typer.Option(min=0.1, max=99.9, metavar="PERCENT", help="Count each activation's steps to this.")
    ] = 25.0,
    name: Annotated[str, typer.Option(help="Name of the folder under runs/.")] = "ablation",
    gpus: GpusOption = None,
    jobs: JobsOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Switch the paper's ideas off, one at a time.

    Measures what each is worth on your data: trains the base and every switch with each seed. Stopped or killed, the
    same command goes on; what is finished is not trained again, and more seeds may follow.
    """
    from alexnet_cli.core import placement, plotting, switches
    from alexnet_cli.core.ablation import Ablation, cells
    from alexnet_cli.core.shards import find_dataset, open_dataset
    from alexnet_cli.core.signals import EXIT_CODES, catch_stop_signals

    level = training_error / 100
    reporter = Reporter("ablate", json=json, quiet=quiet)
    base = recipes.changed(recipes.load(recipe), recipes.parsed(settings or []))
    base = recipes.changed(base, {"epochs": epochs} if epochs else {})
    wanted, off = switches.chosen(base, [word.strip() for word in only.split(",")] if only else [])
    dataset = open_dataset(find_dataset(data))
    place = placement.place(gpus, base.precision)
    made = Ablation.open(name, dataset, place, placement.threads_for_decoding(jobs), ["alexnet", *sys.argv[1:]])
    todo = cells(base, wanted, seeds)
    done = [cell for cell in todo if made.finished(cell)]
    _heading(reporter, made, base, off, f"{len(todo)} trainings, {len(done)} of them finished")
    if not plotting.can_draw():
        reporter.warn("no chart will be drawn: matplotlib is not installed", plotting.HINT)
    with catch_stop_signals(None) as stop:
        reason = _train_all(reporter, made, todo, done, stop, level)
    rows = report(reporter, made, level, show=True)
    if reason:
        again = shlex.join(["alexnet", *sys.argv[1:]])
        raise Stopped(f"stopped ({reason}): what was learned is saved in {made.folder}", again, EXIT_CODES[reason])
    if broken := sum(len(row.diverged) for row in rows):
        every = broken + sum(len(row.seeds) for row in rows)
        what = f"{broken} of {every} trainings broke down: their loss became no number"
        raise PartialError(what, "a lower rate for all: --set learning_rate=..., with another --name")
    reporter.line("next", f"each training is a run: alexnet report -w {made.folder.name}/{todo[0].name}")


def _heading(reporter: Reporter, made: Ablation, base: Recipe, off: Sequence[Switch], count: str) -> None:
    for note in made.placement.notes:
        reporter.line("note", note)
    for switch in off:
        reporter.line("note", f"{switch.name} is left out: recipe {base.name} has {switch.settings} already")
    train, val = (len(made.data.split(split)) for split in ("train", "val"))
    reporter.line("ablate", f"{made.folder} · {count}")
    reporter.line("data", f"{made.data.path} · {len(made.data.classes):,} classes · train {train:,} · val {val:,}")
    epochs = f"{base.epochs} epoch{'' if base.epochs == 1 else 's'}"
    reporter.line("recipe", f"{base.name} · {epochs} · {made.placement.name} · {made.placement.precision}")


def _train_all(
    reporter: Reporter,
    made: Ablation,
    todo: Sequence[Cell],
    done: Sequence[Cell],
    stop: Callable[[], str | None],
    error: float,
) -> str | None:
    """Train what is not finished. Returns the reason to stop early, if there was one."""
    from alexnet_cli.core.loader import steps_per_epoch

    rows = len(made.data.split("train"))
    recipe = todo[0].recipe
    each = steps_per_epoch(rows, recipe.batch_size) * recipe.epochs * min(recipe.batch_size, rows)
    with reporter.progress("ablate", total=each * len(todo)) as bar:
        first = True
        for number, cell in enumerate(todo, 1):
            if cell in done:
                bar.skip(each)
                continue
            if stop() or (
                reason := _train(reporter, bar, made, cell, f"{number}/{len(todo)} {cell.name}", stop, first)
            ):
                return stop() or reason
            report(reporter, made, error, show=False)
            first = False
    return None


def _train(
    reporter: Reporter,
    bar: Progress,
    made: Ablation,
    cell: Cell,
    title: str,
    stop: Callable[[], str | None],
    first: bool,
) -> str | None:
    """Train one cell. Returns the reason to stop, if it was stopped. Advice on the data is for the `first` alone."""
    done, last, reason = 0, None, None
    batch = min(cell.recipe.batch_size, len(made.data.split("train")))
    for record in made.train(cell, stop):
        if record.event == "start":
            bar.skip(record.step * batch)
        elif record.event == "step":
            note = f"{title}  epoch {record.epoch}/{cell.recipe.epochs}  loss {record.loss:.3g}"
            bar.advance((record.step - done) * batch, note)
        elif record.event == "warning" and (record.step or first):
            reporter.warn(f"{cell.name}: {record.text}", record.hint or "")
        elif record.event == "validation":
            last = record
        reason = record.reason
        done = record.step if record.event in ("start", "step") else done
    if reason is None:
        reporter.warn(f"{cell.name}: the loss is not a number any more; its row will say so")
    elif reason == "finished" and last and last.top1_error is not None:
        reporter.line("done", f"{title}  top-1 error {last.top1_error:.1%}")
    return None if reason in (None, "finished") else reason
