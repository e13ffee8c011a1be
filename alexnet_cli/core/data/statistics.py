"""Statistics of a data set, collected while it is prepared. No torch.

Of the training pixels: mean image, mean color, color axes (section 4.1 of the paper), before they become JPEG; the
difference is far below one gray level. All sums are exact integers, so order and number of threads do not matter.

Of the source files: sizes, exact duplicates, EXIF orientations. Images of a single color. The ImageFact of every packed
image, 26 bytes, is in its shard's sidecar; the facts of all images are never in memory together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alexnet_cli.recipe import SIDE

IMAGE_FACT = np.dtype([
    ("row", "<u4"), ("width", "<u2"), ("height", "<u2"), ("digest", "V16"), ("orientation", "u1"),
    ("single_color", "?"),
])  # fmt: skip
"""Row in the source's split, size in pixels, first half of the file's SHA-256, EXIF orientation, `is_single_color`."""
SINGLE_COLOR_RANGE = 16  # gray levels at most; 12-bit values in a file of 16 bits become 0 to 16
SIDES = ("width", "height")
MAX_SIDE = 65535  # longer sides count as this long; JPEG has none
DIGITS = 9  # decimals written to dataset.json

ImageFacts = npt.NDArray[np.void]
ImageFact = tuple[int, int, int, bytes, int, bool]
DuplicateGroup = list[dict[str, str]]
"""Images whose files are equal: split, path and class of each."""


@dataclass
class PixelSums:
    """Exact sums over images."""

    images: int = 0
    """Number of images."""
    pixels: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((SIDE, SIDE, 3), np.int64))
    """256 x 256 x 3: sum of the images."""
    products: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros((3, 3), np.int64))
    """3 x 3: sum over all pixels of (r, g, b) times (r, g, b)."""

    def add(self, images: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Add up to 257 images, each uint8 256 x 256 x 3."""
        self.images += len(images)
        pixels = np.zeros((SIDE, SIDE, 3), np.uint16)  # holds 257 times 255
        for rgb in images:
            pixels += rgb
            # A row is r g b r g b ...: multiplied by itself shifted by 0, 1 and 2 places, it gives every pair of
            # channels without separating them. A column's 256 products stay below 2^24, exact in float32. einsum is
            # used because BLAS would start threads of its own.
            rows = rgb.reshape(SIDE, -1).astype(np.float32)
            for shift in range(3):
                columns = np.einsum("ij,ij->j", rows[:, : rows.shape[1] - shift], rows[:, shift:])
                for channel in range(3 - shift):
                    self.products[channel, channel + shift] += int(columns[channel::3].sum(dtype=np.float64))
        self.pixels += pixels
        self.products[[1, 2, 2], [0, 0, 1]] = self.products[[0, 0, 1], [1, 2, 2]]

    def merge(self, other: PixelSums) -> None:
        """Add the sums of other images."""
        self.images += other.images
        self.pixels += other.pixels
        self.products += other.products

    def mean_image(self) -> npt.NDArray[np.float32]:
        """Mean image: float32 3 x 256 x 256, RGB, 0..255."""
        mean = self.pixels / self.images
        return np.ascontiguousarray(mean.transpose(2, 0, 1), dtype=np.float32)

    def mean_rgb(self) -> npt.NDArray[np.float64]:
        """Mean color: (3,), 0..255."""
        mean: npt.NDArray[np.float64] = self.pixels.sum((0, 1)) / (self.images * SIDE * SIDE)
        return mean

    def compute_color_axes(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Standard deviations (3,) along the principal axes, ascending, 0..255, and the axes (3, 3) as columns.

        The sign of an axis is arbitrary: its largest component is made positive.
        """
        count = self.images * SIDE * SIDE
        mean = self.mean_rgb()
        variances, axes = np.linalg.eigh(self.products / count - np.outer(mean, mean))
        largest = np.abs(axes).round(6).argmax(0)  # rounded, so that the last bit does not decide a tie
        axes = axes * np.sign(axes[largest, range(3)])
        return np.sqrt(np.maximum(variances, 0.0)), axes

    def to_record(self) -> dict[str, object]:
        """The color entries of dataset.json."""
        deviations, axes = self.compute_color_axes()
        return {
            "mean_rgb": self.mean_rgb().round(DIGITS).tolist(),
            "color_std": deviations.round(DIGITS).tolist(),
            "color_axes": axes.round(DIGITS).tolist(),
        }


def make_image_fact(
    row: int, rgb: npt.NDArray[np.uint8], packed: npt.NDArray[np.uint8], data: bytes, orientation: int
) -> ImageFact:
    """The fact of one image: its row, pixels (H x W x 3) decoded and packed, file and EXIF orientation (1 to 8)."""
    height, width = (min(side, MAX_SIDE) for side in rgb.shape[:2])
    return row, width, height, hashlib.sha256(data).digest()[:16], orientation, is_single_color(packed)


def is_single_color(rgb: npt.NDArray[np.uint8]) -> bool:
    """Whether all pixels have the same color, or nearly so: H x W x 3 -> bool."""
    for pixels in (rgb[::64], rgb):  # a few rows answer for nearly all images
        darkest, brightest = pixels.min(0).min(0), pixels.max(0).max(0)  # 100 times as fast as both axes at once
        if (brightest - darkest > SINGLE_COLOR_RANGE).any():
            return False
    return True


class SourceStats:
    """Sizes and repeated files, counted shard by shard. Keeps 8 bytes per image."""

    def __init__(self) -> None:
        self.turned = 0
        """Number of images whose EXIF orientation is not upright."""
        self._sizes = {side: np.zeros(MAX_SIDE + 1, np.int64) for side in SIDES}
        self._heads: list[npt.NDArray[np.uint64]] = []

    def add(self, facts: ImageFacts) -> None:
        """Add the images of a shard."""
        for side in SIDES:
            self._sizes[side] += np.bincount(facts[side], minlength=MAX_SIDE + 1)
        self.turned += int((facts["orientation"] > 1).sum())
        self._heads.append(_digest_heads(facts))

    def sizes(self) -> dict[str, dict[str, float]]:
        """Minimum, median and maximum of the width and the height of the source images, in pixels."""
        return {side: _summarize_histogram(counts) for side, counts in self._sizes.items()}

    def repeated_heads(self) -> npt.NDArray[np.uint64]:
        """First 8 bytes of the digests that occurred more than once, sorted: candidates for duplicates."""
        heads = np.concatenate(self._heads)
        heads.sort()
        return np.unique(heads[1:][heads[1:] == heads[:-1]])


def _summarize_histogram(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    """Minimum, median and maximum, where `counts[value]` is how often a value occurs."""
    cumulative = counts.cumsum()
    total = int(cumulative[-1])
    middle = [(total - 1) // 2, total // 2]
    values = np.flatnonzero(counts)
    median = float(np.searchsorted(cumulative, middle, side="right").mean())
    return {"min": int(values[0]), "median": median, "max": int(values[-1])}


def find_duplicates(
    repeated_heads: npt.NDArray[np.uint64],
    facts: Mapping[str, Iterable[ImageFacts]],
    describe: Callable[[str, int], dict[str, str]],
) -> Iterator[DuplicateGroup]:
    """Groups of images whose files are equal byte for byte, in source order.

    `repeated_heads` is from SourceStats, over all splits. `facts` are read once more, by split. `describe(split, row)`
    returns the path and the class of an image.
    """
    if not len(repeated_heads):
        return
    splits = list(facts)
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for split_number, shards in enumerate(facts.values()):
        for shard in shards:
            candidates = shard[np.isin(_digest_heads(shard), repeated_heads)]
            for row, digest in zip(candidates["row"].tolist(), candidates["digest"].tolist(), strict=True):
                groups.setdefault(digest, []).append((split_number, row))
    for group in sorted(sorted(group) for group in groups.values() if len(group) > 1):
        yield [{"split": splits[number]} | describe(splits[number], row) for number, row in group]


def _digest_heads(facts: ImageFacts) -> npt.NDArray[np.uint64]:
    """The first eight bytes of every digest, as numbers."""
    return np.ascontiguousarray(facts["digest"]).view(np.uint64)[::2].copy()


def duplicate_summary(groups: Sequence[DuplicateGroup]) -> dict[str, int]:
    """The number of groups and of images in them, and of groups with several splits or several classes."""
    return {
        "groups": len(groups),
        "pictures": sum(map(len, groups)),
        "across_splits": sum(has_several(group, "split") for group in groups),
        "across_classes": sum(has_several(group, "class") for group in groups),
    }


def has_several(group: DuplicateGroup, key: str) -> bool:
    """Whether equal images have several splits (a leak) or classes (a wrong label); `key` is "split" or "class"."""
    return len({entry.get(key) for entry in group}) > 1
