"""Which program a weights file comes from: told by its first bytes, never by its name alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from alexnet_cli.core import caffemodel, cuda_convnet, onnx_weights, state_dict, torch_file
from alexnet_cli.core.foreign import Foreign, Pixels
from alexnet_cli.core.protobuf import Message, mapped
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import Recipe

PUBLISHED: Mapping[str, str] = {
    "9116a64c0fbe4459d18f4bb6b56d647b63920377": "bvlc_alexnet.caffemodel as Berkeley published it",
    "4c8d77deb20ea792f84eb5e6d0a11ca0a8660a46": "bvlc_reference_caffenet.caffemodel as Berkeley published it",
}
"""SHA-1 of files that everybody means by their names."""
HDF5 = b"\x89HDF\r\n\x1a\n"
OTHERS = (  # what is given by mistake: how it begins, what it is, what to do
    (b"\xff\xd8\xff", "a JPEG picture", "alexnet predict classifies pictures"),
    (b"\x89PNG", "a PNG picture", "alexnet predict classifies pictures"),
    (b"\x1f\x8b", "packed by gzip", "unpack it first: gunzip"),
    (b"<", "a web page, or other text", "the download gave a page instead of the file: fetch the file itself"),
)
KNOWN = "import-weights reads .caffemodel, .onnx, .pth, .safetensors and checkpoints of cuda-convnet"


def read(path: Path, recipe: Recipe, pixels: Pixels) -> Foreign:
    """Read a weights file of another program; `recipe` and `pixels` say what a file of bare tensors does not.

    Raises:
        WeightsError: it is missing, damaged, of no kind that is known, or another network.
    """
    if path.is_dir():
        raise WeightsError(f"{path} is a folder", "name the file in it: of a folder of checkpoints, the last one")
    if not path.exists():
        way = "fetch it first: curl -LO URL" if path.parts[0] in ("http:", "https:") else "name a weights file"
        raise WeightsError(f"{path} does not exist", way)
    if not path.is_file():
        raise WeightsError(f"{path} is no plain file", "name a weights file")
    data = mapped(path)
    start = bytes(data[:16])
    if start.startswith((torch_file.ZIP, torch_file.PLAIN)):
        return torch_file.read(path, recipe, pixels)
    if start.startswith(b"\x80\x02"):
        return cuda_convnet.read(path)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < len(data):
        return state_dict.read_safetensors(path, recipe, pixels)
    for known, what, way in OTHERS:
        if start.startswith(known):
            raise WeightsError(f"{path} holds no weights: it is {what}", way)
    if start.isascii() and start[:1] != b"\n" and start.decode().replace("\n", " ").isprintable():
        raise WeightsError(f"{path} holds no weights: it is text", "the weights are in a file of their own beside it")
    if start.startswith(HDF5):
        raise WeightsError(f"{path} is an HDF5 file", "save the network as .caffemodel: snapshot_format: BINARYPROTO")
    if start.startswith(b"\x80"):
        raise WeightsError(f"{path} is a pickle of Python 3, which is not read", KNOWN)
    return onnx_weights.read(path) if _onnx(path, data) else caffemodel.read(path)


def sha1(path: Path) -> str:
    """SHA-1 of a file, hexadecimal: what published files are known by."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha1").hexdigest()


def _onnx(path: Path, data: memoryview) -> bool:
    """Whether a protocol buffer is an ONNX model: field 7 is its graph, which no network of Caffe has as bytes."""
    if path.suffix.lower() in (".onnx", ".caffemodel"):
        return path.suffix.lower() == ".onnx"
    try:
        return any(field.number == 7 and isinstance(field.value, memoryview) for field in Message(data).fields())
    except ValueError as error:
        raise WeightsError(f"{path} is of no kind that is known", KNOWN) from error
