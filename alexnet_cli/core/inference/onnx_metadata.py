"""What an ONNX file says about itself: written by `onnx_graph`, read by `session`. No torch, no onnx.

The values are strings, structures are JSON; the Image.* keys are those of the ONNX standard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import alexnet_cli
from alexnet_cli import recipe_io
from alexnet_cli.core.data.classes import ClassName, parse_classes
from alexnet_cli.core.model.model_file import Model, check_preprocessing, describe_preprocessing
from alexnet_cli.errors import RecipeError, WeightsError
from alexnet_cli.recipe import Recipe

SCHEMA = "alexnet.onnx/1"


@dataclass(frozen=True)
class Info:
    """The metadata, read back. `sha256` is the hash of the file the weights came from, or empty.

    `about` says how the weights came to be, as a model file's `info`.
    `precision` is fp32, fp16 or int8, and `measured` says how far the latter two are from float32.
    """

    classes: tuple[ClassName, ...]
    recipe: Recipe
    sha256: str
    metrics: Mapping[str, Any]
    exif_rotate: bool
    precision: str
    measured: Mapping[str, Any]
    about: Mapping[str, Any]


def format_metadata(model: Model, sha256: str) -> dict[str, str]:
    """The metadata of a model's ONNX file."""
    wnids = [c.wnid for c in model.classes]
    steps = describe_preprocessing(model.recipe, model.info) | {"subtract": "in the graph", "divide": "in the graph"}
    return {
        "alexnet.schema": SCHEMA,
        "alexnet.version": alexnet_cli.__version__,
        "alexnet.sha256": sha256,
        "names": json.dumps([c.name for c in model.classes]),
        "wnids": json.dumps(wnids if any(wnids) else []),
        "preprocess": json.dumps(steps),
        "recipe": json.dumps(asdict(model.recipe)),
        "metrics": json.dumps(model.info.get("metrics", {})),
        "info": json.dumps(dict(model.info)),
        **precision("fp32", {}),
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.NominalPixelRange": "NominalRange_0_255",
        "Image.ColorSpaceGamma": "SRGB",
    }


def precision(name: str, measured: Mapping[str, Any]) -> dict[str, str]:
    """What the metadata say of a file's arithmetic; files of the first version had only float32."""
    return {"alexnet.precision": name, "alexnet.measured": json.dumps(dict(measured))}


def read_metadata(path: Path, text: Mapping[str, str]) -> Info:
    """The metadata of the ONNX file at `path`, read back from its strings.

    Raises:
        WeightsError: it is another program's file, or its metadata are damaged.
    """
    if text.get("alexnet.schema") != SCHEMA:
        raise WeightsError(
            f"{path} is not an ONNX file of this toolkit (schema {text.get('alexnet.schema', 'missing')})",
            f"expected {SCHEMA}, as `alexnet export` writes it; another program's network: alexnet import-weights FILE",
        )
    try:
        names, wnids = json.loads(text["names"]), json.loads(text["wnids"])
        classes = parse_classes(names, wnids or [None] * len(names))
        recipe = recipe_io.recipe_from_dict(json.loads(text["recipe"]))
        steps = json.loads(text["preprocess"])
        rotate = steps["exif_rotate"]
        check_preprocessing(steps, recipe, {"exif_rotate": rotate})
        kind, measured = text.get("alexnet.precision", "fp32"), dict(json.loads(text.get("alexnet.measured", "{}")))
        metrics, about = dict(json.loads(text["metrics"])), dict(json.loads(text.get("info", "{}")))
        return Info(classes, recipe, text["alexnet.sha256"], metrics, rotate, kind, measured, about)
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError, RecipeError) as error:
        raise WeightsError(f"{path} has unreadable metadata: {error}", "the file is damaged; export it anew") from error
