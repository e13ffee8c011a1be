"""The metadata of an ONNX file: written by `onnx_graph` and `export`, read by `session`. No torch, no onnx.

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
from alexnet_cli.core.model.model_file import OTHER_VERSION, Model, check_preprocessing, describe_preprocessing
from alexnet_cli.errors import RecipeError, WeightsError
from alexnet_cli.recipe import Recipe

SCHEMA = "alexnet.onnx/1"


@dataclass(frozen=True)
class OnnxMetadata:
    """The metadata of an ONNX file, parsed."""

    classes: tuple[ClassName, ...]
    recipe: Recipe
    sha256: str
    """Checksum of the file that the weights came from, or empty."""
    exif_rotate: bool
    precision: str
    """fp32, fp16 or int8."""
    measured: Mapping[str, Any]
    """How far fp16 or int8 differs from float32; empty in float32."""
    info: Mapping[str, Any]
    """How the weights were made, as a model file's `info`."""


def format_metadata(model: Model, sha256: str) -> dict[str, str]:
    """Return the metadata of a model's ONNX file."""
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
        **format_precision("fp32", {}),
        "Image.BitmapPixelFormat": "Rgb8",
        "Image.NominalPixelRange": "NominalRange_0_255",
        "Image.ColorSpaceGamma": "SRGB",
    }


def format_precision(name: str, measured: Mapping[str, Any]) -> dict[str, str]:
    """Return the part of the metadata that describes the file's precision."""
    return {"alexnet.precision": name, "alexnet.measured": json.dumps(dict(measured))}


def parse_metadata(path: Path, text: Mapping[str, str]) -> OnnxMetadata:
    """Parse the metadata of the ONNX file at `path`.

    Raises:
        WeightsError: another program wrote the file, or its metadata is corrupt.
    """
    if text.get("alexnet.schema") != SCHEMA:
        raise WeightsError(
            f"{path} has no class names and no recipe (alexnet.schema is {text.get('alexnet.schema', 'missing')})",
            "if another tool dropped the metadata, use the file that `alexnet export` wrote; for another program's "
            "network: alexnet import-weights FILE",
        )
    try:
        names, wnids = json.loads(text["names"]), json.loads(text["wnids"])
        # Version 0.1.0 wrote colour and centre.
        recipe = recipe_io.recipe_from_dict(json.loads(text["recipe"].replace("colour_", "color_")))
        steps = json.loads(text["preprocess"].replace("centre", "center"))
        check_preprocessing(steps, recipe, {"exif_rotate": steps["exif_rotate"]})
        return OnnxMetadata(
            classes=parse_classes(names, wnids or [None] * len(names)),
            recipe=recipe,
            sha256=text["alexnet.sha256"],
            exif_rotate=steps["exif_rotate"],
            precision=text["alexnet.precision"],
            measured=dict(json.loads(text["alexnet.measured"])),
            info=dict(json.loads(text["info"])),
        )
    except RecipeError as error:
        raise WeightsError(f"{path}: {error}", OTHER_VERSION) from error
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise WeightsError(
            f"{path} has unreadable metadata: {error}", "the file is corrupt; export it again"
        ) from error
