"""`alexnet prepare`: detect the layout of a data set and pack it once into shards of 256x256 JPEGs."""

from __future__ import annotations

import collections
import contextlib
import itertools
import shlex
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import DataError, Stopped, Terminated, UsageError
from alexnet_cli.options import JsonFlag, QuietFlag

if TYPE_CHECKING:
    from alexnet_cli.core.data.plan import Plan
    from alexnet_cli.core.data.shards import Dataset
    from alexnet_cli.core.data.sources import SourceDataset

LAYOUTS = (
    "Folder of images: one folder per class, train/CLASS and val/CLASS, ImageNet as distributed (archives, "
    "Kaggle, Hugging Face parquet), WebDataset shards, Tiny ImageNet or CIFAR-10's batches"
)
FRACTION = "Share of each class to validate on, if the source has no validation split [default: 0.1]"
CORRUPT = "Images that cannot be decoded: skip and list them, or fail at the first"
EXIF = "Rotate images by their EXIF orientation (off in 2012)"
VERIFY = "Check every checksum of this prepared data set, and exit"

TOO_FEW = "each class needs at least two images, one of them for validation: add some and use --overwrite"
MAX_CLASSES = 10  # that are named on the terminal
MAX_NAMED = 3  # images or classes that are named on the terminal

OnCorrupt = Literal["skip", "fail"]


def prepare(
    source: Annotated[Path | None, typer.Argument(metavar="SOURCE", help=LAYOUTS, show_default=False)] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write [default: prepared/NAME of the source]")
    ] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Number of threads [default: one per core]")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of the packed images")] = 95,
    val_fraction: Annotated[float | None, typer.Option(help=FRACTION)] = None,
    on_corrupt: Annotated[OnCorrupt, typer.Option(help=CORRUPT)] = "skip",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be done, and exit")] = False,
    exif_rotate: Annotated[bool, typer.Option("--exif-rotate", help=EXIF)] = False,
    check: Annotated[Path | None, typer.Option("--verify", metavar="DIR", help=VERIFY)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder")] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Pack a folder of images once, for fast training.

    If it is interrupted, run the same command again to continue. The source is never changed.
    """
    from alexnet_cli.core.data.plan import Plan, default_output, format_size
    from alexnet_cli.core.data.sources import detect_source
    from alexnet_cli.core.devices import count_cores

    reporter = Reporter("prepare", json=json, quiet=quiet)
    if check is not None:
        if source is not None:
            raise UsageError("--verify checks a prepared data set and takes no SOURCE", f"omit {source}")
        _verify(reporter, check)
        return
    if source is None:
        raise UsageError("SOURCE is missing", "name a folder of images, or --verify DIR")
    with reporter.waiting("look", f"reading what is in {source}"):
        dataset = detect_source(source, val_fraction)
    _report_source(reporter, dataset)
    plan = Plan(dataset, output or default_output(source), quality, exif_rotate=exif_rotate)
    state = plan.state(overwrite)
    if state == "finished":
        _report_finished(reporter, plan, on_corrupt)
        return
    needed, free = plan.estimate_bytes(), plan.free_bytes()
    sizes = f"about {format_size(needed)} needed, {format_size(free)} free"
    reporter.line("plan", f"shorter side to 256, middle 256x256, JPEG q{quality} → {plan.output}    {sizes}")
    if dry_run:
        reporter.result({
            "output": str(plan.output),
            "images": {name: len(items) for name, items in dataset.splits.items()},
            "classes": len(dataset.classes),
            "dry_run": True,
            "layout": dataset.layout,
            "bytes_needed": needed,
            "bytes_free": free,
        })  # fmt: skip
        return
    plan.check_space(needed)
    if state == "unfinished":
        reporter.line("resume", f"keeping {plan.count_finished_shards():,} finished shards of an interrupted run")
    if overwrite and plan.output.is_dir():
        reporter.line("note", f"replacing {plan.output}")
    packed, seconds = _pack(reporter, plan, workers or count_cores(), on_corrupt, overwrite)
    _report_prepared(reporter, plan.output, packed, seconds)


def _report_source(reporter: Reporter, dataset: SourceDataset) -> None:
    """Print what was detected and left out, and warn if there are no validation images."""
    numbers = " · ".join(f"{name} {len(items):,}" for name, items in dataset.splits.items())
    reporter.line("found", f"{numbers} images of {len(dataset.classes):,} classes    (layout: {dataset.layout})")
    shown = ", ".join(entry.name for entry in dataset.classes[:MAX_CLASSES])
    reporter.line("classes", shown + (", …" if len(dataset.classes) > MAX_CLASSES else ""))
    for note in dataset.notes:
        reporter.line("note", note)
    for warning in dataset.warnings:
        reporter.warn(warning, "if they are splits and not classes, rename them to train/ and val/")
    if not dataset.splits["val"]:
        largest = max(collections.Counter(dataset.splits["train"].labels).values(), default=0)
        hint = "--val-fraction 0.1 takes one image in ten of each class" if largest > 1 else TOO_FEW
        reporter.warn("no validation images, which training needs", hint)


def _pack(reporter: Reporter, plan: Plan, workers: int, on_corrupt: OnCorrupt, overwrite: bool) -> tuple[int, float]:
    """Pack what is missing. Returns the number of images processed in this run, and the seconds it took."""
    from alexnet_cli.core.data.prepare import pack

    processed, start = 0, time.perf_counter()
    try:
        with contextlib.closing(pack(plan, workers, on_corrupt, overwrite)) as steps:
            for split, steps_of_split in itertools.groupby(steps, key=lambda step: step.split):
                left_out = 0
                with reporter.progress(split, total=len(plan.source.splits[split])) as bar:
                    for step in steps_of_split:
                        left_out += step.rejected
                        if step.kept:
                            bar.skip(step.images)
                        else:
                            processed += step.images
                            bar.advance(step.images, f"{left_out:,} left out" if left_out else "")
    except (KeyboardInterrupt, Terminated) as stop:
        finished = plan.count_finished_shards()
        if finished:
            what = f"interrupted: {finished:,} finished shards are kept in {plan.output}"
            hint = f"run the same command again{' without --overwrite' if overwrite else ''} to continue"
        else:
            what, hint = "interrupted: no shard was finished yet", "run the same command again to start over"
        raise Stopped(what, hint, getattr(stop, "exit_code", 130)) from None
    return processed, time.perf_counter() - start


def _verify(reporter: Reporter, folder: Path) -> None:
    """Compare every file of a data set with its checksum. VerificationError names those that differ."""
    from alexnet_cli.core.data.shards import find_dataset, list_checksums, open_dataset, verify_dataset

    dataset = open_dataset(find_dataset(str(folder)))
    files = list_checksums(dataset.record)
    with reporter.progress("verify", total=len(files), unit="files") as bar:
        for _ in verify_dataset(dataset):
            bar.advance(1)
    reporter.result({"output": str(dataset.path), "files": len(files), "verified": True})
    reporter.line("done", f"{dataset.path}: all {len(files)} files match their checksums")


def _report_prepared(reporter: Reporter, output: Path, processed: int, seconds: float) -> None:
    """Print the result of a run that processed so many images in so many seconds."""
    from alexnet_cli.core.data.shards import open_dataset

    dataset = open_dataset(output)
    _report_statistics(reporter, dataset)
    _report_orientations(reporter, dataset)
    _report_duplicates(reporter, dataset)
    _report_single_color(reporter, dataset)
    _report_damaged(reporter, dataset)
    _report_rejected(reporter, dataset)
    images = _count_images(dataset)
    part = "" if processed == images + dataset.record["rejected"] else f"{processed:,} in this run, "
    speed = f"{images:,} images, {part}{seconds:.1f} s, {processed / seconds:,.0f} img/s"
    reporter.line("done", f"{output}  (dataset.json sha256 {dataset.hash[:12]}…)    {speed}")
    _report_result(reporter, dataset, seconds, processed / seconds)


def _report_finished(reporter: Reporter, plan: Plan, on_corrupt: OnCorrupt) -> None:
    """Print the result of a data set that is already prepared, after checking that its files exist.

    Raises:
        DataError: a file is missing.
        PartialError: images were left out, and `on_corrupt` is "fail".
    """
    from alexnet_cli.core.data.prepare import check_rejected
    from alexnet_cli.core.data.shards import list_checksums, open_dataset

    dataset = open_dataset(plan.output)
    for name in dataset.record["splits"]:
        dataset.split(name)  # raises DataError if a shard is missing
    missing = [name for name in list_checksums(dataset.record) if not (plan.output / name).is_file()]
    if missing:
        raise DataError(f"{plan.output / missing[0]} is missing", "prepare the data set again with --overwrite")
    plan.finalize()
    check_rejected(dataset.rejected(), on_corrupt)
    _report_orientations(reporter, dataset)
    _report_rejected(reporter, dataset)
    reporter.line("done", f"{plan.output} is already prepared from this source with these settings")
    _report_result(reporter, dataset, 0.0, None)


def _count_images(dataset: Dataset) -> int:
    return sum(split["images"] for split in dataset.record["splits"].values())


def _report_result(reporter: Reporter, dataset: Dataset, seconds: float, rate: float | None) -> None:
    from alexnet_cli.core.devices import suggest_train_command

    images = {name: split["images"] for name, split in dataset.record["splits"].items()}
    if images.get("val"):
        reporter.line("next", f"{suggest_train_command()} --data {shlex.quote(str(dataset.path))}")
    reporter.result({
        "output": str(dataset.path),
        "images": images,
        "classes": len(dataset.classes),
        **{key: dataset.record.get(key, 0) for key in ("rejected", "damaged", "turned", "single_color")},
        "seconds": seconds,
        "images_per_second": rate,
    })  # fmt: skip


def _report_rejected(reporter: Reporter, dataset: Dataset) -> None:
    from alexnet_cli.core.data.shards import REJECTED

    rejected = dataset.rejected()
    for line in rejected[:MAX_NAMED]:
        reporter.warn(f"left out {line['path']}: {line['reason']}")
    if rejected:
        were = "was" if len(rejected) == 1 else "were"
        total = len(rejected) + _count_images(dataset)
        reporter.warn(
            f"{len(rejected):,} of {total:,} images {were} left out: {dataset.path / REJECTED}",
            "the data set can be used without them; --on-corrupt fail stops at the first instead",
        )


def _report_statistics(reporter: Reporter, dataset: Dataset) -> None:
    record = dataset.record
    width, height = (_format_range(record["source_sizes"][side]) for side in ("width", "height"))
    mean = " ".join(f"{value:.1f}" for value in dataset.mean_rgb)
    per_class = f"{_format_range(record['splits']['train']['images_per_class'])} training images per class"
    reporter.line("stats", f"{len(dataset.classes):,} classes · {per_class} · mean RGB {mean} · mean image saved")
    reporter.line("stats", f"source images: {width} pixels wide, {height} high")
    empty = [entry["name"] for entry in record["classes"] if not entry["images"]["train"]]
    if empty:
        named = ", ".join(empty[:MAX_NAMED]) + (" …" if len(empty) > MAX_NAMED else "")
        reporter.warn(f"no training images are left of {named}", "the network cannot learn these classes")


def _format_range(values: Mapping[str, float]) -> str:
    low, middle, high = (values[key] for key in ("min", "median", "max"))
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {middle:,.0f})"


def _report_orientations(reporter: Reporter, dataset: Dataset) -> None:
    """Report images with an EXIF orientation: phones store photographs rotated."""
    turned = dataset.record.get("turned", 0)
    images = f"{turned:,} of {_count_images(dataset):,} images"
    if turned and dataset.record["image"]["exif_rotate"]:
        reporter.line("note", f"rotated {images} by their EXIF orientation; predict does the same")
    elif turned:
        hint = "use --exif-rotate --overwrite to rotate them; predict will then do the same"
        reporter.warn(f"the EXIF orientation of {images} is ignored", hint)


def _report_duplicates(reporter: Reporter, dataset: Dataset) -> None:
    """Report equal images, and warn about those in both splits or in several classes."""
    from alexnet_cli.core.data.shards import DUPLICATES
    from alexnet_cli.core.data.statistics import has_several

    summary = dataset.record["duplicates"]
    if summary["groups"]:
        reporter.line("note", f"{summary['pictures']:,} images have identical copies: {DUPLICATES}")
    for key, count, where, hint in (
        ("split", summary["across_splits"], "in train and in val", "the validation error will look too good"),
        ("class", summary["across_classes"], "in two classes", "one of the labels is wrong: keep the right one"),
    ):
        if count:
            group = next(group for group in dataset.duplicates() if has_several(group, key))
            other = next(entry for entry in group if entry[key] != group[0][key])
            example = f"{group[0]['path']} = {other['path']}{' …' if count > 1 else ''}"
            images = "1 image is" if count == 1 else f"{count:,} images are"
            reporter.warn(f"{images} {where}: {example}", f"{hint}; {DUPLICATES} lists them all")


def _report_single_color(reporter: Reporter, dataset: Dataset) -> None:
    """Warn about images in which nothing can be seen."""
    from alexnet_cli.core.data.shards import SINGLE_COLOR

    count = dataset.record["single_color"]
    if count:
        images = f"{count:,} of {_count_images(dataset):,} images {'is' if count == 1 else 'are'}"
        example = dataset.single_color()[0]["path"]
        hint = f"look at it; {dataset.path / SINGLE_COLOR} lists them all"
        reporter.warn(f"{images} a single color or nearly so, such as {example}", hint)


def _report_damaged(reporter: Reporter, dataset: Dataset) -> None:
    """Report images that were decoded only in part."""
    from alexnet_cli.core.data.shards import DAMAGED

    count = dataset.record["damaged"]
    if count:
        images = "1 image is damaged and was" if count == 1 else f"{count:,} images are damaged and were"
        reporter.line("note", f"{images} decoded in part: {DAMAGED}")
