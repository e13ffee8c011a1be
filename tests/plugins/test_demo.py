"""`alexnet demo`: the images it draws, its folder, failures and the environment."""

from __future__ import annotations

import colorsys
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_cli.errors import AlexNetError, UsageError
from alexnet_plugins.demo import images
from alexnet_plugins.demo.command import CLASSIFIED, COMMANDS, MARKER, OUTPUTS, CommandRunner, _make_folder
from documents import fields_of_json


def pixels_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.jpg"))}


def test_the_set_is_the_same_whatever_its_size_and_the_number_of_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert images.draw_dataset(tmp_path / "a", 2, 1) == 36
    monkeypatch.setattr("os.cpu_count", lambda: 1)
    images.draw_dataset(tmp_path / "b", 1, 1)
    first, second = pixels_of(tmp_path / "a"), pixels_of(tmp_path / "b")
    assert len(first) == 36
    assert second.items() <= first.items()
    assert len(set(first.values())) == 36
    images.draw_dataset(tmp_path / "c", 1, 0, seed=1)
    assert set(pixels_of(tmp_path / "c").values()).isdisjoint(first.values())


def test_every_color_comes_with_every_shape() -> None:
    pairs = [name.split("-") for name in images.CLASSES]
    colors, shapes = {c for c, _ in pairs}, {s for _, s in pairs}
    assert len(images.CLASSES) >= 10
    assert len(set(images.CLASSES)) == len(colors) * len(shapes)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("disc", np.pi * 0.85**2),
        ("ring", np.pi * (0.96**2 - 0.52**2)),
        ("triangle", 3 * np.sqrt(3) / 4),  # of circumradius 1
        ("cross", 2 * 1.9 * 0.54 - 0.54**2),
    ],
)
def test_distance_fields_enclose_the_area_of_their_shape(shape: str, area: float) -> None:
    y, x = np.mgrid[-1.2:1.2:480j, -1.2:1.2:480j].astype(np.float32)
    inside = images._signed_distance(shape, x, y) < 0
    assert inside.mean() * 2.4**2 == pytest.approx(area, rel=0.01)
    assert (np.hypot(x, y)[inside] <= 1.0).all()


@pytest.mark.parametrize("name", images.CLASSES)
def test_images_have_their_color_in_the_center_square_and_nowhere_near_all_over(name: str) -> None:
    hue = images.HUES[name.split("-")[0]]
    for seed in range(3):
        image = images.draw_image(name, np.random.default_rng(seed))
        assert 160 <= min(image.size) <= max(image.size) <= 256
        hsv = np.asarray(image.convert("HSV")).astype(int)
        away = np.abs((hsv[..., 0] * 360 / 255 - hue + 180) % 360 - 180)
        rows, columns = np.nonzero((away < 30) & (hsv[..., 1] > 130))
        share = len(rows) / hsv[..., 0].size
        assert 0.02 < share < 0.5
        center = np.array(image.size[::-1]) / 2
        reach = np.abs(np.median([rows, columns], axis=1) - center)
        assert (reach < min(image.size) / 2).all()


def test_rgb_is_the_color_wheel() -> None:
    for hue, saturation, value in (
        (0, 1, 1),
        (40, 0.5, 0.7),
        (125, 0.9, 0.4),
        (228, 0.7, 1),
        (-20, 0.6, 0.6),
    ):
        expected = colorsys.hsv_to_rgb((hue / 360) % 1, saturation, value)
        assert images._hsv_to_rgb(hue, saturation, value) == pytest.approx(expected, abs=1e-6)


def test_the_classified_images_are_drawn() -> None:
    for name, number in (shown.split("/") for shown in CLASSIFIED):
        assert name in images.CLASSES
        assert 0 <= int(number.removesuffix(".jpg")) < 25


def test_the_commands_are_those_of_the_mission_and_the_report() -> None:
    names = ["prepare", "train", "evaluate", "predict", "visualize-filters", "export", "report"]
    assert [words[0] for words in COMMANDS] == names


def test_a_second_demo_replaces_only_what_the_first_made(tmp_path: Path) -> None:
    folder = _make_folder(tmp_path / "demo")
    for name in OUTPUTS:
        (folder / name / "inside").mkdir(parents=True)
    (folder / "mine.txt").write_text("keep")
    assert _make_folder(folder) == folder
    (folder / "runs" / "mine").mkdir()
    assert _make_folder(folder) == folder
    left = sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))
    assert left == [MARKER, "mine.txt", "prepared", "runs", "runs/mine"]


def test_links_are_removed_but_not_their_targets(tmp_path: Path) -> None:
    folder, data = _make_folder(tmp_path / "demo"), tmp_path / "data"
    data.mkdir()
    (data / "picture.jpg").write_text("keep")
    (folder / "pictures").symlink_to(data)
    _make_folder(folder)
    assert not (folder / "pictures").exists()
    assert (data / "picture.jpg").exists()


def test_a_folder_that_no_demo_made_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    with pytest.raises(UsageError, match="did not make it"):
        _make_folder(tmp_path)
    assert (tmp_path / "runs").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="is not a folder"):
        _make_folder(tmp_path / "file")


def test_a_command_that_fails_ends_the_demo_with_its_exit_code(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(AlexNetError, match="alexnet prepare nowhere") as caught:
        CommandRunner(tmp_path, json=True, quiet=False).run(("prepare", "nowhere"))
    assert caught.value.exit_code == 3
    out, err = capfd.readouterr()
    assert out == ""
    assert "error:" not in err, "the demo reports it, once"
    assert "nowhere does not exist" in caught.value.what


def test_a_stopped_training_has_a_hint_that_works_outside_the_folder(tmp_path: Path) -> None:
    left = tmp_path / "error.json"
    record = {"what": "stopped (Ctrl-C) at step 3", "hint": "alexnet train --resume demo", "code": 130}
    left.write_text(json.dumps({"alexnet": record}))
    error = CommandRunner(tmp_path, json=False, quiet=False)._read_error(("train",), 130, left)
    assert (error.exit_code, error.hint) == (130, f"cd {tmp_path} && alexnet train --resume demo")
    assert error.what == "the demo stopped in `alexnet train`: stopped (Ctrl-C) at step 3"
    error = CommandRunner(tmp_path, json=False, quiet=False)._read_error(("train",), -9, left)
    assert (error.exit_code, error.hint) == (137, f"run the command by itself: cd {tmp_path}")


def test_commands_run_in_the_folder_without_the_users_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path / "elsewhere"))
    with pytest.raises(AlexNetError) as caught:
        CommandRunner(tmp_path, json=False, quiet=False).run(("visualize-filters",))
    assert caught.value.exit_code == 3
    assert "there is no run in" in caught.value.what


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "alexnet_cli", "demo", "-o", "story", "--json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.pop("schema") == "alexnet.demo/1"
    assert [(set(result), set(result))] == fields_of_json()["demo"]
    assert result["top1_error"] < 0.10
    assert result["seconds"] < 240
    positions = [done.stderr.index(f"$ alexnet {words[0]}") for words in COMMANDS]
    assert positions == sorted(positions)
    for path in result["files"].values():
        assert (tmp_path / path).is_file()
    with Image.open(tmp_path / result["files"]["filters"]) as image:
        assert image.format == "PNG"
