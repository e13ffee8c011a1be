"""`alexnet runs`: the list, whatever state the runs are in, and the comparison of two on the same images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.intervals import PairedCounts
from alexnet_cli.core.runs.run import Run
from alexnet_cli.recipe import PAPER, Recipe
from commands import alexnet
from model_files import random_model, save_model

SMALL = replace(PAPER, width=1 / 32, epochs=4)
ERRORS = (0.75, 0.5, 0.625)  # of the epochs done


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_run(name: str, prepared: Path, seed: int = 0, recipe: Recipe = SMALL, **about: Any) -> Run:
    """A run with three of four epochs done and a random network as its best checkpoint."""
    dataset, folder = open_dataset(prepared), Path("runs") / name
    known = {
        "data": "colors",
        "data_path": str(prepared),
        "data_hash": dataset.hash,
        "started": "2026-01-02T03:04:05+0000",
    }
    run = Run.create(folder.name, recipe, known | about, folder.parent)
    for epoch, error in enumerate(ERRORS, 1):
        run.log({"event": "validation", "epoch": epoch, "step": epoch, "top1_error": error, "best": epoch < 3})
    (run.checkpoints / "best").mkdir()
    model = random_model(recipe, len(dataset.classes), seed)
    save_model(replace(model, classes=dataset.classes), run.checkpoints / "best" / "model.safetensors")
    return run


def listed(*words: str) -> list[dict[str, Any]]:
    result = alexnet("runs", *words, "--json", "-q")
    assert (result.returncode, result.stderr) == (0, "")
    return list(json.loads(result.stdout)["runs"])


def test_without_runs_it_says_how_to_train_one() -> None:
    result = alexnet("runs")
    assert (result.returncode, result.stderr) == (0, "")
    assert "no runs in " in result.stdout
    assert "train one first: alexnet train" in result.stdout
    assert listed() == []


def test_each_run_is_a_row_newest_first(prepared: Path) -> None:
    make_run("old", prepared, status="finished")
    make_run("[red]new", prepared, started="2026-03-01T00:00:00+0000", status="failed", error="the disk is full")
    make_run("middle", prepared, started="2026-02-01T00:00:00+0000")
    rows = listed()
    assert [row["name"] for row in rows] == ["[red]new", "middle", "old"]
    old = rows[2]
    assert (old["data"], old["recipe"], old["epochs"], old["epochs_planned"]) == ("colors", "paper", 3, 4)
    assert (old["top1_error"], old["best_epoch"], old["status"]) == (0.5, 2, "finished")
    assert old["bytes"] == Path("runs/old/checkpoints/best/model.safetensors").stat().st_size
    lines = alexnet("runs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "[red]new", "middle", "old"]
    assert "failed: the disk is full" in lines[1]
    assert "running, last record " in lines[2]
    assert "3/4" in lines[3]
    assert "50.0% (epoch 2)" in lines[3]
    assert "2026-01-02 03:04" in lines[3]


def test_a_broken_folder_is_one_line(prepared: Path) -> None:
    make_run("good", prepared)
    contents = {"garbage": "{", "list": "[1]", "odd": '{"started": 3, "data": [], "status": {}}'}
    for name, text in contents.items():
        Path("runs", name).mkdir()
        Path("runs", name, "run.json").write_text(text, encoding="utf-8")
    Path("runs/odd/recipe.toml").write_text("width = 9e99\n", encoding="utf-8")
    Path("runs/half/checkpoints").mkdir(parents=True)
    Path("runs/notes").mkdir()
    Path("runs/loop").symlink_to("loop")
    rows = {row["name"]: row for row in listed()}
    assert {name: row["status"] == "broken" for name, row in rows.items()} == {
        "good": False, "garbage": True, "list": True, "odd": True, "half": True,
    }  # fmt: skip
    assert rows["half"]["problem"] == "run.json is missing"
    assert len(alexnet("runs").stdout.splitlines()) == 1 + len(rows)
    result = alexnet("runs", "good", "garbage")
    assert result.returncode == 3
    assert "garbage" in result.stderr


def test_runs_of_an_ablation_are_one_line_unless_it_is_named(prepared: Path) -> None:
    make_run("alone", prepared)
    for name, status in (("base-seed0", "finished"), ("tanh-seed0", "finished"), ("tanh-seed1", "failed")):
        make_run(f"study/{name}", prepared, started="2026-02-01T00:00:00+0000", status=status)
    lines = alexnet("runs").stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["run", "study/", "alone"]
    assert "2 finished, 1 failed" in lines[1]
    inside = {"study/base-seed0", "study/tanh-seed0", "study/tanh-seed1"}
    assert {row["name"] for row in listed()} == inside | {"alone"}
    for name in ("study", "runs/study/"):
        assert {row["name"] for row in listed(name)} == inside
    assert [row["name"] for row in listed("study/tanh-seed1")] == ["study/tanh-seed1"]
    assert [row["name"] for row in listed("latest")] == ["alone"]


def test_an_imported_network_has_no_epochs() -> None:
    run = Run.create("net", SMALL, {"status": "finished", "imported": {"file": "net.onnx"}})
    save_model(random_model(SMALL), run.path / "model.safetensors")
    [row] = listed()
    assert (row["status"], row["epochs_planned"], row["top1_error"]) == ("imported", None, None)
    assert row["bytes"] > 0


def test_two_runs_are_compared_on_the_same_images(prepared: Path) -> None:
    make_run("one", prepared, 1, versions={"torch": "2.14", "numpy": "2.4"})
    make_run("two", prepared, 2, replace(SMALL, dropout=0.25), versions={"torch": "2.15", "numpy": "2.4"})
    result = alexnet("runs", "one", "two", "--json", "-q")
    assert (result.returncode, result.stderr) == (0, "")
    record = json.loads(result.stdout)
    assert record["differences"] == [
        {"key": "recipe dropout", "values": [0.5, 0.25]}, {"key": "version torch", "values": ["2.14", "2.15"]},
    ]  # fmt: skip
    right = []
    for name in ("one", "two"):
        assert alexnet("evaluate", "-w", name, "-q", "--predictions", f"{name}.jsonl").returncode == 0
        lines = [json.loads(line) for line in Path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        right.append(np.array([line["top"][0]["label"] == line["label"] for line in lines]))
    assert record["images"] == len(right[0]) == 20
    assert record["both_right"] == (right[0] & right[1]).sum()
    assert record["only_right"] == [(right[0] & ~right[1]).sum(), (right[1] & ~right[0]).sum()]
    assert record["top1_error"] == pytest.approx([1 - r.mean() for r in right])
    assert record["difference"] == pytest.approx(record["top1_error"][1] - record["top1_error"][0])
    low, high = record["difference_interval"]
    assert low < record["difference"] < high
    shown = alexnet("runs", "one", "two").stdout
    assert "on the same 20 images" in shown
    assert f"two - one = {100 * record['difference']:+.1f} points (95 % interval {100 * low:+.1f} to" in shown


def test_without_a_common_data_set_only_the_differences_are_shown(prepared: Path) -> None:
    make_run("one", prepared)
    make_run("two", prepared, data_hash=["another"])  # whatever the file holds
    result = alexnet("runs", "one", "two")
    assert result.returncode == 0
    assert "data_hash" in result.stdout
    assert "warn    not compared on the same images: they were trained on different data sets" in result.stderr
    assert "on the same 20 images" in alexnet("runs", "one", "two", "--data", str(prepared)).stdout
    assert alexnet("runs", "one", "two", "--data", "nonesuch").returncode == 3


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ("one nope", "existing runs: one"),
        ("one one one", "alexnet runs one one"),
        ("--data x", "alexnet runs A B --data D"),
    ],
)
def test_what_cannot_be_compared(words: str, hint: str, prepared: Path) -> None:
    make_run("one", prepared)
    result = alexnet("runs", *words.split())
    assert (result.returncode, result.stderr.splitlines()[1]) == (2, f"hint: {hint}")


def test_a_folder_of_runs_that_cannot_be_read_has_none() -> None:
    Path("runs").write_text("a file", encoding="utf-8")
    assert listed() == []


@pytest.mark.parametrize(("first", "second", "images"), [(0, 0, 9), (5, 3, 40), (10, 0, 10)])
def test_the_paired_interval_is_that_of_four_added_halves(first: int, second: int, images: int) -> None:
    """Agresti and Min: half an image more in each of the four cells, then the usual interval of a mean."""
    values = np.array([1, -1, 0])
    weights = np.array([first + 0.5, second + 0.5, images - first - second + 1])
    mean = np.average(values, weights=weights)
    half = 1.96 * np.sqrt(np.average((values - mean) ** 2, weights=weights) / weights.sum())
    expected = max(-1, mean - half), min(1, mean + half)
    assert PairedCounts(images, 0, first, second).interval == pytest.approx(expected)
