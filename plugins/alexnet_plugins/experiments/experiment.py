"""An experiment of the paper: its claim, the work to do, and the result as a folder with a page, tables and charts."""

from __future__ import annotations

import csv
import io
import json
import platform
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jinja2 import Environment, PackageLoader, StrictUndefined

import alexnet_cli
from alexnet_cli.core.devices import count_cores, cpu_name
from alexnet_cli.core.drawing import use_own_style
from alexnet_cli.core.files import write_chunks
from alexnet_cli.core.report.charts import STYLE, can_draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from alexnet_cli.core.parallel.placement import Placement

Verdict = Literal["agrees", "disagrees", "undecided"]
TableValue = str | int | float | None


@dataclass(frozen=True)
class Job:
    """What an experiment runs with: its data, the folder of its results, the device, and the command line.

    `stop` returns a reason to stop, or None. `advance` counts images and shows a note; any thread may call it.
    """

    data: Path
    folder: Path
    placement: Placement
    command: Sequence[str]
    stop: Callable[[], str | None]
    advance: Callable[[int, str], None]


@dataclass(frozen=True)
class Table:
    """Rows under headings; `name` is the name of its CSV file."""

    name: str
    caption: str
    headings: Sequence[str]
    rows: Sequence[Sequence[TableValue]]


@dataclass(frozen=True)
class Chart:
    """A chart, which needs matplotlib to `draw`; `data` are its points, `caption` says what it shows."""

    draw: Callable[[], Figure]
    caption: str
    data: Table


@dataclass(frozen=True)
class Result:
    """What came out of an experiment so far.

    `finding` is a sentence with the numbers, `protocol` and `limits` are paragraphs, `missing` says what has not been
    trained yet, and `machines` what trained the rest: the trainings of a folder may be from several.
    """

    verdict: Verdict
    finding: str
    protocol: Sequence[str]
    limits: Sequence[str]
    tables: Sequence[Table]
    chart: Chart
    missing: Sequence[str] = ()
    machines: Sequence[str] = ()


@dataclass(frozen=True)
class Experiment:
    """An experiment: `train` does what is left of the work in a job's folder, `conclude` reads the folder.

    `data` is the name of the data set, `time` an estimate of how long it takes, `found` the published result.
    """

    name: str
    section: str
    claim: str
    data: str
    time: str
    found: str
    train: Callable[[Job], None]
    conclude: Callable[[Path], Result]


def write_result(experiment: Experiment, result: Result, job: Job) -> list[Path]:
    """Write the page, its data and its chart into the job's folder. Returns the files.

    Raises:
        OSError: a file cannot be written.
    """
    images = _draw_chart(result.chart)
    about = {"command": shlex.join(job.command), "machines": list(result.machines)}
    record = {
        "schema": "alexnet.reproduce/1", "experiment": experiment.name, "claim": experiment.claim, **about,
        "verdict": result.verdict, "finding": result.finding, "missing": list(result.missing),
        "tables": [asdict(table) for table in result.tables],
    }  # fmt: skip
    environment = Environment(
        loader=PackageLoader("alexnet_plugins.experiments"), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("page.html").render(
        experiment=experiment, result=result, has_chart=bool(images), **about
    )
    text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    contents = {"index.html": page.encode(), "result.json": text.encode(), **images}
    contents |= {f"{table.name}.csv": _format_csv(table).encode() for table in (*result.tables, result.chart.data)}
    for name, content in contents.items():
        write_chunks(job.folder / name, [content])
    return [job.folder / name for name in contents]


def describe_diverged(names: Sequence[str]) -> str:
    """Return a sentence on trainings whose loss became NaN, to append to a finding; "" if there are none."""
    return f" Diverged: {', '.join(names)}." if names else ""


def describe_machine(placement: Placement) -> str:
    """Return device, precision and versions in a line."""
    device = cpu_name() if placement.device.type == "cpu" else placement.name
    versions = f"alexnet {alexnet_cli.__version__}, Python {platform.python_version()}, torch {version('torch')}"
    return f"{device}, {count_cores()} cores, {placement.precision}; {versions}"


def _format_csv(table: Table) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([table.headings, *table.rows])
    return text.getvalue()


def _draw_chart(chart: Chart) -> dict[str, bytes]:
    """The chart as chart.png and chart.svg; nothing without matplotlib."""
    images: dict[str, bytes] = {}
    if not can_draw():
        return images
    with use_own_style(STYLE):
        figure = chart.draw()
        for suffix in ("png", "svg"):
            file = io.BytesIO()
            figure.savefig(file, format=suffix, dpi=130, metadata={"Date": None} if suffix == "svg" else None)
            images[f"chart.{suffix}"] = file.getvalue()
    return images
