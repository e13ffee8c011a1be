"""What a report says of a run, or of a network alone: gathered here, drawn and written by report_page.

A report is of whatever is there: a run under way, one that failed before its first checkpoint, an imported network
without a training, a run whose data set is gone. What is not there is said, or left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from alexnet_cli.core import evidence, history, qualitative
from alexnet_cli.core.evaluate import matching
from alexnet_cli.core.evidence import Evidence, Subject
from alexnet_cli.core.history import History
from alexnet_cli.core.placement import Placement
from alexnet_cli.core.qualitative import Kernels, Specialisation
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import Dataset, find_dataset, open_dataset
from alexnet_cli.core.sources import ClassName
from alexnet_cli.core.weights import Model
from alexnet_cli.errors import AlexNetError, DataError
from alexnet_cli.recipe import PAPER, Recipe, describe


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
    """Everything that the page shows. `about` is run.json, empty for a network alone; `failed` what went wrong."""

    name: str
    about: Mapping[str, Any]
    recipe: Recipe
    history: History
    model: Model | None
    data: Dataset | None
    towers: tuple[Kernels, ...] = ()
    specialisation: Specialisation | None = None
    evidence: Evidence = field(default_factory=Evidence)
    failed: str = ""

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


def gather(
    run: Run | None,
    model: Model | None,
    data: Dataset | str,
    placement: Placement | None = None,
    budget: float | None = None,
    advance: Callable[[int], None] = lambda n: None,
) -> Report:
    """The report of a run, of a network, or of both. Where there is no data set, `data` says why.

    `budget`: seconds that pictures may take to go through the network, judged by the speed of the training; None for
    as long as it takes. Without a `placement` none do.
    """
    about = run.about if run else {}
    recipe = run.recipe if run and not model else model.recipe if model else PAPER
    course = history.of(run.records() if run else [], recipe)
    name = run.name if run else model.path.stem if model else ""
    towers: tuple[Kernels, ...] = ()
    measured = None
    if model:
        towers = qualitative.split(model.tensors["conv1.weight"], recipe.towers)
        measured = qualitative.specialisation(towers)
    found, failed = Evidence(), ""
    missing = data if isinstance(data, str) else "the run has no checkpoint yet" if not model else ""
    if model and placement and isinstance(data, Dataset):

        def affordable(pictures: int) -> bool:
            return budget is None or pictures == 0 or (bool(course.speed) and pictures / (course.speed or 1) <= budget)

        try:
            output_of = matching(model.classes, data.classes, model.path)
            subject = Subject(model, run.path if run else None, data, output_of, placement)
            found = evidence.collect(subject, affordable, advance)
        except DataError as error:
            missing = failed = error.what
    if missing:
        found = Evidence(missing=dict.fromkeys(("results", "examples", "neighbours"), missing))
    shown = data if isinstance(data, Dataset) else None
    return Report(name, about, recipe, course, model, shown, towers, measured, found, failed)


def data_of(run: Run | None, spec: str | None) -> Dataset | str:
    """The data set that was named, or else the run's own, or the reason why there is none.

    Raises:
        DataError: one was named, and it is none.
    """
    if spec is not None:
        return open_dataset(find_dataset(spec))
    about = run.about if run else {}
    known = about.get("data_path")
    try:
        if not isinstance(known, str):
            return open_dataset(find_dataset(None))
        dataset = open_dataset(Path(known))
    except AlexNetError:
        gone = (
            f"the data set {about['data']} is not where the run found it" if isinstance(known, str) else "no data set"
        )
        return f"{gone}; alexnet report --data D names one"
    if dataset.hash != about.get("data_hash"):
        return (
            f"the data set {dataset.name} is not the one that the run was trained on; --data D takes one all the same"
        )
    return dataset
