"""`import alexnet_cli as alexnet`: the names, and that the functions give what the commands give."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import alexnet_cli as alexnet
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.runs.records import Record
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError, UsageError, WeightsError
from commands import alexnet as run_command

RECIPE = replace(alexnet.recipes["tiny"], width=1 / 16, batch_size=16, epochs=2, precision="fp32")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_runs_and_settings: None) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Record]]:
    """A run of two epochs, and its records."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALEXNET_RUNS_DIR", str(folder))
        records = list(alexnet.train(RECIPE, prepared, name="colors", gpus="none", jobs=1))
    return folder / "colors", records


def test_the_import_is_light_and_knows_its_names() -> None:
    code = "import sys, alexnet_cli; print('torch' in sys.modules, *dir(alexnet_cli))"
    loaded, *names = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert loaded == "False"
    assert set(alexnet.__all__) <= set(names)
    for name in alexnet.__all__:
        assert getattr(alexnet, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        alexnet.lode  # noqa: B018
    assert (Path(alexnet.__file__).parent / "py.typed").is_file()
    assert list(alexnet.recipes) == ["paper", "krizhevsky", "caffe", "fast", "tiny"]


def test_train_yields_the_records_of_metrics_jsonl(trained: tuple[Path, list[Record]]) -> None:
    path, records = trained
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    assert [record.as_dict() for record in records] == lines
    assert [record.epoch for record in records if record.event == "validation"] == [1, 2]
    assert Run(path).about["status"] == "finished"


def test_train_gives_the_weights_of_the_command(trained: tuple[Path, list[Record]], prepared: Path) -> None:
    path, _ = trained
    Path("recipe.toml").write_text((path / "recipe.toml").read_text())
    words = ["train", "--recipe", "recipe.toml", "--data", str(prepared), "--gpus", "none", "--name", "same", "-q"]
    result = run_command(*words)
    assert result.returncode == 0, result.stderr
    ours, theirs = alexnet.load(path / "checkpoints" / "last"), alexnet.load("same/checkpoints/last")
    assert all(torch.equal(a, theirs.state_dict()[name]) for name, a in ours.state_dict().items())


def test_load_and_evaluate_equal_the_command(trained: tuple[Path, list[Record]], prepared: Path) -> None:
    path, _ = trained
    network = alexnet.load(path)
    assert not network.training
    assert network.recipe == RECIPE
    data = alexnet.open_dataset(prepared)
    assert network.classes == data.classes
    for views in (1, 10):
        found = alexnet.evaluate(network, data, views=views)
        result = run_command("evaluate", "-w", str(path), "--views", str(views), "--json", "-q", "--gpus", "none")
        expected = json.loads(result.stdout)
        assert (found.images, found.top1_error) == (expected["images"], expected["top1_error"])
        assert found.loss == pytest.approx(expected["loss"], rel=1e-5)
    assert alexnet.evaluate(path).top1_error == alexnet.evaluate(network, data).top1_error
    errors = found.class_errors
    assert np.mean(errors) == pytest.approx(found.top1_error)  # all classes have the same number of images
    assert alexnet.evaluate(alexnet.load(path).bfloat16(), data).loss == pytest.approx(expected["loss"], rel=0.1)
    with network.without_tower(1):
        assert alexnet.evaluate(network, data).loss != found.loss


def test_evaluate_needs_images_of_its_classes(trained: tuple[Path, list[Record]], prepared: Path) -> None:
    stranger = alexnet.AlexNet(RECIPE, ["cat", "dog"])
    with pytest.raises(DataError, match="unknown to the network"):
        alexnet.evaluate(stranger, prepared)
    with pytest.raises(DataError, match="no split test"):
        alexnet.evaluate(trained[0], split="test")
    with pytest.raises(WeightsError, match="no run, folder or file named nothing"):
        alexnet.load("nothing")


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_export(trained: tuple[Path, list[Record]], prepared: Path, precision: str) -> None:
    network = alexnet.load(trained[0])
    path = alexnet.export(network, "mine.onnx", precision=precision, data=prepared)  # type: ignore[arg-type]
    crops = np.random.default_rng(0).integers(0, 256, (2, 3, 224, 224)).astype(np.uint8)
    mean = network.mean[:, 16:240, 16:240]
    x = (torch.from_numpy(crops).float() - mean) / network.recipe.input_divisor
    expected = network(x).softmax(1).detach().numpy()
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "int8": 0.1}[precision]
    np.testing.assert_allclose(Session(path).probabilities(crops), expected, atol=tolerance)
    assert Path("mine.names.txt").read_text().split("\n")[:-1] == [c.name for c in network.classes]


def test_export_of_new_weights_without_data() -> None:
    assert alexnet.export(alexnet.AlexNet(RECIPE, 2)).is_file()
    with pytest.raises(DataError, match="no prepared data set"):
        alexnet.export(alexnet.AlexNet(RECIPE, 2), precision="int8")


def test_export_refuses_what_it_cannot_write(trained: tuple[Path, list[Record]]) -> None:
    with pytest.raises(UsageError, match="precision is 'int4'"):
        alexnet.export(trained[0], precision="int4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="AlexNet is no run or file"):
        alexnet.train(init_from=alexnet.load(trained[0]))  # type: ignore[arg-type]


def test_prepare_is_the_command(pictures: Path, prepared: Path) -> None:
    data = alexnet.prepare(pictures, "again")
    assert (
        data.hash == alexnet.open_dataset(prepared).hash
        or data.record["files"] == alexnet.open_dataset(prepared).record["files"]
    )
    assert alexnet.prepare(pictures, "again").hash == data.hash
    with pytest.raises(UsageError, match="again"):
        alexnet.prepare(pictures, "again", exif_rotate=True)


def test_fine_tuning_starts_from_a_run(trained: tuple[Path, list[Record]], prepared: Path) -> None:
    start, *_, end = alexnet.train(data=prepared, init_from=trained[0], name="tuned", gpus="none", max_steps=1)
    assert "fc8.weight" in (start.loaded or [])
    assert (end.event, end.reason) == ("end", "max-steps")
    assert Run(Path(str(end.path))).about["status"] == "interrupted"
    assert alexnet.load("tuned").recipe == RECIPE


def test_a_loop_that_ends_early_leaves_a_run_to_resume(prepared: Path) -> None:
    for record in alexnet.train(RECIPE, prepared, name="short", gpus="none"):
        if record.event == "checkpoint":
            break
    about = Run.open("short").about
    assert (about["status"], about["reason"]) == ("interrupted", "stopped")
    assert about["hint"] == "alexnet train --resume short"
    result = run_command("train", "--resume", "short", "--gpus", "none", "-q")
    assert result.returncode == 0, result.stderr
    assert Run.open("short").about["status"] == "finished"


def test_an_error_marks_the_run_as_failed(prepared: Path) -> None:
    diverging = replace(RECIPE, learning_rate=1e30)
    with pytest.raises(alexnet.AlexNetError, match="the loss became"):
        list(alexnet.train(diverging, prepared, name="diverged", gpus="none"))
    assert Run.open("diverged").about["status"] == "failed"
