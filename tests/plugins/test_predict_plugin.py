"""Images to labels: which files count as images, order, views, bad files, and the three outputs of `predict`."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli.core.data import images
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.views import make_views, mean_correction
from alexnet_cli.core.devices import Gpu
from alexnet_cli.core.inference import torch_session
from alexnet_cli.core.inference.inputs import expand_inputs
from alexnet_cli.core.inference.predict import Prediction, open_classifier, predict, rank_labels
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.inference.torch_session import TorchSession
from alexnet_cli.core.model import model_file
from alexnet_cli.errors import AlexNetError, DataError, PartialError, UsageError
from alexnet_cli.recipe import CAFFE, PAPER, TINY, Recipe
from model_files import draw, random_model, save_model, save_onnx

SMALL = replace(PAPER, width=1 / 16)


@pytest.fixture
def album(tmp_path: Path) -> Path:
    """Four images in three folders, a broken one, and two files that are no images."""
    root = tmp_path / "album"
    for seed, name in enumerate(("b.png", "a.JPG", "below/c.webp", "below/deep/d.bmp")):
        draw(root / name, seed)
    (root / "broken.jpeg").write_bytes((root / "a.JPG").read_bytes()[:200])
    (root / "notes.txt").write_text("not an image")
    (root / ".hidden.png").write_bytes((root / "b.png").read_bytes())
    return root


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return save_model(random_model(SMALL), tmp_path / "model.safetensors")


def crops_of(path: str, side: int, count: int) -> npt.NDArray[np.uint8]:
    return make_views(images.resize_and_crop(images.decode(Path(path).read_bytes())), side, count)


def test_folders_patterns_lists_and_files_become_paths(album: Path) -> None:
    below = [f"{album}/below/c.webp", f"{album}/below/deep/d.bmp"]
    whole = [f"{album}/a.JPG", f"{album}/b.png", *below, f"{album}/broken.jpeg"]
    assert expand_inputs([str(album)]) == whole
    assert expand_inputs([f"{album}/*.png"]) == [f"{album}/b.png"]
    assert expand_inputs([f"{album}/**/*.bmp"]) == [f"{album}/below/deep/d.bmp"]
    assert expand_inputs(["-", whole[0]], io.BytesIO(f"{whole[1]}\n\n{album}/below\r\n".encode())) == [
        whole[1],
        *below,
        whole[0],
    ]
    assert expand_inputs([f"{album}/notes.txt"]) == [f"{album}/notes.txt"]  # named, so it is tried
    assert expand_inputs([whole[0], "missing.jpg"]) == [whole[0], "missing.jpg"]


def test_a_file_named_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    odd = draw(tmp_path / "cat[1].png", 0)
    draw(tmp_path / "cat1.png", 1)
    assert expand_inputs([odd]) == [odd]


@pytest.mark.parametrize("inputs", [["missing.jpg"], ["no*such*"], ["-"]])
def test_nothing_at_all_is_an_error(inputs: list[str]) -> None:
    with pytest.raises(DataError, match=r"does not exist|matches no file|standard input is empty"):
        expand_inputs(inputs)


def test_views_are_the_papers(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, columns = np.mgrid[0:256, 0:256]
    image = np.stack([rows, columns, rows ^ columns], 2).astype(np.uint8)
    center = make_views(image, 224, 1)
    assert center.shape == (1, 3, 224, 224)
    assert (center[0, 0, 0, 0], center[0, 1, 0, 0]) == (16, 16)
    assert make_views(image, 227, 1)[0, 0, 0, 0] == 14  # (256 - 227) / 2, rounded down
    ten = make_views(image, 224, 10)
    corners = [(0, 0), (0, 32), (32, 0), (32, 32), (16, 16)]
    assert [(view[0, 0, 0], view[1, 0, 0]) for view in ten[:5]] == corners
    assert [(view[0, 0, 223], view[1, 0, 223]) for view in ten[5:]] == corners
    np.testing.assert_array_equal(ten[5:, :, :, ::-1], ten[:5])


def test_views_equal_those_of_evaluation() -> None:
    import torch

    from alexnet_cli.core.data.augment import Augment

    model = random_model(replace(CAFFE, width=1 / 64))
    image = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    pixels = Augment(model.recipe, model.mean, None, None, torch.device("cpu"))
    expected = torch.cat(list(pixels.ten_views(torch.from_numpy(image[None])))).numpy()
    low = (256 - 227) // 2
    center = model.mean[:, low : low + 227, low : low + 227]
    actual = make_views(image, 227, 10) + mean_correction(model.mean, 227, 10) - center
    np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_torch_reports_why_it_is_not_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_session, "list_gpus", lambda: [Gpu(0, "K80", 12 << 30, "3.7")])
    monkeypatch.setattr(torch_session, "try_gpu", lambda index: "CUDA error: no kernel image is available")
    found = TorchSession(random_model(SMALL))
    assert (found.device, found.fallback_reason) == ("cpu", "CUDA error: no kernel image is available")


@pytest.mark.parametrize("recipe", [SMALL, replace(CAFFE, width=1 / 16)])
@pytest.mark.parametrize("count", [1, 10])
def test_probabilities_are_averaged_over_views(tmp_path: Path, recipe: Recipe, count: int) -> None:
    """Against PyTorch, one view at a time, with the mean that belongs to each view."""
    path = draw(tmp_path / "a.png", 3)
    model = random_model(recipe)
    save_model(model, tmp_path / "m.safetensors")
    save_onnx(model, tmp_path / "m.onnx")
    twin = TorchSession(model, "cpu")
    crops: npt.NDArray[np.float32] = crops_of(path, recipe.input_size, count).astype(np.float32)
    if recipe.mean == "image-at-crop":
        crops = crops + mean_correction(model.mean, recipe.input_size, count)
    expected = np.mean([twin.probabilities(crop[None])[0] for crop in crops], 0)
    for name, backend in (("m.onnx", "auto"), ("m.safetensors", "onnx"), ("m.safetensors", "torch")):
        classifier = open_classifier(tmp_path / name, backend)  # type: ignore[arg-type]
        [prediction] = predict([path], classifier, 10, count)
        found = {label.index: label.probability for label in prediction.top}
        np.testing.assert_allclose([found[i] for i in range(10)], expected, atol=1e-5)


def test_labels_are_ranked_and_ties_keep_class_order() -> None:
    classes = [ClassName("a", "n1"), ClassName("b"), ClassName("c"), ClassName("d")]
    top = rank_labels(np.array([0.2, 0.3, 0.3, 0.2], np.float32), classes, 3)
    assert [(x.rank, x.label, x.wnid, x.index) for x in top] == [
        (1, "b", None, 1),
        (2, "c", None, 2),
        (3, "a", "n1", 0),
    ]
    assert len(rank_labels(np.array([1.0], np.float32), classes[:1], 5)) == 1


def test_many_images_keep_their_order_and_bad_ones_their_place(tmp_path: Path) -> None:
    """More than two batches, with bad files between: every record equals that of the image alone."""
    session = Session(random_model(replace(PAPER, width=1 / 64)), provider="cpu")
    kinds = [draw(tmp_path / f"{seed}.png", seed, (260, 256)) for seed in range(4)]
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n")
    alone = {path: next(predict([path], session)) for path in kinds}
    paths = [str(bad) if i % 9 == 4 else str(tmp_path / "gone.png") if i % 9 == 8 else kinds[i % 4] for i in range(75)]
    found = list(predict(paths, session))
    assert [p.path for p in found] == paths
    for prediction in found:
        if prediction.path in alone:
            assert [x.index for x in prediction.top] == [x.index for x in alone[prediction.path].top]
            assert prediction.top[0].probability == pytest.approx(alone[prediction.path].top[0].probability, abs=1e-5)
        else:
            assert prediction.error
            assert prediction.top == ()
    assert "No such file" in next(p for p in found if p.path.endswith("gone.png")).error  # type: ignore[operator]


def test_only_bad_images_never_reach_the_network(tmp_path: Path) -> None:
    session = Session(random_model(replace(PAPER, width=1 / 64)), provider="cpu")
    (tmp_path / "empty").mkdir()
    [prediction] = predict([str(tmp_path / "empty")], session)
    assert prediction == Prediction(str(tmp_path / "empty"), error="the folder has no readable image")


def test_an_abandoned_stream_ends(tmp_path: Path) -> None:
    """`alexnet predict - --json | head -1`: nothing waits for images that nobody wants."""
    session = Session(random_model(replace(PAPER, width=1 / 64)), provider="cpu")
    path = draw(tmp_path / "a.png", 0)
    endless = iter(lambda: path, None)
    records = predict(endless, session)
    assert next(records).path == path
    records.close()


def test_torch_cannot_run_an_onnx_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="torch"):
        open_classifier(tmp_path / "a.onnx", "torch")


def run(*words: str, stdin: str = "") -> Result:
    from alexnet_plugins.predict import predict as command

    app = Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words), input=stdin)


def test_command_gives_json_lines_and_goes_on_after_a_bad_image(album: Path, model_path: Path) -> None:
    result = run(str(album), "-w", str(model_path), "--json", "-q", "-k", "3")
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [Path(r["path"]).name for r in records] == ["a.JPG", "b.png", "c.webp", "d.bmp", "broken.jpeg"]
    assert all(r["schema"] == "alexnet.predict/1" for r in records)
    assert set(records[4]) == {"schema", "path", "error"}
    for record in records[:4]:
        assert [x["rank"] for x in record["top"]] == [1, 2, 3]
        assert set(record["top"][0]) == {"rank", "label", "wnid", "index", "probability"}
        assert record["top"][0]["label"] == f"class {record['top'][0]['index']}"
    assert isinstance(result.exception, PartialError)
    assert result.exception.exit_code == 5
    assert result.exception.what == f"cannot read 1 of 5 images: {records[4]['path']}: {records[4]['error']}"


def test_command_reads_paths_from_stdin_and_writes_csv(album: Path, model_path: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    result = run(
        "-",
        "-w",
        str(model_path),
        "--csv",
        str(out),
        "-k",
        "2",
        stdin=f"{album}/b.png\n{album}/broken.jpeg\n",
    )
    assert isinstance(result.exception, PartialError)
    assert result.stdout == ""  # the CSV file is the result
    rows = list(csv.DictReader(io.StringIO(out.read_text(encoding="utf-8"))))
    assert [(Path(r["path"]).name, r["rank"], bool(r["error"])) for r in rows] == [
        ("b.png", "1", False),
        ("b.png", "2", False),
        ("broken.jpeg", "", True),
    ]
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"]) > 0


def test_command_says_that_its_run_has_not_finished(album: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    model = save_model(random_model(SMALL), tmp_path / "run" / "model.safetensors")
    for status, said in (("finished", False), ("interrupted", True)):
        (tmp_path / "run" / "run.json").write_text(json.dumps({"status": status}))
        (tmp_path / "run" / "recipe.toml").write_text(SMALL.to_toml())
        result = run(f"{album}/b.png", "-w", str(model))
        assert ("note    the run has not finished: epoch 0 of 90 so far" in result.stderr) == said


def test_a_run_that_was_not_named_is_said_even_if_quiet(
    album: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = Path("runs/mine/checkpoints/last")
    checkpoint.mkdir(parents=True)
    Path("runs/mine/run.json").write_text("{}", encoding="utf-8")
    Path("runs/latest").symlink_to("mine")
    save_model(random_model(TINY), checkpoint / "model.safetensors")
    image = draw(Path("owl.png"), 2)
    chosen, named = run(image, "-q", "--json"), run(image, "-q", "--json", "-w", "mine")
    assert chosen.stderr == "weights runs/mine/checkpoints/last/model.safetensors\n"
    assert (named.stderr, named.stdout) == ("", chosen.stdout)


def test_command_shows_a_table_with_names_and_bars(album: Path, model_path: Path) -> None:
    result = run(f"{album}/b.png", "-w", str(model_path))
    assert result.exception is None
    assert result.stdout.count("class ") == 5
    assert "█" in result.stdout


def test_command_says_where_a_csv_cannot_go(album: Path, model_path: Path) -> None:
    result = run(f"{album}/b.png", "-w", str(model_path), "--csv", f"{album}/no folder/x.csv")
    assert isinstance(result.exception, AlexNetError)
    assert result.exception.exit_code == 7


def test_predicting_imports_no_torch(album: Path, model_path: Path) -> None:
    script = (
        "import sys\n"
        "from alexnet_plugins.predict import predict\n"
        f"predict([{str(album / 'b.png')!r}], weights={str(model_path)!r}, quiet=True)\n"
        "print([name for name in ('torch', 'torchvision') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""


def test_images_are_rotated_for_a_network_trained_on_rotated_ones(tmp_path: Path) -> None:
    """A phone's image that lies on its side is answered like the same one upright, by every backend and format."""
    image = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    lying, upright = tmp_path / "lying.png", tmp_path / "upright.png"
    Image.fromarray(image).save(lying, exif=exif)
    Image.fromarray(np.rot90(image, -1)).save(upright)
    paths = [str(lying), str(upright)]
    for turned in (True, False):
        model = random_model(replace(TINY, width=1 / 16), info={"exif_rotate": turned})
        file = save_model(model, tmp_path / "model.safetensors")
        save_onnx(model_file.read_model(file), tmp_path / "model.onnx")
        for classifier in (Session(file), Session(tmp_path / "model.onnx"), TorchSession(file)):
            one, other = (p.top[0].probability for p in predict(paths, classifier))
            assert (abs(one - other) < 1e-6) is turned
