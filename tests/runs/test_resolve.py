"""What `-w` means, and how the weights are described."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from alexnet_cli.core import devices
from alexnet_cli.core.files import hash_file, replace_link
from alexnet_cli.core.runs.resolve import (
    describe_unfinished_run,
    describe_weights,
    find_recorded_data,
    find_run_folder,
    find_weights,
    is_best,
)
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import UsageError, WeightsError
from alexnet_cli.recipe import PAPER, TINY


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(run: Run, step: int, *pointers: str) -> Path:
    folder = run.checkpoints / f"{step:08d}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    for name in pointers:
        replace_link(run.checkpoints / name, folder)
    return folder


@pytest.mark.usefixtures("_any_disk")
def test_find_weights() -> None:
    run = Run.create("r", PAPER, {})
    with pytest.raises(WeightsError, match="no checkpoint yet"):
        find_weights("r")
    first = checkpoint(run, 10, "last")
    assert find_weights("r").resolve() == (first / "model.safetensors").resolve()
    second = checkpoint(run, 20, "last")
    replace_link(run.checkpoints / "best", first)
    for spec in (None, "r", "runs/r", str(run.path.resolve())):
        assert find_weights(spec).resolve() == (first / "model.safetensors").resolve(), spec
    for spec in ("runs/r/checkpoints/last", str(second), str(second / "model.safetensors")):
        assert find_weights(spec).resolve() == (second / "model.safetensors").resolve(), spec
    Path("r").mkdir()  # a folder of that name does not hide the run
    assert find_weights("r").resolve() == (first / "model.safetensors").resolve()
    both = (".onnx", ".safetensors")
    assert find_weights("r", both).name == "model.safetensors"
    (run.path / "alexnet.onnx").write_bytes(b"x")
    assert find_weights("r", both) == run.path / "alexnet.onnx"
    assert find_run_folder(find_weights("r")) == run.path
    assert find_run_folder(Path("elsewhere/model.onnx")) is None


@pytest.mark.parametrize(
    ("about", "what", "hint"),
    [
        ({}, "runs/r has no checkpoint yet", "wait until the first one is saved"),
        (
            {"status": "finished"},
            "runs/r has lost its links checkpoints/best and checkpoints/last",
            "restore them with: alexnet train --resume r",
        ),
        ({"status": "interrupted"}, "runs/r has no checkpoint yet", "the run was stopped; alexnet train --resume r"),
        (
            {"status": "failed", "reason": "error", "error": "the loss became nan", "hint": "train again"},
            "runs/r has no checkpoint because the run failed: the loss became nan",
            "train again",
        ),
        (
            {"status": "failed", "error": [1]},
            "runs/r has no checkpoint yet",
            "the run failed; start it again: alexnet train --resume",
        ),
    ],
)
def test_a_run_without_a_checkpoint_says_why(about: dict[str, Any], what: str, hint: str) -> None:
    Run.create("r", PAPER, about)
    with pytest.raises(WeightsError) as caught:
        find_weights("r")
    assert caught.value.what == what
    assert caught.value.hint.startswith(hint)


def test_find_weights_errors() -> None:
    with pytest.raises(WeightsError, match=f"there is no run in {Path.cwd()}/runs") as caught:
        find_weights(None)
    assert caught.value.hint == f"train one first: {devices.suggest_train_command()}"
    Run.create("r", PAPER, {})
    with pytest.raises(WeightsError, match="there is no run, folder or file named nothing") as caught:
        find_weights("nothing")
    assert "existing runs: r" in caught.value.hint
    Path("a.pth").write_bytes(b"x")
    with pytest.raises(WeightsError, match=r"not a .safetensors file") as caught:
        find_weights("a.pth")
    assert caught.value.hint.endswith("to convert weights of another program: alexnet import-weights")
    for onnx, way in ((Path("runs/r/alexnet.onnx"), ".safetensors file: -w r"), (Path("b.onnx"), ".safetensors file")):
        onnx.write_bytes(b"x")
        with pytest.raises(WeightsError, match=r"not a .safetensors file") as caught:
            find_weights(str(onnx))
        assert caught.value.hint.endswith(way)


@pytest.mark.usefixtures("_any_disk")
def test_latest_resolves_to_the_run_itself() -> None:
    """So that results land in it even if another run becomes the newest meanwhile."""
    run = Run.create("r", PAPER, {})
    checkpoint(run, 1, "last")
    assert find_run_folder(find_weights(None)) == run.path
    for spec in ("", "."):
        with pytest.raises(WeightsError):
            find_weights(spec)


def test_the_newest_run_is_the_latest_where_the_link_was_not_copied() -> None:
    for age, name in ((2, "newer"), (3, "older")):
        checkpoint(Run.create(name, PAPER, {}), 1, "last")
        os.utime(Path("runs") / name / "run.json", (1e9 - age, 1e9 - age))
    (Path("runs") / "latest").unlink()
    assert find_run_folder(find_weights(None)) == Run.open("latest").path == Path("runs/newer")


def test_hints_guess_the_run_that_was_meant() -> None:
    for name in ("2026-01-02_030405_paper", "2026-01-03_030405_paper", "mine"):
        Run.create(name, PAPER, {})
    for typed, meant in (("mien", "mine"), ("paper", "2026-01-03_030405_paper")):
        for look in (find_weights, Run.open):
            with pytest.raises((WeightsError, UsageError)) as caught:
                look(typed)
            assert caught.value.hint.startswith(f"did you mean {meant}? existing runs: ")
    with pytest.raises(WeightsError) as caught:
        find_weights("another")
    assert caught.value.hint.startswith("existing runs: ")


def test_hints_list_the_newest_runs() -> None:
    for age, name in enumerate("badcfe"):
        Run.create(name, PAPER, {})
        os.utime(Path("runs") / name / "run.json", (1e9 - age, 1e9 - age))
    with pytest.raises(WeightsError) as caught:
        find_weights("another")
    assert caught.value.hint == "existing runs: f, c, d, a, b and 1 more"


@pytest.mark.parametrize("name", ["r", "ablation/base-seed0"])
def test_the_data_set_of_a_moved_project_is_found(name: str) -> None:
    record = Path("project/prepared/x/dataset.json")
    record.parent.mkdir(parents=True)
    record.write_bytes(b"{}")
    folder = Path("project/runs") / name
    about = {"data_path": "/gone/prepared/x", "data_hash": hash_file(record)}
    run = Run.create(folder.name, PAPER, about, folder.parent)
    assert find_recorded_data(run) == record.parent


@pytest.fixture
def run() -> Run:
    """A run of three epochs of ten steps; the second was the best."""
    made = Run.create("a", TINY, {})
    for step, pointer in ((20, "best"), (30, "last")):
        folder = made.checkpoints / f"{step:08}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        replace_link(made.checkpoints / pointer, folder)
    for epoch in (1, 2, 3):
        made.log({"event": "validation", "epoch": epoch, "step": 10 * epoch})
    return made


@pytest.mark.usefixtures("_any_disk")
def test_describe_weights(run: Run) -> None:
    onnx = Path("runs/a/alexnet.onnx")
    assert describe_weights(onnx, {"epoch": 2, "step": 20, "run": "a"}) == "runs/a/alexnet.onnx · epoch 2 (best)"
    assert describe_weights(onnx, {"epoch": 3, "step": 30}) == "runs/a/alexnet.onnx · epoch 3 (last)"
    assert describe_weights(onnx, {"epoch": 1, "step": 10}) == "runs/a/alexnet.onnx · epoch 1"
    assert describe_weights(onnx, {"epoch": 1, "step": "20"}) == "runs/a/alexnet.onnx · epoch 1"
    assert describe_weights(onnx, {}) == "runs/a/alexnet.onnx"
    assert describe_weights(Path("b.onnx"), {"epoch": 2, "step": 20, "run": "a"}) == "b.onnx · run a · epoch 2"


@pytest.mark.usefixtures("_any_disk")
def test_is_best(run: Run) -> None:
    for name, best in (("best", True), ("00000020", True), ("last", False), ("00000030", False)):
        for spec in ("a", "runs/a", "latest", "runs/latest"):
            assert is_best(find_weights(f"{spec}/checkpoints/{name}")) is best, name
            assert is_best(find_weights(f"{spec}/checkpoints/{name}/model.safetensors")) is best, name
    Path("elsewhere.safetensors").write_bytes(b"")
    assert is_best(Path("elsewhere.safetensors"))
    (run.checkpoints / "best").unlink()  # none yet: the last one stands for the run
    assert is_best(find_weights("a"))


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_describe_unfinished_run(run: Run, status: str) -> None:
    run.update({"status": status})
    weights = run.checkpoints / "best" / "model.safetensors"
    assert describe_unfinished_run(weights) == (
        "the run has not finished: epoch 3 of 15 so far; to continue: alexnet train --resume a"
    )
    run.log({"event": "validation", "epoch": None})
    run.log({"event": "validation", "epoch": "4"})
    assert "epoch 3 of 15 so far" in describe_unfinished_run(weights)
    run.update({"status": "finished"})
    assert not describe_unfinished_run(weights)


def test_describe_unfinished_run_without_a_run(run: Run) -> None:
    assert not describe_unfinished_run(Path("elsewhere.safetensors"))
    (run.path / "run.json").write_text(json.dumps({"imported": {}}))
    assert not describe_unfinished_run(run.path / "model.safetensors")
    (run.path / "run.json").write_text("[")
    assert not describe_unfinished_run(run.path / "model.safetensors")
