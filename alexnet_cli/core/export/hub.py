"""Write a network as a folder for the Hugging Face Hub: model.safetensors, config.json and a model card. No torch.

model.safetensors is the model file itself, byte for byte, so that `-w FOLDER` and `alexnet.load` read the folder.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

import alexnet_cli
from alexnet_cli.core.data.classes import make_names_unique
from alexnet_cli.core.files import hash_file, replace_file, write_text
from alexnet_cli.core.model.architecture import layer_specs
from alexnet_cli.core.model.model_file import Model, describe_preprocessing
from alexnet_cli.core.runs.run import MODEL
from alexnet_cli.errors import StorageError, UsageError
from alexnet_cli.recipe import PAPER, compare_recipes, format_toml

CONFIG, CARD = "config.json", "README.md"
FILES = (MODEL, CONFIG, CARD)
LISTED_CLASSES = 20  # names in the card; config.json has all
FEW_CLASSES = 5  # with so few, every answer is in the top 5
MARKDOWN = re.compile(r"[\\`*_\[\]<>&|#~$!]")


@dataclass(frozen=True)
class MeasuredError:
    """Errors of the network on a split of a data set, as shares, with 95 % intervals if the images were counted."""

    protocol: str
    data: str
    split: str
    images: int | None
    top1_error: float
    top5_error: float
    top1_interval: tuple[float, float] | None
    top5_interval: tuple[float, float] | None


def write_hub_folder(model: Model, folder: Path, errors: Sequence[MeasuredError]) -> list[Path]:
    """Write the three files of a folder for the Hub. `model.path` is copied; `errors` go into the card.

    The folder may have hidden files, as the clone of a new repository has. Returns the paths.

    Raises:
        UsageError: the folder is a file, or has other files.
        StorageError: it cannot be written; none of the files is left.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--hub {folder} is a file", "name a folder")
    if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
        raise UsageError(f"--hub {folder}: the folder is not empty", "name a new folder, or delete its files")
    files = [folder / name for name in FILES]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replace_file(folder / MODEL) as path:
            shutil.copyfile(model.path, path)
        write_text(folder / CONFIG, json.dumps(_make_config(model), indent=2) + "\n")
        write_text(folder / CARD, _make_card(model, folder.resolve().name, hash_file(folder / MODEL), errors))
    except OSError as error:
        for file in files:
            file.unlink(missing_ok=True)
        with suppress(OSError):
            folder.rmdir()
        what = f"cannot write {folder}: {error.strerror}"
        raise StorageError(what, "free some space, or choose another folder") from error
    return files


def _make_config(model: Model) -> dict[str, Any]:
    """Return config.json: keys that programs for the Hub know, then those of this toolkit."""
    labels = make_names_unique(model.classes)
    return {
        "architectures": ["AlexNet"],
        "model_type": "alexnet",
        "num_labels": len(labels),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "image_size": model.recipe.input_size,
        "num_channels": 3,
        "torch_dtype": "float32",
        "alexnet_version": alexnet_cli.__version__,
        "wnids": [name.wnid for name in model.classes],
        "recipe": asdict(model.recipe),
        "preprocessing": describe_preprocessing(model.recipe, model.info)
        | {"subtract": "tensor `mean`", "divide": model.recipe.input_divisor},
        "tensors": "names conv1.weight to fc8.bias, PyTorch's layout (outputs first); both towers side by side, "
        "tower 1 first; mean: RGB mean image of 3 x 256 x 256, 0 to 255",
        "towers": model.recipe.towers,
    }


def _make_card(model: Model, name: str, sha256: str, errors: Sequence[MeasuredError]) -> str:
    """Return the model card."""
    recipe, info, labels = model.recipe, model.info, make_names_unique(model.classes)
    specs = layer_specs(recipe, len(labels))
    differences = compare_recipes(recipe, PAPER)
    imported = info.get("imported")
    environment = Environment(
        loader=PackageLoader("alexnet_cli.core.export", "."),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"yaml": _quote_yaml, "text": _escape_markdown, "interval": _format_interval}
    return environment.get_template("model_card.md").render(
        name=name,
        recipe=recipe,
        parameters=sum(spec.parameters for spec in specs),
        shared=[spec.name for spec in specs if spec.sees_both],
        classes=labels[:LISTED_CLASSES],
        class_count=len(labels),
        has_top5=len(labels) > FEW_CLASSES,
        data=info.get("data"),
        run=info.get("run"),
        epoch=info.get("epoch"),
        imported=imported if isinstance(imported, dict) else None,
        differences=[(k, *map(format_toml, pair)) for k, pair in differences.items() if k not in ("name", "seed")],
        errors=errors,
        sha256=sha256,
        version=alexnet_cli.__version__,
    )


def _quote_yaml(value: object) -> str:
    """Return any text as a string of YAML, on one line."""
    return json.dumps(_make_printable(value), ensure_ascii=False)


def _escape_markdown(value: object) -> str:
    """Return any text for a line of Markdown, where it looks as it is."""
    return MARKDOWN.sub(r"\\\g<0>", _make_printable(value))


def _make_printable(value: object) -> str:
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(value))


def _format_interval(interval: tuple[float, float] | None) -> str:
    return "unknown" if interval is None else f"{interval[0]:.1%} to {interval[1]:.1%}"
