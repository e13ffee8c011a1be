"""The plain form of the network: equal to the fast one, and to what `alexnet predict` computes."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from torch.nn import functional

from alexnet_cli.core.data import images
from alexnet_cli.core.inference.predict import compute_probabilities
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model import model_file
from alexnet_cli.core.model.alexnet import AlexNet
from alexnet_cli.core.model.network import Network, initialize, network_from_model
from alexnet_cli.errors import AlexNetError, DataError, UsageError, WeightsError
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, RECIPES, TINY, Recipe
from model_files import draw, random_model, save_model

SMALL = replace(PAPER, width=1 / 16)
VARIANTS = [
    *(replace(recipe, width=1 / 8) for recipe in RECIPES.values()),
    replace(SMALL, activation="tanh", lrn="none", dropout=0.0),
    replace(SMALL, towers=1, pool_size=2, lrn="within-map", mean="rgb"),
    replace(SMALL, name="conv2", cross_talk=("conv2", "conv3", "fc6", "fc7")),
    replace(SMALL, name="none", cross_talk=(), conv1_width=1 / 8),
    replace(SMALL, name="no-conv3", left_out_layers=("conv3",), activation="tanh"),
    replace(SMALL, name="no-conv4", left_out_layers=("conv4",)),
]


def make_input(recipe: Recipe, count: int = 2) -> torch.Tensor:
    shape = count, 3, recipe.input_size, recipe.input_size
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 60 / recipe.input_divisor


def check_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Check that the largest difference is at most 3e-5 of the largest value; each CPU sums in another order."""
    assert (actual - expected).abs().max() <= 3e-5 * expected.abs().max()


@pytest.mark.parametrize("recipe", VARIANTS, ids=lambda recipe: f"{recipe.name}-{recipe.activation}-{recipe.towers}")
def test_equals_the_fast_network_in_logits_and_gradients(recipe: Recipe) -> None:
    model = random_model(recipe)
    plain, fast = AlexNet.from_model(model), network_from_model(model)
    inputs = [make_input(recipe).requires_grad_() for _ in range(2)]
    logits = [network(x) for network, x in zip((plain, fast), inputs, strict=True)]
    for values in logits:
        functional.cross_entropy(values, torch.tensor([3, 5])).backward()
    check_equal(*logits)
    check_equal(*(x.grad for x in inputs if x.grad is not None))
    for name, parameter in fast.named_parameters():
        gradient = plain.get_parameter(name).grad
        assert gradient is not None
        assert parameter.grad is not None
        check_equal(gradient, parameter.grad)


@pytest.mark.parametrize("recipe", [SMALL, replace(TINY, width=1 / 16)])
def test_a_new_network_has_the_initial_values_of_training(recipe: Recipe) -> None:
    fast = Network(recipe, 10)
    initialize(fast)
    plain = AlexNet(recipe, 10)
    assert all(torch.equal(plain.get_parameter(name), parameter) for name, parameter in fast.named_parameters())
    assert all(parameter.requires_grad for parameter in plain.parameters())


def test_every_layer_is_a_submodule_in_the_order_of_the_recipe() -> None:
    with torch.device("meta"):
        paper, krizhevsky = AlexNet(), AlexNet(KRIZHEVSKY, ["cat", "dog"])
    tail = "conv3 relu3 conv4 relu4 conv5 relu5 pool5 fc6 relu6 drop6 fc7 relu7 drop7 fc8"
    assert [name for name, _ in paper.named_modules() if name] == (
        f"conv1 relu1 norm1 pool1 conv2 relu2 norm2 pool2 {tail}".split()
    )
    assert " ".join(krizhevsky.layers).startswith("conv1 norm1 pool1 relu1 conv2 relu2 norm2 within_norm2 pool2")
    assert sum(p.numel() for p in paper.parameters()) == 60_965_224
    assert [name.name for name in krizhevsky.classes] == ["cat", "dog"]
    assert "recipe krizhevsky, 2 classes" in repr(krizhevsky)


def test_activations_are_those_of_the_layers_called_one_by_one() -> None:
    network = AlexNet.from_model(random_model(SMALL))
    x = make_input(SMALL)
    conv1 = network.conv1(functional.pad(x, (0, 3, 0, 3)))
    relu1 = conv1.clamp(min=0)
    stock = torch.nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2.0)  # torch divides alpha by the size
    halves = torch.cat([stock(half) for half in relu1.chunk(2, 1)], 1)
    found = network.activations(x, ["norm1", "conv1", "relu1", "fc8"])
    assert list(found) == ["norm1", "conv1", "relu1", "fc8"]
    assert conv1.min() < 0
    torch.testing.assert_close(found["conv1"], conv1)
    torch.testing.assert_close(found["relu1"], relu1)
    torch.testing.assert_close(found["norm1"], halves)
    assert torch.equal(found["fc8"], network(x))
    relu7 = network.activations(x, "relu7")["relu7"]
    assert torch.equal(network.activations(x, "drop7")["drop7"], relu7 * 0.5)


def test_the_activations_of_a_tower_are_its_half() -> None:
    network = AlexNet.from_model(random_model(SMALL))
    x, layers = make_input(SMALL), ("pool2", "conv3", "fc7")
    whole = network.activations(x, layers)
    for layer in layers:
        halves = [network.activations(x, layer, tower=tower)[layer] for tower in (1, 2)]
        assert torch.equal(torch.cat(halves, 1), whole[layer])
        assert halves[0].shape == halves[1].shape


def test_later_layers_are_not_computed() -> None:
    network = AlexNet.from_model(random_model(SMALL))
    called: list[str] = []
    for name, module in network.named_children():
        module.register_forward_hook(lambda _m, _i, _o, name=name: called.append(name))
    network.activations(make_input(SMALL), ["relu2", "conv1"])
    assert called == ["conv1", "relu1", "norm1", "pool1", "conv2", "relu2"]


@pytest.mark.parametrize("tower", [1, 2])
def test_without_a_tower_its_units_are_zero_for_all_that_follows(tower: int) -> None:
    """As if the weights that read this tower were zero in layers 3, 6, 7 and 8."""
    model = random_model(SMALL)
    network, x = AlexNet.from_model(model), make_input(SMALL)
    tensors = dict(model.tensors)
    for layer in ("conv3", "fc6", "fc7", "fc8"):
        weight = tensors[f"{layer}.weight"].copy()
        half = weight.shape[1] // 2
        weight[:, half * (tower - 1) : half * tower] = 0
        tensors[f"{layer}.weight"] = weight
    before = network(x)
    with network.without_tower(tower):
        silent = network.activations(x, network.layers[:-1])
        logits = network(x)
    torch.testing.assert_close(logits, AlexNet.from_model(replace(model, tensors=tensors))(x))
    for layer in ("relu1", "norm1", "pool2", "relu4", "pool5", "relu6", "drop7"):
        halves = silent[layer].chunk(2, 1)
        assert not halves[tower - 1].any(), layer
        assert halves[2 - tower].any(), layer
    assert not torch.equal(logits, before)
    assert torch.equal(network(x), before)


SIGMOID = replace(CAFFE, width=1 / 16, activation="sigmoid", lrn_alpha=1.0)  # norm1 would see the 0.5 of a zero


@pytest.mark.parametrize(
    "recipe", [*(replace(r, width=1 / 16) for r in RECIPES.values()), VARIANTS[5], *VARIANTS[7:], SIGMOID]
)
def test_a_silenced_model_is_the_network_without_that_tower(recipe: Recipe) -> None:
    model, x = random_model(recipe), make_input(recipe)
    network = AlexNet.from_model(model)
    with network.without_tower(2):
        expected = network(x), network.activations(x, "conv2", 1)
    silenced = AlexNet.from_model(model_file.silence_tower(model, 2))
    torch.testing.assert_close((silenced(x), silenced.activations(x, "conv2", 1)), expected)


def test_a_single_tower_cannot_be_silenced() -> None:
    with pytest.raises(UsageError, match="has a single tower"):
        model_file.silence_tower(random_model(replace(SMALL, towers=1)), 1)


def test_training_drops_half_of_the_units_and_does_not_scale_them() -> None:
    """Section 4.2; recipe `fast` divides what it keeps by 1 - p instead."""
    x = make_input(SMALL, 4)
    for recipe, factor in ((SMALL, 1.0), (replace(SMALL, dropout_inverted=True), 2.0)):
        network = AlexNet.from_model(random_model(recipe)).train()
        units, dropped = network.activations(x, ["relu6", "drop6"]).values()
        active, kept = units > 0, dropped > 0
        assert 0.4 < kept.sum() / active.sum() < 0.6
        torch.testing.assert_close(dropped[kept], units[kept] * factor)


def test_a_strict_load_of_a_model_file_and_of_its_own_state(tmp_path: Path) -> None:
    model = random_model(SMALL)
    path = save_model(model, tmp_path / "m.safetensors")
    network = AlexNet(SMALL, 10).eval()
    network.load_state_dict(safetensors.torch.load_file(path))
    x = make_input(SMALL)
    assert torch.equal(network(x), AlexNet.from_model(model)(x))
    assert torch.equal(network.mean, torch.from_numpy(model.mean))
    buffer = io.BytesIO()
    torch.save(network.state_dict(), buffer)
    buffer.seek(0)
    AlexNet(SMALL, 10).load_state_dict(torch.load(buffer, weights_only=True))


def test_save_and_load(tmp_path: Path) -> None:
    network = AlexNet.from_model(random_model(SMALL, info={"epoch": 3}))
    network.half().save(tmp_path / "n.safetensors")
    model = model_file.read_model(tmp_path / "n.safetensors")
    assert (model.recipe, model.classes) == (SMALL, network.classes)
    assert model.info == {"exif_rotate": False}  # not the epoch: the weights may have changed since
    x = make_input(SMALL)
    torch.testing.assert_close(AlexNet.from_model(model)(x), network.float()(x))
    with pytest.raises(UsageError, match=r"n.pt does not end in .safetensors"):
        network.save(tmp_path / "n.pt")


def test_another_last_layer_is_saved_with_its_class_names(tmp_path: Path) -> None:
    network = AlexNet.from_model(random_model(SMALL))
    network.fc8 = torch.nn.Linear(network.fc8.in_features, 2)
    with pytest.raises(UsageError, match=r"fc8\.(weight|bias) is .*10 classes"):
        network.save(tmp_path / "two.safetensors")
    network.classes = ["cat", "dog"]
    network.save(tmp_path / "two.safetensors")
    assert len(model_file.read_model(tmp_path / "two.safetensors").classes) == 2


def test_what_a_file_could_not_say_is_not_saved(tmp_path: Path) -> None:
    network = AlexNet.from_model(random_model(SMALL))
    with network.without_tower(1), pytest.raises(UsageError, match="something else than its recipe"):
        network.save(tmp_path / "n.safetensors")
    network.relu5 = torch.nn.Identity()
    with pytest.raises(UsageError, match="something else than its recipe"):
        network.to_model()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UsageError, match=r"the folder .*missing does not exist"):
        network.save(tmp_path / "missing" / "n.safetensors")


def test_saving_leaves_every_layer_in_its_mode(tmp_path: Path) -> None:
    network = AlexNet.from_model(random_model(SMALL)).train()
    network.get_submodule("drop6").eval()
    before = {name: module.training for name, module in network.named_modules()}
    network.save(tmp_path / "n.safetensors")
    assert {name: module.training for name, module in network.named_modules()} == before


@pytest.mark.parametrize("classes", ["cat", [], 0, [1, 2], [("cat", "n1")], ["cat", None]])
def test_what_are_no_classes(classes: Any) -> None:
    with pytest.raises(UsageError, match="are no classes"):
        AlexNet(SMALL, classes)


def test_the_mean_image_is_float32_of_256_pixels() -> None:
    network = AlexNet(SMALL, np.int64(2), mean=np.ones((3, 256, 256), np.uint8))  # type: ignore[arg-type]
    assert network.mean.dtype == torch.float32
    with pytest.raises(UsageError, match="the mean image is 3 x 224 x 224"):
        AlexNet(SMALL, 2, mean=np.ones((3, 224, 224), np.float32))


def test_preprocess_works_on_a_pruned_or_replaced_first_layer(tmp_path: Path) -> None:
    network, path = AlexNet.from_model(random_model(SMALL)), draw(tmp_path / "a.png", 3)
    expected = network.preprocess(path)
    torch.nn.utils.parametrizations.weight_norm(network.conv1)
    assert torch.equal(network.preprocess(io.BytesIO(Path(path).read_bytes())), expected)
    with pytest.raises(UsageError, match="parametrizations"):
        network.to_model()


def as_forms(path: str) -> dict[str, Any]:
    """The same image in every form that `preprocess` takes."""
    image = Image.open(path)
    pixels = np.asarray(image.convert("RGB"))
    return {
        "path": Path(path), "str": path, "bytes": Path(path).read_bytes(), "PIL image": image, "array": pixels,
        "tensor": torch.from_numpy(pixels.copy()).permute(2, 0, 1), "floats": pixels.astype(np.float32) / 255,
        "view": memoryview(Path(path).read_bytes()),
    }  # fmt: skip


@pytest.mark.parametrize("views", [1, 10])
@pytest.mark.parametrize(
    "recipe", [SMALL, replace(CAFFE, width=1 / 16), replace(TINY, width=1 / 16), replace(SMALL, mean="rgb")]
)
def test_preprocess_is_what_predict_does(tmp_path: Path, recipe: Recipe, views: int) -> None:
    model = random_model(recipe)
    network, path = AlexNet.from_model(model), draw(tmp_path / "a.png", 3)
    pixels = images.resize_and_crop(images.decode(Path(path).read_bytes()))
    expected = compute_probabilities(pixels[None], Session(model), views)
    forms = as_forms(path)
    x = network.preprocess(list(forms.values()), views)
    assert x.shape == (len(forms) * views, 3, recipe.input_size, recipe.input_size)
    with torch.inference_mode():
        probabilities = network(x).softmax(1).unflatten(0, (-1, views)).mean(1)
    for name, row in zip(forms, probabilities, strict=True):
        np.testing.assert_allclose(row.numpy(), expected[0], atol=1e-6, err_msg=name)


def test_preprocess_of_one_image_and_of_a_batch_of_pixels(tmp_path: Path) -> None:
    network = AlexNet.from_model(random_model(SMALL))
    batch = np.stack([images.decode(Path(draw(tmp_path / f"{i}.png", i)).read_bytes()) for i in range(3)])
    x = network.preprocess(batch)
    assert torch.equal(network.preprocess(torch.from_numpy(batch).permute(0, 3, 1, 2)), x)
    assert torch.equal(network.preprocess(batch[1]), x[1:2])
    gray = network.preprocess(batch[0, :, :, 0])
    assert torch.equal(gray, network.preprocess(batch[0, :, :, :1].repeat(3, 2)))
    half = network.bfloat16().preprocess(batch[:1])
    assert half.dtype == torch.bfloat16


def test_images_are_rotated_as_those_of_the_training_set(tmp_path: Path) -> None:
    upright = Image.open(draw(tmp_path / "a.png", 3))
    turned, exif = upright.rotate(90, expand=True), Image.Exif()
    exif[images.EXIF_ORIENTATION] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    network = AlexNet.from_model(random_model(SMALL, info={"exif_rotate": True}))
    expected = network.preprocess(upright)
    for form in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert torch.equal(network.preprocess(form), expected)
    network.info["exif_rotate"] = False
    assert not torch.equal(network.preprocess(tmp_path / "turned.png"), expected)


@pytest.mark.parametrize(
    ("image", "kind", "message"),
    [
        ("nothing.jpg", DataError, "nothing.jpg: No such file"),
        (b"no image", DataError, "it is not an image"),
        (3, UsageError, "int is no image"),
        (np.zeros((5, 5, 2), np.uint8), UsageError, "uint8 5 x 5 x 2 is no image"),
        (np.zeros((5, 5, 3), np.int64), UsageError, "int64 5 x 5 x 3 is no image"),
        (np.full((5, 5, 3), 200.0), UsageError, "floats from 200 to 200"),
        (np.full((5, 5, 3), math.nan), UsageError, "floats from nan"),
        (torch.zeros(5, 5, 3, dtype=torch.uint8), UsageError, "uint8 5 x 5 x 3 is no image"),
        (np.zeros(5, np.uint8), UsageError, "uint8 5 is no image"),
        ([np.zeros((2, 5, 5, 3), np.uint8)], UsageError, "uint8 2 x 5 x 5 x 3 is no image"),
        ([], UsageError, "no images"),
    ],
)
def test_what_is_no_image(image: Any, kind: type[AlexNetError], message: str) -> None:
    with pytest.raises(kind, match=message):
        AlexNet(replace(PAPER, width=1 / 64), 2).preprocess(image)


def test_a_folder_is_no_image(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a regular file") as error:
        AlexNet(replace(PAPER, width=1 / 64), 2).preprocess(tmp_path)
    assert error.value.hint == "give the path of an image"


def test_wrong_inputs_and_names() -> None:
    network = AlexNet(replace(PAPER, width=1 / 64), 2)
    x = make_input(PAPER)
    for wrong, message in ((x.byte(), "the input is uint8"), (x[:, :, :200], "the input is 2 x 3 x 200 x 224")):
        for call in (network, lambda x: network.activations(x, "conv1")):
            with pytest.raises(UsageError, match=f"{message}: the network takes float N x 3 x 224 x 224"):
                call(wrong)
    with pytest.raises(UsageError, match="no layer 'rleu5'") as error:
        network.activations(x, ["rleu5"])
    assert error.value.__notes__[0].startswith("did you mean relu5? layers: conv1 relu1")
    for tower in (3, 1.5, "1"):
        with pytest.raises(UsageError, match=f"no tower {tower!r}"), network.without_tower(tower):  # type: ignore[arg-type]
            pass
    with pytest.raises(UsageError, match="the input is a ndarray: the network takes"):
        network(x.numpy())
    with pytest.raises(UsageError, match="views is 5"):
        network.preprocess(np.zeros((9, 9, 3), np.uint8), views=5)
    with pytest.raises(WeightsError):
        AlexNet.from_model(model_file.read_model(Path("nothing.safetensors")))
