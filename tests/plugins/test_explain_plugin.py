"""`alexnet explain`: what it prints, writes and refuses; and that the occlusion map needs no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli.core.analysis.explain import TILE, Explainer
from alexnet_cli.core.data.images import PixelBudget
from alexnet_cli.core.inference.inputs import load_image
from alexnet_cli.core.model.model_file import read_model
from alexnet_cli.errors import PartialError, UsageError
from alexnet_cli.recipe import PAPER
from model_files import draw, random_model, save_model


@pytest.fixture
def network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return save_model(random_model(replace(PAPER, width=1 / 32)), tmp_path / "net.safetensors")


def run(*words: str) -> Result:
    from alexnet_plugins.explain import explain

    app = Typer()
    app.command()(explain)
    return CliRunner().invoke(app, list(words))


def test_json_has_the_maps_of_the_whole_network_and_of_each_tower(network: Path) -> None:
    picture = draw(Path("p.png"), 1)
    result = run(picture, "-w", str(network), "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    image = load_image(picture, False, PixelBudget())
    assert not isinstance(image, str)
    expected = Explainer(read_model(network)).explain(image)
    assert (record["schema"], record["path"], record["method"]) == ("alexnet.explain/1", "p.png", "occlusion")
    assert (record["label"], record["wnid"], record["index"]) == (*expected.name, expected.index)
    assert record["centers"] == expected.centers.tolist()
    assert [part["without_tower"] for part in record["networks"]] == [None, 2, 1]
    for part, attribution in zip(record["networks"], expected.attributions, strict=True):
        np.testing.assert_allclose(part["map"], attribution.values, rtol=1e-4, atol=1e-6)
        row, column = np.unravel_index(np.argmax(part["map"]), attribution.values.shape)
        assert (part["peak"]["y"], part["peak"]["x"]) == (record["centers"][row], record["centers"][column])
        assert part["peak"]["value"] == pytest.approx(np.max(part["map"]), rel=1e-4)
        assert part["probability"] == pytest.approx(attribution.probability)
        assert len(part["top"]) == 5


def test_figures_of_different_options_have_different_names(network: Path) -> None:
    picture = draw(Path("p.png"), 1)
    for words in (
        [], ["--class", "3"], ["--class", "class 4"], ["--without-tower", "1"], ["--method", "gradcam"],
        ["--method", "layercam", "--class", "n00000003", "--without-tower", "2"],
    ):  # fmt: skip
        result = run(picture, "-w", str(network), *words)
        assert result.exit_code == 0, result.output
    assert {path.name for path in Path().glob("*.png")} == {
        "p.png", "p.png-occlusion-net.png", "p.png-occlusion-class3-net.png", "p.png-occlusion-class4-net.png",
        "p.png-occlusion-without1-net.png", "p.png-gradcam-net.png", "p.png-layercam-class3-without2-net.png",
    }  # fmt: skip


def test_several_images_share_a_sheet_or_have_a_page_each_in_a_folder(network: Path) -> None:
    pictures = [draw(Path(f"{folder}/p.png"), seed) for seed, folder in enumerate("ab")]
    result = run(*pictures, "-w", str(network), "-o", "sheet.png")
    assert result.exit_code == 0, result.output
    with Image.open("sheet.png") as sheet:
        assert 4 * TILE < sheet.width < 5 * TILE
        assert sheet.height > 2 * TILE
    assert [line.split(":")[0] for line in result.stdout.splitlines() if line[0] != " "] == pictures
    assert run(*pictures, "-w", str(network), "-o", "pages").exit_code == 0
    assert sorted(path.name for path in Path("pages").iterdir()) == [
        "a-p.png-occlusion-net.png", "b-p.png-occlusion-net.png"
    ]  # fmt: skip


def test_unreadable_images_are_reported_and_the_others_explained(network: Path) -> None:
    Path("no.jpg").write_bytes(b"nothing")
    result = run("no.jpg", draw(Path("p.png"), 1), "-w", str(network), "--json", "-o", "s.png")
    assert isinstance(result.exception, PartialError)
    assert "cannot read 1 of 2 images" in str(result.exception)
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [("error" in record, "networks" in record) for record in records] == [(True, False), (False, True)]
    assert Path("s.png").is_file()


def test_what_cannot_be_done_is_refused_before_anything_is_written(network: Path) -> None:
    picture = draw(Path("p.png"), 1)
    one = save_model(random_model(replace(PAPER, width=1 / 32, towers=1)), Path("one.safetensors"))
    for words, what in {
        ("-w", str(network), "-o", "s.jpg"): "not a .png file",
        ("-w", str(network), "-o", picture): "is one of the images",
        ("-w", str(network), "--class", "clas 3"): "no class 'clas 3'",
        ("-w", str(one), "--without-tower", "2"): "has a single tower",
    }.items():
        result = run(picture, *words)
        assert isinstance(result.exception, UsageError), result.output
        assert what in str(result.exception)
    assert sorted(path.name for path in Path().iterdir()) == ["net.safetensors", "one.safetensors", "p.png"]
    assert run(picture, "-w", str(one), "-o", "s.png").exit_code == 0


def test_the_occlusion_map_needs_no_torch(network: Path) -> None:
    picture = draw(Path("p.png"), 1)
    code = (
        "import sys; from pathlib import Path; from alexnet_plugins.explain import explain\n"
        f"explain([{picture!r}], weights={str(network)!r}, output=Path('s.png'))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True)
