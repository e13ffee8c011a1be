"""The images that `alexnet benchmark` measures on: a user's own JPEGs, or drawn ones as large as ImageNet's.

A drawn image is a sum of noise at nine scales, each finer one fainter, as in photographs. At 500 x 375 its JPEG has
about as many bytes as one of ImageNet, so that decoding costs about as much.
"""

from __future__ import annotations

import io
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from alexnet_cli.errors import DataError
from alexnet_plugins.benchmark.timing import BenchmarkOptions

if TYPE_CHECKING:
    from alexnet_cli.core.data.shards import Dataset

CLASSES = 4
SCALES = (2, 4, 8, 16, 32, 64, 128, 256, 500)  # cells along the longer side


def open_or_make_dataset(options: BenchmarkOptions) -> tuple[Dataset, str]:
    """Return the data set of --data, or one prepared from sample images, and a sentence about it."""
    from alexnet_cli.core.data.plan import Plan
    from alexnet_cli.core.data.prepare import pack
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.data.sources import detect_source

    if options.data is not None:
        path = find_dataset(options.data)
        return open_dataset(path), f"measured on the training split of {path}"
    folder, _, note = make_source_folder(options)
    path = options.scratch / "prepared"
    for _ in pack(Plan(detect_source(folder), path), options.workers):
        pass
    return open_dataset(path), f"{note}, prepared"


def make_source_folder(options: BenchmarkOptions) -> tuple[Path, list[Path], str]:
    """Return a folder with train/CLASS and val/CLASS, the images in it, and a sentence about them.

    Raises:
        DataError: the folder of --pictures has too few JPEGs.
    """
    folder = options.scratch / "source"
    for split in ("train", "val"):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True)
    if options.pictures is None:
        _draw_images(folder, options.images)
        note = f"measured on {options.images:,} drawn images of about 500x375 (--pictures: your own)"
    else:
        paths = find_jpegs(options.pictures)[: options.images]
        if len(paths) < CLASSES:
            raise DataError(f"{options.pictures} has {len(paths)} JPEGs", "choose a folder with some hundreds of JPEGs")
        for number in range(options.images):
            for split in ("train", "val") if number < CLASSES else ("train",):
                shutil.copyfile(paths[number % len(paths)], _make_path(folder, split, number))
        note = f"measured on {options.images:,} images from {len(paths):,} files of {options.pictures}"
    return folder, sorted(folder.rglob("*.jpg")), note


def find_jpegs(folder: Path) -> list[Path]:
    """Return the JPEG files under a folder, sorted by name."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))


def _make_path(folder: Path, split: str, number: int) -> Path:
    return folder / split / f"class{number % CLASSES}" / f"{number:06}.jpg"


def _draw_images(folder: Path, count: int) -> None:
    """Draw `count` training images and one validation image per class, the same ones every time."""
    jobs = [("train", number) for number in range(count)] + [("val", count + number) for number in range(CLASSES)]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(lambda job: _make_path(folder, *job).write_bytes(draw_jpeg(job[1])), jobs))


def draw_jpeg(number: int) -> bytes:
    """Return a JPEG of about 500 x 375 pixels, landscape or portrait; `number` seeds it."""
    from PIL import Image

    rng = np.random.default_rng((2012, number))
    width, height = 500, int(rng.integers(333, 417))
    if rng.random() < 0.25:
        width, height = height, width
    total = np.zeros((height, width, 3), np.float32)
    for cells in SCALES:
        shape = (max(2, cells * height // 500), max(2, cells * width // 500))
        for channel, strength in enumerate((1.0, 0.9, 0.8)):
            noise = Image.fromarray(rng.standard_normal(shape, dtype=np.float32))
            layer = np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC))
            total[:, :, channel] += layer * np.float32(60 * strength * cells**-0.4)
    total = 0.65 * total.mean(2, keepdims=True) + 0.35 * total + rng.uniform(90, 150)
    file = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=95)
    return file.getvalue()
