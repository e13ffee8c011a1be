"""Model files, checkpoints and prepared sets that somebody made to hurt: refused with a reason, or right."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from hostile import JSON, MUTATIONS, bounded, generated, mutated, replaced, told
from hypothesis import given
from hypothesis import strategies as st
from model_files import random_model, save_model

from alexnet_cli.core import checkpoint, onnx_graph, session, shards, weights
from alexnet_cli.core.loader import Loader, all_batches
from alexnet_cli.core.runs import MODEL
from alexnet_cli.core.session import Session
from alexnet_cli.core.shapes import tensor_shapes
from alexnet_cli.errors import DataError, WeightsError
from alexnet_cli.recipe import PAPER, TINY

RECIPE = replace(TINY, width=1 / 64)
SECRET = "do-not-read-me"


@pytest.fixture(autouse=True)
def _bounded() -> Iterator[None]:
    with bounded():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model file and its ONNX file, and a place for those that are not."""
    folder = tmp_path_factory.mktemp("models")
    model = weights.read(save_model(random_model(RECIPE, 4), folder / "whole.safetensors"))
    onnx_graph.write(model, folder / "whole.onnx")
    (folder / "secret.bin").write_bytes(SECRET.encode() * 100_000)
    return folder


def right_or_refused(path: Path) -> str:
    """The reason for which a model file is refused; empty for one that is taken, and then its tensors fit."""
    model = told(lambda: weights.read(path))
    if isinstance(model, str):
        return model
    wanted = tensor_shapes(model.recipe, len(model.classes))
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == wanted
    assert all(isinstance(name.name, str) for name in model.classes)
    return ""


def parts(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and tensors of a safetensors file, by its format's own description."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(header: Any, tensors: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if size is None else size) + text + tensors


@given(MUTATIONS)
@generated(40)
def test_damaged_model_files(folder: Path, mutations: list[tuple[str, int, bytes]]) -> None:
    (folder / "x.safetensors").write_bytes(mutated((folder / "whole.safetensors").read_bytes(), mutations, 4000))
    right_or_refused(folder / "x.safetensors")


LIES = st.one_of(
    st.fixed_dictionaries({"shape": st.lists(st.integers(0, 2**62), max_size=5)}),
    st.fixed_dictionaries({"shape": JSON}),
    st.fixed_dictionaries({"dtype": st.sampled_from(["F64", "I8", "F16", "BF16", "BOOL", "F8_E4M3", "X", 7])}),
    st.fixed_dictionaries({"data_offsets": st.lists(st.integers(0, 2**63), min_size=2, max_size=2)}),
    st.fixed_dictionaries({"data_offsets": JSON}),
    st.none(),
)


@given(st.sampled_from([*weights.PARAMETERS, "mean"]), LIES)
@generated(50)
def test_headers_that_lie(folder: Path, name: str, lie: dict[str, Any] | None) -> None:
    header, tensors = parts(folder / "whole.safetensors")
    header = {k: v for k, v in header.items() if k != name} if lie is None else header | {name: header[name] | lie}
    (folder / "x.safetensors").write_bytes(joined(header, tensors))
    reason = right_or_refused(folder / "x.safetensors")
    assert reason or header == parts(folder / "whole.safetensors")[0]


def test_sizes_that_lie_take_no_memory(folder: Path) -> None:
    header, tensors = parts(folder / "whole.safetensors")
    for size in (0, 1, 2**31, 2**63, 2**64 - 1):
        (folder / "x.safetensors").write_bytes(joined(header, tensors, size))
        assert right_or_refused(folder / "x.safetensors")
    for size in (1 << 33, 1 << 36):  # a file of holes: its bytes are there, and take no room on the disk
        huge = {"dtype": "F32", "shape": [size // 4], "data_offsets": [len(tensors), len(tensors) + size]}
        for name in ("extra", "conv1.weight"):
            rest = {k: v for k, v in header.items() if k != name}
            path = folder / "x.safetensors"
            path.write_bytes(joined(rest | {name: huge}, tensors))
            if name != "extra":
                assert right_or_refused(path)  # the hole that the tensor leaves is an error of its own
            os.truncate(path, path.stat().st_size + size)
            assert bool(right_or_refused(path)) == (name != "extra")
            path.unlink()


@pytest.mark.parametrize("kind", ["safetensors", "onnx"])
@given(data=st.data())
@generated(60)
def test_metadata_that_lies(folder: Path, kind: str, data: st.DataObject) -> None:
    """Anything in the place of anything: what is taken in spite of it gives probabilities of its classes."""
    path = folder / f"x.{kind}"
    proto = onnx.load(folder / "whole.onnx")
    header, tensors = parts(folder / "whole.safetensors")
    text = header["__metadata__"] if kind == "safetensors" else {p.key: p.value for p in proto.metadata_props}
    key = data.draw(st.sampled_from([k for k in text if not k.startswith("Image.")]))
    steps = data.draw(st.lists(st.integers(0, 60), max_size=3))
    junk = data.draw(JSON | st.sampled_from(["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "", "NaN"]))
    try:
        old = json.loads(text[key])
    except ValueError:
        old = text[key]
    lie = junk if isinstance(junk, str) and len(junk) > 100 else json.dumps(replaced(old, steps, junk))
    if kind == "safetensors":
        path.write_bytes(joined(header | {"__metadata__": text | {key: lie}}, tensors))
        if right_or_refused(path):
            return
    else:
        next(p for p in proto.metadata_props if p.key == key).value = lie
        onnx.save(proto, path)
    opened = told(lambda: Session(path, provider="cpu"))
    if not isinstance(opened, str):
        side = opened.recipe.input_size
        chances = opened.probabilities(np.zeros((1, 3, side, side), np.float32))
        assert chances.shape == (1, len(opened.classes))


def test_a_class_more_than_outputs_and_another_crop(folder: Path) -> None:
    header, tensors = parts(folder / "whole.safetensors")
    text = header["__metadata__"]
    five = json.dumps([{"name": f"c{i}"} for i in range(5)])
    crop = json.dumps(json.loads(text["preprocess"]) | {"crop": 227})
    grey = json.dumps(json.loads(text["preprocess"]) | {"channels": "BGR"})
    lies = {"fc8.weight is 4 x 64, but 5 x 64": {"classes": five}, "crop 227": {"preprocess": crop}}
    lies |= {"channels 'BGR'": {"preprocess": grey}}
    for words, lie in lies.items():
        (folder / "x.safetensors").write_bytes(joined(header | {"__metadata__": text | lie}, tensors))
        assert words in right_or_refused(folder / "x.safetensors")


@pytest.mark.parametrize("place", range(len(weights.PARAMETERS)))
def test_the_first_layer_that_differs_is_named(tmp_path: Path, place: int) -> None:
    """Weights of another width from some layer on: that layer's name, both shapes, whatever follows."""
    model = random_model(RECIPE, 4)
    names = weights.PARAMETERS[place:]
    wrong = {name: model.tensors[name][:-1] if name in names[:1] else model.tensors[name][1:] for name in names}
    path = save_model(replace(model, tensors={**model.tensors, **wrong}), tmp_path / "x.safetensors")
    found = " x ".join(map(str, wrong[names[0]].shape))
    wanted = " x ".join(map(str, model.tensors[names[0]].shape))
    with pytest.raises(WeightsError) as error:
        weights.read(path)
    assert f"{names[0]} is {found}, but {wanted} in recipe tiny" in error.value.what


@given(MUTATIONS, st.booleans())
@generated(60)
def test_damaged_onnx_files(folder: Path, mutations: list[tuple[str, int, bytes]], late: bool) -> None:
    """Damage where the graph is described, at the beginning, or where names and preprocessing are, at the end."""
    whole = (folder / "whole.onnx").read_bytes()
    damaged = mutated(whole, mutations, 2500) if not late else whole[:-6000] + mutated(whole[-6000:], mutations)
    (folder / "x.onnx").write_bytes(damaged)
    opened = told(lambda: Session(folder / "x.onnx", provider="cpu"))
    if not isinstance(opened, str):
        assert len(opened.classes) == 4
        assert opened.crop == 224


def elsewhere(tensor: onnx.TensorProto, location: str) -> None:
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", "64")):
        tensor.external_data.add(key=key, value=value)


def hidden(proto: onnx.ModelProto, where: str, location: str) -> None:
    """A tensor that lies elsewhere, in each place where a graph can hold one."""
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[16])
    elsewhere(tensor, location)
    node = proto.graph.node[0]
    if where == "initializer":
        elsewhere(proto.graph.initializer[-1], location)
    elif where == "new initializer":
        proto.graph.initializer.append(tensor)
    elif where == "constant":
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["x"], value=tensor))
    elif where == "attribute list":
        node.attribute.add(name="list", type=onnx.AttributeProto.TENSORS).tensors.append(tensor)
    elif where == "sparse":
        proto.graph.sparse_initializer.add(dims=[16]).values.CopyFrom(tensor)
    elif where == "function":
        proto.functions.add(name="f", domain="d").node.append(
            onnx.helper.make_node("Constant", [], ["x"], value=tensor)
        )
    elif where == "training":
        proto.training_info.add().initialization.initializer.append(tensor)
    else:
        inner = node.attribute.add(name="body", type=onnx.AttributeProto.GRAPH).g
        inner.node.append(onnx.helper.make_node("Constant", [], ["x"], value=tensor))


PLACES = ("initializer", "new initializer", "constant", "attribute list", "sparse", "function", "training", "subgraph")


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize(
    "location", ["secret.bin", "../models0/secret.bin", "{folder}/secret.bin", "/proc/self/environ"]
)
def test_values_in_other_files_are_never_fetched(
    folder: Path, where: str, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = onnx.load(folder / "whole.onnx")
    hidden(proto, where, location.format(folder=folder))
    (folder / "x.onnx").write_bytes(proto.SerializeToString())

    def opened(*_: object) -> None:
        raise AssertionError("whoever obeys the file has been asked to open it")

    monkeypatch.setattr(session, "_open", opened)
    with pytest.raises(WeightsError, match="is refused: it has") as error:
        Session(folder / "x.onnx")
    assert SECRET not in error.value.what


def test_an_overlong_tag_hides_nothing(folder: Path) -> None:
    """Varints may be written longer than need be; readers take them, and so the walker must."""
    proto = onnx.load(folder / "whole.onnx")
    whole = proto.SerializeToString()
    tensor = onnx.TensorProto(name="x", data_type=1, dims=[16], data_location=onnx.TensorProto.EXTERNAL)
    inside = b"\x2a" + bytes([tensor.ByteSize() | 0x80, 0x80, 0x00]) + tensor.SerializeToString()
    for hiding in (b"\xba\x00" + bytes([len(inside)]) + inside, b"\x3a" + bytes([len(inside) | 0x80, 0x00]) + inside):
        (folder / "x.onnx").write_bytes(whole + hiding)
        assert len(onnx.ModelProto.FromString(whole + hiding).graph.initializer) == len(proto.graph.initializer) + 1
        with pytest.raises(WeightsError, match="another file"):
            Session(folder / "x.onnx")


@pytest.mark.parametrize("operator", ["ConstantOfShape", "Expand", "Loop", "If", "Resize", "RandomNormal", "Mystery"])
def test_operators_that_could_ask_for_anything(folder: Path, operator: str) -> None:
    proto = onnx.load(folder / "whole.onnx")
    proto.graph.node.append(onnx.helper.make_node(operator, ["probabilities"], ["more"]))
    onnx.save(proto, folder / "x.onnx")
    with pytest.raises(WeightsError, match=f"the operator {operator}"):
        Session(folder / "x.onnx")


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"\xff" * 1000, b"\x0b" * 50, b"\x3a\xff\xff\xff\xff\x0f", b"PK\3\4"]
)
def test_what_is_no_onnx(folder: Path, content: bytes) -> None:
    (folder / "x.onnx").write_bytes(content)
    words = "is refused: it has field 10" if content.startswith(b"PK") else "cannot be opened"
    assert words in str(told(lambda: Session(folder / "x.onnx")))


def test_a_graph_within_a_graph_and_so_on(folder: Path) -> None:
    """Ten thousand levels of attributes, and a million empty fields: neither recursion nor patience is exhausted."""
    deep = b""
    for _ in range(3000):
        node = b"\x2a" + varint(len(deep) + 1 + len(varint(len(deep)))) + b"\x32" + varint(len(deep)) + deep
        deep = b"\x0a" + varint(len(node)) + node
    cases = {"a graph within a graph": b"\x3a" + varint(len(deep)) + deep, "more parts": b"\x08\x01" * 1_100_000}
    for words, content in cases.items():
        (folder / "x.onnx").write_bytes(content)
        assert words in str(told(lambda: Session(folder / "x.onnx")))


def varint(number: int) -> bytes:
    found = b""
    while number > 127:
        found, number = found + bytes([number & 127 | 128]), number >> 7
    return found + bytes([number])


def test_weights_that_are_no_numbers(folder: Path) -> None:
    from alexnet_cli.core.predict import probabilities

    model = random_model(RECIPE, 4)
    model.tensors["conv1.bias"][:] = np.nan
    with pytest.raises(WeightsError, match="no number"):
        probabilities(np.zeros((1, 256, 256, 3), np.uint8), Session(model, provider="cpu"))


# Checkpoints


def checkpoint_with(folder: Path, velocity: bytes, position: Any = None) -> Path:
    """A checkpoint whose checksums are right, as anybody can make them."""
    place = folder / "checkpoint"
    place.mkdir(exist_ok=True)
    shutil.copy(folder / "whole.safetensors", place / MODEL)
    (place / checkpoint.OPTIMIZER).write_bytes(velocity)
    sums = {name: sha256((place / name).read_bytes()).hexdigest() for name in (MODEL, checkpoint.OPTIMIZER)}
    meta = {"schema": checkpoint.SCHEMA, "step": 1, "sha256": sums, "position": position or {"step": 3, "epoch": 1}}
    (place / checkpoint.META).write_text(json.dumps(meta))
    return place


VELOCITY = safetensors.torch.save({"conv1.weight": torch.ones(3, 4)})


@pytest.mark.parametrize(
    ("velocity", "position", "error"),
    [
        (b"", None, "cannot be read"),
        (VELOCITY[:-1], None, "cannot be read"),
        (pickle.dumps(1), None, "cannot be read"),
        (safetensors.torch.save({"conv1.weight": torch.ones(3, dtype=torch.float64)}), None, "is not float32"),
        (VELOCITY, "step 3", "has no position"),
    ],
)
def test_checkpoints_of_junk(folder: Path, velocity: bytes, position: Any, error: str) -> None:
    assert error in str(told(lambda: checkpoint.load(checkpoint_with(folder, velocity, position))))


def test_meta_of_junk(folder: Path) -> None:
    place = checkpoint_with(folder, VELOCITY)
    assert isinstance(told(lambda: checkpoint.load(place)), checkpoint.Checkpoint)
    for junk in ("", "[" * 100_000, "[]", '{"schema": 1}', "null"):
        (place / checkpoint.META).write_text(junk)
        assert isinstance(told(lambda: checkpoint.load(place)), str)


# Prepared sets


def used(path: Path) -> None:
    """Open a prepared set and look at every picture, as evaluation does."""
    dataset = shards.open_dataset(path)
    dataset.mean_image()
    split = dataset.split("val")
    with Loader(split, 8, 1) as loader:
        for batch in loader.batches(all_batches(len(split), 8)):
            assert all(split.key(int(row)) for row in batch.rows)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@given(data=st.data())
@generated(60)
def test_records_of_junk(copy: Path, prepared: Path, data: st.DataObject) -> None:
    record = json.loads((prepared / "dataset.json").read_text())
    steps = data.draw(st.lists(st.integers(0, 20), max_size=5))
    (copy / "dataset.json").write_text(json.dumps(replaced(record, steps, data.draw(JSON))))
    told(lambda: used(copy))


@pytest.mark.parametrize("name", ["../secret.tar", "{folder}/secret.tar", "..", "", "a/b.tar", "a\0b"])
def test_shards_lie_in_their_folder(copy: Path, name: str) -> None:
    (copy.parent / "secret.tar").write_bytes((copy / "val-000000.tar").read_bytes())
    record = json.loads((copy / "dataset.json").read_text())
    record["splits"]["val"]["shards"][0]["file"] = name.format(folder=copy.parent)
    (copy / "dataset.json").write_text(json.dumps(record))
    assert "is damaged" in str(told(lambda: used(copy)))


@given(st.sampled_from(["val.index.npy", "mean.npy", "val-000000.tar"]), MUTATIONS, st.booleans())
@generated(50)
def test_damaged_files_of_a_set(
    copy: Path, prepared: Path, name: str, mutations: list[tuple[str, int, bytes]], header: bool
) -> None:
    (copy / name).write_bytes(mutated((prepared / name).read_bytes(), mutations, 200 if header else None))
    told(lambda: used(copy))
    shutil.copy(prepared / name, copy / name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", 2**63), ("offset", 0), ("size", 2**32 - 1), ("shard", 7), ("label", 99), ("size", 0)],
)
def test_rows_that_point_elsewhere(copy: Path, field: str, value: int) -> None:
    rows = np.load(copy / "val.index.npy")
    rows[field][3] = value
    np.save(copy / "val.index.npy", rows)
    with pytest.raises(DataError):
        used(copy)


def npy(shape: str, dtype: str = "'<f4'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        npy("(3, 256, 256)"), npy("(10**12,)"), npy(f"({2**40},)"), npy(f"({2**70},)"), npy("(-1,)"), npy("()"),
        npy("(3,)", "'|O'") + pickle.dumps([1, 2, 3]), npy("(" * 900 + ")" * 900), npy("(1,)", "[('a', '<f4')] * 9"),
        b"PK\x03\x04" + bytes(100), b"", pickle.dumps(Path("/nonexistent/x")),
    ],
)  # fmt: skip
def test_arrays_that_lie(copy: Path, content: bytes) -> None:
    for name in ("mean.npy", "val.index.npy"):
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            used(copy)
        (copy / name).write_bytes(kept)


def test_a_record_of_holes_or_a_pipe(copy: Path) -> None:
    os.truncate(copy / "dataset.json", 1 << 36)
    with pytest.raises(DataError):
        used(copy)
    (copy / "dataset.json").unlink()
    os.mkfifo(copy / "dataset.json")
    with pytest.raises(DataError):
        used(copy)


@pytest.mark.parametrize("recipe", [PAPER, replace(PAPER, towers=1), replace(TINY, width=0.3)])
def test_shapes_are_those_of_the_network(recipe: Any) -> None:
    """The table for model files against the modules that PyTorch builds."""
    from alexnet_cli.core.network import Network, parameters_by_name

    with torch.device("meta"):
        network = Network(recipe, 7)
    built = {name: tuple(parameter.shape) for name, parameter in parameters_by_name(network)}
    assert tensor_shapes(recipe, 7) == built | {"mean": (3, 256, 256)}
