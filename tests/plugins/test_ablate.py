"""`alexnet ablate`: stopped or killed anywhere it goes on, and ends with the table it would have had."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from alexnet_cli.console import Reporter
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.model.architecture import layer_specs
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.resolve import find_weights
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import PartialError, UsageError
from alexnet_cli.recipe import PAPER, TINY
from alexnet_plugins.experiments.ablate import _train_all, ablate
from alexnet_plugins.experiments.study import (
    SWITCHES,
    TRAINING_IMAGES,
    AblationStudy,
    Cell,
    choose_switches,
    find_done_runs,
    make_cells,
)
from commands import alexnet

CPU = Placement(torch.device("cpu"), "CPU", "fp32")
SMALL = replace(TINY, width=1 / 32, batch_size=16, epochs=2, precision="fp32")
SETTINGS = ["width=0.03125", "batch_size=16", "precision=fp32"]
SWITCH = {switch.name: switch for switch in SWITCHES}


def never() -> None:
    return None


@pytest.fixture
def made(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AblationStudy:
    monkeypatch.chdir(tmp_path)
    return AblationStudy.open("a", open_dataset(prepared), CPU, 1)


def test_the_one_tower_network_is_that_of_the_footnote() -> None:
    """48-128-192-192-256 maps and 4096 units, not half of everything: the count is that of the authors' file."""
    assert sum(spec.parameters for spec in layer_specs(SWITCH["one-tower"].apply(PAPER), 1000)) == 59_798_312


def test_help_names_every_switch() -> None:
    text = "".join(alexnet("ablate", "--help").stdout.split())
    assert ",".join(switch.name for switch in SWITCHES[1:]) + "[default:all]" in text


def test_cells_go_seed_by_seed() -> None:
    found = make_cells(replace(SMALL, seed=5), [SWITCH["base"], SWITCH["tanh"]], 2)
    assert [cell.name for cell in found] == ["base-seed5", "tanh-seed5", "base-seed6", "tanh-seed6"]
    assert [(cell.recipe.seed, cell.recipe.activation) for cell in found] == [
        (5, "relu"), (5, "tanh"), (6, "relu"), (6, "tanh"),
    ]  # fmt: skip


def test_a_cell_is_a_run_that_goes_on_to_the_same_weights(made: AblationStudy) -> None:
    whole, broken = Cell(SWITCH["base"], SMALL), Cell(SWITCH["pool-2x2"], SMALL)
    assert [record.event for record in made.train(whole, never)][-1] == "end"
    calls = iter(range(100))
    first = list(made.train(broken, lambda: "Ctrl-C" if next(calls) >= 2 else None))
    assert (first[-1].reason, made.is_finished(broken)) == ("Ctrl-C", False)
    again = list(made.train(broken, never))
    assert again[0].step == first[-1].step > 0
    assert made.is_finished(broken)
    tensors = [
        load_file(Run(made.folder / cell.name).checkpoints / "last" / "optimizer.safetensors")
        for cell in (whole, broken)
    ]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    measured = made.folder / whole.name / TRAINING_IMAGES
    errors = measured.read_text()
    measured.unlink()  # killed before it was written, or finished by `alexnet train --resume`
    assert not made.is_finished(whole)
    list(made.train(whole, never))
    assert measured.read_text() == errors
    assert find_weights("a/base-seed0").parts[:3] == ("runs", "a", "base-seed0")
    assert {switch.name: list(runs) for switch, runs in find_done_runs(made.folder, SWITCHES).items()} == {
        "base": [0],
        "pool-2x2": [0],
    }


@pytest.mark.parametrize(
    ("word", "near"), [("lrn", "no-norm or norm-within-map"), ("no-nrm", "no-norm"), ("crops", "no-crops-flips")]
)
def test_a_word_that_is_no_switch_finds_the_nearest(word: str, near: str) -> None:
    with pytest.raises(UsageError, match=f"--only {word}: no such switch") as caught:
        choose_switches(SMALL, [word])
    assert caught.value.hint.startswith(f"did you mean {near}? there are: base, no-norm, ")


def test_what_cannot_be_compared_is_refused(made: AblationStudy) -> None:
    cell = Cell(SWITCH["base"], SMALL)
    list(made.train(cell, never))
    with pytest.raises(UsageError, match="epochs = 2, not 3"):
        made.is_finished(replace(cell, recipe=replace(SMALL, epochs=3)))
    Run(made.folder / cell.name).update({"data_hash": "another"})
    with pytest.raises(UsageError, match="different data set"):
        made.is_finished(cell)
    for name in ("", "..", "a/b", "latest", "a/base-seed0"):
        with pytest.raises(UsageError):
            AblationStudy.open(name, made.data, CPU, 1)
    Run.create("r", SMALL, {})
    with pytest.raises(UsageError, match="is a run, not an ablation"):
        AblationStudy.open("r", made.data, CPU, 1)


def test_warnings_about_the_data_are_shown_once(
    made: AblationStudy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = make_cells(SMALL, [SWITCH["base"], SWITCH["tanh"], SWITCH["no-norm"]], 1)
    warning = Record("warning", 0, 0, text="few images", hint="add some")
    monkeypatch.setattr(AblationStudy, "train", lambda self, cell, stop: iter([warning]))
    for finished in ([], cells[:1], cells[1:2]):
        _train_all(Reporter("ablate"), made, cells, finished, never, 0.25)
        assert capsys.readouterr().err.count("few images") == 1


def run(prepared: Path, only: str, seeds: int = 1, settings: list[str] | None = None) -> None:
    ablate(
        str(prepared), "tiny", SETTINGS + (settings or []), 2, seeds, only, 25.0, "a", "none", 1, json=True, quiet=True
    )


def test_the_command_trains_each_cell_once(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    run(prepared, "tanh")
    first = json.loads(capfd.readouterr().out)
    assert first["schema"] == "alexnet.ablate/1"
    assert [row["switch"] for row in first["rows"]] == ["base", "tanh"]
    trained: list[str] = []
    train = AblationStudy.train

    def noted(self: AblationStudy, cell: Cell, stop: Callable[[], str | None]) -> Iterator[Record]:
        trained.append(cell.name)
        return train(self, cell, stop)

    monkeypatch.setattr(AblationStudy, "train", noted)
    run(prepared, "no-norm", seeds=2)
    second = json.loads(capfd.readouterr().out)
    assert trained == ["no-norm-seed0", "base-seed1", "no-norm-seed1"]
    assert [(row["switch"], row["seeds"]) for row in second["rows"]] == [
        ("base", [0, 1]), ("no-norm", [0, 1]), ("tanh", [0]),
    ]  # fmt: skip
    folder = tmp_path / "runs" / "a"
    assert json.loads((folder / "ablation.json").read_text())["validation_images"] == 20
    assert (folder / "ablation.csv").read_text().count("\n") == 4
    with Image.open(folder / "ablation.png") as picture:
        assert picture.format == "PNG"
    end = Run(folder / "no-norm-seed1").records()[-3]
    assert second["rows"][1]["top1_error"]["values"][1] == end["top1_error"]
    options = ("--split", "train", "-b", "16", "--gpus", "none", "--json", "-q")
    result = alexnet("evaluate", "-w", "a/no-norm-seed1/checkpoints/last", *options)
    assert second["rows"][1]["train_top1_error"]["values"][1] == json.loads(result.stdout)["top1_error"]


def test_a_training_that_breaks_down_is_said_and_not_repeated(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        with pytest.raises(PartialError, match="2 of 2 trainings diverged"):
            run(prepared, "pool-2x2", settings=["learning_rate=1e30"])
        told = capfd.readouterr()
        assert [row["diverged"] for row in json.loads(told.out)["rows"]] == [[0], [0]]
        monkeypatch.setattr("alexnet_plugins.experiments.study.TrainingLoop", None)


def test_without_matplotlib_there_is_a_hint_and_no_chart(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find(name))
    run(prepared, "base")
    assert "hint    pip install 'alexnet-cli[charts]'" in capfd.readouterr().err
    assert {path.name for path in (tmp_path / "runs" / "a").glob("ablation.*")} == {"ablation.csv", "ablation.json"}


def words(prepared: Path, only: str) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    return ["ablate", "--data", str(prepared), *settings, "--epochs", "3", "--only", only, "--seeds", "1", "-j", "1",
            "--gpus", "none"]  # fmt: skip


def started(prepared: Path, folder: Path, only: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "alexnet_cli", *words(prepared, only)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_ctrl_c_saves_and_says_how_to_go_on(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the first epoch of the second training, to this process."""
    log = Run.log

    def interrupted(self: Run, record: dict[str, Any]) -> None:
        log(self, record)
        if record["event"] == "checkpoint" and self.path.name == "pool-2x2-seed0":
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", interrupted)
        patch.setattr(sys, "argv", ["alexnet", *words(prepared, "pool-2x2")])
        stopped = alexnet(*words(prepared, "pool-2x2"), folder=tmp_path)
    assert stopped.returncode == 130, stopped.stderr
    assert stopped.stderr.splitlines()[-1].startswith(f"hint: alexnet ablate --data {prepared} --set width=0.03125 ")
    again = alexnet(*words(prepared, "pool-2x2"), folder=tmp_path)
    assert "2 trainings, 1 of them finished" in again.stderr
    assert "pool-2x2" in again.stdout
    assert "no verdict; use --seeds 3 for both" in again.stdout
    assert "use --only tanh,sigmoid" in again.stdout
    assert "next    each training is a run: alexnet report -w ablation/base-seed0" in again.stderr


@pytest.mark.slow
def test_killed_anywhere_the_table_is_the_same(prepared: Path, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    started(prepared, tmp_path / "whole", "pool-2x2,no-dropout").communicate(timeout=120)
    for i in range(6):
        child = started(prepared, tmp_path / "killed", "pool-2x2,no-dropout")
        time.sleep(2.5 + 0.4 * i)
        child.send_signal(signal.SIGKILL)
        child.communicate(timeout=60)
    _, errors = started(prepared, tmp_path / "killed", "pool-2x2,no-dropout").communicate(timeout=120)
    tables = [tmp_path / name / "runs" / "ablation" / "ablation.csv" for name in ("whole", "killed")]
    assert tables[0].read_text() == tables[1].read_text(), errors
