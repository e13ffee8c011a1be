"""The ONNX graph against a literal numpy forward pass, for every switch; and its metadata."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.inference import onnx_graph, session
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.architecture import layer_names
from alexnet_cli.errors import MissingError, UsageError, WeightsError
from alexnet_cli.recipe import CAFFE, PAPER, RECIPES
from literal_network import VARIANTS, forward, forward_layers
from model_files import random_model, save_onnx


def some_crops(side: int, count: int = 2) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(7).integers(0, 256, (count, 3, side, side), np.uint8)


@pytest.mark.parametrize("name", VARIANTS)
def test_graph_equals_a_literal_forward_pass(name: str) -> None:
    model = random_model(replace(VARIANTS[name], width=1 / 16))
    session = Session(model, provider="cpu")
    crops = some_crops(model.recipe.input_size)
    expected = np.stack([forward(model, crop) for crop in crops])
    assert np.ptp(expected) > 0.3  # otherwise the comparison below would say little
    np.testing.assert_allclose(session.logits(crops), expected, atol=1e-4)
    powers = np.exp(expected - expected.max(1, keepdims=True))
    np.testing.assert_allclose(session.probabilities(crops), powers / powers.sum(1, keepdims=True), atol=1e-5)


@pytest.mark.parametrize("name", ["paper", "krizhevsky", "caffe", "fast", "tiny", "within map", "no norm", "sigmoid"])
def test_every_layer_has_its_name_and_the_values_of_a_literal_pass(name: str) -> None:
    recipe = replace({**VARIANTS, **RECIPES}[name], width=1 / 16)
    model, layers = random_model(recipe), layer_names(recipe)
    crops = some_crops(recipe.input_size)
    expected = [forward_layers(model, crop) for crop in crops]
    assert layers == tuple(expected[0])
    session = Session(model, provider="cpu", layers=layers)
    found, (probabilities, whole) = session.activations(crops), session.probabilities_and_activations(crops)
    assert list(found) == list(whole) == list(layers)
    for layer in layers:
        values = np.stack([outputs[layer] for outputs in expected])
        tolerance = 1e-5 * np.abs(values).max()
        np.testing.assert_allclose(found[layer], values, rtol=1e-3, atol=tolerance, err_msg=layer)
        np.testing.assert_allclose(whole[layer], values, rtol=1e-3, atol=tolerance, err_msg=layer)
    np.testing.assert_allclose(probabilities, Session(model, provider="cpu").probabilities(crops), atol=1e-6)


def test_the_literal_pass_tells_the_switches_apart() -> None:
    """Each switch changes the logits of the same weights by far more than the tolerance above."""
    base = replace(PAPER, width=1 / 16, lrn_alpha=1e-3)
    model = random_model(base)
    crop = some_crops(224, 1)[0]
    expected = forward(model, crop)
    changes = (
        {"lrn_joint": True},
        {"lrn_alpha_divided": True},
        {"within_norm_2": True},
        {"stage1_order": "norm-pool-relu"},
        {"stage2_order": "relu-pool-norm"},
        {"lrn": "within-map"},
        {"mean": "rgb"},
        {"dropout_inverted": True},
    )
    for change in changes:
        other = replace(model, recipe=replace(base, **change))
        assert np.abs(forward(other, crop) - expected).max() > 1e-3, change


def test_file_and_memory_give_the_same_answers_and_batches_are_free(tmp_path: Path) -> None:
    model = random_model(replace(PAPER, width=1 / 16))
    save_onnx(model, tmp_path / "a.onnx")
    from_file, in_memory = (
        Session(tmp_path / "a.onnx", provider="cpu"),
        Session(model, provider="cpu", fast_start=True),
    )
    crops = some_crops(224, 5)
    whole = from_file.logits(crops)
    np.testing.assert_allclose(in_memory.logits(crops), whole, atol=1e-5)
    np.testing.assert_allclose(from_file.logits(crops[3:4]), whole[3:4], atol=1e-5)
    np.testing.assert_array_equal(from_file.logits(crops.astype(np.float32)), whole)
    np.testing.assert_array_equal(from_file.mean(), model.mean)
    np.testing.assert_array_equal(in_memory.mean(), model.mean)


def test_file_is_valid_onnx_and_describes_itself(tmp_path: Path) -> None:
    model = random_model(replace(CAFFE, width=1 / 16), info={"metrics": {"top1_error": 0.4}})
    (tmp_path / "w.safetensors").write_bytes(b"abc")
    save_onnx(replace(model, path=tmp_path / "w.safetensors"), tmp_path / "a.onnx")
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)
    proto = onnx.load(tmp_path / "a.onnx")
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(metadata["names"]) == [c.name for c in model.classes]
    assert json.loads(metadata["wnids"]) == [c.wnid for c in model.classes]
    assert json.loads(metadata["preprocess"])["crop"] == 227
    assert json.loads(metadata["recipe"])["lrn_joint"] is True
    assert json.loads(metadata["metrics"]) == {"top1_error": 0.4}
    assert metadata["alexnet.sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert metadata["Image.BitmapPixelFormat"] == "Rgb8"
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, 227, 227]
    assert [o.name for o in proto.graph.output] == ["logits", "probabilities"]
    assert not any(t.data_location for t in proto.graph.initializer)  # one file, nothing beside it
    assert "LRN" not in {node.op_type for node in proto.graph.node}
    session = Session(tmp_path / "a.onnx", provider="cpu")
    assert session.classes == model.classes
    assert (session.recipe, session.recipe.input_size, session.device) == (model.recipe, 227, "cpu")
    assert session.info["metrics"] == {"top1_error": 0.4}


def test_classes_without_wnid_come_back_without(tmp_path: Path) -> None:
    model = random_model(replace(PAPER, width=1 / 16), classes=2)
    model = replace(model, classes=(ClassName("Katze"), ClassName('kočka, "mačka"')))
    save_onnx(model, tmp_path / "a.onnx")
    assert Session(tmp_path / "a.onnx", provider="cpu").classes == model.classes


def test_foreign_and_corrupt_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = random_model(replace(PAPER, width=1 / 64))
    whole = onnx_graph.build_graph(model).SerializeToString()
    foreign = onnx.ModelProto.FromString(whole)
    del foreign.metadata_props[:]
    renamed = onnx.ModelProto.FromString(whole)
    next(m for m in renamed.metadata_props if m.key == "names").value = '["one"]'
    other = onnx.ModelProto.FromString(whole)
    recipe = next(m for m in other.metadata_props if m.key == "recipe")
    recipe.value = recipe.value.replace("color_shift", "hue_shift")
    files = {
        "other": (other.SerializeToString(), "no key is called hue_shift"),
        "foreign": (foreign.SerializeToString(), "has no class names and no recipe"),
        "renamed": (renamed.SerializeToString(), "unreadable metadata"),
        "truncated": (whole[: len(whole) // 2], "cannot be opened"),
        "text": (b"not a model", "cannot be opened"),
        "empty": (b"", "cannot be opened"),
    }
    for name, (content, words) in files.items():
        path = tmp_path / f"{name}.onnx"
        path.write_bytes(content)
        with pytest.raises(WeightsError, match=words):
            Session(path)
    with pytest.raises(WeightsError, match="does not exist"):
        Session(tmp_path / "missing.onnx")
    assert capfd.readouterr().err == ""  # ONNX Runtime's own complaints stay off the terminal


def test_a_file_of_version_0_1_0_opens(tmp_path: Path) -> None:
    """It had the words colour and centre, and a mean image without a batch dimension."""
    model = random_model(replace(PAPER, width=1 / 64))
    proto = onnx_graph.build_graph(model)
    for entry in proto.metadata_props:
        entry.value = entry.value.replace("color_", "colour_").replace("center ", "centre ")
    (mean,) = [t for t in proto.graph.initializer if t.name == "mean"]
    del mean.dims[0]
    (axes,) = [t for t in proto.graph.initializer if t.name == "mean.axes"]
    axes.raw_data = np.array([1, 2], np.int64).tobytes()
    onnx_graph.save_graph(proto, tmp_path / "old.onnx")
    old, crops = Session(tmp_path / "old.onnx", provider="cpu"), some_crops(224)
    assert old.recipe == model.recipe
    np.testing.assert_array_equal(old.mean(), model.mean)
    np.testing.assert_allclose(old.logits(crops), Session(model, provider="cpu").logits(crops), atol=1e-5)


def test_a_gpu_asked_for_and_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = random_model(replace(PAPER, width=1 / 64))
    assert Session(model).device == "cpu"
    assert Session(model).fallback_reason == ""  # there is no GPU to explain
    with pytest.raises(MissingError, match="GPU"):
        Session(model, provider="cuda")


@pytest.mark.parametrize(
    ("asked", "gpu"),
    [({}, "0"), ({"gpu": 1}, "1"), ({"provider": "cuda", "fast_start": True}, "0"), ({"fast_start": True}, None),
     ({"provider": "cpu"}, None)],
)  # fmt: skip
def test_the_gpu_that_was_named_is_offered_but_not_for_a_few_images(
    asked: dict[str, Any], gpu: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[Any] = []
    real = onnxruntime.InferenceSession

    def open_session(content: bytes, options: Any, *, providers: list[Any]) -> Any:
        offered.extend(providers)
        return real(content, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(session, "has_gpu", lambda: True)
    monkeypatch.setattr(session, "preload_cuda", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", open_session)
    with pytest.raises(MissingError) if "cuda" in asked.values() else nullcontext():
        Session(random_model(replace(PAPER, width=1 / 64)), **asked)
    assert offered[-1] == "CPUExecutionProvider"
    assert [(name, options["device_id"]) for name, options in offered[:-1]] == (
        [("CUDAExecutionProvider", gpu)] if gpu else []
    )


def test_too_large_for_one_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 1000)
    with pytest.raises(UsageError, match="2 GB"):
        onnx_graph.build_graph(random_model(replace(PAPER, width=1 / 64)))
