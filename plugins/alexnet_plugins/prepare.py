"""`alexnet prepare`: recognise a data set and pack it once, into measured shards of 256x256 JPEGs."""

from __future__ import annotations

import collections
import contextlib
import itertools
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import Stopped, Terminated, UsageError
from alexnet_cli.options import JsonFlag, QuietFlag

if TYPE_CHECKING:
    from alexnet_cli.core.plan import Plan

LAYOUTS = (
    "A folder: ImageNet as it is distributed (archives, Kaggle, Hugging Face parquet), train/CLASS and "
    "val/CLASS, one folder per class, or Tiny ImageNet."
)
FRACTION = "Part of each class to validate on, where the source has no such split.  [default: 0.1]"
CORRUPT = "Leave out and list images that cannot be decoded, or stop at the first."
EXIF = "Turn pictures as their EXIF orientation says; in 2012 nobody did."
VERIFY = "Read a prepared data set again and compare every sum, and quit."

OnCorrupt = Literal["skip", "fail"]


def prepare(
    source: Annotated[Path | None, typer.Argument(metavar="SOURCE", help=LAYOUTS, show_default=False)] = None,
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
    from alexnet_cli.core.sources import recognise
    from alexnet_plugins import prepare_report

    reporter = Reporter("prepare", json=json, quiet=quiet)
    if check is not None:
        if source is not None:
            raise UsageError(f"--verify {check} prepares nothing", f"leave {source} out")
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
        most = max(collections.Counter(found.splits["train"].labels).values(), default=0)
        few = "--val-fraction 0.1 takes one picture of each class" if most > 1 else prepare_report.TOO_FEW
        reporter.warn("no validation images, which training needs", few)
    plan = Plan(found, output or default_output(source), quality, exif_rotate=exif_rotate)
    state = plan.state(overwrite)
    if state == "finished":
        prepare_report.there_already(reporter, plan, strict=on_corrupt == "fail")
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
        reporter.line("resume", f"an earlier run was interrupted; its {plan.shards_kept():,} finished shards are kept")
    if overwrite and plan.output.is_dir():
        reporter.line("note", f"{plan.output} is being replaced: what was there is gone from now on")
    seen, seconds = _pack(reporter, plan, workers or cores(), on_corrupt, overwrite)
    prepare_report.prepared(reporter, plan.output, seen, seconds)


def _pack(reporter: Reporter, plan: Plan, workers: int, on_corrupt: OnCorrupt, overwrite: bool) -> tuple[int, float]:
    """Pack what is missing; returns how many pictures this run dealt with, and in how many seconds."""
    from alexnet_cli.core.packing import pack

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
        kept = plan.shards_kept()
        what = f"the {kept:,} finished shards stay in {plan.output}" if kept else "no shard was finished yet"
        again = "goes on where it stopped" if kept else "begins anew"
        without = " without --overwrite" if kept and overwrite else ""
        raise Stopped(
            f"interrupted: {what}", f"the same command{without} {again}", getattr(stop, "exit_code", 130)
        ) from None
    return seen, time.perf_counter() - start


def _verify(reporter: Reporter, folder: Path) -> None:
    """Every file of a data set against its recorded sum; VerificationError names those that differ."""
    from alexnet_cli.core.dataset_record import checksums
    from alexnet_cli.core.shards import find_dataset, open_dataset, verify

    dataset = open_dataset(find_dataset(str(folder)))
    files = checksums(dataset.record)
    with reporter.progress("verify", total=len(files), unit="files") as bar:
        for _ in verify(dataset):
            bar.advance(1)
    reporter.result({"output": str(dataset.path), "files": len(files), "verified": True})
    reporter.line("done", f"{dataset.path}: all {len(files)} files are as they were written")
