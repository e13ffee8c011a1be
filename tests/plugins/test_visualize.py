"""`alexnet visualize-filters`: towers, output files, measurements, errors."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from PIL import Image, ImageSequence

from alexnet_cli.core.analysis import filter_picture
from alexnet_cli.core.analysis.units import iterate_activations
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.inference.predict import open_classifier, predict
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError, UsageError, WeightsError
from alexnet_cli.recipe import PAPER
from alexnet_plugins.visualize.command import visualize_filters
from alexnet_plugins.visualize.filters import draw_half_blocks
from commands import alexnet
from model_files import draw, random_model, save_model

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
    out, err = capsys.readouterr()
    assert "tower 2 of 2 · 12 filters" in err
    assert "smooth 1, both towers) · 12 of 12 still noise: train longer · 0 dead" in out
    weight = random_model(SMALL).tensors["conv1.weight"]
    expected = filter_picture.draw_grid(weight[12:], np.full(12, np.abs(weight).max()), 6)
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
def test_an_unknown_tower_is_a_usage_error(towers: int, tower: str, said: str, tmp_path: Path) -> None:
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
    assert (result["path"], result["auc"], result["p_value"]) == ("conv1-m.png", None, None)
    assert list(result["chroma_fraction"]) == ["tower1"]
    assert Path("conv1-m.png").is_file()


def test_half_blocks_carry_two_pixels_each() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    pixels[0] = 255
    text = draw_half_blocks(pixels)
    assert text.plain == ("▀" * 4 + "\n") * 3
    styles = [span.style for span in text.spans]
    for y in range(3):
        for x in range(4):
            upper, lower = pixels[2 * y, x], pixels[2 * y + 1, x] if y < 2 else pixels[0, x]
            expected = "#{:02x}{:02x}{:02x} on #{:02x}{:02x}{:02x}".format(*upper, *lower)
            assert str(styles[4 * y + x]) == expected


def test_sorting_and_scaling_change_the_picture_and_say_so(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visualize_filters(weights="first", sort="chroma", scale="each", output=Path("f.png"), json=True)
    result = json.loads(capsys.readouterr().out)
    weight = random_model(SMALL).tensors["conv1.weight"][:12]
    chroma = result["kernel_chroma"]["tower1"]
    order = result["order"]["tower1"]
    assert [chroma[i] for i in order] == sorted(chroma, reverse=True)
    expected = filter_picture.draw_grid(weight[order], np.abs(weight[order]).max(axis=(1, 2, 3)), 6)
    with Image.open("f.png") as image:
        pixels = np.asarray(image)
    zoom = pixels.shape[1] // expected.shape[1]
    assert (pixels[26 : 26 + zoom * len(expected) : zoom, ::zoom] == expected).all()


def test_every_kernel_is_measured_for_programs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visualize_filters(weights="first", json=True)
    result = json.loads(capsys.readouterr().out)
    rows = result["kernel_statistics"]["tower2"]
    assert [row["chroma"] for row in rows] == result["kernel_chroma"]["tower2"]
    assert all(row["undertrained"] for row in rows)  # as random as they are
    assert result["towers"]["tower2"]["undertrained"] == len(rows) == 12
    low, high = result["auc_interval"]
    assert low <= 0.5 <= result["auc"] <= high


def test_the_suffix_asks_for_svg(run: Path) -> None:
    visualize_filters(weights="first", tower="1", output=Path("f.svg"), quiet=True, no_terminal=True)
    text = Path("f.svg").read_text(encoding="utf-8")
    assert text.startswith("<svg")
    assert "conv1, run first, epoch 0" in text


@pytest.mark.parametrize(("output", "kind"), [(None, "WEBP"), (Path("r.gif"), "GIF")])
def test_the_replay_shows_the_filters_of_each_epoch(
    run: Path, output: Path | None, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    last = random_model(SMALL).tensors["conv1.weight"]
    for epoch in range(4):
        Run(run).keep_filters(epoch, last * np.float32((1 + epoch) / 4))
    visualize_filters(weights="first", replay=True, tower="2", output=output, json=True)
    result = json.loads(capsys.readouterr().out)
    assert Path(result["path"]).name == ("r.gif" if output else "conv1-replay-tower2.webp")
    assert result["bytes"] == Path(result["path"]).stat().st_size
    assert [(frame["epoch"], frame["milliseconds"]) for frame in result["frames"]] == [
        (0, 500), (1, 500), (2, 500), (3, 3000)
    ]  # fmt: skip
    with Image.open(result["path"]) as image:
        assert image.format == kind
        frames = [np.asarray(frame.convert("RGB"), int) for frame in ImageSequence.Iterator(image)]
    assert len(frames) == 4
    pixels = frames[1][26:]
    expected = filter_picture.draw_grid(last[12:] * np.float32(0.5), np.full(12, np.abs(last).max()), 6)
    zoom = round(560 / expected.shape[1])
    shown = pixels[: zoom * len(expected), : zoom * expected.shape[1]][zoom // 2 :: zoom, zoom // 2 :: zoom]
    assert np.abs(shown - expected).mean() < (0.1 if kind == "WEBP" else 8)


def test_a_run_without_kept_filters_says_so(run: Path) -> None:
    Run(run).keep_filters(0, random_model(SMALL).tensors["conv1.weight"])
    with pytest.raises(DataError, match=r"first has no filters of its epochs to replay") as caught:
        visualize_filters(weights="first", replay=True)
    assert "train a new one" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"replay": True, "layer": "conv2"}, "--layer has no effect with --replay"),
        ({"replay": True, "picture": "x.jpg"}, "--replay has no effect with --picture"),
        ({"replay": True, "output": Path("f.png")}, "not a .webp or .gif file"),
        ({"unit": 3}, "--unit needs --layer"),
        ({"data": "x"}, "--data needs --layer"),
        ({"layer": "conv2", "sort": "chroma"}, "--sort has no effect with --layer"),
        ({"layer": "conv2", "output": Path("f.svg")}, "not a .png file"),
        ({"output": Path("f.gif")}, "not a .png or .svg file"),
        ({"layer": "conv2", "unit": 64}, "conv2 has units 0 to 63"),
        ({"layer": "conv2", "unit": 40, "tower": "1"}, "--unit 40 is in tower 2"),
    ],
)
def test_options_without_effect_are_refused(run: Path, options: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        visualize_filters(weights="first", **options)  # type: ignore[arg-type]
    assert said in caught.value.what


@pytest.mark.parametrize(("layer", "output"), [("conv4", "conv4"), ("fc6", "drop6")])
@pytest.mark.parametrize("towers", [1, 2])
def test_patches_of_a_unit_are_parts_of_the_pictures_that_excite_it_most(
    layer: Literal["conv4", "fc6"],
    output: str,
    towers: int,
    prepared: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = random_model(replace(SMALL, width=1 / 32, towers=towers))
    path, picture = save_model(model, tmp_path / "m.safetensors"), tmp_path / "p.png"
    visualize_filters(weights=str(path), layer=layer, unit=2, data=str(prepared), output=picture, json=True)
    result = json.loads(capsys.readouterr().out)
    [unit] = result["units"]
    split = open_dataset(prepared).split("val")
    found = iterate_activations(split, Session(model, layers=[output]))
    values = np.concatenate([values for _, values in found])[:, 2]
    best = values.reshape(20, -1).max(axis=1)
    assert [patch["row"] for patch in unit["patches"]] == np.argsort(-best, kind="stable")[:9].tolist()
    assert [patch["response"] for patch in unit["patches"]] == pytest.approx(np.sort(best)[::-1][:9].tolist())
    first = unit["patches"][0]
    assert first["key"] == split.key(first["row"])
    left, top, right, bottom = first["box"]
    assert 16 <= left < right <= 240
    assert 16 <= top < bottom <= 240
    with Image.open(picture) as image:
        assert image.width > 9 * 128
        assert image.height < 250


def test_a_page_shows_the_strongest_units_of_the_chosen_tower(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save_model(random_model(replace(SMALL, width=1 / 32)), tmp_path / "m.safetensors")
    visualize_filters(
        weights=str(path), layer="conv3", tower="2", data=str(prepared), output=tmp_path / "p.png", json=True
    )
    out, err = capsys.readouterr()
    units = json.loads(out)["units"]
    assert "conv3 · tower 2 of 2 · 6 of 12 units" in err
    assert len(units) == 6  # a tower of 192 / 32
    assert {unit["tower"] for unit in units} == {2}
    assert {unit["unit"] for unit in units} == set(range(6, 12))
    highest = [unit["patches"][0]["response"] for unit in units]
    assert highest == sorted(highest, reverse=True)
    visualize_filters(weights=str(path), layer="conv3", unit=7, data=str(prepared), output=tmp_path / "p.png")
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["unit", "activation"]
    assert line.split()[:2] == ["unit", "7"]
    assert line.index(f"{highest[[unit['unit'] for unit in units].index(7)]:.3g}") == heading.index("activation")


def test_nan_weights_are_an_error_and_draw_nothing(run: Path, recwarn: pytest.WarningsRecorder) -> None:
    model = random_model(SMALL)
    model.tensors["conv1.weight"][3, 0, 2] = np.nan
    path = save_model(model, run / "nan.safetensors")
    with pytest.raises(WeightsError, match=r"conv1\.weight has values that are NaN") as caught:
        visualize_filters(weights=str(path), output=Path("nan.png"))
    assert "earlier checkpoint" in caught.value.hint
    assert not Path("nan.png").exists()
    assert not recwarn.list


def test_a_layer_that_is_left_out_cannot_be_drawn(tmp_path: Path, prepared: Path) -> None:
    model = random_model(replace(SMALL, width=1 / 32, left_out_layers=("conv3",)))
    path = save_model(model, tmp_path / "m.safetensors")
    with pytest.raises(UsageError, match="the network has no layer 'conv3'"):
        visualize_filters(weights=str(path), layer="conv3", data=str(prepared))
    visualize_filters(weights=str(path), layer="conv4", data=str(prepared), output=tmp_path / "p.png")


def test_a_picture_is_followed_through_all_layers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = draw(Path("photos/owl.png"), 1)
    visualize_filters(weights="first", picture=picture, json=True)
    result = json.loads(capsys.readouterr().out)
    assert Path(result["path"]).resolve() == (run / "figures/photos-owl.png-layers.png").resolve()
    assert (result["picture"], result["tower"]) == (picture, "both")
    assert [(layer["layer"], layer["units"], layer["side"]) for layer in result["layers"]] == [
        ("conv1", 24, 55), ("conv2", 64, 27), ("conv3", 96, 13), ("conv4", 96, 13), ("conv5", 64, 13),
        ("fc6", 1024, None), ("fc7", 1024, None),
    ]  # fmt: skip
    [same] = predict([picture], open_classifier(run / "checkpoints/best/model.safetensors", "torch"))
    for answer, label in zip(result["top"], same.top, strict=True):
        assert (answer["rank"], answer["label"], answer["index"]) == (label.rank, label.label, label.index)
        assert answer["probability"] == pytest.approx(label.probability, abs=1e-4)
    with Image.open(result["path"]) as image:
        assert image.width == 1600
    visualize_filters(weights="first", picture=picture, tower="2", quiet=True)
    assert (run / "figures/photos-owl.png-layers-tower2.png").is_file()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [layer["layer"] for layer in result["layers"]] + ["class"] * 5
    best = result["layers"][4]["strongest"][1]
    assert lines[4].endswith(f"strongest: tower 2 unit {best['unit']} ({best['response']:.3g})")
    assert f"{100 * result['layers'][4]['active']:.0f} % active" in lines[4]


def test_a_picture_is_turned_as_those_of_the_training_were(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    draw(Path("upright.png"), 2, (256, 256))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    with Image.open("upright.png") as upright:
        upright.transpose(Image.Transpose.ROTATE_90).save("lying.png", exif=exif)
    tops = {}
    for turned in (False, True):
        save_model(random_model(replace(SMALL, width=1 / 32), info={"exif_rotate": turned}), tmp_path / "m.safetensors")
        for name in ("upright.png", "lying.png"):
            visualize_filters(weights="m.safetensors", picture=name, json=True)
            tops[turned, name] = json.loads(capsys.readouterr().out)["layers"]
    assert tops[True, "lying.png"] == tops[True, "upright.png"] == tops[False, "upright.png"]
    assert tops[False, "lying.png"] != tops[False, "upright.png"]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--picture", "none.jpg"], 3, "none.jpg does not exist"),
        (["--picture", "text.jpg"], 3, "text.jpg cannot be read"),
        (["--picture", "empty"], 3, "no image found: empty"),
        (["--picture", "photos"], 2, "--picture photos: 2 images"),
        (["--picture", "photos/*.png"], 2, "--picture photos/*.png: 2 images"),
        (["--picture", "photos/a.png", "photos/b.png"], 2, "photos/b.png"),
        (["--picture", "photos/a.png", "-o", "photos/a.png"], 2, "is the image itself"),
        (["--picture", "photos/a.png", "-o", "a.svg"], 2, "not a .png file"),
        (["--picture", "photos/a.png", "--tower", "3"], 2, "this model has 2 towers"),
        *(
            (["--picture", "photos/a.png", *option], 2, f"{option[0]} has no effect with --picture")
            for option in (
                ("--layer", "conv5"),
                ("--unit", "1"),
                ("--scale", "each"),
                ("--sort", "chroma"),
                ("--data", "x"),
            )
        ),
    ],
)
def test_errors_of_picture_are_two_lines(run: Path, words: list[str], code: int, said: str) -> None:
    for name in "ab":
        draw(Path(f"photos/{name}.png"), 3, (30, 20))
    Path("empty").mkdir()
    Path("text.jpg").write_text("no picture", encoding="utf-8")
    before = Path("photos/a.png").read_bytes()
    done = alexnet("visualize-filters", "-w", "first", *words)
    assert done.returncode == code
    error, hint = done.stderr.splitlines()[-2:]
    assert error.startswith("error:")
    assert said in error
    assert hint.startswith("hint:")
    assert Path("photos/a.png").read_bytes() == before
    assert not list(run.glob("figures/*"))


def test_no_figure_replaces_that_of_other_options(run: Path, prepared: Path) -> None:
    other = run / "checkpoints" / "00000004"
    shutil.copytree(run / "checkpoints" / "best", other)
    images = [draw(Path(name), number) for number, name in enumerate(("owl.png", "other/owl.png"))]
    drawn: list[dict[str, Any]] = [
        {}, {"tower": "1"}, {"sort": "chroma"}, {"scale": "each"},
        {"layer": "conv5", "unit": 3, "data": str(prepared)}, *({"picture": image} for image in images),
    ]  # fmt: skip
    for options in [*drawn, {"weights": str(other)}]:
        everything: dict[str, Any] = {"weights": "first", "quiet": True, **options}
        visualize_filters(**everything)
    assert len(list(run.glob("figures/*.png"))) == len(drawn) + 1
