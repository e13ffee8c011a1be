"""What a report shows of a run, or of a network alone: collected here, drawn and written by report_page.

A report shows whatever there is: a run under way, one that failed before its first checkpoint, an imported network
without a training, a run whose data set is gone. What is missing is said, or left out.

Results of `alexnet evaluate` and the index of `alexnet neighbors` are used if they belong to the same weights and data.
`alexnet report` computes what else it takes; `alexnet train` leaves that out, so that no one waits for its end.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alexnet_cli.core.analysis import filters
from alexnet_cli.core.analysis.filters import Kernels, Specialization
from alexnet_cli.core.analysis.neighbors import Neighborhood, find_neighborhoods
from alexnet_cli.core.analysis.units import read_images
from alexnet_cli.core.data.augment import Augment
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.images import ImageArray as Image
from alexnet_cli.core.data.loader import Loader, all_batches
from alexnet_cli.core.data.shards import Dataset, Split, find_dataset, open_dataset
from alexnet_cli.core.evaluation import results
from alexnet_cli.core.evaluation.evaluate import (
    Classify,
    Evaluation,
    HalvingClassifier,
    TorchClassifier,
    evaluate,
    match_classes,
)
from alexnet_cli.core.files import hash_file
from alexnet_cli.core.model.model_file import Model, read_model
from alexnet_cli.core.model.network import network_from_model
from alexnet_cli.core.parallel.placement import Placement, choose_decode_threads
from alexnet_cli.core.report.history import History, read_history
from alexnet_cli.core.runs.resolve import is_best, shorten_path
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import AlexNetError, DataError, RecipeError, StorageError, WeightsError
from alexnet_cli.recipe import PAPER, Recipe, describe_setting

FEW_CLASSES = 5  # with no more, every answer is among the five most likely
BATCH = 128
SAMPLE = 256  # images among which examples are searched
EXAMPLES = 8  # right ones, and as many wrong ones
PARTS = ("results", "examples", "neighbors")
NOT_COMPUTED = "it has not been computed yet: alexnet report adds it"
ATTEMPTS = 3  # to open a checkpoint that a training may just have replaced

Advance = Callable[[int], None]
OutputOf = npt.NDArray[np.int64] | None
"""For each class of the data set the network's output, or None where they are numbered alike."""


@dataclass(frozen=True)
class RecipeValue:
    """A value of the recipe beside the paper's, what it means, and where the paper's comes from."""

    key: str
    value: Any
    paper: Any
    about: str
    source: str


@dataclass(frozen=True)
class OpenedModel:
    """A model with the SHA-256 of its file."""

    model: Model
    sha256: str


@dataclass(frozen=True)
class Example:
    """An image, uint8 256 x 256 x 3, its class, the predicted class, and the probability of that, 0..1."""

    image: Image
    true: int
    predicted: int
    probability: float


@dataclass(frozen=True)
class Evidence:
    """What the network makes of images. What is missing is empty; `missing` says why, by the names of PARTS."""

    totals: tuple[Mapping[str, Any], ...] = ()
    counts: Evaluation | None = None
    right: tuple[Example, ...] = ()
    wrong: tuple[Example, ...] = ()
    sampled: int = 0
    """Among how many images the examples were searched."""
    neighborhoods: tuple[Neighborhood, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    unsaved: str = ""
    """Why computed results could not be saved in the run too."""
    failed: str = ""
    """What is wrong with the network or the images."""


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
    specialization: Specialization | None = None
    evidence: Evidence = field(default_factory=Evidence)

    @property
    def values(self) -> list[RecipeValue]:
        """Every value of the recipe."""
        own, paper = asdict(self.recipe), asdict(PAPER)
        return [RecipeValue(key, own[key], paper[key], *describe_setting(key)) for key in own if key != "name"]

    @property
    def parameters(self) -> int | None:
        """Number of weights and biases, without the mean image."""
        return sum(t.size for name, t in self.model.tensors.items() if name != "mean") if self.model else None

    @property
    def classes(self) -> tuple[ClassName, ...]:
        """Those of the network, or else of the data set."""
        return self.model.classes if self.model else self.data.classes if self.data else ()

    @property
    def has_few_classes(self) -> bool:
        """Whether every answer is among the five most likely, so that the top-5 error says nothing."""
        return 0 < len(self.classes) <= FEW_CLASSES

    @property
    def is_trained(self) -> bool:
        """Whether there is a training to show, and not only a network."""
        return bool(self.about) and "imported" not in self.about

    @property
    def is_own_data(self) -> bool:
        """Whether the data set measured on is the one that the run was trained on."""
        return self.data is None or self.about.get("data_hash", self.data.hash) == self.data.hash


def make_names_unique(classes: Sequence[ClassName]) -> list[str]:
    """Class names; those that several classes share with their wnid, or else their index."""
    times = Counter(name for name, _ in classes)
    return [name if times[name] == 1 else f"{name} ({wnid or f'class {i}'})" for i, (name, wnid) in enumerate(classes)]


def open_model(path: Path) -> OpenedModel:
    """Read a model file. A training that goes on may drop a checkpoint while its link `best` is being followed.

    Raises:
        WeightsError: it is missing, damaged or of another program.
    """
    for _ in range(ATTEMPTS):
        real = path.parent.parent / os.readlink(path.parent) / path.name if path.parent.is_symlink() else path
        try:
            return OpenedModel(read_model(real), hash_file(real))
        except (FileNotFoundError, WeightsError):
            if real.exists():
                raise
    raise WeightsError(f"{path} does not exist", "name a run, a checkpoint or a .safetensors file")


def find_run_data(run: Run | None, spec: str | None) -> Dataset | str:
    """The data set named by `spec`, or else the run's own, or the reason why there is none.

    Raises:
        DataError: one was named, and it cannot be opened.
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


def collect_report(
    run: Run | None,
    opened: OpenedModel | None,
    data: Dataset | str,
    placement: Placement | None = None,
    advance: Advance = lambda n: None,
) -> Report:
    """The report of a run, of a network, or of both. Where there is no data set, `data` says why.

    With a `placement` the network computes what it takes; `advance` is told how many images it has seen.

    Raises:
        DataError: the run does not say what it is.
    """
    model = opened.model if opened else None
    recipe = _choose_recipe(run, model)
    towers: tuple[Kernels, ...] = ()
    if model and np.isfinite(kernels := model.tensors["conv1.weight"]).all():
        towers = filters.split_towers(kernels, model.recipe.towers)
    return Report(
        name=run.name if run else model.path.stem if model else "",
        about=run.about if run else {},
        recipe=recipe,
        history=read_history(run.records() if run else [], recipe),
        model=model,
        data=data if isinstance(data, Dataset) else None,
        towers=towers,
        specialization=filters.measure_specialization(towers) if towers else None,
        evidence=_collect_evidence(run, opened, data, placement, advance),
    )


def _choose_recipe(run: Run | None, model: Model | None) -> Recipe:
    """The run's own, to which epochs may have been added since a checkpoint, or else the network's."""
    try:
        return run.recipe if run else model.recipe if model else PAPER
    except RecipeError as error:
        if model:
            return model.recipe
        what = f"the run has no checkpoint, and its recipe cannot be read: {error.what}"
        raise DataError(what, "put recipe.toml back into its folder") from error


def _collect_evidence(
    run: Run | None, opened: OpenedModel | None, data: Dataset | str, placement: Placement | None, advance: Advance
) -> Evidence:
    """Results, examples and neighbors, or what went wrong with them."""
    if not isinstance(data, Dataset):
        return _miss_all(data)
    if not opened:
        return _miss_all("the run has no checkpoint yet")
    if not len(data.split("val")):
        return _miss_all("the data set has no validation pictures")
    try:
        output_of = match_classes(opened.model.classes, data.classes, opened.model.path)
        saved = read_results(run, opened, data)
        if not placement:
            missing = dict.fromkeys(PARTS if not saved else PARTS[1:], NOT_COMPUTED)
            return Evidence(tuple(totals for totals, _ in saved), saved[0][1] if saved else None, missing=missing)
        return _compute_evidence(run, opened, data, output_of, saved, placement, advance)
    except DataError as error:
        return replace(_miss_all(error.what), failed=error.what)


def _miss_all(reason: str) -> Evidence:
    return Evidence(missing=dict.fromkeys(PARTS, reason))


Results = list[tuple[Mapping[str, Any], Evaluation]]
"""Totals and counts of an evaluation, one for each number of views."""


def read_results(run: Run | None, opened: OpenedModel, data: Dataset) -> Results:
    """The results in a run's eval/ that belong to these weights and data."""
    model, found = opened.model, list[tuple[Mapping[str, Any], Evaluation]]()
    for views in results.PROTOCOL if run else ():
        stem = results.make_file_stem("val", views, model.path, data)
        origin = {"weights_sha256": opened.sha256, "data_hash": data.hash}
        if run and (saved := results.read_results(run.path / "eval", stem, len(model.classes), origin)):
            totals, counts = saved
            found.append((_make_totals(model, data, counts, totals["views"], totals["backend"]), counts))
    return found


def _make_totals(model: Model, data: Dataset, counts: Evaluation, views: int, backend: str) -> dict[str, Any]:
    return results.summarize(counts, views, backend, results.find_published(model.recipe, data.classes))


def _compute_evidence(
    run: Run | None,
    opened: OpenedModel,
    data: Dataset,
    output_of: OutputOf,
    saved: Results,
    placement: Placement,
    advance: Advance,
) -> Evidence:
    """Everything, computed where it is not there. What only the neighbors need may fail without the rest."""
    model, val = opened.model, data.split("val")
    pixels = Augment(model.recipe, model.mean, None, None, placement.device)
    classify = HalvingClassifier(
        TorchClassifier(network_from_model(model).to(placement.device), pixels, placement), lambda n: None
    )
    folder = run.path if run else model.path.parent
    unsaved = "" if os.access(folder, os.W_OK) else f"{folder} cannot be written to"
    if not saved:
        counts = _evaluate(classify, model, val, output_of, advance)
        totals = _make_totals(model, data, counts, 1, "torch")
        saved = [(totals, counts)]
        if run and not unsaved and is_best(model.path):
            try:
                record = totals | results.describe_source("val", model.path, opened.sha256, data)
                results.write_results(
                    run.path / "eval", results.make_file_stem("val", 1, model.path, data), counts, model.classes, record
                )
            except StorageError as error:
                unsaved = error.what
    right, wrong = find_examples(classify, val, output_of, advance)
    neighborhoods: tuple[Neighborhood, ...] = ()
    missing, failed = {}, ""
    try:
        neighborhoods = find_neighborhoods(
            model, opened.sha256, run.path if run else None, data, keep_index=not unsaved, advance=advance
        )
        missing = {} if neighborhoods else {"neighbors": "the data set has no training pictures"}
    except (StorageError, DataError) as error:
        missing = {"neighbors": error.what}
        failed = error.what if isinstance(error, DataError) else ""
    totals_of_all = tuple(totals for totals, _ in saved)
    sampled = len(sample_rows(val))
    return Evidence(totals_of_all, saved[0][1], right, wrong, sampled, neighborhoods, missing, unsaved, failed)


def _evaluate(classify: Classify, model: Model, val: Split, output_of: OutputOf, advance: Advance) -> Evaluation:
    """Every image of the split, its center view, as `alexnet evaluate` counts."""
    counts, size = Evaluation.empty(len(model.classes)), min(BATCH, len(val))
    with Loader(val, size, choose_decode_threads(None)) as loader:
        batches = loader.batches(all_batches(len(val), size))
        for batch, _, _ in evaluate(classify, batches, counts, output_of):
            counts.check_finite(model.path)
            advance(len(batch.rows))
    return counts


def sample_rows(split: Split) -> npt.NDArray[np.int64]:
    """At most SAMPLE rows, spread evenly over a split."""
    return np.unique(np.linspace(0, len(split) - 1, min(SAMPLE, len(split))).round().astype(np.int64))


def find_examples(
    classify: Classify, split: Split, output_of: OutputOf, advance: Advance
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Of a sample of the split the images with the most confident answers, right and wrong.

    Each class once, then each a second time, and so on.
    """
    rows = sample_rows(split)
    true = split.labels[rows].astype(np.int64)
    true = true if output_of is None else output_of[true]
    batches = []
    for part in np.array_split(rows, -(-len(rows) // BATCH)):
        batches.append(classify(torch.from_numpy(np.stack(list(read_images(split, part.tolist()))))))
        advance(len(part))
    probabilities = np.concatenate(batches)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)

    def choose(places: npt.NDArray[np.int64]) -> tuple[Example, ...]:
        best = _alternate_classes(places[np.argsort(-confidence[places], kind="stable")].tolist(), true)
        images = read_images(split, rows[best].tolist())
        return tuple(
            Example(image, int(true[i]), int(predicted[i]), float(confidence[i]))
            for i, image in zip(best, images, strict=True)
        )

    return choose(np.flatnonzero(predicted == true)), choose(np.flatnonzero(predicted != true))


def _alternate_classes(order: Sequence[int], classes: npt.NDArray[np.int64]) -> list[int]:
    """The first EXAMPLES: those that are their class's first, then its second, and so on."""
    times: Counter[int] = Counter()
    turns = []
    for i in order:
        turns.append((times[int(classes[i])], i))
        times[int(classes[i])] += 1
    return [i for _, i in sorted(turns, key=lambda turn: turn[0])][:EXAMPLES]
