"""Occlusion maps equal a literal loop in PyTorch, Grad-CAM Captum's, LayerCAM torchcam's; the page shows them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from alexnet_cli.core.analysis import explain
from alexnet_cli.core.analysis.explain import Attribution, Explainer, Explanation, find_class
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.drawing import Page
from alexnet_cli.core.inference.predict import Label
from alexnet_cli.core.inference.torch_session import TorchSession
from alexnet_cli.core.model.alexnet import AlexNet
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.errors import UsageError, WeightsError
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, TINY
from model_files import random_model

PICTURE = np.random.default_rng(5).integers(0, 256, (256, 256, 3), np.uint8)
PICTURE[60:160, 90:200] //= 4
RECIPES = {
    "paper": PAPER,
    "krizhevsky": KRIZHEVSKY,
    "caffe": CAFFE,
    "tiny": TINY,
    "one tower": replace(PAPER, towers=1),
    "mean color": replace(PAPER, mean="rgb"),
    "tanh": replace(PAPER, activation="tanh"),
}


@pytest.fixture(params=RECIPES)
def model(request: pytest.FixtureRequest) -> Model:
    return random_model(replace(RECIPES[request.param], width=1 / 32, precision="fp32"))


def without(network: AlexNet, tower: int | None) -> AbstractContextManager[None]:
    return network.without_tower(tower) if tower else nullcontext()


def make_crop(model: Model) -> np.ndarray:
    side = model.recipe.input_size
    low = (256 - side) // 2
    return np.ascontiguousarray(PICTURE[low : low + side, low : low + side].transpose(2, 0, 1))


def test_an_occlusion_map_is_the_drop_at_each_square_of_a_literal_loop(model: Model) -> None:
    """Also with a tower off, as `AlexNet.without_tower` does it."""
    found = Explainer(model).explain(PICTURE)
    session, side, half = TorchSession(model, "cpu"), model.recipe.input_size, explain.SQUARE // 2
    low = (256 - side) // 2
    gray = session.network.mean.numpy().copy()
    if model.recipe.mean == "rgb":
        gray[:] = gray.mean((1, 2), keepdims=True)
    assert [part.without_tower for part in found.attributions] == ([None, 2, 1] if model.recipe.towers > 1 else [None])
    assert (found.centers[0] - half, found.centers[-1] + half) == (low, low + side), "all of the crop is covered"
    assert np.diff(found.centers).max() <= 30
    for part in found.attributions:
        with without(session.network, part.without_tower):
            whole = session.probabilities(make_crop(model)[None])[0]
            assert part.probability == pytest.approx(whole[found.index], rel=1e-4)
            assert [label.index for label in part.top] == np.argsort(-whole, kind="stable")[:5].tolist()
            for row, column in ((0, 0), (2, 5), (6, 6), part.find_peak()):
                top, left = (int(found.centers[place]) - half for place in (row, column))
                image = PICTURE.astype(np.float32).transpose(2, 0, 1).copy()
                image[:, top : top + 48, left : left + 48] = gray[:, top : top + 48, left : left + 48]
                covered = np.ascontiguousarray(image[:, low : low + side, low : low + side])[None]
                drop = whole[found.index] - session.probabilities(covered)[0, found.index]
                assert part.values[row, column] == pytest.approx(drop, abs=1e-5)
    assert np.ptp(found.attributions[0].values) > 1e-4


@pytest.mark.filterwarnings("ignore:Setting (backward hooks|forward, backward hooks):UserWarning")
@pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients:UserWarning")
def test_grad_cam_is_captums(model: Model) -> None:
    captum = pytest.importorskip("captum.attr", reason="the extra `research` brings captum")
    network = AlexNet.from_model(model)
    layer = network.get_submodule("tanh5" if model.recipe.activation == "tanh" else "relu5")
    explainer, nonzero = Explainer(model, "gradcam"), 0
    for index in range(4):
        for part in explainer.explain(PICTURE, index).attributions:
            with without(network, part.without_tower):
                x = network.preprocess(PICTURE)
                expected = captum.LayerGradCam(network, layer).attribute(x, target=index, relu_attributions=True)
            nonzero += check_equal(part.values, expected[0, 0])
    assert nonzero > 2


def test_layer_cam_is_torchcams(model: Model) -> None:
    methods = pytest.importorskip("torchcam.methods", reason="the extra `research` brings torchcam")
    layer = "tanh5" if model.recipe.activation == "tanh" else "relu5"
    for part in Explainer(model, "layercam").explain(PICTURE, 3).attributions:
        network = AlexNet.from_model(model)
        with without(network, part.without_tower), methods.LayerCAM(network, target_layer=layer) as extractor:
            logits = network(network.preprocess(PICTURE))
            [expected] = extractor(3, logits, normalized=False)
        assert check_equal(part.values, expected[0])
        assert part.probability == pytest.approx(float(logits.softmax(1)[0, 3].detach()), rel=1e-4)


def check_equal(found: np.ndarray, expected: torch.Tensor) -> bool:
    """Check a map; return whether it has evidence at all, which many classes of random networks lack."""
    values = expected.detach().numpy()
    assert found.shape == values.shape
    assert np.abs(found - values).max() <= 1e-4 * values.max()
    return bool(values.max() > 0)


def test_the_places_of_layer_5_are_the_middles_of_what_it_sees() -> None:
    """Over several images, the gradient of a place reaches about equally far from its center."""
    model = random_model(replace(PAPER, width=1 / 32))
    network, centers = AlexNet.from_model(model), Explainer(model, "gradcam").explain(PICTURE).centers
    x = (40 * torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(1))).requires_grad_()
    network.activations(x, "conv5")["conv5"][:, :, 6, 8].sum().backward()
    assert x.grad is not None
    rows, columns = (x.grad.abs().sum((0, 1, axis)).nonzero() for axis in (3, 2))
    for place, seen in ((6, rows), (8, columns)):
        middle = 16 + (int(seen[0]) + int(seen[-1]) + 1) / 2
        assert middle == pytest.approx(centers[place], abs=4)


def test_the_most_probable_class_is_that_of_the_first_network() -> None:
    model = random_model(replace(PAPER, width=1 / 32))
    network = AlexNet.from_model(model)
    logits = network(network.preprocess(PICTURE))
    for method in ("occlusion", "gradcam"):
        whole = Explainer(model, method).explain(PICTURE)
        assert whole.index == int(logits.argmax())
        with network.without_tower(1):
            index = int(network(network.preprocess(PICTURE)).argmax())
        alone = Explainer(model, method, [1]).explain(PICTURE)
        assert (alone.index, alone.name) == (index, model.classes[index])
        assert [part.without_tower for part in alone.attributions] == [1]


def test_a_single_tower_cannot_be_switched_off() -> None:
    model = random_model(replace(PAPER, width=1 / 32, towers=1))
    for tower in (1, 2):
        with pytest.raises(UsageError, match="has a single tower"):
            Explainer(model, "occlusion", [tower])


@pytest.mark.parametrize("method", ["occlusion", "gradcam"])
def test_nan_weights_are_an_error(method: explain.Method) -> None:
    model = random_model(replace(PAPER, width=1 / 32))
    model.tensors["fc7.bias"][0] = np.nan
    with pytest.raises(WeightsError, match="NaN"):
        Explainer(model, method).explain(PICTURE)


def test_a_class_is_found_by_name_wnid_and_index_and_otherwise_the_nearest_are_named() -> None:
    classes = [ClassName("tabby", "n02123045"), ClassName("Egyptian cat", "n02124075"), ClassName("7"), ClassName("8")]
    classes += [ClassName("crane", "n02012849"), ClassName("crane", "n03126707"), ClassName("A"), ClassName("a")]
    for text, index in {
        "tabby": 0, "egyptian CAT": 1, "n02124075": 1, "7": 2, "2": 2, "0": 0, "crane (n03126707)": 5, "A": 6, "a": 7,
    }.items():  # fmt: skip
        assert find_class(classes, text) == index, text
    for text, hint in {
        "cat": "did you mean Egyptian cat?",
        "taby": "did you mean tabby?",
        "crane": "crane (n02012849) or crane (n03126707)",
        "99": "classes 0 to 7: tabby, Egyptian cat",
        "": "classes 0 to 7: tabby",
    }.items():
        with pytest.raises(UsageError) as error:
            find_class(classes, text)
        assert hint in str(error.value.hint), text


def make_explanation(values: np.ndarray, method: explain.Method = "occlusion", name: str = "cat") -> Explanation:
    """The whole network and both towers; the explained class is not among the likely ones."""
    top = tuple(Label(i + 1, name, None, i, 0.5 - i / 10) for i in range(5))
    parts = tuple(Attribution(tower, top, 0.4, values) for tower in (None, 2, 1))
    seen = np.full((224, 224, 3), (10, 200, 30), np.uint8)
    return Explanation(method, seen, 9, ClassName(name), np.array([40.0, 128.0, 216.0]), parts)


def test_the_peak_is_bright_and_what_is_not_evidence_is_the_gray_image() -> None:
    values = np.array([[0, 0, 0], [0, 0, 0.25], [-0.2, 0, 0]], np.float32)
    found = make_explanation(values)
    overlay = explain.draw_overlay(found, found.attributions[0], 224).astype(int)
    assert (overlay[112, 200] - explain.INFERNO[-1]).tolist() == pytest.approx([0, 0, 0], abs=30)
    gray = np.asarray(Image.fromarray(found.seen).convert("L"))[0, 0] * 0.65
    assert np.abs(overlay[200, 24] - gray).max() <= 1, "negative evidence stays dark"
    least = replace(found.attributions[0], values=(values / 4).astype(np.float32))
    assert np.abs(explain.draw_overlay(found, least, 224) - overlay).max() <= 1, "each map has its own scale"
    tiny = replace(found.attributions[0], values=(values / 500).astype(np.float32))
    assert explain.draw_overlay(found, tiny, 224)[112, 200].max() < 160, "a drop of 0.05 points means little"
    assert explain.make_record(found)["networks"][0]["peak"] == {"x": 216.0, "y": 128.0, "value": 0.25}
    peak = " at (216, 128)"
    assert (
        explain.describe_evidence(found, found.attributions[0], peak) == f"40 % falls to 15 % if a square{peak} is gray"
    )
    assert explain.describe_evidence(found, tiny, peak) == f"40 % falls by less than 1 point if a square{peak} is gray"
    none = replace(found.attributions[0], values=np.zeros((3, 3), np.float32))
    assert explain.describe_evidence(replace(found, method="gradcam"), none, " at (1, 2)") == "40 %, no evidence"


@pytest.mark.parametrize("method", ["occlusion", "gradcam", "layercam"])
@pytest.mark.parametrize("parts", [1, 3])
def test_any_name_fits_the_page(method: explain.Method, parts: int) -> None:
    found = make_explanation(np.zeros((3, 3), np.float32), method, "a name that never ends, " * 40)
    found = replace(found, attributions=found.attributions[:parts])
    page = np.asarray(explain.draw_page(found, "x" * 400, "y" * 400))
    assert page.shape[1] == {1: 800, 3: 1584}[parts]
    margin = explain.MARGIN // 2
    assert (page[:, -margin:] == 255).all()
    assert (page[-margin:] == 255).all()
    between = explain.MARGIN + explain.SHOWN + explain.GUTTER // 2
    assert (page[explain.TOP : -2 * margin - explain.GUTTER, between] == 255).all(), "but for the caption"
    assert (page[explain.TOP + 100, explain.MARGIN + 100] == (10, 200, 30)).all()
    assert (page == explain.EXPLAINED).all(-1).any(), "the explained class has a bar though it is not among the top 5"


@pytest.mark.parametrize("method", ["occlusion", "gradcam"])
@pytest.mark.parametrize("parts", [1, 3])
def test_a_sheet_has_a_row_for_each_image_in_columns(method: explain.Method, parts: int) -> None:
    found = make_explanation(np.zeros((3, 3), np.float32), method, "a name that never ends, " * 40)
    found = replace(found, attributions=found.attributions[:parts])
    colors = [(255, shade, 0) for shade in range(100, 110)]
    images = [("x.png", replace(found, seen=np.full_like(found.seen, color))) for color in colors]
    sheet = np.asarray(explain.draw_sheet(images, "y" * 400, [found.name]))
    assert 0.5 < sheet.shape[0] / sheet.shape[1] < 2
    margin = explain.MARGIN // 2
    assert (sheet[:, -margin:] == 255).all()
    assert (sheet[-margin:] == 255).all()
    places = [np.argwhere((sheet == color).all(-1)) for color in colors]
    assert {len(pixels) for pixels in places} == {explain.TILE**2}
    corners = [tuple(pixels[0][::-1]) for pixels in places]
    assert corners == sorted(corners), "down the columns"
    assert len({left for left, _ in corners}) > 1


def test_a_wrong_answer_is_told_where_the_folder_names_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []
    monkeypatch.setattr(Page, "text", lambda self, x, y, text, *_, **__: texts.append(text))
    found = replace(make_explanation(np.zeros((3, 3), np.float32)), index=0)
    classes = [found.name, ClassName("tench", "n01440764")]
    for folder, wrong in (("n01440764", " (wrong, is tench)"), (found.name.name, ""), ("pictures", "")):
        texts.clear()
        explain.draw_sheet([(f"val/{folder}/x.png", found)], "", classes)
        assert f"{found.name.name}{wrong}" in texts
