"""`alexnet export`: write one ONNX file with class names and preprocessing, and check it before it is kept."""

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
    from alexnet_cli.core.export import export as exporting
    from alexnet_cli.core.model import model_file
    from alexnet_cli.core.runs.resolve import (
        describe_unfinished_run,
        describe_weights,
        find_training_data,
        find_weights,
    )

    if precision != "int8" and (calibrate is not None or force):
        raise UsageError(f"{'--force' if force else '--calibrate'} only works with int8", "add --precision int8")
    if force and not verify:
        raise UsageError("--force has no effect with --no-verify", "leave one of them out")
    reporter = Reporter("export", json=json, quiet=quiet)
    source = find_weights(weights)
    model = model_file.read_model(source)
    path = _choose_path(output, source, precision)
    exporting.check_names(model, path)
    description = describe_weights(source, model.info)
    reporter.line(
        "weights",
        f"{description} · {len(model.classes):,} classes · recipe {model.recipe.name}",
        always=weights is None,
    )
    if remark := describe_unfinished_run(source):
        reporter.line("note", remark)
    if precision == "int8":
        data_sets = (data or find_training_data(source), calibrate)
        result = _export_int8(reporter, model, path, data_sets, verify=verify, force=force)
    else:
        result = _export_float(reporter, model, path, precision, data, verify=verify)
    names, size = exporting.write_names(model, path), path.stat().st_size
    reporter.line("names", f"{names} · one class a line, in the order of the outputs")
    reporter.line("saved", f"{path} · {size / 1e6:,.1f} MB   next: alexnet predict IMAGE -w {shlex.quote(str(path))}")
    reporter.result({"path": str(path), "names": str(names), "bytes": size, "precision": precision, **result})


def _choose_path(output: Path | None, source: Path, precision: str) -> Path:
    """Return -o, or a path in the run. Only the best checkpoint in float32 gets the name alexnet.onnx."""
    from alexnet_cli.core.runs.resolve import find_run_folder, is_best
    from alexnet_cli.core.runs.run import ONNX

    step = [] if is_best(source) else [source.resolve().parent.name]
    name = "-".join([Path(ONNX).stem, *step, *([] if precision == "fp32" else [precision])])
    path = output or (find_run_folder(source) or Path()) / f"{name}.onnx"
    if path.suffix != ".onnx":
        raise UsageError(f"-o {path} does not end in .onnx", f"such as -o {path.stem or 'alexnet'}.onnx")
    if not path.parent.is_dir():
        raise UsageError(f"-o {path}: the folder {path.parent} does not exist", "create it first")
    return path


def _export_float(
    reporter: Reporter, model: Model, path: Path, precision: Precision, data: str | None, *, verify: bool
) -> dict[str, Any]:
    from alexnet_cli.core.export import export as exporting
    from alexnet_cli.core.inference.onnx_graph import save_graph

    if not verify:
        save_graph(exporting.build_onnx(model, precision), path)
        reporter.warn("the file was not compared with PyTorch", "leave out --no-verify to compare it")
        return _verification_record(None)
    crops, description = _load_crops(model, data)
    reporter.line("check", f"against PyTorch on {len(crops)} {description}")
    verification = exporting.export(model, path, crops, precision)
    _report_verification(reporter, verification)
    return _verification_record(verification)


def _export_int8(
    reporter: Reporter, model: Model, path: Path, data_sets: tuple[str | None, str | None], *, verify: bool, force: bool
) -> dict[str, Any]:
    """Export int8. `data_sets`: for the accuracy, and for calibration if that is another one."""
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.evaluation.evaluate import match_classes
    from alexnet_cli.core.export import export as exporting
    from alexnet_cli.core.export.quantize import CALIBRATION_IMAGES
    from alexnet_cli.core.inference.onnx_graph import save_graph

    data, calibrate = data_sets
    dataset = open_dataset(find_dataset(data or calibrate))
    calibration_set = open_dataset(find_dataset(calibrate)) if calibrate else dataset
    training, validation = calibration_set.split("train"), dataset.split("val")
    if not len(training):
        raise DataError(f"{calibration_set.path} has no training images", "int8 needs some for calibration")
    if verify and not len(validation):
        raise DataError(
            f"{dataset.path} has no validation images to measure the accuracy on",
            "prepare it with --val-fraction 0.1, choose another set with --data, or use --no-verify",
        )
    side = model.recipe.input_size
    crops = exporting.center_crops(training, training.spread_rows(CALIBRATION_IMAGES), side)
    reporter.line("ranges", f"calibrated on {len(crops):,} training images of {calibration_set.path}")
    calibration = {"calibration": {"images": len(crops), "data": str(calibration_set.path)}}
    if not verify:
        save_graph(exporting.build_int8(model, crops), path)
        reporter.warn("the loss of accuracy was not measured", "leave out --no-verify to measure it")
        return _verification_record(None) | calibration | {"accuracy": None}
    try:
        output_of = match_classes(model.classes, dataset.classes, model.path)
    except DataError as error:
        raise DataError(error.what, "use --data with a set of the network's classes, or --no-verify") from error
    check = (exporting.sample_crops(dataset, model), exporting.labeled_crops(validation, side, output_of))
    count = min(len(validation), exporting.ACCURACY_IMAGES)
    with reporter.waiting("check", f"float32 and int8 on {count:,} of {len(validation):,} validation images"):
        result = exporting.export_int8(model, path, crops, check, force)
    _report_verification(reporter, result.against_torch)
    accuracy, (low, high) = result.accuracy, result.accuracy.interval
    reporter.line(
        "check",
        f"top-1 accuracy {accuracy.int8:.1%} instead of {accuracy.float32:.1%} on {accuracy.images:,} of "
        f"{len(validation):,} validation images: {100 * (0 - accuracy.lost):+.2f} points "
        f"(95 % interval {100 * (0 - high):+.2f} to {100 * (0 - low):+.2f})",
    )
    return _verification_record(result.against_torch) | calibration | {"accuracy": accuracy.as_dict()}


def _report_verification(reporter: Reporter, verification: Verification) -> None:
    reporter.line(
        "check",
        f"largest difference {verification.max_abs_difference:.1e} in probabilities, "
        f"{verification.max_logit_difference:.1e} in logits · top-1 agreement {verification.top1_agreement:.1%}",
    )


def _verification_record(verification: Verification | None) -> dict[str, Any]:
    return {
        "max_abs_difference": verification.max_abs_difference if verification else None,
        "top1_agreement": verification.top1_agreement if verification else None,
        "images": verification.images if verification else 0,
    }


def _load_crops(model: Model, data: str | None) -> tuple[npt.NDArray[np.uint8], str]:
    """Return crops to compare on, and what they are: images of a prepared set, or synthetic ones without a set."""
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.export.export import sample_crops, synthetic_crops
    from alexnet_cli.core.runs.resolve import find_training_data

    try:
        dataset = open_dataset(find_dataset(data or find_training_data(model.path)))
    except DataError:
        if data is not None:
            raise
        return synthetic_crops(model.recipe.input_size), "synthetic images, as there is no prepared data set"
    return sample_crops(dataset, model), f"images of {dataset.path}"
