"""What the kinds of figure of `visualize-filters` share: the model, the chosen towers, the file to write."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from alexnet_cli.console import Reporter
    from alexnet_cli.core.data.shards import Dataset
    from alexnet_cli.core.model.model_file import Model


@dataclass(frozen=True)
class FigureRequest:
    """What to draw from, and where the figure goes."""

    reporter: Reporter
    model: Model
    run: Path | None
    """The folder of the run that the model belongs to."""
    towers: list[int]
    """Indices of the towers to draw, from 0."""
    output: Path | None
    """The file named with -o."""

    def choose_path(self, *parts: str, dataset: Dataset | None = None) -> Path:
        """The file named with -o, or the usual one for a figure of these `parts` and this data set."""
        from alexnet_cli.core.runs.resolve import choose_figure_path

        return self.output or choose_figure_path(self.model.path, *parts, dataset=dataset)

    @property
    def tower_name(self) -> str:
        """Part of the default file name if only one of two towers is drawn, else empty."""
        return f"tower{self.towers[0] + 1}" if len(self.towers) < self.model.recipe.towers else ""

    @property
    def origin(self) -> list[str]:
        """Run and epoch of the weights, as far as they are known."""
        known = ({"run": self.run.name} if self.run else {}) | dict(self.model.info)
        return [f"{key} {known[key]}" for key in ("run", "epoch") if key in known]

    def save(self, figure: Image.Image | str | bytes, path: Path, record: dict[str, Any]) -> None:
        """Write the figure, and report the path and the record. Raises StorageError."""
        from alexnet_cli.core.drawing import save_figure

        save_figure(figure, path)
        self.reporter.result({"path": str(path), **record})
        self.reporter.line("saved", str(path))
