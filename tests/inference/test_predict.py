"""Activations of layers against a literal pass in numpy, from every kind of model file, and the files they go to."""

from __future__ import annotations

import errno
import io
import json
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from safetensors import safe_open
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli.core.data import images
from alexnet_cli.core.data.views import make_views, mean_correction
from alexnet_cli.core.inference import onnx_graph
from alexnet_cli.core.inference import predict as predicting
from alexnet_cli.core.inference.predict import Label, Prediction, open_classifier, predict, write_features
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model import model_file
from alexnet_cli.core.model.architecture import layer_names
from alexnet_cli.errors import PartialError, StorageError, UsageError, WeightsError
from alexnet_cli.options import complete_layers
from alexnet_cli.recipe import CAFFE, PAPER, Recipe
from literal_network import forward_layers
from model_files import draw, random_model, save_model, save_onnx

SMALL = replace(PAPER, width=1 / 32)


def compute_literally(model: model_file.Model, image: str, count: int) -> dict[str, np.ndarray]:
    """Every layer, averaged over the views, by the literal pass in numpy."""
    crops = make_views(images.resize_and_crop(images.decode(Path(image).read_bytes())), model.recipe.input_size, count)
    inputs: Any = crops
    if model.recipe.mean == "image-at-crop":
        inputs = crops + mean_correction(model.mean, model.recipe.input_size, count)
    views = [forward_layers(model, crop) for crop in inputs]
    return {layer: np.mean([view[layer] for view in views], axis=0) for layer in views[0]}


@pytest.mark.parametrize("recipe", [SMALL, replace(CAFFE, width=1 / 32), replace(SMALL, dropout=0.0)])
@pytest.mark.parametrize("count", [1, 10])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, recipe: Recipe, count: int) -> None:
    path, model = draw(tmp_path / "a.png", 3), random_model(recipe)
    save_model(model, tmp_path / "m.safetensors")
    save_onnx(model, tmp_path / "m.onnx")
    layers = ["fc8", "norm1", "conv3", *layer_names(recipe)[-6:-1]]
    expected = compute_literally(model, path, count)
    for name, backend in (("m.onnx", "auto"), ("m.safetensors", "onnx"), ("m.safetensors", "torch")):
        classifier = open_classifier(tmp_path / name, backend, layers=layers)  # type: ignore[arg-type]
        [found] = predict([path], classifier, 3, count)
        [plain] = predict([path], open_classifier(tmp_path / name, backend), 3, count)  # type: ignore[arg-type]
        assert list(found.activations) == layers
        for layer in layers:
            tolerance = 1e-4 * np.abs(expected[layer]).max()
            np.testing.assert_allclose(found.activations[layer], expected[layer], rtol=1e-3, atol=tolerance)
        assert [label.index for label in found.top] == [label.index for label in plain.top]
        assert not plain.activations


def test_a_file_without_that_layer_says_so(tmp_path: Path) -> None:
    model = random_model(replace(PAPER, width=1 / 64))
    proto = onnx_graph.build_graph(model)
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("relu7", "fc7.relu") for name in names]  # as in files of version 0.1.0
    onnx.save(proto, tmp_path / "old.onnx")
    for layer in ("relu7", "drop7"):
        with pytest.raises(WeightsError, match=f"activations of {layer}"):
            Session(tmp_path / "old.onnx", layers=["fc7", layer])


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    return save_model(random_model(SMALL), tmp_path / "model.safetensors")


def run(*words: str) -> Result:
    from alexnet_plugins.predict import predict as command

    app = Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def test_the_command_writes_what_numpy_reads(tmp_path: Path, model_path: Path) -> None:
    album = [draw(tmp_path / "album" / f"{i:02}.png", i) for i in range(35)]
    (tmp_path / "album" / "07.png").write_bytes(b"broken")
    out = tmp_path / "f.npz"
    result = run(str(tmp_path / "album"), "-w", str(model_path), "--features", "conv3,fc7", "-o", str(out))
    assert isinstance(result.exception, PartialError)
    assert "07.png: it is not an image" in result.exception.what
    assert f"warn    skipped {tmp_path}/album/07.png: " in result.stderr
    assert f"saved   {out} · conv3, fc7 of 34 images" in result.stderr
    assert result.stdout == ""
    with np.load(out) as found:
        assert found["paths"].tolist() == [path for path in album if not path.endswith("07.png")]
        assert (found["conv3"].shape, found["fc7"].shape) == ((34, 12, 13, 13), (34, 2 * 64))
        assert found["conv3"].dtype == found["fc7"].dtype == np.float32
        assert str(found["weights"]) == str(model_path)
        assert "tower" not in found
        records = [p for p in predict(album, Session(model_path)) if p.error is None]
        assert found["labels"].tolist() == [record.top[0].label for record in records]
        assert found["wnids"].tolist() == [record.top[0].wnid for record in records]
        assert found["indices"].tolist() == [record.top[0].index for record in records]
        np.testing.assert_allclose(found["probabilities"], [r.top[0].probability for r in records], atol=1e-5)
        expected = compute_literally(model_file.read_model(model_path), album[20], 1)
        for layer in ("conv3", "fc7"):
            np.testing.assert_allclose(found[layer][19], expected[layer], rtol=1e-3, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_both_formats_hold_the_same_and_a_tower_is_half_of_it(tmp_path: Path, model_path: Path) -> None:
    draw(tmp_path / "album" / "名 1.png", 1)
    draw(tmp_path / "album" / "b.png", 2)
    words = (str(tmp_path / "album"), "-w", str(model_path), "--views", "10", "-q")
    layers, file = ("pool5", "relu6"), str(tmp_path / "f.safetensors")
    for tower in ("1", "2"):
        for path in (file, str(tmp_path / f"{tower}.npz")):
            result = run(*words, "--features", "pool5", "--features", "relu6", "--tower", tower, "-o", path)
            assert result.exit_code == 0, result.output
        with np.load(tmp_path / f"{tower}.npz") as found, safe_open(file, "numpy") as same:
            arrays = {name: found[name] for name in found}
            metadata = {name: json.loads(text) for name, text in same.metadata().items()}
            for name in (*layers, "indices", "probabilities"):
                np.testing.assert_array_equal(same.get_tensor(name), arrays[name])
                assert same.get_tensor(name).dtype == arrays[name].dtype
            assert set(same.keys()) == {*layers, "indices", "probabilities"}
        assert metadata["paths"] == arrays["paths"].tolist()
        assert [metadata["classes"][i] for i in arrays["indices"]] == arrays["labels"].tolist()
        assert [metadata["wnids"][i] for i in arrays["indices"]] == arrays["wnids"].tolist()
        assert (metadata["tower"], metadata["weights"]) == (int(tower), str(model_path))
        assert (int(arrays["tower"]), str(arrays["weights"])) == (int(tower), str(model_path))
    assert run(*words, "--features", "pool5, relu6", "-o", str(tmp_path / "both.npz")).exit_code == 0
    first, second, both = (np.load(tmp_path / f"{name}.npz") for name in ("1", "2", "both"))
    with first, second, both:
        for layer in layers:
            np.testing.assert_array_equal(np.concatenate([first[layer], second[layer]], 1), both[layer])


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, model_path: Path, suffix: str) -> None:
    out, classifier = tmp_path / f"f.{suffix}", Session(model_path, layers=["conv1", "norm1"])
    top = (Label(1, "cat", None, 0, 0.5),)
    tracemalloc.start()
    try:
        with write_features(out, classifier) as add:
            for i in range(48):
                maps = np.full((96, 55, 55), i, np.float32)
                add(Prediction(f"{i}.jpg", top, activations={"conv1": maps, "norm1": maps}))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert out.stat().st_size > 48 * 2 * 96 * 55 * 55 * 4  # 111 MB
    assert peak < 2**23


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (("--features", "fc7", "-o", "f.csv"), "-o f.csv does not end in .npz or .safetensors", "such as -o f.npz"),
        (("--features", "fc7"), "--features and -o only work together", "such as --features"),
        (("-o", "x.npz"), "--features and -o only work together", "such as --features"),
        (("--tower", "1"), "--tower needs --features", "such as --features relu7 --tower 1"),
        (("--features", "fc7,cnov3", "-o", "f.npz"), "no layer 'cnov3'", "did you mean conv3? layers: conv1 relu1"),
        (("--features", "fc7", "--tower", "3", "-o", "f.npz"), "no tower 3", "towers: 1 2"),
        (("--features", "fc8", "--tower", "1", "-o", "f.npz"), "fc8 has no towers", "read fc8 without"),
    ],
)
@pytest.mark.parametrize("backend", ["onnx", "torch"])
def test_what_cannot_be_written_is_said_before_the_first_image(
    tmp_path: Path, model_path: Path, backend: str, words: tuple[str, ...], what: str, hint: str
) -> None:
    image = draw(tmp_path / "a.png", 0)
    result = run(image, "-w", str(model_path), "--backend", backend, *words)
    assert isinstance(result.exception, UsageError)
    assert what in result.exception.what
    assert result.exception.hint.startswith(hint)


def test_paths_that_fit_no_header_are_refused_before_the_first_image(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (draw(tmp_path / "a.png", 0), "-w", str(model_path), "--features", "fc7")
    monkeypatch.setattr(predicting, "MAX_PATH_BYTES", 10)
    result = run(*words, "-o", str(tmp_path / "f.safetensors"))
    assert isinstance(result.exception, UsageError)
    assert "the paths of 1 images do not fit" in result.exception.what
    assert run(*words, "-o", str(tmp_path / "f.npz")).exit_code == 0


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
@pytest.mark.parametrize("place", ["in its temporary file", "in the file itself"])
def test_a_full_disk_leaves_nothing(
    tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, place: str
) -> None:
    path = draw(tmp_path / "a.png", 0)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(io.BytesIO):
        write = full  # type: ignore[assignment]

    if place == "in its temporary file":
        make = tempfile.TemporaryFile
        monkeypatch.setattr(tempfile, "TemporaryFile", lambda dir=None: Full() if dir else make())
    else:
        monkeypatch.setattr(shutil, "copyfileobj", full)
    result = run(path, "-w", str(model_path), "--features", "fc6", "-o", str(tmp_path / f"f.{suffix}"))
    assert isinstance(result.exception, StorageError)
    assert f"f.{suffix}: No space left on device" in result.exception.what
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "model.safetensors"]


def test_layers_are_completed_behind_the_last_comma() -> None:
    assert complete_layers("pool") == ["pool1", "pool2", "pool5"]
    assert complete_layers("conv3,within") == ["conv3,within_norm2"]


@pytest.mark.parametrize("kind", ["onnx", "safetensors"])
def test_no_torch_is_imported(tmp_path: Path, model_path: Path, kind: str) -> None:
    path = draw(tmp_path / "a.png", 0)
    save_onnx(model_file.read_model(model_path), tmp_path / "model.onnx")
    words = f"[{path!r}], weights={str(tmp_path / f'model.{kind}')!r}, quiet=True"
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from alexnet_plugins.predict import predict\n"
        f"predict({words}, features=['fc6'], output=Path({str(tmp_path)!r}, 'f.npz'))\n"
        f"predict({words})\n"
        "print([name for name in ('torch', 'torchvision') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
