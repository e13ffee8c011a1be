"""`alexnet export`: one ONNX file that carries names and preprocessing, and that was measured before it was kept."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import DataError, UsageError
from alexnet_cli.options import JsonFlag, OwnDataOption, QuietFlag, WeightsOption

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from alexnet_cli.core.export.export import Precision, Verification
    from alexnet_cli.core.model.model_file import Model

    Crops = npt.NDArray[np.uint8]


def export(
    weights: WeightsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", help="File to write [default: alexnet.onnx or alexnet-PRECISION.onnx in the run]"
        ),
    ] = None,
    precision: Annotated[
        Literal["fp32", "fp16", "int8"],
        typer.Option(help="Number format: fp16 halves the file, int8 quarters it and is fastest on a CPU"),
    ] = "fp32",
    calibrate: Annotated[
        str | None,
        typer.Option(metavar="D", help="Prepared data set to calibrate int8 on [default: that of --data]"),
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force", help="Keep an int8 file even if its error is more than a point higher", show_default=False
        ),
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Compare the file with PyTorch before keeping it")
    ] = True,
    data: OwnDataOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Export to an ONNX file, checked against PyTorch."""
    from alexnet_cli.core.model import model_file
    from alexnet_cli.core.runs.resolve import (
        describe_unfinished_run,
        describe_weights,
        find_training_data,
        find_weights,
    )

    if precision != "int8" and (calibrate is not None or force):
        raise UsageError(f"{'--force' if force else '--calibrate'} is for int8", "add --precision int8")
    if force and not verify:
        raise UsageError("--force and --no-verify: without a measurement nothing is refused", "leave one out")
    reporter = Reporter("export", json=json, quiet=quiet)
    source = find_weights(weights)
    model = model_file.read_model(source)
    path = _place(output, source, precision)
    said = describe_weights(source, model.info)
    reporter.line("weights", f"{said} · {len(model.classes):,} classes · recipe {model.recipe.name}")
    if remark := describe_unfinished_run(source):
        reporter.line("note", remark)
    if precision == "int8":
        found = _int8(
            reporter, model, path, (data or find_training_data(source), calibrate), verify=verify, force=force
        )
    else:
        found = _float(reporter, model, path, precision, data, verify=verify)
    size = path.stat().st_size
    reporter.line("saved", f"{path} · {size / 1e6:,.1f} MB   next: alexnet predict IMAGE -w {shlex.quote(str(path))}")
    reporter.result({"path": str(path), "bytes": size, "precision": precision, **found})


def _place(output: Path | None, source: Path, precision: str) -> Path:
    """Where the file goes: beside the run's own, which is of its best checkpoint in float32, and never over it."""
    from alexnet_cli.core.runs.resolve import find_run_folder, is_best
    from alexnet_cli.core.runs.run import ONNX

    other = [] if is_best(source) else [source.resolve().parent.name]
    name = "-".join([Path(ONNX).stem, *other, *([] if precision == "fp32" else [precision])])
    path = output or (find_run_folder(source) or Path()) / f"{name}.onnx"
    if path.suffix != ".onnx":
        raise UsageError(f"-o {path} does not end in .onnx", f"such as -o {path.stem or 'alexnet'}.onnx")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: there is no folder {path.parent}", "make it first")
    return path


def _float(
    reporter: Reporter, model: Model, path: Path, precision: Precision, data: str | None, *, verify: bool
) -> dict[str, Any]:
    from alexnet_cli.core.export.export import export as write
    from alexnet_cli.core.export.export import export_unverified

    if not verify:
        export_unverified(model, path, precision)
        reporter.warn("not compared with PyTorch", "leave out --no-verify to be sure")
        return _numbers(None)
    crops, shown = _crops(model, data)
    reporter.line("check", f"against PyTorch on {len(crops)} {shown}")
    checked = write(model, path, crops, precision)
    _tell(reporter, checked)
    return _numbers(checked)


def _int8(
    reporter: Reporter, model: Model, path: Path, sets: tuple[str | None, str | None], *, verify: bool, force: bool
) -> dict[str, Any]:
    """Calibrated on `sets[1]`, or else on the set that accuracy is judged on, `sets[0]`."""
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.evaluation.evaluate import match_classes
    from alexnet_cli.core.export import export as exporting
    from alexnet_cli.core.export.quantize import CALIBRATION_IMAGES

    data, calibrate = sets
    judge = open_dataset(find_dataset(data or calibrate))
    teacher = open_dataset(find_dataset(calibrate)) if calibrate else judge
    split, held, side = teacher.split("train"), judge.split("val"), model.recipe.input_size
    if not len(split):
        raise DataError(f"{teacher.path} holds no training pictures", "int8 needs some to learn its ranges from")
    if verify and not len(held):
        raise DataError(
            f"{judge.path} holds no validation pictures to count right answers on",
            "prepare it with --val-fraction 0.1, name another set with --data, or say --no-verify",
        )
    training = exporting.centers(split, exporting.evenly(split, CALIBRATION_IMAGES), side)
    reporter.line("ranges", f"of {len(training):,} training pictures of {teacher.path}")
    about = {"calibration": {"images": len(training), "data": str(teacher.path)}}
    if not verify:
        exporting.export_int8_unverified(model, path, training)
        reporter.warn("the accuracy that is lost was not measured", "leave out --no-verify to know it")
        return _numbers(None) | about | {"accuracy": None}
    try:
        output_of = match_classes(model.classes, judge.classes, model.path)
    except DataError as error:
        raise DataError(error.what, "name a set of the network's classes with --data, or say --no-verify") from error
    labeled = exporting.labeled(held, side, output_of)
    count = min(len(held), exporting.ACCURACY_PICTURES)
    with reporter.waiting("check", f"float32 and int8 on {count:,} of {len(held):,} validation pictures"):
        check = exporting.export_int8(model, path, training, (exporting.crops_of(judge, model), labeled), force)
    loss, (low, high) = check.loss, check.loss.interval
    change, least, most = (100 * (0 - lost) for lost in (loss.lost, high, low))
    _tell(reporter, check.against_torch)
    reporter.line(
        "check",
        f"top-1 {loss.other:.1%} right instead of {loss.reference:.1%} on {loss.images:,} of {len(held):,} validation "
        f"pictures: {change:+.2f} points (95 % interval {least:+.2f} to {most:+.2f})",
    )
    return _numbers(check.against_torch) | about | {"accuracy": loss.as_dict()}


def _tell(reporter: Reporter, checked: Verification) -> None:
    reporter.line(
        "check",
        f"probabilities differ by {checked.max_abs_difference:.1e} at most, logits by "
        f"{checked.max_logit_difference:.1e} · top-1 agreement {checked.top1_agreement:.1%}",
    )


def _numbers(checked: Verification | None) -> dict[str, Any]:
    return {
        "max_abs_difference": checked.max_abs_difference if checked else None,
        "top1_agreement": checked.top1_agreement if checked else None,
        "images": checked.images if checked else 0,
    }


def _crops(model: Model, data: str | None) -> tuple[Crops, str]:
    """What to compare on, and what it is: pictures of the prepared set, or drawn ones if there is none."""
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.export.export import crops_of, drawn_crops
    from alexnet_cli.core.runs.resolve import find_training_data

    try:
        dataset = open_dataset(find_dataset(data or find_training_data(model.path)))
    except DataError:
        if data is not None:
            raise
        return drawn_crops(model.recipe.input_size), "drawn pictures, as no prepared data set was found"
    return crops_of(dataset, model), f"pictures of {dataset.path}"
