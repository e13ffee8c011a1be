"""The readers against second truths: Google's protobuf, the onnx package, Python's pickle, NumPy and PyTorch."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import convnet_files
import foreign_files as files
import numpy as np
import onnx
import pytest
import torch
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from alexnet_cli.core import caffemodel, cuda_convnet, onnx_weights, torch_file
from alexnet_cli.core.protobuf import Message
from alexnet_cli.core.unpickler import NUMPY, PickledArray, load
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import PAPER


def caffe_messages() -> dict[str, Any]:
    """Classes of Google's runtime for the part of caffe.proto that matters: name -> class."""
    types = descriptor_pb2.FieldDescriptorProto
    table: dict[str, list[tuple[str, int, int, bool, str]]] = {
        "BlobShape": [("dim", 1, types.TYPE_INT64, True, "")],
        "BlobProto": [
            ("num", 1, types.TYPE_INT32, False, ""),
            ("channels", 2, types.TYPE_INT32, False, ""),
            ("height", 3, types.TYPE_INT32, False, ""),
            ("width", 4, types.TYPE_INT32, False, ""),
            ("data", 5, types.TYPE_FLOAT, True, ""),
            ("diff", 6, types.TYPE_FLOAT, True, ""),
            ("shape", 7, types.TYPE_MESSAGE, False, ".caffe.BlobShape"),
            ("double_data", 8, types.TYPE_DOUBLE, True, ""),
        ],
        "LayerParameter": [
            ("name", 1, types.TYPE_STRING, False, ""),
            ("type", 2, types.TYPE_STRING, False, ""),
            ("blobs", 7, types.TYPE_MESSAGE, True, ".caffe.BlobProto"),
        ],
        "NetParameter": [
            ("name", 1, types.TYPE_STRING, False, ""),
            ("layer", 100, types.TYPE_MESSAGE, True, ".caffe.LayerParameter"),
        ],
    }
    file = descriptor_pb2.FileDescriptorProto(name="caffe.proto", package="caffe", syntax="proto2")
    for name, fields in table.items():
        message = file.message_type.add(name=name)
        for field, number, kind, repeated, target in fields:
            label = types.LABEL_REPEATED if repeated else types.LABEL_OPTIONAL
            made = message.field.add(name=field, number=number, type=kind, label=label, type_name=target or None)
            if repeated and kind != types.TYPE_MESSAGE:
                made.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    find = pool.FindMessageTypeByName
    return {name: message_factory.GetMessageClass(find(f"caffe.{name}")) for name in table}


def test_googles_runtime_writes_what_is_read(tmp_path: Path) -> None:
    made, theirs = caffe_messages(), files.tensors()
    net = made["NetParameter"](name="AlexNet")
    for i, (layer, pair) in enumerate(theirs.items()):
        kind = "Convolution" if layer.startswith("conv") else "InnerProduct"
        message = net.layer.add(name=layer, type=kind)
        for value in pair:
            blob = message.blobs.add()
            blob.shape.dim.extend(value.shape)
            blob.double_data.extend(value.ravel().tolist()) if i == 4 else blob.data.extend(value.ravel().tolist())
            blob.diff.extend([0.5] * 3)
    path = tmp_path / "net.caffemodel"
    path.write_bytes(net.SerializeToString())
    found = caffemodel.read(path)
    for layer, pair in theirs.items():
        for mine, yours in zip(found.layers[layer], pair, strict=True):
            np.testing.assert_array_equal(mine, yours)


def test_googles_runtime_reads_what_the_tests_write() -> None:
    made, theirs = caffe_messages(), files.tensors()
    net = made["NetParameter"].FromString(files.caffemodel(theirs))
    weighted = {layer.name: layer for layer in net.layer if layer.blobs}
    assert list(weighted) == list(theirs)
    np.testing.assert_array_equal(np.array(weighted["conv5"].blobs[0].data, np.float32), theirs["conv5"][0].ravel())
    legacy = made["BlobProto"].FromString(files.blob(theirs["fc7"][0], legacy=True, packed=False))
    assert (legacy.num, legacy.channels, legacy.height, legacy.width) == (1, 1, 256, 256)


def test_the_onnx_package_agrees(tmp_path: Path) -> None:
    theirs = files.tensors()
    model = onnx.load_model_from_string(files.onnx_model(theirs))
    onnx.checker.check_model(model, full_check=True)
    path = tmp_path / "again.onnx"
    onnx.save(model, path)
    found = onnx_weights.read(path)
    for layer, pair in theirs.items():
        for mine, yours in zip(found.layers[layer], pair, strict=True):
            np.testing.assert_array_equal(mine, yours)


def test_weights_that_onnx_itself_put_outside_are_refused(tmp_path: Path) -> None:
    model = onnx.load_model_from_string(files.onnx_model(files.tensors()))
    onnx.save(model, tmp_path / "away.onnx", save_as_external_data=True, location="data.bin")
    with pytest.raises(WeightsError, match="lie in another file"):
        onnx_weights.read(tmp_path / "away.onnx")


def test_pythons_pickle_reads_the_same_arrays() -> None:
    net = convnet_files.layers()
    for name in ("conv3b", "fc2048bb"):  # one in C's order, one in Fortran's
        content = files.pickled(net[name]["weights"])
        whole = pickle.loads(content, encoding="latin1")
        mine = [part.array() for part in load(io.BytesIO(content), NUMPY)]
        for a, b, c in zip(whole, mine, net[name]["weights"], strict=True):
            np.testing.assert_array_equal(a, b)
            np.testing.assert_array_equal(b, c)


@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<i2", "|b1"])
def test_arrays_that_numpy_pickles_today(dtype: str) -> None:
    """Python 2 pickled bytes as they are; protocol 2 of Python 3 spells them as text."""
    array = np.arange(6).astype(dtype).reshape(2, 3)
    for content in (files.pickled(array), pickle.dumps(array, 2), pickle.dumps(np.asfortranarray(array), 2)):
        found = load(io.BytesIO(content), NUMPY)
        assert isinstance(found, PickledArray)
        np.testing.assert_array_equal(found.array(), array)
    assert load(io.BytesIO(pickle.dumps(np.float64(0.25), 2)), NUMPY) == 0.25


def test_pytorch_writes_what_is_read(tmp_path: Path) -> None:
    """Views of one storage, a parameter, an empty tensor, integers: all as torch.load has them."""
    whole = torch.arange(40.0).reshape(5, 8)
    named = {
        f"{layer}.{part}": torch.from_numpy(v)
        for layer, pair in files.tensors().items()
        for part, v in zip(("weight", "bias"), pair, strict=True)
    }
    named["fc8.weight"] = torch.nn.Parameter(torch.cat([named["fc8.weight"]] * 2)[::2])
    named["fc8.bias"] = whole[1:, 2:4].T.reshape(8)[:8].repeat(2)[:10]
    path = tmp_path / "net.pth"
    for new in (True, False):
        torch.save({"model": named, "step": torch.tensor(3)}, path, _use_new_zipfile_serialization=new)
        again = torch.load(path, weights_only=True)["model"]
        found = torch_file.read(path, PAPER, "rgb")
        for layer, pair in found.layers.items():
            for part, mine in zip(("weight", "bias"), pair, strict=True):
                np.testing.assert_array_equal(mine, again[f"{layer}.{part}"].detach().numpy())


def test_what_cuda_convnet_carried_besides_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "91.1000"
    path.write_bytes(convnet_files.checkpoint(convnet_files.layers()))
    content = cuda_convnet.entries(cuda_convnet.unpickled(path))
    assert type(content["op"]).__name__ == "Inert"
    assert not vars(content["op"])
    assert cuda_convnet.entries(content["model_state"])["epoch"] == 91


def test_runs_of_fixed_width_numbers_end_where_the_tag_changes() -> None:
    data = b"".join(files.single(5, i) for i in range(100)) + files.single(6, 7) + files.single(5, 100)
    message = Message(memoryview(data))
    np.testing.assert_array_equal(message.numbers(5, np.dtype("<f4")), np.arange(101))
    assert message.number(6, 0.0) == 7
    group = files.varint(9 << 3 | 3) + files.integer(5, 1) + files.varint(9 << 3 | 4)  # what is inside is skipped
    np.testing.assert_array_equal(Message(memoryview(group + data)).numbers(5, np.dtype("<f4")), np.arange(101))
