"""The float16 and int8 graphs: every recipe against float32, a layer against whole numbers by hand, and their sizes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from alexnet_cli.core.export import quantize
from alexnet_cli.core.export.export import compare_accuracy, synthetic_crops, verify
from alexnet_cli.core.export.quantize import activation_scale, quantize_weights
from alexnet_cli.core.inference import onnx_graph
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.intervals import PairedCounts
from alexnet_cli.core.model.architecture import layer_specs
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, Recipe
from literal_network import VARIANTS, convolve
from model_files import random_model


def quantize_model(model: Model, crops: npt.NDArray[np.uint8]) -> onnx.ModelProto:
    """The int8 graph, calibrated on the crops."""
    proto = onnx_graph.build_graph(model, rows=True)
    return quantize.to_int8(proto, quantize.measure_ranges(proto, crops))


def int8(recipe: Recipe, crops: npt.NDArray[np.uint8], path: Path) -> tuple[onnx.ModelProto, Session, Session]:
    """The graph, and sessions of the float32 and the int8 network."""
    model = random_model(recipe)
    small = quantize_model(model, crops)
    path.write_bytes(small.SerializeToString())
    return small, Session(model, provider="cpu"), Session(path, provider="cpu")


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_in_float16_stays_within_its_rounding(name: str, tmp_path: Path) -> None:
    model = random_model(replace(VARIANTS[name], width=1 / 16))
    whole = onnx_graph.build_graph(model)
    half = quantize.to_float16(whole)
    onnx.checker.check_model(half, full_check=True)
    (tmp_path / "a.onnx").write_bytes(half.SerializeToString())
    session, crops = Session(tmp_path / "a.onnx", provider="cpu"), synthetic_crops(model.recipe.input_size, 6)
    reference = Session(model, provider="cpu").logits
    assert verify(reference, session.logits, crops, "fp16").passed
    assert not verify(reference, session.logits, crops).passed or name == "sigmoid"  # it is another precision
    np.testing.assert_allclose(session.probabilities(crops).sum(1), 1, atol=1e-5)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)}
    assert set(kinds.values()) == {TensorProto.FLOAT}
    weights = {c.name: c.data_type for c in half.graph.initializer}
    assert weights["fc6.weight"] == weights["conv1.weight"] == TensorProto.FLOAT16
    norms = [kind for key, kind in weights.items() if "norm" in key or "within" in key]
    assert TensorProto.FLOAT16 not in norms
    assert half.ByteSize() - whole.ByteSize() / 2 < 40_000  # what is not weights stays as it is


def test_another_network_is_noticed_in_float16(tmp_path: Path) -> None:
    model = random_model(replace(PAPER, width=1 / 16))
    wrong = replace(model, recipe=replace(model.recipe, lrn_joint=True))
    crops = synthetic_crops(224, 6)
    first, second = (Session(m, provider="cpu").logits for m in (model, wrong))
    assert not verify(first, second, crops, "fp16").passed


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_in_int8_gives_nearly_the_same_answers(name: str, tmp_path: Path) -> None:
    recipe = replace(VARIANTS[name], width=1 / 16)
    crops = synthetic_crops(recipe.input_size, 12)
    proto, whole, small = int8(recipe, crops, tmp_path / "a.onnx")
    onnx.checker.check_model(proto, full_check=True)
    expected, found = whole.logits(crops), small.logits(crops)
    np.testing.assert_allclose(found, expected, atol=0.05 * float(np.ptp(expected)))
    if name != "sigmoid":  # which with such weights hardly tells pictures apart in float32 either
        centered = [x - x.mean(0) for x in (expected, found)]
        assert np.corrcoef(centered[0].ravel(), centered[1].ravel())[0, 1] > 0.98
    np.testing.assert_allclose(small.probabilities(crops).sum(1), 1, atol=1e-5)
    casts = {node.input[0] for node in proto.graph.node if node.op_type == "Cast"}
    assert casts <= {"mean.center"}  # of no codes: OpenCV misreads that
    weights = [c for c in proto.graph.initializer if c.name.endswith(".codes") and c.data_type == TensorProto.INT8]
    assert len(weights) == 8 - len(recipe.left_out_layers)
    assert small.recipe == recipe
    if recipe.mean != "rgb":
        np.testing.assert_allclose(small.mean(), whole.mean(), atol=0.07)


def test_opencv_reads_int8_as_onnx_runtime_does(tmp_path: Path) -> None:
    cv2 = pytest.importorskip("cv2")
    crops = synthetic_crops(224, 3)
    _, _, small = int8(replace(PAPER, width=1 / 16), crops, tmp_path / "a.onnx")
    expected = small.logits(crops)
    network = cv2.dnn.readNetFromONNX(str(tmp_path / "a.onnx"))
    for images in (1, 3):
        network.setInput(crops[:images].astype(np.float32), "input")
        found = network.forward("logits")
        np.testing.assert_allclose(found, expected[:images], atol=0.02 * float(np.ptp(expected)))


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_are_the_same_network(name: str, tmp_path: Path) -> None:
    model = random_model(replace(VARIANTS[name], width=1 / 16))
    (tmp_path / "rows.onnx").write_bytes(onnx_graph.build_graph(model, rows=True).SerializeToString())
    crops = synthetic_crops(model.recipe.input_size, 3)
    expected = Session(model, provider="cpu").logits(crops)
    np.testing.assert_allclose(Session(tmp_path / "rows.onnx", provider="cpu").logits(crops), expected, atol=1e-4)


def extreme_model() -> Model:
    """Every product of layers 1 and 7 is the largest or the smallest possible, if crops are 0 or 255."""
    model = random_model(replace(PAPER, width=1 / 16))
    tensors = dict(model.tensors)
    for name in ("conv1.weight", "fc7.weight"):
        tensors[name] = np.ones_like(tensors[name])
        tensors[name][::2] = -1
    for name in ("mean", "conv1.bias", "fc6.weight", "fc7.bias"):
        tensors[name] = np.zeros_like(tensors[name])
    tensors["fc6.bias"] = np.ones_like(tensors["fc6.bias"])
    return replace(model, tensors=tensors)


@pytest.mark.parametrize("extreme", [False, True])
def test_layers_are_what_whole_numbers_give(extreme: bool) -> None:
    """Layers 1 and 7 in a session without options, against codes multiplied and rounded in numpy.

    x86 without VNNI adds two products in 16 bits, and cuts off what is larger.
    """
    import onnxruntime

    model, crops = random_model(replace(PAPER, width=1 / 16)), synthetic_crops(224, 2)
    if extreme:
        model, crops = extreme_model(), np.where(crops < 128, 0, 255).astype(np.uint8)
    proto = quantize_model(model, crops)
    constant = {c.name: numpy_helper.to_array(c) for c in proto.graph.initializer}
    layers = {"conv1": ("centered", "relu1"), "fc7": ("relu6", "relu7")}
    names = [f"{name}.quantized" for names in layers.values() for name in names]
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in names)
    proto.graph.output.append(helper.make_tensor_value_info("centered", TensorProto.FLOAT, None))
    names.append("centered")
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    found = dict(zip(names, session.run(names, {"input": crops.astype(np.float32)}), strict=True))
    scale, zero = constant["centered.scale"], int(constant["centered.zero"])
    np.testing.assert_array_equal(found["centered.quantized"], np.rint(found["centered"] / scale + zero).clip(0, 255))
    for layer, (source, output) in layers.items():
        codes = constant[f"{layer}.weight.codes"].astype(np.float64)
        entered = found[f"{source}.quantized"][1].astype(np.float64) - constant[f"{source}.zero"]
        units = constant[f"{source}.scale"] * constant[f"{layer}.weight.scale"].astype(np.float64)
        if layer == "conv1":
            bias = constant["conv1.bias.codes"].astype(np.float64)
            sums = convolve(np.pad(entered, ((0, 0), (0, 3), (0, 3))), codes, bias, 4, 0, 1)
        else:
            sums = (entered @ codes + constant[f"{layer}.bias"] / units)[:, None, None]
        expected = np.rint(sums * units[:, None, None] / constant[f"{output}.scale"]).clip(0, 255)
        left = found[f"{output}.quantized"][1].reshape(expected.shape)
        assert 0.1 < (expected > 0).mean() < 0.95
        assert np.abs(left - expected).max() <= 1  # a half, rounded in float32, may fall either way
        assert (left == expected).mean() > 0.999


def test_codes_are_the_nearest_and_zero_is_exact() -> None:
    scale, zero = activation_scale((-1.0, 3.0))
    assert abs((0 - int(zero)) * scale + 1.0) <= scale
    assert abs((255 - int(zero)) * scale - 3.0) <= scale
    scale, zero = activation_scale((2.0, 5.1))  # zero is always among them
    assert float(scale) == pytest.approx(5.1 / 255)
    assert int(zero) == 0
    assert activation_scale((0.0, 0.0))[0] == 1
    generator = np.random.default_rng(1)
    weight = generator.standard_normal((6, 4, 3, 3)).astype(np.float32) * np.logspace(-3, 3, 6)[:, None, None, None]
    weight[2] = 0  # a dead channel keeps its bias
    bias = np.array([0, 1, 7, -3, 100, 0], np.float32)
    scales, codes = quantize_weights(weight.astype(np.float32), bias, np.float32(0.02))
    largest = np.abs(codes.astype(np.int32)).reshape(6, -1).max(1)
    np.testing.assert_array_equal(largest, [64, 64, 0, 64, 64, 64])
    assert 2 * 255 * largest.max() <= np.iinfo(np.int16).max < 2 * 255 * (largest.max() + 1)
    error = np.abs(codes * scales[:, None, None, None] - weight)
    assert (error <= 0.5001 * scales[:, None, None, None]).all()
    units = scales.astype(np.float64) * 0.02
    np.testing.assert_allclose(np.rint(bias / units) * units, bias, atol=units.max() / 2 * 1e-3, rtol=1e-2)
    assert np.abs(bias / units).max() < 2**31


@pytest.mark.parametrize("recipe", [PAPER, KRIZHEVSKY, CAFFE, replace(PAPER, towers=1)])
def test_the_whole_network_takes_at_most_62_megabytes(recipe: Recipe, tmp_path: Path) -> None:
    """Counted from the widths: a byte a weight, and what a channel costs, measured on a narrow network."""

    def counts(width: float, classes: int) -> tuple[int, int, int]:
        """Weights, output channels, entries of the bands of normalization."""
        specs = layer_specs(replace(recipe, width=width), classes)
        normalized_together = 1 if recipe.lrn_joint else recipe.towers
        bands = [(spec.biases // normalized_together) ** 2 for spec in specs[:2]]
        return sum(spec.weights for spec in specs), sum(spec.biases for spec in specs), sum(bands)

    proto, _, _ = int8(replace(recipe, width=1 / 16), synthetic_crops(recipe.input_size, 2), tmp_path / "a.onnx")
    weights, channels, band = counts(1 / 16, 10)
    rest = proto.ByteSize() - weights - 13 * channels - 4 * band
    assert 393_216 < rest < 460_000  # the mean image in half, and what does not grow
    weights, channels, band = counts(1, 1000)
    names = 60 * 1000  # a thousand names and wnids
    assert weights + 13 * channels + 4 * band + rest + names < 62_000_000
    assert weights > 59_000_000


def test_right_answers_are_counted_as_by_hand() -> None:
    labels = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    answers = [np.array([0, 1, 2, 0, 0, 0, 1, 0]), np.array([0, 1, 0, 1, 1, 0, 1, 0])]
    first, second = (np.eye(3, dtype=np.float32)[answer] for answer in answers)
    found = compare_accuracy(lambda _: first, lambda _: second, [(np.zeros((8, 3, 2, 2), np.uint8), labels)])
    assert found == PairedCounts(images=8, both=2, only_first=2, only_second=1)
    assert (found.accuracies, found.difference) == ((4 / 8, 3 / 8), 1 / 8)
    low, high = found.interval
    # Agresti and Min: half an image more in each of the four cells, here both in units of half an image.
    values = np.repeat([1, -1, 0], [2 * 2 + 1, 2 * 1 + 1, 2 * 5 + 2])
    half = 1.96 * np.std(values) / np.sqrt(len(values) / 2)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half))
    low, high = PairedCounts(images=9, both=9, only_first=0, only_second=0).interval
    assert low < -0.1 < 0.1 < high, "no difference on nine images is no certainty"
