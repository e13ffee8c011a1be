"""`alexnet export`: an ONNX file, checked before it is kept; a page in which the network runs; a folder for the Hub."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import DataError, UsageError
from alexnet_cli.options import JsonFlag, OwnDataOption, QuietFlag, WeightsOption

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from alexnet_cli.core.data.shards import Dataset
    from alexnet_cli.core.export.export import Precision, Verification
    from alexnet_cli.core.export.hub import MeasuredError
    from alexnet_cli.core.model.model_file import Model


def export(
    weights: WeightsOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write [default: alexnet.onnx, alexnet-PRECISION.onnx or alexnet.html in the run]",
        ),
    ] = None,
    file_format: Annotated[
        Literal["onnx", "html"],
        typer.Option(
            "--format", help="onnx, or html: one page in which the network runs and can be explored, without a server"
        ),
    ] = "onnx",
    no_patches: Annotated[
        bool,
        typer.Option("--no-patches", help="With --format html: put no images of the data set into the page"),
    ] = False,
    hub: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write a folder for the Hugging Face Hub instead: model.safetensors, config.json, README.md",
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
    """Export to an ONNX file, checked against PyTorch.

    With --format html: to a page that shows the network at work. With --hub: to a folder for the Hugging Face Hub.
    """
    from alexnet_cli.core.export import export as exporting
    from alexnet_cli.core.model import model_file
    from alexnet_cli.core.runs.resolve import (
        describe_unfinished_run,
        describe_weights,
        find_training_data,
        find_weights,
    )

    onnx_options = {"--precision": precision != "fp32", "--calibrate": calibrate, "--force": force}
    file_options = {"-o": output, "--no-verify": not verify, "--data": data}
    if hub is not None:
        _refuse(onnx_options | file_options | {"--format": file_format != "onnx"}, "--hub, which writes no ONNX file")
    if file_format == "html":
        _refuse(onnx_options, "--format html, which writes no ONNX file")
    else:
        _refuse({"--no-patches": no_patches}, "an ONNX file, which has no images")
    if precision != "int8" and (calibrate is not None or force):
        raise UsageError(f"{'--force' if force else '--calibrate'} only works with int8", "add --precision int8")
    if force and not verify:
        raise UsageError("--force has no effect with --no-verify", "leave one of them out")
    reporter = Reporter("export", json=json, quiet=quiet)
    source = find_weights(weights)
    model = model_file.read_model(source if hub is None else source.resolve())  # links may change while it is copied
    description = describe_weights(source, model.info)
    reporter.line(
        "weights",
        f"{description} · {len(model.classes):,} classes · recipe {model.recipe.name}",
        always=weights is None,
    )
    if remark := describe_unfinished_run(source):
        reporter.line("note", remark)
    if hub is not None:
        _export_hub(reporter, model, hub)
        return
    path = _choose_path(output, source, precision, file_format)
    if file_format == "html":
        _export_html(reporter, model, path, data, verify=verify, with_patches=not no_patches)
        return
    exporting.check_names(model, path)
    if precision == "int8":
        data_sets = (data or find_training_data(source), calibrate)
        result = _export_int8(reporter, model, path, data_sets, verify=verify, force=force)
    else:
        result = _export_float(reporter, model, path, precision, data, verify=verify)
    names, size = exporting.write_names(model, path), path.stat().st_size
    reporter.line("names", f"{names} · one class a line, in the order of the outputs")
    reporter.line("saved", f"{path} · {size / 1e6:,.1f} MB   next: alexnet predict IMAGE -w {shlex.quote(str(path))}")
    reporter.result({"path": str(path), "names": str(names), "bytes": size, "precision": precision, **result})


def _refuse(options: Mapping[str, object], target: str) -> None:
    """Raise UsageError for the first of these options that was given."""
    if given := [option for option, value in options.items() if value]:
        raise UsageError(f"{given[0]} has no effect with {target}", "leave one of them out")


def _choose_path(output: Path | None, source: Path, precision: str, suffix: str) -> Path:
    """Return -o, or a path in the run. Only the best checkpoint in float32 gets the name alexnet.onnx."""
    from alexnet_cli.core.runs.resolve import find_run_folder, is_best
    from alexnet_cli.core.runs.run import ONNX

    step = [] if is_best(source) else [source.resolve().parent.name]
    name = "-".join([Path(ONNX).stem, *step, *([] if precision == "fp32" else [precision])])
    path = output or (find_run_folder(source) or Path()) / f"{name}.{suffix}"
    if path.suffix != f".{suffix}":
        raise UsageError(f"-o {path} does not end in .{suffix}", f"such as -o {path.stem or 'alexnet'}.{suffix}")
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
    from alexnet_cli.core.inference.onnx_graph import save_graph

    data, calibrate = data_sets
    dataset = open_dataset(find_dataset(data or calibrate))
    calibration_set = open_dataset(find_dataset(calibrate)) if calibrate else dataset
    check = None
    if verify:
        try:
            output_of = match_classes(model.classes, dataset.classes, model.path)
        except DataError as error:
            raise DataError(error.what, "use --data with a set of the network's classes, or --no-verify") from error
        check = exporting.load_check_images(dataset, model, output_of)
    crops = exporting.load_calibration_crops(calibration_set, model)
    reporter.line("ranges", f"calibrated on {len(crops):,} training images of {calibration_set.path}")
    calibration = {"calibration": {"images": len(crops), "data": str(calibration_set.path)}}
    if check is None:
        save_graph(exporting.build_int8(model, crops), path)
        reporter.warn("the loss of accuracy was not measured", "leave out --no-verify to measure it")
        return _verification_record(None) | calibration | {"accuracy": None}
    validation = dataset.split("val")
    count = min(len(validation), exporting.ACCURACY_IMAGES)
    with reporter.waiting("check", f"float32 and int8 on {count:,} of {len(validation):,} validation images"):
        against_torch, counts = exporting.export_int8(model, path, crops, check, force)
    _report_verification(reporter, against_torch)
    (float32, int8), (low, high) = counts.accuracies, counts.interval
    reporter.line(
        "check",
        f"top-1 accuracy {int8:.1%} instead of {float32:.1%} on {counts.images:,} of "
        f"{len(validation):,} validation images: {100 * (0 - counts.difference):+.2f} points "
        f"(95 % interval {100 * (0 - high):+.2f} to {100 * (0 - low):+.2f})",
    )
    return _verification_record(against_torch) | calibration | {"accuracy": exporting.describe_accuracy(counts)}


def _export_html(
    reporter: Reporter, model: Model, path: Path, data: str | None, *, verify: bool, with_patches: bool
) -> None:
    """Write the page, after comparing the rounded weights with the network on images."""
    from alexnet_cli.core.export.export import verify as compare
    from alexnet_cli.core.inference.session import Session
    from alexnet_cli.core.runs.resolve import find_run_folder
    from alexnet_plugins.export.html_page import build_page, round_weights, write_page

    run, dataset = find_run_folder(model.path), _open_validation(reporter, model, data)
    patches = _find_patches(reporter, model, dataset) if dataset and with_patches else None
    towers = _measure_towers(reporter, model, dataset) if dataset and model.recipe.towers > 1 else None
    page = build_page(model, run.name if run else model.path.stem, patches, towers)
    verification = None
    if verify:
        crops, description = _load_crops(model, data)
        verification = compare(Session(model).logits, Session(round_weights(model)).logits, crops)
        reporter.line(
            "check",
            f"8-bit weights on {len(crops)} {description}: largest difference {verification.max_abs_difference:.1e} "
            f"in probabilities · top-1 agreement {verification.top1_agreement:.1%}",
        )
    write_page(page, path)
    size = path.stat().st_size
    if patches:
        reporter.line("note", f"the page contains parts of images of {patches['data']} (--no-patches leaves them out)")
    reporter.line("saved", f"{path} · {size / 1e6:,.1f} MB   next: open it in a browser")
    reporter.result({
        "path": str(path), "bytes": size, "patches": patches["images"] if patches else 0,
        **_verification_record(verification),
    })  # fmt: skip


def _open_validation(reporter: Reporter, model: Model, data: str | None) -> Dataset | None:
    """The run's own data set or that of --data, if it has validation images."""
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.runs.resolve import find_training_data

    place = data or find_training_data(model.path)
    dataset = open_dataset(find_dataset(place)) if place else None
    if dataset and len(dataset.split("val")):
        return dataset
    what = "what excites a unit" + (", or how often each tower is right" if model.recipe.towers > 1 else "")
    reporter.line("note", f"without validation images, the page cannot show {what} (--data adds them)")
    return None


def _find_patches(reporter: Reporter, model: Model, dataset: Dataset) -> dict[str, Any]:
    """What excites each unit."""
    from alexnet_plugins.export.patches import IMAGES, find_patches

    split = dataset.split("val")
    with reporter.progress("val", min(IMAGES, len(split))) as progress:
        return {"data": dataset.name, **find_patches(model, split, progress.advance)}


def _measure_towers(reporter: Reporter, model: Model, dataset: Dataset) -> dict[str, Any] | None:
    """How often each tower alone is right; None if the network does not know the classes of the data set."""
    from alexnet_cli.core.evaluation.towers import SAMPLE
    from alexnet_plugins.export.html_page import measure_towers

    try:
        with reporter.progress("towers", min(SAMPLE, len(dataset.split("val")))) as progress:
            return {"data": dataset.name, **measure_towers(model, dataset, progress.advance)}
    except DataError as error:
        reporter.line("note", f"the page cannot show how often each tower is right: {error.what}")
        return None


def _export_hub(reporter: Reporter, model: Model, folder: Path) -> None:
    """Write a folder for the Hub. Its card has the errors that `alexnet evaluate` or the training measured."""
    from alexnet_cli.core.export.hub import write_hub_folder

    errors = _find_errors(model)
    for error in errors:
        images = "" if error.images is None else f" · {error.images:,} images"
        reporter.line(
            "result", f"{error.top1_error:.1%} top-1 · {error.data} · {error.split}{images} · {error.protocol}"
        )
    if not errors:
        reporter.warn("no error of these weights is known", "alexnet evaluate measures it; then export again")
    files, quoted = write_hub_folder(model, folder, errors), shlex.quote(str(folder))
    size = sum(file.stat().st_size for file in files)
    reporter.line("files", f"{folder}: {', '.join(file.name for file in files)}")
    reporter.line("saved", f"{folder} · {size / 1e6:,.1f} MB   next: alexnet predict IMAGE -w {quoted}")
    reporter.result({"path": str(folder), "files": [str(file) for file in files], "bytes": size})


def _find_errors(model: Model) -> list[MeasuredError]:
    """The evaluations of exactly this weights file in its run; else the error that training recorded in the file."""
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.evaluation import results
    from alexnet_cli.core.export.hub import MeasuredError
    from alexnet_cli.core.files import hash_file
    from alexnet_cli.core.intervals import wilson_interval
    from alexnet_cli.core.runs.resolve import find_run_folder, find_training_data

    run = find_run_folder(model.path)
    evaluations = results.find_evaluations(run / "eval", hash_file(model.path)) if run else []
    if found := [totals for totals in evaluations if totals["split"] == "val"]:
        return [
            MeasuredError(
                totals["protocol"],
                Path(totals["data"]).name,
                *(totals[key] for key in ("split", "images", "top1_error", "top5_error")),
                *(totals[f"{key}_interval"] for key in ("top1_error", "top5_error")),
            )
            for totals in found
        ]
    metrics = model.info.get("metrics")
    recorded = [metrics.get(key) if isinstance(metrics, Mapping) else None for key in ("top1_error", "top5_error")]
    top1, top5 = [error if isinstance(error, float) and 0 <= error <= 1 else None for error in recorded]
    if top1 is None or top5 is None:
        return []
    images = None
    if data := find_training_data(model.path):
        with suppress(DataError):
            dataset = open_dataset(find_dataset(data))
            images = len(dataset.split("val")) if dataset.hash == model.info.get("data_hash") else None
    intervals = [wilson_interval(error, images) if images else None for error in (top1, top5)]
    protocol, name = "center view, validation during training", str(model.info.get("data", "unknown"))
    return [MeasuredError(protocol, name, "val", images, top1, top5, *intervals)]


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
