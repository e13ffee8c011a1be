"""`alexnet neighbors`: figure 4 (right) of the paper, the training pictures nearest to a picture in layer 7."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alexnet_cli.console import Reporter, make_printable
from alexnet_cli.errors import PartialError, StorageError, UsageError
from alexnet_cli.options import JsonFlag, OwnDataOption, QuietFlag, WeightsOption

if TYPE_CHECKING:
    from alexnet_cli.core.analysis.neighbors import Vectors
    from alexnet_cli.core.data.images import ImageArray
    from alexnet_cli.core.data.shards import Dataset, Split
    from alexnet_cli.core.drawing import Row
    from alexnet_cli.core.inference.inputs import ImageInput
    from alexnet_cli.core.inference.session import Session

BATCH = 32  # pictures that are searched in one reading of the index
MAX_ROWS = 50  # pictures on the sheet, at most


def neighbors(
    inputs: Annotated[
        list[str],
        typer.Argument(
            metavar="IMAGE...", help="Images, folders or patterns; @FILE reads paths from a file, - from stdin"
        ),
    ],
    weights: WeightsOption = None,
    data: OwnDataOption = None,
    k: Annotated[int, typer.Option("-k", "--neighbors", min=1, help="Number of neighbors to show")] = 6,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="F.png", help="Contact sheet to write [default: figures/ of the run]"),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Find the training images most similar to an image.

    Similar means close in the activations of layer 7. The first call runs the training set through the network once
    and keeps its activations in the run.
    """
    from alexnet_cli.core.analysis.neighbors import make_records, make_sheet_row
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.drawing import draw_sheet
    from alexnet_cli.core.inference.inputs import expand_inputs
    from alexnet_cli.core.runs.resolve import find_run_folder, find_training_data, find_weights

    reporter = Reporter("neighbors", json=json, quiet=quiet)
    if output is not None and output.suffix.lower() != ".png":
        raise UsageError(f"-o {output}: not a .png file", "such as -o neighbors.png")
    sources = expand_inputs(inputs, getattr(sys.stdin, "buffer", None))
    path = find_weights(weights, (".onnx", ".safetensors"))
    dataset = open_dataset(find_dataset(data or find_training_data(path)))
    split = dataset.split("train")
    reporter.line("data", f"{dataset.path} · train · {len(split):,} images")
    session, vectors = _open_index(reporter, path, dataset, split, len(sources))
    rows: list[Row] = []
    failed = 0
    for name, picture, near, distances in _search(sources, session, vectors, k):
        failed += isinstance(picture, str)
        if isinstance(picture, str):
            reporter.result({"path": name, "error": picture})
            reporter.show(make_printable(f"{name}\n  cannot be read: {picture}".replace("\n", " ")))
            continue
        records = make_records(near, distances, split, dataset.classes)
        reporter.result({"path": name, "neighbors": records})
        reporter.show(_format_table(name, records))
        if len(rows) < MAX_ROWS:
            rows.append(make_sheet_row(name, picture, near, distances, split, dataset.classes))
    if rows:
        run = find_run_folder(path)
        target = output or ((run / "figures" if run else Path()) / "neighbors.png")
        title = f"nearest training pictures of {dataset.name} in fc7, Euclidean distance, {path}"
        _save_sheet(reporter, draw_sheet(rows, title), target, len(rows), len(sources) - failed)
    if failed:
        raise PartialError(f"{failed} of {len(sources)} pictures could not be read", "the reasons are in the results")


def _open_index(
    reporter: Reporter, path: Path, dataset: Dataset, split: Split, pictures: int
) -> tuple[Session, Vectors]:
    """The network up to layer 7, and the index of the training set, made now if it is not there."""
    from alexnet_cli.core.analysis import neighbors
    from alexnet_cli.core.files import hash_file
    from alexnet_cli.core.inference.predict import FAST_START_VIEWS
    from alexnet_cli.core.inference.session import Session
    from alexnet_cli.core.runs.resolve import describe_weights, find_run_folder

    folder = neighbors.index_folder(path, find_run_folder(path), dataset)
    source = neighbors.IndexSource(hash_file(path), dataset.hash, len(split))
    vectors = neighbors.open_index(folder, source)
    session = Session(path, fast_start=vectors is not None and pictures <= FAST_START_VIEWS, layer=neighbors.LAYER)
    reporter.line("weights", describe_weights(path, session.info))
    if session.fallback_reason:
        reporter.warn(f"the network runs on the CPU: {session.fallback_reason}", "see `alexnet doctor`")
    if vectors is None:
        with reporter.progress("index", len(split)) as progress:
            vectors = neighbors.write_index(folder, source, split, session, progress.advance)
    size = f"{vectors.nbytes / 1e6:,.1f} MB"
    reporter.line("index", f"{folder} · {len(split):,} x {vectors.shape[1]:,} float32 · {size}")
    return session, vectors


def _search(
    sources: list[ImageInput], session: Session, vectors: Vectors, k: int
) -> Iterator[tuple[str, ImageArray | str, Any, Any]]:
    """Every picture's name, pixels (or why there are none), and the rows and distances of its neighbors."""
    from alexnet_cli.core.analysis.neighbors import check_range, find_nearest
    from alexnet_cli.core.analysis.units import compute_activations
    from alexnet_cli.core.inference.inputs import prefetch

    with contextlib.closing(prefetch(sources, 2 * BATCH, session.exif_rotate)) as loaded:
        while batch := list(islice(loaded, BATCH)):
            readable = [picture for _, picture in batch if not isinstance(picture, str)]
            near: Iterator[tuple[Any, Any]] = iter(())
            if readable:
                queries = check_range(compute_activations(session, readable), session.path)
                near = zip(*find_nearest(vectors, queries, k), strict=True)
            for name, picture in batch:
                rows, distances = (None, None) if isinstance(picture, str) else next(near)
                yield name, picture, rows, distances


def _format_table(name: str, records: list[dict[str, Any]]) -> str:
    """A line for each neighbor: rank, distance, class, and which picture of the source it is."""
    width = max(len("class"), *(len(make_printable(record["label"])) for record in records))
    lines = [make_printable(name), f"  rank  distance  {'class':<{width}}  picture"]
    for record in records:
        label = f"{make_printable(record['label']):<{width}}"
        lines.append(f"  {record['rank']:>4}  {record['distance']:8.3f}  {label}  {make_printable(record['source'])}")
    return "\n".join(lines)


def _save_sheet(reporter: Reporter, image: Any, target: Path, shown: int, found: int) -> None:
    again = " · in place of the one before" if target.is_file() else ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        image.save(target, "PNG")
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}", "choose another -o") from error
    reporter.line("saved", f"{target}{f' · the first {shown} of {found:,} pictures' if shown < found else ''}{again}")
