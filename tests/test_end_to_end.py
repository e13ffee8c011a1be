"""All six commands in order, as a user types them, in an empty folder: first for people, then for programs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from alexnet_cli.core.runs.run import Run
from commands import alexnet

Done = subprocess.CompletedProcess[str]
Alexnet = Callable[..., Done]
QUICK = ("--recipe", "tiny", "--set", "width=0.0625", "--set", "learning_rate=0.03", "-b", "16")


def run_in(folder: Path, alexnet: Alexnet = alexnet) -> Alexnet:
    def run(*words: str, code: int = 0) -> Done:
        result = alexnet(*words, folder=folder)
        assert result.returncode == code, f"{' '.join(words)}\n{result.stdout}\n{result.stderr}"
        assert "Traceback" not in result.stderr
        return result

    return run


def typed(*words: str, folder: Path) -> Done:
    """In a process of its own, as users do."""
    command = [sys.executable, "-m", "alexnet_cli", *words]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, check=False)


def lines(result: subprocess.CompletedProcess[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """A folder in which the story has been lived through once."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(pictures, folder / "colors")
    run = run_in(folder, typed)
    prepared = run("prepare", "colors")
    assert "next" in prepared.stderr
    trained = run("train", *QUICK, "--epochs", "12", "--name", "first")
    assert "val     epoch 12/12" in trained.stderr
    assert "next: alexnet evaluate" in trained.stderr
    assert trained.stdout == ""
    return folder


def test_what_a_run_leaves(home: Path) -> None:
    run = home / "runs" / "first"
    about = json.loads((run / "run.json").read_text())
    assert about["status"] == "finished"
    assert about["command"][:2] == ["alexnet", "train"]
    assert {"schema", "versions", "devices", "data_hash", "seed", "placement"} <= set(about)
    assert set(about["placement"]) == {"tower 1", "tower 2"}
    made = ("recipe.toml", "metrics.jsonl", "metrics.csv", "alexnet.onnx", "report.html")
    for name in (*made, "checkpoints/last", "checkpoints/best"):
        assert (run / name).exists(), name
    assert (home / "runs" / "latest").resolve() == run.resolve()


def test_evaluate(home: Path) -> None:
    run = run_in(home)
    one = lines(run("evaluate", "--json", "--predictions", "all.jsonl"))[0]
    assert one["schema"] == "alexnet.evaluate/1"
    assert (one["images"], one["views"]) == (20, 1)
    assert one["top1_error"] <= 0.15
    assert one["top1_accuracy"] == pytest.approx(1 - one["top1_error"])
    told = [json.loads(line) for line in (home / "all.jsonl").read_text().splitlines()]
    assert sum(line["top"][0]["index"] != line["index"] for line in told) == round(one["top1_error"] * 20)
    validation = [r for r in Run(home / "runs/first").records() if r["event"] == "validation"]
    assert one["top1_error"] == pytest.approx(min(r["top1_error"] for r in validation))
    ten = run("evaluate", "--views", "10")
    assert "top-1   error" in ten.stdout
    assert "ten views" in ten.stderr
    for views, torch in (("1", one), ("10", lines(run("evaluate", "--views", "10", "--json"))[0])):
        onnx = lines(run("evaluate", "-w", "runs/first/alexnet.onnx", "--views", views, "--json"))[0]
        assert (onnx["backend"], onnx["images"]) == ("onnx", 20)
        assert onnx["top1_error"] == pytest.approx(torch["top1_error"])
        assert onnx["loss"] == pytest.approx(torch["loss"], abs=1e-4)
    files = {p.name for p in (home / "runs/first/eval").iterdir()}
    assert {"val-1.json", "val-10.json", "val-1_per_class.csv", "val-1_confusion.csv"} <= files


def test_predict(home: Path) -> None:
    run = run_in(home)
    (home / "broken.jpg").write_bytes(b"no picture")
    found = lines(run("predict", "colors/val/red", "broken.jpg", "--json", "-k", "2", code=5))
    assert len(found) == 6
    assert "error" in found[-1]
    right = [line for line in found[:-1] if line["top"][0]["label"] == "red"]
    assert len(right) >= 4
    assert [entry["rank"] for entry in right[0]["top"]] == [1, 2]
    torch = lines(run("predict", "colors/val/red", "--json", "--backend", "torch"))
    for a, b in zip(found, torch, strict=False):
        assert a["top"][0]["probability"] == pytest.approx(b["top"][0]["probability"], abs=1e-4)
    assert "red" in run("predict", "colors/val/red/00.jpg").stdout


def test_visualize_and_export(home: Path) -> None:
    run = run_in(home)
    drawn = lines(run("visualize-filters", "--tower", "2", "--json"))[0]
    assert drawn["kernels"] == 3
    with Image.open(home / drawn["path"]) as picture:
        assert min(picture.size) > 20
    assert "--tower 3" in run("visualize-filters", "--tower", "3", code=2).stderr
    written = lines(run("export", "-o", "small.onnx", "--json"))[0]
    assert written["max_abs_difference"] < 1e-4
    assert written["top1_agreement"] == 1
    by_file = lines(run("predict", "colors/val/blue/00.jpg", "-w", "small.onnx", "--json"))[0]
    assert by_file["top"][0]["label"] == "blue"


def test_training_speaks_json_and_repeats(home: Path) -> None:
    run = run_in(home)
    first = lines(run("train", *QUICK, "--epochs", "1", "--name", "a", "--json", "-q"))
    assert [record["event"] for record in first] == [
        "start",
        *["warning"] * 2,
        "step",
        "validation",
        "checkpoint",
        "end",
    ]
    assert all(record["schema"] == "alexnet.train/1" for record in first)
    again = lines(run("train", "--recipe", "runs/a/recipe.toml", "--name", "b", "--json", "-q"))
    assert [r.get("loss") for r in again] == [r.get("loss") for r in first]


def test_max_time_and_resume(home: Path) -> None:
    run = run_in(home)
    stopped = run("train", *QUICK, "--epochs", "3", "--name", "timed", "--max-time", "0s", code=75)
    assert "hint: alexnet train --resume timed" in stopped.stderr
    finished = lines(run("train", "--resume", "timed", "--json", "-q"))
    assert finished[-1]["reason"] == "finished"
    refused = run("train", "--resume", "timed", "--epochs", "4", code=2)
    assert "force it (this changes every later learning rate): --set epochs=4" in refused.stderr
    longer = lines(run("train", "--resume", "timed", "--set", "epochs=4", "--json", "-q"))
    assert longer[0]["step"] == 9
    assert longer[-1]["step"] == 12
    refused = run("train", "--resume", "timed", "--lr", "0.5", code=2)
    assert "the recipe differs from that of run timed: learning_rate = 0.5 instead of 0.03\n" in refused.stderr
    report = home / "runs" / "timed" / "report.html"
    report.write_text("with what alexnet report has added", encoding="utf-8")
    auto = lines(run("train", *QUICK, "--epochs", "4", "--resume", "auto", "--name", "timed", "--json", "-q"))
    assert [record["event"] for record in auto] == ["start", "end"]
    assert report.read_text(encoding="utf-8") == "with what alexnet report has added"


def test_max_steps_counts_from_the_start_and_says_the_way_on(home: Path) -> None:
    run = run_in(home)
    first = run("train", *QUICK, "--epochs", "5", "--name", "steps", "--max-steps", "2")
    assert "stopped runs/steps · at step 2 of 15 (--max-steps)\nnext    alexnet evaluate; to continue: " in first.stderr
    assert "done" not in first.stderr
    again = run("train", "--resume", "steps", "--max-steps", "2")
    assert "note    nothing to train: the run has done 2 steps, as many as --max-steps" in again.stderr
    before = (home / "runs" / "steps" / "run.json").read_bytes()
    refused = run("train", "--resume", "steps", "--max-steps", "1", code=2)
    assert refused.stderr == (
        "error: --max-steps 1 counts from the start of the run, and steps has done 2 steps\n"
        "hint: to train 1 more: --max-steps 3\n"
    )
    assert (home / "runs" / "steps" / "run.json").read_bytes() == before
    shutil.rmtree(home / "runs" / "steps" / "checkpoints")  # as if killed before there was one
    (home / "runs" / "steps" / "checkpoints").mkdir()
    (home / "runs" / "steps" / "metrics.jsonl").unlink()
    again = run("train", "--resume", "steps", "--max-steps", "1")
    assert "resumed from the start: no checkpoint had been saved yet" in again.stderr


def test_a_run_that_failed_says_why_before_it_fails_again(home: Path) -> None:
    run = run_in(home)
    broken = run("train", *QUICK, "--epochs", "2", "--lr", "1e12", "--name", "broken", code=6).stderr.splitlines()
    again = run("train", "--resume", "broken", code=6).stderr
    assert f"warn    this run failed before: {broken[-2].removeprefix('error: ')}\nhint    " in again
    cured = run("train", "--resume", "broken", "--set", "learning_rate=0.03", "--max-steps", "1").stderr
    assert "failed before" not in cured


SIGNALS = pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)]
)


def stopped(home: Path, name: str, errors: str) -> None:
    """A run that a signal has ended has a checkpoint, and goes on from there."""
    assert f"hint: alexnet train --resume {name}" in errors
    assert f"alexnet train --resume {name}" in (home / "runs" / name / "report.html").read_text()
    assert json.loads((home / "runs" / name / "run.json").read_text())["status"] == "interrupted"
    step = int((home / "runs" / name / "checkpoints" / "last").resolve().name)
    resumed = lines(run_in(home)("train", "--resume", name, "--max-steps", str(step + 1), "--json", "-q"))
    assert resumed[0]["step"] == step
    assert resumed[-1]["step"] == step + 1


@SIGNALS
def test_signals_save_and_stop(home: Path, number: signal.Signals, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal comes between the first epoch and the second, to this process."""
    log = Run.log

    def signaled(self: Run, record: dict[str, Any]) -> None:
        log(self, record)
        if record["event"] == "checkpoint":
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", signaled)
        name = f"signal{int(number)}"
        errors = run_in(home)("train", *QUICK, "--epochs", "500", "--name", name, code=code).stderr
    stopped(home, name, errors)


@pytest.mark.slow
@SIGNALS
def test_signals_save_and_stop_a_process(home: Path, number: signal.Signals, code: int) -> None:
    name = f"process{int(number)}"
    command = [sys.executable, "-m", "alexnet_cli", "train", *QUICK, "--epochs", "500", "--name", name]
    child = subprocess.Popen(command, cwd=home, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        deadline, log = time.monotonic() + 60, home / "runs" / name / "metrics.jsonl"
        while time.monotonic() < deadline and not (log.exists() and '"event":"step"' in log.read_text()):
            time.sleep(0.05)
        child.send_signal(number)
        _, errors = child.communicate(timeout=600)
    finally:
        child.kill()
        child.wait()
    assert child.returncode == code, errors
    stopped(home, name, errors)


def test_print_config_names_the_sources(home: Path) -> None:
    values = lines(run_in(home)("train", *QUICK, "--epochs", "7", "--print-config", "--json"))[0]["values"]
    source = {row["key"]: (row["value"], row["from"]) for row in values}
    assert source["epochs"] == (7, "option")
    assert source["width"] == (0.0625, "--set")
    assert source["init"] == ("scaled", "fast")
    assert "0.0625" in run_in(home)("train", *QUICK, "--print-config").stdout


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (("prepare", "nowhere"), 3, "nowhere"),
        (("train", "--data", "nowhere"), 3, "nowhere"),
        (("evaluate", "-w", "nowhere"), 3, "nowhere"),
        (("predict", "nowhere.jpg"), 3, "nowhere.jpg"),
        (("visualize-filters", "-w", "nowhere"), 3, "nowhere"),
        (("export", "-w", "nowhere"), 3, "nowhere"),
        (("train", "--gpus", "99"), 4, "--gpus 99"),
        (("evaluate", "-w", "runs/first/alexnet.onnx", "--gpus", "99"), 4, "GPU"),
        (("train", "--gpus", "first"), 2, "--gpus first"),
        (("evaluate", "--split", "test"), 3, "test"),
    ],
)
def test_what_is_not_there_is_named(home: Path, words: tuple[str, ...], code: int, error: str) -> None:
    message = run_in(home)(*words, code=code).stderr.splitlines()
    assert any(line.startswith("error: ") and error in line for line in message)
    assert message[-1].startswith("hint: ")
