"""`alexnet benchmark`: ours and what a user would use instead, measured side by side on this machine."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import DataError
from alexnet_cli.options import GpusOption, JsonFlag, QuietFlag

if TYPE_CHECKING:
    from rich.table import Table

    from alexnet_cli.core.data.shards import Dataset
    from alexnet_plugins.benchmark.stopwatch import Contest, Times

PACKAGES = ("alexnet-cli", "torch", "torchvision", "onnxruntime-gpu", "onnxruntime", "pillow", "simplejpeg", "numpy",
            "opencv-python-headless", "opencv-python", "nvidia-dali-cuda120", "nvidia-dali-cuda130")  # fmt: skip


class Topic(StrEnum):
    """What can be measured."""

    prepare = "prepare"
    load = "load"
    train = "train"
    infer = "infer"
    startup = "startup"
    parallel = "parallel"
    all = "all"


@dataclass(frozen=True)
class Setting:
    """What a topic measures with; `scratch` is an empty folder of its own."""

    scratch: Path
    pictures: Path | None
    data: str | None
    images: int
    workers: int
    batch_size: int | None
    gpus: str | None


Opening = Callable[[Setting], Generator["Contest"]]
"""Sets up each contest of a topic in turn; what it stands on is there until the next is asked for."""


def benchmark(
    topic: Annotated[Topic, typer.Argument(help="What to measure.")] = Topic.all,
    pictures: Annotated[
        Path | None, typer.Option(help="Measure on the JPEGs in this folder. [default: drawn ones of 500x375]")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Measure loading on this prepared data set.")
    ] = None,
    images: Annotated[
        int, typer.Option(min=16, help="How many pictures; those of a smaller folder are used again.")
    ] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="The shortest time a timing may take.")] = 1.0,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Threads, or processes. [default: one per core]")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            min=1,
            help="Pictures a step, or at a time. [default: 64; train on a GPU: 128; infer: 1, then 64]",
        ),
    ] = None,
    gpus: GpusOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Time ours against what is used otherwise.

    On the same files and with the same workers. All take turns, round after round; medians, slowest and fastest
    rounds, and ratios are shown.
    """
    from alexnet_cli.core.devices import count_cores
    from alexnet_plugins.benchmark import stopwatch

    reporter = Reporter("benchmark", json=json, quiet=quiet)
    workers = jobs or count_cores()
    chosen = list(TOPICS) if topic is Topic.all else [topic]
    for name in chosen:
        machine = stopwatch.describe_hardware(workers)
        with (
            tempfile.TemporaryDirectory(prefix="alexnet-benchmark-") as scratch,
            contextlib.closing(
                TOPICS[name](Setting(Path(scratch), pictures, data, images, workers, batch_size, gpus))
            ) as contests,
        ):
            for contest in contests:
                times = _rounds(reporter, contest, rounds, seconds)
                about = {"hardware": machine, "versions": stopwatch.installed_versions(PACKAGES)}
                reporter.result({**times.as_dict(), **about})
                _show(reporter, times, about)


def _rounds(reporter: Reporter, contest: Contest, count: int, seconds: float) -> Times:
    from alexnet_plugins.benchmark import stopwatch

    times = stopwatch.Times.of(contest)
    with reporter.progress(contest.name, total=count, unit="rounds") as bar:
        for _ in stopwatch.run_rounds(times, count, seconds if contest.unit == "img/s" else 0):
            bar.advance(1)
    return times


def _show(reporter: Reporter, times: Times, about: dict[str, Any]) -> None:
    """The table, and under it what it was measured on."""
    from rich.table import Table

    found = times.as_dict()
    table = Table(found["name"], found["unit"], "lowest", "highest", "ours is", box=None)
    shape = ",.0f" if found["unit"] == "img/s" else ".2f"
    for name, value in {"ours": found["ours"], **found["peers"]}.items():
        low, high = found["spread"][name]
        ratio = f"{found['ratio'][name]:.2f} x" if name in found["ratio"] else ""
        table.add_row(name, *(format(number, shape) for number in (value, low, high)), ratio)
    reporter.show(table)
    if "sent_bytes" in found:
        reporter.show(_sent(found["sent_bytes"]))
    if "tflops" in found:
        reporter.show(f"ours: {found['tflops']:,.2f} TFLOP/s, at {found['gflop_per_image']:.2f} GFLOP an image")
    for name, cost in found["seconds"].items():
        reporter.show(f"{name}: {cost * 1000:,.1f} ms")
    for name in found["missing"]:
        reporter.show(f"{name} is not installed: left out")
    for note in found["notes"]:
        reporter.show(note)
    machine = about["hardware"]
    load = "" if machine["load_before"] is None else f", load {machine['load_before']:.1f} before"
    reporter.show(f"{machine['cpu']}, {machine['cores']} cores, {machine['workers']} workers{load}")
    reporter.show(" · ".join(f"{name} {number}" for name, number in about["versions"].items()))


def _sent(found: dict[str, dict[str, float]]) -> Table:
    """The bytes that a process sends in a step, by layer, beside those of data parallelism."""
    from rich.table import Table

    table = Table("sent, MB", *found, box=None)
    for layer in sorted(set().union(*found.values())):
        table.add_row(layer, *(f"{layers[layer] / 1e6:,.2f}" if layer in layers else "" for layers in found.values()))
    total = {name: sum(layers.values()) for name, layers in found.items()}
    table.add_row("all", *(f"{size / 1e6:,.2f}" for size in total.values()))
    table.add_row("of data's", *(f"{size / total['data']:.1%}" for size in total.values()))
    return table


def _prepare(setting: Setting) -> Generator[Contest]:
    from alexnet_plugins.benchmark.data import compare_prepare

    source, paths, note = _source(setting)
    with compare_prepare(source, paths, setting.workers, setting.scratch, [note]) as contest:
        yield contest


def _load(setting: Setting) -> Generator[Contest]:
    from alexnet_plugins.benchmark.data import compare_load

    dataset, note = _dataset(setting)
    with compare_load(dataset.split("train"), setting.workers, setting.scratch, [note]) as contest:
        yield contest


def _train(setting: Setting) -> Generator[Contest]:
    from alexnet_plugins.benchmark.training import compare_training

    yield from compare_training(setting.gpus, setting.batch_size, setting.workers, lambda: _dataset(setting))


def _infer(setting: Setting) -> Generator[Contest]:
    from alexnet_cli.core.parallel.placement import place
    from alexnet_plugins.benchmark.inference import compare_inference

    placement = place(setting.gpus, "fp32")
    low = place(setting.gpus, "bf16").precision == "bf16"
    yield from compare_inference(placement, setting.batch_size, setting.workers, setting.scratch, bf16=low)


def _startup(setting: Setting) -> Generator[Contest]:
    from alexnet_plugins.benchmark import images as benchmark_pictures
    from alexnet_plugins.benchmark.inference import compare_startup

    own = benchmark_pictures.files(setting.pictures, 1) if setting.pictures else []
    yield from compare_startup(setting.scratch, own[0] if own else None)


def _parallel(setting: Setting) -> Generator[Contest]:
    from alexnet_plugins.benchmark.parallel import compare_parallel

    yield from compare_parallel(setting.gpus, setting.batch_size, setting.workers)


def _dataset(setting: Setting) -> tuple[Dataset, str]:
    """The data set that was named, or one prepared for this, and a sentence about it."""
    from alexnet_cli.core.data.plan import Plan
    from alexnet_cli.core.data.prepare import pack
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.data.sources import detect_source

    if setting.data is not None:
        path = find_dataset(setting.data)
        return open_dataset(path), f"measured on the training split of {path}"
    source, _, note = _source(setting)
    path = setting.scratch / "prepared"
    for _ in pack(Plan(detect_source(source), path), setting.workers):
        pass
    return open_dataset(path), f"{note}, prepared"


def _source(setting: Setting) -> tuple[Path, list[Path], str]:
    """A folder with train/CLASS and val/CLASS, the pictures in it, and a sentence about them."""
    from alexnet_plugins.benchmark import images as benchmark_pictures

    source = setting.scratch / "source"
    if setting.pictures is None:
        benchmark_pictures.draw(source, setting.images)
        note = f"measured on {setting.images:,} pictures of about 500x375, drawn for it (--pictures: your own)"
    else:
        if not setting.pictures.is_dir():
            raise DataError(f"{setting.pictures} is not a folder", "name one with some hundreds of JPEGs")
        chosen = benchmark_pictures.files(setting.pictures, setting.images)
        if len(chosen) < benchmark_pictures.CLASSES:
            raise DataError(f"{setting.pictures} holds {len(chosen)} JPEGs", "name a folder with some hundreds")
        again = -(-setting.images // len(chosen))
        benchmark_pictures.tree((chosen * again)[: setting.images], source)
        times = f", each up to {again} times" if again > 1 else ""
        note = f"measured on {setting.images:,} pictures: {len(chosen):,} of {setting.pictures}{times}"
    return source, sorted(source.rglob("*.jpg")), note


TOPICS: dict[Topic, Opening] = {
    Topic.prepare: _prepare,
    Topic.load: _load,
    Topic.train: _train,
    Topic.infer: _infer,
    Topic.startup: _startup,
    Topic.parallel: _parallel,
}
"""The contestants of each topic. A new topic is a file beside this one, a name in Topic and an entry here."""
