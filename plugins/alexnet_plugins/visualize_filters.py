"""`alexnet visualize-filters`: figure 3 of the paper for one's own network, and how its towers specialise."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from alexnet_cli.console import Reporter
from alexnet_cli.errors import StorageError, UsageError
from alexnet_cli.options import JsonFlag, QuietFlag, WeightsOption

if TYPE_CHECKING:
    from rich.text import Text

    from alexnet_cli.core.qualitative import Kernels, Pixels, Specialisation
    from alexnet_cli.core.weights import Model

CHANCE = 0.05  # p-values above this are called chance


def visualize_filters(
    weights: WeightsOption = None,
    tower: Annotated[
        str,
        typer.Option(help="Which tower's kernels: 1, 2 or both.", autocompletion=lambda: ["1", "2", "both"]),
    ] = "both",
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="PNG file. Left out: figures/ of the run.")
    ] = None,
    no_terminal: Annotated[
        bool, typer.Option("--no-terminal", help="No picture in the terminal.", show_default=False)
    ] = False,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Draw the kernels of layer 1, tower by tower, and measure whether one tower took to colour.

    All kernels share one scale, and zero is mid-grey: what looks faint is faint.
    """
    from alexnet_cli.core import qualitative
    from alexnet_cli.core.runs import find_weights, run_of
    from alexnet_cli.core.weights import read

    reporter = Reporter("visualize-filters", json=json, quiet=quiet)
    path = find_weights(weights)
    model = read(path)
    towers = qualitative.split(model.tensors["conv1.weight"], model.recipe.towers)
    chosen = _chosen(tower, len(towers))
    found = qualitative.specialisation(towers)
    reporter.line("weights", str(path))
    reporter.line("layer", f"conv1 · {_described(towers, chosen)} · one scale, zero = mid-grey")
    limit = qualitative.limit_of(towers)
    if not no_terminal and not json and _shows_colour():
        for i in chosen:
            reporter.show(_half_blocks(qualitative.grid(towers[i], limit, _columns(towers[i]))))
    columns = qualitative.columns_for(len(towers[0]))
    panels = [(_caption(found, towers, i), qualitative.grid(towers[i], limit, columns)) for i in chosen]
    name = "conv1.png" if len(chosen) == len(towers) else f"conv1-tower{chosen[0] + 1}.png"
    run = run_of(path)
    target = output or ((run / "figures" if run else Path()) / name)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        qualitative.figure(panels, _title(model)).save(target, "PNG")
    except OSError as error:
        raise StorageError(f"cannot write {target}: {error.strerror or error}", "choose another -o") from error
    _report(reporter, found, target, tower, sum(len(towers[i]) for i in chosen), model)


def _chosen(tower: str, towers: int) -> list[int]:
    """Indices of the towers that --tower means."""
    if tower == "both":
        return list(range(towers))
    if tower in {str(i + 1) for i in range(towers)}:
        return [int(tower) - 1]
    has = "2 towers (1, 2)" if towers == 2 else "1 tower (1)"
    raise UsageError(f"--tower {tower}: this model has {has}", "--tower both shows all there is")


def _described(towers: tuple[Kernels, ...], chosen: list[int]) -> str:
    names = " and ".join(str(i + 1) for i in chosen)
    count, _, height, width = towers[chosen[0]].shape
    each = " each" if len(chosen) > 1 else ""
    noun = "towers" if len(chosen) > 1 else "tower"
    return f"{noun} {names} of {len(towers)} · {count} kernels {height}×{width}×3{each}"


def _caption(found: Specialisation, towers: tuple[Kernels, ...], i: int) -> str:
    return f"tower {i + 1} of {len(towers)}, {len(towers[i])} kernels, colour share {found.means[i]:.2f}"


def _title(model: Model) -> str:
    """What the kernels belong to: run and epoch, as far as the file knows."""
    return ", ".join(["conv1"] + [f"{word} {model.info[word]}" for word in ("run", "epoch") if word in model.info])


def _report(reporter: Reporter, found: Specialisation, target: Path, tower: str, kernels: int, model: Model) -> None:
    reporter.result({
        "path": str(target), "tower": tower, "kernels": kernels,
        "chroma_fraction": {f"tower{i + 1}": mean for i, mean in enumerate(found.means)},
        "auc": found.auc, "p_value": found.p_value,
        "smoothness": found.smoothness, "undertrained": found.undertrained, "dead": found.dead,
        "kernel_chroma": {f"tower{i + 1}": c.tolist() for i, c in enumerate(found.chroma)},
    })  # fmt: skip
    shares = " · ".join(f"tower {i + 1} {mean:.2f}" for i, mean in enumerate(found.means))
    reporter.show(f"colour  {shares}   (grey 0, chance 0.67, opponent colours 1)")
    if found.auc is not None and found.p_value is not None:
        verdict = "no more than chance" if found.p_value > CHANCE else "the towers differ"
        reporter.show(f"towers  told apart by colour: AUC {found.auc:.2f}, p = {found.p_value:.4f} · {verdict}")
    reporter.show(f"kernels smoothness {found.smoothness:.2f} (noise 0) · dead {found.dead}")
    reporter.line("saved", str(target))
    if found.undertrained:
        epoch = f": this checkpoint is from epoch {model.info['epoch']}" if "epoch" in model.info else ""
        reporter.warn(
            f"kernels look like noise (smoothness {found.smoothness:.2f}){epoch}",
            "read nothing into colour or orientation yet; more training or more pictures make them smooth",
        )


def _shows_colour() -> bool:
    """Whether stdout is a terminal that shows 16 million colours and may."""
    from rich.console import Console

    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and Console().color_system == "truecolor"


def _columns(kernels: Kernels) -> int:
    """As many kernels in a row as the terminal has room for, at most those of the figure."""
    import shutil

    from alexnet_cli.core.qualitative import columns_for

    room = (shutil.get_terminal_size().columns - 1) // (int(kernels.shape[-1]) + 1)
    return max(1, min(columns_for(len(kernels)), room))


def _half_blocks(pixels: Pixels) -> Text:
    """Two pixels in a character: the upper one is the ink of U+2580, the lower one its ground."""
    from rich.style import Style
    from rich.text import Text

    rows = [[f"#{r:02x}{g:02x}{b:02x}" for r, g, b in row] for row in pixels.tolist()]
    if len(rows) % 2:
        rows.append(rows[0])  # the page around the tiles
    text = Text(no_wrap=True)
    for upper, lower in zip(rows[::2], rows[1::2], strict=True):
        for ink, ground in zip(upper, lower, strict=True):
            text.append("▀", Style(color=ink, bgcolor=ground))
        text.append("\n")
    return text
