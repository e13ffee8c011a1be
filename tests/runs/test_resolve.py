"""What `-w` means, and how the weights it means are described."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alexnet_cli.core.files import replace_link
from alexnet_cli.core.runs.resolve import describe_unfinished_run, describe_weights, is_best
from alexnet_cli.core.runs.run import Run
from alexnet_cli.recipe import TINY


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run of three epochs of ten steps; the second was the best."""
    monkeypatch.chdir(tmp_path)
    made = Run.create("a", TINY, {})
    for step, pointer in ((20, "best"), (30, "last")):
        folder = made.checkpoints / f"{step:08}"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"")
        replace_link(made.checkpoints / pointer, folder)
    for epoch in (1, 2, 3):
        made.log({"event": "validation", "epoch": epoch, "step": 10 * epoch})
    return made


def test_a_file_of_a_run_is_its_best_or_its_last_or_neither(run: Run) -> None:
    onnx = Path("runs/a/alexnet.onnx")
    assert describe_weights(onnx, {"epoch": 2, "step": 20, "run": "a"}) == "runs/a/alexnet.onnx · epoch 2 (best)"
    assert describe_weights(onnx, {"epoch": 3, "step": 30}) == "runs/a/alexnet.onnx · epoch 3 (last)"
    assert describe_weights(onnx, {"epoch": 1, "step": 10}) == "runs/a/alexnet.onnx · epoch 1"
    assert describe_weights(onnx, {"epoch": 1, "step": "20"}) == "runs/a/alexnet.onnx · epoch 1"
    assert describe_weights(onnx, {}) == "runs/a/alexnet.onnx"
    assert describe_weights(Path("b.onnx"), {"epoch": 2, "step": 20, "run": "a"}) == "b.onnx · run a · epoch 2"


def test_which_checkpoint_a_run_stands_for(run: Run) -> None:
    for name, best in (("best", True), ("00000020", True), ("last", False), ("00000030", False)):
        assert is_best(run.checkpoints / name / "model.safetensors") is best, name
    Path("elsewhere.safetensors").write_bytes(b"")
    assert is_best(Path("elsewhere.safetensors"))
    (run.checkpoints / "best").unlink()  # none yet: the last one stands for the run
    assert is_best(run.checkpoints / "last" / "model.safetensors")


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_a_run_that_has_not_finished_is_said_to_be_so(run: Run, status: str) -> None:
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


def test_what_is_no_run_of_training_says_nothing(run: Run) -> None:
    assert not describe_unfinished_run(Path("elsewhere.safetensors"))
    (run.path / "run.json").write_text(json.dumps({"imported": {}}))
    assert not describe_unfinished_run(run.path / "model.safetensors")
    (run.path / "run.json").write_text("[")
    assert not describe_unfinished_run(run.path / "model.safetensors")
