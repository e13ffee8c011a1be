"""Statistics of a data set, collected while it is prepared. No torch.

Of the training pixels: mean image, mean color, color axes (section 4.1 of the paper). The pixels are those before they
become JPEG; over a set the two differ by far less than a gray level on average. Everything is summed in integers (or in
floats that hold them exactly), so the sums are exact in whatever order and on however many threads the images come.

Of the source files: sizes, exact duplicates, EXIF turns. The ImageFact of every image that was packed is in its shard's
sidecar, 25 bytes each; they are never in memory together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from alexnet_cli.recipe import SIDE

IMAGE_FACT = np.dtype([("row", "<u4"), ("width", "<u2"), ("height", "<u2"), ("digest", "V16"), ("orientation", "u1")])
"""The row in the source's split, the size in pixels, half of the sha256 of the file's bytes, and EXIF orientation."""
SIDES = ("width", "height")
ACROSS = {"across_splits": "split", "across_classes": "class"}
LONGEST = 65535  # a side longer than that counts as this long; JPEG has none

ImageFacts = npt.NDArray[np.void]
ImageFact = tuple[int, int, int, bytes, int]
Group = list[dict[str, str]]
"""Equal images: split, path and class of each."""
DIGITS = 9  # decimals written to dataset.json


def _no_pixels() -> npt.NDArray[np.int64]:
    return np.zeros((SIDE, SIDE, 3), np.int64)


def _no_products() -> npt.NDArray[np.int64]:
    return np.zeros((3, 3), np.int64)


@dataclass
class PixelSums:
    """Exact sums over pictures: how many, their pixels one by one, and the products of their channels."""

    images: int = 0
    pixels: npt.NDArray[np.int64] = field(default_factory=_no_pixels)
    """256 x 256 x 3: sum of the pictures."""
    products: npt.NDArray[np.int64] = field(default_factory=_no_products)
    """3 x 3: sum over all pixels of (r, g, b) times (r, g, b)."""

    def add(self, pictures: Sequence[npt.NDArray[np.uint8]]) -> None:
        """Count up to 257 pictures, each uint8 256 x 256 x 3."""
        self.images += len(pictures)
        pixels = np.zeros((SIDE, SIDE, 3), np.uint16)  # 257 times 255 is the most it holds
        for rgb in pictures:
            pixels += rgb
            # A row is r g b r g b ...: times itself, and times itself one and two to the left, gives every pair of
            # channels without taking them apart. A column's 256 products stay below 2^24, exact in float32; and
            # einsum is no BLAS, which would start threads of its own beside ours.
            rows = rgb.reshape(SIDE, -1).astype(np.float32)
            for shift in range(3):
                columns = np.einsum("ij,ij->j", rows[:, : rows.shape[1] - shift], rows[:, shift:])
                for channel in range(3 - shift):
                    self.products[channel, channel + shift] += int(columns[channel::3].sum(dtype=np.float64))
        self.pixels += pixels
        self.products[[1, 2, 2], [0, 0, 1]] = self.products[[0, 0, 1], [1, 2, 2]]

    def merge(self, other: PixelSums) -> None:
        """Add the sums of other pictures."""
        self.images += other.images
        self.pixels += other.pixels
        self.products += other.products

    def mean_image(self) -> npt.NDArray[np.float32]:
        """float32 3 x 256 x 256, RGB, 0..255."""
        mean = self.pixels / self.images
        return np.ascontiguousarray(mean.transpose(2, 0, 1), dtype=np.float32)

    def mean_rgb(self) -> npt.NDArray[np.float64]:
        """(3,), 0..255."""
        mean: npt.NDArray[np.float64] = self.pixels.sum((0, 1)) / (self.images * SIDE * SIDE)
        return mean

    def color_axes(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Standard deviations (3,) along the principal axes, ascending, 0..255; the axes (3, 3) as columns.

        An axis has no sign of its own; each is turned so that its largest component is positive.
        """
        count = self.images * SIDE * SIDE
        mean = self.mean_rgb()
        variances, axes = np.linalg.eigh(self.products / count - np.outer(mean, mean))
        largest = np.abs(axes).round(6).argmax(0)  # rounded: a tie must not be decided by the last bit
        axes = axes * np.sign(axes[largest, range(3)])
        return np.sqrt(np.maximum(variances, 0.0)), axes

    def record(self) -> dict[str, object]:
        """The color entries of dataset.json."""
        deviations, axes = self.color_axes()
        return {
            "mean_rgb": self.mean_rgb().round(DIGITS).tolist(),
            "color_std": deviations.round(DIGITS).tolist(),
            "color_axes": axes.round(DIGITS).tolist(),
        }


def image_fact(row: int, rgb: npt.NDArray[np.uint8], data: bytes, orientation: int) -> ImageFact:
    """The fact of one image: decoded, H x W x 3, and as it was in the source, with its EXIF orientation, 1 to 8."""
    height, width = (min(side, LONGEST) for side in rgb.shape[:2])
    return row, width, height, hashlib.sha256(data).digest()[:16], orientation


class SourceStats:
    """Sizes and equal files, counted from facts that come a shard at a time; of each image 8 bytes are kept."""

    def __init__(self) -> None:
        self.turned = 0
        """Images of which EXIF says that they are to be turned."""
        self._sizes = {side: np.zeros(LONGEST + 1, np.int64) for side in SIDES}
        self._heads: list[npt.NDArray[np.uint64]] = []

    def add(self, facts: ImageFacts) -> None:
        """Count the images of a shard."""
        for side in SIDES:
            self._sizes[side] += np.bincount(facts[side], minlength=LONGEST + 1)
        self.turned += int((facts["orientation"] > 1).sum())
        self._heads.append(_digest_heads(facts))

    def sizes(self) -> dict[str, dict[str, float]]:
        """Width and height of the source images: least, median and most, in pixels."""
        return {side: _spread(counts) for side, counts in self._sizes.items()}

    def repeated(self) -> npt.NDArray[np.uint64]:
        """First 8 bytes of digests that came more than once, sorted: all equal files, and hardly any other."""
        heads = np.concatenate(self._heads)
        heads.sort()
        return np.unique(heads[1:][heads[1:] == heads[:-1]])


def _spread(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    until = counts.cumsum()
    middle = [(int(until[-1]) - 1) // 2, int(until[-1]) // 2]
    values = np.flatnonzero(counts)
    median = float(np.searchsorted(until, middle, side="right").mean())
    return {"min": int(values[0]), "median": median, "max": int(values[-1])}


def find_duplicates(
    repeated: npt.NDArray[np.uint64],
    facts: Mapping[str, Iterable[ImageFacts]],
    describe: Callable[[str, int], dict[str, str]],
) -> Iterator[Group]:
    """Groups of images whose files are equal byte for byte, in source order.

    `repeated` is what `SourceStats` found over all splits; `facts` comes again, by split; `describe(split, row)` gives
    an image's path in the source and its class.
    """
    if not len(repeated):
        return
    splits = list(facts)
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for place, parts in enumerate(facts.values()):
        for part in parts:
            heads = _digest_heads(part)
            candidates = part[repeated[np.searchsorted(repeated, heads).clip(max=len(repeated) - 1)] == heads]
            for row, digest in zip(candidates["row"].tolist(), candidates["digest"].tolist(), strict=True):
                groups.setdefault(digest, []).append((place, row))
    for group in sorted(sorted(group) for group in groups.values() if len(group) > 1):
        yield [{"split": splits[place]} | describe(splits[place], row) for place, row in group]


def _digest_heads(facts: ImageFacts) -> npt.NDArray[np.uint64]:
    """The first eight bytes of every digest as a number."""
    return np.ascontiguousarray(facts["digest"]).view(np.uint64)[::2].copy()


def duplicate_summary(groups: Sequence[Group]) -> dict[str, int]:
    """How many groups of equal images there are: in all, in more than one split, in more than one class."""
    across = {name: sum(spans(group, key) for group in groups) for name, key in ACROSS.items()}
    return {"groups": len(groups), "pictures": sum(map(len, groups)), **across}


def spans(group: Group, key: str) -> bool:
    """Whether equal images are in several splits (a leak) or classes (a wrong label), `key` being split or class."""
    return len({entry.get(key) for entry in group}) > 1
