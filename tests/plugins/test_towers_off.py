"""One tower switched off, gray images and the table of both, against the Python API, Pillow and single evaluations."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli import api
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.evaluation import results
from alexnet_cli.core.files import hash_file
from alexnet_cli.core.intervals import PairedCounts
from alexnet_cli.errors import UsageError, WeightsError
from alexnet_cli.recipe import CAFFE, FAST, Recipe
from model_files import draw, random_model, save_model, save_onnx

SMALL = replace(FAST, width=1 / 16)
RECIPES = {"own norm": SMALL, "joint norm": replace(CAFFE, width=1 / 16)}


def save_run(prepared: Path, folder: Path, recipe: Recipe = SMALL, seed: int = 1) -> Path:
    """A run with a random network for the prepared classes."""
    checkpoint = folder / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"data_path": str(prepared)}))
    model = replace(random_model(recipe, 4, seed), classes=tuple(open_dataset(prepared).classes))
    fc8 = {f"fc8.{part}": 5 * model.tensors[f"fc8.{part}"] for part in ("weight", "bias")}  # varied answers
    save_model(replace(model, tensors={**model.tensors, **fc8}), checkpoint / "model.safetensors")
    return folder


def call(name: str, *words: object) -> Result:
    from alexnet_plugins.evaluate import evaluate
    from alexnet_plugins.predict import predict

    app = Typer()
    app.command("evaluate")(evaluate)
    app.command("predict")(predict)
    return CliRunner().invoke(app, [name, *map(str, words)])


def read(name: str, *words: object) -> dict[str, Any]:
    result = call(name, *words, "--json", "-q")
    assert result.exception is None, result.exception
    return dict(json.loads(result.stdout))


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_evaluate_equals_the_network_of_the_python_api(prepared: Path, tmp_path: Path, recipe: Recipe) -> None:
    run = save_run(prepared, tmp_path / "run", recipe)
    network = api.load(run)
    for tower in (1, 2):
        with network.without_tower(tower):
            expected = api.evaluate(network, prepared)
        found = read("evaluate", "-w", run, "--without-tower", tower)
        assert found["without_tower"] == tower
        assert found["top1_error"] == expected.top1_error
        assert found["loss"] == pytest.approx(expected.loss, rel=1e-4)
        with (run / "eval" / f"val-1-without-tower{tower}_confusion.csv").open() as file:
            matrix = np.loadtxt(file, int, delimiter=",", skiprows=1, usecols=range(1, 5))
        np.testing.assert_array_equal(matrix, expected.confusion)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_predict_equals_the_network_of_the_python_api(prepared: Path, tmp_path: Path, backend: str) -> None:
    run, image = save_run(prepared, tmp_path / "run"), draw(tmp_path / "a.png", 3)
    network = api.load(run)
    with network.without_tower(2):
        expected = network(network.preprocess(image)).softmax(1)[0].detach().numpy()
    found = read("predict", image, "-w", run, "--without-tower", "2", "--backend", backend)
    assert found["without_tower"] == 2
    for label in found["top"]:
        assert label["probability"] == pytest.approx(expected[label["index"]], abs=1e-5)
    assert "without tower 2" in call("predict", image, "-w", run, "--without-tower", "2", "--backend", backend).stderr
    output = tmp_path / "features.npz"
    words = ("--features", "relu5", "-o", output, "--backend", backend, "--without-tower", "2")
    assert call("predict", image, "-w", run, *words).exception is None
    with np.load(output) as features:
        assert features["without_tower"] == 2
        first, second = np.split(features["relu5"][0], 2)
    assert first.any()
    assert not second.any()


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_the_table_is_that_of_six_evaluations(prepared: Path, tmp_path: Path, recipe: Recipe) -> None:
    run = save_run(prepared, tmp_path / "run", recipe)
    table, right, answers = read("evaluate", "-w", run, "--towers"), [], []
    for row in table["towers"]:
        words = ["--without-tower", row["without_tower"]] if row["without_tower"] else []
        words += ["--grayscale"] if row["grayscale"] else []
        single = read("evaluate", "-w", run, *words, "--predictions", tmp_path / "answers.jsonl")
        for key in ("top1_error", "top5_error", "top1_error_interval", "top5_error_interval"):
            assert row[key] == single[key]
        assert row["loss"] == pytest.approx(single["loss"], rel=1e-5)
        lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
        answers.append(np.array([line["top"][0]["index"] for line in lines]))
        right.append(answers[-1] == [line["index"] for line in lines])
    assert [(row["without_tower"], row["grayscale"]) for row in table["towers"]] == [
        (None, False), (2, False), (1, False), (None, True), (2, True), (1, True),
    ]  # fmt: skip

    def compare(first: int, second: int, chosen: Any = slice(None)) -> tuple[float, list[float]]:
        one, other = right[first][chosen], right[second][chosen]
        interval = PairedCounts(len(one), 0, (one & ~other).sum(), (other & ~one).sum()).interval
        return one.mean() - other.mean(), list(interval)

    for i, row in enumerate(table["towers"]):
        for key, first in (("lost_without_tower", i // 3 * 3), ("lost_in_gray", i - 3)):
            difference, interval = row[key], row[f"{key}_interval"]
            if first == i or first < 0:
                assert difference is interval is None
            else:
                expected = compare(first, i)
                assert difference == pytest.approx(expected[0])
                assert interval == pytest.approx(expected[1])
    true = np.array([line["index"] for line in lines])
    assert sorted(row["index"] for row in table["classes"]) == [0, 1, 2, 3]
    for row in table["classes"]:
        chosen = true == row["index"]
        assert row["images"] == chosen.sum()
        np.testing.assert_allclose(row["top1_errors"], [1 - values[chosen].mean() for values in right])
        assert row["answers"] == [(values == row["index"]).sum() for values in answers]
        difference, interval = compare(1, 2, chosen)
        assert row["difference"] == pytest.approx(difference)
        assert row["difference_interval"] == pytest.approx(interval)
    differences = [row["difference"] for row in table["classes"]]
    assert differences == sorted(differences, reverse=True)


def test_other_conditions_keep_their_results_apart(prepared: Path, tmp_path: Path) -> None:
    run = save_run(prepared, tmp_path / "run")
    plain = read("evaluate", "-w", run)
    assert not plain.keys() & {"without_tower", "grayscale"}
    assert read("evaluate", "-w", run, "--grayscale")["grayscale"] is True
    both = call("evaluate", "-w", run, "--grayscale", "--without-tower", "1")
    assert "· without tower 1" in both.stderr
    assert "· gray images" in both.stderr
    table = read("evaluate", "-w", run, "--towers")
    assert json.loads((run / "eval" / "val-1-towers.json").read_text()).items() < table.items()
    stems = ["val-1", "val-1-gray", "val-1-towers", "val-1-without-tower1-gray"]
    assert sorted(file.stem for file in (run / "eval").glob("*.json")) == stems
    assert json.loads((run / "eval" / "val-1.json").read_text()).items() < plain.items()
    checksum = hash_file(run / "checkpoints" / "best" / "model.safetensors")
    assert [found["top1_error"] for found in results.find_evaluations(run / "eval", checksum)] == [plain["top1_error"]]


def test_what_the_table_shows(prepared: Path, tmp_path: Path) -> None:
    run = save_run(prepared, tmp_path / "run")
    result = call("evaluate", "-w", run, "--towers")
    assert result.exception is None
    table = json.loads((run / "eval" / "val-1-towers.json").read_text())
    lines = result.stdout.splitlines()
    for line, name, color, gray in zip(
        lines[1:4], ("whole network", "tower 1 alone", "tower 2 alone"), table["towers"][:3], table["towers"][3:],
        strict=True,
    ):  # fmt: skip
        assert line.startswith(name)
        assert f"{color['top1_error']:.1%}" in line
        assert f"{gray['top1_error']:.1%}   {100 * gray['lost_in_gray']:+.1f} (" in line
    assert lines[4].startswith(f"switching tower 1 off costs {100 * table['towers'][2]['lost_without_tower']:+.1f} (")
    assert [line.split()[0] for line in lines[-4:]] == [row["name"] for row in table["classes"]]


@pytest.mark.parametrize("words", [("--without-tower", "2"), ("--towers",)])
def test_an_onnx_file_is_refused(prepared: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    save_onnx(random_model(SMALL, 4), tmp_path / "network.onnx")
    for name in ("evaluate", "predict") if "--towers" not in words else ("evaluate",):
        inputs = [draw(tmp_path / "a.png", 3)] if name == "predict" else ["--data", str(prepared)]
        error = call(name, *inputs, "-w", tmp_path / "network.onnx", *words).exception
        assert isinstance(error, WeightsError)
        assert "give a run, a checkpoint folder or a .safetensors file" in error.hint


@pytest.mark.parametrize("words", [("--without-tower", "2"), ("--without-tower", "1"), ("--towers",)])
def test_a_network_of_one_tower_has_none_to_switch_off(prepared: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    run = save_run(prepared, tmp_path / "run", replace(SMALL, towers=1))
    errors = [call("evaluate", "-w", run, *words).exception]
    if "--towers" not in words:
        errors.append(call("predict", draw(tmp_path / "a.png", 3), "-w", run, *words).exception)
    for error in errors:
        assert isinstance(error, UsageError)
        assert "has a single tower" in error.what


def test_there_is_no_tower_0_or_3(prepared: Path, tmp_path: Path) -> None:
    run = save_run(prepared, tmp_path / "run")
    for tower in (0, 3):
        error = call("evaluate", "-w", run, "--without-tower", tower).exception
        assert isinstance(error, UsageError)
        assert error.hint == "towers: 1 2"


def test_the_table_measures_every_condition_itself(prepared: Path, tmp_path: Path) -> None:
    run = save_run(prepared, tmp_path / "run")
    for words in (("--grayscale",), ("--without-tower", "1"), ("--predictions", tmp_path / "p.jsonl")):
        assert isinstance(call("evaluate", "-w", run, "--towers", *words).exception, UsageError)
