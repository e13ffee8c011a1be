"""Imported networks give the scores of their own program: literal forward passes on files written byte by byte."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from typer import Typer
from typer.testing import CliRunner, Result

import weights_files as files
from alexnet_cli.core.data import images
from alexnet_cli.core.data.classes import ilsvrc_classes
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.inference.torch_session import TorchSession
from alexnet_cli.core.model import model_file
from alexnet_cli.errors import DataError, UsageError, WeightsError
from alexnet_cli.recipe import PAPER
from alexnet_plugins.import_weights.class_list import is_reordered, read_class_list
from imagenet_files import CLASSES, write_devkit
from literal_network import convolve, max_pool
from model_files import draw


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*words: str) -> Result:
    from alexnet_plugins.import_weights.command import import_weights

    app = Typer()
    app.command()(import_weights)
    return CliRunner().invoke(app, list(words))


def import_bytes(content: bytes, *words: str, name: str = "network.bin") -> tuple[model_file.Model, dict[str, Any]]:
    """Import these bytes; returns the model file and the JSON result."""
    Path(name).write_bytes(content)
    result = run(name, "-o", "imported.safetensors", "--json", *words)
    if result.exception:
        raise result.exception
    return model_file.read_model(Path("imported.safetensors")), json.loads(result.stdout)


def check_scores(model: model_file.Model, rgb: npt.NDArray[np.uint8], expected: npt.NDArray[np.float64]) -> None:
    """Check that both engines give the expected scores, and that these are no constant."""
    assert np.ptp(expected) > 0.5
    for session in (Session(model, provider="cpu"), TorchSession(model, "cpu")):
        np.testing.assert_allclose(session.logits(rgb[None])[0], expected, atol=2e-4 * np.abs(expected).max())


def gentle_tensors() -> dict[str, tuple[files.Floats, files.Floats]]:
    """Weights whose probabilities are all far from 0, so that each can be compared."""
    weights = files.tensors()
    weights["fc8"] = (weights["fc8"][0] / np.float32(200), weights["fc8"][1])
    return weights


@pytest.mark.parametrize("order", ["relu-norm-pool", "relu-pool-norm"])
@pytest.mark.parametrize("version", [2, 1])
def test_caffe_in_every_version_of_its_format(version: int, order: str) -> None:
    weights, rgb = files.tensors(), files.random_image(227)
    model, report = import_bytes(files.caffemodel(weights, version, order))
    assert report["orders"] == [order, order]
    assert report["width"] == 1 / 16
    assert model.recipe.lrn_k == 1
    check_scores(model, rgb, files.caffe_forward(weights, rgb[::-1], order=order))


def test_caffe_forward_differs_for_each_wrong_reading() -> None:
    """The comparison above can fail: each wrong reading of the file gives other scores."""
    weights, bgr = files.tensors(), files.random_image(227)
    right = files.caffe_forward(weights, bgr)
    for wrong in (
        files.caffe_forward(weights, bgr[::-1]),
        files.caffe_forward(weights, bgr, order="relu-pool-norm"),
        files.caffe_forward(weights, bgr, k=2.0),
        files.caffe_forward(weights, bgr, mean_bgr=files.MEAN_BGR[::-1]),
    ):
        assert np.abs(wrong - right).max() > 5e-3 * np.abs(right).max()


@pytest.mark.parametrize("version", [2, 1])
@pytest.mark.parametrize(("order", "side"), [("relu-norm-pool", 227), ("relu-pool-norm", 227), ("relu-norm-pool", 224)])
def test_caffe_answers_as_opencvs_reader_does(version: int, order: str, side: int) -> None:
    cv2 = pytest.importorskip("cv2")
    weights, rgb = gentle_tensors(), files.random_image(side)
    content = files.caffemodel(weights, version, order, crop=side)
    network = cv2.dnn.readNetFromCaffe(
        np.frombuffer(files.deploy_prototxt(weights, order, side).encode(), np.uint8), np.frombuffer(content, np.uint8)
    )
    network.enableWinograd(False)  # which is less exact on some CPUs
    network.setInput(cv2.dnn.blobFromImage(rgb[::-1].transpose(1, 2, 0).copy(), mean=files.MEAN_BGR))
    probabilities = network.forward()
    assert probabilities.min() > 0.005
    assert np.ptp(probabilities) > 0.05
    model, _ = import_bytes(content)
    for session in (Session(model, provider="cpu"), TorchSession(model, "cpu")):
        np.testing.assert_allclose(session.probabilities(rgb[None]), probabilities, rtol=1e-5)


def test_k_of_response_normalization_comes_from_the_file() -> None:
    weights, rgb = files.tensors(1), files.random_image(227)
    model, _ = import_bytes(files.caffemodel(weights, 1, k=2.0))
    assert (model.recipe.lrn_k, model.recipe.lrn_alpha) == (2, 1e-4)
    check_scores(model, rgb, files.caffe_forward(weights, rgb[::-1], k=2.0))


def test_weights_without_layers_need_the_order_option() -> None:
    weights, rgb = files.tensors(), files.random_image(227)
    model, report = import_bytes(files.caffemodel(weights, bare=True))
    assert any("is assumed" in note for note in report["notes"])
    check_scores(model, rgb, files.caffe_forward(weights, rgb[::-1]))
    model, report = import_bytes(files.caffemodel(weights, bare=True), "--order", "relu-pool-norm")
    assert not any("is assumed" in note for note in report["notes"])
    check_scores(model, rgb, files.caffe_forward(weights, rgb[::-1], order="relu-pool-norm"))
    model, _ = import_bytes(files.caffemodel(weights, bare=True, name="CaffeNet"))
    assert model.recipe.stage1_order == "relu-pool-norm"
    with pytest.raises(UsageError, match="the file itself shows"):
        import_bytes(files.caffemodel(weights), "--order", "relu-pool-norm")


@pytest.mark.parametrize("form", ["binaryproto", "npy"])
def test_caffe_subtracts_its_mean_image_at_the_crop(form: str) -> None:
    weights, rgb = files.tensors(), files.random_image(227)
    mean = np.random.default_rng(5).uniform(60, 180, (3, 256, 256)).astype(np.float32)  # blue first
    if form == "npy":
        np.save("mean.npy", mean.astype(np.float64))
    else:
        Path("mean.binaryproto").write_bytes(files.blob(mean[None], legacy=True))
    model, report = import_bytes(files.caffemodel(weights), "--mean", f"mean.{form}")
    assert model.recipe.mean == "image-at-crop"
    assert not any("mean color" in note for note in report["notes"])
    check_scores(model, rgb, files.caffe_forward(weights, rgb[::-1], mean[:, 14:241, 14:241]))


def run_onnx(model: onnx.ModelProto, rgb: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """What ONNX Runtime answers to a picture, as Caffe feeds it: BGR minus the mean color."""
    x = rgb[::-1].astype(np.float32) - np.array(files.MEAN_BGR, np.float32)[:, None, None]
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    result: npt.NDArray[np.float32] = session.run(None, {"data_0": x[None]})[0]
    return result


def as_constants(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Constant", [], [value.name], value=value) for value in model.graph.initializer]
    nodes += list(model.graph.node)
    for field in (model.graph.node, model.graph.initializer):
        del field[:]
    del model.graph.input[1:]
    model.graph.node.extend(nodes)


def as_lists_of_floats(model: onnx.ModelProto) -> None:
    for value in model.graph.initializer:
        numbers = numpy_helper.to_array(value).ravel()
        value.CopyFrom(helper.make_tensor(value.name, value.data_type, value.dims, numbers))


def as_opset_3(model: onnx.ModelProto) -> None:
    """The forms of the oldest files: Reshape with the shape as an attribute, Dropout's is_test, Gemm's broadcast."""
    model.opset_import[0].version = 3
    for node in model.graph.node:
        extra: dict[str, Any] = {"Dropout": {"is_test": 1}, "Gemm": {"broadcast": 1}, "Reshape": {"shape": [1, -1]}}
        node.attribute.extend(helper.make_attribute(*pair) for pair in extra.get(node.op_type, {}).items())
        if node.op_type == "Reshape":
            del node.input[1:]


def as_opset_12(model: onnx.ModelProto) -> None:
    """Weights that are no inputs, Dropout's ratio as an input, any batch, rounding up instead of padding."""
    model.opset_import[0].version, model.ir_version = 12, 7
    del model.graph.input[1:]
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "N"
    model.graph.initializer.append(numpy_helper.from_array(np.array(0.5, np.float32), "ratio"))
    for node in model.graph.node:
        if node.op_type == "Dropout":
            del node.attribute[:], node.output[1:]
            node.input.append("ratio")
        elif node.op_type == "Reshape":
            node.op_type = "Flatten"
            del node.input[1:]
        elif node.op_type == "Softmax":
            node.attribute.append(helper.make_attribute("axis", -1))
        elif node.op_type == "MaxPool" and node.attribute[1].ints[3]:
            node.attribute[1].ints[:] = [0] * 4
            node.attribute.append(helper.make_attribute("ceil_mode", 1))


def as_other_matrices(model: onnx.ModelProto) -> None:
    """Matrices of inputs x outputs, an output of layer 8 before the probabilities, and a node in between."""
    graph = model.graph
    for value in graph.initializer:
        if value.name.startswith("fc") and "_w_" in value.name:
            value.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(value).T.copy(), value.name))
    del graph.input[1:]
    model.ir_version = 4
    for node in graph.node:
        if node.op_type == "Gemm":
            del node.attribute[:]
    graph.node[-1].input[0] = "logits"
    graph.node.insert(len(graph.node) - 1, helper.make_node("Identity", ["r24"], ["logits"]))
    graph.output.append(helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, (1, 10)))


FORMS = [as_constants, as_lists_of_floats, as_opset_3, as_opset_12, as_other_matrices]


@pytest.mark.parametrize("form", [None, *FORMS])
def test_the_model_zoos_graph_answers_as_onnx_runtime_does(form: Callable[[onnx.ModelProto], None] | None) -> None:
    weights, rgb = gentle_tensors(), files.random_image(224)
    graph = files.zoo_model(weights)
    probabilities = run_onnx(graph, rgb)
    if form is not None:
        form(graph)
        if form is not as_opset_3:  # which ONNX Runtime does not read
            np.testing.assert_allclose(run_onnx(graph, rgb), probabilities, rtol=1e-6)
    assert probabilities.min() > 0.005
    assert np.ptp(probabilities) > 0.05
    model, _ = import_bytes(graph.SerializeToString(), "--grid", "file", name="network.onnx")
    assert (model.recipe.input_size, model.recipe.edge_padding, model.recipe.pool_ceil) == (224, False, "pool5")
    for session in (Session(model, provider="cpu"), TorchSession(model, "cpu")):
        np.testing.assert_allclose(session.probabilities(rgb[None]), probabilities, rtol=1e-5)


def test_the_model_zoos_weights_are_used_at_the_size_they_were_trained_at() -> None:
    weights, rgb = files.tensors(), files.random_image(227)
    model, report = import_bytes(files.zoo_model(weights).SerializeToString())
    assert (report["input_size"], model.recipe.pool_ceil) == (227, "all")
    assert any("--grid file" in note for note in report["notes"])
    check_scores(model, rgb, files.caffe_forward(weights, rgb[::-1]))


@pytest.mark.slow
def test_the_model_zoos_graph_at_full_size() -> None:
    shapes = {
        "conv1": (96, 3, 11, 11), "conv2": (256, 48, 5, 5), "conv3": (384, 256, 3, 3), "conv4": (384, 192, 3, 3),
        "conv5": (256, 192, 3, 3), "fc6": (4096, 9216), "fc7": (4096, 4096), "fc8": (1000, 4096),
    }  # fmt: skip
    generator, weights = np.random.default_rng(0), {}
    for layer, shape in shapes.items():
        scale = np.float32(np.sqrt(2 / np.prod(shape[1:])) / (100 if layer == "fc8" else 1))
        weight = generator.standard_normal(shape, np.float32) * scale
        weights[layer] = (weight, np.float32(0.3) * generator.standard_normal(shape[0], np.float32))
    graph, rgb = files.zoo_model(weights), files.random_image(224)
    graph.graph.initializer[0].CopyFrom(numpy_helper.from_array(np.array([1, 9216]), "OC2_DUMMY_1"))
    probabilities = run_onnx(graph, rgb)
    model, _ = import_bytes(graph.SerializeToString(), "--grid", "file", name="network.onnx")
    np.testing.assert_allclose(Session(model, provider="cpu").probabilities(rgb[None]), probabilities, rtol=1e-5)


def test_onnx_with_227_pixels_is_recognized_by_its_content() -> None:
    weights, rgb = files.tensors(), files.random_image(227)
    for side in (227, 0):  # 0: the graph does not say
        graph = files.zoo_model(weights, side=side)
        model, _ = import_bytes(graph.SerializeToString(), name="network.bin")
        assert (model.recipe.input_size, model.recipe.pool_ceil) == (227, "all")
    check_scores(model, rgb, files.caffe_forward(weights, rgb[::-1]))


def pad_no_pooling(graph: onnx.GraphProto) -> None:
    graph.node[14].attribute[1].ints[:] = [0] * 4


def pad_by_itself(graph: onnx.GraphProto) -> None:
    del graph.node[0].attribute[1]
    graph.node[0].attribute.append(helper.make_attribute("auto_pad", "SAME_UPPER"))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (pad_no_pooling, r"pooling after conv5 .* turns 12 pixels into 6"),
        (lambda graph: graph.initializer.pop(), "no weight and bias of fc8"),
        (pad_by_itself, "auto_pad"),
    ],
)
def test_other_graphs_are_refused(change: Callable[[onnx.GraphProto], None], says: str) -> None:
    model = files.zoo_model(files.tensors())
    change(model.graph)
    with pytest.raises(WeightsError, match=says):
        import_bytes(model.SerializeToString())


def test_the_light_file_has_no_weights() -> None:
    with pytest.raises(WeightsError, match="no weight and bias of conv1"):
        import_bytes(files.LIGHT.read_bytes())


KEYS = {
    "plain": "{layer}",
    "torchvision's": "{part}.{place}",
    "wrapped": "module._orig_mod.{layer}",
}
PLACES = {"conv1": 0, "conv2": 4, "conv3": 8, "conv4": 10, "conv5": 12, "fc6": 1, "fc7": 4, "fc8": 16}


def state_dict(weights: files.Tensors, keys: str) -> dict[str, npt.NDArray[np.float32]]:
    """Named in another order than the layers': the names decide."""
    named: dict[str, npt.NDArray[np.float32]] = {}
    for layer in sorted(weights, reverse=True):
        part = "features" if layer.startswith("conv") else "classifier"
        name = keys.format(layer=layer, part=part, place=PLACES[layer])
        named |= {f"{name}.bias": weights[layer][1], f"{name}.weight": weights[layer][0]}
    return named


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("form", ["zip", "plain", "safetensors"])
def test_bare_tensors(form: str, keys: str) -> None:
    import torch
    from safetensors.numpy import save_file

    weights, rgb = files.tensors(), files.random_image(227)
    named = state_dict(weights, KEYS[keys])
    path = Path("saved")
    if form == "safetensors":
        save_file({name.removeprefix("module._orig_mod."): value for name, value in named.items()}, path)
    else:
        content: Any = {name: torch.from_numpy(value) for name, value in named.items()}
        content = {"epoch": 3, "state_dict": content, "best": torch.tensor(0.5)} if keys == "wrapped" else content
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    model, report = import_bytes(path.read_bytes(), "--recipe", "caffe")
    assert "the file has only tensors" in report["notes"][0]
    x = rgb - np.array(files.MEAN_BGR)[::-1, None, None]
    check_scores(model, rgb, files.caffe_forward(weights, x, mean_bgr=(0, 0, 0)))


def test_bare_tensors_of_a_network_fed_as_torchvision_does() -> None:
    import torch

    weights, rgb = files.tensors(), files.random_image(224)
    weights["conv1"] = (weights["conv1"][0] * 60, weights["conv1"][1])
    torch.save({name: torch.from_numpy(v) for name, v in state_dict(weights, "{layer}").items()}, "network.pth")
    model, _ = import_bytes(Path("network.pth").read_bytes(), "--pixels", "imagenet")
    mean, std = (np.array(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    x = np.pad((rgb / 255 - mean) / std, ((0, 0), (0, 3), (0, 3)))
    for layer in ("conv1", "conv2", "conv3", "conv4", "conv5"):
        weight, bias = (value.astype(np.float64) for value in weights[layer])
        pad, groups = files.PADS.get(layer, 0), files.GROUPS[layer]
        x = np.maximum(convolve(x, weight, bias, files.STRIDES.get(layer, 1), pad, groups), 0)
        if layer in ("conv1", "conv2"):  # recipe paper: each tower by itself, k = 2, alpha for every term
            x = np.concatenate([files.normalized(half, 1e-4, 2.0) for half in np.split(x, 2)])
        if layer in ("conv1", "conv2", "conv5"):
            x = max_pool(x, 3)
    check_scores(model, rgb, files.connected(weights, x.reshape(-1), 0.5))


def test_half_precision() -> None:
    import torch

    weights = files.tensors()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        named = {n: torch.from_numpy(v).to(dtype) for n, v in state_dict(weights, "{layer}").items()}
        torch.save(named, "network.pth")
        model, _ = import_bytes(Path("network.pth").read_bytes())
        np.testing.assert_array_equal(model.tensors["conv2.weight"], named["conv2.weight"].float().numpy())


def test_an_archive_that_another_program_packed_again() -> None:
    import zipfile

    import torch

    named = {n: torch.from_numpy(v) for n, v in state_dict(files.tensors(), "{layer}").items()}
    torch.save(named, "network.pth")
    with zipfile.ZipFile("network.pth") as original, zipfile.ZipFile("again.pth", "w", zipfile.ZIP_DEFLATED) as again:
        for entry in original.infolist():
            again.writestr(entry.filename, original.read(entry))
    model, _ = import_bytes(Path("again.pth").read_bytes())
    for name, value in named.items():
        np.testing.assert_array_equal(model.tensors[name], value.numpy())


def test_a_transposed_tensor() -> None:
    import torch

    weights = files.tensors()
    named = {n: torch.from_numpy(v) for n, v in state_dict(weights, "{layer}").items()}
    named["fc7.weight"] = named["fc7.weight"].T.contiguous().T
    torch.save(named, "network.pth")
    model, _ = import_bytes(Path("network.pth").read_bytes())
    np.testing.assert_array_equal(model.tensors["fc7.weight"], weights["fc7"][0])


def test_every_command_uses_the_imported_run(tmp_path: Path) -> None:
    """predict, export and visualize-filters find it by its name and as the newest run."""
    from alexnet_plugins.export.command import export
    from alexnet_plugins.predict import predict
    from alexnet_plugins.visualize.command import visualize_filters

    weights = files.tensors()
    weights["fc8"] = (weights["fc8"][0] / np.float32(500), weights["fc8"][1])  # so that no probability is 0
    Path("my net.caffemodel").write_bytes(files.caffemodel(weights, 1))
    Path("names.txt").write_text("\n".join(f"n{i:08d} kind {i}, a thing" for i in range(10)), encoding="utf-8")
    report = run("my net.caffemodel", "--classes", "names.txt", "--json")
    assert report.exception is None
    assert json.loads(report.stdout)["path"] == "runs/my_net/model.safetensors"
    cat = draw(tmp_path / "cat.png", 3)
    crop = make_views(images.resize_and_crop(images.decode(Path(cat).read_bytes())), 227, 1)
    scores = files.caffe_forward(weights, crop[0, ::-1])
    app = Typer()
    for command in (predict, export, visualize_filters):
        app.command()(command)
    runner = CliRunner()
    answers = []
    for words in (
        ["predict", cat],
        ["export"],
        ["predict", cat, "-w", "my_net"],
        ["visualize-filters", "-w", "my_net"],
    ):
        result = runner.invoke(app, [*words, "--json"])
        assert result.exception is None, words
        answers.append(json.loads(result.stdout))
    for answer in (answers[0], answers[2]):  # straight from the weights, and from the exported file
        top = answer["top"]
        assert [label["index"] for label in top] == np.argsort(-scores)[:5].tolist()
        assert top[0]["label"] == f"kind {top[0]['index']}"
        shares = np.exp(scores - scores.max()) / np.exp(scores - scores.max()).sum()
        np.testing.assert_allclose([label["probability"] for label in top], np.sort(shares)[::-1][:5], atol=1e-4)
    assert Path("runs/my_net/alexnet.onnx").is_file()
    assert Path("runs/my_net/figures/conv1.png").is_file()


def test_fine_tuning_and_evaluating_start_from_it(prepared: Path) -> None:
    from alexnet_plugins.evaluate import evaluate
    from alexnet_plugins.train.command import train

    Path("network.caffemodel").write_bytes(files.caffemodel(files.tensors(classes=4), 2))
    Path("names.txt").write_text("red\nyellow\nblue\ngreen\n", encoding="utf-8")
    assert run("network.caffemodel", "--classes", "names.txt").exception is None
    app = Typer()
    for command in (evaluate, train):
        app.command()(command)
    result = CliRunner().invoke(app, ["evaluate", "-w", "network", "--data", str(prepared), "--json"])
    assert result.exception is None
    assert json.loads(result.stdout)["images"] == 20
    words = ["--data", str(prepared), "--gpus", "none", "--json", "--max-steps", "1", "-b", "16"]
    result = CliRunner().invoke(app, ["train", "--init-from", "network", *words])
    assert result.exception is None
    assert "conv1" in result.stderr
    resumed = CliRunner().invoke(app, ["train", "--resume", "network", *words])
    assert isinstance(resumed.exception, UsageError)
    assert "imported, not trained" in resumed.exception.what


def test_a_thousand_classes_are_known_by_wnid() -> None:
    names = ilsvrc_classes()
    assert len(set(names)) == 1000
    assert names[281] == ("tabby", "n02123045")
    assert names[134] == ("crane bird", "n02012849")
    assert names[517] == ("crane", "n03126707")
    model, report = import_bytes(files.caffemodel(files.tensors(classes=1000)))
    assert model.classes[281] == ("tabby", "n02123045")
    assert any("assumed to be ILSVRC's" in note for note in report["notes"])


ANIMALS = ["tench, Tinca tinca", "goldfish", "jack-o'-lantern", "hen"]
WNIDS = ["n01440764", "n01443537", "n03590841", "n01514859"]
GIVEN = list(zip(ANIMALS, WNIDS, strict=True))
NAMES = [(name, None) for name in ANIMALS]
SHORT = [(name.partition(",")[0], wnid) for name, wnid in GIVEN]
LISTS: dict[str, tuple[str, Sequence[tuple[str, str | None]]]] = {
    "names": ("\n".join(ANIMALS) + "\n\n", NAMES),
    "wnid<TAB>name": ("\n".join(f"{wnid}\t{name}" for name, wnid in GIVEN), SHORT),
    "wnid,name in quotes": ("wnid,name\n" + "\n".join(f'{wnid},"{name}"' for name, wnid in GIVEN), SHORT),
    "wnids": ("\n".join(WNIDS), [*SHORT[:2], ("jack-o'-lantern", WNIDS[2]), SHORT[3]]),
    "name wnid": ("\n".join(f"{name}\t{wnid}" for name, wnid in GIVEN), SHORT),
    "wnid id name": ("\n".join(f"{w} {4 - i} {n}" for i, (n, w) in enumerate(GIVEN)), SHORT),
    "number name": ("\n".join(f"{i} {name}" for i, name in enumerate(ANIMALS)), NAMES),
    "numbers from 1, not in order": ("\n".join(f"{i + 1}: {ANIMALS[i]}" for i in (2, 0, 3, 1)), NAMES),
    "number,wnid,name": ("\n".join(f"{i},{w},{n}" for i, (n, w) in enumerate(GIVEN)), SHORT),
    "name,number": ("class_name,class_id\n" + "\n".join(f"{ANIMALS[i]},{i}" for i in (1, 3, 0, 2)), NAMES),
    "a dictionary": (repr(dict(enumerate(ANIMALS))).replace(", 1", ",\n 1"), NAMES),
    "inside of a dictionary": (repr(dict(enumerate(ANIMALS)))[1:-1].replace(", 1:", ",\n 1:").replace(", 2:", ",\n2:")
                               .replace(", 3:", ",\n3:"), NAMES),
    "a list in a program": (f"const CLASSES = {ANIMALS!r};", NAMES),
    "Keras": (json.dumps({str(i): [w, n] for i, (n, w) in enumerate(GIVEN)}), SHORT),
    "JSON wnid to synonyms": (json.dumps({w: n.split(", ") for n, w in GIVEN}), SHORT),
    "JSON list": (json.dumps(ANIMALS, indent=1), NAMES),
    "JSON wnid to number": (json.dumps({WNIDS[i]: i for i in (3, 1, 0, 2)}), SHORT),
    "JSON name to number": (json.dumps({ANIMALS[i]: i for i in (3, 1, 0, 2)}), NAMES),
    "JSON folders that are numbers": ('{"1": 0, "2": 2, "3": 3, "10": 1}', [(n, None) for n in ("1", "10", "2", "3")]),
    "Hugging Face": (json.dumps({"a": 1, "id2label": dict(enumerate(ANIMALS))}), NAMES),
    "YAML": ("nc: 4\nnames:\n" + "\n".join(f"  {i}: {name}" for i, name in enumerate(ANIMALS)) + "\ntrain: x", NAMES),
    "YAML list": ("names:\n" + "\n".join(f"- {name}" for name in ANIMALS), NAMES),
    "YAML in brackets": ("names: [tench, cock, hen, ray]", [(n, None) for n in ("tench", "cock", "hen", "ray")]),
    "numbers that belong to names": ("type 1\ntype 2\ntype 3\ntype 4", [(f"type {i}", None) for i in range(1, 5)]),
    "numbers at the start of names": ("1 of clubs\n3 of clubs\nking\n7", [
        (name, None) for name in ("1 of clubs", "3 of clubs", "king", "7")
    ]),
}  # fmt: skip


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_classes(form: str) -> None:
    text, expected = LISTS[form]
    for content in (text.encode(), text.replace("\n", "\r\n").encode("utf-16")):  # the second as Windows writes it
        Path("list").write_bytes(content)
        assert read_class_list(Path("list"), 4) == expected


SHORT_NAMES = ["crane" if name == "crane bird" else name for name, _ in ilsvrc_classes()]


def test_a_thousand_short_names_are_known_by_their_order() -> None:
    Path("names.txt").write_text("\n".join(SHORT_NAMES))
    classes = read_class_list(Path("names.txt"), 1000)
    assert [wnid for _, wnid in classes] == [wnid for _, wnid in ilsvrc_classes()]
    assert (classes[134].name, classes[517].name) == ("crane (n02012849)", "crane (n03126707)")
    assert classes[281].name == "tabby"
    assert not is_reordered(classes)
    Path("names.txt").write_text("\n".join(f"thing {i}" for i in range(1000)))
    assert read_class_list(Path("names.txt"), 1000)[134] == ("thing 134", None)


@pytest.mark.parametrize("form", ["{1}", "{1} {0} {2}", "{2}"])
def test_ilsvrc_in_another_order_is_warned_of(form: str) -> None:
    entries = sorted(ilsvrc_classes(), key=lambda entry: entry.name)
    Path("list.txt").write_text("\n".join(form.format(i, w, n) for i, (n, w) in enumerate(entries, 1)))
    content = files.caffemodel(files.tensors(classes=1000))
    model, report = import_bytes(content, "--classes", "list.txt")
    assert [entry.name for entry in model.classes] == [entry.name for entry in entries]
    assert any("not in the order of their wnids" in note for note in report["notes"])
    assert not any("not in the order" in note for note in import_bytes(content)[1]["notes"])


def test_classes_by_the_development_kit(tmp_path: Path) -> None:
    content = files.caffemodel(files.tensors(classes=len(CLASSES)))
    model, _ = import_bytes(content, "--classes", str(write_devkit(tmp_path)))
    by_id = sorted(CLASSES, key=lambda wnid: CLASSES[wnid][1])
    assert [c.wnid for c in model.classes] == by_id != sorted(by_id)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a\nb\n", "lists 2 classes, the network has 4"),
        ("a\nb\nc\na\n", "lists a 2 times"),
        ("\n".join(f"n01440764 {i}" for i in "abcd"), "lists n01440764 4 times"),
        ('{"0": "a", "1": "b", "2":', "neither JSON nor Python"),
        ("{'a', 'b', 'c', 'd'}", "where a class name should be"),
        ('[{"id": 1}, 2, 3, 4]', "where a class name should be"),
        ('["a", "b", "", "d"]', "no name for output 2"),
        ("", "lists 0 classes"),
    ],
)
def test_lists_of_classes_that_cannot_be_right(text: str, says: str) -> None:
    Path("list.txt").write_text(text)
    with pytest.raises(WeightsError, match=says):
        read_class_list(Path("list.txt"), 4)


def test_a_pipe_is_not_read_as_a_list() -> None:
    os.mkfifo("pipe.txt")  # reading it would wait forever
    with pytest.raises(DataError, match="not a regular file"):
        read_class_list(Path("pipe.txt"), 4)


def test_torchvisions_network_is_refused() -> None:
    import torch
    import torchvision

    with torch.device("meta"):
        shapes = {name: value.shape for name, value in torchvision.models.alexnet().state_dict().items()}
    # The matrices make up 234 of 244 MB and do not matter here.
    torch.save({n: torch.zeros(s if len(s) != 2 else (8, 8)) for n, s in shapes.items()}, "alexnet.pth")
    with pytest.raises(WeightsError, match="another network of the same name: Krizhevsky's of 2014") as caught:
        import_bytes(Path("alexnet.pth").read_bytes())
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("layer", "shape", "says"),
    [
        ("conv2", (20, 3, 5, 5), "conv2 has 20 channels, in this network 16"),
        ("conv1", (6, 1, 11, 11), "conv1.weight is 6x1x11x11, in this network 6x3x11x11"),
        ("conv1", (6, 3, 7, 7), "conv1.weight is 6x3x7x7, in this network 6x3x11x11"),
        ("conv3", (24, 8, 3, 3), "conv3.weight is 24x8x3x3, in this network 24x16x3x3"),
        ("fc6", (256, 16 * 25), "fc6.weight is 256x400, in this network 256x576"),
        ("fc7", (256, 128), "fc7.weight is 256x128, in this network 256x256"),
        ("fc8", (10, 300), "fc8.weight is 10x300, in this network 10x256"),
    ],
)
def test_the_first_layer_that_differs_is_named(layer: str, shape: tuple[int, ...], says: str) -> None:
    weights = files.tensors()
    weights[layer] = (np.ones(shape, np.float32), np.ones(shape[0], np.float32))
    with pytest.raises(WeightsError, match=says):
        import_bytes(files.caffemodel(weights, bare=True))


def test_a_single_tower_nan_and_unknown_layers() -> None:
    weights = files.tensors()
    weights["conv2"] = (np.ones((16, 6, 5, 5), np.float32), weights["conv2"][1])
    with pytest.raises(WeightsError, match=r"conv5 has .* so there is one tower"):
        import_bytes(files.caffemodel(weights, bare=True))
    weights = files.tensors()
    weights["fc6"][1][7] = np.nan
    with pytest.raises(WeightsError, match=r"fc6\.bias has NaN or infinite values"):
        import_bytes(files.caffemodel(weights))
    content = files.caffemodel(files.tensors()) + files.bytes_field(
        100, files.bytes_field(1, "bn") + files.bytes_field(2, "BatchNorm")
    )
    with pytest.raises(WeightsError, match="layer bn is of type BatchNorm"):
        import_bytes(content)


def test_output_names() -> None:
    Path("a.caffemodel").write_bytes(files.caffemodel(files.tensors()))
    assert run("a.caffemodel", "-o", "first").exception is None
    assert isinstance(run("a.caffemodel", "-o", "first").exception, UsageError)
    assert isinstance(run("a.caffemodel", "-o", "x/y").exception, UsageError)
    for place in ("no/where.safetensors", "x.onnx"):
        refused = run("a.caffemodel", "-o", place)
        assert isinstance(refused.exception, UsageError)
        assert not refused.stderr, "checked before the file is read"
    assert isinstance(run("a.caffemodel", "--recipe", "fast").exception, UsageError)
    assert isinstance(run("runs/first/model.safetensors").exception, WeightsError)  # already a file of this toolkit
    assert sorted(p.name for p in Path("runs").iterdir()) == ["first", "latest"]


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "a JPEG image"),
        (b"\x89PNG\r\n\x1a\n", "a PNG image"),
        (b"<!DOCTYPE html>", "a web page"),
        (b'name: "AlexNet"\ninput: ', "text"),
        (b"\x1f\x8b\x08", "a gzip archive"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"\x80\x04\x95", "a pickle"),
    ],
)
def test_files_given_by_mistake_are_named_in_the_message(start: bytes, what: str) -> None:
    with pytest.raises(WeightsError, match=f"a.onnx has no weights.*: it is {what}"):
        import_bytes(start + bytes(100), name="a.onnx")


def test_an_address_must_be_downloaded_first() -> None:
    error = run("https://example.org/a.caffemodel").exception
    assert isinstance(error, WeightsError)
    assert error.hint == "download it first: curl -LO URL"


def test_published_files_are_known_by_their_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    from alexnet_plugins.import_weights import convert

    assert convert.PUBLISHED["9116a64c0fbe4459d18f4bb6b56d647b63920377"].startswith("bvlc_alexnet")
    content = files.caffemodel(files.tensors())
    _, report = import_bytes(content)
    assert report["published"] is None
    assert report["sha1"] == hashlib.sha1(content).hexdigest()
    monkeypatch.setattr(convert, "PUBLISHED", {report["sha1"]: "the very file"})
    assert import_bytes(content)[1]["published"] == "the very file"


def test_the_one_tower_network_of_the_footnote(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    from model_files import random_model

    model = random_model(replace(PAPER, towers=1, width=1 / 16))
    save_file({n: v for n, v in model.tensors.items() if n != "mean"}, tmp_path / "one.bin")
    imported, report = import_bytes((tmp_path / "one.bin").read_bytes())
    assert (report["towers"], report["width"]) == (1, 1 / 16)
    np.testing.assert_array_equal(imported.tensors["fc6.weight"], model.tensors["fc6.weight"])
