"""`alexnet export`: one ONNX file that carries names and preprocessing, and that gave PyTorch's answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import DataError, UsageError
from alexnet_cli.options import DataOption, JsonFlag, QuietFlag, WeightsOption

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from alexnet_cli.core.weights import Model


def export(
    weights: WeightsOption = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The file to write; alexnet.onnx in the run, or here, if left out."),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="Compare with PyTorch first.")] = True,
    data: DataOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Write a trained network as one ONNX file, checked against PyTorch."""
    from alexnet_cli.core import weights as model_file
    from alexnet_cli.core.export import export as write
    from alexnet_cli.core.export import export_unverified
    from alexnet_cli.core.runs import ONNX, find_weights, run_of

    reporter = Reporter("export", json=json, quiet=quiet)
    source = find_weights(weights)
    model = model_file.read(source)
    path = output or (run_of(source) or Path()) / ONNX
    if path.suffix != ".onnx":
        raise UsageError(f"-o {path} does not end in .onnx", f"such as -o {path.name or 'alexnet'}.onnx")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {path.parent}", "make it first")
    reporter.line("weights", f"{source} · {len(model.classes):,} classes · recipe {model.recipe.name}")
    checked = None
    if verify:
        crops, shown = _crops(model, data)
        reporter.line("check", f"against PyTorch on {len(crops)} {shown}")
        checked = write(model, path, crops)
        reporter.line(
            "check",
            f"probabilities differ by {checked.max_abs_difference:.1e} at most, logits by "
            f"{checked.max_logit_difference:.1e} · top-1 agreement {checked.top1_agreement:.1%}",
        )
    else:
        export_unverified(model, path)
        reporter.warn("not compared with PyTorch", "leave out --no-verify to be sure")
    size = path.stat().st_size
    reporter.line("saved", f"{path} · {size / 1e6:,.1f} MB   next: alexnet predict PICTURE -w {path}")
    reporter.result(
        {
            "path": str(path),
            "bytes": size,
            "precision": "fp32",
            "max_abs_difference": checked.max_abs_difference if checked else None,
            "top1_agreement": checked.top1_agreement if checked else None,
            "images": checked.images if checked else 0,
        }
    )


def _crops(model: Model, data: str | None) -> tuple[npt.NDArray[np.uint8], str]:
    """What to compare on, and what it is: pictures of the prepared set, or drawn ones if there is none."""
    from alexnet_cli.core.export import crops_of, drawn_crops
    from alexnet_cli.core.shards import find_dataset, open_dataset

    try:
        dataset = open_dataset(find_dataset(data))
    except DataError:
        if data is not None:
            raise
        return drawn_crops(model.recipe.input_size), "drawn pictures, as no prepared data set was found"
    return crops_of(dataset, model), f"pictures of {dataset.path}"
