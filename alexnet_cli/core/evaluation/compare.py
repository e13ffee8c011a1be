"""Compare two runs: what differs between them, and which of their networks is right on the same images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.loader import Loader, all_batches
from alexnet_cli.core.data.shards import Dataset, find_dataset, open_dataset
from alexnet_cli.core.evaluation.evaluate import Evaluation, HalvingClassifier, TorchClassifier, match_classes
from alexnet_cli.core.intervals import PairedCounts
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.parallel.placement import Placement, choose_decode_threads
from alexnet_cli.core.runs.resolve import find_recorded_data
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError
from alexnet_cli.recipe import compare_recipes

BATCH = 128


@dataclass(frozen=True)
class PairedAnswers:
    """What two networks predict for the center view of the N validation images of a data set."""

    data: Dataset
    labels: npt.NDArray[np.int64]
    """N: the true class of each image."""
    predicted: npt.NDArray[np.int64]
    """2 x N: the most probable class; -1 if the data set does not have it."""
    probabilities: npt.NDArray[np.float32]
    """2 x N: the probability of that class."""

    @property
    def right(self) -> npt.NDArray[np.bool_]:
        """2 x N: whether each network is right."""
        return np.equal(self.predicted, self.labels)

    @property
    def whole(self) -> PairedCounts:
        """The counts of all images together."""
        return PairedCounts.from_right(*self.right)

    def list_classes(self) -> list[tuple[int, PairedCounts]]:
        """The classes that have images, each with its counts, largest difference first."""
        indices = np.unique(self.labels).tolist()
        counts = [(index, PairedCounts.from_right(*self.right[:, self.labels == index])) for index in indices]
        return sorted(counts, key=lambda row: -abs(row[1].difference))

    def summarize(self) -> dict[str, Any]:
        """The totals for --json: errors and their difference as shares."""
        whole = self.whole
        return {
            "data": str(self.data.path), "data_hash": self.data.hash, "images": whole.images,
            "top1_error": list(whole.errors),
            "both_right": whole.both, "only_right": [whole.only_first, whole.only_second],
            "difference": whole.difference, "difference_interval": list(whole.interval),
        }  # fmt: skip


def find_differences(one: Run, other: Run) -> list[dict[str, Any]]:
    """Return what differs in recipe, training data, versions and devices: `key` and both `values`."""
    values = {f"recipe {key}": pair for key, pair in compare_recipes(one.recipe, other.recipe).items()}
    abouts = [_flatten_about(run.about) for run in (one, other)]
    for key in dict.fromkeys([*abouts[0], *abouts[1]]):
        pair = abouts[0].get(key, "-"), abouts[1].get(key, "-")
        if pair[0] != pair[1]:
            values[key] = pair
    return [{"key": key, "values": list(pair)} for key, pair in values.items()]


def _flatten_about(about: Mapping[str, Any]) -> dict[str, Any]:
    """Return those entries of run.json that can change the result of a training."""
    versions = about.get("versions")
    kept = {key: about[key] for key in ("data_hash", "precision", "devices", "init_from", "changed") if about.get(key)}
    kept |= {f"version {key}": value for key, value in versions.items()} if isinstance(versions, dict) else {}
    return kept


def find_common_data(pair: Sequence[Run], spec: str | None, hint: str) -> Dataset:
    """Open the data set named by `spec`, or else the one on which both runs were trained. `hint` says how to name one.

    Imported networks were trained on none, and go with any.

    Raises:
        DataError: there is no common data set, or it has no validation images.
    """
    hashes = {str(run.about["data_hash"]) for run in pair if run.about.get("data_hash")}
    if spec is None and len(hashes) > 1:
        raise DataError("they were trained on different data sets", hint)
    recorded = next(filter(None, map(find_recorded_data, pair)), None)
    dataset = open_dataset(find_dataset(spec or (str(recorded) if recorded else None)))
    if spec is None and not hashes <= {dataset.hash}:
        raise DataError(f"they were trained on another data set than {dataset.path}", hint)
    dataset.nonempty_split("val")
    return dataset


def classify_pair(
    models: Sequence[Model], dataset: Dataset, placement: Placement, advance: Callable[[int], None]
) -> PairedAnswers:
    """Classify the validation images with two networks; `advance` is called with the number of images done.

    Raises:
        DataError: a network does not know a class of the data set.
        WeightsError: the output of a network is NaN.
    """
    val, networks = dataset.split("val"), []
    for model in models:
        classify = HalvingClassifier(TorchClassifier.from_model(model, placement))
        output_of = match_classes(model.classes, dataset.classes, model.path)
        outputs = np.arange(len(dataset.classes)) if output_of is None else output_of
        class_of = np.full(len(model.classes), -1)
        class_of[outputs] = np.arange(len(outputs))
        counts = Evaluation.empty(len(model.classes))
        networks.append((model.path, classify, outputs, class_of, counts))
    labels, predicted = np.empty(len(val), np.int64), np.empty((2, len(val)), np.int64)
    probabilities, size = np.empty((2, len(val)), np.float32), min(BATCH, len(val))
    with Loader(val, size, choose_decode_threads(None), placement.device) as loader:
        for batch in loader.batches(all_batches(len(val), size)):
            labels[batch.rows] = true = batch.labels.numpy()
            for number, (path, classify, outputs, class_of, counts) in enumerate(networks):
                output = classify(batch.images)
                best = counts.add(output, outputs[true])[:, 0]
                counts.check_finite(path)
                predicted[number, batch.rows] = class_of[best]
                probabilities[number, batch.rows] = output[np.arange(len(best)), best]
            advance(len(batch.rows))
    return PairedAnswers(dataset, labels, predicted, probabilities)
