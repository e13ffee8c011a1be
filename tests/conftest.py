"""What tests share: real pictures where they are at hand, and a small prepared set made from drawn ones."""

from __future__ import annotations

import os
import signal
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_cli.console import Reporter
from alexnet_cli.core.data.plan import Plan
from alexnet_cli.core.data.prepare import pack
from alexnet_cli.core.data.sources import detect_source
from documents import fields_of_json

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def _unpacked(archive: str, inside: str, into: Path) -> Path:
    if not (REAL / archive).is_file():
        pytest.skip(f"real pictures ({archive}) are not at hand")
    with tarfile.open(REAL / archive) as tar:
        tar.extractall(into, filter="data")
    return into / inside


os.environ["OMP_NUM_THREADS"] = "1"  # of what tests start: threads that spin for each other slow small tensors
torch.set_num_threads(1)  # and of this process, which has imported torch by now: sums are the same then, to the bit


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs from all tests but those that are marked for one: the others know what a CPU does, to the bit.

    A shell that starts the tests with `&` has them, and what they start, ignore Ctrl-C, which some of them are about.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 ImageNet pictures, one folder per class."""
    return _unpacked("imagenet-samples.tar", "imagenet-samples", tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="session")
def tiny10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten classes of Tiny ImageNet: train/WNID, val/WNID, words.txt."""
    return _unpacked("tiny-imagenet-10.tar.gz", "tiny-imagenet-10", tmp_path_factory.mktemp("tiny10"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests see none of the user's settings."""
    for name in ("ALEXNET_DATA", "ALEXNET_RUNS_DIR", "ALEXNET_PLUGINS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def own_runs_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Runs in a folder of their own; what `place` sets for the whole process is put back."""
    import torch

    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


JSON_FIELDS = fields_of_json()


@pytest.fixture(autouse=True)
def _json_is_as_documented(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test has a command say with --json has the fields that the README lists."""
    tell = Reporter.result

    def checked(self: Reporter, record: Mapping[str, Any]) -> None:
        kinds = JSON_FIELDS.get(self.command, [])
        if self.json and kinds:
            assert any(always <= set(record) <= all_ for always, all_ in kinds), (self.command, sorted(record))
        tell(self, record)

    monkeypatch.setattr(Reporter, "result", checked)


COLORS = {"blue": (40, 60, 200), "green": (50, 170, 60), "red": (200, 50, 40), "yellow": (220, 200, 60)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four classes told apart by color, as JPEGs in train/CLASS and val/CLASS: 12 and 5 of each, noisy."""
    folder, generator = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    for split, count in (("train", 12), ("val", 5)):
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                noise = generator.normal(0, 30, (90, 120, 3)) + generator.normal(0, 10)
                pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i:02}.jpg", quality=90)
    return folder


@pytest.fixture(scope="session")
def prepared(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, prepared."""
    output = tmp_path_factory.mktemp("prepared") / "colors"
    for _ in pack(Plan(detect_source(pictures), output, 95), workers=2):
        pass
    return output
