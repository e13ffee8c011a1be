"""The run directory: creating, opening, locking and recording."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from alexnet_cli.core.files import replace_link
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training import resume
from alexnet_cli.errors import DataError, StorageError, UsageError
from alexnet_cli.recipe import PAPER, TINY


@pytest.fixture(autouse=True)
def _root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def checkpoint(run: Run, step: int, *pointers: str) -> Path:
    folder = run.checkpoints / f"{step:08d}"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    for name in pointers:
        replace_link(run.checkpoints / name, folder)
    return folder


@pytest.mark.usefixtures("_any_disk")
def test_a_new_run_has_its_recipe_and_is_the_latest() -> None:
    run = Run.create(None, TINY, {"seed": 0})
    assert run.recipe == TINY
    assert run.about == {"schema": "alexnet.run/1", "status": "running", "seed": 0}
    assert run.path.name.endswith("_tiny")
    second = Run.create(None, TINY, {})
    assert second.path != run.path
    assert Run.open("latest").path.name == second.path.name
    assert Run.open(run.path.name).path.name == Run.open(str(run.path)).path.name == run.path.name


@pytest.mark.parametrize("name", ["", "..", "a/b", "Latest", "tensorboard", "two\nlines", "\udcff", "x" * 201])
def test_names_that_are_no_plain_folder_names(name: str) -> None:
    with pytest.raises(UsageError, match="is not a plain folder name"):
        Run.create(name, PAPER, {})


def test_an_existing_run_is_not_overwritten() -> None:
    Run.create("mine", PAPER, {})
    with pytest.raises(UsageError, match="already exists") as caught:
        Run.create("mine", TINY, {})
    assert "--resume mine" in caught.value.hint
    assert Run.open("mine").recipe == PAPER


def test_hints_quote_the_name_for_a_shell() -> None:
    run = Run.create("my $(run)", PAPER, {})
    with pytest.raises(UsageError) as caught:
        Run.create("my $(run)", TINY, {})
    assert caught.value.hint == "continue it with --resume 'my $(run)', choose another --name, or delete the folder"
    assert run.storage_hint().endswith("alexnet train --resume 'my $(run)'")


def test_a_run_killed_during_creation_can_be_created_again() -> None:
    """Or a requeued job, which has no run to go on with, could not start one either."""
    for left in (
        (),
        ("checkpoints",),
        ("checkpoints", ".recipe.toml.7.tmp"),
        ("checkpoints", "recipe.toml", ".lock", ".run.json.7.tmp.json"),
    ):
        folder = Path("runs") / f"r{len(left)}"
        folder.mkdir(parents=True)
        for name in left:
            (folder / name).mkdir() if name == "checkpoints" else (folder / name).write_text("cut sho")
        assert resume.find_run_to_resume("auto", folder.name) is None
        assert Run.create(folder.name, TINY, {}).recipe == TINY
    for name in ("notes.txt", "checkpoints/00000003"):
        folder = Path("runs") / f"mine-{len(name)}"
        (folder / name).mkdir(parents=True)
        with pytest.raises(UsageError, match="already exists"):
            Run.create(folder.name, TINY, {})


def test_a_runs_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "file" / "runs"))
    with pytest.raises(StorageError, match="cannot write"):
        Run.create("x", PAPER, {})


def test_a_record_cut_short_by_a_crash_is_left_out() -> None:
    run = Run.create("r", PAPER, {})
    for step in (1, 2, 3):
        run.log({"event": "step", "step": step})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event":"st')
    assert [r["step"] for r in run.records()] == [1, 2, 3]
    (run.path / "alexnet.onnx").write_bytes(b"stale")
    run.begin(PAPER, 2, 1)
    assert not (run.path / "alexnet.onnx").exists()
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_update_needs_run_json() -> None:
    run = Run.create("r", PAPER, {})
    (run.path / "run.json").unlink()
    with pytest.raises(StorageError, match=r"run\.json is missing"):
        run.update({"status": "finished"})
    assert not (run.path / "run.json").exists()


def test_a_record_starts_a_new_line_after_a_cut_one() -> None:
    run = Run.create("r", PAPER, {})
    run.log({"event": "step", "step": 1})
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event":"st')  # as a full disk leaves it
    run.log({"event": "end", "step": 2})
    run.log({"event": "end", "step": 3})
    assert [record["step"] for record in run.records()] == [1, 2, 3]


def test_invalid_lines_are_skipped_and_invalid_files_are_errors() -> None:
    run = Run.create("r", PAPER, {})
    with (run.path / "metrics.jsonl").open("ab") as file:
        file.write(b'[1]\n"text"\n\xff\xfe\n{"event":"step","step":3}\n')
    assert run.records() == [{"event": "step", "step": 3}]
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"event":"step","step":null}\n{"event":"validation","step":"x"}\n{"step":9}\n')
    assert resume.check_recipe(run, PAPER, set()) == PAPER
    run.begin(PAPER, 4, 2)
    assert [r.get("step") for r in run.records()] == [3, None, "x"]
    (run.path / "run.json").write_text("[]")
    assert run.about == {}
    (run.path / "run.json").write_text("[1]")
    with pytest.raises(DataError, match="cannot be read"):
        _ = run.about


def test_two_commands_cannot_train_one_run() -> None:
    run = Run.create("r", PAPER, {})
    with run.locked(), pytest.raises(DataError, match="another command is training"), run.locked():
        pass
    with run.locked():
        pass


def test_a_run_in_a_subfolder_has_both_names() -> None:
    run = Run.create("cell", PAPER, {}, Path("runs/several"))
    assert (run.name, Run.open("several/cell").path) == ("several/cell", run.path)
    elsewhere = Run(Path("elsewhere/cell"))
    assert (elsewhere.name, elsewhere.quoted) == ("cell", "elsewhere/cell")
    assert "alexnet train --resume several/cell" in run.storage_hint()
    assert not Path("runs/latest").exists()
