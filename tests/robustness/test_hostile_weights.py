"""Damaged, lying or malicious weights files: each gives a clear error with exit code 3, and runs no code."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import pytest
import torch
from safetensors.numpy import save

import weights_files as files
from alexnet_cli.errors import AlexNetError, WeightsError
from alexnet_cli.recipe import PAPER
from alexnet_plugins.import_weights import convert

Content = bytes | Callable[[], bytes]


def try_import(path: Path) -> AlexNetError | None:
    """Import a file; returns the error, or None. Any other exception fails the test."""
    caught: AlexNetError | None = None
    try:
        network = convert.read_network(path, PAPER, "rgb")
        names, _ = convert.name_outputs(len(network.layers["fc8"][0]), None)
        convert.build_model(network, names, None, {})
    except AlexNetError as error:
        caught = error
    assert caught is None or (caught.exit_code == 3 and 0 < len(caught.what) < 1000 and caught.hint)
    return caught


def state_dict() -> dict[str, npt.NDArray[np.float32]]:
    return {
        f"{layer}.{part}": value
        for layer, pair in files.tensors().items()
        for part, value in zip(("weight", "bias"), pair, strict=True)
    }


def torch_file(content: object, new: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


TENSORS = {name: torch.from_numpy(value) for name, value in state_dict().items()}
SOUND: dict[str, bytes] = {
    "Caffe": files.caffemodel(files.tensors(), 2),
    "old Caffe": files.caffemodel(files.tensors(), 1),
    "ONNX": files.zoo_model(files.tensors()).SerializeToString(),
    "PyTorch": torch_file(TENSORS),
    "old PyTorch": torch_file(TENSORS, new=False),
    "safetensors": save(state_dict()),
}


@pytest.mark.parametrize("kind", SOUND)
def test_valid_files_are_read_and_damaged_ones_refused(kind: str, tmp_path: Path) -> None:
    path, sound = tmp_path / "file.bin", SOUND[kind]
    path.write_bytes(sound)
    assert try_import(path) is None
    for damaged in (sound[: len(sound) // 2], sound[:40], sound[:20] + b"\xff" * 9 + sound[29:]):
        path.write_bytes(damaged)
        assert isinstance(try_import(path), WeightsError)


# Pickles that call os.system: each would create the file `executed`.


class Attack:
    """Pickled as a call of os.system."""

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch executed",)


ATTACKS = {
    "a pickle": pickle.dumps(Attack(), 2),
    "a pickle of Python 3": pickle.dumps(Attack()),
    "PyTorch": torch_file({"conv1.weight": Attack()}),
    "old PyTorch": torch_file({"conv1.weight": Attack()}, new=False),
    "a whole module": torch_file(torch.nn.Linear(2, 2)),
}


@pytest.mark.parametrize("where", ATTACKS)
def test_nothing_in_a_pickle_runs(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    path.write_bytes(ATTACKS[where])
    assert try_import(path) is not None
    assert os.listdir(tmp_path) == ["file.pth"]
    with pytest.raises(WeightsError):
        convert.read_mean(path, bgr=True)
    assert os.listdir(tmp_path) == ["file.pth"]


def test_the_attack_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(ATTACKS["a pickle"])
    assert os.listdir(tmp_path) == ["executed"]


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def tensor(offset: bytes, size: bytes, stride: bytes) -> bytes:
    """PyTorch's archive with one tensor, its place given as pickled, in a storage of eight floats."""
    rebuild = b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x08"
    code = b"\x80\x02}X\x01\x00\x00\x00w" + rebuild + b"tQ" + offset + size + stride + b"\x89NtRs."
    return zipped({"a/data.pkl": code, "a/version": b"3\n", "a/data/0": bytes(32)})


def safetensors(header: str, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header.encode() + data


def caffe_with(blob: bytes) -> bytes:
    """A .caffemodel whose first weight has this in its blob, after the rest."""
    out = b""
    for layer, (weight, bias) in files.tensors().items():
        kind = "Convolution" if layer.startswith("conv") else "InnerProduct"
        extra = blob if layer == "conv1" else b""
        blobs = files.bytes_field(7, files.blob(weight, legacy=False) + extra)
        blobs += files.bytes_field(7, files.blob(bias, legacy=False))
        out += files.bytes_field(100, files.bytes_field(1, layer) + files.bytes_field(2, kind) + blobs)
    return out


def onnx_with(change: Callable[[onnx.ModelProto], object]) -> bytes:
    """The model zoo's file, changed."""
    model = onnx.load_model_from_string(SOUND["ONNX"])
    change(model)
    return bytes(model.SerializeToString())


def put_outside(model: onnx.ModelProto) -> None:
    """Say that a tensor's numbers lie in a file that is there, and is not the model's."""
    away = model.graph.initializer[1]
    away.ClearField("raw_data")
    away.data_location = onnx.TensorProto.EXTERNAL
    away.external_data.add(key="location", value="../../../../../../etc/passwd")


HUGE = b"\xff" * 9 + b"\x01"
LIES: dict[str, Content] = {
    "an empty file": b"",
    "a text": b"This is not a network.\n" * 30,
    "noise": b"\xd1\x07" * 200,
    # protocol buffers
    "a length without end": b"\xa2\x06" + HUGE + b"x",
    "a layer of nothing": files.bytes_field(100, b"") * 5,
    "a layer inside a layer, as in 2013": files.bytes_field(
        2, files.bytes_field(1, b"x") + files.bytes_field(4, "conv1")
    ),
    "a shape of more numbers than there are": lambda: caffe_with(files.bytes_field(7, files.bytes_field(1, b"\x02"))),
    "a negative dimension": lambda: caffe_with(files.bytes_field(7, files.bytes_field(1, HUGE + b"\x01"))),
    "seven bytes of floats": lambda: caffe_with(files.bytes_field(5, b"seven b")),
    "a size of normalization that is even": lambda: files.caffemodel(files.tensors()).replace(
        files.integer_field(1, 5) + files.float_field(2, 1e-4), files.integer_field(1, 4) + files.float_field(2, 1e-4)
    ),
    "alpha that is no number": lambda: files.caffemodel(files.tensors()).replace(
        files.float_field(2, 1e-4), files.float_field(2, float("nan"))
    ),
    # ONNX
    "weights in another file": lambda: onnx_with(put_outside),
    "a graph of nothing": lambda: onnx_with(lambda model: model.graph.Clear()),
    "an operator from elsewhere": lambda: onnx_with(lambda model: setattr(model.graph.node[1], "op_type", "RunShell")),
    "a circle": lambda: onnx_with(lambda model: model.graph.node[4].input.__setitem__(0, "r8")),
    "a tensor of strings": lambda: onnx_with(lambda model: setattr(model.graph.initializer[1], "data_type", 8)),
    "dimensions that its numbers do not fill": lambda: onnx_with(
        lambda model: model.graph.initializer[1].dims.append(2)
    ),
    "strides that are one number": lambda: onnx_with(
        lambda model: setattr(model.graph.node[0].attribute[0], "type", 2)
    ),
    # PyTorch
    "a zip bomb": lambda: zipped({"a/data.pkl": bytes(1 << 26), "a/version": b"3\n"}, zipfile.ZIP_DEFLATED),
    "a zip without a pickle": zipped({"a/b": b"c"}),
    "a tensor beyond its storage": tensor(b"K\x00", b"K\x09\x85", b"K\x01\x85"),
    "a tensor before its storage": tensor(b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85"),
    "one number a billion times": tensor(b"K\x00", b"J\x00\x00\x00\x40\x85", b"K\x00\x85"),
    "integers for weights": lambda: torch_file(TENSORS | {"conv1.weight": TENSORS["conv1.weight"].int()}),
    "a list": lambda: torch_file(list(TENSORS.values())),
    # safetensors
    "a header of an exabyte": safetensors("{}", length=1 << 60),
    "a header that is no json": safetensors("{not json"),
    "offsets beyond the end": safetensors('{"a.weight":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}'),
    "no tensors": safetensors("{}"),
}


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, tmp_path: Path) -> None:
    content = LIES[lie]
    path = tmp_path / "file.bin"
    path.write_bytes(content() if callable(content) else content)
    assert isinstance(try_import(path), WeightsError)


def test_more_than_two_gigabytes_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file.caffemodel"
    path.write_bytes(files.bytes_field(1, "AlexNet"))
    os.truncate(path, (1 << 31) + 1)  # a sparse file
    error = try_import(path)
    assert error is not None
    assert "larger than 2 GB" in error.what


def npy(shape: str, kind: str = "<f4") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(12)


MEANS: dict[str, bytes] = {
    "nothing": b"",
    "an array of a terabyte": npy("(3, 300000, 300000)"),
    "an array of objects": npy("(3,)", "|O"),
    "another size": npy("(1,)"),
    "code in the header": b"\x93NUMPY\x01\x00\x1e\x00__import__('os').abort()      \n",
    "a blob with too little": files.bytes_field(7, files.bytes_field(1, b"\x03\x80\x02\x80\x02"))
    + files.floats_field(5, np.ones(3, "f4")),
    "negative colors": files.floats_field(5, np.full(3, -1, "f4")) + files.integer_field(2, 3),
    "no numbers": files.floats_field(5, np.full(3, np.nan, "f4")) + files.integer_field(2, 3),
}


@pytest.mark.parametrize("lie", MEANS)
def test_invalid_mean_files(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "mean"
    path.write_bytes(MEANS[lie])
    with pytest.raises(WeightsError):
        convert.read_mean(path, bgr=True)


@pytest.mark.parametrize(("field", "kind"), [(5, "<f4"), (8, "<f8")])
def test_a_valid_mean_file(field: int, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "mean"
    path.write_bytes(files.bytes_field(field, np.array(files.MEAN_BGR, kind).tobytes()) + files.integer_field(2, 3))
    mean = convert.read_mean(path, bgr=True)
    np.testing.assert_allclose(mean[:, 7, 9], files.MEAN_BGR[::-1], rtol=1e-6)


def test_folders_pipes_and_devices(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere", Path("/dev/zero")):
        assert isinstance(try_import(path), WeightsError)
        with pytest.raises(WeightsError):
            convert.read_mean(path, bgr=False)
