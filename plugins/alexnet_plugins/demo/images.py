"""Draw the demo's data set: four shapes in three colors, twelve classes.

Each image has its own random generator, seeded by (seed, split, class, number), so that the set does not depend on
the order or number of workers. A shape is a signed distance field: negative inside, and its slope gives smooth edges.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image

Array = npt.NDArray[np.float32]

SHAPES = ("disc", "ring", "triangle", "cross")
HUES = {"red": 0.0, "green": 125.0, "blue": 228.0}  # degrees
CLASSES = tuple(f"{color}-{shape}" for shape in SHAPES for color in HUES)
SPLITS = ("train", "val")


def draw_dataset(folder: Path, train_per_class: int = 150, val_per_class: int = 25, seed: int = 0) -> int:
    """Write FOLDER/train/CLASS/NNN.jpg and FOLDER/val/CLASS/NNN.jpg. Returns the number of images."""
    jobs = list(_list_jobs(train_per_class, val_per_class))
    for split in SPLITS:
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True, exist_ok=True)

    def write(job: tuple[str, int, int]) -> None:
        split, label, number = job
        rng = np.random.default_rng([seed, SPLITS.index(split), label, number])
        image, quality = draw_image(CLASSES[label], rng), int(rng.integers(82, 94))
        image.save(folder / split / CLASSES[label] / f"{number:03}.jpg", quality=quality)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for _ in pool.map(write, jobs):
            pass
    return len(jobs)


def _list_jobs(train_per_class: int, val_per_class: int) -> Iterator[tuple[str, int, int]]:
    for split, count in zip(SPLITS, (train_per_class, val_per_class), strict=True):
        for label in range(len(CLASSES)):
            for number in range(count):
                yield split, label, number


def draw_image(name: str, rng: np.random.Generator) -> Image.Image:
    """Draw an image of the class `name`, 160 to 256 pixels a side, with the object inside the center square."""
    from PIL import Image, ImageFilter

    color, shape = name.split("-")
    short = int(rng.integers(160, 193))
    long = int(short * rng.uniform(1.0, 1.33))
    height, width = (short, long) if rng.random() < 0.5 else (long, short)
    hue = HUES[color] + rng.uniform(-16, 16)
    scene = _draw_background(rng, height, width, hue)
    _draw_specks(rng, scene)
    _draw_object(rng, scene, shape, hue, short)
    scene *= _make_light(rng, height, width)
    noise = rng.standard_normal(scene.shape, dtype=np.float32)
    scene += noise * np.float32(rng.uniform(0.0, 0.035))
    image = Image.fromarray((scene.clip(0.0, 1.0) * 255).astype(np.uint8))
    return image.filter(ImageFilter.BoxBlur(rng.uniform(0.0, 1.2)))


def _draw_background(rng: np.random.Generator, height: int, width: int, hue: float) -> Array:
    """Return float32 H x W x 3 in 0..1: two muted colors, unlike the object's, mixed by a ramp and by clouds."""
    first, second = (
        _hsv_to_rgb(hue + rng.uniform(70, 290), rng.uniform(0.05, 0.6), rng.uniform(0.25, 0.9)) for _ in range(2)
    )
    mix = 0.6 * _make_clouds(rng, height, width, int(rng.integers(2, 9)))
    mix += 0.4 * _make_ramp(rng, height, width)
    grain = _make_clouds(rng, height, width, int(rng.integers(24, 64))) - np.float32(0.5)
    scene: Array = first + mix[..., None] * (second - first)
    scene += grain[..., None] * np.float32(rng.uniform(0.0, 0.3))
    return scene


def _draw_specks(rng: np.random.Generator, scene: Array) -> None:
    """Draw small discs of any color, so that a few colored pixels do not decide the class."""
    height, width = scene.shape[:2]
    for _ in range(int(rng.integers(0, 9))):
        radius = int(rng.integers(3, 9))
        y, x = int(rng.integers(0, height)), int(rng.integers(0, width))
        window = scene[max(0, y - radius) : y + radius, max(0, x - radius) : x + radius]
        rows, columns = np.ogrid[: window.shape[0], : window.shape[1]]
        inside = (rows - radius) ** 2 + (columns - radius) ** 2 < radius**2
        window[inside] = _hsv_to_rgb(rng.uniform(0, 360), rng.uniform(0.2, 0.9), rng.uniform(0.3, 1.0))


def _draw_object(rng: np.random.Generator, scene: Array, shape: str, hue: float, short: int) -> None:
    """Draw the object and its shadow over the scene, with random place, size and rotation."""
    height, width = scene.shape[:2]
    radius = short * rng.uniform(0.25, 0.42)
    room = max(0.0, 0.48 * short - radius)
    cy, cx = height / 2 + rng.uniform(-room, room), width / 2 + rng.uniform(-room, room)
    stretch, turn = rng.uniform(0.85, 1.18), rng.uniform(0, 2 * np.pi)
    soft = rng.uniform(0.7, 2.0)  # width of the edge in pixels
    rows = np.arange(height, dtype=np.float32)[:, None] - np.float32(cy)
    columns = np.arange(width, dtype=np.float32)[None, :] - np.float32(cx)

    def cover(dy: float, dx: float, softness: float) -> Array:
        y = (rows - np.float32(dy)) / np.float32(radius)
        x = (columns - np.float32(dx)) / np.float32(radius * stretch)
        sine, cosine = np.float32(np.sin(turn)), np.float32(np.cos(turn))
        distance = _signed_distance(shape, cosine * x + sine * y, cosine * y - sine * x)
        return (0.5 - distance * np.float32(radius / (2 * softness))).clip(0.0, 1.0)

    shadow = cover(rng.uniform(-0.15, 0.15) * radius, rng.uniform(-0.15, 0.15) * radius, radius / 5)
    scene *= (1 - shadow * np.float32(rng.uniform(0.0, 0.5)))[..., None]
    first, second = (
        _hsv_to_rgb(hue + rng.uniform(-5, 5), rng.uniform(0.65, 0.95), rng.uniform(0.6, 1.0)) for _ in range(2)
    )
    mix = 0.5 * (_make_clouds(rng, height, width, int(rng.integers(3, 20))) + _make_ramp(rng, height, width))
    paint = first + mix[..., None] * (second - first)
    scene += cover(0.0, 0.0, soft)[..., None] * (paint - scene)


def _signed_distance(shape: str, x: Array, y: Array) -> Array:
    """Return the signed distance to the shape, negative inside; the shape fits into the unit circle."""
    result: Array
    if shape == "disc":
        result = np.hypot(x, y) - np.float32(0.85)
    elif shape == "ring":
        result = np.abs(np.hypot(x, y) - np.float32(0.74)) - np.float32(0.22)
    elif shape == "triangle":
        tilt = np.float32(np.sqrt(0.75))
        result = np.maximum(tilt * np.abs(x) + np.float32(0.5) * y, -y) - np.float32(0.5)
    else:
        across, along = np.abs(x), np.abs(y)
        long, thick = np.float32(0.95), np.float32(0.27)
        lying, standing = np.maximum(across - long, along - thick), np.maximum(across - thick, along - long)
        result = np.minimum(lying, standing)
    return result


def _make_clouds(rng: np.random.Generator, height: int, width: int, cells: int) -> Array:
    """Return float32 H x W in 0..1: `cells` x `cells` random values, enlarged smoothly."""
    from PIL import Image

    coarse = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).clip(0.0, 1.0)


def _make_ramp(rng: np.random.Generator, height: int, width: int) -> Array:
    """Return float32 H x W in 0..1: a linear gradient in a random direction."""
    angle = rng.uniform(0, 2 * np.pi)
    rows = np.linspace(-0.5, 0.5, height, dtype=np.float32)[:, None] * np.float32(np.sin(angle))
    columns = np.linspace(-0.5, 0.5, width, dtype=np.float32)[None, :] * np.float32(np.cos(angle))
    return (rows + columns + np.float32(0.5)).clip(0.0, 1.0)


def _make_light(rng: np.random.Generator, height: int, width: int) -> Array:
    """Return float32 H x W x 1: the exposure, with light from one side."""
    low, high = rng.uniform(0.55, 0.95), rng.uniform(0.9, 1.2)
    return (np.float32(low) + np.float32(high - low) * _make_ramp(rng, height, width))[..., None]


def _hsv_to_rgb(hue: float, saturation: float, value: float) -> Array:
    """Return RGB as float32 (3,) in 0..1, for a hue in degrees."""
    wheel = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    fall = np.minimum(wheel, 4 - wheel).clip(0, 1)
    return (value * (1 - saturation * fall)).astype(np.float32)
