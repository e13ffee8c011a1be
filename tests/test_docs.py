"""The documentation is true: its commands run, its files work, its options, links and tables match the code."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

import weights_files
from alexnet_cli import cli, entry_points, errors, recipe, recipe_io
from alexnet_cli.core import signals
from documents import (
    CODE,
    DOCUMENTS,
    NOT_RUN,
    ROOT,
    fields_of_json,
    find_anchors,
    find_blocks,
    find_code,
    find_mentions,
    find_path,
    find_table,
    read_document,
)
from model_files import random_model, save_model

SMALL = "--set width=0.03125 --set precision=fp32 --set batch_size=16 --epochs 1"  # a full one takes hours
WITH_WEIGHTS = ("--init-from", "--resume")  # the width is that of other weights
ADDED_OPTIONS = {"train": SMALL, "ablate": f"{SMALL} --seeds 1 --only tanh"}
INTERNAL = {"ALEXNET_LAUNCHER", "ALEXNET_DEMO"}  # set by one command for another
BRITISH = (
    r"colour|grey|centre|favour|behaviour|neighbour|licence|(?:normal|special|initial|recogn|optim)is(?:e|ing|ation)"
)


def find_options(command: str) -> set[str]:
    """Return every option of a command."""
    group = typer.main.get_command(cli.app)
    parameters = group.commands[command].params  # type: ignore[attr-defined]
    return {o for p in parameters for o in (*p.opts, *p.secondary_opts) if o.startswith("-")} | {"--help", "-h"}


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_and_option_that_is_mentioned_exists(document: str) -> None:
    for mention in find_mentions(read_document(document)):
        words = mention.partition(" #")[0].replace("|", " ").split()
        if words[1] == "balance":  # the example of docs/plugins.md
            continue
        typed = {word.partition("=")[0].strip(",.") for word in words[2:] if re.match(r"-{1,2}[a-z]", word)}
        assert typed <= find_options(words[1]), mention


def test_the_json_of_every_command_is_described() -> None:
    group = typer.main.get_command(cli.app)
    ours = {entry.name for entry in entry_points.find_entries({}) if entry.is_builtin}
    assert set(fields_of_json()) == ours <= set(group.commands)  # type: ignore[attr-defined]


def test_the_columns_of_metrics_csv_are_those_in_the_table() -> None:
    from alexnet_cli.core.runs.records import CSV_COLUMNS

    cells = [row[0] for row in find_table("column of `metrics.csv`")]
    assert re.findall(r"`(\w+)`", " ".join(cells)) == list(CSV_COLUMNS)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document: str) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", read_document(document)):
        path = ((ROOT / document).parent / target).resolve() if target else ROOT / document
        assert path.exists(), target
        assert not anchor or anchor in find_anchors(path.read_text(encoding="utf-8")), f"{target}#{anchor}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_of_the_code_exist(document: str) -> None:
    names = re.findall(r"`((?:alexnet_cli|core|plugins|alexnet_plugins|tests)/[\w./-]+)`", read_document(document))
    for name in names:
        assert find_path(name).exists(), name


def test_the_names_in_the_table_of_subjects_are_in_their_files() -> None:
    rows = find_table("subject | file")
    for subject, files, names in rows:
        text = "".join(find_path(name).read_text(encoding="utf-8") for name in find_code(files))
        assert [name for name in find_code(names) if not re.search(rf"\b{name}\b", text)] == [], subject
    assert len(rows) > 20


def test_modules_for_plugins_have_the_names_in_the_table() -> None:
    for _, names in find_table("to | use"):
        for name in find_code(names):
            if name.count(".") == 2 and "(" not in name:
                module, _, attribute = name.rpartition(".")
                assert hasattr(importlib.import_module(f"alexnet_cli.core.{module}"), attribute), name


def test_every_exit_code_and_environment_variable_is_described() -> None:
    codes = {0, 1, errors.Terminated.exit_code, *signals.EXIT_CODES.values()}
    codes |= {kind.exit_code for kind in vars(errors).values() if hasattr(kind, "exit_code")}
    described = " ".join(row[0] for row in find_table("code | meaning"))
    assert sorted(int(code) for code in described.replace(",", "").split()) == sorted(codes)
    source = "".join(path.read_text(encoding="utf-8") for top in CODE for path in top.rglob("*.py"))
    variables = set(re.findall(r"\bALEXNET_[A-Z_]+\b", source)) - INTERNAL
    assert variables <= {name for row in find_table("variable | meaning") for name in find_code(row[0])}


@pytest.mark.parametrize("document", [*DOCUMENTS, "CHANGELOG.md"])
def test_the_spelling_is_american(document: str) -> None:
    text = read_document(document).replace("`no-colour-shift`", "")  # the changelog names what was renamed
    assert not re.findall(BRITISH, text, re.I)


def test_the_table_of_the_paper_names_settings_and_switches_that_exist() -> None:
    from alexnet_plugins.experiments.study import SWITCHES

    text = read_document("docs/paper.md")
    settings = [s for s in re.findall(r"`([a-z_0-9]+=[\w.-]+)`", text) if not s.startswith("ALEXNET")]
    assert len(settings) > 10
    for setting in settings:
        recipe_io.apply_changes(recipe.PAPER, recipe_io.parse_settings([setting]))
    for switch in SWITCHES[1:]:
        assert re.search(rf"(?m)^\| {switch.section} \|.*`{switch.name}`[^|]*\|$", text), switch.name
        for setting in switch.settings.replace("=0.0", "=0").split():
            assert f"`{setting}`" in text or setting.startswith("within_norm_2"), setting


def test_the_table_of_layers_counts_the_parameters_of_the_network() -> None:
    import torch

    from alexnet_cli.core.model.network import Network

    with torch.device("meta"):
        tensors = Network(recipe.PAPER, 1000).state_dict()
    counted = {}
    for row in find_table("layer | filters (both towers)"):
        counted[row[0]] = int(row[-1].replace(",", ""))
        assert int(row[1].replace(",", "")) == tensors[f"{row[0]}.bias"].numel()
    assert counted == {name: sum(t.numel() for k, t in tensors.items() if k.startswith(f"{name}.")) for name in counted}
    assert len(counted) == 8
    assert f"{sum(counted.values()):,} parameters for 1000 classes" in read_document("docs/paper.md")


@pytest.mark.parametrize("name", ["paper", "fast", "tiny", "caffe"])
def test_the_network_in_plain_pytorch(name: str, tmp_path: Path) -> None:
    import torch

    from alexnet_cli.core.inference.torch_session import TorchSession

    model = random_model(replace(recipe.RECIPES[name], width=1 / 16, precision="fp32"), 7)
    if name != "caffe":  # activations at which alpha counts
        model = replace(model, recipe=replace(model.recipe, lrn_alpha=0.01))
    path = save_model(model, tmp_path / "model.safetensors")
    (block,) = [b for b in find_blocks(read_document("docs/pretrained.md")) if b.file == "rebuild.py"]
    assert sum(map(bool, block.text.split("\n"))) <= 25
    program: dict[str, Any] = {}
    exec(block.text, program)
    side = model.recipe.input_size
    crops = np.random.default_rng(3).integers(0, 256, (2, 3, side, side), np.uint8)
    expected = TorchSession(path, device="cpu").logits(crops)
    assert np.ptp(expected) > 0.3
    logits = program["logits"](path, torch.from_numpy(crops).float())
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-4)


def environment(folder: Path) -> dict[str, str]:
    """Return an environment in which `alexnet` and `python` are those of this test, and so is what they import."""
    scripts = folder / ".scripts"
    scripts.mkdir(exist_ok=True)
    for name, words in (("alexnet", "-m alexnet_cli"), ("python", "")):
        script = scripts / name
        script.write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n', encoding="utf-8")
        script.chmod(0o755)
    return os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "MPLCONFIGDIR": str(scripts)}


def run(command: str, folder: Path, settings: dict[str, str] | None = None) -> str:
    """Run a command of a document, which must succeed, and return its stdout."""
    variables = environment(folder) | (settings or {})
    result = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=variables, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def make_small(command: str) -> str:
    """Return the same command on a network that a test has time for."""
    command = command.partition(" #")[0]
    word = command.split()[1] if command.startswith("alexnet ") else ""
    if any(option in command for option in WITH_WEIGHTS):
        return f"{command} --epochs 1"
    return f"{command} {ADDED_OPTIONS[word]}" if word in ADDED_OPTIONS else command


def follow(document: str, folder: Path) -> list[str]:
    """Do what a document says, in order. Return the commands that were run."""
    done = []
    for block in find_blocks(read_document(document)):
        if block.file:
            (folder / block.file).write_text(block.text, encoding="utf-8")
        for command in block.commands:
            if not NOT_RUN.search(command):
                run(make_small(command), folder)
                done.append(command)
    return done


@pytest.fixture
def home(pictures: Path, tmp_path: Path) -> Path:
    """A folder with what the documents take for granted: images, and weights of another program."""
    for name in ("my-pictures", "tiny-imagenet-10", "pets"):
        shutil.copytree(pictures, tmp_path / name)
    for name in ("pictures", "somewhere"):
        shutil.copytree(pictures / "val" / "red", tmp_path / name)
    shutil.copy(pictures / "val" / "blue" / "00.jpg", tmp_path / "cat.jpg")
    weights = weights_files.zoo_model(weights_files.tensors(classes=1000))
    (tmp_path / "bvlcalexnet-12.onnx").write_bytes(weights.SerializeToString())
    return tmp_path


def install(document: str, folder: Path) -> dict[str, str]:
    """Run `pip install .` on the files of the document; return the variables that let Python find the package."""
    for block in find_blocks(read_document(document)):
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
    shutil.copytree(prepared, tmp_path / "prepared" / "colors")
    commands = [c for block in find_blocks(read_document("docs/plugins.md")) for c in block.commands]
    output = {command: run(command, tmp_path, settings) for command in commands if not NOT_RUN.search(command)}
    assert output["alexnet balance"].split() == ["12", "blue", "12", "green", "12", "red", "12", "yellow"]
    counted = json.loads(output["alexnet balance --json -q"])
    assert counted["schema"] == "alexnet.balance/1"
    assert counted["images"] == dict.fromkeys(("blue", "green", "red", "yellow"), 12)
    assert "Count the training images" in output["alexnet balance --help"]
    assert re.search(r"balance +alexnet-balance +1.0 +ok", output["alexnet plugins"])
    assert "Counts the images of each class." in run("alexnet --help", tmp_path, settings)


@pytest.mark.slow
def test_own_data(home: Path) -> None:
    done = follow("docs/own-data.md", home)
    assert len(done) >= 10
    drawing = Image.new("RGBA", (90, 80))  # transparent where nothing is drawn
    drawing.paste("black", (20, 20, 70, 60))
    drawing.save(home / "somewhere" / "drawing.jpg", "PNG")
    lines = run("python classify.py somewhere/*.jpg", home).splitlines()
    records = [json.loads(line) for line in run("alexnet predict somewhere -w mine --json -q", home).splitlines()]
    assert len(lines) == len(records) == 6
    for line, record in zip(lines, records, strict=True):
        path, *ranked = line.split("  ")
        assert path == record["path"]
        for word, label in zip(ranked, record["top"], strict=False):
            name, probability = word.rsplit(" ", 1)
            assert name == label["label"] or abs(float(probability) - label["probability"]) < 0.02
            assert float(probability) == pytest.approx(label["probability"], abs=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d not in ("docs/own-data.md", "docs/plugins.md")])
def test_the_commands_of_a_page_run(document: str, home: Path) -> None:
    run("alexnet prepare pets", home)
    run(f"alexnet train --recipe fast --name imagenet {SMALL}", home)
    run("alexnet prepare my-pictures", home)
    run(f"alexnet train --recipe tiny {SMALL}", home)
    follow(document, home)


@pytest.mark.slow
def test_the_notebook_runs_top_to_bottom(tmp_path: Path) -> None:
    """Drawn images are learned within its six epochs, and it writes what it says."""
    for module in ("nbconvert", "ipykernel", "matplotlib"):
        pytest.importorskip(module)
    shutil.copy(ROOT / "docs" / "alexnet.ipynb", tmp_path)
    run(f'"{sys.executable}" -m nbconvert --to notebook --execute --inplace alexnet.ipynb', tmp_path)
    cells = json.loads((tmp_path / "alexnet.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "".join(line for cell in cells for output in cell.get("outputs", []) for line in output.get("text", []))
    assert "epoch 6: validation error 0.0%" in text
    assert sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", [])) == 5
    assert (tmp_path / "stripes.onnx").stat().st_size > 10_000_000


def test_the_notebook_holds_no_outputs_and_installs_from_a_clone() -> None:
    notebook = json.loads((ROOT / "docs" / "alexnet.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert "%pip install" in "".join(code[0]["source"])


def test_make_has_the_targets_of_the_readme() -> None:
    for target in re.findall(r"(?m)^\$ make (\w+)", read_document("README.md")):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, check=False).returncode == 0


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_that_are_neither_typed_nor_saved_are_what_they_seem(document: str, tmp_path: Path) -> None:
    for block in find_blocks(read_document(document)):
        if block.language == "toml" and not block.file:
            (tmp_path / "own.toml").write_text(block.text, encoding="utf-8")
            recipe_io.load_recipe(str(tmp_path / "own.toml"))
        elif block.language == "python" and not block.file:
            pass  # test_docs_python.py runs it
        elif block.language == "bash":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        else:
            assert block.language in ("", "console") or block.file, block.text
