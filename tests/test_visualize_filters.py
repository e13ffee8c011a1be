"""`alexnet visualize-filters`: which towers, where the picture goes, what is said about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from model_files import random_model, save_model
from PIL import Image

from alexnet_cli.core import qualitative
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import PAPER
from alexnet_plugins.visualize_filters import _half_blocks, visualize_filters

SMALL = replace(PAPER, width=1 / 4)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run with a checkpoint of a random network, in the current folder."""
    monkeypatch.chdir(tmp_path)
    path = Path("runs/first")
    checkpoint = path / "checkpoints" / "best"
    checkpoint.mkdir(parents=True)
    (path / "run.json").write_text("{}")
    save_model(random_model(SMALL, info={"run": "first", "epoch": 0}), checkpoint / "model.safetensors")
    return path


def test_writes_both_towers_into_the_run_and_reports_them(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visualize_filters(weights="first", json=True)
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert result["schema"] == "alexnet.visualize-filters/1"
    assert (result["tower"], result["kernels"]) == ("both", 24)
    assert Path(result["path"]).resolve() == (run / "figures/conv1.png").resolve()
    assert set(result["chroma_fraction"]) == {"tower1", "tower2"}
    assert result["chroma_fraction"]["tower1"] == pytest.approx(2 / 3, abs=0.05)
    assert 0.5 <= result["auc"] <= 1
    assert 0 < result["p_value"] <= 1
    assert "look like noise" in err
    assert "epoch 0" in err
    with Image.open(result["path"]) as image:
        assert image.width >= 700


def test_one_tower_is_its_half_of_the_kernels_on_the_scale_of_all(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    visualize_filters(weights="first", tower="2", output=Path("new/two.png"), no_terminal=True)
    assert "tower 2 of 2 · 12 kernels" in capsys.readouterr().err
    weight = random_model(SMALL).tensors["conv1.weight"]
    expected = qualitative.grid(weight[12:], float(np.abs(weight).max()), 6)
    with Image.open("new/two.png") as image:
        pixels = np.asarray(image)
    zoom = pixels.shape[1] // expected.shape[1]
    assert (pixels[26 : 26 + zoom * len(expected) : zoom, ::zoom] == expected).all()


@pytest.mark.parametrize(
    ("towers", "tower", "said"),
    [
        (2, "3", "2 towers (1, 2)"),
        (2, "0", "2 towers (1, 2)"),
        (2, "blue", "2 towers"),
        (1, "2", "1 tower (1)"),
    ],
)
def test_a_tower_that_is_not_there_is_a_usage_error(towers: int, tower: str, said: str, tmp_path: Path) -> None:
    path = save_model(random_model(replace(SMALL, towers=towers)), tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match=f"--tower {tower}: this model has ") as caught:
        visualize_filters(weights=str(path), tower=tower)
    assert said in caught.value.what
    assert caught.value.exit_code == 2


def test_a_file_outside_a_run_is_drawn_into_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(random_model(replace(SMALL, towers=1)), tmp_path / "m.safetensors")
    visualize_filters(weights="m.safetensors", tower="1", json=True)
    result = json.loads(capsys.readouterr().out)
    assert (result["path"], result["auc"], result["p_value"]) == ("conv1.png", None, None)
    assert list(result["chroma_fraction"]) == ["tower1"]
    assert Path("conv1.png").is_file()


def test_half_blocks_carry_two_pixels_each() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    pixels[0] = 255
    text = _half_blocks(pixels)
    assert text.plain == ("▀" * 4 + "\n") * 3
    styles = [span.style for span in text.spans]
    for y in range(3):
        for x in range(4):
            upper, lower = pixels[2 * y, x], pixels[2 * y + 1, x] if y < 2 else pixels[0, x]
            expected = "#{:02x}{:02x}{:02x} on #{:02x}{:02x}{:02x}".format(*upper, *lower)
            assert str(styles[4 * y + x]) == expected
