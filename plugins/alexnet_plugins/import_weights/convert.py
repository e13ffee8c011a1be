"""Reads a network of another program and writes it as a model file or a run of this toolkit.

The first bytes of a file say which reader it needs. Width and towers follow from the shapes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName, ilsvrc_classes
from alexnet_cli.core.model.architecture import ONE_TOWER, PER_TOWER, tensor_shapes
from alexnet_cli.core.model.model_file import Model, write_model
from alexnet_cli.core.runs.run import MODEL, Run, runs_root
from alexnet_cli.errors import UsageError, WeightsError, storage_errors
from alexnet_cli.recipe import SIDE, Recipe
from alexnet_plugins.import_weights import caffe, onnx_network, torch_network
from alexnet_plugins.import_weights.class_list import read_class_list
from alexnet_plugins.import_weights.imported import (
    Array,
    ChannelOrder,
    ImportedNetwork,
    corrupt,
    format_shape,
    unsupported,
)

PUBLISHED: Mapping[str, str] = {
    "9116a64c0fbe4459d18f4bb6b56d647b63920377": "bvlc_alexnet.caffemodel as Berkeley published it",
    "4c8d77deb20ea792f84eb5e6d0a11ca0a8660a46": "bvlc_reference_caffenet.caffemodel as Berkeley published it",
}
"""SHA-1 of well-known files."""
LARGEST = 2**31  # bytes
ZIP = b"PK\x03\x04"  # PyTorch's archive
TORCH_BEFORE_1_6 = b"\x80\x02\x8a\n\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
NPY = b"\x93NUMPY"
CAFFE = (b"\n", b"\x12", b"\xa2\x06")  # fields 1, 2 and 100 of a protocol buffer: name, layers, layer
ONNX = b"\x08"  # field 1, a number: ir_version
MISTAKES = (  # files given by mistake: how they begin, what they are, what to do
    (b"\xff\xd8\xff", "a JPEG image", "classify images with: alexnet predict"),
    (b"\x89PNG", "a PNG image", "classify images with: alexnet predict"),
    (b"\x1f\x8b", "a gzip archive", "unpack it first: gunzip"),
    (b"version https://", "a pointer of Git LFS", "download the file itself; docs/pretrained.md has its address"),
    (b"<", "a web page", "download the file itself, not the page that links to it"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "save the network as .caffemodel: snapshot_format: BINARYPROTO"),
    (b"\x80", "a pickle, which could run code", "save it as .safetensors, or from PyTorch as .pth"),
)
TORCHVISION_MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
TORCHVISION_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)
ONE_TOWER_2014 = (
    "this is another network of the same name: Krizhevsky's of 2014 (torchvision's) has one tower, 64 filters in conv1 "
    "and no response normalization"
)


def read_network(path: Path, recipe: Recipe, pixels: ChannelOrder) -> ImportedNetwork:
    """Read a weights file of another program. `recipe` and `pixels` describe a network given as bare tensors.

    Raises:
        WeightsError: the file is missing, damaged, of an unknown kind, or another network.
    """
    if path.is_dir():
        raise WeightsError(f"{path} is a folder", "give a file in it, such as the last checkpoint")
    if not path.exists():
        is_address = path.parts[0] in ("http:", "https:")
        raise WeightsError(
            f"{path} does not exist", "download it first: curl -LO URL" if is_address else "check the path"
        )
    start, size = _read_start(path), path.stat().st_size
    if size > LARGEST:
        raise unsupported(path, "it is larger than 2 GB; the whole network of the paper has 244 MB")
    if start.startswith((ZIP, TORCH_BEFORE_1_6)):
        return torch_network.read_torch(path, recipe, pixels)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < size:
        return torch_network.read_safetensors(path, recipe, pixels)
    for beginning, kind, hint in MISTAKES:
        if start.startswith(beginning):
            raise WeightsError(f"{path} has no weights that can be read: it is {kind}", hint)
    if start.isascii() and start[:1] != b"\n" and start.decode().replace("\n", " ").isprintable():
        raise WeightsError(f"{path} has no weights: it is text", "give the file with the weights")
    if start.startswith(ONNX) or path.suffix.lower() == ".onnx":
        return onnx_network.read_network(path)
    if start.startswith(CAFFE) or path.suffix.lower() == ".caffemodel":
        return caffe.read_network(path)
    raise WeightsError(f"{path} is of an unknown kind", "give a .caffemodel, .onnx, .pth or .safetensors file")


def _read_start(path: Path) -> bytes:
    """Return the first 16 bytes of a regular file."""
    if not path.is_file():
        raise WeightsError(f"{path} is not a regular file", "give a file")
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error


def read_mean(path: Path, bgr: bool) -> npt.NDArray[np.float32]:
    """Read the mean that another program subtracted, from a .npy file or Caffe's .binaryproto.

    Returns float32 3 x 256 x 256, RGB, 0..255; a mean color fills every pixel. `bgr`: the file has blue first.

    Raises:
        WeightsError: the file is damaged, or is not a mean color or a mean image of 256 x 256.
    """
    if _read_start(path).startswith(NPY):
        try:
            values: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError, OverflowError) as error:
            raise corrupt(path, error) from error
    else:
        values = caffe.read_blob(path)
    if values.dtype.kind not in "fiu" or values.size not in (3, 3 * SIDE * SIDE):
        what = f"{path} is {format_shape(values.shape)} {values.dtype}"
        raise WeightsError(what, "a mean file has 3x256x256 pixels or 3 colors")
    mean = np.broadcast_to(values.reshape(3, -1).astype(np.float32), (3, SIDE * SIDE)).reshape(3, SIDE, SIDE)
    if not (np.isfinite(mean).all() and mean.min() >= 0 and mean.max() <= 255):
        raise WeightsError(f"{path} has values outside of 0..255", "give the mean of images in 0..255")
    return np.ascontiguousarray(mean[::-1] if bgr else mean)


def build_model(
    network: ImportedNetwork,
    classes: Sequence[ClassName],
    mean: npt.NDArray[np.float32] | None,
    info: Mapping[str, Any],
) -> Model:
    """Return the network as a model of this toolkit, with RGB input minus a mean.

    `mean` is the mean image, float32 3 x 256 x 256 RGB; None means the network's mean color.

    Raises:
        WeightsError: the shapes are not this network's, or a value is NaN or infinite.
    """
    recipe = replace(fit_recipe(network), mean="rgb")
    if mean is None:
        color = TORCHVISION_MEAN if network.pixels == "imagenet" else network.mean
        mean = np.ascontiguousarray(np.broadcast_to(np.array(color, np.float32)[:, None, None], (3, SIDE, SIDE)))
    elif float(np.ptp(mean.reshape(3, -1), axis=1).max()) > 0:
        recipe = replace(recipe, mean="image-at-crop")
    tensors: dict[str, npt.NDArray[np.float32]] = {"mean": mean}
    for name, value in _flatten(network).items():
        if not np.isfinite(value).all():
            raise unsupported(network.path, f"{name} has NaN or infinite values", "give an earlier checkpoint")
        if name == "conv1.weight":
            value = _to_rgb_weights(value, network.pixels)
        tensors[name] = np.ascontiguousarray(value, np.float32)
    return Model(network.path, tensors, recipe, tuple(classes), dict(info))


def _to_rgb_weights(weight: Array, pixels: ChannelOrder) -> Array:
    """Return layer 1's weights for RGB in 0..255 minus the mean. Zero padding means the mean color before and after."""
    if pixels == "bgr":
        return weight[:, ::-1]
    if pixels == "imagenet":
        return np.asarray(weight / np.array(TORCHVISION_STD)[:, None, None], np.float32)
    return weight


def fit_recipe(network: ImportedNetwork) -> Recipe:
    """Return the recipe with the width and the number of towers that the shapes have.

    Raises:
        WeightsError: no network of this toolkit has these shapes; the first layer that differs is named.
    """
    weights = {layer: weight for layer, (weight, _) in network.layers.items()}
    first, second = weights["conv1"].shape, weights["conv2"].shape
    sees_all = second[1] == first[0]
    if sees_all and second[0] == 3 * first[0]:
        what = f"conv1 is {format_shape(first)} and conv2 {format_shape(second)}: {ONE_TOWER_2014}"
        raise unsupported(network.path, what)
    towers, table = (1, ONE_TOWER) if sees_all else (2, PER_TOWER)
    low, high = 1 / 64, 4.0  # the widths that give every layer so far its number of maps
    for layer, full in table.items():
        maps = len(weights[layer]) / towers
        layer_low, layer_high = ((maps - 0.5) / full if maps > 1 else 0.0, (maps + 0.5) / full)
        if maps % 1 or layer_low > high or layer_high < low:
            expected = towers * max(1, round(full * (1.0 if layer == "conv1" else (low + high) / 2)))
            what = f"{layer} has {len(weights[layer]):,} channels, in this network {expected:,}"
            what += "" if layer == "conv1" else " at the width of the layers before"
            what += "" if towers == 2 else "; conv2 sees all maps of conv1, so there is one tower"
            raise unsupported(network.path, what)
        low, high = max(low, layer_low), min(high, layer_high)
    exact_widths = [len(weights[layer]) / towers / full for layer, full in reversed(table.items())]
    width = next((width for width in exact_widths if low <= width <= high), (low + high) / 2)
    recipe = replace(network.recipe, width=width, towers=towers)
    expected_shapes = tensor_shapes(recipe, len(weights["fc8"]))
    for name, value in _flatten(network).items():
        if value.shape != expected_shapes[name]:
            what = f"{name} is {format_shape(value.shape)}, in this network {format_shape(expected_shapes[name])}"
            raise unsupported(network.path, what)
    return recipe


def _flatten(network: ImportedNetwork) -> dict[str, Array]:
    """Return the tensors by name, conv1.weight to fc8.bias."""
    tensors: dict[str, Array] = {}
    for layer, (weight, bias) in network.layers.items():
        tensors |= {f"{layer}.weight": weight, f"{layer}.bias": bias}
    return tensors


def name_outputs(count: int, class_list: Path | None) -> tuple[list[ClassName], str]:
    """Return the names of `count` outputs, and where they come from: the list, ILSVRC's classes, or numbers.

    Raises:
        DataError, WeightsError: see `read_class_list`.
    """
    if class_list is not None:
        return read_class_list(class_list, count), str(class_list)
    if count == 1000:
        return ilsvrc_classes(), "ILSVRC 2012, in the order of wnids"
    return [ClassName(f"class {i}") for i in range(count)], "numbers (names unknown)"


def check_output(name: str) -> None:
    """Check that a network can be written to a file NAME.safetensors, or to a new run NAME.

    Raises:
        UsageError: the file's folder does not exist, the run exists, or the name has slashes or another suffix.
    """
    path, run = Path(name), runs_root() / name
    if path.suffix == ".safetensors":
        if not path.parent.is_dir():
            raise UsageError(f"-o {name}: the folder {path.parent} does not exist", "create it first")
        return
    if path.name != name or path.suffix in (".onnx", ".pth"):
        hint = "give the name of a run, or a file NAME.safetensors; alexnet export writes ONNX"
        raise UsageError(f"-o {name} is not the name of a run", hint)
    if run.exists() or run.is_symlink():
        raise UsageError(f"a run called {name} exists: {run}", "choose another name with -o")


def save_run(model: Model, name: str, about: Mapping[str, Any]) -> Path:
    """Create a run that has the network, and point runs/latest to it. Returns the path of its model file.

    Raises:
        UsageError: see `check_output`.
        StorageError: it cannot be written; nothing is left behind.
    """
    check_output(name)
    root = runs_root()
    with storage_errors(root, "set ALEXNET_RUNS_DIR to another folder"):
        root.mkdir(parents=True, exist_ok=True)
    staged = root / f".{name}.{os.getpid()}.safetensors"  # written before the run exists: the disk may be full
    try:
        write_model(model, staged)
        run = Run.create(name, model.recipe, about)
        with run.storing():
            staged.replace(run.path / MODEL)
    finally:
        staged.unlink(missing_ok=True)
    return run.path / MODEL
