"""`alexnet ablate`: switch the paper's ideas off one at a time, on the user's own data, and compare them in a table."""

from __future__ import annotations

import math
import shlex
import statistics
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from alexnet_cli import recipe_io
from alexnet_cli.console import Progress, Reporter
from alexnet_cli.errors import PartialError, Stopped, storage_errors
from alexnet_cli.options import DataOption, GpusOption, JobsOption, JsonFlag, QuietFlag, SettingsOption, complete_recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.table import Table

    from alexnet_cli.recipe import Recipe
    from alexnet_plugins.experiments.study import AblationStudy, Cell, Switch
    from alexnet_plugins.experiments.table import Estimate, Row


def ablate(
    data: DataOption = None,
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe",
            help="Base recipe: paper, krizhevsky, caffe, fast, tiny, or a TOML file",
            autocompletion=complete_recipe,
        ),
    ] = "tiny",
    settings: SettingsOption = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Epochs of each training [default: the recipe's]")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per switch, with consecutive seeds")] = 3,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Train only the base and these switches: no-norm, norm-within-map, pool-2x2, one-tower, "
            "no-crops-flips, no-color-shift, no-dropout, no-weight-decay, no-conv3, no-conv4, tanh, sigmoid "
            "[default: all]",
        ),
    ] = None,
    training_error: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=99.9,
            metavar="PERCENT",
            help="Compare how many steps each activation needs to reach this error while learning",
        ),
    ] = 25.0,
    name: Annotated[str, typer.Option(help="Name of the results folder under runs/")] = "ablation",
    gpus: GpusOption = None,
    jobs: JobsOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Switch the paper's ideas off, one at a time.

    Measures the effect of each idea on your data: trains the base and every switch with each seed. After a stop or
    crash, repeat the command to continue; finished trainings are kept, also when you add seeds.
    """
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.parallel import placement
    from alexnet_cli.core.report import charts
    from alexnet_cli.core.signals import EXIT_CODES, catch_stop_signals
    from alexnet_plugins.experiments.study import AblationStudy, choose_switches, make_cells

    reporter = Reporter("ablate", json=json, quiet=quiet)
    base = recipe_io.apply_changes(recipe_io.load_recipe(recipe), recipe_io.parse_settings(settings or []))
    base = recipe_io.apply_changes(base, {"epochs": epochs} if epochs else {})
    switches, off = choose_switches(base, [word.strip() for word in only.split(",")] if only else [])
    dataset = open_dataset(find_dataset(data))
    place = placement.place(gpus, base.precision)
    command = ["alexnet", *sys.argv[1:]]
    study = AblationStudy.open(name, dataset, place, placement.choose_decode_threads(jobs), command)
    cells = make_cells(base, switches, seeds)
    finished = [cell for cell in cells if study.is_finished(cell)]
    _show_heading(reporter, study, base, off, f"{len(cells)} trainings, {len(finished)} of them finished")
    if not charts.can_draw():
        reporter.warn("no chart will be drawn: matplotlib is not installed", charts.INSTALL_HINT)
    with catch_stop_signals(None) as stop:
        reason = _train_all(reporter, study, cells, finished, stop, training_error / 100)
    rows = _report(reporter, study, training_error / 100, show=True)
    if reason:
        raise Stopped(
            f"stopped ({reason}); progress is saved in {study.folder}", shlex.join(command), EXIT_CODES[reason]
        )
    if diverged := sum(len(row.diverged) for row in rows):
        total = diverged + sum(len(row.seeds) for row in rows)
        what = f"{diverged} of {total} trainings diverged: their loss became NaN"
        raise PartialError(what, "lower the learning rate: --set learning_rate=..., with another --name")
    reporter.line("next", f"each training is a run: alexnet report -w {study.folder.name}/{cells[0].name}")


def _show_heading(reporter: Reporter, study: AblationStudy, base: Recipe, off: Sequence[Switch], count: str) -> None:
    for note in study.placement.notes:
        reporter.line("note", note)
    for switch in off:
        reporter.line("note", f"{switch.name} is skipped: recipe {base.name} already has {switch.settings}")
    train, val = (len(study.data.split(split)) for split in ("train", "val"))
    reporter.line("ablate", f"{study.folder} · {count}")
    reporter.line("data", f"{study.data.path} · {len(study.data.classes):,} classes · train {train:,} · val {val:,}")
    epochs = f"{base.epochs} epoch{'' if base.epochs == 1 else 's'}"
    reporter.line("recipe", f"{base.name} · {epochs} · {study.placement.name} · {study.placement.precision}")


def _train_all(
    reporter: Reporter,
    study: AblationStudy,
    cells: Sequence[Cell],
    finished: Sequence[Cell],
    stop: Callable[[], str | None],
    error: float,
) -> str | None:
    """Train the cells that are not finished. Returns the reason if it was stopped early."""
    from alexnet_cli.core.data.loader import steps_per_epoch

    images, recipe = len(study.data.split("train")), cells[0].recipe
    per_cell = steps_per_epoch(images, recipe.batch_size) * recipe.epochs * min(recipe.batch_size, images)
    with reporter.progress("ablate", total=per_cell * len(cells)) as bar:
        for number, cell in enumerate(cells, 1):
            if cell in finished:
                bar.skip(per_cell)
                continue
            if reason := stop():
                return reason
            is_first = all(earlier in finished for earlier in cells[: number - 1])
            if reason := _train(reporter, bar, study, cell, f"{number}/{len(cells)} {cell.name}", stop, is_first):
                return stop() or reason
            _report(reporter, study, error, show=False)
    return None


def _train(
    reporter: Reporter,
    bar: Progress,
    study: AblationStudy,
    cell: Cell,
    title: str,
    stop: Callable[[], str | None],
    is_first: bool,
) -> str | None:
    """Train one cell. Returns the reason if it was stopped. Warnings at step 0 are about the data: shown once."""
    done, last, reason = 0, None, None
    batch = min(cell.recipe.batch_size, len(study.data.split("train")))
    for record in study.train(cell, stop):
        if record.event == "start":
            bar.skip(record.step * batch)
        elif record.event == "step":
            note = f"{title}  epoch {record.epoch}/{cell.recipe.epochs}  loss {record.loss:.3g}"
            bar.advance((record.step - done) * batch, note)
        elif record.event == "warning" and (record.step or is_first):
            reporter.warn(f"{cell.name}: {record.text}", record.hint or "")
        elif record.event == "validation":
            last = record
        reason = record.reason
        done = record.step if record.event in ("start", "step") else done
    if reason is None:
        reporter.warn(f"{cell.name}: the loss became NaN; this training stops here")
    elif reason == "finished" and last and last.top1_error is not None:
        reporter.line("done", f"{title}  top-1 error {last.top1_error:.1%}")
    return None if reason in (None, "finished") else reason


def _report(reporter: Reporter, study: AblationStudy, error: float, *, show: bool) -> list[Row]:
    """Write the table of what has finished so far; with `show`, also draw the chart and print the table.

    Raises:
        StorageError: the files cannot be written.
    """
    from alexnet_cli.core.files import write_chunks
    from alexnet_cli.core.report import charts
    from alexnet_plugins.experiments import table
    from alexnet_plugins.experiments.study import SWITCHES, find_done_runs

    rows = table.build_rows(find_done_runs(study.folder, SWITCHES))
    if not rows:
        return rows
    images = len(study.data.split("val"))
    about = {"data": study.data.name, "data_hash": study.data.hash, "validation_images": images}
    contents = {
        "ablation.csv": table.format_csv(rows, error).encode(),
        "ablation.json": table.format_json(rows, about, error).encode(),
    }
    if show and charts.can_draw():
        title = f"{study.folder.name}: {study.data.name}, {images:,} validation images"
        contents["ablation.png"] = table.draw_chart(rows, title, error)
    for name, content in contents.items():
        with storage_errors(study.folder / name, "free some space"):
            write_chunks(study.folder / name, [content])
    if show:
        reporter.result({
            "path": str(study.folder), **about, "training_error": error,
            "rows": [table.row_to_dict(row, error) for row in rows],
            "files": [str(study.folder / name) for name in contents],
        })  # fmt: skip
        reporter.show(_make_table(rows))
        for line in _explain_table(rows, images, error):
            reporter.show(line)
        for name in contents:
            reporter.line("saved", str(study.folder / name))
    return rows


def _make_table(rows: list[Row]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("switch", no_wrap=True)
    for heading in ("n", "top-1 error", "spread", "training", "difference", "gap"):
        table.add_column(heading, justify="right")
    for heading in ("the paper", "verdict"):
        table.add_column(heading)
    for row in rows:
        top1, train_top1 = row.top1, row.train_top1
        n = f"{len(row.seeds)}" + (f" ({len(row.diverged)} diverged)" if row.diverged else "")
        table.add_row(
            row.switch.name, n, f"{top1.mean:.1%}" if top1 else "-", _format_points(top1.spread) if top1 else "-",
            f"{train_top1.mean:.1%}" if train_top1 else "-", _format_difference(row.top1_difference),
            _format_difference(row.gap_difference), row.switch.paper, row.verdict or "",
        )  # fmt: skip
    return table


def _format_points(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _format_difference(difference: Estimate | None) -> str:
    """Format a difference in percentage points, such as +1.4 ± 0.6."""
    if difference is None:
        return ""
    return f"{100 * difference.mean:+.1f}" + ("" if difference.half is None else f" ± {100 * difference.half:.1f}")


def _explain_table(rows: list[Row], images: int, error: float) -> list[str]:
    """Return sentences on what the numbers mean and how fast each activation learned."""
    from alexnet_plugins.experiments.table import count_steps_by_activation

    means = [row.top1.mean for row in rows if row.top1]
    mean = statistics.fmean(means) if means else 0.5
    half = 1.96 * math.sqrt(mean * (1 - mean) / images)
    lines = [
        "training: the error on the training images after training, without dropout, center view.",
        "difference: from the base in percentage points, paired by seed, ± half of the 95 % interval over seeds.",
        "gap: the same for top-1 error minus training error, which shows overfitting.",
        "the paper: top-1 / top-5 difference on ILSVRC.",
        f"All errors are on the same {images:,} images; on others each could differ by {100 * half:.1f} points.",
    ]
    differences = [row.top1_difference for row in rows if row.top1_difference]
    if any(difference.half is not None for difference in differences):
        lines.append("verdict: does the error rise as the paper says? For no-crops-flips and no-dropout: the gap;")
        lines.append("for no-weight-decay: the training error.")
    elif differences:
        lines.append("One seed gives no interval and no verdict; use --seeds 3 for both.")
    steps_by_activation = {name: steps for name, steps in count_steps_by_activation(rows, error).items() if steps}
    if len(steps_by_activation) == 1:
        lines.append("Figure 1 of the paper compares activations; use --only tanh,sigmoid to train others.")
    elif steps_by_activation:
        parts = [f"{name} {_format_steps(steps)}" for name, steps in steps_by_activation.items()]
        lines.append(f"Training error of {error:.0%} is reached: {', '.join(parts)}.")
    return lines


def _format_steps(steps: list[int | None]) -> str:
    """Format the mean number of steps, or how many of the trainings reached the error."""
    reached = [step for step in steps if step is not None]
    if len(reached) < len(steps):
        return f"in {len(reached)} of {len(steps)} trainings"
    return f"after {statistics.fmean(reached):,.0f} steps"
