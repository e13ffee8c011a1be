"""`alexnet neighbors`: the training images nearest to an image in layer 7 (figure 4, right, of the paper)."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from alexnet_cli.console import Reporter, make_printable
from alexnet_cli.errors import PartialError, UsageError
from alexnet_cli.options import ImagesArgument, JsonFlag, OwnDataOption, QuietFlag, WeightsOption

if TYPE_CHECKING:
    from alexnet_cli.core.analysis.neighbors import Vectors
    from alexnet_cli.core.data.images import ImageArray
    from alexnet_cli.core.data.shards import Dataset, Split
    from alexnet_cli.core.drawing import Row
    from alexnet_cli.core.inference.inputs import ImageInput
    from alexnet_cli.core.inference.session import Session

BATCH = 32  # images searched per pass over the index
MAX_ROWS = 50  # images on the contact sheet


def neighbors(
    inputs: ImagesArgument,
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
    from alexnet_cli.core.drawing import draw_sheet, save_figure
    from alexnet_cli.core.inference.inputs import expand_inputs, name_inputs
    from alexnet_cli.core.runs.resolve import choose_figure_path, find_training_data, find_weights

    reporter = Reporter("neighbors", json=json, quiet=quiet)
    if output is not None and output.suffix.lower() != ".png":
        raise UsageError(f"-o {output}: not a .png file", "for example: -o neighbors.png")
    sources = expand_inputs(inputs, getattr(sys.stdin, "buffer", None))
    path = find_weights(weights, (".onnx", ".safetensors"))
    dataset = open_dataset(find_dataset(data or find_training_data(path)))
    split = dataset.split("train")
    reporter.line("data", f"{dataset.path} · train · {len(split):,} images")
    session, vectors = _open_index(reporter, path, dataset, split, len(sources), is_default=weights is None)
    sheet: list[Row] = []
    failed = 0
    for name, image, rows, distances in _search(sources, session, vectors, k):
        if isinstance(image, str):
            failed += 1
            reporter.result({"path": name, "error": image})
            reporter.show(make_printable(f"{name}\n  cannot be read: {image}".replace("\n", " ")))
            continue
        records = make_records(rows, distances, split, dataset.classes)
        reporter.result({"path": name, "neighbors": records})
        reporter.show(_format_table(name, records))
        if len(sheet) < MAX_ROWS:
            sheet.append(make_sheet_row(name, image, rows, distances, split, dataset.classes))
    if sheet:
        read = len(sources) - failed
        target = output or choose_figure_path(path, name_inputs(inputs), f"{k}-neighbors", dataset=dataset)
        replaced = " · replaces the previous file" if target.is_file() else ""
        title = f"nearest training images of {dataset.name} by Euclidean distance in fc7, {path}"
        save_figure(draw_sheet(sheet, title), target)
        part = f" · the first {len(sheet)} of {read:,} images" if len(sheet) < read else ""
        reporter.line("saved", f"{target}{part}{replaced}")
    if failed:
        raise PartialError(f"{failed} of {len(sources)} images could not be read", "the results give the reasons")


def _open_index(
    reporter: Reporter, path: Path, dataset: Dataset, split: Split, images: int, *, is_default: bool
) -> tuple[Session, Vectors]:
    """Open the network up to layer 7 and the index of the training set, which is computed if it is missing."""
    from alexnet_cli.core.analysis import neighbors
    from alexnet_cli.core.files import hash_file
    from alexnet_cli.core.inference.predict import FAST_START_VIEWS
    from alexnet_cli.core.runs.resolve import describe_weights, find_run_folder

    folder = neighbors.index_folder(path, find_run_folder(path), dataset)
    source = neighbors.IndexSource(hash_file(path), dataset.hash, len(split))
    vectors = neighbors.open_index(folder, source)
    session = neighbors.open_network(path, fast_start=vectors is not None and images <= FAST_START_VIEWS)
    reporter.line("weights", describe_weights(path, session.info), always=is_default)
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
    """Yield name, pixels (or the reason why they cannot be read), and rows and distances of the neighbors."""
    from alexnet_cli.core.analysis.neighbors import check_range, find_nearest
    from alexnet_cli.core.analysis.units import compute_activations
    from alexnet_cli.core.inference.inputs import prefetch

    with contextlib.closing(prefetch(sources, 2 * BATCH, session.exif_rotate)) as loaded:
        while batch := list(islice(loaded, BATCH)):
            readable = [image for _, image in batch if not isinstance(image, str)]
            nearest: Iterator[tuple[Any, Any]] = iter(())
            if readable:
                queries = check_range(compute_activations(session, readable), session.path)
                nearest = zip(*find_nearest(vectors, queries, k), strict=True)
            for name, image in batch:
                rows, distances = (None, None) if isinstance(image, str) else next(nearest)
                yield name, image, rows, distances


def _format_table(name: str, records: list[dict[str, Any]]) -> str:
    """Format a line for each neighbor: rank, distance, class, and its source image."""
    width = max(len("class"), *(len(make_printable(record["label"])) for record in records))
    lines = [make_printable(name), f"  rank  distance  {'class':<{width}}  image"]
    for record in records:
        label = f"{make_printable(record['label']):<{width}}"
        lines.append(f"  {record['rank']:>4}  {record['distance']:8.3f}  {label}  {make_printable(record['source'])}")
    return "\n".join(lines)
