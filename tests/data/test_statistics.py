"""Statistics of a data set, collected shard by shard, against numpy over everything at once."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from alexnet_cli.core.data import fast_images, shards
from alexnet_cli.core.data.statistics import (
    IMAGE_FACT,
    MAX_SIDE,
    ImageFacts,
    PixelSums,
    SourceStats,
    find_duplicates,
    is_single_color,
)


def facts(rng: np.random.Generator, first: int, count: int) -> ImageFacts:
    """So few different digests that many pictures are equal; two of them differ in their last byte only."""
    found = np.zeros(count, IMAGE_FACT)
    found["row"] = np.arange(first, first + count)
    found["width"], found["height"] = rng.integers(1, MAX_SIDE + 1, (2, count))
    digests = [bytes([n // 2, *range(14), n % 2]) for n in range(60)]
    found["orientation"] = rng.integers(1, 9, count)
    found["digest"] = [digests[n] for n in rng.integers(0, 60, count)]
    return found


@pytest.mark.parametrize("counts", [(1,), (2,), (40, 1, 60), (7, 30, 8, 6)])
def test_source_statistics_equal_numpy(counts: tuple[int, ...]) -> None:
    rng = np.random.default_rng(sum(counts))
    parts = [facts(rng, sum(counts[:i]), count) for i, count in enumerate(counts)]
    stats = SourceStats()
    for part in parts:
        stats.add(part)
    whole = np.concatenate(parts)
    for side, spread in stats.sizes().items():
        assert spread == {"min": whole[side].min(), "median": np.median(whole[side]), "max": whole[side].max()}
    assert stats.turned == sum(orientation != 1 for orientation in whole["orientation"])
    rows = defaultdict(list)
    for row, digest in zip(whole["row"].tolist(), whole["digest"].tolist(), strict=True):
        rows[digest].append(row)
    expected = sorted(group for group in rows.values() if len(group) > 1)
    found = find_duplicates(
        stats.repeated_heads(), {"train": iter(parts)}, lambda split, row: {"path": f"{split}/{row}"}
    )
    assert [[entry["path"] for entry in group] for group in found] == [
        [f"train/{row}" for row in group] for group in expected
    ]


def test_color_statistics_equal_numpy(shapes: Path, packed_shapes: Path) -> None:
    files = [
        file for file in sorted((shapes / "train").rglob("*.jpg")) if file.name not in ("star 07.jpg", "circle 03.jpg")
    ]
    pixels = np.stack([fast_images.resize_and_crop(fast_images.decode(file.read_bytes())) for file in files])
    dataset = shards.open_dataset(packed_shapes)
    np.testing.assert_allclose(dataset.mean_image(), pixels.mean(0).transpose(2, 0, 1), rtol=1e-6)
    flat = pixels.reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(dataset.mean_rgb, flat.mean(0), rtol=1e-6)
    covariance = np.cov(flat.T, bias=True)
    assert (np.diff(dataset.color_std) > 0).all()
    axes = dataset.color_axes.astype(np.float64)
    np.testing.assert_allclose(axes.T @ axes, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(covariance @ axes, axes * dataset.color_std**2, rtol=1e-4, atol=1e-2)
    # The stored JPEGs are what training sees: nearly the same.
    split = dataset.split("train")
    stored = np.stack([fast_images.decode(bytes(split.jpeg(row))) for row in range(len(split))])
    assert np.abs(stored.mean((0, 1, 2)) - dataset.mean_rgb).max() < 0.5


def test_pixel_sums_of_white_images_are_exact() -> None:
    sums = PixelSums()
    for _ in range(2):
        sums.add([np.full((256, 256, 3), 255, np.uint8)] * 257)
    assert (sums.products == 514 * 256 * 256 * 255 * 255).all()
    assert (sums.pixels == 514 * 255).all()
    deviations, _ = sums.compute_color_axes()
    np.testing.assert_array_equal(deviations, 0)


def test_pixel_sums_equal_integer_sums() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (5, 256, 256, 3)).astype(np.uint8)
    sums = PixelSums()
    sums.add(list(noise))
    flat = noise.reshape(-1, 3).astype(np.int64)
    np.testing.assert_array_equal(sums.products, flat.T @ flat)
    np.testing.assert_array_equal(sums.pixels, noise.sum(0, dtype=np.int64))


def test_is_single_color_looks_at_every_pixel() -> None:
    red = np.full((256, 256, 3), (200, 0, 0), np.uint8)
    assert is_single_color(red)
    for place in ((0, 0, 0), (255, 255, 2), (101, 77, 1)):
        odd = red.copy()
        odd[place] ^= 16
        assert is_single_color(odd)
        odd[place] ^= 48
        assert not is_single_color(odd)
    assert is_single_color(np.random.default_rng(0).integers(100, 117, red.shape).astype(np.uint8))
    assert not is_single_color(np.random.default_rng(0).integers(100, 118, red.shape).astype(np.uint8))
