"""Fixtures of all tests: real images if they are available, and a small prepared data set of drawn ones."""

from __future__ import annotations

import errno
import inspect
import os
import re
import shutil
import signal
import sys
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_cli.console import Reporter
from alexnet_cli.core.data.plan import Plan
from alexnet_cli.core.data.prepare import pack
from alexnet_cli.core.data.sources import detect_source
from documents import fields_of_json

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
REAL = Path(__file__).resolve().parents[2] / "shared" / "data"


def _unpack(archive: str, name: str, folder: Path) -> Path:
    """Unpack an archive of real images and return the folder `name` in it; skip the test without the archive."""
    if not (REAL / archive).is_file():
        pytest.skip(f"{archive} is not available")
    with tarfile.open(REAL / archive) as tar:
        tar.extractall(folder, filter="data")
    return folder / name


os.environ["OMP_NUM_THREADS"] = "1"  # of child processes: threads that wait for each other slow small tensors
torch.set_num_threads(1)  # of this process, so that sums are the same to the bit


def pytest_configure(config: pytest.Config) -> None:
    """Hide the GPUs unless -m asks for the mark `gpu`: all other tests expect a CPU's results to the bit.

    Undo that a shell lets background jobs ignore Ctrl-C, which some tests send.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not re.search(r"(?<!not )\bgpu\b", config.getoption("markexpr")):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


POSIX = re.compile(r"SIG[A-Z]{3}|send_signal|os\.(kill|pwrite|mkfifo|umask|readlink)|chmod|symlink|fcntl|\"bash\"")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip on Windows the tests whose source asks for signals, links, rights, named pipes or a POSIX shell."""
    if sys.platform == "win32":
        for item in items:
            if isinstance(item, pytest.Function) and POSIX.search(inspect.getsource(item.function)):
                item.add_marker(pytest.mark.skip(reason="Windows lacks what it asks for"))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Return a headless Chromium; skip the test without playwright or a browser."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser is installed: none of {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as tool:
        started = tool.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of 500 ImageNet images, one folder per class."""
    return _unpack("imagenet-samples.tar", "imagenet-samples", tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="session")
def tiny10(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return ten classes of Tiny ImageNet: train/WNID, val/WNID, words.txt."""
    return _unpack("tiny-imagenet-10.tar.gz", "tiny-imagenet-10", tmp_path_factory.mktemp("tiny10"))


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the user's environment variables."""
    for name in ("ALEXNET_DATA", "ALEXNET_RUNS_DIR", "ALEXNET_PLUGINS", "NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def own_runs_and_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put runs into the test's folder, and restore what `place` sets for the whole process."""
    import torch

    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "runs"))
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    yield
    matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before


JSON_FIELDS = fields_of_json()


@pytest.fixture(autouse=True)
def _check_documented_json(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that every JSON result of a test has the fields that docs/json.md lists."""
    original = Reporter.result

    def check(self: Reporter, record: Mapping[str, Any]) -> None:
        kinds = JSON_FIELDS.get(self.command, [])
        if self.json and kinds:
            assert any(always <= set(record) <= all_ for always, all_ in kinds), (self.command, sorted(record))
        original(self, record)

    monkeypatch.setattr(Reporter, "result", check)


@pytest.fixture(autouse=True)
def _restore_signal_handlers() -> Iterator[None]:
    """Undo what `cli.main` does to signals at its end: the process of the tests does not end with it."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(params=["links", "no links"])
def _any_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test on a disk with symbolic links, and as on exFAT or a Samba share."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    if request.param == "no links":
        monkeypatch.setattr(os, "symlink", refuse)


COLORS = {"blue": (40, 60, 200), "green": (50, 170, 60), "red": (200, 50, 40), "yellow": (220, 200, 60)}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of noisy JPEGs of four classes (colors), 12 in train/CLASS and 5 in val/CLASS."""
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
    """Return the same images as a prepared data set."""
    output = tmp_path_factory.mktemp("prepared") / "colors"
    for _ in pack(Plan(detect_source(pictures), output, 95), workers=2):
        pass
    return output
