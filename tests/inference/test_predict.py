"""Activations of layers 6 and 7, against the network in PyTorch cut open by hand, from every kind of model file."""

from __future__ import annotations

import errno
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli.core.data import images
from alexnet_cli.core.data.views import make_views, mean_correction
from alexnet_cli.core.inference import onnx_graph
from alexnet_cli.core.inference.predict import open_classifier, predict
from alexnet_cli.core.inference.session import FeatureLayer, Session
from alexnet_cli.core.model import model_file
from alexnet_cli.core.model.network import network_from_model
from alexnet_cli.errors import PartialError, StorageError, UsageError, WeightsError
from alexnet_cli.recipe import CAFFE, PAPER, Recipe
from model_files import draw, random_model, save_model, save_onnx

SMALL = replace(PAPER, width=1 / 32)


def compute_by_hand(
    model: model_file.Model, image: str, layer: str, count: int
) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """fc6 or fc7 of each view, rectified and times the test-time factor, from torch's functions; then their mean."""
    crops = make_views(images.resize_and_crop(images.decode(Path(image).read_bytes())), model.recipe.input_size, count)
    inputs = crops.astype(np.float32)
    if model.recipe.mean == "image-at-crop":
        inputs = inputs + mean_correction(model.mean, model.recipe.input_size, count)
    low = (256 - model.recipe.input_size) // 2
    mean = model.mean[:, low : 256 - low, low : 256 - low][:, : inputs.shape[2], : inputs.shape[3]]
    network = network_from_model(model)
    keep = 1 if model.recipe.dropout_inverted else 1 - model.recipe.dropout
    inputs_of_fc7: list[torch.Tensor] = []
    network.fc6.register_forward_hook(lambda _m, _i, flat: inputs_of_fc7.append(flat))
    with torch.no_grad():
        network(torch.from_numpy(inputs - mean) / model.recipe.input_divisor)
        values = torch.relu(inputs_of_fc7[0]) * keep
        if layer == "fc7":
            values = torch.relu(torch.nn.functional.linear(values, network.fc7.weight, network.fc7.bias)) * keep
    return values.numpy().mean(0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("recipe", [SMALL, replace(CAFFE, width=1 / 32)])
@pytest.mark.parametrize(("layer", "count"), [("fc6", 1), ("fc7", 1), ("fc7", 10)])
def test_every_kind_of_file_gives_the_same(tmp_path: Path, recipe: Recipe, layer: FeatureLayer, count: int) -> None:
    path, model = draw(tmp_path / "a.png", 3), random_model(recipe)
    save_model(model, tmp_path / "m.safetensors")
    save_onnx(model, tmp_path / "m.onnx")
    expected = compute_by_hand(model, path, layer, count)
    assert (expected > 0).any()
    assert (expected == 0).any()  # or the nonlinearity is not in it
    for name, backend in (("m.onnx", "auto"), ("m.safetensors", "onnx"), ("m.safetensors", "torch")):
        classifier = open_classifier(tmp_path / name, backend, layer=layer)  # type: ignore[arg-type]
        [found] = predict([path], classifier, 3, count, activations=True)
        [plain] = predict([path], open_classifier(tmp_path / name, backend), 3, count)  # type: ignore[arg-type]
        assert found.activations is not None
        np.testing.assert_allclose(found.activations, expected, rtol=1e-4, atol=1e-4)
        assert [label.index for label in found.top] == [label.index for label in plain.top]
        assert plain.activations is None


def test_a_file_without_that_layer_says_so(tmp_path: Path) -> None:
    model = random_model(replace(PAPER, width=1 / 64))
    proto = onnx_graph.build_graph(model)
    for node in proto.graph.node:
        for names in (node.input, node.output):
            names[:] = [name.replace("fc7.relu", "fused") for name in names]
    onnx.save(proto, tmp_path / "fused.onnx")
    with pytest.raises(WeightsError, match="activations of fc7"):
        Session(tmp_path / "fused.onnx", layer="fc7")


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
    result = run(str(tmp_path / "album"), "-w", str(model_path), "--features", "fc7", "-o", str(out))
    assert isinstance(result.exception, PartialError)
    assert "07.png: it is not an image" in result.exception.what
    assert f"warn    skipped {tmp_path}/album/07.png: " in result.stderr
    assert f"saved   {out} · fc7 of 34 images" in result.stderr
    assert result.stdout == ""
    with np.load(out) as found:
        assert found["paths"].tolist() == [path for path in album if not path.endswith("07.png")]
        assert found["features"].shape == (34, 2 * 64)
        assert found["features"].dtype == np.float32
        assert (str(found["layer"]), str(found["weights"])) == ("fc7", str(model_path))
        records = [p for p in predict(album, Session(model_path)) if p.error is None]
        assert found["labels"].tolist() == [record.top[0].label for record in records]
        assert found["wnids"].tolist() == [record.top[0].wnid for record in records]
        assert found["indices"].tolist() == [record.top[0].index for record in records]
        np.testing.assert_allclose(found["probabilities"], [r.top[0].probability for r in records], atol=1e-5)
        expected = compute_by_hand(model_file.read_model(model_path), album[20], "fc7", 1)
        np.testing.assert_allclose(found["features"][19], expected, rtol=1e-4, atol=1e-4)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_file_is_called_what_it_is(tmp_path: Path, model_path: Path) -> None:
    image = draw(tmp_path / "a.png", 0)
    result = run(image, "-w", str(model_path), "--features", "fc7", "-o", str(tmp_path / "f.csv"))
    assert isinstance(result.exception, UsageError)
    assert result.exception.hint == "such as -o f.npz"


def test_a_full_disk_leaves_nothing(tmp_path: Path, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = draw(tmp_path / "a.png", 0)

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    result = run(path, "-w", str(model_path), "--features", "fc6", "-o", str(tmp_path / "f.npz"))
    assert isinstance(result.exception, StorageError)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.png", "model.safetensors"]
    assert isinstance(run(path, "--features", "fc6").exception, UsageError)
    assert isinstance(run(path, "-o", "x.npz").exception, UsageError)


@pytest.mark.parametrize("kind", ["onnx", "safetensors"])
def test_no_torch_is_imported(tmp_path: Path, model_path: Path, kind: str) -> None:
    path = draw(tmp_path / "a.png", 0)
    save_onnx(model_file.read_model(model_path), tmp_path / "model.onnx")
    words = f"[{path!r}], weights={str(tmp_path / f'model.{kind}')!r}, quiet=True"
    script = (
        "import sys\nfrom pathlib import Path\n"
        "from alexnet_plugins.predict import predict\n"
        f"predict({words}, features='fc6', output=Path({str(tmp_path)!r}, 'f.npz'))\n"
        f"predict({words})\n"
        "print([name for name in ('torch', 'torchvision') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
