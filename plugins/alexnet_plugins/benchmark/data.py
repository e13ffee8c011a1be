"""`alexnet benchmark prepare` and `load`: packing a folder of images, and turning 256 x 256 JPEGs into batches.

Packing writes shards durably and measures mean and color axes on the way; its peers write one file per image and no
more. The loader yields uint8 batches, since cropping is part of the training step: the peers that only decode compare
with it. ImageFolder with the usual transforms is what most people run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import multiprocessing
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from alexnet_plugins.benchmark.stopwatch import Contest, Pass, least_seconds

if TYPE_CHECKING:
    from alexnet_cli.core.data.shards import Split

SIDE, QUALITY = 256, 95
BATCH = 128
IMAGES = 16 * BATCH  # a pass: enough that the first batch, which nothing hides, does not decide
ILSVRC = 1_281_167  # rows of the training split


@contextlib.contextmanager
def compare_prepare(
    source: Path, paths: list[Path], workers: int, scratch: Path, notes: list[str]
) -> Iterator[Contest]:
    """The contestants on the same files with the same workers; `source` holds them as a data set."""
    with ExitStack() as stack:
        # Processes that are started fresh: a forked one would inherit the locks of torch's threads.
        context = multiprocessing.get_context("spawn")
        processes = stack.enter_context(ProcessPoolExecutor(workers, context))
        peers = {f"Pillow, {workers} processes": _write_files(resize_with_pillow, processes, paths, scratch / "pillow")}
        missing = []
        if importlib.util.find_spec("cv2"):
            peers[f"OpenCV, {workers} processes"] = _write_files(
                resize_with_opencv, processes, paths, scratch / "opencv"
            )
        else:
            missing.append("OpenCV")
        peers["limit: codec and resize alone"] = _convert_in_memory(paths, workers, stack)
        yield Contest("prepare", _prepare(source, workers, scratch), peers, notes, missing)


def _prepare(source: Path, workers: int, scratch: Path) -> Pass:
    from alexnet_cli.core.data.plan import Plan
    from alexnet_cli.core.data.prepare import pack
    from alexnet_cli.core.data.sources import detect_source

    numbers = itertools.count()

    def run() -> int:
        output = scratch / f"ours{next(numbers)}"
        images = sum(step.images for step in pack(Plan(detect_source(source), output, QUALITY), workers))
        shutil.rmtree(output)
        return images

    return run


def _write_files(
    work: Callable[[Path, list[Path]], None], processes: ProcessPoolExecutor, paths: list[Path], out: Path
) -> Pass:
    """One output file a picture; a process takes 16 at a time, as our threads do."""
    out.mkdir(parents=True)
    pieces = [paths[start : start + 16] for start in range(0, len(paths), 16)]

    def run() -> int:
        list(processes.map(partial(work, out), pieces))
        return len(paths)

    return run


def resize_with_pillow(out: Path, paths: list[Path]) -> None:
    """Open, resize the shorter side to 256, cut the middle, save."""
    from PIL import Image

    for path in paths:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        width, height = rgb.size
        scale = SIDE / min(width, height)
        wide, high = max(SIDE, round(width * scale)), max(SIDE, round(height * scale))
        rgb = rgb.resize((wide, high), Image.Resampling.BILINEAR)
        left, top = (wide - SIDE) // 2, (high - SIDE) // 2
        rgb.crop((left, top, left + SIDE, top + SIDE)).save(out / path.name, "JPEG", quality=QUALITY)


def resize_with_opencv(out: Path, paths: list[Path]) -> None:
    """The same with OpenCV; its averaging resize is the one that does not alias."""
    import cv2

    cv2.setNumThreads(1)
    for path in paths:
        bgr: Any = cv2.imread(str(path), cv2.IMREAD_COLOR)
        height, width = bgr.shape[:2]
        scale = SIDE / min(width, height)
        size = (max(SIDE, round(width * scale)), max(SIDE, round(height * scale)))
        bgr = cv2.resize(bgr, size, interpolation=cv2.INTER_AREA)
        left, top = (size[0] - SIDE) // 2, (size[1] - SIDE) // 2
        middle = bgr[top : top + SIDE, left : left + SIDE]
        cv2.imwrite(str(out / path.name), middle, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def _convert_in_memory(paths: list[Path], workers: int, stack: ExitStack) -> Pass:
    """Nothing but decode, resize, encode: bytes already in memory, results dropped."""
    from alexnet_cli.core.data import fast_images

    files = [path.read_bytes() for path in paths]
    pool = stack.enter_context(ThreadPoolExecutor(workers))

    def convert(piece: list[bytes]) -> None:
        for data in piece:
            fast_images.encode(fast_images.resize_and_crop(fast_images.decode(data)), QUALITY)

    def run() -> int:
        list(pool.map(convert, [files[start : start + 16] for start in range(0, len(files), 16)]))
        return len(files)

    return run


@contextlib.contextmanager
def compare_load(split: Split, workers: int, scratch: Path, notes: list[str]) -> Iterator[Contest]:
    """The contestants on the same files with the same workers, set up and in the end taken down."""
    rows = np.resize(np.random.default_rng(0).permutation(len(split))[:IMAGES], IMAGES).astype(np.int64)
    folder = _write_folder(split, rows, scratch / "folder")
    with ExitStack() as stack:
        peers = {
            "ImageFolder + DataLoader": _load_image_folder(folder, workers, True),
            "ImageFolder, decode only": _load_image_folder(folder, workers, False),
        }
        missing = []
        if importlib.util.find_spec("nvidia.dali") if importlib.util.find_spec("nvidia") else None:
            peers["DALI, decode only"] = _load_with_dali(folder, workers)
        else:
            missing.append("DALI")
        peers["limit: decode alone"] = _decode_in_memory(split, rows, workers, stack)
        ours = _load(split, rows, workers, stack)
        note = "ours yields whole uint8 pictures; crops, flips and color are drawn in the training step"
        yield Contest("load", ours, peers, (*notes, note), missing, measure_epoch(scratch))


def _write_folder(split: Split, rows: npt.NDArray[np.int64], folder: Path) -> Path:
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


def _load(split: Split, rows: npt.NDArray[np.int64], workers: int, stack: ExitStack) -> Pass:
    from alexnet_cli.core.data.loader import Loader

    loader = stack.enter_context(Loader(split, BATCH, workers))
    plan = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]

    def run() -> int:
        return sum(len(batch.rows) for batch in loader.batches(plan))

    return run


def _load_image_folder(folder: Path, workers: int, usual: bool) -> Pass:
    """Torchvision's ImageFolder and torch's DataLoader, its processes kept alive from pass to pass."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps: list[Any] = [transforms.PILToTensor()]
    if usual:
        normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        steps = [transforms.RandomCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    loader: DataLoader[Any] = DataLoader(
        datasets.ImageFolder(str(folder), transforms.Compose(steps)),
        batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=True,
    )  # fmt: skip

    def run() -> int:
        return sum(len(images) for images, _ in loader)

    return run


def _load_with_dali(folder: Path, workers: int) -> Pass:
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


def _decode_in_memory(split: Split, rows: npt.NDArray[np.int64], workers: int, stack: ExitStack) -> Pass:
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


def measure_epoch(scratch: Path, rows: int = ILSVRC) -> dict[str, float]:
    """Seconds to open an index of so many rows, and for each part of an epoch's order."""
    from alexnet_cli.core.data.augment import AugmentParams
    from alexnet_cli.core.data.classes import ClassName
    from alexnet_cli.core.data.loader import epoch_order, training_batches
    from alexnet_cli.core.data.shards import ROW, Dataset, index_name
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
        "draws of an epoch": least_seconds(lambda: AugmentParams.draw(rows, PAPER, 1)),
    }
