"""`alexnet export --precision`: a file that loses too much is refused; a kept one records the measurement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.export import export as exporting
from alexnet_cli.core.export import quantize
from alexnet_cli.core.export.export import synthetic_crops, verify
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.intervals import PairedCounts
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.errors import DataError, UsageError, VerificationError
from alexnet_cli.recipe import PAPER
from model_files import random_model, save_model

SMALL = replace(PAPER, width=1 / 16)
Crops = npt.NDArray[np.uint8]
COLORS = ("blue", "green", "red", "yellow")


def save_color_model(path: Path) -> Path:
    """A model file for the four colors."""
    model = random_model(SMALL, 4)
    return save_model(replace(model, classes=tuple(ClassName(name) for name in COLORS)), path)


def label_by_float32(model: Model, crops: Crops) -> list[tuple[Crops, npt.NDArray[np.int64]]]:
    """Return labels that float32 always predicts."""
    return [(crops, Session(model, provider="cpu").logits(crops).argmax(1))]


def test_what_loses_too_much_is_refused_unless_forced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, crops, path = random_model(SMALL), synthetic_crops(224, 24), tmp_path / "a.onnx"
    path.write_bytes(b"the one from before")
    ranges = quantize.measure_ranges
    # The middle of the network in five steps instead of 256.
    coarse = {"relu3": 64.0, "relu4": 64.0}
    monkeypatch.setattr(
        quantize, "measure_ranges",
        lambda proto, c: {n: (a, b * coarse.get(n, 1)) for n, (a, b) in ranges(proto, c).items()},
    )  # fmt: skip
    with pytest.raises(VerificationError, match="points of top-1 accuracy") as caught:
        exporting.export_int8(model, path, crops, (crops, label_by_float32(model, crops)))
    assert caught.value.exit_code == 6
    assert path.read_bytes() == b"the one from before"
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]
    _, counts = exporting.export_int8(model, path, crops, (crops, label_by_float32(model, crops)), force=True)
    assert counts.accuracies[0] == 1
    assert counts.difference > exporting.MAX_LOSS
    measured = Session(path, provider="cpu").metadata.measured
    assert measured["accuracy"]["lost"] == pytest.approx(counts.difference)


@pytest.mark.parametrize(
    ("accuracy", "refused"),
    [
        (PairedCounts(75, 26, 1, 0), False),  # one image of 75 is 1.3 points
        (PairedCounts(75, 25, 2, 0), True),
        (PairedCounts(500, 300, 6, 1), False),  # one point
        (PairedCounts(500, 300, 6, 0), True),
    ],
)
def test_a_single_image_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accuracy: PairedCounts, refused: bool
) -> None:
    model, crops, path = random_model(SMALL), synthetic_crops(224, 2), tmp_path / "a.onnx"
    monkeypatch.setattr(exporting, "compare_accuracy", lambda *_: accuracy)
    if refused:
        with pytest.raises(
            VerificationError, match=rf"on {accuracy.images} images .* 95 % interval of the loss [-+]\d"
        ):
            exporting.export_int8(model, path, crops, (crops, []))
    else:
        exporting.export_int8(model, path, crops, (crops, []))
    assert path.exists() != refused


def test_a_good_file_says_what_was_measured(tmp_path: Path) -> None:
    model, crops, path = random_model(SMALL), synthetic_crops(224, 24), tmp_path / "a.onnx"
    against_torch, _ = exporting.export_int8(model, path, crops, (crops, label_by_float32(model, crops)))
    session = Session(path, provider="cpu")
    assert session.metadata.precision == "int8"
    assert session.metadata.measured["calibration_images"] == 24
    assert session.metadata.measured["accuracy"]["images"] == 24
    accuracy = verify(Session(model, provider="cpu").logits, session.logits, crops)
    assert against_torch.max_abs_difference == pytest.approx(accuracy.max_abs_difference, rel=1e-2)
    assert session.classes == model.classes


def test_images_to_measure_on_are_all_or_evenly_spaced(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset, model = open_dataset(prepared), random_model(SMALL, 4)
    split = dataset.split("val")
    assert split.spread_rows(100).tolist() == list(range(20))
    assert split.spread_rows(3).tolist() == [0, 9, 19]
    monkeypatch.setattr(exporting, "BATCH", 8)
    crops, labeled = exporting.load_check_images(dataset, model, np.array([3, 2, 1, 0]))
    assert len(crops) == 20
    batches = list(labeled)
    assert [len(crops) for crops, _ in batches] == [8, 8, 4]
    assert batches[0][0].shape == (8, 3, 224, 224)
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in batches]), 3 - split.labels)


def run(*words: str) -> Result:
    from alexnet_plugins.export.command import export as command

    app = Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def test_the_command_calibrates_measures_and_tells(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_color_model(tmp_path / "m.safetensors")
    result = run("-w", "m.safetensors", "--data", str(prepared), "--precision", "int8", "--force", "--json")
    assert result.exception is None
    record = json.loads(result.stdout)
    assert record["path"] == "alexnet-int8.onnx"
    assert record["precision"] == "int8"
    assert record["bytes"] == (tmp_path / "alexnet-int8.onnx").stat().st_size
    assert record["calibration"] == {"images": 48, "data": str(prepared)}
    assert record["accuracy"]["images"] == 20
    assert record["accuracy"]["lost"] == pytest.approx(record["accuracy"]["float32"] - record["accuracy"]["int8"])
    assert 0 < record["max_abs_difference"] < 0.1
    change = 100 * (record["accuracy"]["int8"] - record["accuracy"]["float32"])
    assert f"{change:+.2f} points (95 % interval" in result.stderr
    unmeasured = run(
        "-w", "m.safetensors", "--calibrate", str(prepared), "--precision", "int8", "--no-verify", "--json"
    )
    assert unmeasured.exception is None
    record = json.loads(unmeasured.stdout)
    assert (record["accuracy"], record["images"]) == (None, 0)


def test_the_command_in_float16(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_color_model(tmp_path / "m.safetensors")
    result = run("-w", "m.safetensors", "--data", str(prepared), "--precision", "fp16", "--json", "-q")
    assert result.exception is None
    record = json.loads(result.stdout)
    assert (record["path"], record["precision"]) == ("alexnet-fp16.onnx", "fp16")
    info = Session(tmp_path / "alexnet-fp16.onnx", provider="cpu").metadata
    assert (info.precision, info.measured["images"]) == ("fp16", 20)


def test_options_that_do_not_fit_are_refused(tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_color_model(tmp_path / "m.safetensors")
    save_model(random_model(SMALL, 4), tmp_path / "other.safetensors")
    int8 = ("--precision", "int8")
    assert isinstance(run("-w", "m.safetensors", "--calibrate", str(prepared)).exception, UsageError)
    assert isinstance(run("-w", "m.safetensors", "--force", "--precision", "fp16").exception, UsageError)
    assert isinstance(run("-w", "m.safetensors", *int8, "--force", "--no-verify").exception, UsageError)
    assert isinstance(run("-w", "m.safetensors", *int8).exception, DataError)  # nothing to calibrate on
    strangers = run("-w", "other.safetensors", *int8, "--data", str(prepared))
    assert isinstance(strangers.exception, DataError)  # nothing to count right answers of
    assert "unknown to the network" in str(strangers.exception)
    assert not list(tmp_path.glob("*.onnx"))
