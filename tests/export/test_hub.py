"""A folder for the Hub holds the model file itself and a card that says what was measured, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from markdown_it import MarkdownIt
from safetensors.numpy import load_file
from scipy.stats import binomtest

import alexnet_cli as alexnet
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.export.hub import FILES, MeasuredError, write_hub_folder
from alexnet_cli.core.model.model_file import Model, read_model
from alexnet_cli.errors import StorageError
from alexnet_cli.recipe import CAFFE, PAPER
from commands import alexnet as run_alexnet
from model_files import draw, random_model, save_model

SMALL = replace(PAPER, width=1 / 16)
HOSTILE = 'a|b: "c" #`d` [e](f)\n---\n{{ name }} <b> \\ \udcff \u2028 \u00e9 \U0001f600 $x$'


def make_run(folder: Path, info: Mapping[str, Any], classes: int = 10, recipe: Any = SMALL) -> Model:
    """Write a run of a network with random weights, and return the network."""
    checkpoint = folder / "runs" / "mine" / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    (folder / "runs" / "mine" / "run.json").write_text('{"status": "finished"}')
    path = save_model(random_model(recipe, classes, info=info), checkpoint / "model.safetensors")
    return read_model(path)


def write_evaluation(folder: Path, name: str, **totals: Any) -> None:
    """Write an evaluation of the run's weights as `alexnet evaluate` does, as far as it is read."""
    weights = folder / "runs" / "mine" / "checkpoints" / "best" / "model.safetensors"
    record = {
        "images": 200, "views": 1, "top1_error": 0.27, "top5_error": 0.016, "split": "val", "data": "/home/me/pets",
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(), **totals,
    }  # fmt: skip
    path = folder / "runs" / "mine" / "eval" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(record))


def export(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run_alexnet("export", "-w", "mine", "--hub", "out", *words, folder=folder)


def read_front_matter(folder: Path) -> dict[str, Any]:
    """Return the metadata at the top of the card, parsed as YAML."""
    yaml = pytest.importorskip("yaml")
    _, text, _ = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return dict(yaml.safe_load(text))


def read_results(folder: Path) -> list[list[str]]:
    """Return the rows of the card's table of errors."""
    text = (folder / "README.md").read_text(encoding="utf-8").partition("| protocol |")[2].partition("\n\n")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in text.splitlines()[2:]]


def read_lines(text: str) -> list[str]:
    """Return the text of every heading, paragraph and cell of a Markdown document, as a reader sees it."""
    parser = MarkdownIt("commonmark").enable("table")
    inlines = [token.children or [] for token in parser.parse(text) if token.type == "inline"]
    assert {child.type for children in inlines for child in children} <= {"text", "code_inline", "softbreak"}
    return ["".join(child.content for child in children) for children in inlines]


def test_the_folder_is_a_network_wherever_it_is_moved(tmp_path: Path) -> None:
    model = make_run(tmp_path, {"data": "pets"})
    result = export(tmp_path, "--json", "-q")
    assert result.returncode == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["files"] == [str(Path("out") / name) for name in FILES]
    assert record["bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    moved = tmp_path / "elsewhere" / "net"
    shutil.copytree(tmp_path / "out", moved)
    shutil.rmtree(tmp_path / "out")
    assert (moved / "model.safetensors").read_bytes() == model.path.read_bytes()
    assert {name: tensor.shape for name, tensor in load_file(moved / "model.safetensors").items()} == {
        name: tensor.shape for name, tensor in model.tensors.items()
    }
    image = draw(tmp_path / "image.png", 1)
    net = alexnet.load(moved)
    probabilities = net(net.preprocess([image])).softmax(1)[0].detach()
    answer = run_alexnet("predict", image, "-w", str(moved), "--json", "-q", folder=tmp_path)
    for label in json.loads(answer.stdout)["top"]:
        assert label["probability"] == pytest.approx(float(probabilities[label["index"]]), abs=1e-5)
    again = run_alexnet("export", "-w", str(moved), "--hub", "third", folder=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "third" / "model.safetensors").read_bytes() == model.path.read_bytes()


@pytest.mark.parametrize("recipe", [SMALL, replace(CAFFE, width=1 / 16)], ids=lambda recipe: recipe.name)
def test_the_config_says_what_the_network_is(recipe: Any, tmp_path: Path) -> None:
    crane = (ClassName("crane", "n02012849"), ClassName("crane", "n03126707"), ClassName(HOSTILE))
    model = replace(random_model(recipe, 3), classes=crane)
    model = replace(model, path=save_model(model, tmp_path / "model.safetensors"))
    write_hub_folder(model, tmp_path / "out", [])
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="ascii"))
    assert config["id2label"] == {"0": "crane (n02012849)", "1": "crane (n03126707)", "2": HOSTILE}
    assert config["label2id"] == {label: int(i) for i, label in config["id2label"].items()}
    assert (config["num_labels"], config["image_size"]) == (3, recipe.input_size)
    assert config["preprocessing"]["crop"] == recipe.input_size
    net = alexnet.load(tmp_path / "out")
    assert alexnet.Recipe(**config["recipe"] | {"drop_epochs": tuple(config["recipe"]["drop_epochs"])}) == net.recipe
    assert torch.equal(net.mean, torch.from_numpy(np.array(model.mean)))


def test_the_card_has_the_errors_that_evaluate_measured(tmp_path: Path) -> None:
    make_run(tmp_path, {"data": "pets", "metrics": {"top1_error": 0.5, "top5_error": 0.25}})
    write_evaluation(tmp_path, "val-1")
    write_evaluation(tmp_path, "val-10", views=10, top1_error=0.25, top5_error=0.01)
    write_evaluation(tmp_path, "train-1", split="train", top1_error=0.0)
    write_evaluation(tmp_path, "val-1-00000400", weights_sha256="0" * 64, top1_error=0.9)
    write_evaluation(tmp_path, "bad-share", top1_error=-1)
    write_evaluation(tmp_path, "bad-images", images=0)
    write_evaluation(tmp_path, "bad-views", views=3)
    (tmp_path / "runs" / "mine" / "eval" / "bad.json").write_text("[")
    result = export(tmp_path)
    assert result.returncode == 0, result.stderr
    low, high = binomtest(54, 200).proportion_ci(method="wilson")
    rows = read_results(tmp_path / "out")
    center = ["center view, every image once", "pets", "val", "200", "27.0%", f"{low:.1%} to {high:.1%}", "1.6%"]
    assert rows[0][:7] == center
    assert [row[4] for row in rows] == ["27.0%", "25.0%"]
    assert rows[1][0].startswith("ten views")
    (index,) = read_front_matter(tmp_path / "out")["model-index"]
    accuracies = [[metric["value"] for metric in result["metrics"]] for result in index["results"]]
    assert np.array(accuracies) == pytest.approx(1 - np.array([[0.27, 0.016], [0.25, 0.01]]))
    assert index["results"][0]["dataset"] == {"type": "imagefolder", "name": "pets", "split": "val"}
    assert "/home" not in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")


def test_without_an_evaluation_the_card_has_the_error_of_the_training(prepared: Path, tmp_path: Path) -> None:
    digest = hashlib.sha256((prepared / "dataset.json").read_bytes()).hexdigest()
    metrics = {"top1_error": 0.35, "top5_error": 0.0}
    make_run(tmp_path, {"data": "colors", "data_hash": digest, "metrics": metrics}, classes=4)
    assert export(tmp_path).returncode == 0
    protocol = "center view, validation during training"
    assert read_results(tmp_path / "out") == [[protocol, "colors", "val", "unknown", "35.0%", "unknown"]]
    about = {"status": "finished", "data_path": str(prepared), "data_hash": digest}
    (tmp_path / "runs" / "mine" / "run.json").write_text(json.dumps(about))
    shutil.rmtree(tmp_path / "out")
    assert export(tmp_path).returncode == 0
    low, high = binomtest(7, 20).proportion_ci(method="wilson")
    assert read_results(tmp_path / "out") == [
        [protocol, "colors", "val", "20", "35.0%", f"{low:.1%} to {high:.1%}"]  # no top-5 error of four classes
    ]


@pytest.mark.parametrize("metrics", [None, "high", {"top1_error": 7.0, "top5_error": 0.1}, {"top1_error": None}])
def test_without_any_error_the_card_says_so(metrics: Any, tmp_path: Path) -> None:
    make_run(tmp_path, {"metrics": metrics})
    result = export(tmp_path)
    assert result.returncode == 0, result.stderr
    assert "no error of these weights is known" in result.stderr
    assert "Not measured." in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "model-index" not in read_front_matter(tmp_path / "out")


def test_names_break_neither_yaml_nor_markdown(tmp_path: Path) -> None:
    model = random_model(SMALL, 6, info={"data": HOSTILE, "run": HOSTILE, "epoch": HOSTILE})
    classes = tuple(ClassName(f"{i}{HOSTILE}") for i in range(6))
    model = replace(model, path=save_model(model, tmp_path / "model.safetensors"), classes=classes)
    error = MeasuredError(HOSTILE, HOSTILE, HOSTILE, 10, 0.1, 0.0, (0.0, 0.4), (0.0, 0.3))
    out = tmp_path / "\U0001f600 #x: 'y'"
    write_hub_folder(model, out, [error])
    text = (out / "README.md").read_text(encoding="utf-8")
    shown = HOSTILE.translate({ord(c): "\ufffd" for c in "\n\udcff\u2028"})
    (index,) = read_front_matter(out)["model-index"]
    assert index["name"] == out.name
    assert index["results"][0]["dataset"] == {"type": "imagefolder", "name": shown, "split": shown}
    lines = read_lines(text.split("---\n", 2)[2])
    assert lines[0] == out.name
    assert [shown, shown, shown, "10", "10.0%", "0.0% to 40.0%", "0.0%", "0.0% to 30.0%"] == lines[
        lines.index(shown) : lines.index(shown) + 8
    ]
    assert f"6: {', '.join(f'{i}{shown}' for i in range(6))}" in lines
    assert f"{shown}, epoch {shown}, run {shown}" in lines


def test_imported_weights_have_the_origin_of_their_file(tmp_path: Path) -> None:
    make_run(
        tmp_path, {"imported": {"file": "bvlc.caffemodel", "format": "Caffe"}}, recipe=replace(CAFFE, width=1 / 16)
    )
    assert export(tmp_path).returncode == 0
    text = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "| imported from | bvlc.caffemodel (Caffe) |" in text
    assert "and in response normalization" in text
    assert "trained on" not in text


def test_only_an_empty_folder_is_filled(tmp_path: Path) -> None:
    make_run(tmp_path, {})
    (tmp_path / "out" / ".git").mkdir(parents=True)
    assert export(tmp_path).returncode == 0
    (tmp_path / "card.md").write_text("my own")
    for folder, message in (("out", "not empty"), ("card.md", "is a file"), ("runs/mine", "not empty")):
        before = sorted(tmp_path.rglob("*"))
        result = run_alexnet("export", "-w", "mine", "--hub", folder, folder=tmp_path)
        assert (result.returncode, message in result.stderr) == (2, True)
        assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_run(tmp_path, {})

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alexnet_cli.core.export.hub.write_text", fail)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StorageError, match="No space left"):
        write_hub_folder(model, tmp_path / "out", [])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "words",
    [("-o", "a.onnx"), ("--precision", "fp16"), ("--calibrate", "pets"), ("--no-verify",), ("--data", "pets")],
    ids=lambda words: words[0],
)
def test_options_of_onnx_files_are_refused(words: tuple[str, ...], tmp_path: Path) -> None:
    result = export(tmp_path, *words)
    assert result.returncode == 2
    assert f"{words[0]} has no effect with --hub" in result.stderr
