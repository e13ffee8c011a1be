"""A file is kept only if it agrees with PyTorch; otherwise nothing is left behind."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from typer import Typer
from typer.testing import CliRunner, Result

import alexnet_cli as alexnet
from alexnet_cli.core.data import images
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.plan import Plan
from alexnet_cli.core.data.prepare import pack
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.data.sources import detect_source
from alexnet_cli.core.export import export as exporting
from alexnet_cli.core.export.export import (
    TOLERANCES,
    Logits,
    Precision,
    Verification,
    build_onnx,
    export,
    sample_crops,
    synthetic_crops,
    verify,
)
from alexnet_cli.core.inference.onnx_graph import build_graph, save_graph
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.inference.torch_session import TorchSession
from alexnet_cli.errors import DataError, StorageError, UsageError, VerificationError, WeightsError
from alexnet_cli.recipe import PAPER
from literal_network import VARIANTS
from model_files import draw, random_model, save_model

SMALL = replace(PAPER, width=1 / 16)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_exports_and_agrees_with_pytorch(name: str, tmp_path: Path) -> None:
    model = random_model(replace(VARIANTS[name], width=1 / 16))
    result = export(model, tmp_path / "a.onnx", synthetic_crops(model.recipe.input_size, 6))
    assert result.images == 6
    assert result.top1_agreement == 1.0
    assert result.max_abs_difference < 1e-5
    assert [p.name for p in tmp_path.iterdir()] == ["a.onnx"]


def test_python_refuses_another_suffix(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"a\.pt does not end in \.onnx"):
        alexnet.export(alexnet.AlexNet(SMALL, 2), tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change", [{"lrn_joint": True}, {"stage1_order": "norm-pool-relu"}, {"dropout": 0.4}, {"lrn_alpha": 2e-4}]
)
def test_the_comparison_notices_a_wrong_network(change: dict[str, Any]) -> None:
    model = random_model(SMALL)
    wrong = replace(model, recipe=replace(SMALL, **change))
    crops = synthetic_crops(224, 6)
    assert not verify(TorchSession(model, "cpu").logits, Session(wrong, provider="cpu").logits, crops).passed


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-6), ("fp16", 2.0**-11)])
def test_large_logits_may_differ_by_their_own_rounding(precision: Precision, rounding: float) -> None:
    """The logits of some imported networks are in the thousands, and a softmax of two close ones shows every digit."""
    generator = np.random.default_rng(0)
    crops = np.zeros((32, 3, 2, 2), np.uint8)
    small = generator.uniform(-20, 20, (32, 10)).astype(np.float32)
    small[:, 1] = small[:, 0] = 20.0  # two that are close: their probabilities say most
    noise = generator.uniform(-1, 1, (32, 10)).astype(np.float32)

    def given(logits: npt.NDArray[np.float32]) -> Logits:
        return lambda _: logits

    for scale in (1, 10, 100):
        large = scale * small
        rounded, wrong = ((large + share * np.abs(large) * noise).astype(np.float32) for share in (rounding, 0.01))
        assert verify(given(large), given(rounded), crops, precision).passed, scale
        assert not verify(given(large), given(wrong), crops, precision).passed, scale
    assert verify(given(small), given(small), crops, precision).tolerance == TOLERANCES[precision].probability


def test_verification_counts_as_by_hand() -> None:
    expected = np.array([[0.0, np.log(3.0)], [1.0, 0.0], [2.0, 2.0]], np.float32)
    actual = np.array([[0.0, 0.0], [0.0, 1.0], [2.0, 2.0]], np.float32)
    crops = np.zeros((3, 3, 2, 2), np.uint8)
    result = verify(lambda _: expected, lambda _: actual, crops)
    # 1st: 1/4, 3/4 against 1/2, 1/2, and argmax 0 is not 1. 2nd: swapped. 3rd: a tie, either answer is right.
    share = np.e / (1 + np.e)
    assert result.max_abs_difference == pytest.approx(2 * share - 1, abs=1e-6)
    assert result.max_logit_difference == pytest.approx(np.log(3.0), abs=1e-6)
    assert result.top1_agreement == pytest.approx(1 / 3)
    assert not result.passed


def test_nan_never_passes() -> None:
    crops = np.zeros((1, 3, 2, 2), np.uint8)
    good, bad = np.zeros((1, 2), np.float32), np.full((1, 2), np.nan, np.float32)
    assert verify(lambda _: good, lambda _: good, crops).passed
    assert not verify(lambda _: good, lambda _: bad, crops).passed
    assert not verify(lambda _: bad, lambda _: bad, crops).passed


def test_a_network_that_computes_nan_is_refused(tmp_path: Path) -> None:
    model = random_model(SMALL)
    model.tensors["fc8.bias"][0] = np.nan
    with pytest.raises(WeightsError, match="computes NaN"):
        export(model, tmp_path / "a.onnx", synthetic_crops(224, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_disagrees_is_removed_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.onnx"
    path.write_bytes(b"the one from before")
    monkeypatch.setattr(exporting, "build_graph", lambda model: build_graph(random_model(SMALL, seed=1)))
    with pytest.raises(VerificationError, match="disagrees") as caught:
        export(random_model(SMALL), path, synthetic_crops(224, 4))
    assert caught.value.exit_code == 6
    assert path.read_bytes() == b"the one from before"
    assert len(list(tmp_path.iterdir())) == 1


def test_unverified_files_work_too(tmp_path: Path) -> None:
    save_graph(build_onnx(random_model(SMALL), "fp32"), tmp_path / "a.onnx")
    assert Session(tmp_path / "a.onnx", provider="cpu").recipe.input_size == 224


def test_a_place_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError):
        save_graph(build_onnx(random_model(SMALL), "fp32"), tmp_path / "no such folder" / "a.onnx")
    assert os.listdir(tmp_path) == []


def test_synthetic_crops_are_the_same_every_time_and_varied() -> None:
    crops = synthetic_crops(227, 12)
    np.testing.assert_array_equal(crops, synthetic_crops(227, 12))
    assert crops.shape == (12, 3, 227, 227)
    assert crops.reshape(12, -1).std(1).min() > 5
    assert len({crop.tobytes() for crop in crops}) == 12


def test_tolerance_follows_the_logits() -> None:
    """An untrained network's probabilities are all alike; its logits still have to agree."""
    flat = np.array([[1e-5, 2e-5, 3e-5]], np.float32)
    crops = np.zeros((1, 3, 2, 2), np.uint8)
    result = verify(lambda _: flat, lambda _: np.roll(flat, 1), crops)
    assert result.max_abs_difference < exporting.MAX_DIFFERENCE
    assert not result.passed
    assert Verification(1, 0.0, 0.0, 0.0, 1.0).passed


def run(*words: str) -> Result:
    from alexnet_plugins.export.command import export as command

    app = Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def test_command_writes_where_it_says_and_reports_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(random_model(SMALL), tmp_path / "model.safetensors")
    result = run("-w", "model.safetensors", "--json", "-q")
    assert result.exception is None
    record = json.loads(result.stdout)
    assert record["schema"] == "alexnet.export/1"
    assert record["path"] == "alexnet.onnx"
    assert record["bytes"] == (tmp_path / "alexnet.onnx").stat().st_size
    assert (tmp_path / record["names"]).read_text() == "".join(f"class {i}\n" for i in range(10))
    assert record["precision"] == "fp32"
    assert record["top1_agreement"] == 1.0
    assert 0 <= record["max_abs_difference"] < 1e-4
    session = Session(tmp_path / "alexnet.onnx", provider="cpu")
    assert session.metadata.sha256 == hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()


def test_a_list_of_names_that_export_did_not_write_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = random_model(SMALL, 2)
    model = replace(model, classes=(ClassName("kočka"), ClassName("two\nlines")))
    save_model(model, tmp_path / "model.safetensors")
    names = tmp_path / "pets-v2.names.txt"
    names.write_text("mine")
    refused = run("-w", "model.safetensors", "--no-verify", "-o", "pets-v2.onnx", "-q")
    assert isinstance(refused.exception, UsageError)
    assert names.read_text() == "mine"
    assert not (tmp_path / "pets-v2.onnx").exists()
    names.unlink()
    for _ in range(2):  # the second replaces both
        assert run("-w", "model.safetensors", "--no-verify", "-o", "pets-v2.onnx", "-q").exception is None
        assert names.read_bytes() == "kočka\ntwo lines\n".encode()
        names.write_text("older names")


def test_command_puts_the_file_into_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "runs" / "first" / "checkpoints" / "last"
    checkpoint.mkdir(parents=True)
    (tmp_path / "runs" / "first" / "run.json").write_text("{}")
    save_model(random_model(SMALL), checkpoint / "model.safetensors")
    result = run("-w", "first", "--no-verify", "--json", "-q")
    assert result.exception is None
    assert json.loads(result.stdout)["top1_agreement"] is None
    assert Session(tmp_path / "runs" / "first" / "alexnet.onnx", provider="cpu").recipe.input_size == 224


def test_a_checkpoint_that_is_not_the_best_is_not_written_over_the_runs_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints = tmp_path / "runs" / "first" / "checkpoints"
    for step, pointer in (("00000020", "best"), ("00000030", "last")):
        (checkpoints / step).mkdir(parents=True)
        save_model(random_model(SMALL), checkpoints / step / "model.safetensors")
        (checkpoints / pointer).symlink_to(step)
    (tmp_path / "runs" / "first" / "run.json").write_text("{}")
    for spec, name in (("first", "alexnet.onnx"), (str(checkpoints / "last"), "alexnet-00000030.onnx")):
        result = run("-w", spec, "--no-verify", "--json", "-q")
        assert Path(json.loads(result.stdout)["path"]).name == name


def test_command_compares_on_what_the_run_was_trained_on(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "runs" / "first" / "checkpoints" / "last"
    checkpoint.mkdir(parents=True)
    (tmp_path / "runs" / "first" / "run.json").write_text(json.dumps({"data_path": str(prepared)}))
    save_model(random_model(SMALL), checkpoint / "model.safetensors")
    result = run("-w", "first")
    assert result.exception is None
    assert f"against PyTorch on 20 images of {prepared}" in result.stderr


def test_command_refuses_a_name_that_is_no_onnx_file(tmp_path: Path) -> None:
    model = save_model(random_model(SMALL), tmp_path / "model.safetensors")
    result = run("-w", str(model), "-o", str(tmp_path / "out.bin"))
    assert isinstance(result.exception, UsageError)
    assert not (tmp_path / "out.bin").exists()


def test_command_compares_on_validation_images_of_the_prepared_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for split, count in (("train", 4), ("val", 3)):
        for label, name in enumerate(("cats", "dogs")):
            for i in range(count):
                draw(tmp_path / "pets" / split / name / f"{i}.png", seed=100 * label + i + 50 * (split == "val"))
    list(pack(Plan(detect_source(tmp_path / "pets"), tmp_path / "prepared" / "pets", 95), workers=1))
    model = random_model(SMALL)
    crops = sample_crops(open_dataset(tmp_path / "prepared" / "pets"), model)
    validation = open_dataset(tmp_path / "prepared" / "pets").split("val")
    expected = images.decode(bytes(validation.jpeg(5)))[16:240, 16:240]
    assert crops.shape == (6, 3, 224, 224)
    np.testing.assert_array_equal(crops[5], expected.transpose(2, 0, 1))
    save_model(model, tmp_path / "model.safetensors")
    result = run("-w", "model.safetensors", "--json")
    assert result.exception is None
    assert "images of" in result.stderr
    assert "pets" in result.stderr
    assert json.loads(result.stdout)["images"] == 6
    missing = run("-w", "model.safetensors", "--data", "zoo")
    assert isinstance(missing.exception, DataError)  # a set that was named and is not there is not passed over
