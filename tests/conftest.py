"""What tests share: real pictures where they are at hand, and a small prepared set made from drawn ones."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def _unpacked(archive: str, inside: str, into: Path) -> Path:
    if not (REAL / archive).is_file():
        pytest.skip(f"real pictures ({archive}) are not at hand")
    with tarfile.open(REAL / archive) as tar:
        tar.extractall(into, filter="data")
    return into / inside


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 ImageNet pictures, one folder per class."""
    return _unpacked("imagenet-samples.tar", "imagenet-samples", tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="session")
def tiny10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of Tiny ImageNet: train/WNID, val/WNID, words.txt."""
    return _unpacked("tiny-imagenet-10.tar.gz", "tiny-imagenet-10", tmp_path_factory.mktemp("tiny10"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tests see none of the user's settings."""
    for name in ("ALEXNET_DATA", "ALEXNET_RUNS_DIR", "ALEXNET_PLUGINS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    yield
