"""Runs to be reported on, and a reader of pages that knows nothing of how they were written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from model_files import random_model, save_model
from PIL import Image
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli.core.plan import Plan
from alexnet_cli.core.prepare import pack
from alexnet_cli.core.runs import Run
from alexnet_cli.core.shards import Dataset, open_dataset
from alexnet_cli.core.sources import recognize
from alexnet_cli.recipe import PAPER

HOSTILE = ("<img src=x onerror=alert(1)>", "\"quoted\" & 'more' ‮gnp.exe", "a" * 120)
NAMES = (*HOSTILE, "red", "green", "blue")
RECIPE = replace(PAPER, width=1 / 32, schedule="fixed", drop_epochs=(2, 4), epochs=6, batch_size=8)
VOID = {"meta", "img", "br", "link"}


def hostile_data(folder: Path) -> Dataset:
    """Six classes, three of them with names that want to be more; 3 pictures each to train on, 2 to validate."""
    generator = np.random.default_rng(5)
    for split, count in (("train", 3), ("val", 2)):
        for name in NAMES:
            (folder / "source" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (9, 11, 3), np.uint8)
                image = Image.fromarray(pixels).resize((270, 260))
                image.save(folder / "source" / split / name / f"{i}.jpg")
    for _ in pack(Plan(recognize(folder / "source"), folder / "prepared", 95), workers=1):
        pass
    return open_dataset(folder / "prepared")


def make_run(root: Path, data: Dataset, name: str = "shown", epochs: int = 6, **about: Any) -> Run:
    """A run of so many epochs as `train` would have left it, with random weights; without epochs, without weights."""
    told = {
        "command": ["alexnet", "train", "--name", name], "started": "2026-01-02T03:04:05+0000",
        "versions": {"alexnet": "0.1.0"}, "devices": ["a CPU"], "placement": {"tower 1": "a CPU", "tower 2": "a CPU"},
        "precision": "fp32", "replicas": 1, "data": data.name, "data_path": str(data.path), "data_hash": data.hash,
        "seed": 0, "status": "finished",
    }  # fmt: skip
    run = Run.create(name, RECIPE, told | about, root)
    run.log({"event": "start", "epoch": 1, "step": 0, "steps_per_epoch": 20})
    for epoch in range(1, epochs + 1):
        rate, error = 0.01 / 10 ** sum(epoch > drop for drop in RECIPE.drop_epochs), 0.9 - 0.0714 * epoch
        values = {"loss": 2 / epoch, "lr": rate, "top1_error": error, "top5_error": error / 3}
        for step in (20 * epoch - 10, 20 * epoch):
            run.log({"event": "step", "epoch": epoch, "step": step, "images_per_second": 40.0, **values})
        towers = {"specialisation": 0.5 + epoch / 20, "chroma_tower1": 0.66 - epoch / 50, "chroma_tower2": 0.7}
        means = {"train_loss": 2.1 / epoch, "train_top1_error": error + 0.05, "images_per_second": 40.0}
        run.log({"event": "validation", "epoch": epoch, "step": 20 * epoch, **values, **means, **towers})
    run.write_csv()
    if epochs:
        folder = run.checkpoints / "best"
        folder.mkdir()
        model = replace(
            random_model(RECIPE, len(NAMES), info={"epoch": epochs, "step": 20 * epochs}), classes=data.classes
        )
        save_model(model, folder / "model.safetensors")
    return run


def report(*words: str) -> Result:
    """Run the command; its exception, if any, is in the result."""
    from alexnet_plugins.report import report as command

    app = Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def told(result: Result) -> dict[str, Any]:
    """What it said with --json."""
    assert result.exit_code == 0, (result.output, result.exception)
    said: dict[str, Any] = json.loads(result.stdout)
    return said


class Page(HTMLParser):
    """Tables by their captions, the text of everything, headings, pictures; and every tag must be closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[tuple[int, str]] = []
        self.images: list[Mapping[str, str | None]] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: set[str] = set()
        self.all_text = ""
        self._open: list[str] = []
        self._rows: list[list[str]] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.add(tag)
        self.ids |= {found["id"] or ""} if "id" in found else set()
        if tag == "img":
            self.images.append(found)
        elif tag == "a":
            self.links.append(found["href"] or "")
        elif tag == "tr":
            self._rows.append([])
        elif tag in {"td", "th"}:
            self._rows[-1].append("")
        elif tag in {"h1", "h2", "h3"}:
            self.headings.append((int(tag[1]), ""))
        elif tag == "caption":
            self._rows = []
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        if tag == "table":
            self.tables[self._caption] = self._rows

    def handle_data(self, data: str) -> None:
        self.all_text += data
        if "caption" in self._open:
            self._caption = data
        elif {"td", "th"} & set(self._open) and "about" not in self._open:
            self._rows[-1][-1] += data
        elif self._open and self._open[-1] in {"h1", "h2", "h3"}:
            self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)
