"""The Python of the documentation runs: docs/python.md and the README, block by block."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import alexnet_cli as alexnet
from documents import DOCUMENTS, Block, find_blocks, read_document

PYTHON = [
    (document, number, block)
    for document in DOCUMENTS
    for number, block in enumerate(b for b in find_blocks(read_document(document)) if b.language == "python")
    if not block.file
]
SESSION = next(block for document, _, block in PYTHON if document == "docs/python.md")


@pytest.fixture(scope="module")
def home(pictures: Path, prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the names that the blocks use: images, a prepared data set, a small trained run."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(pictures / "val" / "red", folder / "pictures")
    shutil.copy(pictures / "val" / "blue" / "00.jpg", folder / "cat.jpg")
    shutil.copytree(pictures, folder / "tiny-imagenet-10")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.delenv("ALEXNET_RUNS_DIR", raising=False)
        data = alexnet.prepare("tiny-imagenet-10")
        recipe = replace(alexnet.recipes["tiny"], width=1 / 16, epochs=1, precision="fp32")
        assert [r.event for r in alexnet.train(recipe, data, name="ten-classes", gpus="none")][-1] == "end"
        yield folder


@pytest.mark.filterwarnings("ignore::UserWarning")  # Captum says what its hooks do
@pytest.mark.parametrize(("document", "number", "block"), PYTHON)
def test_a_block_runs(document: str, number: int, block: Block, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "captum" in block.text:
        deep_lift = pytest.importorskip("captum.attr._core.deep_lift", reason="Captum is not installed")
        monkeypatch.setattr(deep_lift, "SUPPORTED_NON_LINEAR", dict(deep_lift.SUPPORTED_NON_LINEAR))
    session: dict[str, Any] = {}
    if document == "docs/python.md":
        exec(SESSION.text, session)
    exec(block.text, session)
