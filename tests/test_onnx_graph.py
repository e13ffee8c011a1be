"""The ONNX graph against a literal numpy forward pass, for every switch; and what it says of itself."""

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
from model_files import random_model

from alexnet_cli.core import onnx_graph, session
from alexnet_cli.core.classes import ClassName
from alexnet_cli.core.session import Session
from alexnet_cli.core.weights import Model
from alexnet_cli.errors import MissingError, UsageError, WeightsError
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, TINY, Recipe

Maps = npt.NDArray[np.float64]

VARIANTS: dict[str, Recipe] = {
    "paper": PAPER,
    "krizhevsky": KRIZHEVSKY,
    "caffe": CAFFE,
    "tiny": TINY,
    "caffenet": replace(CAFFE, stage1_order="relu-pool-norm", stage2_order="relu-pool-norm"),
    "one tower": replace(PAPER, towers=1),
    "2x2 pooling": replace(PAPER, pool_size=2),
    "within map": replace(PAPER, lrn="within-map", lrn_alpha_divided=True, lrn_size=3),
    "no norm": replace(PAPER, lrn="none"),
    "tanh": replace(PAPER, activation="tanh", input_divisor=64.0),
    "sigmoid": replace(PAPER, activation="sigmoid", dropout=0.2),
    "mean colour": replace(PAPER, mean="rgb"),
    "unpadded 224": replace(PAPER, edge_padding=False),
    "unpadded 224, 2x2 pooling": replace(PAPER, edge_padding=False, pool_size=2),
    "other numbers": replace(PAPER, lrn_size=3, lrn_k=1.5, lrn_alpha=1e-3, lrn_beta=0.6, input_divisor=3.0),
}


def convolved(x: Maps, weight: Maps, bias: Maps, stride: int, pad: int, groups: int) -> Maps:
    """C x H x W -> K x H' x W', one kernel position at a time."""
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    side = weight.shape[2]
    height = (x.shape[1] - side) // stride + 1
    per = len(weight) // groups
    out = np.zeros((len(weight), height, height))
    for g in range(groups):
        own = slice(g * per, (g + 1) * per)
        seen = x[g * weight.shape[1] : (g + 1) * weight.shape[1]]
        for i in range(side):
            for j in range(side):
                rows = slice(i, i + stride * (height - 1) + 1, stride)
                columns = slice(j, j + stride * (height - 1) + 1, stride)
                out[own] += np.tensordot(weight[own, :, i, j], seen[:, rows, columns], 1)
    return out + bias[:, None, None]


def pooled(x: Maps, size: int) -> Maps:
    """Stride 2; a window over the edge is clipped."""
    side = -(-(x.shape[1] - size) // 2) + 1
    out = np.empty((len(x), side, side))
    for i in range(side):
        for j in range(side):
            out[:, i, j] = x[:, 2 * i : 2 * i + size, 2 * j : 2 * j + size].max((1, 2))
    return out


def normalised_across(x: Maps, r: Recipe) -> Maps:
    alpha = r.lrn_alpha * r.input_divisor**2 / (r.lrn_size if r.lrn_alpha_divided else 1)
    maps = len(x) if r.lrn_joint else len(x) // r.towers
    out = np.empty_like(x)
    for i in range(len(x)):
        first = i // maps * maps
        near = range(max(first, i - r.lrn_size // 2), min(first + maps, i + r.lrn_size // 2 + 1))
        out[i] = x[i] / (r.lrn_k + alpha * sum(x[j] ** 2 for j in near)) ** r.lrn_beta
    return out


def normalised_within(x: Maps, size: int, k: float, alpha: float, beta: float) -> Maps:
    half, out = size // 2, np.empty_like(x)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            window = x[:, max(0, i - half) : i + half + 1, max(0, j - half) : j + half + 1]
            out[:, i, j] = x[:, i, j] / (k + alpha * (window**2).sum((1, 2))) ** beta
    return out


def stage(x: Maps, r: Recipe, order: str, extra: bool) -> Maps:
    for step in order.split("-"):
        if step == "relu":
            x = activated(x, r)
        elif step == "pool":
            x = pooled(x, r.pool_size)
        else:
            if r.lrn == "across-maps":
                x = normalised_across(x, r)
            elif r.lrn == "within-map":
                alpha = r.lrn_alpha * r.input_divisor**2 / (r.lrn_size**2 if r.lrn_alpha_divided else 1)
                x = normalised_within(x, r.lrn_size, r.lrn_k, alpha, r.lrn_beta)
            if extra:
                x = normalised_within(x, 5, 1.0, 1e-3 * r.input_divisor**2 / 25, 0.75)
    return x


def activated(x: Maps, r: Recipe) -> Maps:
    if r.activation == "relu":
        return np.maximum(x, 0)
    result: Maps = np.tanh(x) if r.activation == "tanh" else 1 / (1 + np.exp(-x))
    return result


def forward(model: Model, crop: npt.NDArray[np.uint8]) -> Maps:
    """Logits of one crop, in float64, straight from the contract of the recipe."""
    r, low = model.recipe, (256 - model.recipe.input_size) // 2
    t = {name: value.astype(np.float64) for name, value in model.tensors.items()}
    mean = t["mean"][:, low : low + r.input_size, low : low + r.input_size]
    if r.mean == "rgb":
        mean = t["mean"].mean((1, 2), keepdims=True)
    x = (crop - mean) / r.input_divisor
    if r.input_size == 224 and r.edge_padding:
        x = np.pad(x, ((0, 0), (0, 3), (0, 3)))
    pad2, pad5 = (2, 1) if r.pool_size == 3 else (1, 0)
    x = convolved(x, t["conv1.weight"], t["conv1.bias"], 4, 0, 1)
    assert x.shape[1:] == ((55, 55) if r.edge_padding else (54, 54))
    x = stage(x, r, r.stage1_order, extra=False)
    x = convolved(x, t["conv2.weight"], t["conv2.bias"], 1, pad2, r.towers)
    x = stage(x, r, r.stage2_order, extra=r.within_norm_2)
    assert x.shape[1:] == (13, 13)
    x = activated(convolved(x, t["conv3.weight"], t["conv3.bias"], 1, 1, 1), r)
    x = activated(convolved(x, t["conv4.weight"], t["conv4.bias"], 1, 1, r.towers), r)
    x = pooled(activated(convolved(x, t["conv5.weight"], t["conv5.bias"], 1, pad5, r.towers), r), r.pool_size)
    keep = 1 if r.dropout_inverted else 1 - r.dropout
    v = x.reshape(-1)
    v = keep * activated(t["fc6.weight"] @ v + t["fc6.bias"], r)
    v = keep * activated(t["fc7.weight"] @ v + t["fc7.bias"], r)
    result: Maps = t["fc8.weight"] @ v + t["fc8.bias"]
    return result


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
    onnx_graph.write(model, tmp_path / "a.onnx")
    from_file, in_memory = (
        Session(tmp_path / "a.onnx", provider="cpu"),
        Session(model, provider="cpu", few=True),
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
    onnx_graph.write(replace(model, path=tmp_path / "w.safetensors"), tmp_path / "a.onnx")
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)
    proto = onnx.load(tmp_path / "a.onnx")
    said = {entry.key: entry.value for entry in proto.metadata_props}
    assert json.loads(said["names"]) == [c.name for c in model.classes]
    assert json.loads(said["wnids"]) == [c.wnid for c in model.classes]
    assert json.loads(said["preprocess"])["crop"] == 227
    assert json.loads(said["recipe"])["lrn_joint"] is True
    assert json.loads(said["metrics"]) == {"top1_error": 0.4}
    assert said["alexnet.sha256"] == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert said["Image.BitmapPixelFormat"] == "Rgb8"
    shape = proto.graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in shape] == ["batch", 3, 227, 227]
    assert [o.name for o in proto.graph.output] == ["logits", "probabilities"]
    assert not any(t.data_location for t in proto.graph.initializer)  # one file, nothing beside it
    assert "LRN" not in {node.op_type for node in proto.graph.node}
    session = Session(tmp_path / "a.onnx", provider="cpu")
    assert session.classes == model.classes
    assert (session.recipe, session.crop, session.device) == (model.recipe, 227, "cpu")
    assert session.info.metrics == {"top1_error": 0.4}


def test_classes_without_wnid_come_back_without(tmp_path: Path) -> None:
    model = random_model(replace(PAPER, width=1 / 16), classes=2)
    model = replace(model, classes=(ClassName("Katze"), ClassName('kočka, "mačka"')))
    onnx_graph.write(model, tmp_path / "a.onnx")
    assert Session(tmp_path / "a.onnx", provider="cpu").classes == model.classes


def test_foreign_and_damaged_files_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = random_model(replace(PAPER, width=1 / 64))
    whole = onnx_graph.build(model).SerializeToString()
    foreign = onnx.ModelProto.FromString(whole)
    del foreign.metadata_props[:]
    renamed = onnx.ModelProto.FromString(whole)
    next(m for m in renamed.metadata_props if m.key == "names").value = '["one"]'
    files = {
        "foreign": (foreign.SerializeToString(), "not an ONNX file of this toolkit"),
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


def test_a_gpu_asked_for_and_absent_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    model = random_model(replace(PAPER, width=1 / 64))
    assert Session(model).device == "cpu"
    assert Session(model).fallback == ""  # there is no GPU to explain
    with pytest.raises(MissingError, match="GPU"):
        Session(model, provider="cuda")


@pytest.mark.parametrize(
    ("asked", "gpu"),
    [({}, "0"), ({"gpu": 1}, "1"), ({"provider": "cuda", "few": True}, "0"), ({"few": True}, None),
     ({"provider": "cpu"}, None)],
)  # fmt: skip
def test_the_gpu_that_was_named_is_offered_but_not_for_a_few_pictures(
    asked: dict[str, Any], gpu: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered: list[Any] = []
    real = onnxruntime.InferenceSession

    def opened(content: bytes, options: Any, *, providers: list[Any]) -> Any:
        offered.extend(providers)
        return real(content, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(session, "gpu_present", lambda: True)
    monkeypatch.setattr(session, "load_cuda", lambda: None)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    with pytest.raises(MissingError) if "cuda" in asked.values() else nullcontext():
        Session(random_model(replace(PAPER, width=1 / 64)), **asked)
    assert offered[-1] == "CPUExecutionProvider"
    assert [(name, options["device_id"]) for name, options in offered[:-1]] == (
        [("CUDAExecutionProvider", gpu)] if gpu else []
    )


def test_too_large_for_one_file_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graph, "LARGEST", 1000)
    with pytest.raises(UsageError, match="2 GB"):
        onnx_graph.build(random_model(replace(PAPER, width=1 / 64)))
