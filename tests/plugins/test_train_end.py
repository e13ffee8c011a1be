"""How `alexnet train` begins and ends: which data, what the best error is worth, what went wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_cli.console import Reporter
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.run import RUNNING, Run
from alexnet_cli.core.training import diagnostics
from alexnet_cli.errors import DataError, Stopped, StorageError
from alexnet_cli.recipe import TINY
from alexnet_plugins.train.display import describe_result, record_errors
from alexnet_plugins.train.setup import choose_data
from trainings import new_loop

RECIPE = replace(TINY, width=1 / 64, batch_size=16, precision="fp32")


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_of_several_prepared_sets_the_newest_is_named_and_the_others(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b"):
        shutil.copytree(prepared, tmp_path / "prepared" / name)
        if name == "a":
            assert choose_data(None, None) == (Path("prepared/a"), "")
    (tmp_path / "prepared" / "latest").symlink_to("b")
    assert choose_data(None, None) == (
        Path("prepared/b"),
        "prepared/b is the newest prepared data set; --data selects another: a",
    )
    assert choose_data("a", None) == (Path("prepared/a"), "")
    run = Run.create("r", TINY, {"data_path": str(prepared)})
    assert choose_data(None, run) == (prepared, "")
    moved = Run.create("moved", TINY, {"data_path": "/nowhere/prepared/a", "data_hash": open_dataset(prepared).hash})
    (tmp_path / "prepared" / "a" / "dataset.json").write_text("{}", encoding="utf-8")
    assert choose_data(None, moved) == (Path("prepared/b"), "")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # the run's own project has it
    assert choose_data(None, Run.open(str(tmp_path / "runs" / "moved"))) == (tmp_path / "prepared" / "b", "")
    monkeypatch.chdir(tmp_path)
    lost = Run.create("lost", TINY, {"data_path": "/nowhere/prepared/a", "data_hash": "another"})
    with pytest.raises(DataError, match="no prepared data set /nowhere/prepared/a"):
        choose_data(None, lost)
    monkeypatch.setenv("ALEXNET_DATA", "a")
    assert choose_data(None, None) == (Path("prepared/a"), "")


@pytest.mark.parametrize(
    ("best", "steps", "reached", "way_on"),
    [
        (0.05, 300, "5.0% of 20 images (95 % interval 0.9% to 23.6%)", "alexnet evaluate"),
        (0.75, 300, "75.0% of 20 images (95 % interval 53.1% to 88.8%), no better than guessing (75.0%)", "48 train"),
        (0.6, 3, "60.0% of 20 images (95 % interval 38.7% to 78.1%), not certainly better than guessing", "3 steps"),
        (None, 3, "", "alexnet evaluate"),
    ],
)
def test_an_error_of_guessing_is_no_achievement(
    prepared: Path, best: float | None, steps: int, reached: str, way_on: str
) -> None:
    place = Placement(torch.device("cpu"), "CPU", "fp32")
    training = new_loop(RECIPE, open_dataset(prepared), Run.create("r", RECIPE, {}), place, 1)
    training.trainer.steps_done = steps
    training.best = (best, 0.7) if best is not None else None
    said = describe_result(training)
    assert said[0].startswith(f" · best epoch: top-1 error {reached}" if reached else "")
    assert said[1].startswith(way_on)


def test_a_network_that_answers_one_class_is_told_when_training_ends() -> None:
    end = Record("end", 3, 30)
    told = diagnostics.check_one_sided(np.array([[50, 0], [50, 0]]), ("cat", "dog"), end)
    assert told is not None
    assert (told.event, told.epoch, told.step) == ("warning", 3, 30)
    assert str(told.text).startswith("100.0% of the predictions are cat, but only 50.0% of the images")
    assert diagnostics.check_one_sided(np.array([[5, 0], [0, 5]]), ("cat", "dog"), end) is None
    assert diagnostics.check_one_sided(np.array([[50, 0], [50, 0]]), ("cat", "dog"), replace(end, step=19)) is None


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (StorageError("runs/r cannot be written: No space left", "free some space"), "runs/r cannot be written: No sp"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "out of memory"),
        (ZeroDivisionError("oops"), "internal error: ZeroDivisionError: oops"),
    ],
)
def test_whatever_fails_is_left_in_the_run_and_told_to_programs(
    error: Exception, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.create("r", TINY, {})
    run.log({"event": "step", "epoch": 2, "step": 7})
    with (
        pytest.raises(type(error)),
        record_errors(Reporter("train", json=True), run),
        record_errors(Reporter("train"), run),
    ):
        raise error
    with pytest.raises(type(error)), record_errors(Reporter("train", json=True), run):  # nor does what comes later
        raise error
    about, (_, end) = run.about, run.records()
    assert (about["status"], about["reason"]) == ("failed", "error")
    assert about["error"].startswith(what)
    assert (end["event"], end["epoch"], end["step"], end["text"]) == ("end", 2, 7, about["error"])
    run.update(RUNNING)
    assert (run.about["status"], run.about["error"]) == ("running", None), "which a run that goes on forgets"


def test_a_program_reads_why_it_failed(capsys: pytest.CaptureFixture[str]) -> None:
    run = Run.create("r", TINY, {})
    with pytest.raises(StorageError), record_errors(Reporter("train", json=True), run):
        raise StorageError("the disk is full", "free some space")
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line) == {"schema": "alexnet.train/1", **run.records()[-1]}


def test_a_second_ctrl_c_when_all_is_saved_loses_nothing() -> None:
    run = Run.create("r", TINY, {})
    run.log({"event": "end", "epoch": 2, "step": 7, "reason": "finished"})
    with pytest.raises(Stopped) as caught, record_errors(Reporter("train"), run):
        raise KeyboardInterrupt
    assert (caught.value.what, caught.value.hint) == (
        "stopped by a second Ctrl-C: the training is saved", "alexnet export -w r",
    )  # fmt: skip


@pytest.mark.parametrize("error", [KeyboardInterrupt(), Stopped("stopped", "go on", 75)])
def test_who_stops_it_does_not_make_it_fail(error: BaseException) -> None:
    run = Run.create("r", TINY, {})
    with pytest.raises(Stopped) as caught, record_errors(Reporter("train"), run):
        raise error
    again = isinstance(error, KeyboardInterrupt)
    assert caught.value.exit_code == (130 if again else 75)
    assert run.about.get("reason") == ("Ctrl-C" if again else None)
    assert run.about["status"] == ("interrupted" if again else "running")
