"""`alexnet benchmark prepare` and `load`: packing a folder of images, and reading 256 x 256 JPEGs in batches.

Our packing writes shards durably and measures mean and color axes; its peers only write one file per image. Our loader
yields whole uint8 images, since cropping is part of the training step: compare it with the peers that only decode.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import shutil
import threading
import warnings
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from alexnet_cli.recipe import SIDE
from alexnet_plugins.benchmark.sample_images import make_source_folder, open_or_make_dataset
from alexnet_plugins.benchmark.timing import BenchmarkCase, BenchmarkOptions, Work, measure_least_seconds

if TYPE_CHECKING:
    from alexnet_cli.core.data.shards import Split

Item = TypeVar("Item")

QUALITY = 95
BATCH = 128
IMAGES = 16 * BATCH  # per pass: enough that the first batch, which nothing hides, does not decide
CHUNK = 16  # images that a worker takes at a time
ILSVRC_IMAGES = 1_281_167  # training split


def compare_prepare(options: BenchmarkOptions) -> Generator[BenchmarkCase]:
    """Yield the case of packing a folder: ours, Pillow, OpenCV, and the codec alone, on the same files."""
    folder, paths, note = make_source_folder(options)
    workers, scratch = options.workers, options.scratch
    # Processes that are started, not forked: a forked one would inherit the locks of torch's threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context) as processes, ThreadPoolExecutor(workers) as threads:

        def convert_with(resize: Callable[[Path, list[Path]], None], output: Path) -> int:
            output.mkdir(exist_ok=True)
            list(processes.map(partial(resize, output), _split(paths, CHUNK)))
            return len(paths)

        pillow = partial(convert_with, resize_with_pillow, scratch / "pillow")
        peers: dict[str, Work] = {f"Pillow, {workers} processes": pillow}
        has_opencv = importlib.util.find_spec("cv2") is not None
        if has_opencv:
            peers[f"OpenCV, {workers} processes"] = partial(convert_with, resize_with_opencv, scratch / "opencv")
        peers["limit: codec and resize alone"] = _convert_in_memory(paths, threads)
        missing = [] if has_opencv else ["OpenCV"]
        yield BenchmarkCase("prepare", _pack(folder, workers, scratch / "ours"), peers, [note], missing)


def _split(items: list[Item], size: int) -> list[list[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _pack(folder: Path, workers: int, output: Path) -> Work:
    from alexnet_cli.core.data.plan import Plan
    from alexnet_cli.core.data.prepare import pack
    from alexnet_cli.core.data.sources import detect_source

    def run() -> int:
        images = sum(step.images for step in pack(Plan(detect_source(folder), output, QUALITY), workers))
        shutil.rmtree(output)
        return images

    return run


def resize_with_pillow(output: Path, paths: list[Path]) -> None:
    """Decode each image, resize the shorter side to 256, crop the center, save."""
    from PIL import Image

    for path in paths:
        with Image.open(path) as image:
            rgb = image.convert("RGB")
        width, height = _scale_to_side(*rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BILINEAR)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        rgb.crop((left, top, left + SIDE, top + SIDE)).save(output / path.name, "JPEG", quality=QUALITY)


def resize_with_opencv(output: Path, paths: list[Path]) -> None:
    """Do the same with OpenCV; INTER_AREA is its resize that does not alias."""
    import cv2

    cv2.setNumThreads(1)
    for path in paths:
        bgr: Any = cv2.imread(str(path), cv2.IMREAD_COLOR)
        width, height = _scale_to_side(bgr.shape[1], bgr.shape[0])
        bgr = cv2.resize(bgr, (width, height), interpolation=cv2.INTER_AREA)
        left, top = (width - SIDE) // 2, (height - SIDE) // 2
        crop = bgr[top : top + SIDE, left : left + SIDE]
        cv2.imwrite(str(output / path.name), crop, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])


def _scale_to_side(width: int, height: int) -> tuple[int, int]:
    """Return the size with a shorter side of 256 pixels."""
    scale = SIDE / min(width, height)
    return max(SIDE, round(width * scale)), max(SIDE, round(height * scale))


def _convert_in_memory(paths: list[Path], threads: ThreadPoolExecutor) -> Work:
    """Time decode, resize and encode only: no reading, no writing."""
    from alexnet_cli.core.data import fast_images

    files = [path.read_bytes() for path in paths]

    def convert(jpegs: list[bytes]) -> None:
        for jpeg in jpegs:
            fast_images.encode(fast_images.resize_and_crop(fast_images.decode(jpeg)), QUALITY)

    def run() -> int:
        list(threads.map(convert, _split(files, CHUNK)))
        return len(files)

    return run


def compare_load(options: BenchmarkOptions) -> Generator[BenchmarkCase]:
    """Yield the case of loading: ours, ImageFolder with DataLoader, DALI, and the decoder alone, on the same files."""
    from alexnet_cli.core.data.loader import Loader

    dataset, note = open_or_make_dataset(options)
    split, workers = dataset.split("train"), options.workers
    rows = np.resize(np.random.default_rng(0).permutation(len(split))[:IMAGES], IMAGES).astype(np.int64)
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]
    folder = _write_folder(split, rows, options.scratch / "folder")
    peers = {
        "ImageFolder + DataLoader": _load_image_folder(folder, workers, decode_only=False),
        "ImageFolder, decode only": _load_image_folder(folder, workers, decode_only=True),
    }
    has_dali = importlib.util.find_spec("nvidia") is not None and importlib.util.find_spec("nvidia.dali") is not None
    if has_dali:
        peers["DALI, decode only"] = _load_with_dali(folder, workers)
    with ThreadPoolExecutor(workers) as threads, Loader(split, BATCH, workers) as loader:
        peers["limit: decode alone"] = _decode_in_memory(split, rows, threads)
        yield BenchmarkCase(
            "load",
            lambda: sum(len(batch.rows) for batch in loader.batches(batches)),
            peers,
            (note, "ours yields whole uint8 images; crops, flips and color belong to the training step"),
            [] if has_dali else ["DALI"],
            _measure_epoch(options.scratch),
        )


def _write_folder(split: Split, rows: npt.NDArray[np.int64], folder: Path) -> Path:
    """Write the rows' JPEGs as FOLDER/CLASS/NUMBER.jpg."""
    for number, row in enumerate(rows.tolist()):
        path = folder / f"{split.labels[row]:04}" / f"{number:06}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(split.jpeg(row))
    return folder


def _load_image_folder(folder: Path, workers: int, *, decode_only: bool) -> Work:
    """Torchvision's ImageFolder and torch's DataLoader, whose processes stay alive between passes."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    steps: list[Any] = [transforms.PILToTensor()]
    if not decode_only:
        normalize = transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        steps = [transforms.RandomCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    loader: DataLoader[Any] = DataLoader(
        datasets.ImageFolder(str(folder), transforms.Compose(steps)),
        batch_size=BATCH, shuffle=True, num_workers=workers, persistent_workers=True,
    )  # fmt: skip
    return lambda: sum(len(images) for images, _ in loader)


def _load_with_dali(folder: Path, workers: int) -> Work:
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


def _decode_in_memory(split: Split, rows: npt.NDArray[np.int64], threads: ThreadPoolExecutor) -> Work:
    """Only the codec: bytes already in memory, each thread decoding into a buffer of its own."""
    import simplejpeg

    jpegs = [bytes(split.jpeg(row)) for row in rows.tolist()]
    buffers = threading.local()

    def decode(chunk: list[bytes]) -> None:
        if not hasattr(buffers, "pixels"):
            buffers.pixels = np.empty((SIDE, SIDE, 3), np.uint8)
        for jpeg in chunk:
            simplejpeg.decode_jpeg(jpeg, "RGB", buffer=buffers.pixels)

    def run() -> int:
        list(threads.map(decode, _split(jpegs, 2 * CHUNK)))
        return len(jpegs)

    return run


def _measure_epoch(scratch: Path) -> dict[str, float]:
    """Return the seconds to open an index as large as ILSVRC's, and for each part of an epoch's order."""
    from alexnet_cli.core.data.augment import AugmentParams
    from alexnet_cli.core.data.classes import ClassName
    from alexnet_cli.core.data.loader import epoch_order, training_batches
    from alexnet_cli.core.data.shards import ROW, Dataset, index_name
    from alexnet_cli.recipe import PAPER

    folder, rows = scratch / "index", ILSVRC_IMAGES
    folder.mkdir()
    np.save(folder / index_name("train"), np.zeros(rows, ROW))
    (folder / "empty.tar").touch()
    record = {"splits": {"train": {"images": rows, "shards": [{"file": "empty.tar", "bytes": 0}]}}}
    nothing = np.zeros(0, np.float32)
    dataset = Dataset(folder, "index", "", (ClassName("any"),), nothing, nothing, nothing, record)
    return {
        f"open an index of {rows:,} rows": measure_least_seconds(lambda: dataset.split("train")),
        "permutation of an epoch": measure_least_seconds(lambda: epoch_order(rows, 0, 1)),
        "permutation and batches": measure_least_seconds(lambda: training_batches(rows, BATCH, 0, 1)),
        "draws of an epoch": measure_least_seconds(lambda: AugmentParams.draw(rows, PAPER, 1)),
    }
