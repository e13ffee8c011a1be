"""Collect what the report of a run, or of a network alone, shows; `sections` words it and `page` writes it.

There is a report for every state of a run: running, failed before its first checkpoint, imported, or without its data
set. `Measurements.missing` says which parts are missing and why.

Results of `alexnet evaluate` and the index of `alexnet neighbors` are used if they belong to the same weights and data.
`alexnet report` computes the rest and saves results for the next time. The report that `alexnet train` writes leaves it
out, to end at once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alexnet_cli.core.analysis import filters
from alexnet_cli.core.analysis.explain import Explainer, draw_overlay
from alexnet_cli.core.analysis.filter_replay import read_kept_filters
from alexnet_cli.core.analysis.filters import Kernels, Specialization
from alexnet_cli.core.analysis.neighbors import Neighborhood, find_neighborhoods
from alexnet_cli.core.analysis.units import read_images
from alexnet_cli.core.data.classes import ClassName, make_names_unique
from alexnet_cli.core.data.images import ImageArray
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
from alexnet_cli.core.evaluation.towers import TowerTable, count_sample, read_table, write_record
from alexnet_cli.core.files import hash_file, read_link
from alexnet_cli.core.model.model_file import Model, read_model, silence_tower
from alexnet_cli.core.parallel.placement import Placement, choose_decode_threads
from alexnet_cli.core.report.history import History, read_history
from alexnet_cli.core.runs.resolve import find_recorded_data, is_best
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import AlexNetError, DataError, RecipeError, StorageError, WeightsError
from alexnet_cli.recipe import PAPER, Recipe

FEW_CLASSES = 5  # with so few classes every answer is in the top 5
BATCH = 128
SAMPLE = 256  # images among which examples are searched
EXAMPLES = 8  # correct ones, and as many wrong ones
PARTS = ("results", "towers", "examples", "neighbors")
NOT_COMPUTED = "not computed yet; alexnet report adds it"
ATTEMPTS = 3  # to open a checkpoint that a running training may just have replaced

Advance = Callable[[int], None]
OutputOf = npt.NDArray[np.int64] | None
"""The network's output for each class of the data set, or None where both are numbered alike."""
Results = tuple[tuple[Mapping[str, Any], Evaluation], ...]
"""Totals and counts of an evaluation, one pair for each number of views."""


@dataclass(frozen=True)
class OpenedModel:
    """A model with the SHA-256 of its file."""

    model: Model
    sha256: str


@dataclass(frozen=True)
class Example:
    """An image, uint8 256 x 256 x 3, its class, the predicted class, and the predicted probability, 0..1."""

    image: ImageArray
    true: int
    predicted: int
    probability: float
    evidence: ImageArray | None = None
    """The center crop with the occlusion map of the predicted class over it, uint8; of wrong predictions."""


@dataclass(frozen=True)
class Measurements:
    """What the network predicts for the images of a data set. Parts that are missing are empty."""

    results: Results = ()
    towers: TowerTable | None = None
    correct: tuple[Example, ...] = ()
    wrong: tuple[Example, ...] = ()
    sampled: int = 0
    """Number of images among which the examples were searched."""
    neighborhoods: tuple[Neighborhood, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    """The missing ones of PARTS, each with the reason."""
    unsaved: str = ""
    """Why computed results could not also be saved in the run."""
    failed: str = ""
    """What is wrong with the network or the images."""

    @property
    def totals(self) -> Mapping[str, Any] | None:
        """The totals of the first evaluation."""
        return self.results[0][0] if self.results else None

    @property
    def counts(self) -> Evaluation | None:
        """The counts of the first evaluation."""
        return self.results[0][1] if self.results else None


@dataclass(frozen=True)
class Report:
    """Everything the page shows. `about` is the content of run.json, empty for a network alone."""

    name: str
    about: Mapping[str, Any]
    recipe: Recipe
    history: History
    model: Model | None
    data: Dataset | None
    towers: tuple[Kernels, ...] = ()
    specialization: Specialization | None = None
    measurements: Measurements = field(default_factory=Measurements)
    kept_filters: Mapping[int, Kernels] = field(default_factory=dict)
    """The first-layer filters of each epoch, if a replay is to be shown."""

    @property
    def parameters(self) -> int | None:
        """Number of weights and biases, without the mean image."""
        return sum(t.size for name, t in self.model.tensors.items() if name != "mean") if self.model else None

    @property
    def classes(self) -> tuple[ClassName, ...]:
        """The classes of the network; without one, of the data set."""
        return self.model.classes if self.model else self.data.classes if self.data else ()

    @property
    def class_names(self) -> list[str]:
        """The names of `classes`, those that several have with their wnid."""
        return make_names_unique(self.classes)

    @property
    def has_few_classes(self) -> bool:
        """Whether every answer is in the top 5, which makes the top-5 error meaningless."""
        return 0 < len(self.classes) <= FEW_CLASSES

    @property
    def is_trained(self) -> bool:
        """Whether the report is of a training run, not of a network alone."""
        return bool(self.about) and "imported" not in self.about

    @property
    def precision(self) -> str:
        """The precision of the training, as of its last start; empty if unknown."""
        resumed = self.about.get("resumed")
        parts = [self.about, *(resumed if isinstance(resumed, list) else ())]
        return str(parts[-1].get("precision") or "") if isinstance(parts[-1], dict) else ""

    @property
    def is_own_data(self) -> bool:
        """Whether the network is measured on the data set it was trained on."""
        return self.data is None or self.about.get("data_hash", self.data.hash) == self.data.hash


def open_model(path: Path) -> OpenedModel:
    """Read a model file, also while a training replaces the checkpoint that the link `best` points to.

    Raises:
        WeightsError: the file is missing, damaged, or no model file.
    """
    for _ in range(ATTEMPTS):
        real = (read_link(path.parent) or path.parent) / path.name
        try:
            return OpenedModel(read_model(real), hash_file(real))
        except (FileNotFoundError, WeightsError):
            if real.exists():
                raise
    raise WeightsError(f"{path} does not exist", "name a run, a checkpoint or a .safetensors file")


def find_run_data(run: Run | None, spec: str | None) -> Dataset | str:
    """Open the data set named by `spec`, or else the run's own. Returns the reason if the run's own cannot be used.

    Raises:
        DataError: `spec` is given and cannot be opened.
    """
    if spec is not None:
        return open_dataset(find_dataset(spec))
    about = run.about if run else {}
    path = about.get("data_path")
    known = Path(path) if isinstance(path, str) else None
    try:
        dataset = open_dataset((run and find_recorded_data(run)) or known or find_dataset(None))
    except (AlexNetError, OSError, ValueError) as error:  # the last two if the recorded path is no path at all
        reason = error.what if isinstance(error, AlexNetError) else str(error)
        name = f"the data set {about.get('data') or known.name} cannot be opened: " if known else ""
        return f"{name}{reason.replace(f'{Path.cwd()}{os.sep}', '')}; name one with alexnet report --data D"
    if about.get("data_hash", dataset.hash) != dataset.hash:
        return f"the run was trained on another data set than {dataset.name}; --data D uses it anyway"
    return dataset


def collect_report(
    run: Run | None,
    opened: OpenedModel | None,
    data: Dataset | str,
    placement: Placement | None = None,
    advance: Advance = lambda n: None,
) -> Report:
    """Collect the report of a run, of a network, or of both. `data` is the data set, or the reason why there is none.

    With a `placement`, missing measurements are computed there; `advance` is called with the number of images done.

    Raises:
        DataError: the run has neither a checkpoint nor a readable recipe.
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
        measurements=_collect_measurements(run, opened, data, placement, advance),
        kept_filters=_collect_filters(run, model) if placement else {},
    )


def _collect_filters(run: Run | None, model: Model | None) -> Mapping[int, Kernels]:
    """The filters that `train` kept; none if one is damaged, which `visualize-filters --replay` explains."""
    try:
        return read_kept_filters(run, model.tensors["conv1.weight"].shape) if run and model else {}
    except DataError:
        return {}


def _choose_recipe(run: Run | None, model: Model | None) -> Recipe:
    """The run's recipe (a resumed run may have more epochs); without a run, the model's."""
    try:
        return run.recipe if run else model.recipe if model else PAPER
    except RecipeError as error:
        if model:
            return model.recipe
        what = f"the run has no checkpoint, and its recipe cannot be read: {error.what}"
        raise DataError(what, "put recipe.toml back into its folder") from error


def _collect_measurements(
    run: Run | None, opened: OpenedModel | None, data: Dataset | str, placement: Placement | None, advance: Advance
) -> Measurements:
    if not isinstance(data, Dataset):
        return _all_missing(data)
    if not opened:
        return _all_missing("the run has no checkpoint yet")
    if not len(data.split("val")):
        return _all_missing("the data set has no validation images")
    try:
        output_of = match_classes(opened.model.classes, data.classes, opened.model.path)
        saved = read_results(run, opened, data)
        if placement:
            return _compute_measurements(run, opened, data, output_of, saved, placement, advance)
    except DataError as error:
        return replace(_all_missing(error.what), failed=error.what)
    return Measurements(saved, missing=dict.fromkeys(PARTS[1:] if saved else PARTS, NOT_COMPUTED))


def _all_missing(reason: str) -> Measurements:
    return Measurements(missing=dict.fromkeys(PARTS, reason))


def read_results(run: Run | None, opened: OpenedModel, data: Dataset) -> Results:
    """Read those results in the run's eval/ that belong to these weights and data."""
    if not run:
        return ()
    model, read = opened.model, []
    origin = {"weights_sha256": opened.sha256, "data_hash": data.hash}
    for views in results.PROTOCOL:
        stem = results.make_file_stem("val", views, model.path, data)
        if saved := results.read_results(run.path / "eval", stem, len(model.classes), origin):
            totals, counts = saved
            read.append((_make_totals(model, data, counts, totals["views"], totals["backend"]), counts))
    return tuple(read)


def _make_totals(model: Model, data: Dataset, counts: Evaluation, views: int, backend: str) -> dict[str, Any]:
    return results.summarize(counts, views, backend, results.find_published(model.recipe, data.classes))


def _compute_measurements(
    run: Run | None,
    opened: OpenedModel,
    data: Dataset,
    output_of: OutputOf,
    saved: Results,
    placement: Placement,
    advance: Advance,
) -> Measurements:
    """Compute everything but saved results. An error in the search for neighbors leaves out the neighbors alone."""
    model, val = opened.model, data.split("val")
    classify = HalvingClassifier(TorchClassifier.from_model(model, placement))
    folder = run.path if run else model.path.parent
    unsaved = "" if os.access(folder, os.W_OK) else f"{folder} cannot be written to"
    if not saved:
        counts = _evaluate(classify, model, val, output_of, advance)
        totals = _make_totals(model, data, counts, 1, "torch")
        saved = ((totals, counts),)
        if run and not unsaved and is_best(model.path):
            unsaved = _save_results(run, opened, data, totals, counts)
    towers = _measure_towers(run, opened, data, output_of, classify, placement, advance)
    correct, wrong = find_examples(classify, val, output_of, advance)
    evidence, sampled = _add_evidence(wrong, model), len(val.spread_rows(SAMPLE))
    measured = Measurements(saved, towers, correct, evidence, sampled, unsaved=unsaved)
    try:
        neighborhoods = find_neighborhoods(
            model, opened.sha256, run.path if run else None, data, keep_index=not unsaved, advance=advance
        )
    except (StorageError, DataError) as error:
        failed = error.what if isinstance(error, DataError) else ""
        return replace(measured, missing={"neighbors": error.what}, failed=failed)
    missing = {} if neighborhoods else {"neighbors": "the data set has no training images"}
    return replace(measured, neighborhoods=neighborhoods, missing=missing)


def _measure_towers(
    run: Run | None,
    opened: OpenedModel,
    data: Dataset,
    output_of: OutputOf,
    classify: Classify,
    placement: Placement,
    advance: Advance,
) -> TowerTable | None:
    """Read what `alexnet evaluate --towers` or an earlier report saved, or measure a sample; None for one tower."""
    model = opened.model
    if model.recipe.towers == 1:
        return None
    stem = results.make_file_stem("val", 1, model.path, data, ["towers"])
    path = run.path / "eval" / f"{stem}.json" if run else None
    origin = {"weights_sha256": opened.sha256, "data_hash": data.hash}
    if path and (saved := read_table(path, origin)):
        return saved
    classifiers: dict[int | None, Classify] = {None: classify}
    for tower in (1, 2):
        alone = TorchClassifier.from_model(silence_tower(model, tower), placement)
        classifiers[tower] = HalvingClassifier(alone)
    counts = count_sample(classifiers, model, data.split("val"), output_of, advance)
    source = results.describe_source("val", model.path, opened.sha256, data)
    record = counts.make_record(model.classes, 1, source)
    if path and is_best(model.path):
        with suppress(OSError):  # the next report measures again
            write_record(path, record)
    return TowerTable.from_record(record)


def _save_results(run: Run, opened: OpenedModel, data: Dataset, totals: Mapping[str, Any], counts: Evaluation) -> str:
    """Write results into the run's eval/ as `alexnet evaluate` does. Returns why that failed, or an empty text."""
    model = opened.model
    record = {**totals, **results.describe_source("val", model.path, opened.sha256, data)}
    stem = results.make_file_stem("val", 1, model.path, data)
    try:
        results.write_results(run.path / "eval", stem, counts, model.classes, record)
    except StorageError as error:
        return error.what
    return ""


def _evaluate(classify: Classify, model: Model, val: Split, output_of: OutputOf, advance: Advance) -> Evaluation:
    """Count the predictions for the center view of every image, as `alexnet evaluate` does."""
    counts, size = Evaluation.empty(len(model.classes)), min(BATCH, len(val))
    with Loader(val, size, choose_decode_threads(None)) as loader:
        batches = loader.batches(all_batches(len(val), size))
        for batch, _, _ in evaluate(classify, batches, counts, output_of):
            counts.check_finite(model.path)
            advance(len(batch.rows))
    return counts


def find_examples(
    classify: Classify, split: Split, output_of: OutputOf, advance: Advance
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The most confident predictions for a sample of a split: correct ones and wrong ones.

    Each class comes once before any class comes a second time.
    """
    rows = split.spread_rows(SAMPLE)
    true = split.labels[rows].astype(np.int64)
    true = true if output_of is None else output_of[true]
    batches = []
    for part in np.array_split(rows, -(-len(rows) // BATCH)):
        batches.append(classify(torch.from_numpy(np.stack(list(read_images(split, part.tolist()))))))
        advance(len(part))
    probabilities = np.concatenate(batches)
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)

    def choose(candidates: npt.NDArray[np.int64]) -> tuple[Example, ...]:
        order = candidates[np.argsort(-confidence[candidates], kind="stable")].tolist()
        best = alternate_classes(order, true)
        images = read_images(split, rows[best].tolist())
        return tuple(
            Example(image, int(true[i]), int(predicted[i]), float(confidence[i]))
            for i, image in zip(best, images, strict=True)
        )

    return choose(np.flatnonzero(predicted == true)), choose(np.flatnonzero(predicted != true))


def _add_evidence(examples: tuple[Example, ...], model: Model) -> tuple[Example, ...]:
    """Draw where the network saw the predicted class."""
    if not examples:
        return ()
    explainer, explained = Explainer(model, silenced=[None]), []
    for example in examples:
        explanation = explainer.explain(example.image, example.predicted)
        [whole] = explanation.attributions
        explained.append(replace(example, evidence=draw_overlay(explanation, whole, len(explanation.seen))))
    return tuple(explained)


def alternate_classes(order: Sequence[int], classes: npt.NDArray[np.int64]) -> list[int]:
    """The first EXAMPLES of `order`, after sorting by how often their class came before."""
    seen: Counter[int] = Counter()
    rounds = {}
    for i in order:
        rounds[i] = seen[int(classes[i])]
        seen[int(classes[i])] += 1
    return sorted(order, key=rounds.__getitem__)[:EXAMPLES]
