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

from alexnet_cli import recipe as recipes
from alexnet_cli.core.sources import ClassName
from alexnet_cli.errors import RecipeError, WeightsError
from alexnet_cli.recipe import SIDE, Recipe

SCHEMA = "alexnet.model/1"
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
PARAMETERS = tuple(f"{layer}.{part}" for layer in LAYERS for part in ("weight", "bias"))


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


def preprocess(recipe: Recipe, info: Mapping[str, Any]) -> dict[str, Any]:
    """What becomes of a picture before the mean is subtracted, for other programs to read."""
    return {
        "exif_rotate": bool(info.get("exif_rotate", False)),
        "resize": f"shorter side to {SIDE}, antialiased; centre {SIDE}x{SIDE}",
        "crop": recipe.input_size,
        "channels": "RGB",
        "range": [0, 255],
    }


def metadata(recipe: Recipe, classes: Sequence[ClassName], info: Mapping[str, Any]) -> dict[str, str]:
    """The strings that a model file carries beside its tensors."""
    window = "under the crop" if recipe.mean == "image-at-crop" else "centre window"
    steps = preprocess(recipe, info) | {"subtract": f"tensor `mean`, {window}", "divide": recipe.input_divisor}
    return {
        "schema": SCHEMA,
        "recipe": json.dumps(asdict(recipe)),
        "classes": json.dumps([c._asdict() for c in classes]),
        "preprocess": json.dumps(steps),
        "info": json.dumps(dict(info)),
    }


def read(path: Path) -> Model:
    """Read a model file.

    Raises:
        WeightsError: the file is missing, truncated, not safetensors, or not a network of this toolkit.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            text = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError as error:
        raise WeightsError(f"{path} does not exist", "name a run, a checkpoint or a .safetensors file") from error
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise WeightsError(f"{path} cannot be read: {error}", "the file is damaged; use another checkpoint") from error
    if text.get("schema") != SCHEMA:
        raise WeightsError(
            f"{path} is not a model of this toolkit (schema {text.get('schema', 'missing')})",
            f"expected {SCHEMA}, as `alexnet train` writes it",
        )
    try:
        recipe = recipes.from_values(json.loads(text["recipe"]))
        classes = tuple(ClassName(**entry) for entry in json.loads(text["classes"]))
        info = dict(json.loads(text.get("info", "{}")))
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise WeightsError(f"{path} has unreadable metadata: {error}", "the file is damaged or foreign") from error
    _check_tensors(path, tensors, classes)
    return Model(path, tensors, recipe, classes, info)


def _check_tensors(path: Path, tensors: Mapping[str, Any], classes: Sequence[ClassName]) -> None:
    for name in (*PARAMETERS, "mean"):
        if name not in tensors:
            raise WeightsError(f"{path} has no tensor {name}", "the file is damaged or foreign")
        if tensors[name].dtype != np.float32:
            raise WeightsError(f"{path}: {name} is {tensors[name].dtype}, not float32", "export it anew")
    if tensors["mean"].shape != (3, SIDE, SIDE):
        raise WeightsError(f"{path}: mean is {tensors['mean'].shape}, not (3, 256, 256)", "the file is damaged")
    if tensors["fc8.bias"].shape != (len(classes),):
        raise WeightsError(
            f"{path}: {len(classes)} class names for {tensors['fc8.bias'].shape[0]} outputs",
            "the file is damaged",
        )
