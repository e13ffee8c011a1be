"""Pictures to ranked labels: batches, a record for each picture. No torch but for that backend.

Names, crop and mean come with the network; the geometry is that of `images` and `views`, as in preparation.

As a feature extractor, the activations of layer 6 or 7 for many images go into one .npz file:

features        float32 N x units (4096 at full width)   as the next layer sees them: after the nonlinearity and times
                                                         dropout's test-time factor (section 4.2), averaged over views
paths           N strings; pictures that could not be read are left out
labels, wnids   N strings: the likeliest class           indices, probabilities   int64 and float32, of the same
layer, weights  what it is of
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.views import make_views, mean_correction
from alexnet_cli.core.files import replace_file
from alexnet_cli.core.inference.inputs import ImageInput, prefetch
from alexnet_cli.core.inference.session import FeatureLayer, Session
from alexnet_cli.errors import StorageError, UsageError, WeightsError
from alexnet_cli.recipe import Recipe

BATCH = 32  # views in one pass of the network
FEW = 32  # pictures up to which a quickly opened session wins

Predictions = Generator["Prediction", None, None]


class Classifier(Protocol):
    """What can classify crops: `session.Session` or `torch_session.TorchSession`."""

    path: Path
    device: str
    fallback: str
    about: Mapping[str, Any]
    """How the weights came to be: run, epoch, step."""

    @property
    def classes(self) -> tuple[ClassName, ...]:
        """The classes, in the order of the outputs."""

    @property
    def exif_rotate(self) -> bool:
        """Whether pictures are turned as their EXIF orientation says."""

    @property
    def recipe(self) -> Recipe:
        """What the network is."""

    def mean(self) -> npt.NDArray[np.float32]:
        """The mean image, float32 3 x 256 x 256."""

    def probabilities(self, crops: Any) -> npt.NDArray[np.float32]:
        """N x 3 x S x S, RGB, 0..255 -> N x classes."""

    def features(self, crops: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """The same, and N x units of the layer it was opened with."""


@dataclass(frozen=True)
class Label:
    """One answer: `index` is the network's output, `rank` counts from 1."""

    rank: int
    label: str
    wnid: str | None
    index: int
    probability: float


@dataclass(frozen=True)
class Prediction:
    """The answers for one picture, likeliest first; or, with none, why there are none."""

    path: str
    top: tuple[Label, ...] = ()
    error: str | None = None
    features: npt.NDArray[np.float32] | None = None
    """Activations of a layer (units,), if they were asked for."""


def open_classifier(
    path: Path, backend: Literal["auto", "onnx", "torch"], few: bool = False, layer: FeatureLayer | None = None
) -> Classifier:
    """The network of a model file; only backend `torch` imports torch. `layer`: whose activations are wanted too.

    Raises:
        WeightsError: the file is missing, damaged or foreign.
        UsageError: backend `torch` with an ONNX file.
    """
    if backend != "torch":
        return Session(path, few=few, layer=layer)
    if path.suffix == ".onnx":
        raise UsageError(f"--backend torch cannot run {path}", "give a run, a checkpoint or a .safetensors file")
    from alexnet_cli.core.inference.torch_session import TorchSession

    return TorchSession(path, layer=layer)


def predict(
    sources: Iterable[ImageInput], classifier: Classifier, k: int = 5, count: int = 1, features: bool = False
) -> Predictions:
    """One record for each picture, in order: the `k` likeliest classes over `count` views (1, or 10 averaged).

    With `features` each has the activations of the layer that the classifier was opened with, averaged likewise.

    Raises:
        UsageError: another number of views.
        WeightsError: what the network computes is no number.
    """
    if count not in (1, 10):
        raise UsageError(f"--views {count}: there is the center view, 1, and the paper's ten", "use 1 or 10")
    together = max(1, BATCH // count)
    correction = _correction(classifier, count)
    with contextlib.closing(prefetch(sources, 2 * together, classifier.exif_rotate)) as loaded:
        while batch := list(islice(loaded, together)):
            crops = [make_views(p, classifier.recipe.input_size, count) for _, p in batch if not isinstance(p, str)]
            rows = zip(*_averages(classifier, crops, count, correction, features), strict=True)
            for path, picture in batch:
                if isinstance(picture, str):
                    yield Prediction(path, error=picture)
                else:
                    chances, units = next(rows)
                    yield Prediction(
                        path, rank_labels(chances, classifier.classes, k), features=units if features else None
                    )


def compute_probabilities(
    pictures: npt.NDArray[np.uint8], classifier: Classifier, count: int = 1
) -> npt.NDArray[np.float32]:
    """N x classes of decoded pictures, uint8 N x 256 x 256 x 3, averaged over `count` views (1 or 10).

    The network sees as many views at once as there are pictures.
    """
    correction, together = _correction(classifier, count), max(1, len(pictures) // count)
    parts = []
    for first in range(0, len(pictures), together):
        crops = [make_views(p, classifier.recipe.input_size, count) for p in pictures[first : first + together]]
        parts.append(_averages(classifier, crops, count, correction)[0])
    return np.concatenate(parts)


def _correction(classifier: Classifier, count: int) -> npt.NDArray[np.float32] | None:
    """What to add to the views of a network that was trained less the mean under the crop."""
    if count == 1 or classifier.recipe.mean != "image-at-crop":
        return None
    return mean_correction(classifier.mean(), classifier.recipe.input_size, count)


def _averages(
    classifier: Classifier,
    crops: list[ImageArray],
    count: int,
    correction: npt.NDArray[np.float32] | None,
    features: bool = False,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Pictures x classes: probabilities, not logits, are averaged over a picture's views (section 4.1).

    And pictures x units of the layer, without `features` x 0.
    """
    if not crops:
        return np.empty((0, len(classifier.classes)), np.float32), np.empty((0, 0), np.float32)
    inputs = np.concatenate([crop if correction is None else crop + correction for crop in crops])
    if features:
        chances, units = classifier.features(inputs)
    else:
        chances, units = classifier.probabilities(inputs), np.empty((len(inputs), 0), np.float32)
    if not np.isfinite(chances).all():
        raise WeightsError(f"{classifier.path}: what the network computes is no number", "its weights are damaged")
    return chances.reshape(len(crops), count, -1).mean(1), units.reshape(len(crops), count, units.shape[1]).mean(1)


def rank_labels(probabilities: npt.NDArray[np.float32], classes: Sequence[ClassName], k: int) -> tuple[Label, ...]:
    """The `k` likeliest classes, likeliest first; equal ones in class order."""
    order = np.argsort(-probabilities, kind="stable")[:k].tolist()
    return tuple(
        Label(rank, classes[i].name, classes[i].wnid, i, float(probabilities[i])) for rank, i in enumerate(order, 1)
    )


@contextlib.contextmanager
def write_features(path: Path, classifier: Classifier, layer: str) -> Iterator[Callable[[Prediction], None]]:
    """A function that takes predictions; when the block ends well, `path` appears whole, otherwise not at all.

    Rows go to the disk as they come, so that any number of pictures fits.

    Raises:
        StorageError: the file cannot be written.
    """
    kept: list[Prediction] = []
    try:
        with tempfile.TemporaryFile(dir=path.parent) as rows:

            def add(prediction: Prediction) -> None:
                if prediction.features is None:
                    return
                try:
                    rows.write(prediction.features.tobytes())
                except OSError as error:
                    raise _unwritable(path, error) from error
                kept.append(Prediction(prediction.path, prediction.top[:1]))

            yield add
            rows.flush()
            units = rows.tell() // 4 // len(kept) if kept else 0
            values = np.memmap(rows, np.float32, "r", shape=(len(kept), units)) if kept else np.empty((0, 0), "f4")
            names = {"layer": np.array(layer), "weights": np.array(str(classifier.path))}
            with replace_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **_feature_arrays(kept, values), **names)
    except OSError as error:
        raise _unwritable(path, error) from error


def _feature_arrays(kept: list[Prediction], values: Any) -> dict[str, Any]:
    best = [prediction.top[0] for prediction in kept]
    return {
        "features": values,
        "paths": np.array([prediction.path for prediction in kept], np.str_),
        "labels": np.array([label.label for label in best], np.str_),
        "wnids": np.array([label.wnid or "" for label in best], np.str_),
        "indices": np.array([label.index for label in best], np.int64),
        "probabilities": np.array([label.probability for label in best], np.float32),
    }


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error.strerror or error}", "choose another -o, or free some space")
