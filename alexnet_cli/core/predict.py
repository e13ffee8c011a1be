"""Pictures to ranked labels: paths, batches, a record for each picture. No torch but for that backend.

Names, crop and mean come with the network; the geometry is that of `images` and `views`, as in preparation.
Pictures are decoded in threads ahead of the network, so that a folder runs at the network's speed.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from alexnet_cli.core import images
from alexnet_cli.core.listing import listing
from alexnet_cli.core.session import Session
from alexnet_cli.core.sources import ClassName
from alexnet_cli.core.views import mean_correction, views
from alexnet_cli.errors import DataError, UsageError
from alexnet_cli.recipe import Recipe

BATCH = 32  # views in one pass of the network
FEW = 32  # pictures up to which a quickly opened session wins

Picture = npt.NDArray[np.uint8]
Predictions = Generator["Prediction", None, None]


class Classifier(Protocol):
    """What can classify crops: `session.Session` or `torch_session.TorchSession`."""

    path: Path
    device: str
    fallback: str

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


def open_classifier(path: Path, backend: Literal["auto", "onnx", "torch"], few: bool = False) -> Classifier:
    """The network of a model file; only backend `torch` imports torch.

    Raises:
        WeightsError: the file is missing, damaged or foreign.
        UsageError: backend `torch` with an ONNX file.
    """
    if backend != "torch":
        return Session(path, few=few)
    if path.suffix == ".onnx":
        raise UsageError(f"--backend torch cannot run {path}", "give a run, a checkpoint or a .safetensors file")
    from alexnet_cli.core.torch_session import TorchSession

    return TorchSession(path)


def expand(inputs: Sequence[str], stdin: Iterable[str]) -> list[str]:
    """Files, folders (all pictures below, sorted), patterns and `-` (`stdin`, one path a line) -> paths.

    What is not there stays in the list, so that it gets a record with the reason.

    Raises:
        DataError: there is no file at all among them.
    """
    paths: list[str] = []
    for text in inputs:
        if text == "-":
            lines = (line.rstrip("\r\n") for line in stdin)
            paths += [path for line in lines if line.strip() for path in _below(line)]
        elif not os.path.exists(text) and (found := sorted(glob.glob(text, recursive=True))):
            paths += [path for name in found for path in _below(name)]
        else:
            paths += _below(text)
    if not any(os.path.isfile(path) for path in paths):
        raise DataError(
            f"no picture found: {', '.join(inputs[:3])}{' …' if len(inputs) > 3 else ''}",
            "give files, patterns, or folders with pictures in them",
        )
    return paths


def _below(name: str) -> list[str]:
    """The pictures below a folder, sorted; the name itself if it is no folder, or one without pictures."""
    if not os.path.isdir(name):
        return [name]
    try:
        files, _ = listing(Path(name), ["."])
    except DataError:  # a folder that cannot be listed gets its record like a picture that cannot be read
        return [name]
    return [os.path.join(name, file.removeprefix("./")) for file in files.names] or [name]


def load(path: str, exif_rotate: bool = False) -> Picture | str:
    """uint8 256 x 256 x 3, turned as its EXIF says if asked; or why not."""
    try:
        if os.path.isdir(path):
            return "a folder without readable pictures"
        data = Path(path).read_bytes()
        rgb = images.decode(data)
        return images.to_256(images.upright(rgb, data) if exif_rotate else rgb)
    except DataError as error:
        return error.what
    except OSError as error:
        return error.strerror or str(error)


def predict(paths: Iterable[str], classifier: Classifier, k: int = 5, count: int = 1) -> Predictions:
    """One record for each path, in order: the `k` likeliest classes over `count` views (1, or 10 averaged).

    Raises:
        UsageError: another number of views.
    """
    if count not in (1, 10):
        raise UsageError(f"--views {count}: there is the centre view, 1, and the paper's ten", "use 1 or 10")
    together = max(1, BATCH // count)
    correction = _correction(classifier, count)
    with contextlib.closing(_ahead(paths, 2 * together, classifier.exif_rotate)) as loaded:
        while batch := list(islice(loaded, together)):
            crops = [views(p, classifier.recipe.input_size, count) for _, p in batch if not isinstance(p, str)]
            averages = iter(_averages(classifier, crops, count, correction))
            for path, picture in batch:
                if isinstance(picture, str):
                    yield Prediction(path, error=picture)
                else:
                    yield Prediction(path, ranked(next(averages), classifier.classes, k))


def probabilities(pictures: npt.NDArray[np.uint8], classifier: Classifier, count: int = 1) -> npt.NDArray[np.float32]:
    """N x classes of decoded pictures, uint8 N x 256 x 256 x 3, averaged over `count` views (1 or 10)."""
    crops = [views(picture, classifier.recipe.input_size, count) for picture in pictures]
    return _averages(classifier, crops, count, _correction(classifier, count))


def _correction(classifier: Classifier, count: int) -> npt.NDArray[np.float32] | None:
    """What to add to the views of a network that was trained less the mean under the crop."""
    if count == 1 or classifier.recipe.mean != "image-at-crop":
        return None
    return mean_correction(classifier.mean(), classifier.recipe.input_size, count)


def _averages(
    classifier: Classifier, crops: list[Picture], count: int, correction: npt.NDArray[np.float32] | None
) -> npt.NDArray[np.float32]:
    """Pictures x classes: probabilities, not logits, are averaged over a picture's views (section 4.1)."""
    if not crops:
        return np.empty((0, len(classifier.classes)), np.float32)
    inputs = [crop if correction is None else crop + correction for crop in crops]
    result: npt.NDArray[np.float32] = (
        classifier.probabilities(np.concatenate(inputs)).reshape(len(crops), count, -1).mean(1)
    )
    return result


def ranked(probabilities: npt.NDArray[np.float32], classes: Sequence[ClassName], k: int) -> tuple[Label, ...]:
    """The `k` likeliest classes, likeliest first; equal ones in class order."""
    order = np.argsort(-probabilities, kind="stable")[:k].tolist()
    return tuple(
        Label(rank, classes[i].name, classes[i].wnid, i, float(probabilities[i])) for rank, i in enumerate(order, 1)
    )


def _ahead(paths: Iterable[str], window: int, exif_rotate: bool) -> Generator[tuple[str, Picture | str], None, None]:
    """Every path with its picture, in order, while the next `window` are being decoded in threads."""
    remaining = iter(paths)
    waiting: deque[tuple[str, Future[Picture | str]]] = deque()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        try:
            waiting.extend((path, pool.submit(load, path, exif_rotate)) for path in islice(remaining, window))
            while waiting:
                path, future = waiting.popleft()
                waiting.extend((later, pool.submit(load, later, exif_rotate)) for later in islice(remaining, 1))
                yield path, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
