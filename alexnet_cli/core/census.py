"""What people want to know of their pictures before training: source sizes, exact duplicates, leaks. No torch.

A fact is kept for every picture that was packed, 24 bytes each, so that 14 million of them fit in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
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


def sizes(facts: Mapping[str, Facts]) -> dict[str, dict[str, float]]:
    """Width and height of the source pictures of all splits: least, median and most, in pixels."""
    found = {}
    for side in ("width", "height"):
        values = np.concatenate([part[side] for part in facts.values()])
        found[side] = {"min": int(values.min()), "median": float(np.median(values)), "max": int(values.max())}
    return found


def duplicates(facts: Mapping[str, Facts], named: Callable[[str, int], str]) -> Iterator[list[dict[str, str]]]:
    """Groups of pictures whose files are equal byte for byte, each as its splits and paths, in source order.

    `named(split, row)` is a picture's path in the source.
    """
    splits = list(facts)
    owner = np.concatenate([np.full(len(facts[split]), i, np.uint8) for i, split in enumerate(splits)])
    rows = np.concatenate([facts[split]["row"] for split in splits])
    words = np.concatenate([facts[split]["digest"] for split in splits]).view("<u8").reshape(-1, 2)
    order = np.lexsort((words[:, 1], words[:, 0]))
    first = np.ones(len(order), bool)  # the first of each run of equal digests
    first[1:] = (words[order[1:]] != words[order[:-1]]).any(1)
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, len(order)))
    groups = [order[s : s + n] for s, n in zip(starts[lengths > 1], lengths[lengths > 1], strict=True)]
    in_order = [sorted(group.tolist(), key=lambda i: (owner[i], rows[i])) for group in groups]
    for group in sorted(in_order, key=lambda group: (owner[group[0]], rows[group[0]])):
        yield [{"split": splits[owner[i]], "path": named(splits[owner[i]], int(rows[i]))} for i in group]


def counted(groups: list[list[dict[str, str]]]) -> dict[str, Any]:
    """How many groups of equal pictures there are: in all, and those that leak from one split into another."""
    leaks = [group for group in groups if len({entry["split"] for entry in group}) > 1]
    return {"groups": len(groups), "pictures": sum(map(len, groups)), "across_splits": len(leaks)}
