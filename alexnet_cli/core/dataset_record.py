"""What a prepared set's dataset.json says, checked before it is believed. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

LARGEST = 1e6  # of a number about colours, which are 0..255


def check(record: dict[str, Any]) -> None:
    """Raise ValueError or KeyError where a record is not made as ours are: its files lie in its own folder."""
    for name in checksums(record):
        if not isinstance(name, str) or name in {"", ".", ".."} or Path(name).name != name:
            raise ValueError(f"{name!r} is no name of a file in this folder")
    if not isinstance(record["image"], dict):
        raise ValueError("image is no mapping")
    for split in record["splits"].values():
        counts = [split["images"], *(shard["bytes"] for shard in split["shards"])]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError(f"{counts[0]!r} images in shards of {counts[1:4]} bytes")


def numbers(record: dict[str, Any], key: str, *shape: int) -> npt.NDArray[np.float32]:
    """Float32 numbers of that shape. Raises ValueError or TypeError for anything else."""
    found = np.array(record[key], np.float64).reshape(shape)
    if not (np.abs(found) < LARGEST).all():
        raise ValueError(f"{key} is {record[key]!r}")
    return found.astype(np.float32)


def checksums(record: dict[str, Any]) -> dict[str, str]:
    """The recorded sha256 of every file of a data set but dataset.json, by file name."""
    shards = {s["file"]: s["sha256"] for split in record["splits"].values() for s in split["shards"]}
    others: dict[str, str] = record["files"]
    return shards | others
