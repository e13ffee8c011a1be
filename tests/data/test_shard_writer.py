"""Shards and their sidecars: the headers are tarfile's and numpy's."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest

from alexnet_cli.core.data.prepare import pack
from alexnet_cli.core.data.shard_writer import encode_npy_header, encode_tar_header
from alexnet_cli.core.data.shards import ROW
from shapes import make_plan, read_tree


@pytest.mark.parametrize(("name", "size"), [("00000001_a-b.jpg", 33_333), ("x" * 73 + ".cls", 3), ("a.jpg", 8**11 - 1)])
def test_tar_header_equals_tarfile(name: str, size: int) -> None:
    expected = tarfile.TarInfo(name)
    expected.size = size
    assert encode_tar_header(name, size) == expected.tobuf(tarfile.USTAR_FORMAT)


@pytest.mark.parametrize("rows", [0, 1, 12_345])
def test_npy_header_equals_numpy(rows: int) -> None:
    index = np.random.default_rng(rows).integers(0, 1 << 31, rows).astype("<u4").astype(ROW)
    buffer = io.BytesIO()
    np.save(buffer, index)
    assert encode_npy_header(ROW, rows) + index.tobytes() == buffer.getvalue()


def test_a_damaged_sidecar_costs_only_its_shard(shapes: Path, packed_shapes: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    running = pack(make_plan(shapes, output), 2)
    for _ in range(6):
        next(running)
    running.close()
    sidecar = output / ".partial" / "train-000001.npz"
    sidecar.write_bytes(sidecar.read_bytes()[:1000])
    rest = list(pack(make_plan(shapes, output), 2))
    assert [step.images for step in rest if step.kept] == [20]
    assert read_tree(output) == read_tree(packed_shapes)
