"""Another program's network as a model file of this toolkit: width and towers from the shapes, names, mean, pixels.

No torch.
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

from alexnet_cli.core import ilsvrc
from alexnet_cli.core.architecture import LAYERS, ONE_TOWER, PER_TOWER, tensor_shapes
from alexnet_cli.core.atomic import replacing
from alexnet_cli.core.devkit import read_devkit
from alexnet_cli.core.foreign import Array, Foreign, Labels, Pixels, refused
from alexnet_cli.core.listing import read_file
from alexnet_cli.core.runs import MODEL, Run, runs_root
from alexnet_cli.core.sources import ClassName
from alexnet_cli.core.weights import Model, metadata
from alexnet_cli.errors import DataError, StorageError, UsageError, WeightsError
from alexnet_cli.recipe import SIDE, Recipe

TORCHVISION_MEAN = (255 * 0.485, 255 * 0.456, 255 * 0.406)
TORCHVISION_STD = (255 * 0.229, 255 * 0.224, 255 * 0.225)
OTHER = (
    "another network of the same name: Krizhevsky's of 2014 has one tower, 64 filters in layer 1 and no response "
    "normalisation"
)
MODEL_SUFFIX = Path(MODEL).suffix
ONE_A_LINE = "a text file of a line a class is needed"


def model(
    foreign: Foreign,
    classes: Sequence[ClassName],
    mean: npt.NDArray[np.float32] | None,
    info: Mapping[str, Any],
) -> Model:
    """The network as it is here. `mean` is the mean image, float32 3 x 256 x 256 RGB; None for the format's colour.

    Raises:
        WeightsError: its shapes are not this network's, or a value is no number.
    """
    recipe = fitted(foreign)
    colour = TORCHVISION_MEAN if foreign.pixels == "imagenet" else foreign.mean
    recipe = replace(recipe, mean="rgb")
    if mean is None:
        mean = np.ascontiguousarray(np.broadcast_to(np.array(colour, np.float32)[:, None, None], (3, SIDE, SIDE)))
    elif float(np.ptp(mean.reshape(3, -1), axis=1).max()) > 0:
        recipe = replace(recipe, mean="image" if foreign.format == "cuda-convnet" else "image-at-crop")
    tensors: dict[str, npt.NDArray[np.float32]] = {"mean": mean}
    for layer, (weight, bias) in foreign.layers.items():
        if layer == "conv1":
            weight = _for_rgb(weight, foreign.pixels)
        for name, value in ((f"{layer}.weight", weight), (f"{layer}.bias", bias)):
            if not np.isfinite(value).all():
                raise refused(foreign.path, f"{name} holds values that are no numbers", "it was saved too late")
            tensors[name] = np.ascontiguousarray(value, np.float32)
    return Model(foreign.path, tensors, recipe, tuple(classes), dict(info))


def fitted(foreign: Foreign) -> Recipe:
    """The recipe with width and towers as the shapes have them.

    Raises:
        WeightsError: no network of this toolkit has these shapes; the first layer that differs is named.
    """
    weights = {layer: weight for layer, (weight, _) in foreign.layers.items()}
    first, second = weights["conv1"].shape, weights["conv2"].shape
    whole = second[1] == first[0]
    if whole and second[0] == 3 * first[0]:
        raise refused(
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
            raise refused(foreign.path, alone + what + where)
        low, high = max(low, reach[0]), min(high, reach[1])
    exact = [len(weights[layer]) / towers / full for layer, full in reversed(table.items())]
    width = next((w for w in exact if low <= w <= high), (low + high) / 2)
    recipe = replace(foreign.recipe, width=width, towers=towers)
    _check(foreign, recipe)
    return recipe


def _check(foreign: Foreign, recipe: Recipe) -> None:
    """Raise WeightsError for the first tensor that has another shape than in the network itself."""
    wanted = tensor_shapes(recipe, len(foreign.layers["fc8"][0]))
    for layer in LAYERS:
        for part, found in zip(("weight", "bias"), foreign.layers[layer], strict=True):
            name = f"{layer}.{part}"
            if found.shape != wanted[name]:
                raise refused(foreign.path, f"{name} is {_times(found.shape)}, in this network {_times(wanted[name])}")


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _for_rgb(weight: Array, pixels: Pixels) -> Array:
    """Layer 1's weights for RGB in 0..255 less the mean: zero padding stands for the mean before and after."""
    if pixels == "bgr":
        return weight[:, ::-1]
    if pixels == "imagenet":
        return np.asarray(weight / np.array(TORCHVISION_STD)[:, None, None], np.float32)
    return weight


def classes(count: int, labels: Labels, listed: Path | None) -> tuple[list[ClassName], str]:
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
    if count == 1000 and labels == "wnids":
        return [ClassName(name, wnid) for name, wnid in ilsvrc.sorted_classes()], "ILSVRC 2012, in the order of wnids"
    if count == 1000:
        return [ClassName(f"ILSVRC2012_ID {i + 1}") for i in range(count)], "numbers: ILSVRC's ids, names unknown"
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
    found, words = [], {wnid: name for name, wnid in ilsvrc.sorted_classes()}
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
        with replacing(path) as temporary:
            save_file(dict(made.tensors), temporary, metadata(made.recipe, made.classes, made.info))
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{path} cannot be written: {error}", "free some space, or choose another place with -o"
        ) from error
