"""What a report says of a run, or of a network alone: gathered here, drawn and written by report_page.

A report is of whatever is there: a run under way, one that failed before its first checkpoint, an imported network
without a training, a run whose data set is gone. What is not there is said, or left out.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from alexnet_cli.core import evidence, history, qualitative
from alexnet_cli.core.evaluate import matching
from alexnet_cli.core.evidence import Evidence, Opened, Subject
from alexnet_cli.core.history import History
from alexnet_cli.core.patience import Patience
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.qualitative import Kernels, Specialisation
from alexnet_cli.core.resolve import shorten_path
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import Dataset, find_dataset, open_dataset
from alexnet_cli.core.sources import ClassName
from alexnet_cli.core.weights import Model
from alexnet_cli.errors import AlexNetError, DataError, RecipeError
from alexnet_cli.recipe import PAPER, Recipe, describe

FEW = 5  # with no more classes, every answer is among the five likeliest


@dataclass(frozen=True)
class Value:
    """A value of the recipe beside the paper's, what it means, and where the paper's comes from."""

    key: str
    value: Any
    paper: Any
    about: str
    source: str


@dataclass(frozen=True)
class Report:
    """Everything that the page shows. `about` is run.json, empty for a network alone."""

    name: str
    about: Mapping[str, Any]
    recipe: Recipe
    history: History
    model: Model | None
    data: Dataset | None
    towers: tuple[Kernels, ...] = ()
    specialisation: Specialisation | None = None
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def values(self) -> list[Value]:
        """Every value of the recipe."""
        mine, paper = asdict(self.recipe), asdict(PAPER)
        return [Value(key, mine[key], paper[key], *describe(key)) for key in mine if key != "name"]

    @property
    def parameters(self) -> int | None:
        """Weights and biases; the mean picture is none of them."""
        return sum(t.size for name, t in self.model.tensors.items() if name != "mean") if self.model else None

    @property
    def classes(self) -> tuple[ClassName, ...]:
        """Those of the network, or else of the data set."""
        return self.model.classes if self.model else self.data.classes if self.data else ()

    @property
    def few_classes(self) -> bool:
        """Whether every answer is among the five likeliest, so that top-5 says nothing."""
        return 0 < len(self.classes) <= FEW

    @property
    def trained(self) -> bool:
        """Whether there is a training to tell of, and not only a network."""
        return bool(self.about) and "imported" not in self.about

    @property
    def own_data(self) -> bool:
        """Whether what was measured was measured on the data set that the run was trained on."""
        return self.data is None or self.about.get("data_hash", self.data.hash) == self.data.hash


def told_apart(classes: Sequence[ClassName]) -> list[str]:
    """Names; those that several classes have with their wnid, or else their index."""
    times = Counter(name for name, _ in classes)
    return [name if times[name] == 1 else f"{name} ({wnid or f'class {i}'})" for i, (name, wnid) in enumerate(classes)]


def gather(
    run: Run | None,
    opened: Opened | None,
    data: Dataset | str,
    placement: Placement | None = None,
    patience: Patience | None = None,
) -> Report:
    """The report of a run, of a network, or of both. Where there is no data set, `data` says why.

    Pictures go through the network as long as there is `patience`; without a `placement` none do.

    Raises:
        DataError: the run does not say what it is.
    """
    about, model = run.about if run else {}, opened.model if opened else None
    recipe = _recipe(run, model)
    towers = _towers(model) if model else ()
    measured = qualitative.specialisation(towers) if towers else None
    found = _evidence(run, opened, data, placement, patience or Patience())
    name = run.name if run else model.path.stem if model else ""
    course = history.of(run.records() if run else [], recipe)
    shown = data if isinstance(data, Dataset) else None
    return Report(name, about, recipe, course, model, shown, towers, measured, found)


def _towers(model: Model) -> tuple[Kernels, ...]:
    """The kernels of layer 1, by towers; none if they are no numbers."""
    kernels = model.tensors["conv1.weight"]
    return qualitative.split(kernels, model.recipe.towers) if np.isfinite(kernels).all() else ()


def _recipe(run: Run | None, model: Model | None) -> Recipe:
    """The run's own, to which epochs may have been added since a checkpoint, or else the network's."""
    try:
        return run.recipe if run else model.recipe if model else PAPER
    except RecipeError as error:
        if model:
            return model.recipe
        what = f"the run has no checkpoint, and its recipe cannot be read: {error.what}"
        raise DataError(what, "put recipe.toml back into its folder") from error


def _evidence(
    run: Run | None, opened: Opened | None, data: Dataset | str, placement: Placement | None, patience: Patience
) -> Evidence:
    """What the network makes of pictures, or what went wrong with that."""
    missing = "" if isinstance(data, Dataset) else data
    if not opened:
        missing = missing or "the run has no checkpoint yet"
    elif placement and isinstance(data, Dataset):
        try:
            output_of = matching(opened.model.classes, data.classes, opened.model.path)
            return evidence.collect(Subject(opened, run.path if run else None, data, output_of, placement), patience)
        except DataError as error:
            return Evidence(missing=dict.fromkeys(evidence.PARTS, error.what), failed=error.what)
    return Evidence(missing=dict.fromkeys(evidence.PARTS, missing) if missing else {})


def data_of(run: Run | None, spec: str | None) -> Dataset | str:
    """The data set that was named, or else the run's own, or the reason why there is none.

    Raises:
        DataError: one was named, and it is none.
    """
    if spec is not None:
        return open_dataset(find_dataset(spec))
    about = run.about if run else {}
    path = about.get("data_path")
    known = Path(path) if isinstance(path, str) else None
    try:
        dataset = open_dataset(shorten_path(known) if known else find_dataset(None))
    except (AlexNetError, OSError, ValueError) as error:  # the last two where it is no path at all
        why = error.what if isinstance(error, AlexNetError) else str(error)
        what = f"the data set {about.get('data') or known.name} cannot be opened: " if known else ""
        return f"{what}{why.replace(f'{Path.cwd()}{os.sep}', '')}; alexnet report --data D names one"
    if about.get("data_hash", dataset.hash) != dataset.hash:
        return (
            f"the data set {dataset.name} is not the one that the run was trained on; --data D takes one all the same"
        )
    return dataset
