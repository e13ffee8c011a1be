"""TensorBoard shows the numbers of metrics.jsonl, and where the package is missing the command says how to get it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from alexnet_cli.core import tensorboard
from alexnet_cli.core.records import Record
from alexnet_cli.core.runs import Run
from alexnet_cli.errors import MissingError, Stopped, StorageError
from alexnet_cli.recipe import TINY
from alexnet_plugins.train import train


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


def test_it_goes_on_with_the_run_and_holds_its_numbers_once_each(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also those of the steps that a resumed run takes once more."""
    pytest.importorskip("tensorboard")
    monkeypatch.chdir(tmp_path)
    run(prepared, 4)
    made = run(prepared, 6, resume="r", asked=False)
    assert len(list((made.path / "tensorboard").iterdir())) == 2
    same(made)


def noted(made: Run, steps: range) -> Iterator[Record]:
    """What the loop does: each record is in metrics.jsonl when it is yielded."""
    for step in steps:
        record = Record("start" if step == steps[0] else "step", 1, step, loss=step / 8)
        made.log(record.as_dict())
        yield record


def test_what_was_missed_is_made_up_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of before it was asked for, and those of where the package was missing."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    made, told, last = Run.create("r", TINY, {}), [], -1
    for asked, there in ((False, True), (True, True), (False, True), (False, False), (False, True)):
        monkeypatch.setattr(tensorboard, "installed", lambda there=there: there)
        now, before = tensorboard.states(made, asked)
        made.update({"tensorboard": now and "behind"})
        told.append(now)
        records = noted(made, range(last + 1, last + 4))
        last = [*(tensorboard.recorded(made, records, before) if now == "whole" else records)][-1].step
        if now == "whole":
            events = EventAccumulator(str(made.path / "tensorboard"))
            events.Reload()
            steps = [record["step"] for record in made.records() if record["event"] == "step"]
            assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(step, step / 8) for step in steps]
    assert told == [None, "whole", "whole", "behind", "whole"]


def test_the_events_are_whole_only_when_what_was_missed_is_written(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is killed on the way there makes up for it the next time."""
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter
    monkeypatch.chdir(tmp_path)
    made = run(prepared, 2, asked=False)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(writer, "add_scalar", killed)
        with pytest.raises(Stopped):
            run(prepared, 3, resume="r")
    assert made.about["tensorboard"] == "behind"
    run(prepared, 3, resume="r", asked=False)
    assert made.about["tensorboard"] == "whole"
    same(made)


def test_a_package_that_is_gone_is_a_warning_when_the_run_goes_on(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tensorboard, "installed", lambda: False)
    made = run(prepared, 1, asked=False)
    made.update({"tensorboard": "whole"})
    capsys.readouterr()
    run(prepared, 2, resume="r", asked=False, settings="momentum=0.8", quiet=False)
    shown = capsys.readouterr().err
    assert f"hint    {tensorboard.INSTALL}\n" in shown
    assert re.search(r"(?m)^changed from step 2 on: momentum 0\.8 instead of 0\.9$", shown)
    assert made.about["tensorboard"] == "behind"
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
    for file in (made.path / "tensorboard").iterdir():
        file.unlink()
    (made.path / "tensorboard").rmdir()
    (made.path / "tensorboard").write_text("a file is in the way")
    with pytest.raises(StorageError, match="runs/r cannot be written"):
        run(prepared, 2, resume="r")
