"""What a training shows on its one line, and what it leaves of it where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from alexnet_cli.console import Reporter
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training.loop import TrainingLoop
from alexnet_cli.recipe import PAPER, TINY, Recipe
from alexnet_plugins.train.display import announce_stop, show_heading, show_records
from trainings import new_loop

RECIPE = replace(TINY, width=1 / 64, batch_size=16, precision="fp32")


def test_that_it_stops_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([None, "SIGTERM", "SIGTERM"])
    ask = announce_stop(Reporter("train"), lambda: next(answers))
    assert [ask(), ask(), ask()] == [None, "SIGTERM", "SIGTERM"]
    assert capsys.readouterr().err == "stop    SIGTERM: saving a checkpoint; Ctrl-C stops without saving\n"


@pytest.fixture
def training(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingLoop:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path))
    place = Placement(torch.device("cpu"), "CPU", "fp32")
    return new_loop(RECIPE, open_dataset(prepared), Run.create("r", RECIPE, {}), place, 1)


class Bar:
    """Counts, and keeps what it was given to show."""

    def __init__(self) -> None:
        self.done, self.notes = 0, list[str]()

    def advance(self, n: int, note: str = "") -> None:
        self.done += n
        self.notes.append(note)

    def skip(self, n: int) -> None:
        raise AssertionError("training skips nothing")


def step(number: int) -> Record:
    return Record(
        "step", 2, number, loss=1.25, lr=0.01, top1_error=0.5, top5_error=0.125, images_per_second=40.0, data_wait=0.02
    )


RECORDS = [
    Record("start", 2, 10, steps_per_epoch=8),
    Record("warning", 2, 15, text="smaller pieces", hint="as you like"),
    step(20),
    Record("checkpoint", 2, 20),
    step(23),
    Record("end", 2, 23, reason="Ctrl-C"),
]


@pytest.mark.parametrize(("classes", "errors"), [(4, "50.0%"), (6, "50.0/12.5%")])
def test_the_line_has_epoch_loss_errors_and_the_wait_for_data(
    training: TrainingLoop, classes: int, errors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    training.data = replace(training.data, classes=tuple(ClassName(str(i)) for i in range(classes)))
    bar = Bar()
    assert show_records(Reporter("train"), training, bar, 1000, iter(RECORDS)) == "Ctrl-C"
    assert bar.notes == [f"epoch 2/15  loss 1.25  error {errors}  data 2%"] * 2
    assert bar.done == (23 - 10) * 16  # a warning between two steps costs no image
    err = capsys.readouterr().err
    assert "resumed at epoch 2/15, step 10\n" in err
    assert "warn    smaller pieces\nhint    as you like\n" in err


def test_without_a_terminal_there_is_a_line_every_half_minute(
    training: TrainingLoop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def records() -> Iterator[Record]:
        yield Record("start", 1, 0, steps_per_epoch=8)
        for number in range(10, 70, 10):
            now[0] += 16
            yield step(number)
        yield Record("end", 2, 60, reason="finished")

    reporter = Reporter("train")
    with reporter.progress("train", total=1600) as bar:
        show_records(reporter, training, bar, 1600, records())
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("train")]
    assert lines[0] == "train   320/1,600 img  epoch 2/15  loss 1.25  error 50.0%  data 2%  10 img/s  eta 2m8s"
    assert [line.split()[1] for line in lines] == ["320/1,600", "640/1,600", "960/1,600"]  # the end is not told twice


@pytest.mark.parametrize(
    ("recipe", "seconds", "told"),
    [
        (
            PAPER,
            34_000,
            "9h26m on this CPU; --recipe tiny (a quarter of the width, 15 epochs) is much faster",
        ),
        (PAPER, 3_000, "50m0s on this CPU"),
        (TINY, 34_000, "9h26m on this CPU"),
    ],
)
def test_hours_name_the_quicker_recipe(
    training: TrainingLoop, recipe: Recipe, seconds: int, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    training.trainer.recipe = recipe
    records = [Record("start", 1, 0, steps_per_epoch=8), step(10)]
    show_records(Reporter("train"), training, Bar(), 40 * seconds, iter(records))
    assert capsys.readouterr().err == f"time    about {told}\n"


def test_what_was_changed_is_in_the_heading(training: TrainingLoop, capsys: pytest.CaptureFixture[str]) -> None:
    show_heading(Reporter("train"), training)
    assert capsys.readouterr().err.splitlines()[-1] == "changed width 0.015625 instead of 0.25"
    training.trainer.recipe = replace(RECIPE, name="mine", dropout=0.1)
    show_heading(Reporter("train"), training)
    *_, named, changed = capsys.readouterr().err.splitlines()
    assert named.startswith("recipe  mine · batch 16 ")
    assert changed == "changed width 0.015625 instead of 0.25 · dropout 0.1 instead of 0.2 · otherwise as recipe tiny"
    training.trainer.recipe = TINY
    show_heading(Reporter("train"), training)
    assert capsys.readouterr().err.splitlines()[-1].startswith("recipe  tiny ")


def test_a_finished_run_counts_nothing(training: TrainingLoop, capsys: pytest.CaptureFixture[str]) -> None:
    reporter = Reporter("train")
    with reporter.progress("train", total=0) as bar:
        show_records(reporter, training, bar, 0, iter([Record("start", 16, training.trainer.total_steps)]))
    told = "this run has finished its 15 epochs; to train longer: alexnet train --resume r --set epochs=30"
    assert capsys.readouterr().err == f"note    {told}\n"
