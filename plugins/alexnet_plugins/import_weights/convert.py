"""Read another program's network, and make a model file of this toolkit from it.

A file's first bytes say which reader it needs, the shapes give width and towers; then come classes, mean and pixels.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName, ilsvrc_classes
from alexnet_cli.core.data.devkit import read_devkit
from alexnet_cli.core.files import read_file, replace_file
from alexnet_cli.core.model.architecture import LAYERS, ONE_TOWER, PER_TOWER, tensor_shapes
from alexnet_cli.core.model.model_file import Model, format_metadata
from alexnet_cli.core.runs.run import MODEL, Run, runs_root
from alexnet_cli.errors import DataError, StorageError, UsageError, WeightsError
from alexnet_cli.recipe import SIDE, Recipe
from alexnet_plugins.import_weights import caffe, onnx_network, torch_network
from alexnet_plugins.import_weights.imported import Array, ChannelOrder, ImportedNetwork, corrupt, unsupported

PUBLISHED: Mapping[str, str] = {
    "9116a64c0fbe4459d18f4bb6b56d647b63920377": "bvlc_alexnet.caffemodel as Berkeley published it",
    "4c8d77deb20ea792f84eb5e6d0a11ca0a8660a46": "bvlc_reference_caffenet.caffemodel as Berkeley published it",
}
"""SHA-1 of files that everybody means by their names."""
LARGEST = 2**31  # bytes
ZIP = b"PK\x03\x04"  # PyTorch's archive
PLAIN = b"\x80\x02\x8a\n\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # PyTorch's file of before 1.6
NPY = b"\x93NUMPY"
CAFFE = (b"\n", b"\x12", b"\xa2\x06")  # fields 1, 2 and 100 of a protocol buffer: name, layers, layer
ONNX = b"\x08"  # field 1, a number: ir_version
OTHERS = (  # what is given by mistake: how it begins, what it is, what to do
    (b"\xff\xd8\xff", "a JPEG picture", "alexnet predict classifies pictures"),
    (b"\x89PNG", "a PNG picture", "alexnet predict classifies pictures"),
    (b"\x1f\x8b", "packed by gzip", "unpack it first: gunzip"),
    (b"<", "a web page, or other text", "the download gave a page instead of the file: fetch the file itself"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", "save the network as .caffemodel: snapshot_format: BINARYPROTO"),
    (b"\x80", "a pickle, which could run code", "save it as .safetensors, or from PyTorch as .pth"),
)
KNOWN = "import-weights reads .caffemodel, .onnx, .pth and .safetensors"
TORCHVISION_MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
TORCHVISION_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)
OTHER = (
    "another network of the same name: Krizhevsky's of 2014 has one tower, 64 filters in layer 1 and no response "
    "normalization"
)
MODEL_SUFFIX = Path(MODEL).suffix
ONE_A_LINE = "a text file of a line a class is needed"


def read_network(path: Path, recipe: Recipe, pixels: ChannelOrder) -> ImportedNetwork:
    """Read a weights file of another program; `recipe` and `pixels` say what a file of bare tensors does not.

    Raises:
        WeightsError: it is missing, damaged, of no kind that is known, or another network.
    """
    if path.is_dir():
        raise WeightsError(f"{path} is a folder", "name the file in it: of a folder of checkpoints, the last one")
    if not path.exists():
        way = "fetch it first: curl -LO URL" if path.parts[0] in ("http:", "https:") else "name a weights file"
        raise WeightsError(f"{path} does not exist", way)
    start = _first_bytes(path)
    if path.stat().st_size > LARGEST:
        raise unsupported(path, "it is larger than 2 GB, and the whole network of the paper has 244 MB")
    if start.startswith((ZIP, PLAIN)):
        return torch_network.read_torch(path, recipe, pixels)
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size:
        return torch_network.read_safetensors(path, recipe, pixels)
    for known, what, way in OTHERS:
        if start.startswith(known):
            raise WeightsError(f"{path} holds no weights that can be read: it is {what}", way)
    if start.isascii() and start[:1] != b"\n" and start.decode().replace("\n", " ").isprintable():
        raise WeightsError(f"{path} holds no weights: it is text", "the weights are in a file of their own beside it")
    if start.startswith(ONNX) or path.suffix.lower() == ".onnx":
        return onnx_network.read(path)
    if start.startswith(CAFFE) or path.suffix.lower() == ".caffemodel":
        return caffe.read(path)
    raise WeightsError(f"{path} is of no kind that is known", KNOWN)


def _first_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise WeightsError(f"{path} is no plain file", "name a file")
    try:
        with path.open("rb") as file:
            return file.read(16)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read: {error.strerror}", "check its permissions") from error


def read_mean(path: Path, bgr: bool) -> npt.NDArray[np.float32]:
    """What another program subtracted from pictures, from a .npy or Caffe's .binaryproto.

    Float32 3 x 256 x 256, RGB, 0..255; `bgr` says that the file has blue first. A color fills every pixel.

    Raises:
        WeightsError: it is damaged, or no mean of pictures of 256 x 256.
    """
    if _first_bytes(path).startswith(NPY):
        try:
            found: Array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, OSError, EOFError, OverflowError) as error:
            raise corrupt(path, error) from error
    else:
        found = caffe.read_blob(path)
    if found.dtype.kind not in "fiu" or found.size not in (3, 3 * SIDE * SIDE):
        shape = "x".join(map(str, found.shape))
        raise WeightsError(f"{path} is {shape} {found.dtype}, no mean of 3x256x256 pixels or 3 colors", "try another")
    mean = np.broadcast_to(found.reshape(3, -1).astype(np.float32), (3, SIDE * SIDE)).reshape(3, SIDE, SIDE)
    if not (np.isfinite(mean).all() and mean.min() >= 0 and mean.max() <= 255):
        raise WeightsError(f"{path} has values outside 0..255", "the mean of pictures in 0..255 is needed")
    return np.ascontiguousarray(mean[::-1] if bgr else mean)


def model(
    foreign: ImportedNetwork,
    classes: Sequence[ClassName],
    mean: npt.NDArray[np.float32] | None,
    info: Mapping[str, Any],
) -> Model:
    """The network as it is here. `mean` is the mean image, float32 3 x 256 x 256 RGB; None for the format's color.

    Raises:
        WeightsError: its shapes are not this network's, or a value is no number.
    """
    recipe = fitted(foreign)
    color = TORCHVISION_MEAN if foreign.pixels == "imagenet" else foreign.mean
    recipe = replace(recipe, mean="rgb")
    if mean is None:
        mean = np.ascontiguousarray(np.broadcast_to(np.array(color, np.float32)[:, None, None], (3, SIDE, SIDE)))
    elif float(np.ptp(mean.reshape(3, -1), axis=1).max()) > 0:
        recipe = replace(recipe, mean="image-at-crop")
    tensors: dict[str, npt.NDArray[np.float32]] = {"mean": mean}
    for layer, (weight, bias) in foreign.layers.items():
        if layer == "conv1":
            weight = _for_rgb(weight, foreign.pixels)
        for name, value in ((f"{layer}.weight", weight), (f"{layer}.bias", bias)):
            if not np.isfinite(value).all():
                raise unsupported(foreign.path, f"{name} holds values that are no numbers", "it was saved too late")
            tensors[name] = np.ascontiguousarray(value, np.float32)
    return Model(foreign.path, tensors, recipe, tuple(classes), dict(info))


def fitted(foreign: ImportedNetwork) -> Recipe:
    """The recipe with width and towers as the shapes have them.

    Raises:
        WeightsError: no network of this toolkit has these shapes; the first layer that differs is named.
    """
    weights = {layer: weight for layer, (weight, _) in foreign.layers.items()}
    first, second = weights["conv1"].shape, weights["conv2"].shape
    whole = second[1] == first[0]
    if whole and second[0] == 3 * first[0]:
        raise unsupported(
            foreign.path, f"conv1 is {_times(first)} and conv2 {_times(second)}: {OTHER}", "it cannot fill two towers"
        )
    towers, table = (1, ONE_TOWER) if whole else (2, PER_TOWER)
    low, high = 1 / 64, 4.0
    for layer, full in table.items():
        own = len(weights[layer]) / towers
        reach = ((own - 0.5) / full if own > 1 else 0.0, (own + 0.5) / full)
        if own % 1 or reach[0] > high or reach[1] < low:
            near = 1.0 if layer == "conv1" else (low + high) / 2
            what = (
                f"{layer} has {len(weights[layer]):,} channels, {towers * max(1, round(full * near)):,} in this network"
            )
            where = "" if layer == "conv1" else " at the width of the layers before"
            alone = "" if towers == 2 else "conv2 sees every map of conv1, so that there are no towers; "
            raise unsupported(foreign.path, alone + what + where)
        low, high = max(low, reach[0]), min(high, reach[1])
    exact = [len(weights[layer]) / towers / full for layer, full in reversed(table.items())]
    width = next((w for w in exact if low <= w <= high), (low + high) / 2)
    recipe = replace(foreign.recipe, width=width, towers=towers)
    _check(foreign, recipe)
    return recipe


def _check(foreign: ImportedNetwork, recipe: Recipe) -> None:
    """Raise WeightsError for the first tensor that has another shape than in the network itself."""
    wanted = tensor_shapes(recipe, len(foreign.layers["fc8"][0]))
    for layer in LAYERS:
        for part, found in zip(("weight", "bias"), foreign.layers[layer], strict=True):
            name = f"{layer}.{part}"
            if found.shape != wanted[name]:
                raise unsupported(
                    foreign.path, f"{name} is {_times(found.shape)}, in this network {_times(wanted[name])}"
                )


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _for_rgb(weight: Array, pixels: ChannelOrder) -> Array:
    """Layer 1's weights for RGB in 0..255 less the mean: zero padding stands for the mean before and after."""
    if pixels == "bgr":
        return weight[:, ::-1]
    if pixels == "imagenet":
        return np.asarray(weight / np.array(TORCHVISION_STD)[:, None, None], np.float32)
    return weight


def name_outputs(count: int, listed: Path | None) -> tuple[list[ClassName], str]:
    """The names of `count` outputs, and where they come from: a list, ILSVRC's own, or numbers if nobody knows.

    `listed` is a text file of a line a class (`n01440764 tench`, or either alone), or ILSVRC's development kit for
    outputs in the order of its ids.

    Raises:
        WeightsError: the list has another number of classes.
    """
    if listed is not None:
        found = _listed(listed)
        if len(found) != count:
            raise WeightsError(f"{listed} names {len(found):,} classes, the network has {count:,}", "give its own list")
        return found, str(listed)
    if count == 1000:
        return ilsvrc_classes(), "ILSVRC 2012, in the order of wnids"
    return [ClassName(f"class {i}") for i in range(count)], "numbers: names unknown"


def _listed(path: Path) -> list[ClassName]:
    try:
        if path.is_dir() or path.suffix in (".gz", ".tgz", ".tar"):
            kit = read_devkit(path)
            return [ClassName(kit.words[kit.wnids[i]], kit.wnids[i]) for i in sorted(kit.wnids)]
        text = read_file(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", ONE_A_LINE) from error
    except DataError as error:
        raise WeightsError(f"{path} cannot be read: {error.what}", error.hint or ONE_A_LINE) from error
    found, words = [], {wnid: name for name, wnid in ilsvrc_classes()}
    for line in text.strip().splitlines():
        first, _, rest = line.strip().partition(" ")
        known = len(first) == 9 and first[0] == "n" and first[1:].isdigit()
        found.append(ClassName(rest.strip() or words.get(first, first), first) if known else ClassName(line.strip()))
    twice = [name for name, times in Counter(found).items() if times > 1]
    if twice:
        raise WeightsError(f"{path} names {twice[0].name} twice", "every class needs a line of its own")
    return found


def check_place(name: str) -> None:
    """Whether a network can go there: a file NAME.safetensors, or a new run.

    Raises:
        UsageError: there is no folder for the file, or there is such a run already, or it is no plain name.
    """
    path, run = Path(name), runs_root() / name
    if path.suffix == MODEL_SUFFIX:
        if not path.parent.is_dir():
            raise UsageError(f"-o {name}: there is no folder {path.parent}", "make it first")
        return
    if path.name != name or path.suffix in (".onnx", ".pth"):
        hint = f"a name for the run, or a file that ends in {MODEL_SUFFIX}; alexnet export makes ONNX of it"
        raise UsageError(f"-o {name} is not a plain name", hint)
    if run.exists() or run.is_symlink():
        raise UsageError(f"a run called {name} is there already: {run}", "choose another name with -o")


def save(made: Model, name: str, about: Mapping[str, Any]) -> Path:
    """Make a run of that name that holds the network, and point runs/latest to it. Returns its model file.

    Raises:
        UsageError: see `check_place`.
        StorageError: it cannot be written; nothing is left behind.
    """
    check_place(name)
    root = runs_root()
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {root}: {error.strerror}", "set ALEXNET_RUNS_DIR to another folder") from error
    staged = root / f".{name}.{os.getpid()}.safetensors"
    try:
        write(made, staged)
        run = Run.create(name, made.recipe, about)
        with run.storing():
            staged.replace(run.path / MODEL)
    finally:
        staged.unlink(missing_ok=True)
    return run.path / MODEL


def write(made: Model, path: Path) -> None:
    """Write a model file whole or not at all. Raises StorageError."""
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    try:
        with replace_file(path) as temporary:
            save_file(dict(made.tensors), temporary, format_metadata(made.recipe, made.classes, made.info))
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path} cannot be written: {error}", "free some space, or choose another place with -o"
        ) from error
