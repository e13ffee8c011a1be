"""The model file: a whole network as safetensors, with everything needed to use it. Reads it without torch.

Tensors have the paper's layer names (conv1.weight ... fc8.bias), both towers side by side, tower 1 first. `mean`,
float32 3 x 256 x 256, is the mean image. The metadata hold the recipe and the class names, so that the file alone
rebuilds the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from alexnet_cli import recipe_io
from alexnet_cli.core.data.classes import ClassName, parse_classes
from alexnet_cli.core.files import write_chunks
from alexnet_cli.core.model.architecture import check_layers, layer_specs, tensor_shapes
from alexnet_cli.errors import RecipeError, UsageError, WeightsError, storage_errors
from alexnet_cli.recipe import SIDE, Recipe

SCHEMA = "alexnet.model/1"
SILENT_SIGMOID = -100.0  # its sigmoid is zero; joint normalization would see the 0.5 of a bias of zero
DAMAGED = "the file is damaged, or another program wrote it"
OTHER_VERSION = "another version of alexnet wrote the file, or it is damaged; train or import it again"
MAX_HEADER_BYTES = 2**24  # the header of a model with 20,000 classes has one or two million


@dataclass(frozen=True)
class Model:
    """The content of a model file. `info` tells its origin: data, epoch, step, metrics."""

    path: Path
    tensors: Mapping[str, npt.NDArray[np.float32]]
    recipe: Recipe
    classes: tuple[ClassName, ...]
    info: Mapping[str, Any]

    @property
    def exif_rotate(self) -> bool:
        """Whether images are rotated by their EXIF orientation, as those of the training set were."""
        return bool(self.info.get("exif_rotate", False))

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """The mean image, subtracted from the input: float32 3 x 256 x 256, RGB, 0..255."""
        return self.tensors["mean"]


def describe_preprocessing(recipe: Recipe, info: Mapping[str, Any]) -> dict[str, Any]:
    """Describe for other programs how an image is prepared before the mean is subtracted."""
    return {
        "exif_rotate": bool(info.get("exif_rotate", False)),
        "resize": f"shorter side to {SIDE}, antialiased; center {SIDE}x{SIDE}",
        "crop": recipe.input_size,
        "channels": "RGB",
        "range": [0, 255],
    }


def format_metadata(recipe: Recipe, classes: Sequence[ClassName], info: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a model file, as strings."""
    window = "under the crop" if recipe.mean == "image-at-crop" else "center window"
    steps = describe_preprocessing(recipe, info) | {
        "subtract": f"tensor `mean`, {window}",
        "divide": recipe.input_divisor,
    }
    return {
        "schema": SCHEMA,
        "recipe": json.dumps(asdict(recipe)),
        "classes": json.dumps([c._asdict() for c in classes]),
        "preprocess": json.dumps(steps),
        "info": json.dumps(dict(info)),
    }


def read_model(path: Path) -> Model:
    """Read a model file. Tensors are loaded only if their shapes fit the recipe and the classes in the metadata.

    Raises:
        WeightsError: the file is missing, truncated, not safetensors, or not a network of this toolkit.
    """
    try:
        check_header(path)
        with safe_open(path, framework="numpy") as file:
            recipe, classes, info = parse_metadata(path, file.metadata() or {})
            shapes = tensor_shapes(recipe, len(classes))
            _check_tensors(path, file, shapes, recipe)
            return Model(path, {name: file.get_tensor(name) for name in shapes}, recipe, classes, info)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} does not exist", "name a run, a checkpoint or a .safetensors file") from error
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", "the file is damaged; use another checkpoint") from error


def silence_tower(model: Model, tower: int) -> Model:
    """The network with a tower (from 1) switched off: its maps and units are zero wherever others could see them.

    In its layers 1 to 7 every weight is zero, and every bias the one whose activation is zero; so is every weight that
    reads them.

    Raises:
        UsageError: the network has no such tower, or only one.
    """
    if model.recipe.towers == 1:
        raise UsageError(f"{model.path} has a single tower", "only a network of two towers can do without one")
    check_layers(model.recipe, (), tower)
    tensors, silent = dict(model.tensors), SILENT_SIGMOID if model.recipe.activation == "sigmoid" else 0
    for spec in layer_specs(model.recipe, len(model.classes)):
        weight, bias = tensors[f"{spec.name}.weight"].copy(), tensors[f"{spec.name}.bias"].copy()
        if spec.towers > 1:
            np.split(weight, spec.towers)[tower - 1][:] = 0
            np.split(bias, spec.towers)[tower - 1][:] = silent
        if spec.sees_both:
            np.split(weight, model.recipe.towers, axis=1)[tower - 1][:] = 0
        tensors |= {f"{spec.name}.weight": weight, f"{spec.name}.bias": bias}
    return replace(model, tensors=tensors, info={**model.info, "without_tower": tower})


def name_towers(without_tower: int | None) -> str:
    """Say which towers compute: "whole network", "tower 1 alone" (without tower 2)."""
    return "whole network" if without_tower is None else f"tower {3 - without_tower} alone"


def write_model(model: Model, path: Path) -> None:
    """Write a model file atomically. Raises StorageError."""
    with storage_errors(path, "free some space, or choose another place"):
        # safetensors' own save_file makes a file that only its owner can read.
        write_chunks(path, [save(dict(model.tensors), format_metadata(model.recipe, model.classes, model.info))])


def check_finite(path: Path, *outputs: npt.NDArray[np.floating] | float) -> None:
    """Raise WeightsError if an output of the network in `path` is NaN or infinite."""
    if not all(np.isfinite(values).all() for values in outputs):
        raise WeightsError(f"{path}: the network computes NaN or infinity", "its weights are corrupt")


def check_header(path: Path) -> None:
    """Raise ValueError if the header of a safetensors file is so long that parsing it would take gigabytes."""
    if path.is_file():
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > MAX_HEADER_BYTES:
            raise ValueError(f"its header has {size:,} bytes; at most {MAX_HEADER_BYTES:,} are read")


def parse_metadata(path: Path, text: Mapping[str, str]) -> tuple[Recipe, tuple[ClassName, ...], dict[str, Any]]:
    """Parse the metadata of a model file. Returns the recipe, the classes and `info`.

    Raises:
        WeightsError: another program wrote the file, or its metadata are damaged or contradict each other.
    """
    if text.get("schema") != SCHEMA:
        raise WeightsError(
            f"{path} is not a model of this toolkit (schema {text.get('schema', 'missing')})",
            f"`alexnet train` writes {SCHEMA}",
        )
    try:
        recipe = recipe_io.recipe_from_dict(json.loads(text["recipe"]))
        entries = json.loads(text["classes"])
        classes = parse_classes([entry["name"] for entry in entries], [entry.get("wnid") for entry in entries])
        info = dict(json.loads(text.get("info", "{}")))
        check_preprocessing(json.loads(text.get("preprocess", "{}")), recipe, info)
        return recipe, classes, info
    except RecipeError as error:
        raise WeightsError(f"{path}: {error}", OTHER_VERSION) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(f"{path} has unreadable metadata: {error}", DAMAGED) from error


def check_preprocessing(stated: Mapping[str, Any], recipe: Recipe, info: Mapping[str, Any]) -> None:
    """Raise ValueError if the preprocessing stated in a file differs from that of its recipe."""
    if not isinstance(info.get("exif_rotate", False), bool):
        raise ValueError(f"exif_rotate is {info['exif_rotate']!r}, not true or false")
    for key, value in describe_preprocessing(recipe, info).items():
        if stated.get(key, value) != value:
            raise ValueError(f"{key} is {stated[key]!r} in the preprocessing, but {value!r} in the recipe")


def _check_tensors(path: Path, file: Any, shapes: Mapping[str, tuple[int, ...]], recipe: Recipe) -> None:
    """Raise WeightsError for the first tensor, in layer order, that is missing or has a wrong type or shape."""
    names = set(file.keys())
    for name, expected in shapes.items():
        if name not in names:
            raise WeightsError(f"{path} has no tensor {name}", DAMAGED)
        tensor = file.get_slice(name)
        if tensor.get_dtype() != "F32":
            raise WeightsError(f"{path}: {name} is {tensor.get_dtype()}, not float32", "export the model again")
        shape = tuple(tensor.get_shape())
        if shape != expected:
            actual, needed = (" x ".join(map(str, sizes)) or "a single number" for sizes in (shape, expected))
            raise WeightsError(
                f"{path}: {name} is {actual}, but recipe {recipe.name} with {shapes['fc8.bias'][0]} classes "
                f"needs {needed}",
                "its weights do not belong to its recipe and class names",
            )
