"""`alexnet prepare`: recognise a data set and pack it once, into measured shards of 256x256 JPEGs."""

from __future__ import annotations

import contextlib
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import PartialError, Stopped, UsageError
from alexnet_cli.options import JsonFlag, QuietFlag

if TYPE_CHECKING:
    from alexnet_cli.core.plan import Plan
    from alexnet_cli.core.shards import Dataset

LAYOUTS = (
    "A folder: ImageNet as it is distributed (archives, Kaggle, Hugging Face parquet), train/CLASS and "
    "val/CLASS, one folder per class, or Tiny ImageNet."
)
FRACTION = "Part of each class to validate on, where the source has no such split.  [default: 0.1]"
CORRUPT = "Leave out and list images that cannot be decoded, or stop at the first."
EXIF = "Turn pictures as their EXIF orientation says; in 2012 nobody did."
VERIFY = "Read a prepared data set again and compare every sum, and quit."
DUPLICATES_FILE = "duplicates.jsonl"
SHOWN = 3  # refused files that are named on the terminal

OnCorrupt = Literal["skip", "fail"]


def prepare(
    source: Annotated[Path | None, typer.Argument(help=LAYOUTS, show_default=False)] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Default: prepared/NAME OF SOURCE.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Threads. Default: one per core.")] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="JPEG quality of the packed images.")] = 95,
    val_fraction: Annotated[float | None, typer.Option(help=FRACTION)] = None,
    on_corrupt: Annotated[OnCorrupt, typer.Option(help=CORRUPT)] = "skip",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and quit.")] = False,
    exif_rotate: Annotated[bool, typer.Option("--exif-rotate", help=EXIF)] = False,
    check: Annotated[Path | None, typer.Option("--verify", metavar="DIR", help=VERIFY)] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what is at the output.")] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Pack a folder of images once, for fast training.

    Interrupted, the same command goes on where it stopped. The source is never written to.
    """
    from alexnet_cli.core.devices import cores
    from alexnet_cli.core.plan import Plan, default_output, megabytes
    from alexnet_cli.core.shards import open_dataset
    from alexnet_cli.core.sources import recognise

    reporter = Reporter("prepare", json=json, quiet=quiet)
    if check is not None:
        _verify(reporter, check)
        return
    if source is None:
        raise UsageError("no SOURCE to prepare", "name a folder of pictures, or --verify DIR")
    with reporter.waiting("look", f"reading what is in {source}"):
        found = recognise(source, val_fraction)
    counts = {name: len(items) for name, items in found.splits.items()}
    numbers = " · ".join(f"{name} {count:,}" for name, count in counts.items())
    reporter.line("found", f"{numbers} images of {len(found.classes):,} classes    (layout: {found.layout})")
    for note in found.notes:
        reporter.line("note", note)
    if not counts["val"]:
        reporter.warn("no validation images", "training will not be able to say how good it is; see --val-fraction")
    plan = Plan(found, output or default_output(source), quality, exif_rotate=exif_rotate)
    state = plan.state(overwrite)
    if state == "finished":
        _there_already(reporter, plan)
        return
    needed, free = plan.estimate(), plan.free()
    sizes = f"about {megabytes(needed)} needed, {megabytes(free)} free"
    reporter.line("plan", f"shorter side to 256, middle 256x256, JPEG q{quality} → {plan.output}    {sizes}")
    if dry_run:
        record = {
            "output": str(plan.output),
            "images": counts,
            "classes": len(found.classes),
            "dry_run": True,
        }
        reporter.result(record | {"layout": found.layout, "bytes_needed": needed, "bytes_free": free})
        return
    plan.check_space(needed)
    if state == "unfinished":
        reporter.line("resume", "an earlier run was interrupted; what it finished is kept")
    start = time.perf_counter()
    packed = _pack(reporter, plan, workers or cores(), on_corrupt, overwrite)
    seconds = time.perf_counter() - start
    dataset = open_dataset(plan.output)
    for line in _statistics(dataset):
        reporter.line("stats", line)
    _duplicates(reporter, dataset)
    speed = f"{packed:,} images in {seconds:.1f} s, {packed / seconds:,.0f} img/s"
    reporter.line("done", f"{plan.output}  (dataset.json sha256 {dataset.hash[:12]}…)    {speed}")
    _result(reporter, dataset, seconds, packed / seconds)
    _rejected(reporter, dataset)


def _pack(reporter: Reporter, plan: Plan, workers: int, on_corrupt: OnCorrupt, overwrite: bool) -> int:
    """Pack what is missing; returns how many images this run packed."""
    from alexnet_cli.core.packing import pack

    packed = rejected = done = 0
    try:
        with contextlib.closing(pack(plan, workers, on_corrupt, overwrite)) as steps:
            for split, group in itertools.groupby(steps, key=lambda step: step.split):
                with reporter.progress(split, total=len(plan.source.splits[split])) as bar:
                    for step in group:
                        done += step.images
                        packed += 0 if step.kept else step.images
                        rejected += step.rejected
                        bar.advance(step.images, f"{rejected:,} refused" if rejected else "")
    except KeyboardInterrupt:
        what = f"interrupted after {done:,} images; the finished shards stay in {plan.output}"
        raise Stopped(what, "the same command goes on where it stopped", 130) from None
    return packed


def _there_already(reporter: Reporter, plan: Plan) -> None:
    from alexnet_cli.core.assembly import settle
    from alexnet_cli.core.shards import open_dataset

    dataset = open_dataset(plan.output)
    for name in dataset.record["splits"]:
        dataset.split(name)  # raises where files are missing
    settle(plan.output)
    reporter.line("done", f"{plan.output} is there already, of this source and with these settings")
    _result(reporter, dataset, 0.0, None)
    _rejected(reporter, dataset)


def _result(reporter: Reporter, dataset: Dataset, seconds: float, rate: float | None) -> None:
    reporter.line("next", f"alexnet train --data {dataset.path}")
    images = {name: split["images"] for name, split in dataset.record["splits"].items()}
    found = {"classes": len(dataset.classes), "rejected": dataset.record["rejected"]}
    timing = {"seconds": seconds, "images_per_second": rate}
    reporter.result({"output": str(dataset.path), "images": images, **found, **timing})


def _rejected(reporter: Reporter, dataset: Dataset) -> None:
    refused = dataset.rejected()
    if not refused:
        return
    for line in refused[:SHOWN]:
        reporter.warn(f"{line['path']}: {line['reason']}")
    total = len(refused) + sum(split["images"] for split in dataset.record["splits"].values())
    raise PartialError(
        f"{len(refused):,} of {total:,} images were left out, as {dataset.path / 'rejected.jsonl'} lists",
        "the data set is complete without them; --on-corrupt fail stops at the first instead",
    )


def _statistics(dataset: Dataset) -> list[str]:
    record = dataset.record
    spread = "{min:,}-{max:,} training images per class, median {median:,.0f}".format(
        **record["splits"]["train"]["images_per_class"]
    )
    width, height = (
        "{min:,}-{max:,} (median {median:,.0f})".format(**record["source_sizes"][side]) for side in ("width", "height")
    )
    mean = " ".join(f"{value:.1f}" for value in dataset.mean_rgb)
    return [
        f"{len(dataset.classes):,} classes · {spread} · mean RGB {mean} · mean image saved",
        f"pictures were {width} pixels wide, {height} high",
    ]


def _duplicates(reporter: Reporter, dataset: Dataset) -> None:
    """Equal pictures are worth a line; ones that are in both splits make the validation error look too good."""
    found = dataset.record["duplicates"]
    if found["groups"]:
        reporter.line("note", f"{found['pictures']:,} pictures are copies of one another: {DUPLICATES_FILE}")
    if found["across_splits"]:
        leaks = [group for group in dataset.duplicates() if len({entry["split"] for entry in group}) > 1]
        names = ", ".join(" = ".join(entry["path"] for entry in group[:2]) for group in leaks[:SHOWN])
        reporter.warn(
            f"{found['across_splits']:,} pictures are in train and in val: {names}{' …' if len(leaks) > SHOWN else ''}",
            f"the validation error will look too good; {DUPLICATES_FILE} lists them all",
        )


def _verify(reporter: Reporter, folder: Path) -> None:
    """Every file of a data set against its recorded sum; VerificationError for the first that differs."""
    from alexnet_cli.core.shards import checksums, open_dataset, verify

    dataset = open_dataset(folder)
    files = checksums(dataset.record)
    with reporter.progress("verify", total=len(files), unit="files") as bar:
        for _ in verify(dataset):
            bar.advance(1)
    reporter.result({"output": str(folder), "files": len(files), "verified": True})
    reporter.line("done", f"{folder}: all {len(files)} files are as they were written")
