"""Files that are damaged, lie, or want to run something: each ends in a message and exit code 3, in nothing else."""

from __future__ import annotations

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import convnet_files
import foreign_files as files
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from alexnet_cli.core import conversion, mean_image, recognition
from alexnet_cli.errors import AlexNetError, WeightsError
from alexnet_cli.recipe import PAPER

Content = bytes | Callable[[], bytes]
MEMORY = 64 << 20  # bytes; the whole files have a megabyte


def attempt(path: Path) -> AlexNetError | None:
    """Import a file; the error, or None if it was in order. Anything else that is raised fails the test."""
    caught: AlexNetError | None = None
    tracemalloc.start()
    try:
        found = recognition.read(path, PAPER, "rgb")
        names, _ = conversion.classes(len(found.layers["fc8"][0]), found.labels, None)
        conversion.model(found, names, None, {})
    except AlexNetError as error:
        caught = error
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY
    assert caught is None or (caught.exit_code == 3 and 0 < len(caught.what) < 2000)
    return caught


def torch_file(new: bool) -> bytes:
    buffer = io.BytesIO()
    named = {f"{layer}.weight": torch.from_numpy(pair[0]) for layer, pair in files.tensors().items()}
    named |= {f"{layer}.bias": torch.from_numpy(pair[1]) for layer, pair in files.tensors().items()}
    torch.save(named, buffer, _use_new_zipfile_serialization=new)
    return buffer.getvalue()


def safetensors_file() -> bytes:
    tensors = files.tensors()
    return save(
        {f"{layer}.weight": tensors[layer][0] for layer in tensors}
        | {f"{layer}.bias": tensors[layer][1] for layer in tensors}
    )


SOUND: dict[str, bytes] = {
    "layer": files.caffemodel(files.tensors(), 2),
    "layers": files.caffemodel(files.tensors(), 1, packed=False),
    "nested layers": files.caffemodel(files.tensors(), 0),
    "onnx": files.onnx_model(files.tensors()),
    "cuda-convnet": convnet_files.checkpoint(convnet_files.layers()),
    "zip": torch_file(True),
    "plain": torch_file(False),
    "safetensors": safetensors_file(),
}
EXAMPLES = settings(
    max_examples=25,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def edited(sound: bytes, near_ends: bool, place: int, change: bytes, how: str) -> bytes:
    """A file cut short, overwritten, lengthened or shortened at one place; structure is mostly near the ends."""
    if near_ends:
        place = place % 600 if place % 2 else len(sound) - 1 - place % 3000
    place %= len(sound)
    if how == "cut":
        return sound[:place]
    if how == "insert":
        return sound[:place] + change + sound[place:]
    if how == "remove":
        return sound[:place] + sound[place + len(change) :]
    return sound[:place] + change + sound[place + len(change) :]


@pytest.mark.parametrize("kind", SOUND)
@EXAMPLES
@given(
    near_ends=st.booleans(),
    place=st.integers(0, 1 << 30),
    change=st.one_of(st.binary(min_size=1, max_size=12), st.just(b"\xff" * 9 + b"\x01"), st.just(bytes(8))),
    how=st.sampled_from(["cut", "overwrite", "overwrite", "insert", "remove"]),
)
def test_damaged_files(kind: str, tmp_path: Path, near_ends: bool, place: int, change: bytes, how: str) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(edited(SOUND[kind], near_ends, place, change, how))
    attempt(path)


@pytest.mark.parametrize("kind", SOUND)
def test_sound_files_are_sound_and_their_halves_are_not(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(SOUND[kind])
    assert attempt(path) is None
    path.write_bytes(SOUND[kind][: len(SOUND[kind]) // 2])
    assert isinstance(attempt(path), WeightsError)


@EXAMPLES
@given(content=st.binary(max_size=300), start=st.sampled_from([b"", b"\x80\x02", b"PK\x03\x04", b"\x12", b"\xa2\x06"]))
def test_noise(tmp_path: Path, content: bytes, start: bytes) -> None:
    path = tmp_path / "file.bin"
    path.write_bytes(start + content)
    assert attempt(path) is not None


# Pickles that want to run something: each would make the file `executed`.

RUN = b"U\x0etouch executed"
ATTACKS: dict[str, bytes] = {
    "reduce": b"cos\nsystem\n(" + RUN + b"tR.",
    "posix": b"cposix\nsystem\n(" + RUN + b"tR.",
    "inst": b"(" + RUN + b"ios\nsystem\n.",
    "obj": b"(cos\nsystem\n" + RUN + b"o.",
    "newobj": b"cos\nsystem\n" + RUN + b"\x85\x81.",
    "eval": b"c__builtin__\neval\n(U\x2a__import__('os').system('touch executed') tR.",
    "builtins": b"cbuiltins\nexec\n(U\x2aimport os; os.system('touch executed')     tR.",
    "getattr": b"c__builtin__\ngetattr\n(cos\nenviron\nU\x05clearttR.",
    "subprocess": b"csubprocess\nPopen\n(](" + RUN + b"etR.",
    "runpy": b"crunpy\nrun_path\n(" + RUN + b"tR.",
    "stack global": b"\x8c\x02os\x8c\x06system\x93" + RUN + b"\x85R.",
    "extension": b"\x82\x01.",
    "a module inside numpy": b"cnumpy.testing._private.utils\nruncommand\n(" + RUN + b"tR.",
    "numpy's own loader": b"cnumpy\nload\n(U\x0b/etc/passwdtR.",
    "a dotted name": b"cnumpy\ncore.multiarray.os.system\n(" + RUN + b"tR.",
    "torch's loader": b"ctorch.storage\n_load_from_bytes\n(" + RUN + b"tR.",
    "build on a function": b"cnumpy.core.multiarray\n_reconstruct\n}U\x0c__defaults__(" + RUN + b"tsb.",
    "build on a class": b"cnumpy\ndtype\nN}U\x05build" + RUN + b"s\x86b.",
    "options may not be called with effect": b"coptions\nsystem\n(" + RUN + b"tR.",
    "an object of ours": b"(ialexnet_cli.core.runs\nRun\n.",
    "an encoding with effect": b"c_codecs\nencode\n(X\x01\x00\x00\x00aX\x03\x00\x00\x00zip" + b"tR.",
    "copy_reg": b"ccopy_reg\n_reconstructor\n(cos\nsystem\nc__builtin__\nobject\nNtR.",
}


def in_zip(content: bytes) -> bytes:
    return zipped({"archive/data.pkl": content, "archive/byteorder": b"little", "archive/version": b"3"})


def zipped(members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


MAGIC = b"\x80\x02\x8a\n" + (0x1950A86A20F9469CFC6C).to_bytes(10, "little") + b"."
WRAPPED: dict[str, Callable[[bytes], bytes]] = {
    "pickle": lambda code: b"\x80\x02" + code,
    "zip": lambda code: in_zip(b"\x80\x02" + code),
    "plain": lambda code: MAGIC + b"\x80\x02M\xe9\x03.\x80\x02}.\x80\x02" + code,
}


@pytest.mark.parametrize("where", WRAPPED)
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_pickle_runs(attack: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "file.pth"
    path.write_bytes(WRAPPED[where](ATTACKS[attack]))
    assert attempt(path) is not None
    assert os.listdir(tmp_path) == ["file.pth"]
    assert os.environ


def test_the_attacks_are_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pickle.loads(b"\x80\x02" + ATTACKS["reduce"])
    assert os.listdir(tmp_path) == ["executed"]


def in_net(array: bytes) -> bytes:
    """A checkpoint whose first weight is this pickled array."""
    net = convnet_files.layers()
    whole = convnet_files.checkpoint(net)
    first = net["conv1a"]["weights"][0]
    sound = files.array_pickled(first.shape, first.dtype.str, first.tobytes())
    assert sound in whole
    return whole.replace(sound, array, 1)


def tensor(storage: bytes, offset: bytes, size: bytes, stride: bytes) -> bytes:
    """A zip with one tensor, its place given as pickled; storage 0 has eight floats."""
    made = b"ctorch._utils\n_rebuild_tensor_v2\n((U\x07storagectorch\nFloatStorage\nU\x010U\x03cpu" + storage
    code = b"\x80\x02}X\x01\x00\x00\x00w" + made + b"tQ" + offset + size + stride + b"\x89NtRs."
    return zipped({"a/data.pkl": code, "a/data/0": bytes(32)})


def safetensors(header: str, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header.encode() + data


def nested(times: int) -> bytes:
    """A dict whose key is a tuple of two of a tuple of two of ...: its hash takes two to that power steps."""
    return b"\x80\x02}(K\x01" + b"2\x86" * times + b"K\x01u."


def lying_zip() -> bytes:
    """Sizes in the directory that the file does not have."""
    content = bytearray(torch_file(True))
    place = content.index(b"PK\x01\x02")
    struct.pack_into("<II", content, place + 20, 0x7FFFFFFF, 0x7FFFFFFF)
    return bytes(content)


HUGE = b"\xff" * 9 + b"\x01"
GLOBAL_ARRAY = files.array_pickled
LIES: dict[str, Content] = {
    "an empty file": b"",
    "a text": b"This is not a network.\n" * 30,
    "a picture": b"\x89PNG\r\n\x1a\n" + bytes(100),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(100),
    # protocol buffers
    "a length without end": b"\xa2\x06" + HUGE + b"x",
    "a number of eleven bytes": b"\xa2\x06" + b"\xff" * 11,
    "a group that does not end": b"\x13" * 50_000,
    "a group that did not begin": b"\x14",
    "wire type 7": b"\x17\x00",
    "field 0": b"\x00\x00" * 4,
    "a million fields": b"\x08\x01" * 1_000_000,
    "fields of four bytes, alternating": (b"\x0d" + bytes(4) + b"\x15" + bytes(4)) * 600_000,
    "a layer of nothing": files.inside(100, b"") * 5,
    "a thousand layers": files.inside(100, files.inside(1, "x") + files.inside(2, "ReLU")) * 1000,
    "a blob of other dimensions": lambda: files.caffemodel(files.tensors()).replace(
        files.varint(576) + b"\x2a", files.varint(577) + b"\x2a"
    ),
    "dimensions whose product overflows": lambda: caffe_with(files.inside(7, files.inside(1, HUGE * 8))),
    "dimensions without end": lambda: caffe_with(files.inside(7, files.inside(1, b"\x01" * 100_000))),
    "a negative dimension": lambda: caffe_with(files.inside(7, files.inside(1, HUGE + b"\x01"))),
    "no dimensions": lambda: caffe_with(files.inside(7, b"")),
    "a dimension of 0": lambda: caffe_with(files.inside(7, files.inside(1, b"\x00\x01\x01\x01"))),
    "seven bytes of floats": lambda: caffe_with(files.inside(5, b"seven b")),
    "a size of normalisation that is even": lambda: files.caffemodel(files.tensors()).replace(
        files.integer(1, 5) + files.single(2, 1e-4), files.integer(1, 4) + files.single(2, 1e-4)
    ),
    "alpha that is no number": lambda: files.caffemodel(files.tensors()).replace(
        files.single(2, 1e-4), files.single(2, float("nan"))
    ),
    # ONNX
    "weights in another file": lambda: external("/etc/passwd"),
    "weights in a file above": lambda: external("../../secret"),
    "a graph of nothing": files.integer(1, 8) + files.inside(7, b""),
    "an operator from elsewhere": files.integer(1, 8) + files.inside(7, files.node("RunShell", ["x"], "y")),
    "nodes that feed themselves": files.integer(1, 8) + files.inside(7, files.node("Relu", ["y"], "y") * 3),
    "a tensor of strings": lambda: files.onnx_model(files.tensors()).replace(b"\x10\x01", b"\x10\x08"),
    # pickles
    "an array with too few bytes": lambda: in_net(GLOBAL_ARRAY((363, 3), "<f4", bytes(10))),
    "an array of a terabyte": lambda: in_net(GLOBAL_ARRAY((1 << 20, 1 << 20), "<f4", bytes(16))),
    "an array whose size overflows": lambda: in_net(GLOBAL_ARRAY((1 << 30,) * 4, "<f4", bytes(16))),
    "an array of negative size": lambda: in_net(GLOBAL_ARRAY((-1, -4), "<f4", bytes(16))),
    "an array of objects": lambda: in_net(GLOBAL_ARRAY((363, 3), "|O8", bytes(363 * 24))),
    "an array of text": lambda: in_net(GLOBAL_ARRAY((2,), "|S8", bytes(16))),
    "an array of a record": lambda: in_net(GLOBAL_ARRAY((2,), "<V8", bytes(16))),
    "integers for weights": lambda: in_net(GLOBAL_ARRAY((363, 3), "<i4", bytes(363 * 12))),
    "a key that takes for ever": nested(60),
    "a memo without end": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a string of two gigabytes": b"\x80\x02T\xff\xff\xff\x7fshort",
    "a string of negative length": b"\x80\x02T\xff\xff\xff\xffshort.",
    "a number of two gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a frame of an exabyte": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "bytes of an exabyte": b"\x80\x02\x96\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "a list inside a list inside a list": b"\x80\x02" + b"](" * 50_000 + b"e" * 50_000 + b".",
    "a stack that is empty": b"\x80\x02000000.",
    "a mark that is missing": b"\x80\x02t.",
    "a protocol of the future": b"\x80\x63N.",
    "no layers": b"\x80\x02}.",
    "layers that feed each other": lambda: files.pickled({"model_state": {"layers": looped()}}),
    "a digit string without end": b"\x80\x02I" + b"9" * 100_000 + b"\n.",
    # PyTorch
    "a zip bomb": lambda: zipped({"a/data.pkl": bytes(1 << 26)}, zipfile.ZIP_DEFLATED),
    "a bomb of lzma": lambda: zipped({"a/data.pkl": bytes(1 << 24)}, zipfile.ZIP_LZMA),
    "a zip of nothing": zipped({}) + b"PK\x03\x04",
    "a zip without a pickle": zipped({"a/b": b"c"}),
    "a zip of very many entries": b"PK\x03\x04" + b"PK\x01\x02" * 30_000,
    "a zip that lies about sizes": lying_zip,
    "big-endian numbers": lambda: zipped({"a/data.pkl": b"\x80\x02}.", "a/byteorder": b"big"}),
    "a tensor beyond its storage": tensor(b"K\x08", b"K\x00", b"K\x09\x85", b"K\x01\x85"),
    "a tensor that begins beyond it": tensor(b"K\x08", b"J\xff\xff\xff\x7f", b"K\x01\x85", b"K\x01\x85"),
    "a tensor before it": tensor(b"K\x08", b"J\xff\xff\xff\xff", b"K\x01\x85", b"K\x01\x85"),
    "a tensor that walks backwards": tensor(b"K\x08", b"K\x07", b"K\x02\x85", b"J\xff\xff\xff\xff\x85"),
    "one number a billion times": tensor(b"K\x08", b"K\x00", b"J\x00\x00\x00\x40\x85", b"K\x00\x85"),
    "a size of a thousand dimensions": tensor(b"K\x08", b"K\x00", b"(" + b"K\x01" * 1000 + b"t", b"K\x01\x85"),
    "a storage that is not there": lambda: tensor(b"K\x08", b"K\x00", b"K\x01\x85", b"K\x01\x85").replace(
        b"U\x010", b"U\x019"
    ),
    "a plain file of storages without end": MAGIC
    + b"\x80\x02M\xe9\x03.\x80\x02}.\x80\x02}."
    + b"\x80\x02]("
    + b"U\x010" * 50_000
    + b"e.",
    # safetensors
    "a header of an exabyte": safetensors("{}", length=1 << 60),
    "a header that is longer than the file": safetensors("{" + " " * 50, length=5000),
    "a header that is no json": safetensors("{not json"),
    "a header inside a header": safetensors("{" * 100_000),
    "offsets beyond the end": safetensors(
        '{"a.weight":{"dtype":"F32","shape":[1000,1000],"data_offsets":[0,4000000]}}'
    ),
    "offsets that overlap": safetensors(
        '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        bytes(4),
    ),
    "a shape that overflows": safetensors(
        '{"a":{"dtype":"F32","shape":[9223372036854775807,9223372036854775807],"data_offsets":[0,4]}}', bytes(4)
    ),
    "no tensors": safetensors("{}"),
}


def caffe_with(blob: bytes) -> bytes:
    """A .caffemodel whose first weight has this in its blob, after the rest."""
    tensors = files.tensors()
    sound = files.blob(tensors["conv1"][0], legacy=False)
    body = files.inside(1, "conv1") + files.inside(2, "Convolution") + files.inside(7, sound + blob)
    body += files.inside(7, files.blob(tensors["conv1"][1], legacy=False))
    out = files.inside(100, body)
    for layer in list(tensors)[1:]:
        kind = "Convolution" if layer.startswith("conv") else "InnerProduct"
        blobs = b"".join(files.inside(7, files.blob(value, legacy=False)) for value in tensors[layer])
        out += files.inside(100, files.inside(1, layer) + files.inside(2, kind) + blobs)
    return out


def external(location: str) -> bytes:
    """The model zoo's file with the bias of layer 8 said to lie elsewhere."""
    bias = files.tensors()["fc8"][1]
    sound = files.onnx_tensor("fc8_b_0", bias)
    away = files.integer(1, 10) + files.integer(2, 1) + files.inside(8, "fc8_b_0") + files.integer(14, 1)
    away += files.inside(13, files.inside(1, "location") + files.inside(2, location))
    graph = files.onnx_model(files.tensors())
    assert sound in graph
    # Of the same length, so that the lengths around it stay true: an unknown field fills it up.
    return graph.replace(sound, away + files.inside(99, bytes(len(sound) - len(away) - 3)))


def looped() -> dict[str, dict[str, object]]:
    return {
        "a": {"name": "a", "type": "conv", "inputs": ["b"]},
        "b": {"name": "b", "type": "neuron", "inputs": ["c"]},
        "c": {"name": "c", "type": "pool", "inputs": ["b"]},
    }


@pytest.mark.parametrize("lie", LIES)
def test_lies(lie: str, tmp_path: Path) -> None:
    content = LIES[lie]
    path = tmp_path / "file.bin"
    path.write_bytes(content() if callable(content) else content)
    assert isinstance(attempt(path), WeightsError)


def npy(shape: str, kind: str = "<f4") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + bytes(12)


MEANS: dict[str, bytes] = {
    "nothing": b"",
    "an array of a terabyte": npy("(3, 300000, 300000)"),
    "an array of objects": npy("(3,)", "|O"),
    "another size": npy("(1,)"),
    "no header": b"\x93NUMPY\x01\x00\xff\xff",
    "code in the header": b"\x93NUMPY\x01\x00\x1e\x00__import__('os').abort()      \n",
    "a blob with too little": files.inside(7, files.inside(1, b"\x03\x80\x02\x80\x02"))
    + files.floats(5, np.ones(3, "f4")),
    "negative colours": files.floats(5, np.full(3, -1, "f4")) + files.integer(2, 3),
    "no numbers": files.floats(5, np.full(3, np.nan, "f4")) + files.integer(2, 3),
    "a pickle that runs": b"\x80\x02" + ATTACKS["reduce"],
    "a pickle without a mean": files.pickled({"label_names": []}),
}


@pytest.mark.parametrize("lie", MEANS)
def test_mean_files(lie: str, tmp_path: Path) -> None:
    path = tmp_path / "mean"
    path.write_bytes(MEANS[lie])
    with pytest.raises(WeightsError):
        mean_image.read(path, bgr=True)


def test_a_mean_file_that_is_sound(tmp_path: Path) -> None:
    path = tmp_path / "mean"
    path.write_bytes(files.floats(5, np.array(files.MEAN_BGR, np.float32)) + files.integer(2, 3))
    found: npt.NDArray[np.float32] = mean_image.read(path, bgr=True)
    np.testing.assert_allclose(found[:, 7, 9], files.MEAN_BGR[::-1], rtol=1e-6)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", tmp_path / "nowhere", Path("/dev/zero")):
        assert isinstance(attempt(path), WeightsError)
        with pytest.raises(WeightsError):
            mean_image.read(path, bgr=False)
