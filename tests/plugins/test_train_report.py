"""`alexnet train` leaves a report behind, of what needs no pass of the network, and never at a price."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer import Typer
from typer.testing import CliRunner

from alexnet_cli.console import Reporter
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.parallel.placement import place
from alexnet_cli.core.runs.run import ONNX, Run
from alexnet_cli.core.training.loop import TrainingLoop
from alexnet_cli.recipe import TINY
from alexnet_plugins.train.display import write_report
from commands import alexnet
from report_cases import Page
from trainings import new_loop

Trained = Callable[..., TrainingLoop]


@pytest.fixture
def trained(prepared: Path, tmp_path: Path) -> Trained:
    """A training that has done some steps."""

    def make(steps: int) -> TrainingLoop:
        recipe = replace(TINY, width=1 / 16, batch_size=16, epochs=2)
        run = Run.create("r", recipe, {"data": "colors", "data_path": str(prepared)}, tmp_path)
        training = new_loop(recipe, open_dataset(prepared), run, place("none", "bf16"), 1)
        list(training.fit(max_steps=steps, record_every=1))
        return training

    return make


@pytest.mark.parametrize("steps", [1, 6])
def test_no_picture_is_read_for_it(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], steps: int
) -> None:
    """After the first step there is a checkpoint and no epoch; after the sixth both."""

    def decode(*_: Any) -> None:
        raise AssertionError("a picture was read")

    training = trained(steps)
    monkeypatch.setattr("alexnet_cli.core.data.shards.Split.jpeg", decode)
    write_report(Reporter("train"), training)
    assert capsys.readouterr().err == f"report  {training.run.path / 'report.html'}\n"
    page = Page(training.run.path / "report.html")
    assert page.all_text.count("not computed yet; alexnet report adds it") == 4
    assert sum("filters of tower" in (image["alt"] or "") for image in page.images) == 2
    drawn = [image["alt"] for image in page.images if "over the epochs" in (image["alt"] or "")]
    assert len(drawn) == (4 if steps == 6 else 2)  # of one rate there is no curve
    assert not (training.run.path / "eval").exists()


def test_a_second_interrupt_ends_the_waiting_and_no_more(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def impatient(*_: Any) -> None:
        raise KeyboardInterrupt

    training = trained(1)
    monkeypatch.setattr("alexnet_cli.core.report.charts.render_svg", impatient)
    write_report(Reporter("train"), training)
    assert capsys.readouterr().err.startswith("warn    no report was written: interrupted\nhint    write it with: ")
    assert not (training.run.path / "report.html").exists()


def test_what_ends_in_numbers_that_are_none_leaves_one_too(prepared: Path, tmp_path: Path) -> None:
    words = ["--recipe", "tiny", "--set", "width=0.0625", "-b", "16", "--set", "learning_rate=1e12", "--name", "a b"]
    result = alexnet("train", *words, "--data", str(prepared), "--gpus", "none", folder=tmp_path)
    assert result.returncode == 6
    assert [line[:30] for line in result.stderr.splitlines()[-3:]] == [
        "report  runs/a b/report.html", "error: the loss became nan at ", "hint: the learning rate was 4e",
    ]  # fmt: skip
    what, hint = (line.partition(": ")[2] for line in result.stderr.splitlines()[-2:])
    run = Run(tmp_path / "runs" / "a b")
    assert f"This run failed: {what}. Hint: {hint}. The page shows" in Page(run.path / "report.html").all_text
    told = {key: run.about[key] for key in ("status", "reason", "error", "hint")}
    assert told == {"status": "failed", "reason": "error", "error": what, "hint": hint}
    end = {"event": "end", "reason": "error", "text": what, "hint": hint, "path": "runs/a b", "epoch": 1}
    assert [{**record, "step": None} for record in run.records()][-1:] == [end | {"step": None}]
    evaluated = alexnet("evaluate", "-w", "a b", folder=tmp_path)
    assert evaluated.stderr == f"error: runs/a b has no checkpoint because the run failed: {what}\nhint: {hint}\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (RuntimeError("no fonts"), "RuntimeError: no fonts"),
    ],
)
def test_no_failure_of_it_loses_a_training(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    from alexnet_plugins.train.command import train

    def fails(*_: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("alexnet_cli.core.report.page.write_text", fails)
    app = Typer()
    app.command()(train)
    words = ["--recipe", "tiny", "--set", "width=0.0625", "-b", "16", "--epochs", "1", "--name", "safe", "-q"]
    result = CliRunner().invoke(app, [*words, "--data", str(prepared), "--gpus", "none"])
    assert (result.exit_code, result.exception) == (0, None)
    warned = [line for line in result.stderr.splitlines() if line.startswith("warn")]
    *few, failed = warned
    assert all("images" in line for line in few)
    assert "no report was written" in failed
    assert said in failed
    assert Run.open("safe").about["status"] == "finished"
    assert (tmp_path / "runs" / "safe" / ONNX).is_file()
    assert not (tmp_path / "runs" / "safe" / "report.html").exists()
