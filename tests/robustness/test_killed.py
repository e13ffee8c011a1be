"""`alexnet train` killed with -9 and started again by the same command ends with the weights of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from alexnet_cli.core.model import model_file
from alexnet_cli.core.runs.run import Run
from alexnet_plugins.train.command import train
from commands import alexnet

SETTINGS = ["width=0.0625", "dropout=0.5"]
DEADLINE = 120  # seconds until something must have happened


def command(epochs: int, prepared: Path) -> list[str]:
    """Batches of 8 from 48 pictures: six steps an epoch, so that every third lies within one or at its end."""
    words = ["train", "--data", str(prepared), "--recipe", "tiny", "-b", "8", "--epochs", str(epochs), "-j", "1"]
    words += [word for setting in SETTINGS for word in ("--set", setting)]
    return [*words, "--name", "killed", "--resume", "auto", "--save-every", "4", "--keep", "2"]


def starts(run: Path) -> int:
    """How often training has got as far as its first step."""
    path = run / "metrics.jsonl"
    return path.read_text().count('"event":"start"') if path.exists() else 0


def life(words: list[str], folder: Path, ripe: Callable[[], bool]) -> int:
    """Run the command and kill it once training has begun and `ripe()`. Returns its exit code: -9 if it was alive."""
    run = folder / "runs" / "killed"
    before = starts(run)
    child = subprocess.Popen([sys.executable, "-m", "alexnet_cli", *words], cwd=folder, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + DEADLINE
        while child.poll() is None and not (starts(run) > before and ripe()):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        child.send_signal(signal.SIGKILL)
    finally:
        child.kill()
        child.wait()
    return child.returncode


def finish(words: list[str], folder: Path) -> None:
    """Run the command to its end."""
    done = alexnet(*words, folder=folder)
    assert done.returncode == 0, done.stderr


def same(one: Path, other: Path) -> None:
    """The last weights are equal bit for bit, and so is what the runs tell of their epochs."""
    found = [model_file.read_model(run / "checkpoints" / "last" / "model.safetensors") for run in (one, other)]
    for name in found[0].tensors:
        np.testing.assert_array_equal(found[0].tensors[name], found[1].tensors[name])
    timeless = [
        [
            {k: v for k, v in r.items() if k != "images_per_second"}
            for r in Run(run).records()
            if r["event"] == "validation"
        ]
        for run in (one, other)
    ]
    assert timeless[0] == timeless[1]
    assert os.readlink(one / "checkpoints" / "best") == os.readlink(other / "checkpoints" / "best")


def undisturbed(epochs: int, prepared: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One run in this process, without checkpoints within an epoch."""
    with monkeypatch.context() as patch:
        patch.setenv("ALEXNET_RUNS_DIR", str(folder / "whole"))
        train(str(prepared), "tiny", SETTINGS, epochs=epochs, batch_size=8, jobs=1, name="whole", quiet=True)
    return folder / "whole" / "whole"


@pytest.mark.slow
def test_killed_twice(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, run = command(5, prepared), tmp_path / "runs" / "killed"
    for step in (9, 20):  # past the checkpoints of 8 and 20, the latter perhaps while it is written

        def reached(step: int = step) -> bool:
            return any(record.get("step", 0) >= step for record in Run(run).records())

        assert life(words, tmp_path, reached) == -9
    finish(words, tmp_path)
    same(undisturbed(5, prepared, tmp_path, monkeypatch), run)
    resumed = [record["step"] for record in Run(run).records() if record["event"] == "start"]
    assert resumed[0] == 0
    assert resumed[1] in {4, 6, 8, 12}
    assert len(json.loads((run / "run.json").read_text())["resumed"]) == 2


@pytest.mark.slow
def test_killed_at_twenty_random_moments(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, run, generator = command(80, prepared), tmp_path / "runs" / "killed", random.Random(2012)
    for _ in range(20):
        moment: list[float] = []

        def due(moment: list[float] = moment) -> bool:
            if not moment:
                moment.append(time.monotonic() + generator.uniform(0, 0.8))
            return time.monotonic() >= moment[0]

        assert life(words, tmp_path, due) == -9, "it was done before it was killed twenty times"
    finish(words, tmp_path)
    same(undisturbed(80, prepared, tmp_path, monkeypatch), run)
    resumed = [record["step"] for record in Run(run).records() if record["event"] == "start"]
    assert len(resumed) == 21
    assert resumed == sorted(resumed)
    assert any(step % 6 for step in resumed), "never from within an epoch"


@pytest.mark.slow
def test_a_folder_deleted_meanwhile_is_exit_code_7(prepared: Path, tmp_path: Path) -> None:
    words, run = command(5000, prepared), tmp_path / "runs" / "killed"
    child = subprocess.Popen(
        [sys.executable, "-m", "alexnet_cli", *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + DEADLINE
        while starts(run) == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.rename(tmp_path / "elsewhere")
        _, errors = child.communicate(timeout=DEADLINE)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == 7, errors
    assert "error: runs/killed cannot be written: No such file" in errors or "checkpoint of step" in errors
    assert (
        errors.splitlines()[-1]
        == "hint: the run folder was deleted or renamed: start a new run, or give its new name to --resume"
    )
