"""Classify images: decode, run in batches, rank the classes; one record per image. Loads torch only if asked to.

As a feature extractor, it writes the activations of layer 6 or 7 into one .npz file:

features                 float32 N x units (4096 at full width): after the nonlinearity and times dropout's test-time
                         factor (section 4.2), averaged over views
paths                    N strings, without the images that could not be read
labels, wnids, indices   N strings, N strings, int64 N: the most likely class
probabilities            float32 N: of that class
layer, weights           name of the layer, path of the model file
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.views import make_views, mean_correction
from alexnet_cli.core.files import replace_file
from alexnet_cli.core.inference.inputs import ImageInput, prefetch
from alexnet_cli.core.inference.session import FeatureLayer, Session
from alexnet_cli.errors import StorageError, UsageError, WeightsError

BATCH = 32  # views in one pass of the network
FAST_START_VIEWS = 32  # up to so many views, a session opened with `fast_start` is done sooner

Array = npt.NDArray[np.float32]
if TYPE_CHECKING:
    from alexnet_cli.core.inference.torch_session import TorchSession

    Classifier = Session | TorchSession


@dataclass(frozen=True)
class Label:
    """One of the most likely classes: `index` is the network's output, `rank` counts from 1."""

    rank: int
    label: str
    wnid: str | None
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of one image, or the `error` that prevented reading it."""

    path: str
    top: tuple[Label, ...] = ()
    error: str | None = None
    activations: Array | None = None
    """Activations of a layer (units,), if they were asked for."""


def open_classifier(
    path: Path, backend: Literal["auto", "onnx", "torch"], fast_start: bool = False, layer: FeatureLayer | None = None
) -> Classifier:
    """Open a model file; only backend `torch` imports torch. `layer`: also compute the activations of this layer.

    Raises:
        WeightsError: the file is missing, corrupt or another program's.
        UsageError: backend `torch` with an ONNX file.
    """
    if backend != "torch":
        return Session(path, fast_start=fast_start, layer=layer)
    if path.suffix == ".onnx":
        raise UsageError(f"--backend torch cannot run {path}", "use a run, a checkpoint or a .safetensors file")
    from alexnet_cli.core.inference.torch_session import TorchSession

    return TorchSession(path, layer=layer)


def predict(
    images: Iterable[ImageInput], classifier: Classifier, k: int = 5, views: int = 1, activations: bool = False
) -> Generator[Prediction]:
    """Yield one record per image, in order: the `k` most likely classes, averaged over `views` (1 or 10).

    With `activations`, a record also has those of the layer that the classifier was opened with, averaged likewise.

    Raises:
        WeightsError: the network computes NaN or infinity.
    """
    images_per_batch = max(1, BATCH // views)
    correction = _mean_correction(classifier, views)
    with contextlib.closing(prefetch(images, 2 * images_per_batch, classifier.exif_rotate)) as loaded:
        while batch := list(islice(loaded, images_per_batch)):
            readable = [image for _, image in batch if not isinstance(image, str)]
            rows: Iterator[tuple[Array, Array]] = iter(())
            if readable:
                rows = zip(*_run(classifier, readable, views, correction, activations), strict=True)
            for path, image in batch:
                if isinstance(image, str):
                    yield Prediction(path, error=image)
                    continue
                probabilities, values = next(rows)
                top = rank_labels(probabilities, classifier.classes, k)
                yield Prediction(path, top, activations=values if activations else None)


def compute_probabilities(images: npt.NDArray[np.uint8], classifier: Classifier, views: int = 1) -> Array:
    """Return N x classes for decoded images, uint8 N x 256 x 256 x 3, averaged over `views` (1 or 10).

    One pass of the network takes as many views as there are images.
    """
    correction, step = _mean_correction(classifier, views), max(1, len(images) // views)
    parts = [
        _run(classifier, list(images[first : first + step]), views, correction)[0]
        for first in range(0, len(images), step)
    ]
    return np.concatenate(parts)


def _mean_correction(classifier: Classifier, views: int) -> Array | None:
    """Return what to add to the views if the network was trained with the mean under each crop subtracted."""
    if views == 1 or classifier.recipe.mean != "image-at-crop":
        return None
    return mean_correction(classifier.mean(), classifier.recipe.input_size, views)


def _run(
    classifier: Classifier, images: list[ImageArray], views: int, correction: Array | None, activations: bool = False
) -> tuple[Array, Array]:
    """Return images x classes and images x units (x 0 without `activations`), averaged over each image's views.

    Probabilities are averaged, not logits (section 4.1).
    """
    crops = [make_views(image, classifier.recipe.input_size, views) for image in images]
    inputs = np.concatenate([crop if correction is None else crop + correction for crop in crops])
    if activations:
        probabilities, values = classifier.probabilities_and_activations(inputs)
    else:
        probabilities, values = classifier.probabilities(inputs), np.empty((len(inputs), 0), np.float32)
    if not np.isfinite(probabilities).all():
        raise WeightsError(f"{classifier.path}: the network computes NaN or infinity", "its weights are corrupt")
    by_image = (len(images), views)
    return probabilities.reshape(*by_image, -1).mean(1), values.reshape(*by_image, values.shape[1]).mean(1)


def rank_labels(probabilities: Array, classes: Sequence[ClassName], k: int) -> tuple[Label, ...]:
    """Return the `k` most likely classes, most likely first; ties keep class order."""
    order = np.argsort(-probabilities, kind="stable")[:k].tolist()
    return tuple(
        Label(rank, classes[i].name, classes[i].wnid, i, float(probabilities[i])) for rank, i in enumerate(order, 1)
    )


@contextlib.contextmanager
def write_features(path: Path, classifier: Classifier, layer: str) -> Iterator[Callable[[Prediction], None]]:
    """Give a function that takes predictions. If the block ends well, `path` appears whole, otherwise not at all.

    Activations go to a temporary file as they come, so that memory does not limit the number of images.

    Raises:
        StorageError: the file cannot be written.
    """
    kept: list[Prediction] = []
    try:
        with tempfile.TemporaryFile(dir=path.parent) as rows:

            def add(prediction: Prediction) -> None:
                if prediction.activations is not None:
                    try:
                        rows.write(prediction.activations.tobytes())
                    except OSError as error:
                        raise _storage_error(path, error) from error
                    kept.append(Prediction(prediction.path, prediction.top[:1]))

            yield add
            rows.flush()
            values: Any = np.empty((0, 0), np.float32)
            if kept:
                values = np.memmap(rows, np.float32, "r").reshape(len(kept), -1)
            with replace_file(path) as temporary:
                arrays = _make_feature_arrays(kept) | {
                    "layer": np.array(layer),
                    "weights": np.array(str(classifier.path)),
                }
                np.savez(temporary, features=values, **arrays)
    except OSError as error:
        raise _storage_error(path, error) from error


def _make_feature_arrays(predictions: list[Prediction]) -> dict[str, Any]:
    best = [prediction.top[0] for prediction in predictions]
    return {
        "paths": np.array([prediction.path for prediction in predictions], np.str_),
        "labels": np.array([label.label for label in best], np.str_),
        "wnids": np.array([label.wnid or "" for label in best], np.str_),
        "indices": np.array([label.index for label in best], np.int64),
        "probabilities": np.array([label.probability for label in best], np.float32),
    }


def _storage_error(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}", "choose another -o, or free some space")
