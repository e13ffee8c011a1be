"""`alexnet benchmark load`: the loader, and what else turns files of 256 x 256 pixels into batches.

Ours yields uint8 batches; cropping and normalising are part of the training step. So the likes of it are the peers
that only decode; ImageFolder with the usual transforms is what most people run instead of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from alexnet_cli.core.shards import Split
    from alexnet_cli.core.stopwatch import Contest, Pass

BATCH = 128
IMAGES = 16 * BATCH  # a pass: enough that the first batch, which nothing hides, does not decide
ILSVRC = 1_281_167  # rows of the training split


@contextlib.contextmanager
def contest(split: Split, workers: int, scratch: Path, notes: list[str]) -> Iterator[Contest]:
    """The contestants on the same files with the same workers, set up and in the end taken down."""
    from alexnet_cli.core.stopwatch import Contest

    rows = np.resize(np.random.default_rng(0).permutation(len(split))[:IMAGES], IMAGES).astype(np.int64)
    folder = _tree(split, rows, scratch / "folder")
    with ExitStack() as stack:
        peers = {
            "ImageFolder + DataLoader": _image_folder(folder, workers, True),
            "ImageFolder, decode only": _image_folder(folder, workers, False),
        }
        missing = []
        if importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None:
            peers["DALI, decode only"] = _dali(folder, workers)
        else:
            missing.append("DALI")
        peers["limit: decode alone"] = _limit(split, rows, workers, stack)
        ours = _ours(split, rows, workers, stack)
        note = "ours yields whole uint8 pictures; crops, flips and colour are drawn in the training step"
        yield Contest("load", ours, peers, (*notes, note), missing, epoch_costs(scratch))


def _tree(split: Split, rows: npt.NDArray[np.int64], folder: Path) -> Path:
    """The rows' JPEGs as FOLDER/CLASS/NUMBER.jpg; a row that comes again is a hard link."""
    written: dict[int, Path] = {}
    for number, row in enumerate(rows.tolist()):
        path = folder / f"{split.labels[row]:04}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        if row in written:
            os.link(written[row], path)
        else:
            path.write_bytes(split.jpeg(row))
            written[row] = path
    return folder


def _ours(split: Split, rows: npt.NDArray[np.int64], workers: int, stack: ExitStack) -> Pass:
    from alexnet_cli.core.loader import Loader

    loader = stack.enter_context(Loader(split, BATCH, workers))
    plan = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]

    def run() -> int:
        return sum(len(batch.rows) for batch in loader.batches(plan))

    return run


def _image_folder(folder: Path, workers: int, usual: bool) -> Pass:
    """Torchvision's ImageFolder and torch's DataLoader, its processes kept alive from pass to pass."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps: list[Any] = [transforms.PILToTensor()]
    if usual:
        normalise = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        steps = [transforms.RandomCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalise]
    loader: DataLoader[Any] = DataLoader(
        datasets.ImageFolder(str(folder), transforms.Compose(steps)),
        batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=True,
    )  # fmt: skip

    def run() -> int:
        return sum(len(images) for images, _ in loader)

    return run


def _dali(folder: Path, workers: int) -> Pass:
    """NVIDIA DALI on the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nvidia.dali import fn, types
        from nvidia.dali.pipeline import Pipeline

        pipeline = Pipeline(BATCH, workers, device_id=None, seed=1, prefetch_queue_depth=3)
        with pipeline:
            jpegs, labels = fn.readers.file(file_root=str(folder), random_shuffle=True, name="files")
            pipeline.set_outputs(fn.decoders.image(jpegs, device="cpu", output_type=types.RGB), labels)
        pipeline.build()

    def run() -> int:
        for _ in range(IMAGES // BATCH):
            pipeline.run()
        return IMAGES

    return run


def _limit(split: Split, rows: npt.NDArray[np.int64], workers: int, stack: ExitStack) -> Pass:
    """Nothing but the codec: bytes already in memory, each thread decoding into one picture of its own."""
    import simplejpeg

    jpegs = [bytes(split.jpeg(row)) for row in rows.tolist()]
    pool = stack.enter_context(ThreadPoolExecutor(workers))
    own = threading.local()

    def decode(piece: list[bytes]) -> None:
        if not hasattr(own, "pixels"):
            own.pixels = np.empty((256, 256, 3), np.uint8)
        for jpeg in piece:
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=own.pixels)

    def run() -> int:
        list(pool.map(decode, [jpegs[start : start + 32] for start in range(0, len(jpegs), 32)]))
        return len(jpegs)

    return run


def epoch_costs(scratch: Path, rows: int = ILSVRC) -> dict[str, float]:
    """Seconds to open an index of so many rows, and for each part of an epoch's order."""
    from alexnet_cli.core.augment import Draws
    from alexnet_cli.core.loader import epoch_order, training_batches
    from alexnet_cli.core.shards import ROW, Dataset, index_name
    from alexnet_cli.core.sources import ClassName
    from alexnet_cli.core.stopwatch import least_seconds
    from alexnet_cli.recipe import PAPER

    folder = scratch / "index"
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / index_name("train"), np.zeros(rows, ROW))
    none = np.zeros(0, np.float32)
    (folder / "empty.tar").touch()
    record = {"splits": {"train": {"images": rows, "shards": [{"file": "empty.tar", "bytes": 0}]}}}
    dataset = Dataset(folder, "index", "", (ClassName("any"),), none, none, none, record)
    return {
        f"open an index of {rows:,} rows": least_seconds(lambda: dataset.split("train")),
        "permutation of an epoch": least_seconds(lambda: epoch_order(rows, 0, 1)),
        "permutation and batches": least_seconds(lambda: training_batches(rows, BATCH, 0, 1)),
        "draws of an epoch": least_seconds(lambda: Draws.of_epoch(rows, PAPER, 1)),
    }
