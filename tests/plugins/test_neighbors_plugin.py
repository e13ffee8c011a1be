"""`alexnet neighbors`: what it prints, writes and keeps; and that it needs no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.inference.predict import open_classifier
from alexnet_cli.core.inference.predict import predict as classify
from alexnet_cli.errors import PartialError, UsageError
from alexnet_cli.recipe import PAPER
from model_files import draw, random_model, save_model, save_onnx


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_model(random_model(replace(PAPER, width=1 / 32)), tmp_path / "net.safetensors")


def run(*words: str) -> Result:
    from alexnet_plugins.neighbors import neighbors

    app = Typer()
    app.command()(neighbors)
    return CliRunner().invoke(app, list(words))


def test_neighbors_are_those_of_all_distances_and_the_picture_itself_comes_first(
    network: Path, prepared: Path, pictures: Path
) -> None:
    split = open_dataset(prepared).split("train")
    Path("own.jpg").write_bytes(bytes(split.jpeg(11)))
    other = draw(Path("other.png"), 4)
    result = run(
        "own.jpg", other, "-w", str(network), "--data", str(prepared), "-k", "4", "--json", "-o", "s/sheet.png"
    )
    assert result.exit_code == 0, result.output
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["schema"] == "alexnet.neighbors/1"
    assert first["neighbors"][0]["row"] == 11
    assert first["neighbors"][0]["distance"] < 0.01
    files = [Path(f"{row}.jpg") for row in range(len(split))]
    for row, file in enumerate(files):
        file.write_bytes(bytes(split.jpeg(row)))
    known = classify([*map(str, files), other], open_classifier(network, "onnx", layers=["drop7"]))
    *vectors, query = [prediction.activations["drop7"].astype(np.float64) for prediction in known]
    distances = np.linalg.norm(np.array(vectors) - query, axis=1)
    for found, row in zip(second["neighbors"], np.argsort(distances)[:4], strict=True):
        assert (found["row"], found["key"]) == (row, split.key(int(row)))
        assert found["distance"] == pytest.approx(distances[row], rel=0.01)
        assert found["index"] == split.labels[row]
        folder, _, stem = found["source"].partition("/")
        assert (folder, f"{found['key'][:8]}_{stem}") == (found["label"], found["key"])
        assert len(list(pictures.glob(f"train/{folder}/{stem}.*"))) == 1
    with Image.open("s/sheet.png") as sheet:
        assert sheet.width > 5 * 128
        top = np.asarray(sheet)[20:148, 6:134].astype(int)
        expected = np.asarray(Image.open("own.jpg").resize((128, 128), Image.Resampling.LANCZOS))
        assert np.abs(top - expected).max() <= 1  # the picture itself stands first
    assert Path("net.neighbors/fc7.npy").is_file()


def test_the_index_is_computed_once_and_again_for_other_weights(network: Path, prepared: Path) -> None:
    picture = draw(Path("p.png"), 1)
    words = (picture, "-w", str(network), "--data", str(prepared))
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[0] == picture
    assert result.stdout.splitlines()[1].split() == ["rank", "distance", "class", "image"]
    assert "48/48 img" in result.stderr
    assert "net.neighbors · 48 x 128 float32" in result.stderr
    assert Path("p.png-6-neighbors-colors-net.png").is_file()
    assert run(*words, "-k", "2").exit_code == 0
    assert run(draw(Path("q.png"), 2), *words[1:]).exit_code == 0
    assert len(list(Path().glob("*-neighbors-*.png"))) == 3, "one for each image and k"
    again = run(*words)
    assert "48/48" not in again.stderr
    assert again.stdout == result.stdout
    save_model(random_model(replace(PAPER, width=1 / 32), seed=1), network)
    assert "48/48" in run(*words).stderr


def test_an_older_checkpoint_and_another_data_set_leave_the_run_its_own_index(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "r"
    for step in (1, 2):
        (folder / "checkpoints" / f"{step:08}").mkdir(parents=True)
        model = random_model(replace(PAPER, width=1 / 32), seed=step)
        save_model(model, folder / "checkpoints" / f"{step:08}" / "model.safetensors")
    (folder / "checkpoints" / "best").symlink_to("00000002")
    (folder / "checkpoints" / "last").symlink_to("00000001")
    (folder / "run.json").write_text(json.dumps({"data_hash": open_dataset(prepared).hash}))
    other = shutil.copytree(prepared, tmp_path / "other")
    (other / "dataset.json").write_text((prepared / "dataset.json").read_text() + "\n")
    picture = draw(Path("p.png"), 1)

    def asked(weights: str, data: Path = prepared) -> str:
        result = run(picture, "-w", weights, "--data", str(data))
        assert result.exit_code == 0, result.output
        index = next(line for line in result.stderr.splitlines() if line.startswith("index ") and "float32" in line)
        return Path(index.split()[1]).name + " made" * ("48/48" in result.stderr)

    assert asked("r") == "neighbors made"
    assert asked("runs/r/checkpoints/last") == "neighbors-00000001 made"
    assert asked("r", other) == "neighbors-other made"
    assert asked("runs/r/checkpoints/last", other) == "neighbors-00000001-other made"
    export = folder / "alexnet-int8.onnx"
    save_onnx(random_model(replace(PAPER, width=1 / 32), seed=3), export)
    assert asked(str(export)) == "neighbors-alexnet-int8 made"
    assert asked("r") == "neighbors"
    assert asked("runs/r/checkpoints/00000001") == "neighbors-00000001"


def test_unreadable_images_are_reported_and_the_others_searched(network: Path, prepared: Path) -> None:
    Path("no.jpg").write_bytes(b"nothing")
    result = run("no.jpg", draw(Path("p.png"), 1), "-w", str(network), "--data", str(prepared), "--json")
    assert isinstance(result.exception, PartialError)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [("error" in record, "neighbors" in record) for record in records] == [(True, False), (False, True)]
    assert len(records[1]["neighbors"]) == 6


def test_a_sheet_is_a_png(network: Path, prepared: Path) -> None:
    for name in ("s.jpg", "s.svg", "s"):
        result = run(draw(Path("p.png"), 1), "-w", str(network), "--data", str(prepared), "-o", name)
        assert isinstance(result.exception, UsageError)
        assert not Path(name).exists()


def test_it_needs_no_torch(network: Path, prepared: Path) -> None:
    picture = draw(Path("p.png"), 1)
    code = (
        "import sys; from pathlib import Path; from alexnet_plugins.neighbors import neighbors\n"
        f"neighbors([{picture!r}], weights={str(network)!r}, data={str(prepared)!r}, output=Path('s.png'))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
