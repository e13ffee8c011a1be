"""An ablation: the base and each of the paper's ideas turned off, trained with several seeds.

runs/NAME/SWITCH-seedN/   each cell is a run as any other: `-w NAME/SWITCH-seedN` means it
runs/NAME/ablation.*      the table, as CSV, JSON and picture

Two cells of one seed have the same initial values, order of pictures, crops and dropout masks, as far as their switch
leaves them: differences are taken in pairs.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from alexnet_cli import __version__
from alexnet_cli.core.checkpoint import find_newest
from alexnet_cli.core.loop import TrainingLoop
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.records import Record
from alexnet_cli.core.runs import RUNNING, Run, is_plain, record_failure, runs_root
from alexnet_cli.core.shards import Dataset
from alexnet_cli.core.switches import SWITCHES, Switch
from alexnet_cli.core.trainer import Trainer
from alexnet_cli.errors import DataError, StorageError, UsageError, VerificationError
from alexnet_cli.recipe import Recipe

DIVERGED = "the loss is not a number"


@dataclass(frozen=True)
class Cell:
    """One training of an ablation: a switch and a seed."""

    switch: Switch
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of its run, inside the folder of the ablation."""
        return f"{self.switch.name}-seed{self.recipe.seed}"


@dataclass(frozen=True)
class Ablation:
    """A folder of cells, and all they share. `command` is what was typed, for run.json."""

    folder: Path
    data: Dataset
    placement: Placement
    threads: int
    command: Sequence[str]

    @classmethod
    def open(
        cls, name: str, data: Dataset, placement: Placement, threads: int, command: Sequence[str] = ()
    ) -> Ablation:
        """The ablation of that name, which need not be there yet.

        Raises:
            UsageError: the name is no plain name, or that of a run.
            DataError: a split has no images.
        """
        folder = runs_root() / name
        if not is_plain(name):
            raise UsageError(f"--name {name!r} is not a plain name", "letters, digits, '-' and '_' do well")
        if (folder / "run.json").exists():
            raise UsageError(f"{folder} is a run, not an ablation", "choose another --name")
        for split in ("train", "val"):
            if not len(data.split(split)):
                raise DataError(
                    f"{data.path}: split {split} holds no images", "prepare it anew with --val-fraction 0.1"
                )
        return cls(folder, data, placement, threads, command)

    def finished(self, cell: Cell) -> bool:
        """Whether there is nothing left to train.

        Raises:
            UsageError: the folder holds a cell of that name that is trained otherwise.
        """
        run = self._run(cell.name)
        if run is None:
            return False
        self._check(run, cell)
        return run.about.get("status") == "finished" or diverged(run)

    def train(self, cell: Cell, stop: Callable[[], str | None]) -> Iterator[Record]:
        """Train a cell, or go on with it from its newest checkpoint; the records of `TrainingLoop.fit`.

        Where the loss is not a number any more the records end, and the run says so.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        run = self._run(cell.name) or Run.create(cell.name, cell.recipe, self._about(cell), self.folder)
        with run.locked():
            run.update(RUNNING)
            trainer = Trainer.for_dataset(cell.recipe, self.data, self.placement)
            loop = TrainingLoop(trainer, self.data, run, self.threads)
            start, _ = find_newest(run)
            reason = None
            try:
                for record in loop.fit(start, stop=stop):
                    reason = record.reason
                    yield record
            except VerificationError as error:
                record_failure(run, error, DIVERGED)
                run.update({"status": "failed", "reason": DIVERGED})  # or the disk's error is that of the ablation
                return
            except Exception as error:
                record_failure(run, error)
                raise
            except BaseException:  # a second Ctrl-C, or nobody wants more records
                with suppress(StorageError):
                    run.update({"status": "interrupted", "reason": "stopped"})
                raise
            run.update({"status": "finished" if reason == "finished" else "interrupted", "reason": reason})

    def runs(self) -> dict[Switch, dict[int, Run]]:
        """The finished cells of the folder, those of an earlier call too: switch -> seed -> run."""
        found: dict[Switch, dict[int, Run]] = {}
        for switch in SWITCHES:
            runs = [Run(path.parent) for path in self.folder.glob(f"{switch.name}-seed*/run.json")]
            done = {run.recipe.seed: run for run in runs if run.about.get("status") == "finished" or diverged(run)}
            if done:
                found[switch] = dict(sorted(done.items()))
        return found

    def _run(self, name: str) -> Run | None:
        return Run(self.folder / name) if (self.folder / name / "run.json").is_file() else None

    def _check(self, run: Run, cell: Cell) -> None:
        """Whoever changes the recipe or the data compares what cannot be compared."""
        if run.about.get("data_hash") != self.data.hash:
            raise UsageError(f"{self.folder} was trained on other data than {self.data.path}", "choose another --name")
        if (was := run.recipe) != cell.recipe:
            key = next(k for k, v in vars(cell.recipe).items() if getattr(was, k) != v)
            there, here = getattr(was, key), getattr(cell.recipe, key)
            raise UsageError(f"{run.path} was trained with {key} = {there}, not {here}", "choose another --name")

    def _about(self, cell: Cell) -> dict[str, Any]:
        """What run.json says beside the status."""
        packages = ("torch", "torchvision", "numpy", "simplejpeg")
        return {
            "command": list(self.command),
            "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "versions": {"alexnet": __version__, "python": sys.version.split()[0]}
            | {name: version(name) for name in packages},
            "devices": [self.placement.name],
            "precision": self.placement.precision,
            "data": self.data.name,
            "data_path": str(self.data.path.resolve()),
            "data_hash": self.data.hash,
            "seed": cell.recipe.seed,
        }


def cells(base: Recipe, switches: Sequence[Switch], seeds: int) -> list[Cell]:
    """All trainings, seed by seed: after the first seed there is a table already."""
    recipes = [replace(base, seed=base.seed + i) for i in range(seeds)]
    return [Cell(switch, switch.applied(recipe)) for recipe in recipes for switch in switches]


def diverged(run: Run) -> bool:
    """Whether the training broke down; the same seed would break down again."""
    return run.about.get("status") == "failed" and run.about.get("reason") == DIVERGED
