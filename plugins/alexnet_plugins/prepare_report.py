"""What `alexnet prepare` says of a data set once it is there: statistics, copies, pictures that were left out."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_cli.console import Reporter
from alexnet_cli.errors import DataError, PartialError

if TYPE_CHECKING:
    from alexnet_cli.core.plan import Plan
    from alexnet_cli.core.shards import Dataset

REJECTED_FILE = "rejected.jsonl"
DUPLICATES_FILE = "duplicates.jsonl"
DAMAGED_FILE = "damaged.jsonl"
TOO_FEW = "each class needs at least two pictures, one of them to be kept for validation: add some, and --overwrite"
SHOWN = 3  # pictures or classes that are named on the terminal


def prepared(reporter: Reporter, output: Path, seen: int, seconds: float) -> None:
    """The data set is complete; this run saw so many pictures in so many seconds.

    Raises:
        PartialError: some were left out.
    """
    from alexnet_cli.core.shards import open_dataset

    dataset = open_dataset(output)
    for line in _statistics(dataset):
        reporter.line("stats", line)
    _empty_classes(reporter, dataset)
    _turned(reporter, dataset)
    _duplicates(reporter, dataset)
    _damaged(reporter, dataset)
    _name_left_out(reporter, dataset)
    images = sum(split["images"] for split in dataset.record["splits"].values())
    total = images + dataset.record["rejected"]
    part = "" if seen == total else f"{seen:,} in this run, "
    speed = f"{images:,} images, {part}{seconds:.1f} s, {seen / seconds:,.0f} img/s"
    reporter.line("done", f"{output}  (dataset.json sha256 {dataset.hash[:12]}…)    {speed}")
    _result(reporter, dataset, seconds, seen / seconds)
    _left_out(dataset)


def there_already(reporter: Reporter, plan: Plan, strict: bool) -> None:
    """Nothing is left to do: check that it is whole, and give the result again.

    Raises:
        PartialError: pictures were left out, and `strict`; otherwise nothing fails this time, and that is a note.
    """
    from alexnet_cli.core.assembly import settle
    from alexnet_cli.core.dataset_record import checksums
    from alexnet_cli.core.shards import open_dataset

    dataset = open_dataset(plan.output)
    for name in dataset.record["splits"]:
        dataset.split(name)  # raises where files are missing
    missing = [name for name in checksums(dataset.record) if not (plan.output / name).is_file()]
    if missing:
        raise DataError(f"{plan.output / missing[0]} is missing", "prepare the data set again with --overwrite")
    settle(plan.output)
    _turned(reporter, dataset)
    _name_left_out(reporter, dataset)
    reporter.line("done", f"{plan.output} is there already, of this source and with these settings")
    _result(reporter, dataset, 0.0, None)
    try:
        _left_out(dataset)
    except PartialError as error:
        if strict:
            raise
        reporter.line("note", error.what)


def _result(reporter: Reporter, dataset: Dataset, seconds: float, rate: float | None) -> None:
    from alexnet_cli.core.devices import train_command

    images = {name: split["images"] for name, split in dataset.record["splits"].items()}
    if images.get("val"):
        reporter.line("next", f"{train_command()} --data {shlex.quote(str(dataset.path))}")
    counts = {key: dataset.record.get(key, 0) for key in ("rejected", "damaged", "turned")}
    found = {"classes": len(dataset.classes), **counts}
    timing = {"seconds": seconds, "images_per_second": rate}
    reporter.result({"output": str(dataset.path), "images": images, **found, **timing})


def _name_left_out(reporter: Reporter, dataset: Dataset) -> None:
    refused = dataset.rejected()
    for line in refused[:SHOWN]:
        reporter.warn(f"left out {line['path']}: {line['reason']}")
    if len(refused) > SHOWN:
        reporter.warn(f"left out {len(refused) - SHOWN:,} more: {dataset.path / REJECTED_FILE}")


def _left_out(dataset: Dataset) -> None:
    """The command ends with exit code 5 where pictures were left out."""
    rejected = dataset.record["rejected"]
    if rejected:
        total = rejected + sum(split["images"] for split in dataset.record["splits"].values())
        were = "was" if rejected == 1 else "were"
        raise PartialError(
            f"{rejected:,} of {total:,} images {were} left out, as {dataset.path / REJECTED_FILE} lists",
            "the data set is complete without them; --on-corrupt fail stops at the first instead",
        )


def _statistics(dataset: Dataset) -> list[str]:
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


def _empty_classes(reporter: Reporter, dataset: Dataset) -> None:
    empty = [entry["name"] for entry in dataset.record["classes"] if not entry["images"]["train"]]
    if empty:
        named = ", ".join(empty[:SHOWN]) + (" …" if len(empty) > SHOWN else "")
        reporter.warn(f"no training images are left of {named}", "the network cannot learn what it never sees")


def _turned(reporter: Reporter, dataset: Dataset) -> None:
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


def _duplicates(reporter: Reporter, dataset: Dataset) -> None:
    """Equal pictures are worth a line, and a warning where they are in both splits, or under two labels."""
    from alexnet_cli.core.census import differ

    found = dataset.record["duplicates"]
    if found["groups"]:
        reporter.line("note", f"{found['pictures']:,} pictures are copies of one another: {DUPLICATES_FILE}")
    listed = f"{DUPLICATES_FILE} lists them all"
    for key, count, where, hint in (
        ("split", found["across_splits"], "in train and in val", "the validation error will look too good"),
        ("class", found["across_classes"], "in two classes", "one of the labels is wrong: keep the right one"),
    ):
        if count:
            first = next(group for group in dataset.duplicates() if differ(group, key))
            many = "1 picture is" if count == 1 else f"{count:,} pictures are"
            reporter.warn(f"{many} {where}: {_two(first, key)}{' …' if count > 1 else ''}", f"{hint}; {listed}")


def _two(group: list[dict[str, str]], key: str) -> str:
    """The first of equal pictures, and the first that differs from it in its split or class."""
    other = next(entry for entry in group if entry[key] != group[0][key])
    return f"{group[0]['path']} = {other['path']}"


def _damaged(reporter: Reporter, dataset: Dataset) -> None:
    """Pictures of which the decoder had to make up a part, though it went on to their end."""
    found = dataset.record["damaged"]
    if found:
        are, they = ("picture is", "it") if found == 1 else ("pictures are", "they")
        reporter.line("note", f"{found:,} {are} damaged, and packed as far as {they} can be decoded: {DAMAGED_FILE}")
