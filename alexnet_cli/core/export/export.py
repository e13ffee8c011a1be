"""One verified ONNX file: written beside its place, measured, only then renamed.

float32 and float16 are compared with PyTorch on images. int8 is calibrated on training images and judged on validation
images; a file that loses too many right answers is refused.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from alexnet_cli.core import files
from alexnet_cli.core.data import images
from alexnet_cli.core.data.shards import Dataset, Split
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.export import quantize
from alexnet_cli.core.inference import onnx_graph, onnx_metadata
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.errors import DataError, StorageError, VerificationError, WeightsError

LARGEST_DIFFERENCE = 1e-4  # of a probability
LARGE = 50.0  # a logit; trained networks stay below
BATCH = 32
PICTURES = 128  # on which a file is compared with PyTorch
LARGEST_LOSS = 0.01  # of all validation images: one point of top-1 accuracy
LEAST_LOST = 2  # right answers that must be lost at least: of fewer than a hundred images, one alone is over a point
ACCURACY_PICTURES = 5000  # on which accuracy is judged, at most

Crops = npt.NDArray[np.uint8]
Logits = Callable[[Crops], npt.NDArray[np.float32]]
Labeled = Iterable[tuple[Crops, npt.NDArray[np.int64]]]
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
            onnx_graph.save_graph(described(onnx.load(temporary), onnx_metadata.precision(precision, found)), temporary)
        return result


def export_unverified(model: Model, path: Path, precision: Precision = "fp32") -> None:
    """The same without the comparison, and without PyTorch. Raises StorageError, UsageError."""
    with replacing(path) as temporary:
        _write(model, temporary, precision)


def _write(model: Model, path: Path, precision: Precision) -> None:
    if precision == "fp32":
        onnx_graph.write_graph(model, path)
    else:
        proto = quantize.to_float16(onnx_graph.build_graph(model, onnx_graph.source_sha256(model)))
        onnx_graph.save_graph(described(proto, onnx_metadata.precision(precision, {})), path)


def described(proto: onnx.ModelProto, more: dict[str, str]) -> onnx.ModelProto:
    """The same graph; `more` is added to its metadata."""
    helper.set_model_props(proto, {entry.key: entry.value for entry in proto.metadata_props} | more)
    return proto


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """As `files.replace_file`. Raises StorageError."""
    try:
        with files.replace_file(path) as temporary:
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
    from alexnet_cli.core.inference.torch_session import TorchSession

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


@dataclass(frozen=True)
class Comparison:
    """Right top-1 answers on `images` images: of both networks, of the reference alone, of the other alone."""

    images: int
    both: int
    reference_alone: int
    other_alone: int

    @property
    def reference(self) -> float:
        """Share of right answers of the reference."""
        return (self.both + self.reference_alone) / self.images

    @property
    def other(self) -> float:
        """Share of right answers of the approximation."""
        return (self.both + self.other_alone) / self.images

    @property
    def fewer(self) -> int:
        """How many right answers fewer the approximation gives; negative if there are more."""
        return self.reference_alone - self.other_alone

    @property
    def lost(self) -> float:
        """The share of right answers that is lost; negative if there are more now."""
        return self.fewer / self.images

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `lost`, from the images on which the two differ; approximate where these are few."""
        change, net = self.reference_alone + self.other_alone, self.fewer
        half = 1.96 * math.sqrt(max(change - net**2 / self.images, 0)) / self.images
        return self.lost - half, self.lost + half

    def as_dict(self) -> dict[str, Any]:
        """For files and programs."""
        return {
            "images": self.images,
            "float32": self.reference,
            "int8": self.other,
            "lost": self.lost,
            "lost_interval": list(self.interval),
        }


def compare(reference: Logits, other: Logits, batches: Labeled) -> Comparison:
    """Count the right answers of two networks over crops (uint8 N x 3 x S x S) with their labels."""
    counts = np.zeros(4, np.int64)
    for crops, labels in batches:
        right, also = (network(crops).argmax(1) == labels for network in (reference, other))
        counts += np.bincount(2 * right + also, minlength=4)
    _, other_alone, reference_alone, both = counts.tolist()
    return Comparison(sum(counts.tolist()), both, reference_alone, other_alone)


@dataclass(frozen=True)
class Check:
    """What an int8 file was found to be: beside PyTorch on some pictures, and in right answers beside float32."""

    against_torch: Verification
    loss: Comparison


def export_int8(model: Model, path: Path, training: Crops, check: tuple[Crops, Labeled], force: bool = False) -> Check:
    """Write `model` to `path` in int8, calibrated on crops of training pictures, uint8 N x 3 x S x S.

    `check`: crops to compare with PyTorch on, and labeled ones on which right answers are counted. With `force` the
    file is kept whatever it loses.

    Raises:
        VerificationError: more than `LARGEST_LOSS` is lost, in at least `LEAST_LOST` images; `path` is unchanged.
        WeightsError: what the network computes is no number.
        StorageError: the disk is full or the folder cannot be written.
        UsageError: the network is too large for one ONNX file.
    """
    proto, calibrated = _quantize(model, training)
    with replacing(path) as temporary:
        onnx_graph.save_graph(proto, temporary)
        result = _measure_int8(model, temporary, check)
        loss = result.loss
        if loss.lost > LARGEST_LOSS and loss.fewer >= LEAST_LOST and not force:
            low, high = loss.interval
            raise VerificationError(
                f"int8 gives {100 * loss.lost:.1f} points fewer right answers than float32 on {loss.images:,} "
                f"pictures ({loss.other:.1%} instead of {loss.reference:.1%}; 95 % interval of the loss "
                f"{100 * low:+.1f} to {100 * high:+.1f} points): no file was written",
                "--force keeps it all the same; --precision fp16 is half the size of float32 and differs far less",
            )
        difference = result.against_torch.max_abs_difference
        found = calibrated | {"accuracy": loss.as_dict(), "max_abs_difference": difference}
        onnx_graph.save_graph(described(proto, onnx_metadata.precision("int8", found)), temporary)
    return result


def _measure_int8(model: Model, path: Path, check: tuple[Crops, Labeled]) -> Check:
    """What the int8 file at `path` is worth. The session ends here: it maps the file, which is written again after."""
    crops, labeled = check
    session = Session(path, provider="cpu")
    against_torch = verify(by_pytorch(model), session.logits, crops)
    return Check(against_torch, compare(Session(model, provider="cpu").logits, session.logits, labeled))


def export_int8_unverified(model: Model, path: Path, training: Crops) -> None:
    """The same without any comparison, and without PyTorch. Raises StorageError, UsageError."""
    proto, calibrated = _quantize(model, training)
    with replacing(path) as temporary:
        onnx_graph.save_graph(described(proto, onnx_metadata.precision("int8", calibrated)), temporary)


def _quantize(model: Model, training: Crops) -> tuple[onnx.ModelProto, dict[str, Any]]:
    proto = onnx_graph.build_graph(model, onnx_graph.source_sha256(model), rows=True)
    return quantize.to_int8(proto, quantize.measure_ranges(proto, training)), {"calibration_images": len(training)}


def labeled(
    split: Split, side: int, output_of: npt.NDArray[np.int64] | None
) -> Iterator[tuple[Crops, npt.NDArray[np.int64]]]:
    """Batches of crops and labels: all pictures of a split, or `ACCURACY_PICTURES` evenly spaced ones.

    `output_of[class of the data set]`: the network's output for it, where the two number their classes otherwise.
    """
    rows = evenly(split, ACCURACY_PICTURES)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        labels = split.labels[batch]
        yield centers(split, batch, side), labels if output_of is None else output_of[labels]


def evenly(split: Split, count: int) -> list[int]:
    """At most `count` rows, evenly spaced; a split's order is random already."""
    rows: list[int] = np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)).tolist()
    return rows


def centers(split: Split, rows: Iterable[int], side: int) -> Crops:
    """uint8 N x 3 x side x side: the middles of these pictures."""
    return np.concatenate([make_views(images.decode(bytes(split.jpeg(row))), side, 1) for row in rows])


def crops_of(dataset: Dataset, model: Model, count: int = PICTURES) -> Crops:
    """Centers of at most `count` pictures, evenly spaced over the validation split (training, if empty)."""
    split = next((s for s in map(dataset.split, ("val", "train")) if len(s)), None)
    if split is None:
        raise DataError(f"{dataset.path} holds no pictures", "prepare it anew")
    return centers(split, evenly(split, count), model.recipe.input_size)


def drawn_crops(side: int, count: int = PICTURES) -> Crops:
    """uint8 count x 3 x side x side, always the same: colored gradients under more and more noise."""
    generator = np.random.default_rng(2012)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    slopes = generator.uniform(-100, 100, (count, 3, 2, 1, 1)).astype(np.float32)
    colors = generator.uniform(0, 255, (count, 3, 1, 1)).astype(np.float32)
    noise = generator.standard_normal((count, 3, side, side), np.float32)
    contrast = np.linspace(0, 60, count, dtype=np.float32)[:, None, None, None]
    picture = colors + slopes[:, :, 0] * ramp + slopes[:, :, 1] * ramp[:, None] + contrast * noise
    crops: Crops = picture.clip(0, 255).astype(np.uint8)
    return crops
