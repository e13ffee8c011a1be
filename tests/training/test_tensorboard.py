"""TensorBoard shows the numbers of metrics.jsonl, and where the package is missing the command says how to get it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training import tensorboard
from alexnet_cli.errors import MissingError, StorageError
from alexnet_plugins.train.command import train


def run(
    prepared: Path,
    steps: int,
    resume: str | None = None,
    asked: bool = True,
    settings: str = "seed=0",
    quiet: bool = True,
) -> Run:
    train(
        str(prepared), "tiny", ["width=0.0625", settings], epochs=2, max_steps=steps, batch_size=16, resume=resume,
        name="r", jobs=1, tensorboard=asked, quiet=quiet,
    )  # fmt: skip
    return Run(Path("runs/r"))


def same(made: Run) -> None:
    """The events are those of metrics.jsonl, once each."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tensorboard.events_folder(made)))
    events.Reload()
    for event, group in (("step", "train"), ("validation", "validation")):
        told = [record for record in made.records() if record["event"] == event]
        measured = {key for key, value in told[0].items() if isinstance(value, float)}
        assert {"loss", "lr", "images_per_second", "data_wait" if group == "train" else "specialization"} <= measured
        assert {tag for tag in events.Tags()["scalars"] if tag.startswith(group)} == {f"{group}/{n}" for n in measured}
        for name in measured:
            scalars = events.Scalars(f"{group}/{name}")
            assert [scalar.step for scalar in scalars] == [record["step"] for record in told]
            assert [scalar.value for scalar in scalars] == pytest.approx([record[name] for record in told], rel=1e-6)


def test_it_goes_on_with_the_run_and_holds_its_numbers_once_each(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of the steps that a resumed run takes once more."""
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    run(prepared, 4)
    made = run(prepared, 6, resume="r", asked=False)
    assert len(list((tensorboard.events_folder(made)).iterdir())) == 2
    same(made)


def test_the_newest_run_is_shown_once(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`tensorboard --logdir runs` follows links, such as runs/latest."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer

    monkeypatch.chdir(tmp_path)
    run(prepared, 1)
    assert Path("runs/latest/run.json").exists()
    assert list(EventMultiplexer().AddRunsFromDirectory("runs").Runs()) == ["tensorboard/r"]


def test_asked_for_later_it_begins_there(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`alexnet report` has the curves of the steps before."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    run(prepared, 2, asked=False)
    made = run(prepared, 4, resume="r")
    events = EventAccumulator(str(tensorboard.events_folder(made)))
    events.Reload()
    assert [scalar.step for scalar in events.Scalars("train/loss")] == [3, 4]
    assert made.about["tensorboard"] is True


def test_a_package_that_is_gone_is_a_warning_when_the_run_goes_on(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensorboard, "is_installed", lambda: False)
    made = run(prepared, 1, asked=False)
    made.update({"tensorboard": True})
    capsys.readouterr()
    run(prepared, 2, resume="r", asked=False, settings="momentum=0.8", quiet=False)
    shown = capsys.readouterr().err
    assert f"hint    {tensorboard.INSTALL}\n" in shown
    assert re.search(r"(?m)^changed from step 2 on: momentum 0\.8 instead of 0\.9$", shown)
    assert made.about["tensorboard"] is True, "and it goes on when the package is back"
    assert made.about["changed"] == [{"step": 1, "key": "momentum", "was": 0.9, "is": 0.8}]
    assert made.recipe.momentum == 0.8


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
    for file in (tensorboard.events_folder(made)).iterdir():
        file.unlink()
    (tensorboard.events_folder(made)).rmdir()
    (tensorboard.events_folder(made)).write_text("a file is in the way")
    with pytest.raises(StorageError, match="runs/r cannot be written"):
        run(prepared, 2, resume="r")
