"""`alexnet import-weights`: pretrained two-tower networks of other programs, ready for every other command."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alexnet_cli import recipe as recipes
from alexnet_cli import recipe_io
from alexnet_cli.console import Reporter
from alexnet_cli.errors import UsageError
from alexnet_cli.options import JsonFlag, QuietFlag

if TYPE_CHECKING:
    from alexnet_plugins.import_weights.imported import ImportedNetwork

BARE = ("PyTorch", "safetensors")  # formats that hold tensors and nothing about the network


def import_weights(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="File to import: .caffemodel, .onnx, .pth or .safetensors"),
    ],
    output: Annotated[
        str | None,
        typer.Option(
            "-o", "--output", help="Name of the new run, or a file NAME.safetensors [default: the name of FILE]"
        ),
    ] = None,
    order: Annotated[
        Literal["relu-norm-pool", "relu-pool-norm", "norm-pool-relu"] | None,
        typer.Option(
            help="Order of operations after convolutions 1 and 2, if the file lacks it; CaffeNet has relu-pool-norm"
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="Recipe of the network, for files that hold only tensors (.pth, .safetensors)")
    ] = None,
    pixels: Annotated[
        Literal["rgb", "bgr", "imagenet"] | None,
        typer.Option(
            help="Input of the network, for files that hold only tensors; imagenet is torchvision's normalization"
        ),
    ] = None,
    mean: Annotated[Path | None, typer.Option(help="Caffe's mean file: .npy or .binaryproto")] = None,
    classes: Annotated[
        Path | None,
        typer.Option(help="Class names: a text file with lines such as `n02123045 tabby`, or ILSVRC's development kit"),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Import pretrained weights (Caffe, ONNX, PyTorch).

    Makes a run from the weights of a two-tower AlexNet.
    """
    from alexnet_cli.core.files import hash_file
    from alexnet_plugins.import_weights import convert

    reporter = Reporter("import-weights", json=json, quiet=quiet)
    name = output or re.sub(r"[^\w.-]", "_", file.stem).strip(".") or "imported"
    if file.is_file():
        convert.check_place(name)  # before a large file is read
    found = convert.read_network(file, recipe_io.load_recipe(recipe or "paper"), pixels or "rgb")
    if found.format not in BARE and (recipe or pixels):
        raise UsageError(f"{file} says itself how its network is built", "leave --recipe and --pixels out")
    found = _ordered(found, order)
    sha1 = hash_file(file, "sha1")  # as published files are known
    known = convert.PUBLISHED.get(sha1)
    reporter.line("file", f"{file} · {found.format} · {known or f'sha1 {sha1}, no published file that is known here'}")
    names, origin = convert.name_outputs(len(found.layers["fc8"][0]), classes)
    image = convert.read_mean(mean, bgr=found.pixels == "bgr") if mean else None
    about = {"file": file.name, "format": found.format, "sha1": sha1, "published": known, "classes": origin}
    made = convert.model(found, names, image, {"imported": about})
    parameters = sum(tensor.size for name, tensor in made.tensors.items() if name != "mean")
    built = made.recipe
    reporter.line(
        "model", f"AlexNet · {built.towers} tower{'s' if built.towers > 1 else ''} · {parameters:,} parameters"
    )
    warnings, notes = _assumed(found, order, origin), _notes(found, mean, origin, bool(known or classes))
    reporter.line("reads", _described(found, built, origin))
    for note in notes:
        reporter.line("note", note)
    for warning in warnings:
        reporter.warn(warning)
    if name.endswith(".safetensors"):
        path = Path(name)
        convert.write(made, path)
        use = str(path)
    else:
        path = convert.save(made, name, {"status": "finished", "imported": about})
        use = name
    reporter.line(
        "saved", f"{path} · {path.stat().st_size / 1e6:,.1f} MB   next: alexnet predict IMAGE -w {shlex.quote(use)}"
    )
    reporter.result({
        "path": str(path), "use": use, "format": found.format, "sha1": sha1, "published": known,
        "parameters": parameters, "classes": len(names), "class_names": origin, "towers": built.towers,
        "width": built.width, "recipe": built.name, "orders": [built.stage1_order, built.stage2_order],
        "input_size": built.input_size, "notes": warnings + notes,
    })  # fmt: skip


def _ordered(
    found: ImportedNetwork, order: Literal["relu-norm-pool", "relu-pool-norm", "norm-pool-relu"] | None
) -> ImportedNetwork:
    """The network with the order that was typed, where the file does not show one."""
    recipe = found.recipe
    if order is None or (recipe.stage1_order == order and recipe.stage2_order == order):
        return found
    if found.order_known:
        what = f"--order {order}: the file itself shows {recipe.stage1_order} and {recipe.stage2_order}"
        raise UsageError(what, "leave --order out")
    return replace(found, recipe=replace(recipe, stage1_order=order, stage2_order=order))


def _described(found: ImportedNetwork, built: recipes.Recipe, origin: str) -> str:
    """How the network sees pictures."""
    size = f"{built.input_size} pixels" + ("" if built.edge_padding else " unpadded")
    scope = "both towers" if built.lrn_joint and built.towers == 2 else "its tower"
    norm = "none" if built.lrn == "none" else f"k = {built.lrn_k:g}, across {scope}"
    subtracted = "mean color" if built.mean == "rgb" else "mean image"
    return f"{found.pixels} · {size} · less the {subtracted} · {built.stage1_order} · norm {norm} · classes: {origin}"


def _assumed(found: ImportedNetwork, order: str | None, origin: str) -> list[str]:
    """What the file does not tell, and answers depend on."""
    warnings = []
    if found.format in BARE:
        warnings.append(
            f"bare tensors: taken for a network of recipe {found.recipe.name}, trained on pixels as --pixels "
            f"{found.pixels}; another meaning gives wrong answers"
        )
    elif not found.order_known and order is None:
        warnings.append(f"the file does not show what follows layers 1 and 2: {found.recipe.stage1_order} is assumed")
    if origin.startswith("numbers"):
        warnings.append("the classes have no names: give a list, or ILSVRC's development kit, with --classes")
    return warnings


def _notes(found: ImportedNetwork, mean: Path | None, origin: str, sure: bool) -> list[str]:
    """What was taken for granted."""
    notes = []
    if mean is None and found.pixels != "imagenet":
        color = " ".join(f"{value:.1f}" for value in found.mean)
        notes.append(f"no mean file: the mean color {color} (RGB) is subtracted, which changes answers little")
    if not sure and not origin.startswith("numbers"):
        notes.append("1000 classes are taken for ILSVRC's; if they are others, name them with --classes")
    return notes
