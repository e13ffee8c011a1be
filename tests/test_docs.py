"""The documentation is true: its commands run, its files work, its options and links exist."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import foreign_files
import pytest
import typer
from documents import DOCUMENTS, ELSEWHERE, ROOT, blocks, fields_of_json, mentions, text_of

from alexnet_cli import cli, entry_points, recipe, recipe_io

SMALL = "--set width=0.03125 --set precision=fp32 --set batch_size=16 --epochs 1"  # a full one takes hours
INHERITED = ("--init-from", "--resume")  # have the width of other weights
ADDED = {"train": SMALL, "ablate": f"{SMALL} --seeds 1 --only tanh"}


def options(command: str) -> set[str]:
    """Every option of a command."""
    group = typer.main.get_command(cli.app)
    found = group.commands[command]  # type: ignore[attr-defined]
    return {opt for p in found.params for opt in (*p.opts, *p.secondary_opts) if opt.startswith("-")} | {"--help", "-h"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_that_is_mentioned_exists(document: str) -> None:
    own = {"balance", "hello"}  # commands of the examples
    for mention in mentions(text_of(document)):
        words = mention.partition(" #")[0].replace("|", " ").split()
        if words[1] in own:
            continue
        typed = {word.partition("=")[0].strip(",.") for word in words[2:] if re.match(r"-{1,2}[a-z]", word)}
        assert typed <= options(words[1]), mention


def test_the_json_of_every_command_is_described() -> None:
    group = typer.main.get_command(cli.app)
    ours = {entry.name for entry in entry_points.find_entries({}) if entry.is_builtin}
    assert set(fields_of_json()) == ours <= set(group.commands)  # type: ignore[attr-defined]


def test_the_columns_of_metrics_csv_are_those_in_the_table() -> None:
    from alexnet_cli.core.records import COLUMNS

    table = text_of("README.md").partition("| column of `metrics.csv` |")[2].partition("\n\n")[0]
    assert re.findall(r"`(\w+)`", "".join(re.findall(r"(?m)^\|([^|]+)\|", table))) == list(COLUMNS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text_of(document)):
        assert ((ROOT / document).parent / target).exists(), target


def test_the_table_of_the_paper_names_files_and_values_that_exist() -> None:
    from alexnet_plugins.ablate.study import SWITCHES

    text = text_of("docs/paper.md")
    for name in re.findall(r"`(core/\w+\.py)`", text):
        assert (ROOT / "alexnet_cli" / name).is_file(), name
    settings = [s for s in re.findall(r"`([a-z_0-9]+=[\w.-]+)`", text) if not s.startswith("ALEXNET")]
    assert len(settings) > 10
    for setting in settings:
        recipe_io.apply_changes(recipe.PAPER, recipe_io.parse_settings([setting]))
    for switch in SWITCHES[1:]:
        assert re.search(rf"(?m)^\| {switch.section} \|.*`{switch.name}`[^|]*\|$", text), switch.name
        for setting in switch.settings.replace("=0.0", "=0").split():
            assert f"`{setting}`" in text or setting.startswith("within_norm_2"), setting


def environment(folder: Path) -> dict[str, str]:
    """`alexnet` and `python` are those of this test, and so is what they import."""
    scripts = folder / ".scripts"
    scripts.mkdir(exist_ok=True)
    for name, words in (("alexnet", "-m alexnet_cli"), ("python", "")):
        script = scripts / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "MPLCONFIGDIR": str(scripts)}


def run(command: str, folder: Path, settings: dict[str, str] | None = None) -> str:
    """What a command of a document writes to stdout."""
    full = environment(folder) | (settings or {})
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=full, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def smaller(command: str) -> str:
    """The same on a network that a test has time for."""
    command = command.partition(" #")[0]
    word = command.split()[1] if command.startswith("alexnet ") else ""
    if any(option in command for option in INHERITED):
        return f"{command} --epochs 1"
    return f"{command} {ADDED[word]}" if word in ADDED else command


def follow(document: str, folder: Path) -> list[str]:
    """Do what a document says, in order. Returns the commands that were run."""
    done = []
    for block in blocks(text_of(document)):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        for command in block.commands:
            if not ELSEWHERE.search(command):
                run(smaller(command), folder)
                done.append(command)
    return done


@pytest.fixture
def home(pictures: Path, tmp_path: Path) -> Path:
    """A folder with what the documents take for granted: pictures, and another program's weights."""
    for name in ("my-pictures", "tiny-imagenet-10", "pets"):
        shutil.copytree(pictures, tmp_path / name)
    for name in ("pictures", "somewhere"):
        shutil.copytree(pictures / "val" / "red", tmp_path / name)
    shutil.copy(pictures / "val" / "blue" / "00.jpg", tmp_path / "cat.jpg")
    weights = foreign_files.caffemodel(foreign_files.tensors(classes=1000), 2, "relu-norm-pool")
    (tmp_path / "bvlc_alexnet.caffemodel").write_bytes(weights)
    return tmp_path


def install(document: str, folder: Path) -> dict[str, str]:
    """`pip install .` of the document's two files, into a folder of its own; what makes Python find it."""
    for block in blocks(text_of(document)):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
    site = folder / "site"
    words = "--quiet --no-deps --no-build-isolation --no-index --disable-pip-version-check --no-warn-conflicts"
    run(f'"{sys.executable}" -m pip install {words} --target "{site}" .', folder)
    paths = [str(site)] + ([os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else [])
    return {"PYTHONPATH": os.pathsep.join(paths)}


def test_the_command_of_ones_own(prepared: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    settings = install("docs/plugins.md", tmp_path)
    shutil.copytree(prepared, tmp_path / "prepared" / "colours")
    commands = [c for block in blocks(text_of("docs/plugins.md")) for c in block.commands if not c.startswith("pip")]
    said = {command: run(command, tmp_path, settings) for command in commands}
    assert said["alexnet balance"].split() == ["12", "blue", "12", "green", "12", "red", "12", "yellow"]
    counted = json.loads(said["alexnet balance --json -q"])
    assert counted["schema"] == "alexnet.balance/1"
    assert counted["images"] == dict.fromkeys(("blue", "green", "red", "yellow"), 12)
    assert "Count the training pictures" in said["alexnet balance --help"]
    assert re.search(r"balance +alexnet-balance +1.0 +ok", said["alexnet plugins"])
    assert "Counts the pictures of each class." in run("alexnet --help", tmp_path, settings)


def test_the_command_in_the_readme(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    settings = install("README.md", tmp_path)
    assert run("alexnet hello Ada --times 2", tmp_path, settings) == "Hello Ada\nHello Ada\n"


@pytest.mark.slow
def test_own_data(home: Path) -> None:
    done = follow("docs/own-data.md", home)
    assert len(done) >= 10
    said = run("python classify.py somewhere/*.jpg", home).splitlines()
    told = [json.loads(line) for line in run("alexnet predict somewhere -w mine --json -q", home).splitlines()]
    assert len(said) == len(told) == 5
    for line, record in zip(said, told, strict=True):
        path, *ranked = line.split("  ")
        assert path == record["path"]
        for word, label in zip(ranked, record["top"], strict=False):
            name, probability = word.rsplit(" ", 1)
            assert name == label["label"] or abs(float(probability) - label["probability"]) < 0.02
            assert float(probability) == pytest.approx(label["probability"], abs=0.02)


@pytest.mark.slow
def test_the_readme(home: Path) -> None:
    run("alexnet prepare pets", home)
    run(f"alexnet train --recipe fast --name imagenet {SMALL}", home)
    done = follow("README.md", home)
    assert {"alexnet evaluate", "alexnet export", "alexnet predict pictures"} <= set(done)
    for target in ("demo", "test"):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "document", [d for d in DOCUMENTS if d not in ("README.md", "docs/own-data.md", "docs/plugins.md")]
)
def test_the_other_pages(document: str, home: Path) -> None:
    run("alexnet prepare my-pictures", home)
    run(f"alexnet train --recipe tiny {SMALL}", home)
    follow(document, home)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_that_are_neither_typed_nor_saved_are_what_they_seem(document: str, tmp_path: Path) -> None:
    for block in blocks(text_of(document)):
        if block.language == "toml" and not block.file:
            (tmp_path / "own.toml").write_text(block.text, encoding="utf-8")
            recipe_io.load_recipe(str(tmp_path / "own.toml"))
        elif block.language == "bash":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        else:
            assert block.language in ("", "console") or block.file, block.text
