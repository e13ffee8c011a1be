"""An ablation study: the base recipe and each of the paper's ideas turned off, trained with several seeds.

    runs/NAME/SWITCH-seedN/      each cell is a run like any other: `-w NAME/SWITCH-seedN`
    .../training_images.json     its errors on the training images, measured as on the validation images
    .../ten_views.json           its errors on the validation images with ten views, where an experiment asked for them
    runs/NAME/ablation.*         the table, as CSV, JSON and chart

Cells with the same seed share initial weights, data order, crops and dropout masks as far as their switches allow.
Differences are therefore taken in pairs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from alexnet_cli.core.data.shards import Dataset, find_dataset, open_dataset
from alexnet_cli.core.evaluation.evaluate import Evaluation
from alexnet_cli.core.files import read_link, write_text
from alexnet_cli.core.parallel.placement import Placement, choose_decode_threads
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.run import Run, is_plain_name, record_failure, record_status, runs_root
from alexnet_cli.core.training.checkpoint import find_newest
from alexnet_cli.core.training.loop import TrainingLoop, describe_training
from alexnet_cli.core.training.trainer import Trainer
from alexnet_cli.errors import DataError, UsageError, VerificationError, suggest_name
from alexnet_cli.recipe import Recipe, compare_recipes, format_toml
from alexnet_cli.recipe_io import apply_changes
from alexnet_plugins.experiments.experiment import Job

DIVERGED = "the loss is not a number"
TEN_VIEWS, TRAINING_IMAGES = "ten_views.json", "training_images.json"
IMAGENETTE = (10, 9_469, 3_925)  # classes, training and validation images


@dataclass(frozen=True, eq=False)
class Switch:
    """One idea of the paper turned off: the recipe's `changes`, the section, and the paper's claim.

    `paper` is the claim in words; `top1` and `top5` are the errors it adds, as shares of the images, measured on
    ILSVRC with ten views. `raises` is the measure that the paper says is higher without the idea, with or without a
    number; the gap, which shows overfitting, is the top-1 error minus the training error.
    """

    name: str
    section: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    paper: str = ""
    top1: float | None = None
    top5: float | None = None
    raises: Literal["top-1 error", "training error", "gap"] | None = None

    @property
    def settings(self) -> str:
        """The changes as typed after --set."""
        return " ".join(f"{key}={v if isinstance(v, str) else format_toml(v)}" for key, v in self.changes.items())

    def apply(self, base: Recipe) -> Recipe:
        """Return the base with the idea turned off."""
        return apply_changes(base, self.changes)


BASE = Switch("base", "-")
OVERFITTING = "substantial overfitting"
SWITCHES: tuple[Switch, ...] = (
    BASE,
    # the authors' net #148, without normalization, lacks the extra one in stage 2 too
    Switch("no-norm", "3.3", {"lrn": "none", "within_norm_2": False}, "+1.4 / +1.2", 0.014, 0.012, "top-1 error"),
    Switch("norm-within-map", "3.3", {"lrn": "within-map"}),
    Switch("pool-2x2", "3.4", {"pool_size": 2}, "+0.4 / +0.3", 0.004, 0.003, "top-1 error"),
    Switch("one-tower", "3.2", {"towers": 1}, "+1.7 / +1.2", 0.017, 0.012, "top-1 error"),
    Switch("no-crops-flips", "4.1", {"crops": False, "flips": False}, OVERFITTING, raises="gap"),
    Switch("no-color-shift", "4.1", {"color_shift": 0.0}, "more than +1", 0.01, raises="top-1 error"),
    Switch("no-dropout", "4.2", {"dropout": 0.0}, OVERFITTING, raises="gap"),
    Switch("no-weight-decay", "5", {"weight_decay": 0.0}, "a higher training error", raises="training error"),
    Switch("no-conv3", "7", {"left_out_layers": ["conv3"]}, "about +2", 0.02, raises="top-1 error"),
    Switch("no-conv4", "7", {"left_out_layers": ["conv4"]}, "about +2", 0.02, raises="top-1 error"),
    Switch("tanh", "3.1", {"activation": "tanh"}, "6 times the steps"),
    Switch("sigmoid", "3.1", {"activation": "sigmoid"}),
)


def choose_switches(base: Recipe, only: Sequence[str] = ()) -> tuple[list[Switch], list[Switch]]:
    """Return the switches to train, the base first, and those left out because the base has the idea off already.

    `only` holds names of switches; if it is empty, all are used.

    Raises:
        UsageError: a name is unknown.
    """
    names = [switch.name for switch in SWITCHES]
    for name in only:
        if name not in names:
            meant = [switch.name for switch in SWITCHES if name in switch.changes]  # a recipe key
            guess = suggest_name(name, names, meant)
            raise UsageError(f"--only {name}: no such switch", f"{guess}there are: {', '.join(names)}")
    wanted = [switch for switch in SWITCHES if not only or switch is BASE or switch.name in only]
    off = [switch for switch in wanted if switch is not BASE and switch.apply(base) == base]
    return [switch for switch in wanted if switch not in off], off


@dataclass(frozen=True)
class Cell:
    """One training of the study: a switch and, in its recipe, a seed."""

    switch: Switch
    recipe: Recipe

    @property
    def name(self) -> str:
        """Name of its run inside the study's folder."""
        return f"{self.switch.name}-seed{self.recipe.seed}"


def make_cells(base: Recipe, switches: Sequence[Switch], seeds: int) -> list[Cell]:
    """Return all trainings, seed by seed, so that the first seed already gives a whole table."""
    recipes = [replace(base, seed=base.seed + i) for i in range(seeds)]
    return [Cell(switch, switch.apply(recipe)) for recipe in recipes for switch in switches]


@dataclass(frozen=True)
class AblationStudy:
    """A folder of cells and what they share. `command` is the command line, for run.json."""

    folder: Path
    data: Dataset
    placement: Placement
    threads: int
    command: Sequence[str]

    @classmethod
    def open(
        cls, name: str, data: Dataset, placement: Placement, threads: int, command: Sequence[str] = ()
    ) -> AblationStudy:
        """Return the study of that name, which need not exist yet.

        Raises:
            UsageError: the name is not a plain name, or is that of a run.
            DataError: a split has no images.
        """
        folder = runs_root() / name
        if not is_plain_name(name):
            raise UsageError(f"--name {name!r} is not a plain name", "use letters, digits, '-' and '_'")
        if (folder / "run.json").exists():
            raise UsageError(f"{folder} is a run, not an ablation", "choose another --name")
        for split in ("train", "val"):
            data.nonempty_split(split)
        return cls(folder, data, placement, threads, command)

    def is_finished(self, cell: Cell) -> bool:
        """Return whether the cell needs no more training.

        Raises:
            UsageError: the folder has this cell with another recipe or data set.
        """
        run = self._find_run(cell)
        if run is None:
            return False
        self._check_same_training(run, cell)
        is_measured = run.about.get("status") == "failed" or (run.path / TRAINING_IMAGES).exists()
        return is_done(run) and (is_measured or not any(run.checkpoints.glob("*")))  # published runs have none

    def train(self, cell: Cell, stop: Callable[[], str | None]) -> Iterator[Record]:
        """Train a cell, from its newest checkpoint if there is one; yields the records of `TrainingLoop.fit`.

        Then write its errors on the training images to `TRAINING_IMAGES`. If the loss becomes NaN, the records end and
        the run's status says so.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        run = self._find_run(cell)
        if run is None:
            about = describe_training(self.command, self.placement, self.data, cell.recipe)
            run = Run.create(cell.name, cell.recipe, about, self.folder)
        with record_status(run):
            loop, (start, _) = self._make_loop(run, cell.recipe), find_newest(run)
            try:
                yield from loop.fit(start, stop=stop)
            except VerificationError as error:
                record_failure(run, error, DIVERGED)
            if run.records()[-1].get("reason") == "finished":
                _write_errors(run, TRAINING_IMAGES, loop.validate(stop, split_name="train"))

    def evaluate_ten_views(self, run: Run, stop: Callable[[], str | None]) -> None:
        """Write the errors of a finished run's last epoch with ten views to `TEN_VIEWS` in the run, unless stopped.

        Raises:
            WeightsError: its last checkpoint is missing or damaged.
            StorageError: the file cannot be written.
        """
        loop, last = self._make_loop(run, run.recipe), run.checkpoints / "last"
        loop.restore(read_link(last) or last)
        _write_errors(run, TEN_VIEWS, loop.validate(stop, views=10))

    def _make_loop(self, run: Run, recipe: Recipe) -> TrainingLoop:
        trainer = Trainer.for_dataset(recipe, self.data, self.placement)
        return TrainingLoop(trainer, self.data, run, self.threads)

    def _find_run(self, cell: Cell) -> Run | None:
        path = self.folder / cell.name
        return Run(path) if (path / "run.json").is_file() else None

    def _check_same_training(self, run: Run, cell: Cell) -> None:
        if run.about.get("data_hash") != self.data.hash:
            raise UsageError(
                f"{self.folder} was trained on a different data set than {self.data.path}", f"rename {self.folder}"
            )
        if differences := compare_recipes(run.recipe, cell.recipe):
            key, (old, new) = next(iter(differences.items()))
            raise UsageError(f"{run.path} was trained with {key} = {old}, not {new}", f"rename {self.folder}")


def _write_errors(run: Run, file: str, evaluation: Evaluation | None) -> None:
    if evaluation is not None:
        errors = {"top1_error": evaluation.top1_error, "top5_error": evaluation.top5_error}
        with run.storing():
            write_text(run.path / file, json.dumps(errors) + "\n")


def find_done_runs(folder: Path, switches: Sequence[Switch]) -> dict[Switch, dict[int, Run]]:
    """Return the trained cells in a study's folder, those of earlier calls included: switch -> seed -> run."""
    runs_by_switch: dict[Switch, dict[int, Run]] = {}
    for switch in switches:
        runs = [Run(path.parent) for path in folder.glob(f"{switch.name}-seed*/run.json")]
        if done := {run.recipe.seed: run for run in runs if is_done(run)}:
            runs_by_switch[switch] = dict(sorted(done.items()))
    return runs_by_switch


def list_missing(done: Mapping[Switch, Mapping[int, object]], switches: Sequence[Switch], seeds: int) -> list[str]:
    """Return a line for each switch that has fewer than `seeds` trainings."""
    counts = {switch.name: len(done.get(switch, {})) for switch in switches}
    return [f"{name}: {seeds - count} of {seeds} seeds" for name, count in counts.items() if count < seeds]


def list_diverged(runs_by_switch: Mapping[Switch, Mapping[int, Run]]) -> list[str]:
    """Return the names of the trainings that diverged."""
    return [
        f"{switch.name} seed {seed}"
        for switch, runs in runs_by_switch.items()
        for seed, run in runs.items()
        if run.about.get("status") == "failed"
    ]


def list_machines(runs_by_switch: Mapping[Switch, Mapping[int, Run]]) -> list[str]:
    """Return devices, precision and versions of these trainings, each once."""
    abouts = [run.about for runs in runs_by_switch.values() for run in runs.values()]
    return sorted({
        f"{', '.join(about['devices'])}, {about['precision']}; alexnet {about['versions']['alexnet']}, Python "
        f"{about['versions']['python']}, torch {about['versions']['torch']}"
        for about in abouts
    })  # fmt: skip


def open_imagenette(job: Job) -> AblationStudy:
    """Open the study of an experiment's job on prepared Imagenette.

    Raises:
        DataError: the data set is not Imagenette.
    """
    data, threads = open_dataset(find_dataset(str(job.data))), choose_decode_threads(None)
    counts = len(data.classes), len(data.split("train")), len(data.split("val"))
    if counts != IMAGENETTE:
        found, expected = (
            "{} classes, {:,} training and {:,} validation images".format(*c) for c in (counts, IMAGENETTE)
        )
        hint = "alexnet prepare imagenette2-320 makes it; see docs/data.md"
        raise DataError(f"{data.path} is not Imagenette: it has {found}, not {expected}", hint)
    return AblationStudy(job.folder, data, job.placement, threads, job.command)


def train_cells(job: Job, study: AblationStudy, cells: Sequence[Cell]) -> None:
    """Train the cells of an experiment that are not finished, until the job is stopped."""
    for cell in cells:
        if job.stop() is not None:
            return
        if study.is_finished(cell):
            continue
        done, batch = 0, min(cell.recipe.batch_size, len(study.data.split("train")))
        for record in study.train(cell, job.stop):
            if record.event == "step":
                job.advance((record.step - done) * batch, f"{cell.name}  epoch {record.epoch}  loss {record.loss:.3g}")
            done = record.step if record.event in ("start", "step") else done


def is_done(run: Run) -> bool:
    """Return whether a training finished or diverged; the same seed would diverge again."""
    status, reason = run.about.get("status"), run.about.get("reason")
    return status == "finished" or (status == "failed" and reason == DIVERGED)
