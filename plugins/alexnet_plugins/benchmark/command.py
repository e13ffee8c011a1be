"""`alexnet benchmark`: ours and the usual alternatives, timed in turn on this machine."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
from collections.abc import Generator, Mapping, Sequence
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.core.devices import cpu_name
from alexnet_cli.options import GpusOption, JsonFlag, QuietFlag, complete_data

if TYPE_CHECKING:
    from rich.table import Table

    from alexnet_plugins.benchmark.timing import BenchmarkCase, BenchmarkOptions

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


def benchmark(
    topic: Annotated[Topic, typer.Argument(help="What to measure")] = Topic.all,
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of JPEGs to measure on [default: drawn images of 500x375]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            metavar="D",
            help="Prepared data set to measure loading on [default: one made from the images]",
            autocompletion=complete_data,
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=16, help="Number of images; those of a smaller folder repeat")] = 512,
    rounds: Annotated[int, typer.Option(min=1, help="Number of rounds")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="Shortest duration of one timing")] = 1.0,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Threads or processes of each [default: one per core]")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "-b",
            min=1,
            help="Images per step or call [default: 64; train on a GPU: 128; infer: 1, then 64]",
        ),
    ] = None,
    gpus: GpusOption = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Compare speed with other libraries on this machine.

    All get the same files and workers and take turns, round after round. Shows medians, slowest and fastest rounds,
    and ratios.
    """
    from alexnet_cli.core.devices import count_cores
    from alexnet_plugins.benchmark.timing import BenchmarkOptions, Timings

    reporter = Reporter("benchmark", json=json, quiet=quiet)
    workers = jobs or count_cores()
    for name in [name for name in Topic if name is not Topic.all] if topic is Topic.all else [topic]:
        hardware = _describe_hardware(workers)
        with tempfile.TemporaryDirectory(prefix="alexnet-benchmark-") as scratch:
            options = BenchmarkOptions(Path(scratch), pictures, data, images, workers, batch_size, gpus)
            with contextlib.closing(_make_cases(name, options)) as cases:
                for case in cases:
                    timings = Timings(case)
                    with reporter.progress(case.name, total=rounds, unit="rounds") as bar:
                        for _ in timings.run_rounds(rounds, seconds if case.unit == "img/s" else 0):
                            bar.advance(1)
                    record = timings.to_dict() | {"hardware": hardware, "versions": _find_versions(PACKAGES)}
                    reporter.result(record)
                    _show(reporter, record)


def _make_cases(topic: Topic, options: BenchmarkOptions) -> Generator[BenchmarkCase]:
    """Return the cases of a topic. Each is valid until the next is requested."""
    if topic in (Topic.prepare, Topic.load):
        from alexnet_plugins.benchmark import data

        return data.compare_prepare(options) if topic is Topic.prepare else data.compare_load(options)
    if topic is Topic.train:
        from alexnet_plugins.benchmark.training import compare_training

        return compare_training(options)
    if topic is Topic.parallel:
        from alexnet_plugins.benchmark.parallel import compare_parallel

        return compare_parallel(options)
    from alexnet_plugins.benchmark import inference

    return inference.compare_startup(options) if topic is Topic.startup else inference.compare_inference(options)


def _show(reporter: Reporter, record: Mapping[str, Any]) -> None:
    """Show the table and the conditions under it."""
    from rich.table import Table

    table = Table(record["name"], record["unit"], "lowest", "highest", "ours is", box=None)
    number_format = ",.0f" if record["unit"] == "img/s" else ".2f"
    for name, median in {"ours": record["ours"], **record["peers"]}.items():
        values = [format(value, number_format) for value in (median, *record["spread"][name])]
        table.add_row(name, *values, f"{record['ratio'][name]:.2f} x" if name in record["ratio"] else "")
    reporter.show(table)
    if "sent_bytes" in record:
        reporter.show(_make_bytes_table(record["sent_bytes"]))
    if "tflops" in record:
        reporter.show(f"ours: {record['tflops']:,.2f} TFLOP/s, {record['gflop_per_image']:.2f} GFLOP per image")
    for name, cost in record["seconds"].items():
        reporter.show(f"{name}: {cost * 1000:,.1f} ms")
    for name in record["missing"]:
        reporter.show(f"{name} is not installed: left out")
    for note in record["notes"]:
        reporter.show(note)
    hardware = record["hardware"]
    load = "" if hardware["load_before"] is None else f", load {hardware['load_before']:.1f} before"
    reporter.show(f"{hardware['cpu']}, {hardware['cores']} cores, {hardware['workers']} workers{load}")
    reporter.show(" · ".join(f"{name} {number}" for name, number in record["versions"].items()))


def _make_bytes_table(sent_bytes: Mapping[str, Mapping[str, float]]) -> Table:
    """Return a table of the MB that a process sends in a step, by layer, and their share of data parallelism's."""
    from rich.table import Table

    table = Table("sent, MB", *sent_bytes, box=None)
    for layer in sorted(set().union(*sent_bytes.values())):
        cells = (f"{layers[layer] / 1e6:,.2f}" if layer in layers else "" for layers in sent_bytes.values())
        table.add_row(layer, *cells)
    totals = {name: sum(layers.values()) for name, layers in sent_bytes.items()}
    table.add_row("all", *(f"{total / 1e6:,.2f}" for total in totals.values()))
    table.add_row("share of data", *(f"{total / totals['data']:.1%}" for total in totals.values()))
    return table


def _describe_hardware(workers: int) -> dict[str, Any]:
    """Return the CPU, its cores, the workers used, and the load of the machine."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "workers": workers, "load_before": load}


def _find_versions(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions
