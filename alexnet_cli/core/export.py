"""One verified ONNX file: written beside its place, compared with PyTorch on pictures, only then renamed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from alexnet_cli.core import atomic, onnx_fp16, onnx_graph, onnx_metadata
from alexnet_cli.core.probes import centres, evenly
from alexnet_cli.core.session import Session
from alexnet_cli.core.shards import Dataset
from alexnet_cli.core.weights import Model
from alexnet_cli.errors import DataError, StorageError, VerificationError, WeightsError

LARGEST_DIFFERENCE = 1e-4  # of a probability
LARGE = 50.0  # a logit; trained networks stay below
BATCH = 32
PICTURES = 128

Crops = npt.NDArray[np.uint8]
Logits = Callable[[Crops], npt.NDArray[np.float32]]
Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Tolerance:
    """How far two implementations may be apart.

    `probability`: of a probability, in a picture whose logits reach LARGE; where they are larger, so is rounding.
    `spread`: of a logit, as a share of a picture's logits from lowest to highest.
    `rounding`: of a logit, relative to the largest; so close together, two answers count as one.
    """

    probability: float
    spread: float
    rounding: float


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(LARGEST_DIFFERENCE, 1e-4, 1e-5),  # float32 sums in another order
    "fp16": Tolerance(2e-2, 1.5e-3, 5e-4),  # 11 bits: rounded weights were seen to take a quarter of it
}

HINTS: dict[Precision, str] = {
    "fp32": "`alexnet doctor` shows the versions in use; please report it with them",
    "fp16": "11 bits are too few for numbers as large as in this network: take fp32, or --no-verify",
}


@dataclass(frozen=True)
class Verification:
    """How two implementations of one network differ on the same `images` pictures.

    `max_abs_difference` is over probabilities, of which `tolerance` is allowed, `max_logit_difference` over logits, of
    which `logit_tolerance` is. A top-1 answer agrees also if it is the other's within rounding.
    """

    images: int
    max_abs_difference: float
    max_logit_difference: float
    logit_tolerance: float
    top1_agreement: float
    tolerance: float = LARGEST_DIFFERENCE

    @property
    def passed(self) -> bool:
        """Whether both give the same answers; probabilities alone hide errors of an untrained network."""
        return (
            self.max_abs_difference < self.tolerance
            and self.max_logit_difference <= self.logit_tolerance
            and self.top1_agreement == 1.0
        )


def verify(reference: Logits, candidate: Logits, crops: Crops, precision: Precision = "fp32") -> Verification:
    """Compare two functions from crops to logits on `crops`, uint8 N x 3 x S x S, N > 0."""
    agreed, allowed = 0, TOLERANCES[precision]
    difference = logit_difference = tolerance = 0.0
    probability = allowed.probability
    for start in range(0, len(crops), BATCH):
        part = crops[start : start + BATCH]
        expected, actual = reference(part).astype(np.float64), candidate(part).astype(np.float64)
        difference = max(difference, _largest(_softmax(expected) - _softmax(actual)))
        probability = max(probability, allowed.probability * float(np.abs(expected).max()) / LARGE)
        logit_difference = max(logit_difference, _largest(expected - actual))
        rounding = allowed.rounding * np.abs(expected).max(1)
        tolerance = max(tolerance, float((allowed.spread * np.ptp(expected, axis=1) + rounding).max()))
        chosen = np.take_along_axis(expected, actual.argmax(1)[:, None], 1)[:, 0]
        agreed += int((chosen >= expected.max(1) - rounding).sum())
    return Verification(len(crops), difference, logit_difference, tolerance, agreed / len(crops), probability)


def export(model: Model, path: Path, crops: Crops, precision: Precision = "fp32") -> Verification:
    """Write `model` to `path` as ONNX once it agrees with PyTorch on `crops`, uint8 N x 3 x S x S.

    Raises:
        VerificationError: it does not agree; `path` is as it was before.
        WeightsError: what the network computes is no number.
        StorageError: the disk is full or the folder cannot be written.
        UsageError: the network is too large for one ONNX file.
    """
    with replacing(path) as temporary:
        _write(model, temporary, precision)
        result = _verified(model, temporary, crops, precision)
        if precision != "fp32":
            found = {"images": result.images, "max_abs_difference": result.max_abs_difference}
            onnx_graph.save(described(onnx.load(temporary), onnx_metadata.precision(precision, found)), temporary)
        return result


def export_unverified(model: Model, path: Path, precision: Precision = "fp32") -> None:
    """The same without the comparison, and without PyTorch. Raises StorageError, UsageError."""
    with replacing(path) as temporary:
        _write(model, temporary, precision)


def _write(model: Model, path: Path, precision: Precision) -> None:
    if precision == "fp32":
        onnx_graph.write(model, path)
    else:
        proto = onnx_fp16.halved(onnx_graph.build(model, onnx_graph.source_sha256(model)))
        onnx_graph.save(described(proto, onnx_metadata.precision(precision, {})), path)


def described(proto: onnx.ModelProto, more: dict[str, str]) -> onnx.ModelProto:
    """The same graph; `more` is added to its metadata."""
    helper.set_model_props(proto, {entry.key: entry.value for entry in proto.metadata_props} | more)
    return proto


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As `atomic.replacing`. Raises StorageError."""
    try:
        with atomic.replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}", "choose another place with -o") from error


def _verified(model: Model, path: Path, crops: Crops, precision: Precision) -> Verification:
    session = Session(path, provider="cpu")
    result = verify(by_pytorch(model), session.logits, crops, precision)
    if not result.passed:
        raise VerificationError(
            "the ONNX file disagrees with PyTorch and was removed: probabilities differ by "
            f"{result.max_abs_difference:.2g}, logits by {result.max_logit_difference:.2g}, "
            f"top-1 agreement {result.top1_agreement:.1%} of {result.images} pictures",
            HINTS[precision],
        )
    return result


def by_pytorch(model: Model) -> Logits:
    """The reference for `verify`; it raises WeightsError where it is no number: no file can agree with that."""
    from alexnet_cli.core.torch_session import TorchSession

    session = TorchSession(model, "cpu")

    def logits(crops: Crops) -> npt.NDArray[np.float32]:
        found = session.logits(crops)
        if not np.isfinite(found).all():
            raise WeightsError(f"{model.path}: what the network computes is no number", "its weights are damaged")
        return found

    return logits


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    result: npt.NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return result


def _largest(difference: npt.NDArray[np.float64]) -> float:
    """The largest absolute value; NaN counts as infinite, so that it cannot pass."""
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max())


def crops_of(dataset: Dataset, model: Model, count: int = PICTURES) -> Crops:
    """Centres of at most `count` pictures, evenly spaced over the validation split (training, if empty)."""
    split = next((s for s in map(dataset.split, ("val", "train")) if len(s)), None)
    if split is None:
        raise DataError(f"{dataset.path} holds no pictures", "prepare it anew")
    return centres(split, evenly(split, count), model.recipe.input_size)


def drawn_crops(side: int, count: int = PICTURES) -> Crops:
    """uint8 count x 3 x side x side, always the same: coloured gradients under more and more noise."""
    generator = np.random.default_rng(2012)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    slopes = generator.uniform(-100, 100, (count, 3, 2, 1, 1)).astype(np.float32)
    colours = generator.uniform(0, 255, (count, 3, 1, 1)).astype(np.float32)
    noise = generator.standard_normal((count, 3, side, side), np.float32)
    contrast = np.linspace(0, 60, count, dtype=np.float32)[:, None, None, None]
    picture = colours + slopes[:, :, 0] * ramp + slopes[:, :, 1] * ramp[:, None] + contrast * noise
    crops: Crops = picture.clip(0, 255).astype(np.uint8)
    return crops
