"""What `alexnet ablate` shows and writes: the table, its files, the sentence on activations."""

from __future__ import annotations

import math
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_cli.console import Reporter
from alexnet_cli.errors import StorageError

if TYPE_CHECKING:
    from rich.table import Table

    from alexnet_cli.core.ablation import Ablation
    from alexnet_cli.core.comparison import Estimate, Row

FILES = ("ablation.csv", "ablation.json", "ablation.png")


def report(reporter: Reporter, made: Ablation, error: float, *, show: bool) -> list[Row]:
    """Write the files of what has finished so far; to `show` it, draw the picture and tell the table too.

    Raises:
        StorageError: the files cannot be written.
    """
    from alexnet_cli.core import ablation_picture, comparison, plotting

    rows = comparison.compare(made.runs())
    if not rows:
        return rows
    images = len(made.data.split("val"))
    about = {"data": made.data.name, "data_hash": made.data.hash, "validation_images": images}
    title = f"{made.folder.name}: {made.data.name}, {images:,} validation images"
    contents = {
        "ablation.csv": comparison.to_csv(rows, error).encode(),
        "ablation.json": comparison.to_json(rows, about, error).encode(),
    }
    if show and plotting.can_draw():
        contents["ablation.png"] = ablation_picture.draw(rows, title, error)
    for name, content in contents.items():
        _write(made.folder / name, content)
    if show:
        reporter.result({
            "path": str(made.folder), **about, "training_error": error,
            "rows": [comparison.as_dict(row, error) for row in rows],
            "files": [str(made.folder / name) for name in contents],
        })  # fmt: skip
        reporter.show(_table(rows))
        for line in _sentences(rows, images, error):
            reporter.show(line)
        for name in contents:
            reporter.line("saved", str(made.folder / name))
    return rows


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}", "free some space") from error


def _table(rows: list[Row]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    table.add_column("switch", no_wrap=True)
    for heading in ("n", "top-1 error", "spread", "training", "difference"):
        table.add_column(heading, justify="right")
    for heading in ("the paper", "verdict"):
        table.add_column(heading)
    for row in rows:
        found, seen = row.top1, row.train_top1
        n = f"{len(row.seeds)}" + (f" ({len(row.diverged)} broke down)" if row.diverged else "")
        table.add_row(
            row.switch.name, n, f"{found.mean:.1%}" if found else "-", _points(found.spread) if found else "-",
            f"{seen.mean:.1%}" if seen else "-", _difference(row.top1_difference), row.switch.paper,
            row.verdict or "",
        )  # fmt: skip
    return table


def _points(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _difference(found: Estimate | None) -> str:
    """Such as +1.4 ± 0.6, in points."""
    if found is None:
        return ""
    return f"{100 * found.mean:+.1f}" + ("" if found.half is None else f" ± {100 * found.half:.1f}")


def _sentences(rows: list[Row], images: int, error: float) -> list[str]:
    """What the numbers mean, and how fast each activation learned."""
    from alexnet_cli.core.comparison import speeds

    mean = statistics.fmean(row.top1.mean for row in rows if row.top1) if any(row.top1 for row in rows) else 0.5
    half = 1.96 * math.sqrt(mean * (1 - mean) / images)
    told = [
        "Differences from the base in points, paired by seed, ± half of the 95 % interval over seeds; the paper's are "
        "top-1 / top-5, on ILSVRC.",
        f"All are measured on the same {images:,} pictures: on as many others each error could be {100 * half:.1f} "
        "points higher or lower.",
    ]
    differences = [row.top1_difference for row in rows if row.top1_difference]
    if any(difference.half is not None for difference in differences):
        told.append("A verdict says whether the error rises where the paper says that it does.")
    elif differences:
        told.append("One seed has no interval and so no verdict: the same command with --seeds 3 gives both.")
    found = {name: steps for name, steps in speeds(rows, error).items() if steps}
    if len(found) == 1:
        told.append("Of one activation there is no figure 1 of the paper: --only tanh,sigmoid trains others.")
    elif found:
        parts = [f"{name} {_reached(steps)}" for name, steps in found.items()]
        told.append(f"Training error of {error:.0%} is reached: {', '.join(parts)}.")
    return told


def _reached(steps: list[int | None]) -> str:
    """After how many steps on average, or how many of the trainings got there at all."""
    there = [step for step in steps if step is not None]
    if len(there) < len(steps):
        return f"in {len(there)} of {len(steps)} trainings"
    return f"after {statistics.fmean(there):,.0f} steps"
