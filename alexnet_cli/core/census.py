"""What people want to know of their pictures before training: source sizes, exact duplicates, leaks. No torch.

A fact of every picture that was packed is in its shard's sidecar, 25 bytes each; they are never in memory together.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

FACT = np.dtype([("row", "<u4"), ("width", "<u2"), ("height", "<u2"), ("digest", "V16"), ("orientation", "u1")])
"""The row in the source's split, the size in pixels, EXIF orientation, and half of the sha256 of the file's bytes."""
SIDES = ("width", "height")
ACROSS = {"across_splits": "split", "across_classes": "class"}
LONGEST = 65535  # a side longer than that counts as this long; JPEG has none

Facts = npt.NDArray[np.void]
Fact = tuple[int, int, int, bytes, int]


def fact(row: int, rgb: npt.NDArray[np.uint8], data: bytes, orientation: int) -> Fact:
    """The fact of one picture: decoded, H x W x 3, and as it was in the source, with its EXIF orientation, 1 to 8."""
    height, width = (min(side, LONGEST) for side in rgb.shape[:2])
    return row, width, height, hashlib.sha256(data).digest()[:16], orientation


class Census:
    """Sizes and equal files, counted from facts that come a shard at a time; of each picture 8 bytes are kept."""

    def __init__(self) -> None:
        self.turned = 0
        """Pictures of which EXIF says that they are to be turned."""
        self._sizes = {side: np.zeros(LONGEST + 1, np.int64) for side in SIDES}
        self._heads: list[npt.NDArray[np.uint64]] = []

    def add(self, facts: Facts) -> None:
        """Count the pictures of a shard."""
        for side in SIDES:
            self._sizes[side] += np.bincount(facts[side], minlength=LONGEST + 1)
        self.turned += int((facts["orientation"] > 1).sum())
        self._heads.append(_head(facts))

    def sizes(self) -> dict[str, dict[str, float]]:
        """Width and height of the source pictures: least, median and most, in pixels."""
        return {side: _spread(counts) for side, counts in self._sizes.items()}

    def repeated(self) -> npt.NDArray[np.uint64]:
        """Heads of digests that came more than once, sorted: those of all equal files, and hardly any other."""
        heads = np.concatenate(self._heads)
        heads.sort()
        return np.unique(heads[1:][heads[1:] == heads[:-1]])


def _spread(counts: npt.NDArray[np.int64]) -> dict[str, float]:
    until = counts.cumsum()
    middle = [(int(until[-1]) - 1) // 2, int(until[-1]) // 2]
    values = np.flatnonzero(counts)
    median = float(np.searchsorted(until, middle, side="right").mean())
    return {"min": int(values[0]), "median": median, "max": int(values[-1])}


def duplicates(
    repeated: npt.NDArray[np.uint64],
    facts: Mapping[str, Iterable[Facts]],
    told: Callable[[str, int], dict[str, str]],
) -> Iterator[list[dict[str, str]]]:
    """Groups of pictures whose files are equal byte for byte, each by split, path and class, in source order.

    `repeated` is what the census of all splits found, `told(split, row)` a picture's path in the source and its class.
    """
    if not len(repeated):
        return
    splits = list(facts)
    groups: dict[bytes, list[tuple[int, int]]] = {}
    for place, parts in enumerate(facts.values()):
        for part in parts:
            head = _head(part)
            candidates = part[repeated[np.searchsorted(repeated, head).clip(max=len(repeated) - 1)] == head]
            for row, digest in zip(candidates["row"].tolist(), candidates["digest"].tolist(), strict=True):
                groups.setdefault(digest, []).append((place, row))
    for group in sorted(sorted(group) for group in groups.values() if len(group) > 1):
        yield [{"split": splits[place]} | told(splits[place], row) for place, row in group]


def _head(part: Facts) -> npt.NDArray[np.uint64]:
    """The first eight bytes of every digest as a number."""
    return np.ascontiguousarray(part["digest"]).view(np.uint64)[::2].copy()


def counted(groups: list[list[dict[str, str]]]) -> dict[str, Any]:
    """How many groups of equal pictures there are: in all, in more than one split, in more than one class."""
    across = {name: sum(differ(group, key) for group in groups) for name, key in ACROSS.items()}
    return {"groups": len(groups), "pictures": sum(map(len, groups)), **across}


def differ(group: list[dict[str, str]], key: str) -> bool:
    """Whether equal pictures are in different splits (leaks), or classes (wrong labels)."""
    return len({entry.get(key) for entry in group}) > 1
