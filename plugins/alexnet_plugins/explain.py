"""`alexnet explain`: where in an image the network, and each of its towers, saw evidence for a class."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from alexnet_cli.console import Reporter, make_printable
from alexnet_cli.errors import PartialError, UsageError
from alexnet_cli.options import ImagesArgument, JsonFlag, QuietFlag, WeightsOption, WithoutTowerOption

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from alexnet_cli.core.analysis.explain import Explanation
    from alexnet_cli.core.data.classes import ClassName
    from alexnet_cli.core.inference.inputs import ImageInput

MAX_ROWS = 50  # images on the contact sheet
WINDOW = 4  # images decoded ahead


def explain(
    inputs: ImagesArgument,
    weights: WeightsOption = None,
    name: Annotated[
        str | None,
        typer.Option("--class", metavar="C", help="Class to explain: name, wnid or index [default: the most probable]"),
    ] = None,
    method: Annotated[
        Literal["occlusion", "gradcam", "layercam"],
        typer.Option(help="Cover places with a gray square, or weigh the maps of layer 5 by their gradients"),
    ] = "occlusion",
    without_tower: WithoutTowerOption = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            metavar="F.png|DIR",
            help="Figure to write, or folder for one figure per image [default: figures/ of the run]",
        ),
    ] = None,
    json: JsonFlag = False,
    quiet: QuietFlag = False,
) -> None:
    """Show where in an image the network looked.

    Draws the image, a map of the evidence for a class over it, and the most likely classes: for the whole network and
    for each tower alone, or only for the tower that --without-tower leaves. Several images share a contact sheet.
    """
    from alexnet_cli.core.analysis.explain import Explainer, describe_method, find_class, make_record
    from alexnet_cli.core.inference.inputs import expand_inputs, name_inputs, prefetch
    from alexnet_cli.core.model.model_file import read_model
    from alexnet_cli.core.runs.resolve import choose_figure_path, describe_weights, find_weights

    reporter = Reporter("explain", json=json, quiet=quiet)
    run_images: list[str] = []
    sources = expand_inputs(inputs, getattr(sys.stdin, "buffer", None), run_images)
    _check_output(output, sources)
    path = find_weights(weights)
    model = read_model(path)
    index = find_class(model.classes, name) if name is not None else None
    origin = describe_weights(path, model.info)
    reporter.line("weights", origin, always=weights is None)
    if run_images:
        reporter.line("note", f"skipped {len(run_images):,} images drawn for runs, such as {run_images[0]}")
    explainer = Explainer(model, method, None if without_tower is None else [without_tower])
    options = [method, f"class{index}" if index is not None else "", f"without{without_tower}" if without_tower else ""]
    figures = _Figures(
        output,
        lambda *images: choose_figure_path(path, name_inputs(images), *options),
        f"{describe_method(method)} · recipe {model.recipe.name}, {len(model.classes):,} classes · {origin}",
        model.classes,
        has_sheet=len(sources) > 1 and not (output and not _is_png(output)),
    )
    errors: list[str] = []
    with contextlib.ExitStack() as stack:
        loaded = stack.enter_context(contextlib.closing(prefetch(sources, WINDOW, model.exif_rotate)))
        # A progress bar and results on one terminal would overwrite each other.
        shows_progress = len(sources) > 1 and not sys.stdout.isatty()
        progress = stack.enter_context(reporter.progress("explain", len(sources))) if shows_progress else None
        for image_path, image in loaded:
            if isinstance(image, str):
                errors.append(f"{image_path}: {image}")
                reporter.result({"path": image_path, "error": image})
                reporter.show(f"{make_printable(image_path)}\n  cannot be read: {make_printable(image)}")
            else:
                explanation = explainer.explain(image, index)
                reporter.result({"path": image_path, **make_record(explanation)})
                reporter.show(_format_explanation(image_path, explanation))
                figures.add(image_path, explanation)
            if progress:
                progress.advance(1)
    if line := figures.save(inputs):
        reporter.line("saved", line)
    if errors:
        what = f"cannot read {len(errors):,} of {len(sources):,} images, first {errors[0]}"
        raise PartialError(what, "the output has the reason for each")


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png" and not path.is_dir()


def _check_output(output: Path | None, sources: list[ImageInput]) -> None:
    """Raises UsageError if -o is neither a .png file nor a folder, or is one of the images."""
    if output is None:
        return
    if not (_is_png(output) or output.is_dir() or not output.suffix):
        raise UsageError(f"-o {output}: not a .png file", "for example: -o explained.png; or a folder: -o explained")
    if os.path.realpath(output) in {os.path.realpath(path) for path in sources if isinstance(path, str)}:
        raise UsageError(f"-o {output} is one of the images", "choose another file for the figure")


class _Figures:
    """Draws a page per image, or one contact sheet of several images: a row, with its path, for each."""

    def __init__(
        self,
        output: Path | None,
        choose_path: Callable[..., Path],
        caption: str,
        classes: Sequence[ClassName],
        *,
        has_sheet: bool,
    ) -> None:
        self.output, self.choose_path, self.caption, self.has_sheet = output, choose_path, caption, has_sheet
        self.classes = classes
        self.rows: list[tuple[str, Explanation]] = []
        self.count, self.saved = 0, list[Path]()

    def add(self, path: str, explanation: Explanation) -> None:
        """Draw the page of an image, or its row of the sheet. Raises StorageError."""
        from alexnet_cli.core.analysis.explain import draw_page
        from alexnet_cli.core.drawing import save_figure

        self.count += 1
        if not self.has_sheet:
            target = self.choose_path(path)
            if self.output:
                target = self.output if _is_png(self.output) else self.output / target.name
            title = "image from standard input" if path == "-" else Path(path).name
            save_figure(draw_page(explanation, title, self.caption), target)
            self.saved.append(target)
        elif len(self.rows) < MAX_ROWS:
            self.rows.append((path, explanation))

    def save(self, inputs: list[str]) -> str:
        """Write the sheet. Return what was saved, or "" if there was nothing to draw. Raises StorageError."""
        from alexnet_cli.core.analysis.explain import draw_sheet
        from alexnet_cli.core.drawing import save_figure

        if not self.rows:
            more = f" and {len(self.saved) - 1:,} more" if len(self.saved) > 1 else ""
            return f"{self.saved[0]}{more}" if self.saved else ""
        target = self.output or self.choose_path(*inputs)
        save_figure(draw_sheet(self.rows, self.caption, self.classes), target)
        part = f" · the first {MAX_ROWS} of {self.count:,} images" if self.count > MAX_ROWS else ""
        return f"{target}{part}{' · for a page of each image: -o DIR' if not self.output else ''}"


def _format_explanation(path: str, explanation: Explanation) -> str:
    """Return the lines of an image: the class, and for each network its probability and the place of the peak."""
    from alexnet_cli.core.analysis.explain import describe_evidence
    from alexnet_cli.core.model.model_file import name_towers

    lines = [make_printable(f"{path}: {explanation.name.name}")]
    for attribution in explanation.attributions:
        row, column = attribution.find_peak()
        x, y = explanation.centers[[column, row]]
        evidence = describe_evidence(explanation, attribution, f" at ({x:.0f}, {y:.0f})")
        lines.append(f"  {name_towers(attribution.without_tower):<13}  {evidence}")
    return "\n".join(lines)
