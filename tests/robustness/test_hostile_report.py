"""Reports of damaged, tampered, read-only or changing runs: a page, or a clear error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.evaluation import results
from alexnet_cli.core.files import hash_file, replace_link, write_text
from alexnet_cli.core.model import model_file
from alexnet_cli.core.report import collect
from alexnet_cli.core.report.collect import collect_report, find_run_data
from alexnet_cli.core.report.page import render_page
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError, StorageError, UsageError, WeightsError
from model_files import random_model, save_model
from report_cases import NAMES, RECIPE, Page, hostile_data, make_run, read_result, report

HUGE = int("9" * 400)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return hostile_data(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> Run:
    """A run with its report."""
    run = make_run(tmp_path_factory.mktemp("runs"), data)
    read_result(report("-w", str(run.path), "--json", "-q"))
    return run


@pytest.fixture
def copy(shown: Run, tmp_path: Path) -> Run:
    """Another one like it, to be changed."""
    shutil.copytree(shown.path, tmp_path / "copy")
    return Run(tmp_path / "copy")


@pytest.mark.parametrize("value", [5, [], {"a": [1]}, HUGE, "\0", [[["y"]]]])
def test_run_json_with_values_of_wrong_types(
    tmp_path: Path, data: Dataset, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("alexnet_cli.core.report.page.can_draw", lambda: False)
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path, data, epochs=0)
    keys = ("command", "devices", "versions", "placement", "data_path", "data", "seed", "status", "reason", "resumed")
    run.update(dict.fromkeys((*keys, "precision", "replicas", "started"), value))
    found = find_run_data(run, None)
    assert isinstance(found, str)
    text, shown = render_page(collect_report(run, None, found))
    assert [section.id for section in shown][-1] == "origin"
    assert text.endswith("</html>")


def test_a_run_without_the_name_of_its_data(tmp_path: Path, data: Dataset) -> None:
    run = make_run(tmp_path, data, epochs=0, data_path="/nowhere")
    about = run.about
    del about["data"]
    (run.path / "run.json").write_text(json.dumps(about))
    assert "the data set nowhere cannot be opened: /nowhere is not a prepared data set" in str(find_run_data(run, None))


def test_records_with_values_of_wrong_types(copy: Run) -> None:
    odd: tuple[Any, ...] = (None, HUGE, 1e38, -1, "x", [])
    with (copy.path / "metrics.jsonl").open("a") as file:
        for value in odd:
            for event in ("start", "step", "validation"):
                keys = ("epoch", "step", "steps_per_epoch", "loss", "lr", "top1_error", "train_loss", "chroma_tower1")
                file.write(json.dumps({"event": event, **dict.fromkeys(keys, value)}) + "\n")
    assert read_result(report("-w", str(copy.path), "--json", "-q"))["sections"][2]["note"] is None


def ending(top5: str, text: str) -> str:
    """A table whose last row says so."""
    return text.rstrip().rpartition(",")[0] + f",{top5}\n"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("val-1.json", lambda text: text.replace('"loss": ', '"loss": NaN, "was": ')),
        ("val-1.json", lambda text: text.replace('"loss": ', f'"loss": {HUGE}, "was": ')),
        ("val-1.json", lambda text: text.replace('"images": 12', '"images": 13')),
        ("val-1.json", lambda text: "[" * 5000),
        ("val-1_confusion.csv", lambda text: text.replace(",0,", ",-1,", 1).replace(",0,", ",1,", 1)),
        ("val-1_confusion.csv", lambda text: text.partition("\n")[0]),
        ("val-1_per_class.csv", lambda text: text.replace("\n0,", "\n6,", 1)),
        ("val-1_per_class.csv", lambda text: text.replace(",2,", ",9,", 1)),
        *(("val-1_per_class.csv", partial(ending, top5)) for top5 in ("2.5", "-1", "nan")),
    ],
)  # fmt: skip
def test_inconsistent_results_are_not_used(copy: Run, file: str, change: Callable[[str], str]) -> None:
    path = copy.path / "eval" / file
    text = path.read_text(encoding="utf-8")
    assert change(text) != text
    assert results.read_results(path.parent, "val-1", len(NAMES), {})
    path.write_text(change(text), encoding="utf-8")
    assert results.read_results(path.parent, "val-1", len(NAMES), {}) is None


def test_inconsistent_results_are_computed_again(copy: Run) -> None:
    path = copy.path / "eval" / "val-1_per_class.csv"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("\n0,", "\n-1,", 1), encoding="utf-8")
    read_result(report("-w", str(copy.path), "--json", "-q"))
    assert path.read_text(encoding="utf-8") == text


def test_huge_files_are_refused(copy: Run) -> None:
    for name, size in (("metrics.jsonl", 2**28 + 1), ("run.json", 2**24 + 1)):
        os.truncate(copy.path / name, size)
        error = report("-w", str(copy.path)).exception
        assert isinstance(error, DataError)
        assert f"{name} cannot be read: it has {size:,} bytes" in error.what


def test_a_checkpoint_or_a_recipe_is_needed(tmp_path: Path, data: Dataset) -> None:
    run = make_run(tmp_path, data, epochs=0)
    (run.path / "recipe.toml").unlink()
    error = report("-w", str(run.path)).exception
    assert isinstance(error, DataError)
    assert (error.exit_code, error.hint) == (3, "put recipe.toml back into its folder")
    run = make_run(tmp_path, data, "other", epochs=1)
    (run.path / "recipe.toml").write_text("= 5")
    assert read_result(report("-w", str(run.path), "--json", "-q"))["top1_error"] is not None, "its checkpoint has one"


def test_a_run_that_cannot_be_written_to(copy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("eval", "neighbors"):
        shutil.rmtree(copy.path / name)
    before = sorted(copy.path.rglob("*"))
    monkeypatch.setattr("os.access", lambda *_: False)  # who runs the tests may be allowed everything
    result = report("-w", str(copy.path), "-o", str(tmp_path / "elsewhere" / "page.html"))
    assert result.exit_code == 0
    assert f"note    the computed results are only on the page: {copy.path} cannot be written to\n" in result.stderr
    page = Page(tmp_path / "elsewhere" / "page.html")
    assert "Missing:" not in page.all_text
    assert sum((image["alt"] or "").startswith("Training image of") for image in page.images) == 30
    assert sorted(copy.path.rglob("*")) == before


def test_a_failing_eval_folder_leaves_the_page(copy: Run, tmp_path: Path) -> None:
    shutil.rmtree(copy.path / "eval")
    (copy.path / "eval").write_text("in the way")
    result = report("-w", str(copy.path), "-o", str(tmp_path / "page.html"))
    assert result.exit_code == 0
    assert result.stderr.count(f"the computed results are only on the page: cannot write to {copy.path / 'eval'}") == 1


def test_the_output_is_checked_before_computing(copy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(*_: Any) -> None:
        raise AssertionError("it began")

    monkeypatch.setattr("alexnet_cli.core.report.collect.collect_report", compute)
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "file").write_text("")
    error: Any = report("-w", str(copy.path), "-o", str(tmp_path / "folder.html")).exception
    assert isinstance(error, UsageError)
    assert "folder.html is a folder" in error.what
    error = report("-w", str(copy.path), "-o", str(tmp_path / "file" / "page.html")).exception
    assert isinstance(error, StorageError)
    assert error.what.endswith("page.html: File exists")


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(OSError, match="directory"):
        write_text(tmp_path / "page.html", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.fixture
def moving(copy: Run, data: Dataset) -> tuple[Path, Callable[[], None]]:
    """The pointer to the best checkpoint, and what a training does that goes on: another best, and the old one gone."""
    for step, seed in ((20, 1), (40, 2)):
        folder = copy.checkpoints / f"{step:08}"
        folder.mkdir()
        model = replace(random_model(RECIPE, len(NAMES), seed=seed), classes=data.classes)
        save_model(model, folder / "model.safetensors")
    shutil.rmtree(copy.checkpoints / "best")
    replace_link(copy.checkpoints / "best", copy.checkpoints / "00000020")

    def move() -> None:
        replace_link(copy.checkpoints / "best", copy.checkpoints / "00000040")
        shutil.rmtree(copy.checkpoints / "00000020", ignore_errors=True)

    return copy.checkpoints / "best" / "model.safetensors", move


def test_a_checkpoint_that_is_dropped_after_it_was_read(
    moving: tuple[Path, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, move = moving
    expected = hash_file(path)
    monkeypatch.setattr(collect, "read_model", lambda real: (model_file.read_model(real), move())[0])
    found = read_result(report("-w", str(path.parents[2]), "--json", "-q"))
    assert found["path"] == str(path.parents[2] / "report.html")
    assert [s["note"] for s in found["sections"] if s["id"] in collect.PARTS] == [None] * 4
    assert expected not in (path.parents[2] / "eval" / "val-1.json").read_text(), "it stands for another by now"


def test_a_checkpoint_that_is_dropped_before_it_is_read(
    moving: tuple[Path, Callable[[], None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, move = moving

    def read(real: Path) -> model_file.Model:
        move()
        return model_file.read_model(real)

    monkeypatch.setattr(collect, "read_model", read)
    assert collect.open_model(path).sha256 == hash_file(path)
    shutil.rmtree(path.parent.resolve())
    with pytest.raises(WeightsError, match="does not exist"):
        collect.open_model(path)
