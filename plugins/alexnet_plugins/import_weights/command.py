"""`alexnet import-weights`: pretrained two-tower networks of other programs, for use in every other command."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alexnet_cli import recipe_io
from alexnet_cli.console import Reporter
from alexnet_cli.errors import UsageError
from alexnet_cli.options import JsonFlag, QuietFlag
from alexnet_cli.recipe import Order, Recipe

if TYPE_CHECKING:
    from alexnet_cli.core.data.classes import ClassName
    from alexnet_plugins.import_weights.imported import ImportedNetwork

BARE_FORMATS = ("PyTorch", "safetensors")  # they contain tensors and nothing about the network


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
        Order | None,
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
    grid: Annotated[
        Literal["trained", "file"],
        typer.Option(
            help="Geometry of the ONNX model zoo's networks: trained is 227 pixels, as Caffe trained the weights; "
            "file is 224 pixels with smaller maps, as in the graph"
        ),
    ] = "trained",
    mean: Annotated[Path | None, typer.Option(help="Caffe's mean file: .npy or .binaryproto")] = None,
    classes: Annotated[
        Path | None,
        typer.Option(
            help="Class names in the order of the outputs: a text file with lines such as `n02123045 tabby`, "
            "a JSON list or dictionary, or ILSVRC's development kit"
        ),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Import pretrained weights (Caffe, ONNX, PyTorch).

    Makes a run from the weights of a two-tower AlexNet.
    """
    from alexnet_cli.core.files import hash_file
    from alexnet_cli.core.model.model_file import write_model
    from alexnet_plugins.import_weights import convert

    reporter = Reporter("import-weights", json=json, quiet=quiet)
    name = output or re.sub(r"[^\w.-]", "_", file.stem).strip(".") or "imported"
    if file.is_file():
        convert.check_output(name)  # before a large file is read
    network = convert.read_network(file, recipe_io.load_recipe(recipe or "paper"), pixels or "rgb")
    if network.format not in BARE_FORMATS and (recipe or pixels):
        raise UsageError(f"{file} itself says how its network is built", "leave --recipe and --pixels out")
    network = _set_order(network, order)
    is_resized = grid == "trained" and network.recipe.pool_ceil == "pool5"  # geometry of the zoo's graphs only
    if is_resized:
        network = replace(network, recipe=replace(network.recipe, input_size=227, edge_padding=True, pool_ceil="all"))
    sha1 = hash_file(file, "sha1")
    published = convert.PUBLISHED.get(sha1)
    reporter.line("file", f"{file} · {network.format} · {published or f'sha1 {sha1}, not a known published file'}")
    names, names_from = convert.name_outputs(len(network.layers["fc8"][0]), classes)
    mean_image = convert.read_mean(mean, bgr=network.pixels == "bgr") if mean else None
    about = {"file": file.name, "format": network.format, "sha1": sha1, "published": published, "classes": names_from}
    model = convert.build_model(network, names, mean_image, {"imported": about})
    built = model.recipe
    parameters = sum(tensor.size for name, tensor in model.tensors.items() if name != "mean")
    towers = f"{built.towers} tower{'s' if built.towers > 1 else ''}"
    reporter.line("model", f"AlexNet · {towers} · {parameters:,} parameters")
    reporter.line("input", _describe_input(network, built, names_from))
    notes = _list_notes(network, mean, names_from, is_sure=bool(published or classes), is_resized=is_resized)
    warnings = _list_warnings(network, order, names, names_from)
    for note in notes:
        reporter.line("note", note)
    for warning in warnings:
        reporter.warn(warning)
    if name.endswith(".safetensors"):
        path = Path(name)
        write_model(model, path)
    else:
        path = convert.save_run(model, name, {"status": "finished", "imported": about})
    size = f"{path.stat().st_size / 1e6:,.1f} MB"
    use = str(path) if name.endswith(".safetensors") else name
    reporter.line("saved", f"{path} · {size}   next: alexnet predict IMAGE -w {shlex.quote(use)}")
    reporter.result({
        "path": str(path), "use": use, "format": network.format, "sha1": sha1, "published": published,
        "parameters": parameters, "classes": len(names), "class_names": names_from, "towers": built.towers,
        "width": built.width, "recipe": built.name, "orders": [built.stage1_order, built.stage2_order],
        "input_size": built.input_size, "notes": warnings + notes,
    })  # fmt: skip


def _set_order(network: ImportedNetwork, order: Order | None) -> ImportedNetwork:
    """Return the network with the order of --order. Raises UsageError if the file shows another one."""
    recipe = network.recipe
    if order is None or (recipe.stage1_order == order and recipe.stage2_order == order):
        return network
    if network.is_order_known:
        what = f"--order {order}: the file itself shows {recipe.stage1_order} and {recipe.stage2_order}"
        raise UsageError(what, "leave --order out")
    return replace(network, recipe=replace(recipe, stage1_order=order, stage2_order=order))


def _describe_input(network: ImportedNetwork, built: Recipe, names_from: str) -> str:
    """Describe the network's input, normalization and classes."""
    size = f"{built.input_size} pixels" + ("" if built.edge_padding else " unpadded")
    scope = "both towers" if built.lrn_joint and built.towers == 2 else "its tower"
    norm = "none" if built.lrn == "none" else f"k = {built.lrn_k:g}, across {scope}"
    mean = "mean color" if built.mean == "rgb" else "mean image"
    parts = (network.pixels, size, f"minus the {mean}", built.stage1_order, f"norm {norm}", f"classes: {names_from}")
    return " · ".join(parts)


def _list_warnings(
    network: ImportedNetwork, order: str | None, names: Sequence[ClassName], names_from: str
) -> list[str]:
    """Return what the file does not say although the results depend on it, and names that are probably wrong."""
    from alexnet_plugins.import_weights.class_list import is_reordered

    warnings = []
    if network.format in BARE_FORMATS:
        warnings.append(
            f"the file has only tensors: recipe {network.recipe.name} (--recipe) and {network.pixels} input (--pixels) "
            "are assumed; if they are wrong, so are the results"
        )
    elif not network.is_order_known and order is None:
        assumed = network.recipe.stage1_order
        warnings.append(f"the file does not show what follows layers 1 and 2: {assumed} is assumed (--order)")
    if names_from.startswith("numbers"):
        warnings.append("the classes have no names: give a list, or ILSVRC's development kit, with --classes")
    if is_reordered(names):
        warnings.append(
            f"{names_from} has ILSVRC's 1000 classes, but not in the order of their wnids, as Caffe's networks have "
            "them. Unless this network was trained in the order of the list, all names are wrong: leave --classes out"
        )
    return warnings


def _list_notes(
    network: ImportedNetwork, mean: Path | None, names_from: str, *, is_sure: bool, is_resized: bool
) -> list[str]:
    """Return assumptions that are probably right.

    `is_sure`: the file or the class list is known. `is_resized`: another input size than the file's is used.
    """
    notes = []
    if is_resized:
        what = "the graph has 224 pixels and maps of 54, 26, 12 and 6"
        notes.append(f"{what}; its weights are used at 227, as Caffe trained them (--grid file: as in the graph)")
    if mean is None and network.pixels != "imagenet":
        color = " ".join(f"{value:.1f}" for value in network.mean)
        notes.append(f"no --mean file: the mean color {color} (RGB) is subtracted; results differ little")
    if not is_sure and not names_from.startswith("numbers"):
        notes.append("the 1000 classes are assumed to be ILSVRC's; otherwise name them with --classes")
    return notes
