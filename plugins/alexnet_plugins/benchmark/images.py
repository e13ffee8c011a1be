"""The pictures that `alexnet benchmark` measures on: a user's own, or drawn ones as large as ImageNet's.

A drawn picture is a sum of noise at nine scales, each finer one fainter, as in photographs; at 500 x 375 its JPEG
takes about as many bytes as one of ImageNet, so that decoding costs about as much.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

CLASSES = 4
SCALES = (2, 4, 8, 16, 32, 64, 128, 256, 500)  # cells along the longer side


def draw(folder: Path, count: int) -> None:
    """Write `count` pictures to FOLDER/train/CLASS and a few to FOLDER/val/CLASS, the same ones every time."""
    jobs = [("train", number) for number in range(count)] + [("val", count + number) for number in range(CLASSES)]
    for split in ("train", "val"):
        for label in range(CLASSES):
            (folder / split / f"class{label}").mkdir(parents=True, exist_ok=True)

    def write(job: tuple[str, int]) -> None:
        split, number = job
        (folder / split / f"class{number % CLASSES}" / f"{number:06}.jpg").write_bytes(picture(number))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        list(pool.map(write, jobs))


def picture(number: int) -> bytes:
    """A JPEG of about 500 x 375 pixels, upright or lying; `number` decides all of it."""
    import io

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
    out = io.BytesIO()
    Image.fromarray(total.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=95)
    return out.getvalue()


def files(folder: Path, limit: int) -> list[Path]:
    """The first pictures under a folder, in the order of their names."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
    return found[:limit]


def tree(paths: list[Path], folder: Path) -> None:
    """The same files as FOLDER/train/CLASS and FOLDER/val/CLASS, linked: what a preparation takes."""
    for number, path in enumerate(paths):
        for split in ("train", "val") if number < CLASSES else ("train",):
            target = folder / split / f"class{number % CLASSES}"
            target.mkdir(parents=True, exist_ok=True)
            (target / f"{number:06}.jpg").symlink_to(path.resolve())
