"""TensorBoard shows the numbers of metrics.jsonl, and where the package is missing the command says how to get it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from alexnet_cli.core.runs import Run
from alexnet_cli.errors import MissingError, StorageError
from alexnet_plugins.train import train


def run(prepared: Path, steps: int, resume: str | None = None) -> Run:
    settings = ["width=0.0625"]
    train(
        str(prepared), "tiny", settings, epochs=2, max_steps=steps, batch_size=16, resume=resume, name="r", jobs=1,
        tensorboard=True, quiet=True,
    )  # fmt: skip
    return Run(Path("runs/r"))


def test_it_holds_the_numbers_of_the_run_once_each(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of the steps that a resumed run takes once more."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run(prepared, 4)
    made = run(prepared, 6, resume="r")
    events = EventAccumulator(str(made.path / "tensorboard"))
    events.Reload()
    for event, group in (("step", "train"), ("validation", "validation")):
        told = [record for record in made.records() if record["event"] == event]
        measured = {key for key, value in told[0].items() if isinstance(value, float)}
        assert {"loss", "lr", "images_per_second", "data_wait" if group == "train" else "specialisation"} <= measured
        assert {tag for tag in events.Tags()["scalars"] if tag.startswith(group)} == {f"{group}/{n}" for n in measured}
        for name in measured:
            scalars = events.Scalars(f"{group}/{name}")
            assert [scalar.step for scalar in scalars] == [record["step"] for record in told]
            assert [scalar.value for scalar in scalars] == pytest.approx([record[name] for record in told], rel=1e-6)


def test_without_the_package_there_is_a_hint_and_no_run(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError) as caught:
        run(prepared, 1)
    assert (caught.value.exit_code, caught.value.hint) == (4, "pip install 'alexnet-cli[tensorboard]'")
    assert not (tmp_path / "runs").exists()


def test_a_folder_that_cannot_be_written(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    made = run(prepared, 1)
    for file in (made.path / "tensorboard").iterdir():
        file.unlink()
    (made.path / "tensorboard").rmdir()
    (made.path / "tensorboard").write_text("a file is in the way")
    with pytest.raises(StorageError, match="runs/r cannot be written"):
        run(prepared, 2, resume="r")
