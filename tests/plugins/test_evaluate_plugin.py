"""`alexnet evaluate` from the user's seat: every kind of weights, files, words, memory that ends, published figures."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli.console import Reporter
from alexnet_cli.core.data import loader
from alexnet_cli.core.data.classes import WNIDS_SHA256, ClassName
from alexnet_cli.core.data.shards import Split, open_dataset
from alexnet_cli.core.devices import Gpu
from alexnet_cli.core.evaluation import baselines, results
from alexnet_cli.core.evaluation import evaluate as evaluating
from alexnet_cli.core.evaluation.confusion_matrix import RIGHT, WRONG, draw_confusion_matrix
from alexnet_cli.core.evaluation.evaluate import HalvingClassifier
from alexnet_cli.core.evaluation.results import find_published
from alexnet_cli.core.inference import session
from alexnet_cli.core.inference.predict import compute_probabilities
from alexnet_cli.core.model import model_file
from alexnet_cli.core.parallel import placement
from alexnet_cli.errors import DataError, MissingError, StorageError, WeightsError
from alexnet_cli.recipe import CAFFE, FAST, KRIZHEVSKY, PAPER, Recipe
from alexnet_plugins.evaluate import _explain_difference, _load_onnx
from model_files import random_model, save_model, save_onnx

SMALL = replace(FAST, width=1 / 16)


@pytest.fixture
def runs(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with one checkpoint of a network for the prepared classes, in their order, and its ONNX file."""
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    run = tmp_path / "runs" / "one"
    checkpoint = run / "checkpoints" / "00000001"
    checkpoint.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"data_path": str(prepared)}))
    (run / "checkpoints" / "best").symlink_to("00000001")
    named(open_dataset(prepared).classes, checkpoint / "model.safetensors")
    save_onnx(model_file.read_model(checkpoint / "model.safetensors"), run / "alexnet.onnx")
    return run


def named(classes: Sequence[ClassName], path: Path, recipe: Recipe = SMALL, seed: int = 1) -> Path:
    """A random network with these classes, its last layer's rows in their alphabetical order."""
    model = random_model(recipe, len(classes), seed)
    order = np.argsort(np.argsort([name.name for name in classes]))
    fc8 = {f"fc8.{part}": model.tensors[f"fc8.{part}"][order] for part in ("weight", "bias")}
    return save_model(replace(model, tensors={**model.tensors, **fc8}, classes=tuple(classes)), path)


def run(*words: str) -> Result:
    from alexnet_plugins.evaluate import evaluate as command

    app = Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def numbers(*words: str) -> dict[str, Any]:
    result = run(*words, "--json", "-q")
    assert result.exception is None, result.exception
    return dict(json.loads(result.stdout))


def test_what_guessing_gives_stands_beside_the_error(runs: Path) -> None:
    told = run("-w", "one")  # untrained, four classes
    assert "(guessing: 75.0%; 95 % interval " in told.stdout
    assert "better than guessing (75.0%)" in told.stderr
    record = numbers("-w", "one")
    assert record["chance_error"] == record["commonest_error"] == 0.75
    assert baselines.describe_totals(record)
    assert not baselines.describe_totals(record | {"top1_error_interval": (0.1, 0.74)})


@pytest.mark.parametrize("views", ["1", "10"])
def test_run_checkpoint_model_file_and_onnx_file_give_the_same(runs: Path, prepared: Path, views: str) -> None:
    kinds = ["one", str(runs), f"{runs}/checkpoints/00000001", f"{runs}/checkpoints/best/model.safetensors"]
    found = [numbers("-w", kind, "--views", views) for kind in [*kinds, f"{runs}/alexnet.onnx"]]
    assert [record["backend"] for record in found] == ["torch"] * 4 + ["onnx"]
    for record in found:
        assert (record["images"], record["views"], record["split"]) == (20, int(views), "val")
        assert record["protocol"].startswith(
            "center view" if views == "1" else "ten views, mean of softmax (paper 4.1)"
        )
        for key in ("top1_error", "top5_error", "top1_error_interval", "top5_error_interval"):
            assert record[key] == found[0][key]
        assert record["loss"] == pytest.approx(found[0]["loss"], rel=1e-4)
        assert record["top1_error_interval"][0] < record["top1_error"] < record["top1_error_interval"][1]
    assert numbers("-w", "one", "--views", views, "-b", "3")["loss"] == pytest.approx(found[0]["loss"], rel=1e-5)


def test_images_are_loaded_to_the_device_of_the_network(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For a GPU the loader then copies them from pinned memory, while the GPU computes."""
    devices: list[torch.device | None] = []

    class SeenLoader(loader.Loader):
        def __init__(self, split: Split, size: int, threads: int, device: torch.device | None = None) -> None:
            devices.append(device)
            super().__init__(split, size, threads, device)

    monkeypatch.setattr(loader, "Loader", SeenLoader)
    for words in (["one"], ["one", "--towers"], [f"{runs}/alexnet.onnx"]):
        numbers("-w", *words)
    assert devices == [torch.device("cpu"), torch.device("cpu"), None]


@pytest.mark.parametrize("views", ["1", "10"])
def test_a_network_of_no_numbers_has_no_error_rate(runs: Path, prepared: Path, tmp_path: Path, views: str) -> None:
    """Else every picture would be taken for the first class."""
    best = runs / "checkpoints" / "best" / "model.safetensors"
    model = model_file.read_model(best)
    bias = model.tensors["fc8.bias"].copy()
    bias[-1] = np.nan
    broken = save_model(replace(model, tensors={**model.tensors, "fc8.bias": bias}), tmp_path / "broken.safetensors")
    save_onnx(model_file.read_model(broken), tmp_path / "broken.onnx")
    for file in (broken, tmp_path / "broken.onnx"):
        result = run("-w", str(file), "--views", views, "--data", str(prepared))
        assert isinstance(result.exception, WeightsError), result.output


def test_a_permuted_class_list_changes_nothing(runs: Path, prepared: Path, tmp_path: Path) -> None:
    classes = open_dataset(prepared).classes
    permuted = named([classes[i] for i in (2, 0, 3, 1)], tmp_path / "permuted.safetensors")
    save_onnx(model_file.read_model(permuted), tmp_path / "permuted.onnx")
    plain = numbers("-w", "one", "--predictions", str(tmp_path / "plain.jsonl"))
    for name in ("permuted.safetensors", "permuted.onnx"):
        lines = tmp_path / f"{name}.jsonl"
        found = numbers("-w", f"{tmp_path}/{name}", "--data", str(prepared), "--predictions", str(lines))
        assert found["top1_error"] == plain["top1_error"]
        assert found["loss"] == pytest.approx(plain["loss"], rel=1e-4)
        ours, theirs = (
            [
                (line["key"], line["label"], line["top"][0]["label"])
                for line in map(json.loads, file.read_text().splitlines())
            ]
            for file in (lines, tmp_path / "plain.jsonl")
        )
        assert ours == theirs
        assert len(ours) == 20


def test_its_files_and_words(runs: Path, prepared: Path, tmp_path: Path) -> None:
    result = run("-w", "one", "-o", str(tmp_path / "out"))
    assert result.exception is None
    assert not (runs / "eval").exists()
    with (tmp_path / "out" / "val-1_confusion.csv").open() as file:
        table = list(csv.reader(file))
    matrix = np.array([row[1:] for row in table[1:]], int)
    with (tmp_path / "out" / "val-1_per_class.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert matrix.sum(1).tolist() == [int(row["images"]) for row in rows] == [5] * 4
    errors = [float(row["top1_error"]) for row in rows]
    np.testing.assert_allclose(errors, 1 - matrix.diagonal() / matrix.sum(1))
    with Image.open(tmp_path / "out" / "val-1_confusion.png") as picture:
        assert picture.format == "PNG"
    worst = max(rows, key=lambda row: float(row["top1_error"]))
    shown = result.stdout
    assert f"worst   {worst['name']}" in shown
    assert f"{1 - float(worst['top1_error']):.0%} of 5 right" in shown
    np.fill_diagonal(matrix, 0)
    true, seen = np.unravel_index(matrix.argmax(), matrix.shape)
    assert f"mixed   {table[0][1:][true]} taken for {table[0][1:][seen]}" in shown
    assert run("-w", "one").exception is None
    assert sorted(file.name for file in (runs / "eval").iterdir()) == [
        "val-1.json", "val-1_confusion.csv", "val-1_confusion.png", "val-1_per_class.csv",
    ]  # fmt: skip


def test_files_of_one_run_keep_their_results_apart(runs: Path) -> None:
    save_onnx(model_file.read_model(runs / "checkpoints" / "best" / "model.safetensors"), runs / "alexnet-int8.onnx")
    assert run("-w", str(runs / "alexnet-int8.onnx")).exception is None
    assert json.loads((runs / "eval" / "val-1-alexnet-int8.json").read_text())["backend"] == "onnx"


def test_another_data_set_than_the_runs_own_keeps_its_results_apart(runs: Path, prepared: Path, tmp_path: Path) -> None:
    shutil.copytree(prepared, tmp_path / "other")
    assert run("-w", "one").exception is None
    assert run("-w", "one", "--data", str(tmp_path / "other")).exception is None
    found = {file.name: json.loads(file.read_text())["data"] for file in (runs / "eval").glob("*.json")}
    assert found == {"val-1.json": str(prepared), "val-1-other.json": str(tmp_path / "other")}


def test_a_run_that_was_stopped_is_said_to_be_so(runs: Path) -> None:
    assert "not finished" not in run("-w", "one").stderr
    about = json.loads((runs / "run.json").read_text())
    (runs / "run.json").write_text(json.dumps(about | {"status": "interrupted"}))
    (runs / "recipe.toml").write_text(SMALL.to_toml())
    assert "note    the run has not finished: epoch 0 of 30 so far" in run("-w", "one").stderr
    (runs / "run.json").write_text(json.dumps(about | {"status": "failed", "error": "the disk is full"}))
    assert "note    the run failed (the disk is full): epoch 0 of 30 so far" in run("-w", "one").stderr


def test_a_folder_that_cannot_be_is_known_before_the_work(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(evaluating, "evaluate", None)
    result = run("-w", "one", "-o", str(tmp_path / "file"))
    assert isinstance(result.exception, StorageError)


def test_a_subset_is_a_note_and_an_unknown_class_an_error(runs: Path, prepared: Path, tmp_path: Path) -> None:
    classes = open_dataset(prepared).classes
    more = named([*classes, ClassName("violet\x1b[2J")], tmp_path / "more.safetensors")
    liked = model_file.read_model(more)
    liked.tensors["fc8.bias"][4] = 1000.0  # so that it is the answer to everything
    save_model(liked, more)
    result = run("-w", str(more), "--data", str(prepared))
    assert result.exception is None
    assert "taken for violet\\x1b" in result.stdout
    assert "\x1b" not in result.stdout + result.stderr
    assert "4 of the network's 5 classes" in result.stderr
    assert "warn    100.0% of the predictions are violet\\x1b[2J, but only 0.0% of the images" in result.stderr
    fewer = named(classes[1:], tmp_path / "fewer.safetensors")
    error = run("-w", str(fewer), "--data", str(prepared)).exception
    assert isinstance(error, DataError)
    assert "unknown to the network, such as blue" in error.what


def test_two_classes_of_one_name_are_not_guessed_at() -> None:
    bird, machine = ClassName("crane", "n02012849"), ClassName("crane", "n03126707")
    order = evaluating.match_classes((bird, machine), (machine, bird), Path("m"))
    assert order is not None
    assert order.tolist() == [1, 0]  # told apart by wnid
    for model, data in (((bird, machine), (ClassName("crane"),)), ((ClassName("crane"),), (bird, machine))):
        with pytest.raises(DataError, match="crane is the name of several"):
            evaluating.match_classes(model, data, Path("m"))


def ended(kind: str) -> Exception:
    """An error as PyTorch on a GPU, PyTorch on a CPU, ONNX Runtime and numpy raise it when memory ends."""
    if kind == "onnx":
        error = onnxruntime.capi.onnxruntime_pybind11_state.RuntimeException
        return error("Non-zero status code: Failed to allocate memory for requested buffer of size 123")  # type: ignore[no-any-return]
    messages = "[enforce fail at alloc_cpu.cpp:114] . DefaultCPUAllocator: can't allocate memory: you tried 1 bytes."
    return {"cuda": torch.OutOfMemoryError("CUDA out of memory."), "cpu": RuntimeError(messages)}.get(
        kind, MemoryError()
    )


@pytest.mark.parametrize("kind", ["cuda", "cpu", "onnx", "numpy"])
def test_memory_that_ends_halves_the_batch(runs: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    plain, seen = numbers("-w", "one"), []

    def poor(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            images = arguments[-1] if kind != "onnx" else arguments[0]
            seen.append(len(images))
            if len(images) > 3:
                raise ended(kind)
            return function(*arguments)

        return call

    monkeypatch.setattr(evaluating.TorchClassifier, "__call__", poor(evaluating.TorchClassifier.__call__))
    monkeypatch.setattr("alexnet_cli.core.inference.predict.compute_probabilities", poor(compute_probabilities))
    weights_of = str(runs / "alexnet.onnx") if kind == "onnx" else "one"
    result = run("-w", weights_of, "--json", "-b", "16")
    assert result.exception is None
    assert seen[:3] == [16, 8, 4]
    assert max(seen[3:]) == 2
    assert result.stderr.count("using a batch size of 2") == 1
    found = json.loads(result.stdout)
    assert found["top1_error"] == plain["top1_error"]
    assert found["loss"] == pytest.approx(plain["loss"], rel=1e-4)


def test_not_one_image_and_other_errors() -> None:
    def never(images: Any) -> Any:
        raise MemoryError

    def broken(images: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    with pytest.raises(MissingError, match="a batch of one image"):
        HalvingClassifier(never)(np.zeros((5, 2)))
    with pytest.raises(RuntimeError, match="shapes"):
        HalvingClassifier(broken)(np.zeros((5, 2)))


def test_published_figures_are_those_of_the_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors in % from the paper, the log of net #145 and Caffe's model pages, for the data set they are of only."""
    import hashlib

    wnids = [f"n{i:08d}" for i in range(1000)]
    classes = [ClassName(f"class {i}", wnid) for i, wnid in enumerate(wnids)]
    assert find_published(PAPER, classes) is None  # a thousand classes, but others
    digest = hashlib.sha256("\n".join(wnids).encode()).hexdigest()
    assert digest != WNIDS_SHA256
    monkeypatch.setattr("alexnet_cli.core.data.classes.WNIDS_SHA256", digest)
    caffenet = replace(CAFFE, stage1_order="relu-pool-norm", stage2_order="relu-pool-norm")
    expected = {
        PAPER: (10, 40.7, 18.2), FAST: (10, 40.7, 18.2), KRIZHEVSKY: (10, 40.664, 18.210),
        CAFFE: (1, 42.9, 19.8), caffenet: (1, 42.6, 19.6),
    }  # fmt: skip
    for recipe, (views, top1, top5) in expected.items():
        figure = find_published(recipe, classes[::-1])
        assert figure is not None
        assert (figure.views, 100 * figure.top1_error, 100 * figure.top5_error) == pytest.approx((views, top1, top5))
    figure = find_published(PAPER, classes)
    assert figure is not None
    assert find_published(PAPER, classes[:-1]) is None
    same, other = results.format_published(figure, 10, 50_000), results.format_published(figure, 1, 1234)
    assert "40.7%" in same
    assert "18.2%" in same
    assert "this is" not in same
    assert "this is the center view and these are 1,234 images" in other


@pytest.mark.parametrize("classes", [2, 10, 60, 300, 1000])
def test_the_picture_of_the_confusions_can_be_read(classes: int) -> None:
    """Cells hold the colors that their shares ask for; the page stays of a size that can be shown."""
    counts = np.zeros((classes, classes), np.int64)
    np.fill_diagonal(counts, 4)
    counts[0] = 0
    counts[0, 0], counts[0, 1] = 3, 1  # one in four
    page = draw_confusion_matrix(counts, [f"class {i}" for i in range(classes)], "title")
    pixels = np.asarray(page)
    assert max(page.size) < 2400
    for color, at_least in ((RIGHT, classes - 1), (255 + 0.5 * (WRONG - 255), 1)):
        hits = np.argwhere((np.abs(pixels - color) <= 1).all(2))
        assert len(hits) >= at_least
    exact = np.argwhere((pixels == RIGHT).all(2))
    first, last = exact.min(0), exact[exact[:, 0] < page.height - 60].max(0)
    assert abs((last - first)[0] - (last - first)[1]) <= 40  # the diagonal goes down as it goes right
    assert (pixels.max(2) < 120).any(1).sum() > 24  # names and title


def test_classes_that_play_no_part_are_left_out_of_the_picture() -> None:
    counts = np.zeros((1000, 1000), np.int64)
    counts[5, 5], counts[7, 9] = 2, 2
    assert draw_confusion_matrix(counts, [f"{i}" for i in range(1000)], "").size[0] < 600


@pytest.mark.parametrize(
    ("precision", "recorded", "said"), [("bf16", 0.5, True), ("bf16", None, False), ("fp32", 0.5, False)]
)
def test_another_error_than_training_told_is_explained(
    precision: str, recorded: float, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"precision": "fp32", "resumed": [{"precision": precision}]}))
    _explain_difference(Reporter("evaluate"), {"metrics": {"top1_error": recorded}}, tmp_path, 0.4)
    told = "note    training recorded 50.0% for these weights in bf16; this is fp32\n"
    assert capsys.readouterr().err == (told if said else "")


@pytest.mark.parametrize(
    ("asked", "provider", "gpu"),
    [(None, "auto", 0), ("none", "cpu", 0), ("1", "cuda", 1), ("all", "cuda", 0)],
)
def test_an_onnx_file_runs_on_the_gpu_that_was_named(
    asked: str | None, provider: str, gpu: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[dict[str, Any]] = []

    class Opened:
        device, fallback_reason, classes, recipe, info = "cuda", "", (), PAPER, {}  # type: ignore[var-annotated]

        def __init__(self, path: Path, **asked: Any) -> None:
            opened.append(asked)

    monkeypatch.setattr(session, "Session", Opened)
    monkeypatch.setattr(placement, "list_gpus", lambda: [Gpu(i, "H100", 80 << 30, "9.0") for i in (0, 1)])
    _load_onnx(Path("a.onnx"), 1, asked)
    assert opened == [{"provider": provider, "gpu": gpu}]
    with pytest.raises(MissingError, match="GPUs available here: 0, 1"):
        _load_onnx(Path("a.onnx"), 1, "2")
