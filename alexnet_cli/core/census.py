"""What people want to know of their pictures before training: source sizes, exact duplicates, leaks. No torch.

A fact is kept for every picture that was packed, 24 bytes each, so that 14 million of them fit in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FACT = np.dtype([("row", "<u4"), ("width", "<u2"), ("height", "<u2"), ("digest", "V16")])
LONGEST = 65535  # a side longer than that counts as this long; JPEG has none
"""The row in the source's split, the size in pixels, and half of the sha256 of the file's bytes."""

Facts = npt.NDArray[np.void]


def fact(row: int, rgb: npt.NDArray[np.uint8], data: bytes) -> tuple[int, int, int, bytes]:
    """The fact of one picture: decoded, H x W x 3, and as it was in the source."""
    height, width = (min(side, LONGEST) for side in rgb.shape[:2])
    return row, width, height, hashlib.sha256(data).digest()[:16]


def sizes(facts: Mapping[str, Sequence[Facts]]) -> dict[str, dict[str, float]]:
    """Width and height of the source pictures of all splits: least, median and most, in pixels."""
    found = {}
    for side in ("width", "height"):
        values = np.concatenate([part[side] for parts in facts.values() for part in parts])
        found[side] = {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
    return found


def duplicates(
    facts: Mapping[str, Sequence[Facts]], named: Callable[[str, int], str]
) -> Iterator[list[dict[str, str]]]:
    """Groups of pictures whose files are equal byte for byte, each as its splits and paths, in source order.

    `named(split, row)` is a picture's path in the source.
    """
    splits = list(facts)
    groups: dict[bytes, list[tuple[int, int]]] = {}
    heads = np.sort(np.concatenate([_head(part) for parts in facts.values() for part in parts]))
    again = np.unique(heads[1:][heads[1:] == heads[:-1]])  # few: only those are looked at one by one
    if not len(again):
        return
    for place, parts in enumerate(facts.values()):
        for part in parts:
            head = _head(part)
            candidates = part[again[np.searchsorted(again, head).clip(max=len(again) - 1)] == head]
            for row, digest in zip(candidates["row"].tolist(), candidates["digest"].tolist(), strict=True):
                groups.setdefault(digest, []).append((place, row))
    for group in sorted(sorted(group) for group in groups.values() if len(group) > 1):
        yield [{"split": splits[place], "path": named(splits[place], row)} for place, row in group]


def _head(part: Facts) -> npt.NDArray[np.uint64]:
    """The first eight bytes of every digest as a number."""
    return np.ascontiguousarray(part["digest"]).view(np.uint64)[::2].copy()


def counted(groups: list[list[dict[str, str]]]) -> dict[str, Any]:
    """How many groups of equal pictures there are: in all, and those that leak from one split into another."""
    leaks = [group for group in groups if len({entry["split"] for entry in group}) > 1]
    return {"groups": len(groups), "pictures": sum(map(len, groups)), "across_splits": len(leaks)}
