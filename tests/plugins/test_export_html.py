"""The page of `export --format html` in a real browser: it answers as ONNX Runtime does, and asks for nothing."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from typer import Typer
from typer.testing import CliRunner, Result

from alexnet_cli.core.analysis.filters import measure_specialization, split_towers
from alexnet_cli.core.analysis.units import cut_receptive_field, find_top_activations, iterate_activations
from alexnet_cli.core.data import images
from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.model_file import Model, silence_tower
from alexnet_cli.errors import UsageError, WeightsError
from alexnet_cli.recipe import PAPER, RECIPES, Recipe
from alexnet_plugins.export.html_page import build_page, measure_towers, round_weights, write_page
from alexnet_plugins.export.patches import find_patches
from firefox import open_firefox, wait_until
from model_files import draw, random_model, save_model

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NARROW = {name: replace(recipe, width=1 / 16) for name, recipe in RECIPES.items()}
SMALL = NARROW["paper"]
HOSTILE = ("</script><script>alert(1)</script>", '<img src=x onerror="alert(2)">', "{{ data }}", "\u202e\ud800", "<!--")
ROUNDED, ORIGINAL = 2e-5, 0.03  # largest difference of a probability from the network with rounded weights, and without
Rows = npt.NDArray[np.float32]


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return draw(tmp_path_factory.mktemp("picture") / "blotches.png", 3, (431, 300))


def plain_text(page: Page, selector: str) -> str:
    """The text that the reader sees, with spaces that may break."""
    return page.inner_text(selector).replace("\u00a0", " ")


class OpenPage:
    """A page with a picture in it. `messages` is what the console messages, `requests` is what it requests for."""

    def __init__(
        self,
        browser: Browser,
        model: Model,
        path: Path,
        size: tuple[int, int] = (1280, 800),
        patches: Any = None,
        towers: Any = None,
    ) -> None:
        write_page(build_page(model, path.stem, patches, towers), path)
        self.page: Page = browser.new_page(viewport={"width": size[0], "height": size[1]})
        self.messages, self.requests = list[str](), list[str]()
        self.page.on("console", lambda message: self.messages.append(message.text))
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", lambda dialog: self.messages.append(dialog.message))
        self.page.goto(path.as_uri())
        self.wait("done", "1")

    def wait(self, mark: str, value: str | None = None) -> str:
        """Wait until the page has this mark (with this value); return the value."""
        ends = "" if value is None else f'="{value}"'
        self.page.wait_for_selector(f"html[data-{mark}{ends}]", state="attached", timeout=120_000)
        return str(self.page.evaluate(f"document.documentElement.dataset.{mark}"))

    def answers(self, action: str = "run()") -> Rows:
        """The probabilities after a statement that makes the network run."""
        job = int(self.page.evaluate("job"))
        self.page.evaluate(f"() => {{ {action} }}")
        self.wait("done", str(job + 1))
        return np.array(self.page.evaluate("[...probabilities]"), np.float32)

    def choose(self, picture: str) -> Rows:
        """Open a file; return the probabilities."""
        job = int(self.page.evaluate("job"))
        self.page.set_input_files("#file", picture)
        self.wait("done", str(job + 1))
        return np.array(self.page.evaluate("[...probabilities]"), np.float32)


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Any]:
    """Open the page of a model. The test fails if a page says or asks anything."""
    pages: list[OpenPage] = []

    def opener(model: Model, **options: Any) -> OpenPage:
        pages.append(OpenPage(browser, model, tmp_path / f"page{len(pages)}.html", **options))
        return pages[-1]

    yield opener
    for one in pages:
        one.page.close()
        assert one.messages == []
        assert [url for url in one.requests if not url.startswith(("file:", "blob:"))] == []
        assert len([url for url in one.requests if url.startswith("file:")]) == 1


def crop_of(picture: str, recipe: Recipe) -> npt.NDArray[np.uint8]:
    """The center crop of a picture as `predict` makes it, 1 x 3 x S x S."""
    return make_views(images.resize_and_crop(images.decode(Path(picture).read_bytes())), recipe.input_size, 1)


VARIANTS = {
    **NARROW,
    "one tower, pools of 2": replace(NARROW["tiny"], towers=1, pool_size=2),
    "tanh, within maps": replace(SMALL, activation="tanh", lrn="within-map", lrn_size=3, lrn_beta=0.5),
    "sigmoid, no norm, floor": replace(SMALL, activation="sigmoid", lrn="none", pool_ceil="pool5", edge_padding=False),
    "pool before norm, mean color": replace(
        SMALL, stage1_order="relu-pool-norm", stage2_order="norm-pool-relu", mean="rgb", width=1 / 32
    ),
    "cross-talk in layers 2 and 6": replace(SMALL, cross_talk=("conv2", "fc6"), conv1_width=1 / 8),
    "no cross-talk": replace(SMALL, cross_talk=()),
    "no layer 3": replace(SMALL, left_out_layers=("conv3",)),
}


EVERYDAY = {"tiny", "krizhevsky", "no cross-talk"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in EVERYDAY else pytest.mark.slow) for name in VARIANTS]
)
def test_the_answers_are_those_of_onnx_runtime(open_page: Any, picture: str, name: str) -> None:
    model = random_model(VARIANTS[name], 7)
    answers, crop = open_page(model).choose(picture), crop_of(picture, model.recipe)
    [exact], [original] = (Session(m).probabilities(crop) for m in (round_weights(model), model))
    assert abs(answers - exact).max() < ROUNDED
    assert abs(answers - original).max() < ORIGINAL
    assert answers.argmax() == original.argmax()


@pytest.mark.slow
def test_firefox_answers_the_same(tmp_path: Path, picture: str) -> None:
    program = shutil.which("firefox-esr") or shutil.which("firefox")
    if program is None:
        pytest.skip("Firefox is not installed")
    model, page = random_model(NARROW["krizhevsky"], 7), tmp_path / "page.html"
    write_page(build_page(model, "page"), page)
    done = "return document.documentElement.dataset.done"
    bars = "return [...document.querySelectorAll('#answers .bar span')].map((bar) => parseFloat(bar.style.width) / 100)"
    with open_firefox(program, tmp_path) as call:
        call("Navigate", url=page.as_uri())
        wait_until(lambda: call("ExecuteScript", script=done) == "1")
        [field] = call("FindElement", using="css selector", value="#file").values()
        call("ElementSendKeys", id=field, text=picture)
        wait_until(lambda: call("ExecuteScript", script=done) == "2")
        shown = np.array(call("ExecuteScript", script=bars))
    [exact] = Session(round_weights(model)).probabilities(crop_of(picture, model.recipe))
    assert abs(shown - np.sort(exact)[:-6:-1]).max() < ROUNDED


@pytest.mark.slow
def test_pictures_are_resized_as_predict_does(open_page: Any, tmp_path: Path) -> None:
    page = open_page(random_model(SMALL))
    for number, size in enumerate([(900, 333), (256, 256), (60, 97), (1, 40)]):
        path = draw(tmp_path / f"{number}.png", number, size)
        page.choose(path)
        text = page.page.evaluate("btoa(String.fromCharCode(...picture.subarray(0, 6e4)))")  # the rows at the top
        seen = np.frombuffer(base64.b64decode(text), np.uint8)[: 89 * 672].reshape(89, 224, 3).transpose(2, 0, 1)
        assert abs(seen.astype(int) - crop_of(path, SMALL)[0, :, :89]).max() <= 1


@pytest.mark.parametrize("name", ["caffe", pytest.param("krizhevsky", marks=pytest.mark.slow)])
def test_a_tower_that_is_off_is_without_tower(open_page: Any, picture: str, name: str) -> None:
    import torch

    from alexnet_cli.core.model.alexnet import AlexNet

    model = random_model(NARROW[name], 7)
    page, network = open_page(model), AlexNet.from_model(round_weights(model))
    x = network.preprocess(picture)
    page.choose(picture)
    for tower in (1, 2):
        answers = page.answers(f"byId('tower-{tower}').click()")
        assert "is off" in page.page.inner_text("#switch-text")
        with network.without_tower(tower), torch.inference_mode():
            assert abs(answers - network(x).softmax(1)[0].numpy()).max() < 1e-4
        page.answers(f"byId('tower-{tower}').click()")


@pytest.mark.slow
def test_answers_after_a_switch_stand_next_to_those_with_everything_on(open_page: Any, picture: str) -> None:
    model = random_model(SMALL, 7)
    rounded, crop = round_weights(model), crop_of(picture, model.recipe)
    [whole], [alone] = (Session(m).probabilities(crop) for m in (rounded, silence_tower(rounded, 2)))
    page = open_page(model)

    def check() -> None:
        page.wait("compared", str(page.page.evaluate("job")))
        shown = dict.fromkeys(np.argsort(-alone, kind="stable")[:5])
        rows = [" ".join(row.split()) for row in page.page.locator("#answers li").all_inner_texts()]
        assert len(rows) == 5
        for row in rows:
            index = next(i for i, name in enumerate(model.classes) if row.startswith(f"{name.name} "))
            assert row.endswith(f"{format_share(alone[index])} was {format_share(whole[index])}")
            shown.pop(index, None)
        assert len(shown) <= 1
        expected = model.classes[whole.argmax()].name
        assert any(row.startswith(f"{expected} ") for row in rows), "what it said is on the list"
        assert page.page.is_visible("#was")

    page.choose(picture)
    assert page.page.is_hidden("#was")
    page.answers("byId('tower-2').click()")
    check()
    page.choose(picture)
    check()


@pytest.mark.slow
def test_without_both_towers_only_biases_are_left(open_page: Any, picture: str) -> None:
    model = random_model(SMALL, 7)
    page = open_page(model)
    page.choose(picture)
    page.answers("byId('tower-1').click()")
    assert page.page.locator(".strongest:visible").count() == 7, "of tower 2 alone"
    answers = page.answers("byId('tower-2').click()")
    powers = np.exp(model.tensors["fc8.bias"])
    assert abs(answers - powers / powers.sum()).max() < 1e-6
    assert page.page.inner_text("#switch-text").startswith("Towers 1 and 2 are off")
    assert "the same for every picture" in page.page.inner_text("#time")
    assert page.page.locator(".strongest:visible").count() == 0


def test_each_meeting_says_what_arrives_with_a_tower_off(open_page: Any) -> None:
    page = open_page(random_model(SMALL))

    def meetings() -> list[str]:
        texts = page.page.locator(".meets").all_inner_texts()
        assert len(texts) == 4, "layers 3, 6, 7 and 8"
        return sorted({text.strip() for text in texts})

    assert meetings() == ["The towers meet: each sees both."]
    page.answers("byId('tower-2').click()")
    assert meetings() == ["The towers would meet here, but tower 2 is off: only tower 1 is heard."]
    page.answers("byId('tower-1').click()")
    assert meetings() == ["The towers would meet here, but both are off: only zeros arrive."]
    page.answers("byId('tower-2').click()")
    assert meetings() == ["The towers would meet here, but tower 1 is off: only tower 2 is heard."]


@pytest.mark.slow
def test_a_changed_normalization_stays_marked_with_the_next_picture(open_page: Any, picture: str) -> None:
    page = open_page(random_model(SMALL, 7))
    assert page.page.is_hidden("#norm-value")
    page.answers("byId('norm').value = 50; byId('norm').oninput()")
    page.choose(picture)
    assert page.page.inner_text("#norm-value") == "Normalization at 50\u00a0%"


def test_normalization_that_is_off_has_alpha_zero(open_page: Any, picture: str) -> None:
    model = random_model(replace(SMALL, lrn_alpha=0.02), 7)
    page = open_page(model)
    page.choose(picture)
    answers = page.answers("byId('norm').value = 0; byId('norm').oninput()")
    off = replace(round_weights(model), recipe=replace(model.recipe, lrn_alpha=0.0))
    crop = crop_of(picture, SMALL)
    assert abs(answers - Session(off).probabilities(crop)[0]).max() < ROUNDED
    assert abs(answers - Session(model).probabilities(crop)[0]).max() > 100 * ROUNDED
    assert "constant factor stays" in page.page.inner_text("#switch-text")


@pytest.mark.slow
def test_the_occlusion_map_is_a_loop_over_squares(open_page: Any, picture: str) -> None:
    model = random_model(SMALL, 7)
    rounded = round_weights(model)
    page, session = open_page(model), Session(rounded)
    target = int(page.choose(picture).argmax())
    crop, mean = crop_of(picture, SMALL).astype(np.float32), rounded.mean[:, 16:240, 16:240]
    [whole] = session.probabilities(crop)[:, target]

    def drop(left: int, top: int) -> float:
        covered = crop.copy()
        window = (..., slice(top, top + 48), slice(left, left + 48))
        covered[window] = mean[window]
        return float(whole - session.probabilities(covered)[0, target])

    page.page.click("#occlude")
    squares = json.loads(page.wait("occluded"))
    steps = [round(step * 176 / 6) for step in range(7)]
    coarse = {(left, top) for left in steps[::2] for top in steps[::2]}
    assert {(square["left"], square["top"]) for square in squares[:16]} == coarse, "the whole picture, roughly, first"
    assert {(square["left"], square["top"]) for square in squares} == {(x, y) for x in steps for y in steps}
    assert len(squares) == 49
    assert all(abs(square["drop"] - drop(square["left"], square["top"])) < 2 * ROUNDED for square in squares)
    largest = max(square["drop"] for square in squares)
    assert page.page.inner_text("#found").startswith("The square matters" if largest > 0.05 else "No square")
    assert page.page.is_visible("#heat")
    assert page.page.is_hidden("#progress")

    page.page.evaluate("delete document.documentElement.dataset.occluded")
    page.page.click("#finer")
    finer = json.loads(page.wait("occluded"))
    assert finer[:49] == squares, "not computed again"
    assert len({(square["left"], square["top"]) for square in finer}) == len(finer) == 169
    assert abs(finer[-2]["drop"] - drop(finer[-2]["left"], finer[-2]["top"])) < 2 * ROUNDED
    assert page.page.is_hidden("#finer")


@pytest.mark.slow
def test_a_switch_keeps_the_class_and_computes_the_map_again(open_page: Any, picture: str) -> None:
    model = random_model(SMALL, 7)
    silenced = Session(silence_tower(round_weights(model), 2))
    page = open_page(model)
    target = int(page.choose(picture).argmax())
    page.page.click("#occlude")
    page.wait("occluded")
    page.page.evaluate("delete document.documentElement.dataset.occluded")
    shown = page.page.evaluate("(byId('tower-2').click(), [byId('heat').className, byId('found').textContent])")
    assert shown == ["is-old", "Pale: the map before the switch. The new one is being computed."]
    squares = json.loads(page.wait("occluded"))
    assert page.page.evaluate("Number(byId('target').value)") == target
    assert page.page.locator("#heat.is-old").count() == 0
    assert "before the switch" not in page.page.inner_text("#found")
    covered = crop_of(picture, SMALL).astype(np.float32)
    [whole] = silenced.probabilities(covered)[:, target]
    covered[..., :48, :48] = round_weights(model).mean[:, 16:64, 16:64]
    assert abs(squares[0]["drop"] - (whole - silenced.probabilities(covered)[0, target])) < 2 * ROUNDED


@pytest.mark.slow
def test_weak_evidence_is_drawn_weakly(open_page: Any) -> None:
    page = open_page(random_model(SMALL)).page
    texts, tints = [], []
    for drop in (0.02, 0.5):
        red, _, blue, _ = page.evaluate(
            """(drop) => {
                occlusionJob = ++job;
                const squares = [0, 112].flatMap((top) => [0, 112].map((left) => ({ left, top, drop: 0 })));
                squares[0].drop = drop;
                showOcclusion({ job, done: 1, target: 0, whole: 0.6, edge: 112, squares });
                const pixel = makeCanvas(1, 1).getContext("2d");
                pixel.drawImage(byId("heat"), -9, -9);
                return [...pixel.getImageData(0, 0, 1, 1).data];
            }""",
            drop,
        )
        tints.append(red - blue)
        texts.append((plain_text(page, "#found"), plain_text(page, "#scale")))
    assert abs(tints[0]) < 30
    assert tints[1] > 100
    assert "only falls from 60 % to 58 %" in texts[0][0]
    assert "most at the top left: there, \u2068class 0\u2069 falls from 60 % to 10 %" in texts[1][0]
    assert [scale.rsplit(": by ")[-1] for _, scale in texts] == ["20 percentage points.", "50 percentage points."]


@pytest.mark.slow
def test_the_occlusion_map_can_be_stopped(open_page: Any) -> None:
    page = open_page(random_model(SMALL))
    page.page.click("#occlude")
    page.page.click("#cancel")
    assert page.page.inner_text("#found").startswith("Stopped")
    assert page.page.evaluate("document.activeElement.id") == "occlude"
    page.answers()
    assert page.page.evaluate("document.documentElement.dataset.occluded") is None


def test_hostile_names_are_only_text(open_page: Any, tmp_path: Path) -> None:
    names = tuple(ClassName(name) for name in HOSTILE)
    model = replace(random_model(SMALL, len(names)), classes=names)
    page = open_page(model).page
    assert page.evaluate("about.classes.slice(0, 3)") == list(HOSTILE[:3])
    shown = page.inner_text("#answers")
    assert "<img src=x" in shown
    assert "</script><script>" in shown
    assert page.evaluate("document.images.length") == 0


@pytest.mark.slow
def test_a_name_from_right_to_left_does_not_turn_the_sentence_around(open_page: Any) -> None:
    names = tuple(ClassName(f"\u202e{number}") for number in "abcde")
    page = open_page(replace(random_model(SMALL, len(names)), classes=names))
    page.wait("compared")
    left = "e => e.getBoundingClientRect().left"
    ends = page.page.evaluate(f"[...document.querySelectorAll('#towers .number')].map({left})")
    starts = page.page.evaluate(f"[...document.querySelectorAll('#towers td')].map({left})")
    assert len(ends) == 6
    assert all(end > start + 5 for start, end in zip(starts, ends, strict=True)), "a percentage follows its class"


@pytest.mark.parametrize(
    ("width", "height", "scheme"),
    [
        (390, 844, "dark"),
        pytest.param(1280, 800, "light", marks=pytest.mark.slow),
        pytest.param(1920, 1080, "light", marks=pytest.mark.slow),
        pytest.param(390, 844, "light", marks=pytest.mark.slow),
        pytest.param(1280, 800, "dark", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_it_fits_the_screen_and_axe_finds_nothing(
    open_page: Any, width: int, height: int, scheme: Literal["light", "dark"]
) -> None:
    networks = [[{"right": 0.3, "answer": 1, "share": 0.6, "remark": "not certainly better"}] * 2] * 3
    measured = {"images": 500, "constant": 0.3, "networks": networks, "colorful": 1, "needs": [[0], []], "data": "x"}
    page = open_page(random_model(SMALL), size=(width, height), towers=measured).page
    page.emulate_media(color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.evaluate("document.querySelector('.norm span').getClientRects().length") == 1, "off, slider, on"
    wide = "[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1)"
    assert page.evaluate(f"{wide}.map(e => e.outerHTML.slice(0, 80))") == []
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    for click in ("", "#tower-2", "#strongest-conv2-0 button"):
        if click:
            page.click(click)
            page.wait_for_selector("#was:not([hidden])")
        found = axe.run(page).response["violations"]
        assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in found] == []


def test_a_keyboard_opens_a_unit_and_walks_on(open_page: Any) -> None:
    page = open_page(random_model(SMALL)).page
    page.focus("#strongest-conv1-1 button")
    page.keyboard.press("Enter")
    first = int(plain_text(page, "#unit-title").split("unit ")[1].split(" (tower 2)")[0])
    assert 3 <= first < 6
    assert "units 3 to 5" in plain_text(page, ".tower-2 h4 >> nth=0")
    page.keyboard.press("ArrowRight")
    assert f"unit {(first + 1) % 6} (tower" in page.inner_text("#unit-title")
    assert "without a data set" in page.inner_text("#excites")
    page.keyboard.press("Escape")
    assert page.is_hidden("#unit")
    assert page.evaluate("document.activeElement.closest('#strongest-conv1-1') !== null")


def test_a_unit_shows_the_patches_that_excite_it_most(open_page: Any, prepared: Path) -> None:
    model, split = random_model(SMALL), open_dataset(prepared).split("val")
    patches = {"data": "drawn", **find_patches(model, split, lambda _: None)}
    top = find_top_activations(iterate_activations(split, Session(model, layers=["conv3"])), 1)
    assert top is not None
    page = open_page(model, patches=patches).page
    page.evaluate("openUnit(layers.conv3, 5)")
    page.wait_for_selector("#excites canvas")
    assert "gray: beyond the edge" in page.inner_text("#excites")
    assert page.locator("#excites canvas").count() == patches["count"]
    pixels = "[...document.querySelector('#excites canvas').getContext('2d').getImageData(0, 0, 48, 48).data]"
    seen = np.array(page.evaluate(pixels), np.uint8).reshape(48, 48, 4)[:, :, :3]
    image = images.decode(bytes(split.jpeg(int(top.rows[5, 0]))))
    y, x = top.positions[5, 0].tolist()
    patch = Image.fromarray(cut_receptive_field(image, SMALL, "conv3", (y, x))).resize((48, 48))
    assert abs(seen.astype(int) - np.asarray(patch)).mean() < 8, "but for the compression of the sheet"


@pytest.mark.parametrize(
    "layer",
    [pytest.param("conv3", marks=pytest.mark.slow), "conv4", pytest.param("fc6", marks=pytest.mark.slow), "fc7"],
)
def test_a_unit_names_the_inputs_of_its_largest_weights(open_page: Any, layer: str) -> None:
    model = random_model(replace(SMALL, width=1 / 8), 7)
    page, weight = open_page(model).page, round_weights(model).tensors[f"{layer}.weight"]
    unit, maps = len(weight) - 1, {"conv3": 32, "conv4": 24, "fc6": 32, "fc7": 512}[layer]
    page.evaluate(f"openUnit(layers.{layer}, {unit})")
    page.wait_for_selector("#listens button")
    filters = weight[unit].reshape(maps, -1)
    first = 24 if layer == "conv4" else 0  # of tower 2, which sees only itself
    expected = []
    for i in np.argsort(-(filters**2).sum(1), kind="stable")[:6]:
        balance = filters[i].sum() / abs(filters[i]).sum()
        sign = "±" if abs(balance) < 1 / 3 else "+" if balance > 0 else "−"
        tower = 2 if first or i >= maps // 2 else 1
        expected.append(f"{sign} unit {first + i} (tower {tower})")
    shown = page.locator("#listens button").all_inner_texts()
    assert [" ".join(text.split()) for text in shown] == expected


@pytest.mark.slow
def test_a_file_that_is_no_picture_is_named_where_the_reader_is(open_page: Any, tmp_path: Path, picture: str) -> None:
    (tmp_path / "letter.png").write_text("Dear Sir")
    page = open_page(random_model(SMALL), size=(390, 844))
    page.page.evaluate("byId('title-conv3').scrollIntoView()")
    page.page.set_input_files("#file", tmp_path / "letter.png")
    page.page.wait_for_selector("#status:visible")
    assert page.page.inner_text("#status").startswith("letter.png cannot be read as a picture")
    box = page.page.locator("#status").bounding_box()
    assert 0 < box["y"] < box["y"] + box["height"] < 844
    page.choose(picture)
    assert page.page.is_hidden("#status")


@pytest.mark.slow
def test_nothing_is_hidden_in_a_column_that_scrolls(open_page: Any) -> None:
    page = open_page(random_model(SMALL)).page
    assert page.evaluate("document.querySelector('.side').scrollHeight <= document.querySelector('.side').clientHeight")
    assert page.locator("#occlude").bounding_box()["y"] < 800 - 40


@pytest.mark.slow
@pytest.mark.parametrize("width", [1280, 1440, 1920])
def test_switches_and_answers_stay_in_view_with_layer_5(open_page: Any, width: int) -> None:
    page = open_page(random_model(SMALL), size=(width, 800)).page
    page.evaluate("byId('title-conv5').scrollIntoView()")
    for selector in ("#title-conv5", "#maps-conv5-1", "#picture", "#answers", ".switches"):
        box = page.locator(selector).bounding_box()
        assert 0 <= box["y"] < box["y"] + box["height"] <= 800
    assert page.locator("main").bounding_box()["width"] > 0.97 * width


def test_each_row_has_the_answers_of_its_network(open_page: Any) -> None:
    page = open_page(random_model(SMALL, 3))
    page.wait("compared", "1")
    page.page.evaluate(
        "showCompared([[[.7, .2, .1], [.5, .4, .1]], [[.1, .3, .6], [0, 1, 0]], [[.8, .2, 0], [1, 0, 0]]])"
    )
    cells = page.page.evaluate(
        "[...document.querySelectorAll('#towers td')]"
        ".map((cell) => cell.innerText.replace(/[\\u2068\\u2069]/g, '').replaceAll('\\u00a0', ' '))"
    )
    assert cells == [
        "class 0 70 %", "class 0 50 %", "class 2 60 %", "class 1 100 %", "class 0 80 %", "class 0 100 %",
    ]  # fmt: skip


def test_the_page_says_how_often_each_tower_alone_is_right(open_page: Any, prepared: Path) -> None:
    dataset = open_dataset(prepared)
    split, names = dataset.split("val"), [name.name for name in dataset.classes]
    model = replace(random_model(SMALL, len(names)), classes=dataset.classes)
    measured = measure_towers(model, dataset, lambda _: None)
    page = open_page(model, towers={"data": "drawn", **measured}).page
    rows = [row.locator(".share").all_inner_texts() for row in page.locator("#shares tr").all()]
    text, most_of = plain_text(page, "#measured-text"), list[str]()
    pictures = [Image.fromarray(images.decode(bytes(split.jpeg(row)))) for row in range(len(split))]
    for row, silenced in zip(rows, (None, 2, 1), strict=True):
        session = Session(model if silenced is None else silence_tower(model, silenced))
        for bar, mode, condition in zip(row, ("RGB", "L"), ("in color", "without color"), strict=True):
            crops = [make_views(np.asarray(picture.convert(mode).convert("RGB")), 224, 1) for picture in pictures]
            answers = session.probabilities(np.concatenate(crops)).argmax(1)
            share = format_share((answers == split.labels).mean())
            assert " ".join(bar.split()).startswith(f"{share} {condition}")
            most = np.bincount(answers, minlength=len(names))
            if silenced and mode == "RGB" and most.max() > len(split) / 2:
                calls = f"{format_share(most.max() / len(split))} of them \u2068{names[most.argmax()]}\u2069"
                most_of.append(f"tower {3 - silenced} calls {calls}")
    assert all("better than guessing" in bar for row in rows[1:] for bar in row), "random weights know nothing"
    assert ("Alone, " + ", ".join(most_of) in text) if most_of else ("Alone" not in text)
    constant = np.bincount(split.labels).max() / len(split)
    assert f"guessing (always the most frequent class), {format_share(constant)}." in text


def format_share(share: float) -> str:
    if share < 0.0005:
        return "< 0.1 %"
    return f"{share:.0%}".replace("%", " %") if share > 0.0995 else f"{share:.1%}".replace("%", " %")


@pytest.mark.slow
def test_the_picture_chosen_last_is_shown(open_page: Any) -> None:
    page, shown = open_page(random_model(SMALL)), "byId('picture').toDataURL()"
    page.answers("showCanvas(drawings[1].draw())")
    expected = page.page.evaluate(shown)
    page.page.evaluate("""async () => {
        const file = await new Promise((resolve) => drawings[2].draw().toBlob(resolve)), late = showFile(file);
        showCanvas(drawings[1].draw());
        await late;
    }""")
    page.answers()
    assert page.page.evaluate(shown) == expected


@pytest.mark.slow
def test_a_new_picture_is_shown_at_once_and_the_old_answers_are_pale(open_page: Any) -> None:
    page = open_page(random_model(SMALL))
    state = "[byId('answers').getAttribute('aria-busy'), byId('time').textContent.split(' ')[0]]"
    assert page.page.evaluate(state) == ["false", "Computed"]
    before, at_once, now = page.page.evaluate(
        f"() => {{ const before = picture; showCanvas(drawings[1].draw()); return [before, picture, {state}]; }}"
    )
    assert now == ["true", "Computing…"]
    page.wait("done", "2")
    assert page.page.evaluate(state) == ["false", "Computed"]
    before, at_once, exact = (np.array(pixels) for pixels in (before, at_once, page.page.evaluate("picture")))
    assert abs(at_once - exact).mean() < 3, "but for how the browser resizes"
    assert abs(before - exact).mean() > 30


@pytest.mark.slow
def test_unpacking_is_on_show_until_there_are_answers(browser: Browser, tmp_path: Path) -> None:
    write_page(build_page(random_model(SMALL), "page"), tmp_path / "page.html")
    page = browser.new_page()
    page.add_init_script("""
        window.seen = {};
        new MutationObserver((changes) => changes.forEach(({ attributeName }) =>
            seen[attributeName] = document.getElementById("status").innerText,
        )).observe(document, { subtree: true, attributeFilter: ["data-ready", "data-done"] });
    """)
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("html[data-done]", state="attached")
    assert page.evaluate("seen") == {"data-ready": "Unpacking the network …", "data-done": ""}
    page.close()


@pytest.mark.slow
def test_the_towers_lead_to_layer_5_if_there_are_pictures_of_it(open_page: Any) -> None:
    model, patches = random_model(SMALL), {"images": 9, "data": "drawn", "sheets": {"conv5": "data:,"}}
    assert open_page(model).page.locator("#division a").count() == 0
    page = open_page(model, patches=patches, size=(390, 844)).page
    page.click("#division a")
    title, bar = (page.locator(selector).bounding_box() for selector in ("#title-conv5", ".switches"))
    assert 0 <= title["y"] - bar["y"] - bar["height"] < 100


@pytest.mark.slow
def test_the_page_does_not_move_when_a_tower_goes_off(open_page: Any) -> None:
    page, top = open_page(random_model(SMALL)), "byId('network').getBoundingClientRect().top"
    before = page.page.evaluate(top)
    page.answers("byId('tower-2').click()")
    assert page.page.is_visible("#switch-text")
    assert page.page.evaluate(top) == before


@pytest.mark.slow
def test_a_large_picture_is_made_smaller_first(open_page: Any, tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (8000, 3000), (200, 40, 10)).save(large)
    page = open_page(random_model(SMALL))
    page.page.evaluate(
        "makeCanvas = ((make) => (...size) => (sizes.push(size), make(...size)))(makeCanvas, window.sizes = [])"
    )
    page.choose(large)
    pixels = page.page.evaluate("Math.max(...sizes.map(([width, height]) => width * height || 0))")
    assert 0.99 * 2**24 < pixels < 1.01 * 2**24
    assert page.page.evaluate("[...picture.subarray(0, 3)]") == [200, 40, 10]


@pytest.mark.slow
def test_the_webcam_is_released(open_page: Any) -> None:
    page = open_page(random_model(SMALL))
    page.page.evaluate("""() => {
        const canvas = drawings[1].draw();
        navigator.mediaDevices.getUserMedia = async () => (window.stream = canvas.captureStream(30));
        setInterval(() => canvas.getContext("2d").fillRect(0, 0, 9, 9), 20);
    }""")
    for statement in ("byId('webcam').click()", "showCanvas(drawings[0].draw())"):
        page.page.click("#webcam")
        page.page.wait_for_selector("#video:visible")
        assert page.page.inner_text("#webcam") == "Take the picture"
        page.answers(statement)
        assert page.page.evaluate("stream.getTracks().map((track) => track.readyState)") == ["ended"]
        assert page.page.is_hidden("#video")
        assert page.page.inner_text("#webcam") == "Use the webcam"


# ---- Without a browser ----


def run(*words: str) -> Result:
    from alexnet_plugins.export.command import export as command

    app = Typer()
    app.command()(command)
    return CliRunner().invoke(app, list(words))


def test_command_writes_the_page_and_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(random_model(SMALL), tmp_path / "model.safetensors")
    result = run("-w", "model.safetensors", "--format", "html", "--json", "-q")
    assert result.exception is None
    record = json.loads(result.stdout)
    assert record["schema"] == "alexnet.export/1"
    assert record["path"] == "alexnet.html"
    assert record["bytes"] == (tmp_path / "alexnet.html").stat().st_size
    assert record["patches"] == 0
    assert 0 < record["max_abs_difference"] < ORIGINAL
    assert not list(tmp_path.glob(".*")), "no temporary file is left"


def test_no_patches_leaves_the_images_of_the_data_set_out(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(random_model(SMALL), tmp_path / "model.safetensors")
    words = ("-w", "model.safetensors", "--format", "html", "--data", str(prepared), "--json")
    result = run(*words)
    assert json.loads(result.stdout)["patches"] == len(open_dataset(prepared).split("val"))
    assert "contains parts of images" in result.stderr
    assert "image/webp" in (tmp_path / "alexnet.html").read_text("utf-8")
    assert json.loads(run(*words, "--no-patches").stdout)["patches"] == 0
    assert "image/webp" not in (tmp_path / "alexnet.html").read_text("utf-8")


def test_no_patches_keeps_how_often_each_tower_is_right(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    dataset, words = open_dataset(prepared), ("--format", "html", "--data", str(prepared), "--no-patches")
    for name, classes in (("same", dataset.classes), ("other", tuple(ClassName(f"{i}") for i in range(9)))):
        save_model(replace(random_model(SMALL, len(classes)), classes=classes), tmp_path / f"{name}.safetensors")
        result = run("-w", f"{name}.safetensors", *words, "-o", f"{name}.html", "--no-verify")
        assert result.exception is None
        text = (tmp_path / f"{name}.html").read_text("utf-8")
        about = json.loads(text.split('id="about">')[1].split("</script>")[0])
        assert bool(about["measured"]) == (name == "same")
        assert ("cannot show how often each tower is right" in result.stderr) == (name == "other")


@pytest.mark.parametrize(
    "words",
    [
        ("--format", "html", "--precision", "int8"), ("--format", "html", "--calibrate", "x"),
        ("--format", "html", "--hub", "x"), ("--no-patches",), ("--format", "html", "-o", "page.onnx"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(random_model(SMALL), tmp_path / "model.safetensors")
    assert isinstance(run("-w", "model.safetensors", *words, "-q").exception, UsageError)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_damaged_weights_are_refused() -> None:
    model = random_model(SMALL)
    model.tensors["fc7.weight"][0, 0] = np.nan
    with pytest.raises(WeightsError, match="fc7"):
        build_page(model, "damaged")


def test_the_file_at_quarter_width_is_under_six_megabytes() -> None:
    assert sum(map(len, build_page(random_model(RECIPES["tiny"], 1000), "tiny"))) < 6e6


@pytest.mark.slow
def test_the_file_at_full_width_is_under_seventy_megabytes() -> None:
    assert sum(map(len, build_page(random_model(PAPER, 1000), "paper"))) < 70e6


@pytest.mark.slow
def test_the_page_does_not_take_chance_for_a_color_tower(open_page: Any) -> None:
    random = random_model(replace(SMALL, conv1_width=0.25))
    gray = random.tensors["conv1.weight"].copy()
    half = len(gray) // 2
    gray[:half] = gray[:half].mean(axis=1, keepdims=True)
    for weight, words in ((random.tensors["conv1.weight"], "may be chance"), (gray, "differ in color, too")):
        page = open_page(replace(random, tensors={**random.tensors, "conv1.weight": weight})).page
        measured = measure_specialization(split_towers(weight, 2))
        assert measured.p_value is not None
        count = f"about {100 * measured.p_value:.0f}" if measured.p_value >= 0.005 else "fewer than 1"
        divided = f"divided at random into two halves, the same filters differ as much in {count} of 100 tries."
        assert f"{words}: {divided}" in plain_text(page, "#layers section >> nth=0")
        assert f"Filters, {100 * measured.means[1]:.0f} % color" in plain_text(page, ".tower.tower-2 >> nth=0")
