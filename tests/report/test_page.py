"""`alexnet report`: the page agrees with metrics.csv and eval/, and names what is missing."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageSequence
from typer import Typer
from typer.testing import CliRunner

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.evaluation.evaluate import Evaluation
from alexnet_cli.core.evaluation.results import summarize
from alexnet_cli.core.model import model_file
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.report import page as report_page
from alexnet_cli.core.report.collect import Measurements, OpenedModel, collect_report
from alexnet_cli.core.report.history import History, read_history
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError, PartialError, UsageError, WeightsError
from alexnet_cli.recipe import PAPER
from alexnet_plugins.evaluate import evaluate
from model_files import random_model, save_model
from report_cases import HOSTILE, NAMES, RECIPE, Page, hostile_data, make_run, read_result, report
from trainings import new_loop


def read(run: Run) -> Model:
    """Its best checkpoint."""
    return model_file.read_model(run.checkpoints / "best" / "model.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return hostile_data(tmp_path_factory.mktemp("hostile"))


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory, data: Dataset) -> Run:
    """A run with its report."""
    run = make_run(tmp_path_factory.mktemp("runs"), data)
    assert read_result(report("-w", str(run.path), "--json", "-q"))["path"] == str(run.path / "report.html")
    return run


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without charts, which take half a second."""
    monkeypatch.setattr("alexnet_cli.core.report.page.can_draw", lambda: False)


@pytest.fixture
def copy(shown: Run, tmp_path: Path) -> Run:
    """Another one like it, to be changed."""
    shutil.copytree(shown.path, tmp_path / "copy")
    return Run(tmp_path / "copy")


def test_tables_agree_with_metrics_csv_and_eval(shown: Run) -> None:
    page = Page(shown.path / "report.html")
    with (shown.path / "metrics.csv").open(newline="") as file:
        epochs = list(csv.DictReader(file))
    heads, *rows = page.tables["Loss (nats per image) and error (% of images) of each epoch"]
    assert heads[:6] == [
        "Epoch", "Training loss", "Validation loss", "Training top-1", "Validation top-1", "Validation top-5"
    ]  # fmt: skip
    for row, epoch in zip(rows, epochs, strict=True):
        assert row[0] == epoch["epoch"]
        assert [float(v) for v in row[1:3]] == pytest.approx(
            [float(epoch["train_loss"]), float(epoch["loss"])], abs=5e-4
        )
        errors = [float(epoch[key]) for key in ("train_top1_error", "top1_error", "top5_error")]
        assert [float(v.rstrip("%")) / 100 for v in row[3:6]] == pytest.approx(errors, abs=5e-4)
        assert float(row[6]) == pytest.approx(float(epoch["lr"]))
    assert [row[0] for row in rows if row[-1]] == ["2", "4"]
    said = json.loads((shown.path / "eval" / "val-1.json").read_text())
    (row,) = page.tables["Errors with their 95% intervals"][1:]
    low, high = said["top1_error_interval"]
    assert row[1:3] == ["12", f"{said['top1_error']:.1%} ({low:.1%} to {high:.1%})"]
    with (shown.path / "eval" / "val-1_confusion.csv").open(newline="", encoding="utf-8") as file:
        matrix = [row[1:] for row in list(csv.reader(file))[1:]]
    caption = "Confusion matrix in images: rows are true classes, columns predicted classes"
    assert [row[1:] for row in page.tables[caption][1:]] == matrix
    lead = f"The network gets {said['top1_error']:.1%} of the 12 validation images of {shown.about['data']} wrong"
    assert (
        f"{lead} (top-1 error, center view; guessing: 83.3%). For {said['top5_error']:.1%}, the right class"
        in page.all_text
    )
    assert ("better than guessing (83.3%)." in page.all_text) == (high >= 5 / 6)


def test_what_each_tower_does_agrees_with_evaluate(shown: Run, tmp_path: Path) -> None:
    page = Page(shown.path / "report.html")
    app = Typer()
    app.command()(evaluate)
    words = ["-w", str(shown.path), "--towers", "--json", "-q", "-o", str(tmp_path)]
    table = json.loads(CliRunner().invoke(app, words).stdout)
    rows = page.tables["Images that are right, with 95% intervals, in color and gray"][1:]
    assert [row[0] for row in rows] == ["Whole network", "Tower 1 alone", "Tower 2 alone"]
    for row, color, gray in zip(rows, table["towers"][:3], table["towers"][3:], strict=True):
        right = [f"{1 - kind['top1_error']:.1%} (" for kind in (color, gray)]
        assert [cell[: len(share)] for cell, share in zip(row[1:], right, strict=False)] == right
        assert row[3].startswith(f"{100 * gray['lost_in_gray']:+.1f} (")
    classes = page.tables["Images of each class that are right"][1:]
    shares = [[1 - float(cell.partition("%")[0]) / 100 for cell in row[3:6]] for row in classes]
    np.testing.assert_allclose(shares, [row["top1_errors"][:3] for row in table["classes"]], atol=0.005)
    widths = re.findall(
        r'class="fill[ a-z]*" style="width: ([\d.]+)%', (shown.path / "report.html").read_text(encoding="utf-8")
    )
    drawn = [table["towers"][i]["top1_error"] for i in (0, 3, 1, 4, 2, 5)]
    drawn += [error for row in table["classes"] for error in row["top1_errors"][:3]]
    np.testing.assert_allclose([1 - float(width) / 100 for width in widths], drawn, atol=0.001)


def test_a_saved_comparison_of_the_towers_is_used_if_it_belongs_to_the_weights(copy: Run) -> None:
    file = copy.path / "eval" / "val-1-towers.json"
    saved, used = json.loads(file.read_text()), []
    saved["towers"][0]["top1_error"] = 0.123
    for change in ({}, {"weights_sha256": "0" * 64}, {"classes": "none"}):
        file.write_text(json.dumps(saved | change))
        read_result(report("-w", str(copy.path), "--json", "-q"))
        rows = Page(copy.path / "report.html").tables["Images that are right, with 95% intervals, in color and gray"]
        used.append(rows[1][1].startswith("87.7%"))
    assert used == [True, False, False]
    assert json.loads(file.read_text())["towers"][0]["top1_error"] != 0.123, "the new one is saved"


def test_a_single_tower_cannot_be_switched_off(data: Dataset, tmp_path: Path, undrawn: None) -> None:
    model = random_model(replace(RECIPE, towers=1), len(NAMES))
    path = save_model(replace(model, classes=data.classes), tmp_path / "one.safetensors")
    found = read_result(report("-w", str(path), "--data", str(data.path), "-o", f"{tmp_path}/r.html", "--json", "-q"))
    notes = {section["id"]: section["note"] for section in found["sections"]}
    assert notes["towers"] == "The network has a single tower: there is none to switch off."


def test_a_number_has_the_same_digits_in_a_caption_and_in_a_table(shown: Run) -> None:
    page = Page(shown.path / "report.html")
    _, first, *_, last = page.tables["Loss (nats per image) and error (% of images) of each epoch"]
    assert f"validation falls from {first[2]} to {last[2]}" in page.all_text
    assert f"validation top-1 falls from {first[4]} to {last[4]}" in page.all_text
    _, first, *_, last = page.tables["AUC and color share after each epoch"]
    assert f"AUC rises from {first[1]} to {last[1]}" in page.all_text


@pytest.mark.parametrize(
    ("precision", "resumed", "row", "is_noted"),
    [
        ("fp32", [], "fp32", False),
        ("fp32", [{"precision": "bf16"}], "bf16 (recipe: fp32)", True),
        ("bf16", [{"precision": "fp32"}], "fp32", False),
        (None, [], "", False),
    ],
)
def test_the_precision_is_that_of_the_last_start(
    data: Dataset, tmp_path: Path, undrawn: None, precision: str | None, resumed: list[Any], row: str, is_noted: bool
) -> None:
    run = make_run(tmp_path, data, precision=precision, resumed=resumed)
    page = Page(Path(read_result(report("-w", str(run.path), "--json", "-q"))["path"]))
    assert dict(page.tables["Speed of the training and its devices"][1:]).get("Precision", "") == row
    assert ("Both were computed in bf16; the other errors are computed in fp32" in page.all_text) == is_noted


def test_the_recipe_is_compared_with_the_paper(shown: Run) -> None:
    page = Page(shown.path / "report.html")
    differ = {row[0].split()[0]: row[1:3] for row in page.tables["Settings that differ from the paper"][1:]}
    assert differ == {
        "width": ["0.03125", "1"], "epochs": ["6", "90"], "schedule": ["fixed", "plateau"],
        "drop_epochs": ["[2, 4]", "none"], "batch_size": ["8", "128"],
    }  # fmt: skip
    same = page.tables["Settings with the paper's value"][1:]
    assert len(differ) + len(same) == len(PAPER.__dataclass_fields__) - 1  # all but the name


def test_parameter_counts_are_those_of_the_weights(shown: Run) -> None:
    """The drawing and the table are of the weights that are there."""
    page, tensors = Page(shown.path / "report.html"), read(shown).tensors
    heads, *rows = page.tables["Layers with weights, and the steps after each"]
    assert heads == ["Layer", "Kernel", "Inputs", "Maps or units", "Map size", "Then", "Parameters"]
    for name, *_, count in rows[1:-1]:
        assert int(count.replace(",", "")) == tensors[f"{name}.weight"].size + tensors[f"{name}.bias"].size
    total = sum(value.size for name, value in tensors.items() if name != "mean")
    assert rows[-1] == ["Total", "", "", "", "", "", f"{total:,}"]
    assert rows[3] == ["conv3", "3×3", "8, both towers", "6 + 6", "13×13", "ReLU", "876"]
    drawn = [image["alt"] or "" for image in page.images if (image["alt"] or "").startswith("The network")]
    assert [alt.partition("; ")[2] for alt in drawn] == [
        "each layer reads its own tower, and the towers meet in conv3, fc6, fc7 and fc8."
    ]


def test_class_names_are_escaped(shown: Run) -> None:
    page = Page(shown.path / "report.html")
    assert not page.tags & {"script", "iframe", "object", "link", "svg", "base", "form"}
    for image in page.images:
        assert (image["src"] or "").startswith("data:image/")
        assert image["alt"]
        assert "onerror" not in image
    caption = "Confusion matrix in images: rows are true classes, columns predicted classes"
    names = [row[0] for row in page.tables[caption][1:]]
    assert sorted(names) == sorted(name.replace("‮", "?") for name in NAMES)
    assert HOSTILE[0] in page.all_text
    assert "‮" not in page.all_text


def test_it_has_every_section_and_a_table_of_contents(shown: Run) -> None:
    page = Page(shown.path / "report.html")
    assert page.headings[0] == (1, f"AlexNet, run {shown.name}")
    assert all(after <= before + 1 for (before, _), (after, _) in zip(page.headings, page.headings[1:], strict=False))
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    assert {
        "network",
        "recipe",
        "curves",
        "filters",
        "results",
        "towers",
        "examples",
        "neighbors",
        "speed",
        "origin",
    } <= page.ids
    assert "Missing:" not in page.all_text
    assert "predictions among all 12 validation images, each" in page.all_text
    assert sum((image["alt"] or "").startswith("Training image of") for image in page.images) == 30
    correct = [image for image in page.images if "predicted correctly" in (image["alt"] or "")]
    wrong = [image for image in page.images if "predicted as" in (image["alt"] or "")]
    said = json.loads((shown.path / "eval" / "val-1.json").read_text())
    assert len(correct) == min(8, round(12 * said["top1_accuracy"]))
    assert len(wrong) == min(8, round(12 * said["top1_error"]))
    evidence = [image for image in page.images if "where the network saw" in (image["alt"] or "")]
    assert len(evidence) == len(wrong)


def test_the_same_run_gives_the_same_bytes(shown: Run, copy: Run, tmp_path: Path) -> None:
    for name in ("one.html", "two.html"):
        assert read_result(report("-w", str(copy.path), "-o", str(tmp_path / name), "--json", "-q"))["charts"] is True
    assert (tmp_path / "one.html").read_bytes() == (tmp_path / "two.html").read_bytes()
    assert (tmp_path / "one.html").stat().st_size < 1e6


def test_saved_results_are_used_if_they_belong_to_the_weights(copy: Run) -> None:
    file, index = copy.path / "eval" / "val-1.json", copy.path / "neighbors" / "fc7.npy"
    said, made = json.loads(file.read_text()), index.stat().st_mtime_ns
    assert said["weights_sha256"]
    for sha, loss in ((said["weights_sha256"], "4.321"), ("0" * 64, f"{said['loss']:.3f}")):
        file.write_text(json.dumps(said | {"loss": 4.321, "weights_sha256": sha}))
        read_result(report("-w", str(copy.path), "--json", "-q"))
        page = Page(copy.path / "report.html")
        assert page.tables["Errors with their 95% intervals"][1][-1] == loss
    assert index.stat().st_mtime_ns == made
    file.write_text("{")
    assert read_result(report("-w", str(copy.path), "--json", "-q"))["top1_error"] == said["top1_error"]


def test_another_checkpoint_has_a_page_of_its_own(copy: Run) -> None:
    kept = ("report.html", "eval/val-1.json", "neighbors/index.json")
    before = {copy.path / name: (copy.path / name).read_bytes() for name in kept}
    other = copy.checkpoints / "00000099"
    other.mkdir()
    save_model(
        replace(random_model(RECIPE, len(NAMES), seed=7), classes=read(copy).classes), other / "model.safetensors"
    )
    found = read_result(report("-w", str(other), "--json", "-q"))
    assert found["path"] == str(copy.path / "report-00000099.html")
    assert found["top1_error"] is not None
    assert {path: path.read_bytes() for path in before} == before


def test_drops_are_marked_after_the_epochs_that_the_schedule_has(prepared: Path, tmp_path: Path) -> None:
    """The records are those of a real training, and the lines are at the ticks of these epochs."""

    from alexnet_cli.core.data.shards import open_dataset
    from alexnet_cli.core.parallel.placement import place
    from alexnet_cli.core.report.charts import draw_charts

    recipe = replace(PAPER, width=1 / 32, batch_size=48, epochs=5, schedule="fixed", drop_epochs=(1, 3))
    run = Run.create("drops", recipe, {}, tmp_path)
    list(new_loop(recipe, open_dataset(prepared), run, place("none", "fp32"), 1).fit())
    history = read_history(run.records(), recipe)
    assert history.drops == (1, 3)
    drawn = draw_charts(history)["loss"]
    assert drawn.caption.endswith("the learning rate drops after epochs 1, 3.")
    lines = re.findall(
        r'd="M ([\d.]+) [\d.]+ *\nL ([\d.]+) [\d.]+ *\n" clip-path="[^"]*" style="[^"]*#555555', drawn.svg
    )
    ticks = re.findall(r'id="xtick_\d+">.*?<use [^>]*x="([\d.]+)".*?<text[^>]*>(\d+)</text>', drawn.svg, re.DOTALL)
    places = {label: float(x) for x, label in ticks}
    assert [float(a) for a, _ in lines] == pytest.approx([places["1"], places["3"]], abs=0.01)
    assert all(a == b for a, b in lines)


def test_time_and_speed_are_those_of_the_steps(shown: Run) -> None:
    history: History = read_history(shown.records(), RECIPE)
    assert history.seconds == pytest.approx(6 * 20 * 8 / 40)
    assert history.speed == 40
    assert "24 s, without validation and pauses" in Page(shown.path / "report.html").all_text
    broken: list[dict[str, Any]] = [
        {},
        {"event": "validation"},
        {"event": "step", "step": "x"},
        {"event": "validation", "epoch": 1, "loss": None},
    ]
    assert read_history(broken, RECIPE).seconds is None


def test_without_matplotlib_there_are_tables(copy: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alexnet_cli.core.report.page.can_draw", lambda: False)
    monkeypatch.setattr("alexnet_cli.core.report.charts.can_draw", lambda: False)
    result = report("-w", str(copy.path))
    assert result.exit_code == 0
    assert "pip install 'alexnet-cli[charts]'" in result.stderr
    assert f"saved   {copy.path}/report.html · " in result.stderr
    page = Page(copy.path / "report.html")
    assert "pip install 'alexnet-cli[charts]', then alexnet report" in page.all_text
    assert not [image for image in page.images if "svg" in (image["src"] or "")]
    assert (copy.path / "report.html").read_text().count("<details open>") == 3


def test_a_run_whose_data_set_is_gone(copy: Run, data: Dataset) -> None:
    shutil.rmtree(copy.path / "eval")
    copy.update({"data_path": "/nowhere/at/all"})
    notes = {s["id"]: s["note"] for s in read_result(report("-w", str(copy.path), "--json", "-q"))["sections"]}
    assert notes["results"].startswith(f"Missing: the data set {data.name} cannot be opened: /nowhere/at/all is not a ")
    assert {notes["results"]} == {notes["examples"], notes["neighbors"]}.union({notes["results"]})
    assert notes["filters"] is notes["curves"] is None
    assert read_result(report("-w", str(copy.path), "--json", "-q", "--data", str(data.path)))["top1_error"] is not None


def test_another_data_set_than_the_runs_is_named(copy: Run, prepared: Path) -> None:
    copy.update({"data_path": str(prepared)})
    notes = {s["id"]: s["note"] for s in read_result(report("-w", str(copy.path), "--json", "-q"))["sections"]}
    assert "the run was trained on another data set than" in notes["results"]
    result = report("-w", str(copy.path), "--data", str(prepared))
    assert isinstance(result.exception, PartialError)
    assert "unknown to the network" in Page(copy.path / "report.html").all_text
    assert isinstance(report("-w", str(copy.path), "--data", "nowhere").exception, DataError)


def test_the_page_names_the_data_set_it_measured_on(copy: Run, data: Dataset, tmp_path: Path) -> None:
    other = tmp_path / "prepared" / "other"
    shutil.copytree(data.path, other)
    (other / "dataset.json").write_text(json.dumps(data.record | {"name": "other"}))
    index = (copy.path / "neighbors" / "index.json").read_bytes()
    assert read_result(report("-w", str(copy.path), "--data", str(other), "--json", "-q"))["data"] == str(other)
    text = Page(copy.path / "report.html").all_text
    assert "of the 12 validation images of other wrong" in text
    assert f"Data set{data.name}" in text
    assert "Measured onother" in text
    assert (copy.path / "neighbors" / "index.json").read_bytes() == index, "it is that of the run's own data"
    assert (copy.path / "eval" / "val-1-other.json").is_file()


def find_replay(run: Run) -> list[bytes]:
    """The animation of the filters on the page, and the still picture for readers who want no motion."""
    text = (run.path / "report.html").read_text()
    found = re.search(r'<source media="\(prefers-reduced-motion: reduce\)" srcset="([^"]*)"><img src="([^"]*)"', text)
    uris = (found[2], found[1]) if found else ()
    return [base64.b64decode(uri.removeprefix("data:image/webp;base64,")) for uri in uris]


@pytest.mark.usefixtures("undrawn")
def test_the_filters_are_replayed_from_three_epochs_on(copy: Run) -> None:
    weight = read(copy).tensors["conv1.weight"]
    for epoch in range(4):
        if epoch == 2:  # two are kept
            read_result(report("-w", str(copy.path), "--json"))
            assert find_replay(copy) == []
        copy.keep_filters(epoch, weight * np.float32((1 + epoch) / 4))
    read_result(report("-w", str(copy.path), "--json"))
    animation, still = (Image.open(io.BytesIO(data)) for data in find_replay(copy))
    frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
    [last] = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(still)]
    assert len(frames) == 4
    assert (frames[-1] == last).all()
    assert (frames[0] != last).any()
    (copy.path / "conv1" / "0002.npy").write_bytes(b"damaged")
    read_result(report("-w", str(copy.path), "--json"))
    assert find_replay(copy) == []


@pytest.mark.usefixtures("undrawn")
def test_epochs_may_have_been_added_since_the_best_checkpoint(copy: Run, tmp_path: Path) -> None:
    (copy.path / "recipe.toml").write_text(replace(RECIPE, epochs=12).to_toml())
    report_page.write_page(collect_report(copy, OpenedModel(read(copy), ""), "none"), tmp_path / "page.html")
    assert "Epochs6 of 12" in Page(tmp_path / "page.html").all_text


@pytest.mark.usefixtures("undrawn")
def test_the_page_has_the_command_that_repeats_the_run(copy: Run, tmp_path: Path) -> None:
    first, then = ["alexnet", "train", "--name", "my run"], ["alexnet", "train", "--resume", "my run"]
    for path, words, shown in (
        ("/x/prepared/pets", first, "alexnet train --name 'my run' --data pets"),
        ("/x/my pets", first, "alexnet train --name 'my run' --data '/x/my pets'"),
        (str(Path("pets").resolve()), first, "alexnet train --name 'my run' --data pets"),
        ("/x/pets", [*first, "--data=x"], "alexnet train --name 'my run' --data=x"),
    ):
        copy.update({"data_path": path, "command": words, "resumed": [{"command": then}]})
        report_page.write_page(collect_report(copy, None, "none"), tmp_path / "page.html")
        rows = Page(tmp_path / "page.html").tables["Command, data and versions"]
        assert rows[1:3] == [["Command", shown], ["Then", "alexnet train --resume 'my run'"]]


def test_a_damaged_image_leaves_the_other_sections(copy: Run, data: Dataset, tmp_path: Path) -> None:
    shutil.copytree(data.path, tmp_path / "damaged")
    shard = tmp_path / "damaged" / "val-000000.tar"
    content = bytearray(shard.read_bytes())
    content[512 + 200 : 512 + 4000] = bytes(3800)
    shard.write_bytes(content)
    shutil.rmtree(copy.path / "eval")
    result = report("-w", str(copy.path), "--data", str(tmp_path / "damaged"), "-q")
    assert isinstance(result.exception, PartialError), result.exception
    assert "cannot be decoded" in Page(copy.path / "report.html").all_text


@pytest.mark.parametrize(
    ("layer", "factor", "absent"),
    [
        ("conv1", float("nan"), {"filters", "results", "towers", "examples", "neighbors"}),
        ("fc8", float("nan"), {"results", "towers", "examples", "neighbors"}),
        ("fc7", 1e20, {"neighbors"}),
    ],
)
@pytest.mark.filterwarnings("error")
def test_nan_weights_leave_the_other_sections(
    copy: Run, undrawn: None, layer: str, factor: float, absent: set[str]
) -> None:
    model = read(copy)
    broken = model.tensors[f"{layer}.weight"] * np.float32(factor)
    save_model(replace(model, tensors={**model.tensors, f"{layer}.weight": broken}), model.path)
    result = report("-w", str(copy.path), "--json", "-q")
    assert isinstance(result.exception, PartialError), result.exception
    sections = {s["id"]: s["note"] for s in json.loads(result.stdout)["sections"]}
    image_sections = {"filters", "results", "towers", "examples", "neighbors"}
    assert {name for name in image_sections if sections[name]} == absent
    assert ("computes NaN" if factor != factor else "too large to compare") in sections["neighbors"]


@pytest.mark.parametrize("status", ["running", "failed", "interrupted"])
def test_a_run_before_its_first_checkpoint(tmp_path: Path, data: Dataset, status: str) -> None:
    run = make_run(tmp_path, data, epochs=0, status=status)
    found = read_result(report("-w", str(run.path), "--json", "-q"))
    assert (found["weights"], found["top1_error"]) == (None, None)
    notes = {s["id"]: s["note"] for s in found["sections"]}
    assert notes["curves"] == "No step has been recorded yet."
    assert notes["filters"] == "The run has no checkpoint yet."
    assert notes["network"] is None, "its recipe says what it is, its data how many classes"
    said = {
        "running": "still training",
        "failed": "This run failed",
        "interrupted": "Continue it with: alexnet train --resume",
    }
    assert said[status] in Page(run.path / "report.html").all_text


def test_an_imported_network_has_no_training_sections(
    tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.create("caffe", RECIPE, {"status": "finished", "imported": {"file": "x.caffemodel", "format": "Caffe"}})
    save_model(replace(random_model(RECIPE, len(NAMES)), classes=data.classes), run.path / "model.safetensors")
    found = read_result(report("-w", "caffe", "--json", "-q"))
    sections = ["filters", "towers", "results", "examples", "neighbors", "network", "recipe", "origin"]
    assert [s["id"] for s in found["sections"]] == sections
    assert "no prepared data set under prepared; name one with alexnet report --data D" in found["sections"][1]["note"]
    page = Page(Path("runs/caffe/report.html"))
    assert "x.caffemodel" in page.all_text
    assert [image["alt"] for image in page.images if "filters of tower" in (image["alt"] or "")]


def test_an_unrelated_data_set_nearby_is_no_error(
    tmp_path: Path, prepared: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(prepared, "prepared/colors")
    save_model(random_model(RECIPE), Path("net.safetensors"))
    assert (
        "unknown to the network" in read_result(report("-w", "net.safetensors", "--json", "-q"))["sections"][1]["note"]
    )


def test_a_model_file_outside_a_run(tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    one = replace(RECIPE, towers=1)
    save_model(replace(random_model(one, len(NAMES)), classes=data.classes), Path("net.safetensors"))
    assert (
        read_result(report("-w", "net.safetensors", "--data", str(data.path), "--json", "-q"))["path"] == "report.html"
    )
    assert "no two towers to compare" in Page(Path("report.html")).all_text
    assert not Path("eval").exists()


def test_usage_errors(copy: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert isinstance(report("-w", "nothing").exception, WeightsError)
    assert isinstance(report().exception, WeightsError)
    assert isinstance(report("-w", str(copy.path), "-o", "page.pdf").exception, UsageError)


def page_of(path: Path, classes: Sequence[ClassName], confusion: Sequence[Sequence[int]]) -> Page:
    """The page of a network without a run that has answered so."""
    model = replace(random_model(replace(PAPER, width=1 / 32), len(classes)), classes=tuple(classes))
    counts = Evaluation(np.array(confusion, np.int64), np.array(confusion, np.int64).sum(axis=1))
    found = collect_report(None, OpenedModel(model, ""), "none")
    measurements = Measurements(((summarize(counts, 1, "torch"), counts),), missing=found.measurements.missing)
    report_page.write_page(replace(found, measurements=measurements), path)
    return Page(path)


@pytest.mark.usefixtures("undrawn")
def test_classes_with_the_same_name_get_their_wnid(tmp_path: Path) -> None:
    classes = [ClassName("crane", "n1"), ClassName("crane", "n2"), ClassName("dog", "n3")]
    page = page_of(tmp_path / "page.html", classes, [[5, 0, 3], [2, 5, 0], [0, 1, 9]])
    assert page.tables["All classes, lowest error first"] == [  # once, and of three no top-5
        ["Class", "Images", "Correct", "Most frequent mistake"],
        ["dog", "10", "90.0%", "crane (n2), once"],
        ["crane (n2)", "7", "71.4%", "crane (n1), 2 times"],
        ["crane (n1)", "8", "62.5%", "dog, 3 times"],
    ]
    assert page.tables["Errors with their 95% intervals"][0][-2:] == ["Top-1 error", "Loss"]
    assert page.tables["The most frequent mistakes"][2] == ["crane (n2)", "crane (n1)", "2"]


@pytest.mark.usefixtures("undrawn")
def test_a_class_without_correct_images_is_not_among_the_best(tmp_path: Path) -> None:
    shifted = np.roll(np.eye(24, dtype=int), 1, axis=1)
    shifted[:2] = np.eye(24, dtype=int)[:2]
    page = page_of(tmp_path / "page.html", [ClassName(f"class {i}") for i in range(24)], shifted.tolist())
    assert [row[0] for row in page.tables["Classes with the lowest error"][1:]] == ["class 0", "class 1"]
    assert len(page.tables["Classes with the highest error"]) == 11


@pytest.mark.usefixtures("undrawn")
def test_the_epoch_of_a_run_that_was_interrupted_in_it(tmp_path: Path, data: Dataset) -> None:
    run = make_run(tmp_path, data, epochs=1)
    report_page.write_page(collect_report(run, None, "none"), tmp_path / "page.html")
    assert "Epochs1 of 6" in Page(tmp_path / "page.html").all_text
    run.log({"event": "step", "epoch": 2, "step": 30, "loss": 1.0, "lr": 0.01})
    report_page.write_page(collect_report(run, None, "none"), tmp_path / "page.html")
    assert "Epochsin epoch 2 of 6" in Page(tmp_path / "page.html").all_text


@pytest.mark.usefixtures("undrawn")
def test_one_class_is_not_both_the_best_and_the_worst(tmp_path: Path) -> None:
    page = page_of(tmp_path / "page.html", [ClassName("a"), ClassName("b")], [[3, 1], [0, 0]])
    assert page.tables["The only class with images"][1:] == [["a", "4", "75.0%", "b, once"]]
    assert not [caption for caption in page.tables if "est error" in caption]


@pytest.mark.usefixtures("undrawn")
def test_invisible_characters_become_question_marks(tmp_path: Path) -> None:
    names = ["\u6771\u3000\u4eac\u00a0", "\U0001f469\u200d\U0001f52c", "a\u202eb\u2067c", "\x07\ud800\x85"]
    page = page_of(tmp_path / "page.html", [ClassName(name) for name in names], np.eye(4, dtype=int).tolist())
    caption = "Confusion matrix in images: rows are true classes, columns predicted classes"
    assert [row[0] for row in page.tables[caption][1:]] == [*names[:2], "a?b?c", "???"]


def test_a_thousand_classes_stay_readable_and_small(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    classes = tuple(ClassName(f"class {i}", None) for i in range(1000))
    model = replace(random_model(replace(PAPER, width=1 / 32), 1000), classes=classes)
    counts = Evaluation(np.diag(np.full(1000, 30)), np.full(1000, 45))
    np.add.at(counts.confusion, tuple(generator.integers(0, 1000, (2, 20_000))), 1)
    found = collect_report(None, OpenedModel(model, ""), "none")
    page = replace(
        found, measurements=Measurements(((summarize(counts, 1, "torch"), counts),), missing=found.measurements.missing)
    )
    report_page.write_page(page, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 2e6
    read = Page(tmp_path / "page.html")
    true, seen, times = read.tables["The most frequent mistakes"][1]
    wrong = counts.confusion - np.diag(np.diag(counts.confusion))
    assert int(times) == wrong.max() == wrong[int(true.split()[1]), int(seen.split()[1])]
    assert len(read.tables["Classes with the lowest error"]) == 11
    assert len(read.tables["Classes with the highest error"]) == 11
    picture = next(image for image in read.images if "Confusion matrix of 1000" in (image["alt"] or ""))
    assert base64.b64decode((picture["src"] or "").partition(",")[2])[:4] == b"\x89PNG"
