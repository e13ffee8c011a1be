"""ONNX files opened in ONNX Runtime: constants that are not copied, hostile and corrupt files."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.shape_inference
import onnx.version_converter
import pytest
from hypothesis import given
from onnx import external_data_helper, helper, numpy_helper

from alexnet_cli.core.export import quantize
from alexnet_cli.core.export.export import synthetic_crops
from alexnet_cli.core.inference import onnx_graph, session
from alexnet_cli.core.inference.session import Session
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import PAPER, Recipe
from hostile import MUTATIONS, corrupt, limit_time_and_memory, repeatable, result_or_message
from model_files import random_model, save_onnx

NARROW = replace(PAPER, width=1 / 64)
SECRET = b"do-not-read-me!!" * 4


def protos(recipe: Recipe) -> dict[str, onnx.ModelProto]:
    """The graph in every precision, as export makes it."""
    model = random_model(recipe, 4)
    whole, rows = onnx_graph.build_graph(model), onnx_graph.build_graph(model, rows=True)
    ranges = quantize.measure_ranges(rows, synthetic_crops(recipe.input_size, 2))
    return {"fp32": whole, "fp16": quantize.to_float16(whole), "int8": quantize.to_int8(rows, ranges)}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A file of each precision, with constants large enough to stay in the file."""
    folder = tmp_path_factory.mktemp("session")
    for name, proto in protos(replace(PAPER, width=1 / 8)).items():
        onnx_graph.save_graph(proto, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in ("fp32", "fp16", "int8")}


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_large_constants_are_views_of_the_file(files: dict[str, Path], name: str) -> None:
    content, constants = session._read_file(files[name])
    whole, rest = onnx.load(files[name]), onnx.ModelProto.FromString(content)
    expected = {t.name: numpy_helper.to_array(t) for t in whole.graph.initializer}
    assert {"mean", "fc6.weight" if name != "int8" else "fc6.weight.codes"} <= set(constants)
    assert len(content) < 0.2 * files[name].stat().st_size
    for key, value in constants.items():
        np.testing.assert_array_equal(value, expected[key])
        assert not value.flags.owndata
    assert {t.name for t in rest.graph.initializer} == set(expected)
    external_data_helper.load_external_data_for_model(rest, str(files[name].parent))  # from where the graph says
    for tensor in rest.graph.initializer:
        np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected[tensor.name])
    assert rest.graph.node == whole.graph.node
    assert rest.metadata_props == whole.metadata_props


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_a_quickly_opened_session_agrees_with_onnx_runtime_alone(files: dict[str, Path], name: str) -> None:
    import onnxruntime

    crops = synthetic_crops(224, 3)
    alone = onnxruntime.InferenceSession(str(files[name]), providers=["CPUExecutionProvider"])
    expected = alone.run(["logits"], {"input": crops.astype(np.float32)})[0]
    for fast_start in (True, False):
        np.testing.assert_allclose(
            Session(files[name], provider="cpu", fast_start=fast_start).logits(crops), expected, atol=1e-4
        )


@pytest.mark.skipif(sys.platform != "linux", reason="the names of files are text on other systems")
def test_a_name_that_is_no_utf_8(files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"n\xe9t.onnx")
    path.parent.mkdir()
    shutil.copy(files["fp16"], path)
    crops = synthetic_crops(224, 1)
    expected = Session(files["fp16"], provider="cpu").logits(crops)
    np.testing.assert_array_equal(Session(path, provider="cpu").logits(crops), expected)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not replace a mapped file")
def test_a_file_replaced_while_it_is_opened_is_refused(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph and class names would come from one file, and its weights from the other."""
    read_source = session._read_source

    def read_and_replace(path: session.ModelSource, layers: session.LayerChoice) -> Any:
        result = read_source(path, layers)
        (tmp_path / "new.onnx").replace(tmp_path / "a.onnx")
        return result

    for name in ("a.onnx", "new.onnx"):
        shutil.copy(files["fp32"], tmp_path / name)
    monkeypatch.setattr(session, "_read_source", read_and_replace)
    with pytest.raises(WeightsError, match=r"a\.onnx was replaced"):
        Session(tmp_path / "a.onnx", provider="cpu")


def test_the_mean_image_is_that_of_the_model(files: dict[str, Path]) -> None:
    mean = random_model(replace(PAPER, width=1 / 8), 4).mean
    for name, path in files.items():
        np.testing.assert_allclose(Session(path, fast_start=True).mean(), mean, atol=0 if name == "fp32" else 0.1)


def test_a_model_that_fails_only_when_it_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The error is a WeightsError, and ONNX Runtime writes nothing to the terminal."""
    proto = protos(NARROW)["int8"]
    scale = next(t for t in proto.graph.initializer if t.name == "centered.scale")
    scale.CopyFrom(numpy_helper.from_array(np.ones(5, np.float32), scale.name))  # for each of five channels
    onnx_graph.save_graph(proto, tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match="cannot be run"):
        Session(tmp_path / "a.onnx", provider="cpu").logits(synthetic_crops(224, 1))
    assert not capfd.readouterr().err


def hide(proto: onnx.ModelProto, where: str) -> None:
    """Put a tensor whose values lie in another file into one of the places where a model can hold one."""
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[16], data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", "secret.bin"), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)
    constant = helper.make_node("Constant", [], ["x"], value=tensor)
    if where == "initializer":
        proto.graph.initializer.append(tensor)
    elif where == "large initializer":
        large = next(t for t in proto.graph.initializer if t.name == "mean")
        large.external_data.extend(tensor.external_data)
        large.data_location = tensor.data_location
    elif where == "constant":
        proto.graph.node.insert(0, constant)
    elif where == "sparse":
        proto.graph.sparse_initializer.add(dims=[16]).values.CopyFrom(tensor)
    elif where == "function":
        proto.functions.add(name="f", domain="d").node.append(constant)
    elif where == "training":
        proto.training_info.add().initialization.initializer.append(tensor)
    else:
        proto.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g.node.append(constant)


PLACES = ("initializer", "large initializer", "constant", "sparse", "function", "training", "subgraph")


@pytest.mark.parametrize("where", PLACES)
def test_values_in_other_files_are_never_read(tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proto = onnx_graph.build_graph(random_model(NARROW, 4))
    hide(proto, where)
    (tmp_path / "x.onnx").write_bytes(proto.SerializeToString())
    (tmp_path / "secret.bin").write_bytes(SECRET)

    def refuse_to_open(*_: object) -> None:
        raise AssertionError("ONNX Runtime was asked to open the file")

    monkeypatch.setattr(Session, "_open", refuse_to_open)
    with pytest.raises(WeightsError, match="refers to other files, which is not allowed") as error:
        Session(tmp_path / "x.onnx")
    assert error.value.exit_code == 3


def test_a_link_and_a_name_with_location(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    target = shutil.copy(files["fp32"], tmp_path / "blobs" / "any location.onnx")
    (tmp_path / "link.onnx").symlink_to(target)
    crops = synthetic_crops(224, 1)
    expected = Session(files["fp32"], provider="cpu").logits(crops)
    np.testing.assert_array_equal(Session(tmp_path / "link.onnx", provider="cpu").logits(crops), expected)


def test_a_class_may_be_called_location(tmp_path: Path) -> None:
    model = random_model(NARROW, 4)
    names = tuple(c._replace(name=f"location {i}") for i, c in enumerate(model.classes))
    save_onnx(replace(model, classes=names), tmp_path / "x.onnx")
    assert Session(tmp_path / "x.onnx", provider="cpu").classes == names


def fold_mean(proto: onnx.ModelProto) -> None:
    """Compute the center of the mean image, and delete the image and its name, as onnxsim does."""
    (cut,) = [node for node in proto.graph.node if node.op_type == "Slice"]
    image = next(t for t in proto.graph.initializer if t.name == cut.input[0])
    center = np.ascontiguousarray(numpy_helper.to_array(image)[..., 16:240, 16:240])
    image.CopyFrom(numpy_helper.from_array(center, "onnx::Sub_1"))
    for node in proto.graph.node:
        node.input[:] = [{cut.output[0]: "onnx::Sub_1"}.get(name, name) for name in node.input]
    proto.graph.node.remove(cut)


def fix_batch(proto: onnx.ModelProto) -> None:
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 2


def expose_layer(proto: onnx.ModelProto) -> None:
    proto.graph.output.add(name="relu7")


TOUCHES: dict[str, Callable[[onnx.ModelProto], onnx.ModelProto | None]] = {
    "shape inference": onnx.shape_inference.infer_shapes,
    "opset 15": lambda proto: onnx.version_converter.convert_version(proto, 15),
    "opset 21": lambda proto: onnx.version_converter.convert_version(proto, 21),
    "constant folding": fold_mean,
    "a fixed batch": fix_batch,
    "another output": expose_layer,
}


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("touch", TOUCHES)
def test_files_that_an_ordinary_tool_has_touched(files: dict[str, Path], tmp_path: Path, touch: str, name: str) -> None:
    proto, path, crops = onnx.load(files[name]), tmp_path / "touched.onnx", synthetic_crops(224, 3)
    onnx_graph.save_graph(TOUCHES[touch](proto) or proto, path)
    layers = ("conv3", "relu7", "drop7")
    expected, values = Session(files[name], provider="cpu", layers=layers).probabilities_and_activations(crops)
    found, touched = Session(path, provider="cpu", layers=layers).probabilities_and_activations(crops)
    for actual, wanted in ((found, expected), *((touched[layer], values[layer]) for layer in layers)):
        np.testing.assert_allclose(actual, wanted, atol=1e-5 if name == "fp32" else 0.02)
    np.testing.assert_allclose(touched["drop7"], touched["relu7"] / 2)


def test_a_mean_image_that_is_gone_is_an_error_where_it_is_needed(files: dict[str, Path], tmp_path: Path) -> None:
    proto = onnx.load(files["fp32"])
    fold_mean(proto)
    onnx_graph.save_graph(proto, tmp_path / "folded.onnx")
    with pytest.raises(WeightsError, match="no longer has the whole mean image") as error:
        Session(tmp_path / "folded.onnx", provider="cpu").mean()
    assert "--views 1" in error.value.hint


def test_a_constant_with_a_wrong_shape(files: dict[str, Path], tmp_path: Path) -> None:
    proto = onnx.load(files["fp32"])
    next(t for t in proto.graph.initializer if t.name == "fc6.weight").dims[0] += 1
    onnx_graph.save_graph(proto, tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match="cannot be opened"):
        Session(tmp_path / "a.onnx", provider="cpu")


def test_an_operator_that_does_not_exist(tmp_path: Path) -> None:
    proto = onnx_graph.build_graph(random_model(NARROW, 4))
    proto.graph.node.append(helper.make_node("Mystery", ["probabilities"], ["more"]))
    onnx_graph.save_graph(proto, tmp_path / "x.onnx")
    with pytest.raises(WeightsError, match="cannot be opened"):
        Session(tmp_path / "x.onnx")


@pytest.mark.parametrize("content", [b"", bytes(100), b"\xff" * 1000, b"\x3a\xff\xff\xff\xff\x0f", b"PK\3\4"])
def test_files_that_are_not_onnx(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.onnx").write_bytes(content)
    with pytest.raises(WeightsError, match="cannot be opened"):
        Session(tmp_path / "x.onnx", provider="cpu")


def test_a_file_larger_than_protobuf_allows(tmp_path: Path) -> None:
    with (tmp_path / "x.onnx").open("wb") as file:
        file.truncate(1 << 36)  # a hole, which takes no room on the disk
    with pytest.raises(WeightsError, match="larger than 2 GB"):
        Session(tmp_path / "x.onnx")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@given(mutations=MUTATIONS)
@repeatable(15)
def test_corrupt_files_give_an_error_or_probabilities(
    tmp_path_factory: pytest.TempPathFactory,
    files: dict[str, Path],
    precision: str,
    mutations: list[tuple[str, int, bytes]],
) -> None:
    """Corrupt the description of the graph, at the beginning: an error, or probabilities of the file's classes."""
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(corrupt(files[precision].read_bytes(), mutations, 3000))
    with limit_time_and_memory():
        opened = result_or_message(lambda: Session(path, provider="cpu", fast_start=True))
        if not isinstance(opened, str):
            crops = np.zeros((1, 3, opened.recipe.input_size, opened.recipe.input_size), np.float32)
            probabilities = result_or_message(lambda: opened.probabilities(crops))
            assert isinstance(probabilities, str) or probabilities.shape == (1, len(opened.classes))
