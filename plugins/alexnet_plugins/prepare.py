"""`alexnet prepare`: recognize a data set and pack it once, into measured shards of 256x256 JPEGs."""

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
from alexnet_cli.errors import DataError, PartialError, Stopped, Terminated, UsageError
from alexnet_cli.options import JsonFlag, QuietFlag

if TYPE_CHECKING:
    from alexnet_cli.core.data.plan import Plan
    from alexnet_cli.core.data.shards import Dataset
    from alexnet_cli.core.data.sources import SourceDataset

LAYOUTS = (
    "Folder of images: one folder per class, train/CLASS and val/CLASS, ImageNet as distributed (archives, "
    "Kaggle, Hugging Face parquet), Tiny ImageNet, CIFAR-10 or WebDataset shards"
)
FRACTION = "Share of each class to validate on, if the source has no validation split [default: 0.1]"
CORRUPT = "Images that cannot be decoded: skip and list them, or fail at the first"
EXIF = "Rotate images by their EXIF orientation (off in 2012)"
VERIFY = "Check every checksum of this prepared data set, and exit"

REJECTED_FILE = "rejected.jsonl"
DUPLICATES_FILE = "duplicates.jsonl"
DAMAGED_FILE = "damaged.jsonl"
TOO_FEW = "each class needs at least two pictures, one of them to be kept for validation: add some, and --overwrite"
SHOWN = 3  # images or classes that are named on the terminal

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
            raise UsageError(f"--verify {check} prepares nothing", f"leave {source} out")
        _verify(reporter, check)
        return
    if source is None:
        raise UsageError("no SOURCE to prepare", "name a folder of pictures, or --verify DIR")
    with reporter.waiting("look", f"reading what is in {source}"):
        found = detect_source(source, val_fraction)
    _report_source(reporter, found)
    plan = Plan(found, output or default_output(source), quality, exif_rotate=exif_rotate)
    state = plan.state(overwrite)
    if state == "finished":
        _report_finished(reporter, plan, strict=on_corrupt == "fail")
        return
    needed, free = plan.estimate_bytes(), plan.free_bytes()
    sizes = f"about {format_size(needed)} needed, {format_size(free)} free"
    reporter.line("plan", f"shorter side to 256, middle 256x256, JPEG q{quality} → {plan.output}    {sizes}")
    if dry_run:
        reporter.result({
            "output": str(plan.output),
            "images": {name: len(items) for name, items in found.splits.items()},
            "classes": len(found.classes),
            "dry_run": True,
            "layout": found.layout,
            "bytes_needed": needed,
            "bytes_free": free,
        })  # fmt: skip
        return
    plan.check_space(needed)
    if state == "unfinished":
        reporter.line("resume", f"an earlier run was interrupted; its {plan.count_finished_shards():,} finished shards are kept")
    if overwrite and plan.output.is_dir():
        reporter.line("note", f"{plan.output} is being replaced: what was there is gone from now on")
    seen, seconds = _pack(reporter, plan, workers or count_cores(), on_corrupt, overwrite)
    _report_prepared(reporter, plan.output, seen, seconds)


def _report_source(reporter: Reporter, found: SourceDataset) -> None:
    """Say what was recognized, what was left out, and that training needs validation images."""
    numbers = " · ".join(f"{name} {len(items):,}" for name, items in found.splits.items())
    reporter.line("found", f"{numbers} images of {len(found.classes):,} classes    (layout: {found.layout})")
    for note in found.notes:
        reporter.line("note", note)
    if not found.splits["val"]:
        most = max(collections.Counter(found.splits["train"].labels).values(), default=0)
        few = "--val-fraction 0.1 takes one picture of each class" if most > 1 else TOO_FEW
        reporter.warn("no validation images, which training needs", few)


def _pack(reporter: Reporter, plan: Plan, workers: int, on_corrupt: OnCorrupt, overwrite: bool) -> tuple[int, float]:
    """Pack what is missing; returns how many pictures this run dealt with, and in how many seconds."""
    from alexnet_cli.core.data.prepare import pack

    seen, start = 0, time.perf_counter()
    try:
        with contextlib.closing(pack(plan, workers, on_corrupt, overwrite)) as steps:
            for split, group in itertools.groupby(steps, key=lambda step: step.split):
                left_out = 0
                with reporter.progress(split, total=len(plan.source.splits[split])) as bar:
                    for step in group:
                        left_out += step.rejected
                        if step.kept:
                            bar.skip(step.images)
                        else:
                            seen += step.images
                            bar.advance(step.images, f"{left_out:,} left out" if left_out else "")
    except (KeyboardInterrupt, Terminated) as stop:
        kept = plan.count_finished_shards()
        what = f"the {kept:,} finished shards stay in {plan.output}" if kept else "no shard was finished yet"
        again = "goes on where it stopped" if kept else "begins anew"
        without = " without --overwrite" if kept and overwrite else ""
        raise Stopped(
            f"interrupted: {what}", f"the same command{without} {again}", getattr(stop, "exit_code", 130)
        ) from None
    return seen, time.perf_counter() - start


def _verify(reporter: Reporter, folder: Path) -> None:
    """Every file of a data set against its recorded sum; VerificationError names those that differ."""
    from alexnet_cli.core.data.shards import find_dataset, list_checksums, open_dataset, verify_dataset

    dataset = open_dataset(find_dataset(str(folder)))
    files = list_checksums(dataset.record)
    with reporter.progress("verify", total=len(files), unit="files") as bar:
        for _ in verify_dataset(dataset):
            bar.advance(1)
    reporter.result({"output": str(dataset.path), "files": len(files), "verified": True})
    reporter.line("done", f"{dataset.path}: all {len(files)} files are as they were written")


def _report_prepared(reporter: Reporter, output: Path, seen: int, seconds: float) -> None:
    """The data set is complete; this run saw so many pictures in so many seconds.

    Raises:
        PartialError: some were left out.
    """
    from alexnet_cli.core.data.shards import open_dataset

    dataset = open_dataset(output)
    for line in _describe_statistics(dataset):
        reporter.line("stats", line)
    _warn_empty_classes(reporter, dataset)
    _report_turned(reporter, dataset)
    _report_duplicates(reporter, dataset)
    _report_damaged(reporter, dataset)
    _report_rejected(reporter, dataset)
    images = sum(split["images"] for split in dataset.record["splits"].values())
    total = images + dataset.record["rejected"]
    part = "" if seen == total else f"{seen:,} in this run, "
    speed = f"{images:,} images, {part}{seconds:.1f} s, {seen / seconds:,.0f} img/s"
    reporter.line("done", f"{output}  (dataset.json sha256 {dataset.hash[:12]}…)    {speed}")
    _report_result(reporter, dataset, seconds, seen / seconds)
    _raise_if_rejected(dataset)


def _report_finished(reporter: Reporter, plan: Plan, strict: bool) -> None:
    """Nothing is left to do: check that it is whole, and give the result again.

    Raises:
        PartialError: pictures were left out, and `strict`; otherwise nothing fails this time, and that is a note.
    """
    from alexnet_cli.core.data.shards import list_checksums, open_dataset

    dataset = open_dataset(plan.output)
    for name in dataset.record["splits"]:
        dataset.split(name)  # raises where files are missing
    missing = [name for name in list_checksums(dataset.record) if not (plan.output / name).is_file()]
    if missing:
        raise DataError(f"{plan.output / missing[0]} is missing", "prepare the data set again with --overwrite")
    plan.finalize()
    _report_turned(reporter, dataset)
    _report_rejected(reporter, dataset)
    reporter.line("done", f"{plan.output} is there already, of this source and with these settings")
    _report_result(reporter, dataset, 0.0, None)
    try:
        _raise_if_rejected(dataset)
    except PartialError as error:
        if strict:
            raise
        reporter.line("note", error.what)


def _report_result(reporter: Reporter, dataset: Dataset, seconds: float, rate: float | None) -> None:
    from alexnet_cli.core.devices import suggest_train_command

    images = {name: split["images"] for name, split in dataset.record["splits"].items()}
    if images.get("val"):
        reporter.line("next", f"{suggest_train_command()} --data {shlex.quote(str(dataset.path))}")
    counts = {key: dataset.record.get(key, 0) for key in ("rejected", "damaged", "turned")}
    found = {"classes": len(dataset.classes), **counts}
    timing = {"seconds": seconds, "images_per_second": rate}
    reporter.result({"output": str(dataset.path), "images": images, **found, **timing})


def _report_rejected(reporter: Reporter, dataset: Dataset) -> None:
    refused = dataset.rejected()
    for line in refused[:SHOWN]:
        reporter.warn(f"left out {line['path']}: {line['reason']}")
    if len(refused) > SHOWN:
        reporter.warn(f"left out {len(refused) - SHOWN:,} more: {dataset.path / REJECTED_FILE}")


def _raise_if_rejected(dataset: Dataset) -> None:
    """The command ends with exit code 5 where pictures were left out."""
    rejected = dataset.record["rejected"]
    if rejected:
        total = rejected + sum(split["images"] for split in dataset.record["splits"].values())
        were = "was" if rejected == 1 else "were"
        raise PartialError(
            f"{rejected:,} of {total:,} images {were} left out, as {dataset.path / REJECTED_FILE} lists",
            "the data set is complete without them; --on-corrupt fail stops at the first instead",
        )


def _describe_statistics(dataset: Dataset) -> list[str]:
    record = dataset.record
    width, height = (_spread(record["source_sizes"][side]) for side in ("width", "height"))
    mean = " ".join(f"{value:.1f}" for value in dataset.mean_rgb)
    per_class = f"{_spread(record['splits']['train']['images_per_class'])} training images per class"
    return [
        f"{len(dataset.classes):,} classes · {per_class} · mean RGB {mean} · mean image saved",
        f"pictures were {width} pixels wide, {height} high",
    ]


def _spread(values: Mapping[str, float]) -> str:
    low, middle, high = (values[key] for key in ("min", "median", "max"))
    return f"{low:,}" if low == high else f"{low:,} to {high:,} (median {middle:,.0f})"


def _warn_empty_classes(reporter: Reporter, dataset: Dataset) -> None:
    empty = [entry["name"] for entry in dataset.record["classes"] if not entry["images"]["train"]]
    if empty:
        named = ", ".join(empty[:SHOWN]) + (" …" if len(empty) > SHOWN else "")
        reporter.warn(f"no training images are left of {named}", "the network cannot learn what it never sees")


def _report_turned(reporter: Reporter, dataset: Dataset) -> None:
    """Phones store pictures lying on their side, and say in EXIF how they are to be turned."""
    turned, of = dataset.record.get("turned", 0), sum(split["images"] for split in dataset.record["splits"].values())
    if not turned:
        return
    were = f"{turned:,} of {of:,} pictures"
    if dataset.record["image"]["exif_rotate"]:
        reporter.line("note", f"{were} were turned, as EXIF says; predict does the same")
        return
    carry = "carries" if turned == 1 else "carry"
    hint = "--exif-rotate --overwrite turns them, and those that predict sees"
    reporter.warn(f"{were} {carry} an EXIF turn that is not followed", hint)


def _report_duplicates(reporter: Reporter, dataset: Dataset) -> None:
    """Equal pictures are worth a line, and a warning where they are in both splits, or under two labels."""
    from alexnet_cli.core.data.statistics import has_several

    found = dataset.record["duplicates"]
    if found["groups"]:
        reporter.line("note", f"{found['pictures']:,} pictures are copies of one another: {DUPLICATES_FILE}")
    listed = f"{DUPLICATES_FILE} lists them all"
    for key, count, where, hint in (
        ("split", found["across_splits"], "in train and in val", "the validation error will look too good"),
        ("class", found["across_classes"], "in two classes", "one of the labels is wrong: keep the right one"),
    ):
        if count:
            first = next(group for group in dataset.duplicates() if has_several(group, key))
            many = "1 picture is" if count == 1 else f"{count:,} pictures are"
            reporter.warn(
                f"{many} {where}: {_describe_pair(first, key)}{' …' if count > 1 else ''}", f"{hint}; {listed}"
            )


def _describe_pair(group: list[dict[str, str]], key: str) -> str:
    """The first of equal pictures, and the first that differs from it in its split or class."""
    other = next(entry for entry in group if entry[key] != group[0][key])
    return f"{group[0]['path']} = {other['path']}"


def _report_damaged(reporter: Reporter, dataset: Dataset) -> None:
    """Pictures of which the decoder had to make up a part, though it went on to their end."""
    found = dataset.record["damaged"]
    if found:
        are, they = ("picture is", "it") if found == 1 else ("pictures are", "they")
        reporter.line("note", f"{found:,} {are} damaged, and packed as far as {they} can be decoded: {DAMAGED_FILE}")
