"""Classify images: decode, run in batches, rank the classes; one record per image. Loads torch only if asked to.

As a feature extractor, it writes the activations of any layers, averaged over views, into one .npz file:

conv3, drop7, ...        for each layer float32 N x maps x rows x columns, or N x units in layers 6 to 8
paths                    N strings, without the images that could not be read
labels, wnids, indices   N strings, N strings, int64 N: the most likely class
probabilities            float32 N: of that class
weights                  path of the model file
tower, without_tower     the tower, if only one was asked for; the one that was switched off, if any

A .safetensors file has the same layers, `indices` and `probabilities`. Its metadata has as JSON the last two lines and
`paths`, and `classes` and `wnids` by index, not by image: the format limits it to 100 MB.
"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.views import make_views, mean_correction
from alexnet_cli.core.files import replace_file
from alexnet_cli.core.inference.inputs import ImageInput, prefetch
from alexnet_cli.core.inference.session import LayerChoice, ModelSource, Session
from alexnet_cli.core.model.model_file import check_finite, read_model, silence_tower
from alexnet_cli.errors import UsageError, storage_errors

BATCH = 32  # views in one pass of the network
MAX_PATH_BYTES = 95 * 10**6  # in the header of a .safetensors file, which readers limit to 100 MB
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
    activations: Mapping[str, Array] = field(default_factory=dict)
    """By layer, maps x rows x columns or units, averaged over views; of the layers that the classifier has."""


def open_classifier(
    path: Path,
    backend: Literal["auto", "onnx", "torch"],
    fast_start: bool = False,
    layers: LayerChoice = (),
    without_tower: int | None = None,
) -> Classifier:
    """Open a model file; only backend `torch` imports torch. `layers`: compute the activations of these layers too.

    `without_tower` (from 1) switches a tower off, which needs a .safetensors file.

    Raises:
        WeightsError: the file is missing, corrupt or another program's.
        UsageError: backend `torch` with an ONNX file, or the network has no such layer or tower, or a single tower.
    """
    source: ModelSource = path if without_tower is None else silence_tower(read_model(path), without_tower)
    if backend != "torch":
        return Session(source, fast_start=fast_start, layers=layers)
    if path.suffix == ".onnx":
        raise UsageError(f"--backend torch cannot run {path}", "use a run, a checkpoint or a .safetensors file")
    from alexnet_cli.core.inference.torch_session import TorchSession

    return TorchSession(source, layers=layers)


def predict(images: Iterable[ImageInput], classifier: Classifier, k: int = 5, views: int = 1) -> Generator[Prediction]:
    """Yield one record per image, in order: the `k` most likely classes, averaged over `views` (1 or 10).

    A record also has the activations of the layers that the classifier was opened with.

    Raises:
        WeightsError: the network computes NaN or infinity.
    """
    images_per_batch = max(1, BATCH // views)
    correction = _mean_correction(classifier, views)
    with contextlib.closing(prefetch(images, 2 * images_per_batch, classifier.exif_rotate)) as loaded:
        while batch := list(islice(loaded, images_per_batch)):
            readable = [image for _, image in batch if not isinstance(image, str)]
            rows = count()
            if readable:
                probabilities, activations = _run(classifier, readable, views, correction)
            for path, image in batch:
                if isinstance(image, str):
                    yield Prediction(path, error=image)
                    continue
                row = next(rows)
                top = rank_labels(probabilities[row], classifier.classes, k)
                yield Prediction(path, top, activations={layer: values[row] for layer, values in activations.items()})


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
    classifier: Classifier, images: list[ImageArray], views: int, correction: Array | None
) -> tuple[Array, dict[str, Array]]:
    """Return images x classes, and the activations of each layer of the classifier, averaged over an image's views.

    Probabilities are averaged, not logits (section 4.1).
    """
    crops = [make_views(image, classifier.recipe.input_size, views) for image in images]
    inputs = np.concatenate([crop if correction is None else crop + correction for crop in crops])
    probabilities, activations = classifier.probabilities_and_activations(inputs)
    check_finite(classifier.path, probabilities)

    def average(values: Array) -> Array:
        averages: Array = values.reshape(len(images), views, *values.shape[1:]).mean(1)
        return averages

    return average(probabilities), {layer: average(values) for layer, values in activations.items()}


def rank_labels(probabilities: Array, classes: Sequence[ClassName], k: int) -> tuple[Label, ...]:
    """Return the `k` most likely classes, most likely first; ties keep class order."""
    order = np.argsort(-probabilities, kind="stable")[:k].tolist()
    return tuple(
        Label(rank, classes[i].name, classes[i].wnid, i, float(probabilities[i])) for rank, i in enumerate(order, 1)
    )


def check_paths_fit(images: Sequence[ImageInput]) -> None:
    """Raise UsageError if the paths of so many images do not fit into the header of a .safetensors file."""
    if sum(len(json.dumps(image)) + 4 for image in images if isinstance(image, str)) > MAX_PATH_BYTES:
        what = f"the paths of {len(images):,} images do not fit into the header of a .safetensors file"
        raise UsageError(what, "write an .npz file with -o, or give the images in several parts")


@contextlib.contextmanager
def write_features(
    path: Path, classifier: Classifier, tower: int | None = None
) -> Iterator[Callable[[Prediction], None]]:
    """Give a function that takes predictions. If the block ends well, `path` appears whole, otherwise not at all.

    `tower` (from 1) keeps only this tower's maps or units. Activations go to a temporary file for each layer as they
    come, and from there to `path`, so that memory does not limit the number of images.

    Raises:
        StorageError: the file cannot be written.
    """
    kept, shapes = list[tuple[str, Label]](), dict[str, tuple[int, ...]]()
    towers = classifier.recipe.towers if tower else 1
    with contextlib.ExitStack() as stack:
        with storage_errors(path):
            files = {layer: stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for layer in classifier.layers}

        def add(prediction: Prediction) -> None:
            if prediction.error is not None:
                return
            kept.append((prediction.path, prediction.top[0]))
            for layer, values in prediction.activations.items():
                part = np.split(values, towers)[(tower or 1) - 1].astype("<f4", copy=False)
                shapes[layer] = part.shape
                with storage_errors(path):
                    files[layer].write(part.tobytes())

        yield add
        features = [_Feature(layer, (len(kept), *shapes.get(layer, ())), file) for layer, file in files.items()]
        write = _write_npz if path.suffix == ".npz" else _write_safetensors
        with storage_errors(path), replace_file(path) as temporary:
            write(temporary, features, kept, classifier, tower)


@dataclass(frozen=True)
class _Feature:
    """The activations of a layer, float32 as bytes in a temporary file."""

    layer: str
    shape: tuple[int, ...]
    file: IO[bytes]

    def move(self, target: IO[bytes]) -> None:
        """Copy the activations, and free their space on the disk."""
        self.file.seek(0)
        shutil.copyfileobj(self.file, target, 2**20)
        self.file.close()


def _describe_towers(classifier: Classifier, tower: int | None) -> dict[str, int]:
    """The tower whose activations are kept, and the tower that was switched off, if any."""
    towers = {"tower": tower, "without_tower": classifier.info.get("without_tower")}
    return {key: value for key, value in towers.items() if value}


def _write_npz(
    path: Path, features: list[_Feature], kept: list[tuple[str, Label]], classifier: Classifier, tower: int | None
) -> None:
    best = [label for _, label in kept]
    arrays: dict[str, Any] = {
        "paths": np.array([path for path, _ in kept], np.str_),
        "labels": np.array([label.label for label in best], np.str_),
        "wnids": np.array([label.wnid or "" for label in best], np.str_),
        "indices": np.array([label.index for label in best], np.int64),
        "probabilities": np.array([label.probability for label in best], np.float32),
        "weights": np.array(str(classifier.path)),
    } | {key: np.array(value) for key, value in _describe_towers(classifier, tower).items()}
    with zipfile.ZipFile(path, "w") as archive:
        for feature in features:
            with archive.open(f"{feature.layer}.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": feature.shape}
                np.lib.format.write_array_header_1_0(member, header)
                feature.move(member)
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def _write_safetensors(
    path: Path, features: list[_Feature], kept: list[tuple[str, Label]], classifier: Classifier, tower: int | None
) -> None:
    metadata = {
        "weights": str(classifier.path),
        "paths": [path for path, _ in kept],
        "classes": [name for name, _ in classifier.classes],
        "wnids": [wnid or "" for _, wnid in classifier.classes],
    } | _describe_towers(classifier, tower)
    indices = np.array([label.index for _, label in kept], "<i8")
    probabilities = np.array([label.probability for _, label in kept], "<f4")
    header, end = dict[str, Any]({"__metadata__": {key: json.dumps(value) for key, value in metadata.items()}}), 0
    tensors = [("indices", "I64", indices.shape), ("probabilities", "F32", probabilities.shape)]
    for name, dtype, shape in [*tensors, *((feature.layer, "F32", feature.shape) for feature in features)]:
        start, end = end, end + math.prod(shape) * (8 if dtype == "I64" else 4)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # numbers begin at a multiple of eight bytes
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + indices.tobytes() + probabilities.tobytes())
        for feature in features:
            feature.move(file)
