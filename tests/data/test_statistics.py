"""Statistics that come a shard at a time against numpy over everything at once."""

from __future__ import annotations

import io
from collections import defaultdict

import numpy as np
import pytest

from alexnet_cli.core.data.shard_writer import encode_npy_header
from alexnet_cli.core.data.shards import ROW
from alexnet_cli.core.data.statistics import IMAGE_FACT, MAX_SIDE, ImageFacts, SourceStats, find_duplicates


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
def test_statistics_by_shards_are_those_of_the_whole(counts: tuple[int, ...]) -> None:
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


@pytest.mark.parametrize("rows", [0, 1, 12_345])
def test_the_header_of_an_index_is_numpys(rows: int) -> None:
    index = np.random.default_rng(rows).integers(0, 1 << 31, rows).astype("<u4").astype(ROW)
    buffer = io.BytesIO()
    np.save(buffer, index)
    assert encode_npy_header(ROW, rows) + index.tobytes() == buffer.getvalue()
