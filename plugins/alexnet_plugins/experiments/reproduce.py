"""`alexnet reproduce`: the paper's own experiments on real data, one command each, the paper's number beside ours."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import Stopped, StorageError, UsageError, suggest_name
from alexnet_cli.options import GpusOption, JsonFlag, QuietFlag

if TYPE_CHECKING:
    from collections.abc import Sequence

    from alexnet_plugins.experiments.experiment import Experiment


OTHER_COMMANDS = {  # figures of a network that is trained already
    "figure-3": "alexnet visualize-filters -w RUN",
    "figure-4": "alexnet predict IMAGES -w RUN, alexnet neighbors IMAGES -w RUN",
}


def reproduce(
    name: Annotated[
        str | None, typer.Argument(metavar="EXPERIMENT", help="Experiment to run [default: list them]")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="The experiment's data: CIFAR-10's folder, or a prepared data set", show_default=False),
    ] = None,
    gpus: GpusOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Repeat an experiment of the paper.

    Writes a page, tables and a chart to runs/EXPERIMENT. After a stop or crash, repeat the command to continue.
    """
    from alexnet_cli.core.files import lock_file
    from alexnet_cli.core.parallel.placement import place
    from alexnet_cli.core.runs.run import runs_root
    from alexnet_cli.core.signals import EXIT_CODES, catch_stop_signals
    from alexnet_plugins.experiments.experiment import Job, write_result

    reporter = Reporter("reproduce", json=json, quiet=quiet)
    experiments = _load_experiments()
    if name is None:
        _list_experiments(reporter, experiments)
        return
    experiment = _find_experiment(experiments, name)
    if data is None:
        raise UsageError(f"{name} needs {experiment.data}", f"alexnet reproduce {name} --data DIR; see docs/data.md")
    command = ["alexnet", *sys.argv[1:]]
    folder = runs_root() / name
    reporter.line("claim", experiment.claim)
    reporter.line("folder", str(folder))
    placement = place(gpus, "bf16")
    for note in placement.notes:
        reporter.line("note", note)
    with catch_stop_signals(None) as stop, reporter.progress(name, total=None) as bar:
        job = Job(data, folder, placement, command, stop, bar.advance)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if (folder / "run.json").exists():
                raise UsageError(f"{folder} is a run, not an experiment", "rename it")
            with lock_file(folder / ".lock", f"{folder} is in use: another process runs {name}", UsageError):
                experiment.train(job)
                result = experiment.conclude(folder)
                files = write_result(experiment, result, job)
        except OSError as error:
            hint = "mend the disk or its permissions, then repeat the command"
            raise StorageError(f"{error.filename or folder}: {error.strerror or error}", hint) from error
        reason = stop()
    reporter.result({
        "experiment": name, "verdict": result.verdict, "finding": result.finding, "missing": list(result.missing),
        "files": [str(file) for file in files],
    })  # fmt: skip
    reporter.show(f"{result.verdict}: {result.finding}")
    for missing in result.missing:
        reporter.line("missing", missing)
    reporter.line("saved", f"{folder / 'index.html'}: open it in a browser")
    if reason:
        raise Stopped(f"stopped ({reason}); progress is saved in {folder}", shlex.join(command), EXIT_CODES[reason])


def _load_experiments() -> Sequence[Experiment]:
    from alexnet_plugins.experiments.ablation import ABLATION
    from alexnet_plugins.experiments.cifar_norm import CIFAR_NORM
    from alexnet_plugins.experiments.figure_1 import FIGURE_1, FIGURE_1_SHORT
    from alexnet_plugins.experiments.towers import TOWERS

    return (FIGURE_1_SHORT, FIGURE_1, CIFAR_NORM, TOWERS, ABLATION)


def _find_experiment(experiments: Sequence[Experiment], name: str) -> Experiment:
    names = [experiment.name for experiment in experiments]
    if name in OTHER_COMMANDS:
        raise UsageError(f"{name} is drawn by another command", OTHER_COMMANDS[name])
    if name not in names:
        raise UsageError(f"{name}: no such experiment", f"{suggest_name(name, names)}there are: {', '.join(names)}")
    return experiments[names.index(name)]


def _list_experiments(reporter: Reporter, experiments: Sequence[Experiment]) -> None:
    from rich.table import Table

    keys = ("name", "section", "claim", "data", "time", "found")
    rows = [{key: getattr(experiment, key) for key in keys} for experiment in experiments]
    reporter.result({"experiments": rows})
    table = Table(box=None, pad_edge=False)
    for heading in ("experiment", "section", "the paper says", "data", "time", "found here"):
        table.add_column(heading)
    for row in rows:
        table.add_row(*row.values())
    reporter.show(table)
    for figure, command in OTHER_COMMANDS.items():
        reporter.line(figure, command)
