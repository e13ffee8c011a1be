"""The report in a real browser: no console message, no request, usable with a keyboard and on paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pytest

from report_cases import hostile_data, make_run, report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SIZES = ((360, 740), (1280, 800))
PAGES = ("full", "bare", "tables", "compared")
NOT_FULL = [pytest.param(name, marks=pytest.mark.slow) for name in PAGES[1:]]


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A report with everything, one of a run without anything yet, one without charts, one of two runs."""
    folder = tmp_path_factory.mktemp("browser")
    data = hostile_data(folder / "data")
    runs = {name: make_run(folder / "runs", data, name, epochs=0 if name == "bare" else 6) for name in PAGES[:3]}
    compared = folder / "compared.html"
    assert report(str(runs["full"].path), str(runs["tables"].path), "-o", str(compared), "-q").exit_code == 0
    with pytest.MonkeyPatch.context() as patch:
        for name, run in runs.items():
            if name == "tables":
                patch.setattr("alexnet_cli.core.report.page.can_draw", lambda: False)
            assert report("-w", str(run.path), "-q").exit_code == 0
    return {name: run.path / "report.html" for name, run in runs.items()} | {"compared": compared}


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails the test if the console says anything, or a script fails."""
    opened = browser.new_page()
    said: list[str] = []
    opened.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    opened.on("pageerror", lambda error: said.append(str(error)))
    yield opened
    opened.close()
    assert said == []


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["full", *NOT_FULL])
def test_it_loads_nothing_and_fits_the_screen(
    page: Page, pages: dict[str, Path], name: str, size: tuple[int, int]
) -> None:
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.goto(pages[name].as_uri())
    assert [url for url in asked if not url.startswith("data:")] == [pages[name].as_uri()]
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") == size[0]
    wide = "e => !e.closest('.scroll, .skip') && e.scrollWidth > innerWidth"
    outside = f"[...document.querySelectorAll('body *')].filter({wide}).map(e => e.outerHTML.slice(0, 80))"
    assert page.evaluate(outside) == []
    drawn = "[...document.images].map(i => i.complete && i.naturalWidth > 0 && i.alt.length > 0)"
    assert all(page.evaluate(drawn))


@pytest.mark.parametrize(
    ("name", "size", "scheme"),
    [
        ("full", SIZES[0], "light"),
        pytest.param("full", SIZES[1], "dark", marks=pytest.mark.slow),
        *(pytest.param(name, SIZES[0], "light", marks=pytest.mark.slow) for name in PAGES[1:]),
    ],
)
def test_axe_finds_nothing(
    page: Page, pages: dict[str, Path], name: str, size: tuple[int, int], scheme: Literal["light", "dark"]
) -> None:
    """Contrast, labels, order of headings, landmarks, boxes that a keyboard cannot scroll, and a hundred more."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": size[0], "height": size[1]})
    page.goto(pages[name].as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    response = axe.run(page).response
    assert [(v["id"], [node["html"] for node in v["nodes"]]) for v in response["violations"]] == []


def test_a_keyboard_reaches_the_skip_link_the_contents_and_wide_tables(page: Page, pages: dict[str, Path]) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    page.goto(pages["full"].as_uri())
    focused = "document.activeElement"
    page.keyboard.press("Tab")
    assert page.evaluate(f"{focused}.textContent") == "Skip to the report"
    box = page.evaluate(f"{focused}.getBoundingClientRect().left")
    assert box >= 0, "it is to be seen while it has the focus"
    page.keyboard.press("Enter")
    assert page.evaluate(f"{focused}.id") == "main"
    reached = set()
    for _ in range(40):
        page.keyboard.press("Tab")
        reached.add(page.evaluate(f"{focused}.className || {focused}.tagName"))
        if page.evaluate(f"{focused}.scrollWidth > {focused}.clientWidth"):
            page.keyboard.press("ArrowRight")
            for _ in range(200):  # not wait_for_function, which the page's own policy keeps from asking twice
                if page.evaluate(f"{focused}.scrollLeft > 0"):
                    break
                page.wait_for_timeout(50)
            assert page.evaluate(f"{focused}.scrollLeft > 0")
            break
    else:
        pytest.fail(f"no box to scroll was reached, but {reached}")
    assert page.evaluate(f"getComputedStyle({focused}).outlineStyle") == "solid"


@pytest.mark.slow
def test_wide_tables_scroll_inside_their_box_on_a_phone(page: Page, pages: dict[str, Path]) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    for name in ("full", "compared"):
        page.goto(pages[name].as_uri())
        widest = "[...document.querySelectorAll('.scroll')].sort((a, b) => a.scrollWidth - b.scrollWidth).at(-1)"
        moved = f"(e => (e.scrollLeft = 50, [e.scrollLeft, e.tabIndex, e.clientWidth <= 390 - 32]))({widest})"
        assert page.evaluate(moved) == [50, 0, True]
        assert page.evaluate("document.documentElement.scrollWidth") == 390


@pytest.mark.slow
def test_on_a_desktop_the_contents_stay_left_of_the_report(page: Page, pages: dict[str, Path]) -> None:
    page.set_viewport_size({"width": 1440, "height": 900})
    page.goto(pages["full"].as_uri())
    page.evaluate("document.documentElement.style.scrollBehavior = 'auto'; scrollTo(0, document.body.scrollHeight)")
    contents, section = (page.locator(name).bounding_box() for name in ("nav", "main"))
    assert contents
    assert section
    assert 0 <= contents["y"] < 900
    assert contents["x"] + contents["width"] < section["x"]
    assert section["width"] > 0.75 * 1440
    network, recipe, origin = (page.locator(f"#{name}").bounding_box() for name in ("network", "recipe", "origin"))
    assert network
    assert recipe
    assert origin
    assert network["y"] == recipe["y"] < origin["y"]
    assert network["x"] < recipe["x"] == origin["x"]


def test_a_screen_reader_hears_the_names(page: Page, pages: dict[str, Path]) -> None:
    page.goto(pages["full"].as_uri())
    assert page.get_by_role("navigation", name="Contents").get_by_role("link").count() == 10
    assert page.get_by_role("main").count() == 1
    assert page.get_by_role("img", name="Loss over the epochs").count() == 1
    assert page.get_by_role("table", name="The most frequent mistakes").get_by_role("rowheader").count() > 0
    assert page.get_by_text("Loss: training falls from 2.000 to 0.333;").count() == 1
    assert page.title() == "AlexNet, run full"


@pytest.mark.slow
def test_it_prints_whole_figures_and_no_navigation(page: Page, pages: dict[str, Path], tmp_path: Path) -> None:
    page.goto(pages["full"].as_uri())
    page.emulate_media(media="print")
    assert not page.get_by_role("navigation").is_visible()
    assert page.evaluate("getComputedStyle(document.querySelector('figure')).breakInside") == "avoid"
    page.set_viewport_size({"width": 680, "height": 1000})  # A4 without its margins
    cut = "[...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > innerWidth).map(e => e.innerText)"
    assert page.evaluate(cut) == []
    assert page.evaluate("document.documentElement.scrollWidth") == 680
    assert page.get_by_text("Loss (nats per image) and error").is_visible(), "what is folded is printed"
    assert not page.get_by_text("Settings with the paper's value", exact=True).is_visible(), "but for what is as ever"
    content = page.pdf(path=str(tmp_path / "report.pdf"), format="A4")
    assert content.startswith(b"%PDF")
