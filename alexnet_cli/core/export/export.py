"""Export a model as one ONNX file that was checked before it is kept.

float32 and float16 are compared with PyTorch on images. int8 is calibrated on training images and must not lose too
many correct answers on validation images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from alexnet_cli.core.data import images
from alexnet_cli.core.data.shards import Dataset, Split
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.export import quantize
from alexnet_cli.core.files import replace_file, write_text
from alexnet_cli.core.inference import onnx_metadata
from alexnet_cli.core.inference.onnx_graph import build_graph, save_graph
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.intervals import PairedCounts
from alexnet_cli.core.model.model_file import Model, check_finite
from alexnet_cli.errors import DataError, UsageError, VerificationError, storage_errors

MAX_DIFFERENCE = 1e-4  # of a probability
USUAL_LOGIT = 50.0  # logits of trained networks are smaller; larger ones have larger rounding errors
BATCH = 32
VERIFY_IMAGES = 128  # compared with PyTorch
MAX_LOSS = 0.01  # of top-1 accuracy that int8 may lose
MIN_LOST = 2  # correct answers; with fewer than 100 images a single one would be more than MAX_LOSS
ACCURACY_IMAGES = 5000  # validation images for the accuracy of int8, at most

Crops = npt.NDArray[np.uint8]
Logits = Callable[[Crops], npt.NDArray[np.float32]]
LabeledCrops = Iterable[tuple[Crops, npt.NDArray[np.int64]]]
Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Tolerance:
    """The largest allowed differences between two implementations."""

    probability: float
    """Of a probability, if logits are at most USUAL_LOGIT; larger logits allow more in proportion."""
    spread: float
    """Of a logit, as a share of an image's logits from lowest to highest."""
    rounding: float
    """Of a logit, relative to the largest; the top-1 class may change between logits this close."""


TOLERANCES: dict[Precision, Tolerance] = {
    "fp32": Tolerance(MAX_DIFFERENCE, 1e-4, 1e-5),  # float32 sums in another order
    "fp16": Tolerance(2e-2, 1.5e-3, 5e-4),  # 11 bits; rounded weights use about a quarter of it
}

HINTS: dict[Precision, str] = {
    "fp32": "please report it with the versions that `alexnet doctor` prints",
    "fp16": "this network's values are too large for float16: use fp32, or --no-verify",
}


@dataclass(frozen=True)
class Verification:
    """How two implementations of a network differ on the same images, and what is allowed."""

    images: int
    max_abs_difference: float
    """Of probabilities; `tolerance` is allowed."""
    max_logit_difference: float
    logit_tolerance: float
    top1_agreement: float
    """Share of images with the same top-1 class within rounding."""
    tolerance: float = MAX_DIFFERENCE

    @property
    def passed(self) -> bool:
        """Whether both agree. Probabilities alone would hide errors of an untrained network."""
        return (
            self.max_abs_difference < self.tolerance
            and self.max_logit_difference <= self.logit_tolerance
            and self.top1_agreement == 1.0
        )


def verify(reference: Logits, candidate: Logits, crops: Crops, precision: Precision = "fp32") -> Verification:
    """Compare two functions from crops to logits on `crops`, uint8 N x 3 x S x S, N > 0."""
    allowed, agreed = TOLERANCES[precision], 0
    difference = logit_difference = logit_tolerance = 0.0
    tolerance = allowed.probability
    for start in range(0, len(crops), BATCH):
        batch = crops[start : start + BATCH]
        expected, actual = reference(batch).astype(np.float64), candidate(batch).astype(np.float64)
        difference = max(difference, _largest(_softmax(expected) - _softmax(actual)))
        tolerance = max(tolerance, allowed.probability * float(np.abs(expected).max()) / USUAL_LOGIT)
        logit_difference = max(logit_difference, _largest(expected - actual))
        rounding = allowed.rounding * np.abs(expected).max(1)
        logit_tolerance = max(logit_tolerance, float((allowed.spread * np.ptp(expected, axis=1) + rounding).max()))
        top = np.take_along_axis(expected, actual.argmax(1)[:, None], 1)[:, 0]
        agreed += int((top >= expected.max(1) - rounding).sum())
    return Verification(len(crops), difference, logit_difference, logit_tolerance, agreed / len(crops), tolerance)


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    result: npt.NDArray[np.float64] = powers / powers.sum(1, keepdims=True)
    return result


def _largest(difference: npt.NDArray[np.float64]) -> float:
    """Return the largest absolute value; NaN counts as infinite, so that it cannot pass."""
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max())


def torch_logits(model: Model) -> Logits:
    """Return the reference for `verify`: the model in PyTorch on the CPU. It raises WeightsError on NaN or infinity."""
    from alexnet_cli.core.inference.torch_session import TorchSession

    session = TorchSession(model, "cpu")

    def logits(crops: Crops) -> npt.NDArray[np.float32]:
        values = session.logits(crops)
        check_finite(model.path, values)
        return values

    return logits


def build_onnx(model: Model, precision: Precision) -> onnx.ModelProto:
    """Build the ONNX graph of a model in float32 or float16. Raises UsageError if it is too large for one file."""
    proto = build_graph(model)
    return proto if precision == "fp32" else _set_precision(quantize.to_float16(proto), precision, {})


def build_int8(model: Model, training: Crops) -> onnx.ModelProto:
    """Build the int8 graph of a model, calibrated on crops of training images, uint8 N x 3 x S x S."""
    proto = build_graph(model, rows=True)
    proto = quantize.to_int8(proto, quantize.measure_ranges(proto, training))
    return _set_precision(proto, "int8", {"calibration_images": len(training)})


def _set_precision(proto: onnx.ModelProto, precision: str, measured: dict[str, Any]) -> onnx.ModelProto:
    """Write the precision, and what was measured of it, into the metadata of a graph. Returns the same graph."""
    metadata = {entry.key: entry.value for entry in proto.metadata_props}
    helper.set_model_props(proto, metadata | onnx_metadata.format_precision(precision, measured))
    return proto


def export(model: Model, path: Path, crops: Crops, precision: Precision = "fp32") -> Verification:
    """Write `model` to `path` as ONNX if it agrees with PyTorch on `crops`, uint8 N x 3 x S x S.

    Raises:
        VerificationError: it does not agree; `path` is unchanged.
        WeightsError: the network computes NaN or infinity.
        StorageError: the disk is full or the folder cannot be written.
        UsageError: the network is too large for one ONNX file.
    """
    proto = build_onnx(model, precision)
    with replace_file(path) as temporary:
        save_graph(proto, temporary)
        result = verify(torch_logits(model), Session(temporary, provider="cpu").logits, crops, precision)
        if not result.passed:
            raise VerificationError(
                "the ONNX file disagrees with PyTorch and was removed: probabilities differ by "
                f"{result.max_abs_difference:.2g}, logits by {result.max_logit_difference:.2g}, "
                f"top-1 agreement {result.top1_agreement:.1%} of {result.images} images",
                HINTS[precision],
            )
        if precision != "fp32":
            measured = {"images": result.images, "max_abs_difference": result.max_abs_difference}
            save_graph(_set_precision(proto, precision, measured), temporary)
    return result


def write_names(model: Model, path: Path) -> Path:
    """Write the class names next to the ONNX file `path`, for runtimes that cannot read its metadata.

    One name a line, in the order of the outputs. Returns the path, NAME.names.txt. Raises StorageError.
    """
    names_path = path.with_suffix(".names.txt")
    with storage_errors(names_path):
        write_text(names_path, _format_names(model))
    return names_path


def check_names(model: Model, path: Path) -> None:
    """Raise UsageError if `write_names` would replace a file that belongs to no ONNX file: it is the user's own."""
    names_path = path.with_suffix(".names.txt")
    if names_path.exists() and not path.exists() and names_path.read_bytes() != _format_names(model).encode():
        raise UsageError(f"{names_path} exists, and there is no {path.name} it belongs to", "move it, or change -o")


def _format_names(model: Model) -> str:
    return "".join(" ".join(c.name.splitlines()) + "\n" for c in model.classes)


def compare_accuracy(float32: Logits, int8: Logits, batches: LabeledCrops) -> PairedCounts:
    """Count the correct top-1 answers of float32, the first, and int8 on labeled crops."""
    right = [[logits(crops).argmax(1) == labels for logits in (float32, int8)] for crops, labels in batches]
    return PairedCounts.from_right(*np.concatenate(right, axis=1))


def describe_accuracy(counts: PairedCounts) -> dict[str, Any]:
    """Return for JSON and metadata the accuracy of float32 and int8, 0..1, and what int8 loses."""
    float32, int8 = counts.accuracies
    return {
        "images": counts.images, "float32": float32, "int8": int8,
        "lost": counts.difference, "lost_interval": list(counts.interval),
    }  # fmt: skip


def export_int8(
    model: Model, path: Path, training: Crops, check: tuple[Crops, LabeledCrops], force: bool = False
) -> tuple[Verification, PairedCounts]:
    """Write `model` to `path` in int8, calibrated on crops of training images, uint8 N x 3 x S x S.

    Returns how the file differs from PyTorch, and the correct answers of float32 and int8.

    `check`: crops to compare with PyTorch, and labeled crops for the accuracy. `force` keeps the file whatever it
    loses.

    Raises:
        VerificationError: it loses more than MAX_LOSS, and at least MIN_LOST answers; `path` is unchanged.
        WeightsError: the network computes NaN or infinity.
        StorageError: the disk is full or the folder cannot be written.
        UsageError: the network is too large for one ONNX file.
    """
    proto = build_int8(model, training)
    with replace_file(path) as temporary:
        save_graph(proto, temporary)
        against_torch, counts = _measure_int8(model, temporary, check)
        if counts.difference > MAX_LOSS and counts.only_first - counts.only_second >= MIN_LOST and not force:
            (float32, int8), (low, high) = counts.accuracies, counts.interval
            raise VerificationError(
                f"int8 loses {100 * counts.difference:.1f} points of top-1 accuracy on {counts.images:,} images "
                f"({int8:.1%} instead of {float32:.1%}; 95 % interval of the loss "
                f"{100 * low:+.1f} to {100 * high:+.1f} points); no file was written",
                "--force writes it anyway; --precision fp16 is half the size of float32 and loses far less",
            )
        measured = {
            "calibration_images": len(training),
            "accuracy": describe_accuracy(counts),
            "max_abs_difference": against_torch.max_abs_difference,
        }
        save_graph(_set_precision(proto, "int8", measured), temporary)
    return against_torch, counts


def _measure_int8(model: Model, path: Path, check: tuple[Crops, LabeledCrops]) -> tuple[Verification, PairedCounts]:
    """Measure the int8 file at `path`. The session, which maps the file, ends here, before it is written again."""
    crops, labeled = check
    session = Session(path, provider="cpu")
    against_torch = verify(torch_logits(model), session.logits, crops)
    return against_torch, compare_accuracy(Session(model, provider="cpu").logits, session.logits, labeled)


def load_calibration_crops(dataset: Dataset, model: Model) -> Crops:
    """Return center crops of training images to calibrate int8 on. Raises DataError if there are none."""
    training = dataset.split("train")
    if not len(training):
        raise DataError(f"{dataset.path} has no training images", "int8 needs some for calibration")
    return center_crops(training, training.spread_rows(quantize.CALIBRATION_IMAGES), model.recipe.input_size)


def load_check_images(
    dataset: Dataset, model: Model, output_of: npt.NDArray[np.int64] | None
) -> tuple[Crops, LabeledCrops]:
    """Return what `export_int8` checks a file on: crops, and labeled batches of at most `ACCURACY_IMAGES` images.

    `output_of[class of the data set]` is the network's output for it; None if both number their classes alike.

    Raises:
        DataError: there are no validation images.
    """
    if not len(dataset.split("val")):
        raise DataError(
            f"{dataset.path} has no validation images to measure the accuracy on",
            "prepare it with --val-fraction 0.1, choose another set with --data, or use --no-verify",
        )
    return sample_crops(dataset, model), _label_crops(dataset.split("val"), model.recipe.input_size, output_of)


def _label_crops(
    split: Split, side: int, output_of: npt.NDArray[np.int64] | None
) -> Iterator[tuple[Crops, npt.NDArray[np.int64]]]:
    """Yield batches of center crops and labels of a split, evenly spaced."""
    rows = split.spread_rows(ACCURACY_IMAGES)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        labels = split.labels[batch]
        yield center_crops(split, batch, side), labels if output_of is None else output_of[labels]


def center_crops(split: Split, rows: Iterable[int], side: int) -> Crops:
    """Return the center crops of these images, uint8 N x 3 x side x side."""
    return np.concatenate([make_views(images.decode(bytes(split.jpeg(row))), side, 1) for row in rows])


def sample_crops(dataset: Dataset, model: Model) -> Crops:
    """Return center crops of at most VERIFY_IMAGES images of the validation split (training, if it is empty)."""
    split = next((s for s in map(dataset.split, ("val", "train")) if len(s)), None)
    if split is None:
        raise DataError(f"{dataset.path} has no images", "prepare it again")
    return center_crops(split, split.spread_rows(VERIFY_IMAGES), model.recipe.input_size)


def synthetic_crops(side: int, count: int = VERIFY_IMAGES) -> Crops:
    """Return colored gradients with increasing noise, always the same, uint8 count x 3 x side x side."""
    generator = np.random.default_rng(2012)
    ramp = np.linspace(-1, 1, side, dtype=np.float32)
    slopes = generator.uniform(-100, 100, (count, 3, 2, 1, 1)).astype(np.float32)
    colors = generator.uniform(0, 255, (count, 3, 1, 1)).astype(np.float32)
    noise = generator.standard_normal((count, 3, side, side), np.float32)
    contrast = np.linspace(0, 60, count, dtype=np.float32)[:, None, None, None]
    values = colors + slopes[:, :, 0] * ramp + slopes[:, :, 1] * ramp[:, None] + contrast * noise
    crops: Crops = values.clip(0, 255).astype(np.uint8)
    return crops
