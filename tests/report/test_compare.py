"""`alexnet report A B`: the page agrees with `runs`, `evaluate` and literal counts, and names what is missing."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.evaluation.compare import PairedAnswers
from alexnet_cli.core.intervals import PairedCounts
from alexnet_cli.core.report.charts import draw_comparison
from alexnet_cli.core.report.compare import name_lines
from alexnet_cli.core.report.history import read_history
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError, UsageError
from commands import alexnet
from model_files import random_model, save_model
from report_cases import NAMES, RECIPE, Page, hostile_data, make_run, read_result, report


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return hostile_data(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(autouse=True)
def _runs(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs, one and two, which differ in weights and dropout; without charts, which take a second."""
    monkeypatch.chdir(tmp_path)
    for name, seed in (("one", 1), ("two", 2)):
        run = make_run(Path("runs"), data, name)
        model = replace(random_model(RECIPE, len(NAMES), seed), classes=data.classes)
        save_model(model, run.checkpoints / "best" / "model.safetensors")
    (run.path / "recipe.toml").write_text(replace(RECIPE, dropout=0.25).to_toml())
    monkeypatch.setattr("alexnet_cli.core.report.compare.can_draw", lambda: False)


def compare(*words: str) -> dict[str, Any]:
    return read_result(report("one", "two", "--json", "-q", *words))


def test_errors_and_differences_are_those_of_runs() -> None:
    Run(Path("runs/one")).update({"devices": ["CPU, 2 threads"]})
    Run(Path("runs/two")).update({"devices": ["GPU 0", "GPU 1"]})
    found, listed = compare(), json.loads(alexnet("runs", "one", "two", "--json", "-q").stdout)
    shared = listed.keys() - {"schema", "runs"}
    assert {key: found[key] for key in shared} == {key: listed[key] for key in shared}
    assert found["path"] == "report-one-vs-two.html"
    page = Page(Path(found["path"]))
    assert page.tables["Recipe, training data, versions and devices"] == [
        ["", "one", "two"],
        ["recipe dropout probability of dropping a unit of layers 6 and 7", "0.5", "0.25"],
        ["devices", "CPU, 2 threads", "GPU 0, GPU 1"],
    ]
    low, high = listed["difference_interval"]
    rows = dict(page.tables["Top-1 errors with their 95% intervals; that of the difference is paired"][1:])
    expected = f"{100 * listed['difference']:+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"
    assert rows["two minus one, points"] == expected
    assert rows["one"].startswith(f"{listed['top1_error'][0]:.1%} (")


def test_classes_and_images_are_those_of_evaluate() -> None:
    page, right, labels = Page(Path(compare()["path"])), [], []
    for name in ("one", "two"):
        assert alexnet("evaluate", "-w", name, "-q", "--predictions", f"{name}.jsonl").returncode == 0
        lines = [json.loads(line) for line in Path(f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        right.append([line["top"][0]["label"] == line["label"] for line in lines])
        labels = [line["label"].replace("\u202e", "?") for line in lines]
    outcomes = Counter(zip(*right, strict=True))
    assert outcomes[True, False] + outcomes[False, True] > 0
    counts = [outcomes[key] for key in ((True, True), (True, False), (False, True), (False, False))]
    assert [int(row[1]) for row in page.tables["Who is right"][1:]] == counts
    assert f"Only one is right: {counts[1]} images" in page.all_text
    assert f"Only two is right: {counts[2]} images" in page.all_text
    assert len([image for image in page.images if (image["alt"] or "").startswith("Image of")]) == counts[1] + counts[2]
    rows = page.tables["Classes with the largest differences"][1:]
    wrong = [Counter(label for label, is_right in zip(labels, of, strict=True) if not is_right) for of in right]
    assert {row[0]: row[2:4] for row in rows} == {n: [f"{w[n] / 2:.0%}" for w in wrong] for n in set(labels)}


def test_the_class_that_differs_most_comes_first(data: Dataset) -> None:
    labels = np.repeat([0, 1, 2], [4, 10, 5])
    first, second = labels.copy(), labels.copy()
    first[:3], second[4:6], first[14], second[14] = 5, 5, -1, -1
    answers = PairedAnswers(data, labels, np.stack([first, second]), np.ones((2, 19), np.float32))
    ranked = answers.list_classes()
    assert ranked == [(0, PairedCounts(4, 1, 0, 3)), (1, PairedCounts(10, 8, 2, 0)), (2, PairedCounts(5, 4, 0, 0))]
    assert list(ranked[0][1].errors) == [0.75, 0]
    assert answers.whole.difference == pytest.approx((2 - 3) / 19)


def test_one_name_is_the_run_of_w(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_cli.core.report.page.can_draw", lambda: False)
    assert read_result(report("two", "--json", "-q"))["path"] == "runs/two/report.html"


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("one two one", "3 runs: only two can be compared"),
        ("one one", "one and one are the same run"),
        ("one runs/one", "one and runs/one are the same run"),
        ("one nope", "there is no run nope in runs"),
        ("one two -w one", "-w and a RUN are given"),
        ("one two -o page.pdf", "-o page.pdf: not an .html file"),
    ],
)
def test_what_cannot_be_compared(words: str, what: str) -> None:
    error = report(*words.split()).exception
    assert isinstance(error, UsageError)
    assert error.what == what
    assert not list(Path().glob("*.html"))


def test_runs_of_different_data_are_compared_without_images(data: Dataset, prepared: Path) -> None:
    Run(Path("runs/two")).update({"data_hash": "another"})
    found = compare()
    notes = {section["id"]: section["note"] for section in found["sections"]}
    reason = "Not compared on the same images: they were trained on different data sets."
    assert (notes["results"], notes["examples"], notes["filters"]) == (reason, reason, None)
    assert "top1_error" not in found
    assert compare("--data", str(data.path))["images"] == 12
    error = report("one", "two", "--data", str(prepared)).exception
    assert isinstance(error, DataError)
    assert "unknown to the network" in error.what


def test_images_of_another_data_set_are_not_taken_for_those_of_the_runs(data: Dataset) -> None:
    for name in ("one", "two"):  # the set was prepared anew, or is gone and this is the only other one
        Run(Path("runs", name)).update({"data_hash": "of a set that is gone"})
    found = compare()
    assert "top1_error" not in found
    notes = {section["id"]: section["note"] for section in found["sections"]}
    assert notes["results"] == (
        f"Not compared on the same images: they were trained on another data set than {data.path}."
    )
    assert compare("--data", str(data.path))["images"] == 12


def test_runs_of_one_name_are_told_apart_by_their_folders() -> None:
    shutil.copytree("runs/one", "copy/one")
    found = read_result(report("one", "copy/one", "--json", "-q"))
    assert found["runs"] == ["runs/one", "copy/one"]
    assert "AlexNet, run runs/one and run copy/one" in Page(Path(found["path"])).all_text


@pytest.mark.parametrize(
    ("names", "lines"),
    [
        (("one", "two"), ["run one", "run two"]),
        (("short", "much-too-long-for-a-legend"), ["run short", "run much-too-lon…for-a-legend"]),
        (("study-of-lr-0.01-in-epoch-10", "study-of-lr-0.02-in-epoch-10"), ["first run", "second run"]),
    ],
)
def test_the_lines_of_a_chart_have_short_and_different_names(names: tuple[str, str], lines: list[str]) -> None:
    assert name_lines(names) == lines


def test_a_run_without_a_checkpoint_still_has_recipe_and_curves() -> None:
    shutil.rmtree("runs/two/checkpoints/best")
    found = compare()
    notes = {section["id"]: section["note"] for section in found["sections"]}
    assert notes["results"] == "Not compared on the same images: run two has no checkpoint yet."
    assert notes["filters"] == "No filters to show of two."
    assert found["weights"] == ["runs/one/checkpoints/best/model.safetensors", None]


def test_a_chart_has_a_line_for_each_run_whatever_its_name() -> None:
    histories = [read_history(Run(Path("runs", name)).records(), RECIPE) for name in ("one", "two")]
    chart = draw_comparison(["run a$b$", "run <_>"], histories)[0]
    assert "run a$b$" in chart.svg
    assert "run &lt;_&gt;" in chart.svg
    assert chart.point == "Lowest validation error: 47.2% in run a$b$, 47.2% in run <_>."
