"""Fixtures of the tests of prepared data sets."""

from __future__ import annotations

from pathlib import Path

import pytest

from alexnet_cli.core.data.prepare import pack
from shapes import CLASSES, gradient_jpeg, make_plan


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source of three classes, 30 training and 4 validation images each; two files are bad and one is damaged."""
    root = tmp_path_factory.mktemp("source") / "shapes"
    for split, count in (("train", 30), ("val", 4)):
        for label, name in enumerate(CLASSES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                path = root / split / name / f"{name} {i:02d}.jpg"
                path.write_bytes(gradient_jpeg(1000 * label + i + (500 if split == "val" else 0)))
    (root / "train" / "star" / "star 07.jpg").write_bytes(gradient_jpeg(1)[:-60])
    (root / "train" / "circle" / "circle 03.jpg").write_bytes(b"")
    (root / "train" / "circle" / "circle 04.jpg").write_bytes(gradient_jpeg(4)[:-60] + b"\xff\xd9")  # decodable in part
    return root


@pytest.fixture(scope="session")
def packed_shapes(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same source, prepared."""
    output = tmp_path_factory.mktemp("prepared") / "shapes"
    steps = list(pack(make_plan(shapes, output), workers=3))
    assert sum(step.images for step in steps) == 102
    assert sum(step.rejected for step in steps) == 2
    return output
