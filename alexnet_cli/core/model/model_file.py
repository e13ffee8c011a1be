"""The model file: a whole network as safetensors, with everything needed to use it. Reads without torch.

Tensors carry the paper's layer names (conv1.weight ... fc8.bias), both towers side by side, tower 1 first, and
`mean`, float32 3 x 256 x 256, is what is subtracted from a picture. The recipe and the class names travel in the
metadata, so that the file alone rebuilds the network.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from alexnet_cli import recipe_io
from alexnet_cli.core.data.classes import ClassName, parse_classes
from alexnet_cli.core.model.architecture import tensor_shapes
from alexnet_cli.errors import RecipeError, WeightsError
from alexnet_cli.recipe import SIDE, Recipe

SCHEMA = "alexnet.model/1"
LARGEST_HEADER = 2**24  # bytes; that of 20,000 classes has one or two million


@dataclass(frozen=True)
class Model:
    """A network at rest. `info` says how it came to be: data, epoch, step, metrics."""

    path: Path
    tensors: Mapping[str, npt.NDArray[np.float32]]
    recipe: Recipe
    classes: tuple[ClassName, ...]
    info: Mapping[str, Any]

    @property
    def exif_rotate(self) -> bool:
        """Whether pictures are turned as their EXIF orientation says, as those of its training set were."""
        return bool(self.info.get("exif_rotate", False))

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """float32 3 x 256 x 256, RGB, 0..255: what is subtracted from a picture."""
        return self.tensors["mean"]


def describe_preprocessing(recipe: Recipe, info: Mapping[str, Any]) -> dict[str, Any]:
    """What becomes of a picture before the mean is subtracted, for other programs to read."""
    return {
        "exif_rotate": bool(info.get("exif_rotate", False)),
        "resize": f"shorter side to {SIDE}, antialiased; center {SIDE}x{SIDE}",
        "crop": recipe.input_size,
        "channels": "RGB",
        "range": [0, 255],
    }


def format_metadata(recipe: Recipe, classes: Sequence[ClassName], info: Mapping[str, Any]) -> dict[str, str]:
    """The strings that a model file carries beside its tensors."""
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
    """Read a model file: first what it says of itself, and its tensors only if they measure what that asks for.

    Raises:
        WeightsError: the file is missing, truncated, not safetensors, or not a network of this toolkit.
    """
    try:
        check_header(path)
        with safe_open(path, framework="numpy") as file:
            recipe, classes, info = parse_metadata(path, file.metadata() or {})
            wanted = tensor_shapes(recipe, len(classes))
            _check_tensors(path, file, wanted, recipe)
            return Model(path, {name: file.get_tensor(name) for name in wanted}, recipe, classes, info)
    except FileNotFoundError as error:
        raise WeightsError(f"{path} does not exist", "name a run, a checkpoint or a .safetensors file") from error
    except (SafetensorError, OSError, ValueError, TypeError, MemoryError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", "the file is damaged; use another checkpoint") from error


def check_header(path: Path) -> None:
    """Raise ValueError if a safetensors file describes itself at a length that takes gigabytes to take apart."""
    if path.is_file():
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > LARGEST_HEADER:
            raise ValueError(f"its header is said to have {size:,} bytes")


def parse_metadata(path: Path, text: Mapping[str, str]) -> tuple[Recipe, tuple[ClassName, ...], dict[str, Any]]:
    """Recipe, classes and origin out of a model file's strings.

    Raises:
        WeightsError: it is another program's file, or what it says is damaged or contradicts itself.
    """
    if text.get("schema") != SCHEMA:
        raise WeightsError(
            f"{path} is not a model of this toolkit (schema {text.get('schema', 'missing')})",
            f"expected {SCHEMA}, as `alexnet train` writes it",
        )
    try:
        recipe = recipe_io.recipe_from_dict(json.loads(text["recipe"]))
        entries = json.loads(text["classes"])
        classes = parse_classes([entry["name"] for entry in entries], [entry.get("wnid") for entry in entries])
        info = dict(json.loads(text.get("info", "{}")))
        check_preprocessing(json.loads(text.get("preprocess", "{}")), recipe, info)
        return recipe, classes, info
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RecipeError) as error:
        raise WeightsError(f"{path} has unreadable metadata: {error}", "the file is damaged or foreign") from error


def check_preprocessing(said: Mapping[str, Any], recipe: Recipe, info: Mapping[str, Any]) -> None:
    """Raise ValueError where a file asks for other pictures than its recipe: one of the two is wrong."""
    if not isinstance(info.get("exif_rotate", False), bool):
        raise ValueError(f"exif_rotate is {info['exif_rotate']!r}")
    for key, value in describe_preprocessing(recipe, info).items():
        if said.get(key, value) != value:
            raise ValueError(f"its preprocessing has {key} {said[key]!r} where its recipe has {value!r}")


def _check_tensors(path: Path, file: Any, wanted: Mapping[str, tuple[int, ...]], recipe: Recipe) -> None:
    """Compare names, types and shapes with what they should be, in the order of the layers."""
    there = set(file.keys())
    for name, shape in wanted.items():
        if name not in there:
            raise WeightsError(f"{path} has no tensor {name}", "the file is damaged or foreign")
        found = file.get_slice(name)
        if found.get_dtype() != "F32":
            raise WeightsError(f"{path}: {name} is {found.get_dtype()}, not float32", "export it anew")
        if tuple(found.get_shape()) != shape:
            theirs, ours = (" x ".join(map(str, sizes)) for sizes in (found.get_shape(), shape))
            raise WeightsError(
                f"{path} does not fit: {name} is {theirs or 'a number'}, but {ours} in recipe {recipe.name} "
                f"with {wanted['fc8.bias'][0]} classes",
                "its weights are those of another network than its recipe and class names",
            )
