"""One int8 file: calibrated on training pictures, judged on validation pictures, and refused if it loses too much."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alexnet_cli.core import accuracy, calibration, onnx_graph, onnx_int8, onnx_metadata
from alexnet_cli.core.accuracy import Comparison
from alexnet_cli.core.export import Verification, by_pytorch, described, replacing, verify
from alexnet_cli.core.probes import centres, evenly
from alexnet_cli.core.session import Session
from alexnet_cli.core.shards import Split
from alexnet_cli.core.weights import Model
from alexnet_cli.errors import VerificationError

LARGEST_LOSS = 0.01  # of all pictures: one point of top-1 accuracy
PLURAL = 2  # right answers that must be lost at least: of fewer than a hundred pictures, one alone is over a point
PICTURES = 5000  # on which accuracy is judged, at most
BATCH = 64

Crops = npt.NDArray[np.uint8]
Labelled = Iterable[tuple[Crops, npt.NDArray[np.int64]]]


@dataclass(frozen=True)
class Check:
    """What an int8 file was found to be: beside PyTorch on some pictures, and in right answers beside float32."""

    against_torch: Verification
    loss: Comparison


def export_int8(model: Model, path: Path, training: Crops, check: tuple[Crops, Labelled], force: bool = False) -> Check:
    """Write `model` to `path` in int8, calibrated on crops of training pictures, uint8 N x 3 x S x S.

    `check`: crops to compare with PyTorch on, and labelled ones on which right answers are counted. With `force` the
    file is kept whatever it loses.

    Raises:
        VerificationError: more than `LARGEST_LOSS` is lost, in `PLURAL` pictures at least; `path` is as it was before.
        WeightsError: what the network computes is no number.
        StorageError: the disk is full or the folder cannot be written.
        UsageError: the network is too large for one ONNX file.
    """
    proto, calibrated = _quantised(model, training)
    crops, labelled = check
    with replacing(path) as temporary:
        onnx_graph.save(proto, temporary)
        session = Session(temporary, provider="cpu")
        against_torch = verify(by_pytorch(model), session.logits, crops)
        loss = accuracy.compare(Session(model, provider="cpu").logits, session.logits, labelled)
        if loss.lost > LARGEST_LOSS and loss.fewer >= PLURAL and not force:
            low, high = loss.interval
            raise VerificationError(
                f"int8 gives {100 * loss.lost:.1f} points fewer right answers than float32 on {loss.images:,} "
                f"pictures ({loss.other:.1%} instead of {loss.reference:.1%}; 95 % interval of the loss "
                f"{100 * low:+.1f} to {100 * high:+.1f} points): no file was written",
                "--force keeps it all the same; --precision fp16 is half the size of float32 and differs far less",
            )
        found = calibrated | {"accuracy": loss.as_dict(), "max_abs_difference": against_torch.max_abs_difference}
        onnx_graph.save(described(proto, onnx_metadata.precision("int8", found)), temporary)
    return Check(against_torch, loss)


def export_int8_unverified(model: Model, path: Path, training: Crops) -> None:
    """The same without any comparison, and without PyTorch. Raises StorageError, UsageError."""
    proto, calibrated = _quantised(model, training)
    with replacing(path) as temporary:
        onnx_graph.save(described(proto, onnx_metadata.precision("int8", calibrated)), temporary)


def _quantised(model: Model, training: Crops) -> tuple[Any, dict[str, Any]]:
    proto = onnx_graph.build(model, onnx_graph.source_sha256(model), rows=True)
    return onnx_int8.quantised(proto, calibration.ranges(proto, training)), {"calibration_images": len(training)}


def labelled(
    split: Split, side: int, output_of: npt.NDArray[np.int64] | None
) -> Iterator[tuple[Crops, npt.NDArray[np.int64]]]:
    """Batches of crops and labels: all pictures of a split, or `PICTURES` evenly spaced ones.

    `output_of[class of the data set]`: the network's output for it, where the two number their classes otherwise.
    """
    rows = evenly(split, PICTURES)
    for start in range(0, len(rows), BATCH):
        batch = rows[start : start + BATCH]
        labels = split.labels[batch]
        yield centres(split, batch, side), labels if output_of is None else output_of[labels]
