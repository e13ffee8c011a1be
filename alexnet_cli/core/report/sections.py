"""What each section of the report says: sentences, rows of tables, images with captions.

Each function returns values for pages/report.html, which escapes them, or None if there is nothing to show.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from alexnet_cli.core.analysis import filter_picture, filters
from alexnet_cli.core.analysis.explain import LEAST_DROP
from alexnet_cli.core.analysis.filter_picture import Limits
from alexnet_cli.core.analysis.filter_replay import FRAMES, draw_replay
from alexnet_cli.core.analysis.filters import Kernels
from alexnet_cli.core.data.classes import make_names_unique
from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.evaluation import results
from alexnet_cli.core.evaluation.confusion_matrix import RIGHT, WRONG, draw_confusion_matrix
from alexnet_cli.core.evaluation.evaluate import Evaluation
from alexnet_cli.core.evaluation.towers import LEAST_NEED, OVERUSED, ClassNeed, TowerError, TowerTable
from alexnet_cli.core.intervals import format_points
from alexnet_cli.core.model.architecture import LayerSpec, describe_kernel, describe_step, layer_specs
from alexnet_cli.core.model.model_file import name_towers
from alexnet_cli.core.report.charts import Chart, draw_network, join_names
from alexnet_cli.core.report.collect import Example, Report
from alexnet_cli.core.report.history import describe_drops, get_number
from alexnet_cli.recipe import PAPER, Recipe, describe_setting

Row = tuple[Any, ...]
Values = dict[str, Any]

MOST = 10  # classes or mistakes in a table
MATRIX = 20  # with at most this many classes, the confusion matrix is a table, not an image
DARK_SHARE = {True: 0.43, False: 0.5}  # of a row: with more, white letters are easier to read on blue, on red
SOURCES = {"-": "", "code": "authors' code"}
MAX_WIDTH = 1000  # pixels; the page shows a wider confusion matrix at this width
THUMBNAIL, QUALITY = 160, 85  # side in pixels and JPEG quality of images
TOWER_KEYS = ("specialization", "chroma_tower1", "chroma_tower2")  # of a validation record
OPEN_ROWS = 2  # of neighbors; the others are folded
ZOOM = 8  # pixels for each weight of a filter
LEAST_EPOCHS = 3  # for a replay
REPLAY_WEIGHTS = 700_000  # in all frames of a replay: one takes about a byte, which is 4/3 in the page
COLORS = 128  # in the palette of the confusion matrix


def describe_network(report: Report, has_charts: bool) -> Values | None:
    """The layers and their totals; None while the number of classes is unknown."""
    if not report.classes:
        return None
    recipe = report.model.recipe if report.model else report.recipe
    specs = layer_specs(recipe, len(report.classes))
    shared = [spec.name for spec in specs if spec.sees_both]
    towers = f"Two towers, connected in {join_names(shared)}" if shared else "One tower"
    count = sum(spec.multiplications for spec in specs)
    words = (
        f"{towers}: the network of figure 2 of the paper, with the changes of this recipe. "
        f"One image takes {count / 1e6:,.0f} million multiplications."
    )
    if any("norm" in spec.then for spec in specs):
        words += " Normalization divides each value by a measure of its neighboring maps (section 3.3 of the paper)."
    if recipe.dropout:
        words += " Dropout sets a random part of the units to zero in training."
    total = ("Total", "", "", "", "", "", f"{sum(spec.parameters for spec in specs):,}")
    return {
        "words": words,
        "heads": ("Layer", "Kernel", "Inputs", "Maps or units", "Map size", "Then", "Parameters"),
        "rows": [_input_row(recipe, specs[0]), *(_layer_row(recipe, spec) for spec in specs), total],
        "chart": embed_chart(draw_network(recipe, specs)) if has_charts else None,
    }


def _input_row(recipe: Recipe, conv1: LayerSpec) -> Row:
    _, after = conv1.padding
    then = f"{after} zeros right and below" if after else ""
    return "image", "", "", "3 colors", f"{recipe.input_size}×{recipe.input_size}", then, ""


def _layer_row(recipe: Recipe, spec: LayerSpec) -> Row:
    inputs = f"{spec.inputs:,}"
    if recipe.towers > 1 and spec.name != "conv1":
        inputs += ", both towers" if spec.sees_both else ", own tower"
    maps = " + ".join([f"{spec.maps:,}"] * spec.towers)
    size = f"{spec.side}×{spec.side}" if spec.is_conv else ""
    pooled = f" to {spec.pooled_side}×{spec.pooled_side}"
    steps = [describe_step(recipe, step) + (pooled if step == "pool" else "") for step in spec.then]
    return spec.name, describe_kernel(spec), inputs, maps, size, ", ".join(steps) or "softmax", f"{spec.parameters:,}"


def compare_recipe(report: Report) -> Values:
    """The settings of the recipe and the paper's values for them."""
    paper, about = asdict(PAPER), {}
    changed, same = list[Row](), list[Row]()
    for key, value in asdict(report.recipe).items():
        if key == "name":
            continue
        about[key], source = describe_setting(key)
        place = f"section {source}" if source[:1].isdigit() else SOURCES[source]
        rows = same if value == paper[key] else changed
        rows.append((key, format_value(value), format_value(paper[key]), place))
    words = (
        f"Recipe {report.recipe.name}: {len(same)} of {len(about)} settings have the paper's value. The paper's "
        "values include one correction, without which the network does not start to learn: the initial weights of "
        "layers 3 to 5 have a standard deviation of 0.03, as in the authors' code."
    )
    heads = ("Setting", "This recipe", "Paper", "Source")
    return {"words": words, "heads": heads, "changed": changed, "same": same, "about": about}


def format_value(value: Any) -> str:
    """Format the value of a setting as JSON does, but texts without quotes and an empty list as "none"."""
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value) if value != () else "none"


def describe_curves(report: Report, charts: Mapping[str, Chart]) -> Values:
    """Loss, errors and learning rate as charts and as a table."""
    history = report.history
    if report.recipe.schedule == "one-cycle":
        words = "The learning rate follows one cycle and changes at every step."
    elif history.drops:
        words = f"The learning rate drops after {describe_drops(history.drops)} (dotted lines)."
    else:
        words = "The learning rate has not dropped yet."
    words += " The loss is the mean of -ln p, where p is the probability of the right class. "
    if report.recipe.label_smoothing:
        share = f"{report.recipe.label_smoothing:.0%}"
        words += f"In training, {share} of the target is spread over all classes, which raises the loss. "
    words += "Training curves are means over steps, with dropout and augmentation. Validation uses neither: it is the "
    words += f"center view of {_count_validation_images(report)} after each epoch."
    if report.precision not in ("", "fp32"):
        words += f" Both were computed in {report.precision}; the other errors are computed in fp32 and may differ."
    heads: Row = (
        "Epoch", "Training loss", "Validation loss", "Training top-1", "Validation top-1", "Validation top-5",
        "Learning rate", "Images/s", "Drops after",
    )  # fmt: skip
    rows = [
        (
            epoch["epoch"],
            _format_number(epoch, "train_loss"), _format_number(epoch, "loss"),
            _format_number(epoch, "train_top1_error", ".1%"), _format_number(epoch, "top1_error", ".1%"),
            _format_number(epoch, "top5_error", ".1%"),
            _format_number(epoch, "lr", ".3g"), _format_number(epoch, "images_per_second", ",.0f"),
            "yes" if epoch["epoch"] in history.drops else "",
        )
        for epoch in history.epochs
    ]  # fmt: skip
    heads, *rows = _drop_top5([heads, *rows], 5, report)
    shown = [embed_chart(charts[name]) for name in ("errors", "loss") if name in charts]
    rate = embed_chart(charts["rate"]) if "rate" in charts else None
    return {"charts": shown, "rate": rate, "words": words, "heads": heads, "rows": rows}


def _count_validation_images(report: Report) -> str:
    """For example "all 3,925 validation images", if the data set of the training is there."""
    count = f"{len(report.data.split('val')):,} " if report.data and report.is_own_data else ""
    return f"all {count}validation images"


def describe_filters(report: Report, charts: Mapping[str, Chart]) -> Values | None:
    """The first-layer filters (figure 3 of the paper), and how strongly the towers differ."""
    measured = report.specialization
    if measured is None:
        return None
    limits = filter_picture.shared_limits(report.towers)
    towers, rows = [], []
    for number, (kernels, limit, tower, share) in enumerate(
        zip(report.towers, limits, measured.towers, measured.means, strict=True), 1
    ):
        towers.append(draw_tower(kernels, limit, number, measured.means))
        rows.append((
            f"Tower {number}", len(kernels), f"{share:.2f}", f"{tower.mean(tower.frequency):.2f}",
            f"{tower.mean(tower.selectivity):.2f}", int(tower.dead.sum()), int(tower.undertrained.sum()),
        ))  # fmt: skip
    epochs = [
        (epoch["epoch"], *(_format_number(epoch, key, ".2f") for key in TOWER_KEYS))
        for epoch in report.history.epochs
        if get_number(epoch, "chroma_tower1") is not None
    ]
    return {
        "words": "The first-layer filters, as in figure 3 of the paper. All filters share one scale, and zero is "
        "mid-gray, so a faint filter looks faint. The color share says how much of a filter is color: at 0 it sees "
        "only light and dark, at 1 only differences between colors. Untrained filters are colored noise, at 0.67; "
        "training lowers that.",
        "towers": towers,
        "replay": _draw_replay(report),
        "heads": (
            "Tower", "Filters", "Color share", "Cycles per pixel", "Orientation selectivity", "Dead", "Still noise"
        ),
        "rows": rows, "verdict": _compare_towers(report),
        "chart": embed_chart(charts["towers"]) if "towers" in charts else None,
        "curve": epochs, "curve_heads": ("Epoch", "AUC", "Tower 1", "Tower 2"),
    }  # fmt: skip


def draw_tower(kernels: Kernels, limit: Limits, number: int, shares: Sequence[float]) -> Values:
    """The filters of a tower as tiles; the caption says whether it has more color than the other."""
    grid = filter_picture.draw_grid(kernels, limit, filter_picture.count_columns(len(kernels)))
    share, others = f"{shares[number - 1]:.2f}", [f"{share:.2f}" for share in shares]
    rank = "" if len(set(others)) == 1 else ", the higher one" if share == max(others) else ", the lower one"
    return {
        "uri": _encode_filters(grid),
        "alt": f"The {len(kernels)} first-layer filters of tower {number} as tiles.",
        "point": f"Tower {number} has color share {share}{rank}.",
        "caption": f"{len(kernels)} filters of {kernels.shape[2]}×{kernels.shape[3]}.",
    }


def _draw_replay(report: Report) -> Values | None:
    """An animation of the filters over the epochs, and its last frame for readers who want no motion."""
    kept = report.kept_filters
    if len(kept) < LEAST_EPOCHS:
        return None
    frames = min(FRAMES, max(LEAST_EPOCHS, REPLAY_WEIGHTS // sum(kernels.size for kernels in report.towers)))
    replay = draw_replay(kept, len(report.towers), f", run {report.name}", most=frames)
    curve = "" if len(report.towers) == 1 else " The curve is the AUC of the towers' color shares."
    first, last = (
        filters.measure_specialization(filters.split_towers(kept[epoch], len(report.towers))).means
        for epoch in (min(kept), max(kept))
    )
    changes = [
        f"from {one:.2f} to {other:.2f} in tower {number}"
        for number, (one, other) in enumerate(zip(first, last, strict=True), 1)
    ]
    return {
        "uri": _make_uri("image/webp", replay.encode("webp")),
        "still": _make_uri("image/webp", replace(replay, frames=replay.frames[-1:], durations=[0]).encode("webp")),
        "width": replay.frames[0].width, "height": replay.frames[0].height,
        "alt": f"Animation of the filters from epoch {min(kept)} to {max(kept)}, with the curve of their color.",
        "point": f"The color share goes {', '.join(changes)}.",
        "caption": f"Epoch {min(kept)} to {max(kept)}, over and over. One scale holds for all epochs, so "
        f"filters leave gray as their weights grow.{curve}",
    }  # fmt: skip


def _compare_towers(report: Report) -> str:
    """Say whether the towers differ in color, or why that cannot be said."""
    measured = report.specialization
    if measured is None or measured.auc is None or measured.interval is None or measured.p_value is None:
        return "There are no two towers to compare."
    low, high = measured.interval
    text = (
        f"A filter of the more colorful tower has more color than one of the other in {measured.auc:.0%} of all pairs "
        f"(AUC {measured.auc:.2f}, 95% interval {low:.2f} to {high:.2f}; 0.5 is chance). "
        f"Random divisions of the filters into two halves reach this in {measured.p_value:.2%} of cases. "
    )
    if measured.undertrained:
        return f"{text}The filters still look like their random initial values, so these numbers mean nothing yet."
    if measured.is_significant:
        return f"{text}So they differ in this run, by more than chance."
    few = f"with {len(report.towers[0])} filters in each tower only a large difference would show"
    return f"{text}So chance alone may explain it: {few}."


def describe_results(report: Report) -> Values | None:
    """Errors, best and worst classes, confusions."""
    measured, counts = report.measurements, report.measurements.counts
    if counts is None:
        return None
    names = report.class_names
    heads, *errors = _drop_top5([
        ("Protocol", "Images", "Top-1 error", "Top-5 error", "Loss"),
        *(_totals_row(totals) for totals, _ in measured.results), *_published_rows(measured.totals),
    ], 3, report)  # fmt: skip
    ranked = sorted(results.count_per_class(counts, report.classes), key=lambda row: float(row["top1_error"]))
    class_heads, *rows = _drop_top5([
        ("Class", "Images", "Correct", "In the top 5", "Most frequent mistake"),
        *(_class_row(row, counts, names) for row in ranked),
    ], 3, report)  # fmt: skip
    class_title, tables = _split_classes(rows, sum(float(row["top1_error"]) < 1 for row in ranked))
    mistakes = [(names[true], names[seen], times) for true, seen, times in results.find_mistakes(counts, MOST)]
    is_small = len(names) <= MATRIX
    return {
        "heads": heads, "errors": errors, "words": _explain_errors(report),
        "class_title": class_title, "class_heads": class_heads, "classes": tables,
        "mistakes": mistakes, "confusion": _describe_confusion(counts, mistakes, report),
        "matrix_names": names, "matrix": _shade_matrix(counts.confusion) if is_small else [],
        "drawing": None if is_small else _draw_confusion(counts, names),
    }  # fmt: skip


def _explain_errors(report: Report) -> str:
    """Say what an interval means, and why other numbers of the page differ."""
    words = "The error on many more such images is likely to be within the 95% interval."
    measured = report.measurements
    if any(totals["views"] == 10 for totals, _ in measured.results):
        words += " Ten views are the four corners and the center of an image, also mirrored."
        single = [name for name, is_shown in (("towers", measured.towers), ("curves", report.is_trained)) if is_shown]
        if single:
            words += f" The {' and the '.join(single)} are measured with the center view only."
    return words


def _shade_matrix(confusion: npt.NDArray[np.int64]) -> list[list[Values]]:
    """The cells of each row: count, color, and how strong it is, as in `draw_confusion_matrix`."""
    rows = []
    for true, counts in enumerate(confusion.tolist()):
        shares = [count / max(1, sum(counts)) for count in counts]
        rows.append([
            {
                "count": count, "alpha": f"{share**0.5:.2f}", "dark": share > DARK_SHARE[seen == true],
                "color": " ".join(map(str, RIGHT if seen == true else WRONG)),
            }
            for seen, (count, share) in enumerate(zip(counts, shares, strict=True))
        ])  # fmt: skip
    return rows


def _draw_confusion(counts: Evaluation, names: Sequence[str]) -> Values:
    """The confusion matrix as an image."""
    title = f"{counts.images:,} validation images, top-1 error {counts.top1_error:.1%}"
    image = draw_confusion_matrix(counts.confusion, names, title)
    return {
        "uri": _encode_drawing(image),
        "alt": f"Confusion matrix of {len(names)} classes",
        "width": min(image.width, MAX_WIDTH),
    }


def _describe_confusion(counts: Evaluation, mistakes: Sequence[tuple[str, str, int]], report: Report) -> dict[str, str]:
    """The caption of the confusion matrix."""
    totals = report.measurements.totals
    views = f", {results.name_views(totals['views'])}" if totals else ""
    point = f"{1 - counts.top1_error:.1%} of the {counts.images:,} images are right (on the diagonal{views})."
    if mistakes:
        true, predicted, times = mistakes[0]
        point += f" The most frequent mistake: {true} predicted as {predicted}, {_format_times(times)}."
    return {
        "point": point,
        "caption": "Blue is correct, red is a mistake; a stronger color is a larger share of the row.",
    }


def _drop_top5(rows: Sequence[Row], column: int, report: Report) -> list[Row]:
    """The rows, without the column of top-5 values if every answer is in the top 5."""
    return [row[:column] + row[column + 1 :] for row in rows] if report.has_few_classes else list(rows)


def _split_classes(rows: Sequence[Row], recognized: int) -> tuple[str, list[tuple[str, Sequence[Row]]]]:
    """A title and tables of classes, each with its caption: one table for few classes, else the best and the worst.

    The first `recognized` rows are classes with at least one correct image.
    """
    if len(rows) == 1:
        return "The class", [("The only class with images", rows)]
    if len(rows) <= MOST:
        return "All classes", [("All classes, lowest error first", rows)]
    most = min(MOST, len(rows) // 2)
    tables = [("Classes with the highest error", rows[: -most - 1 : -1])]
    if recognized:
        tables.insert(0, ("Classes with the lowest error", rows[: min(most, recognized)]))
    return "Best and worst classes", tables


def _class_row(row: Mapping[str, Any], counts: Evaluation, names: Sequence[str]) -> Row:
    true = row["index"]
    wrong = counts.confusion[true].copy()
    wrong[true] = 0
    predicted = int(wrong.argmax())
    mistake = f"{names[predicted]}, {_format_times(int(wrong[predicted]))}" if wrong[predicted] else "no other class"
    return names[true], row["images"], f"{1 - row['top1_error']:.1%}", f"{1 - row['top5_error']:.1%}", mistake


def _totals_row(totals: Mapping[str, Any]) -> Row:
    errors = []
    for key in ("top1_error", "top5_error"):
        low, high = totals[f"{key}_interval"]
        errors.append(f"{totals[key]:.1%} ({low:.1%} to {high:.1%})")
    return results.name_views(totals["views"]), f"{totals['images']:,}", *errors, f"{totals['loss']:.3f}"


def _published_rows(totals: Mapping[str, Any] | None) -> list[Row]:
    known = totals and totals.get("published")
    if not known:
        return []
    protocol = f"published: {known['source']}, {results.name_views(known['views'])}"
    images = f"{results.VALIDATION_IMAGES:,}"
    return [(protocol, images, f"{known['top1_error']:.1%}", f"{known['top5_error']:.1%}", "")]


def describe_towers(report: Report) -> Values | None:
    """The error of each tower alone, in color and gray, and the classes that each tower is needed for."""
    table = report.measurements.towers
    if table is None:
        return None
    names, total = report.class_names, len(report.data.split("val")) if report.data else table.images
    sample = f"{table.images:,}" if table.images == total else f"{table.images:,} of the {total:,}"
    words = (
        "A tower alone is this network with the other tower switched off (its maps and units are zero). "
        f"It was not trained to work alone. All numbers here: {sample} validation images, center view."
    )
    pairs = list(zip(table.errors[:3], table.errors[3:], strict=True))
    rows = [
        (
            name_towers(color.without_tower).capitalize(), _format_right(color), _format_right(gray),
            format_points(gray.lost_in_gray, gray.lost_in_gray_interval),
            format_points(color.lost_without_tower, color.lost_without_tower_interval),
        )
        for color, gray in pairs
    ]  # fmt: skip
    needs, needed = table.classes, {n.index: tower for tower in (1, 2) for n in table.list_needs(tower)}
    listed = needs if len(needs) <= MOST else [*needs[: MOST // 2], *needs[-MOST // 2 :]]
    return {
        "words": words, "verdict": _explain_towers(table, names),
        "constant": 100 * (1 - table.commonest_error),
        "bars": [(name_towers(color.without_tower), [_make_bar(color), _make_bar(gray)]) for color, gray in pairs],
        "heads": ("Network", "Right in color", "Right in gray", "Gray costs, points", "Other tower off costs, points"),
        "rows": rows,
        "class_words": "The share of the images of each class that are right, in color. A bar is pale if the network "
        f"gives this answer to more than {OVERUSED} times as many images as the class has: it need not know the class. "
        f"A class needs a tower if switching it off costs the class at least {100 * LEAST_NEED:.0f} points more than "
        "switching off the other, beyond chance (95% interval), and its bar is not pale.",
        "class_bars": [(names[need.index], needed.get(need.index), _class_bars(need)) for need in listed],
        "class_heads": ("Class", "Needs more", "Images", "Whole network", "Tower 1 alone", "Tower 2 alone"),
        "classes": [_need_row(need, needed.get(need.index), names) for need in listed],
    }  # fmt: skip


def _make_bar(row: TowerError) -> Values:
    """A bar of right answers with its 95% interval, in percent."""
    low, high = row.top1_error_interval
    return {
        "gray": row.grayscale,
        "share": 100 * (1 - row.top1_error),
        "low": 100 * (1 - high),
        "high": 100 * (1 - low),
    }


def _class_bars(need: ClassNeed) -> list[Values]:
    """The bars of the whole network and of each tower alone."""
    return [{"share": 100 * (1 - need.top1_errors[i]), "pale": need.overuses(i)} for i in range(3)]


def _explain_towers(table: TowerTable, names: Sequence[str]) -> str:
    """Say what each tower is worth, which tower is no better than guessing, and which loses more in gray."""
    without1, without2 = (100 * (row.lost_without_tower or 0) for row in table.errors[2:0:-1])
    text = [f"Switching off tower 1 costs {without1:.1f} points in color, tower 2 {without2:.1f}."]
    remarks = table.list_remarks()[1:3]
    text += [f"Tower {number} alone is {remark}." for number, remark in enumerate(remarks, 1) if remark]
    if table.has_weak_tower():
        text.append("So it has nothing to lose in gray: this cannot say which tower needs color.")
    elif tower := table.find_color_tower():
        lost = [100 * (row.lost_in_gray or 0) for row in table.errors[4:6]]
        text.append(
            f"In gray, tower {tower} loses more than tower {3 - tower}: {lost[tower - 1]:.1f} points against "
            f"{lost[2 - tower]:.1f}."
        )
    else:
        text.append("Which tower loses more in gray is not certain.")
    answers = [
        f"tower {i} {names[row.top_answer]} ({row.top_answer_share:.0%})" for i, row in enumerate(table.errors[1:3], 1)
    ]
    text.append(f"The most frequent answer alone, in color: {', '.join(answers)}.")
    return " ".join(text)


def _format_right(row: TowerError) -> str:
    low, high = row.top1_error_interval
    return f"{1 - row.top1_error:.1%} ({1 - high:.1%} to {1 - low:.1%})"


def _need_row(need: ClassNeed, needed_tower: int | None, names: Sequence[str]) -> Row:
    cells = [f"{1 - need.top1_errors[i]:.0%} ({need.answers[i]:,})" for i in range(3)]
    needed = f"tower {needed_tower}" if needed_tower else ""
    return names[need.index], needed, f"{need.images:,}", *cells


def describe_examples(report: Report) -> Values | None:
    """The images with the most confident predictions."""
    measured, names = report.measurements, report.class_names
    if not measured.correct and not measured.wrong:
        return None
    if report.data and measured.sampled == len(report.data.split("val")):
        sample = f"all {measured.sampled:,} validation images"
    else:
        sample = f"{measured.sampled:,} validation images, spread evenly over the split"
    words = (
        f"The most confident predictions among {sample}, each with its probability. "
        "Each class comes once before any class comes again."
    )
    correct = [image for example in measured.correct for image in _describe_example(names, example)]
    wrong = [image for example in measured.wrong for image in _describe_example(names, example)]
    evidence = (
        "After each image: where the network saw the class it predicted. Bright: a gray square here lowers the "
        "probability of that class. Full color is the largest drop in the map, but at least "
        f"{100 * LEAST_DROP:.0f} points."
    )
    return {"words": words, "correct": correct, "wrong": wrong, "evidence": evidence}


def _describe_example(names: Sequence[str], example: Example) -> list[Values]:
    """The image, and where the network saw the predicted class if that was drawn."""
    true, predicted, probability = names[example.true], names[example.predicted], f"{example.probability:.0%}"
    if example.true == example.predicted:
        alt, caption = f"Image of {true}, predicted correctly.", f"{true}, {probability}"
    else:
        alt, caption = f"Image of {true}, predicted as {predicted}.", true
    images = [{"uri": encode_image(example.image), "alt": alt, "caption": caption}]
    if example.evidence is not None:
        alt = f"The same image in gray. Bright: where the network saw {predicted}."
        caption = f"predicted as {predicted}, {probability}"
        images.append({"uri": encode_image(example.evidence), "alt": alt, "caption": caption})
    return images


def describe_neighbors(report: Report) -> Values | None:
    """Validation images and their nearest training images (figure 4, right)."""
    if not report.measurements.neighborhoods or report.data is None:
        return None
    names, rows = make_names_unique(report.data.classes), []
    for number, neighborhood in enumerate(report.measurements.neighborhoods, 1):
        name = names[neighborhood.label]
        images = [{"uri": encode_image(neighborhood.image), "alt": f"Validation image of {name}.", "caption": name}]
        for image, label, distance in neighborhood.nearest:
            alt, caption = f"Training image of {names[label]}.", f"{names[label]}, {distance:#.3g}"
            images.append({"uri": encode_image(image), "alt": alt, "caption": caption})
        same = sum(label == neighborhood.label for _, label, _ in neighborhood.nearest)
        title = f"Image {number}: {name}, {same} of {len(neighborhood.nearest)} neighbors have its class"
        rows.append({"title": title, "images": images})
    words = (
        "As in figure 4 (right) of the paper: a validation image (framed) and the training images whose layer-7 "
        "activations are nearest to its own: those that the network finds most alike (the number is the distance)."
    )
    return {"words": words, "rows": rows[:OPEN_ROWS], "folded": rows[OPEN_ROWS:]}


def embed_chart(chart: Chart) -> Values:
    """A chart as an image. Inline SVG would share its style and ids with the page."""
    return {"uri": _make_uri("image/svg+xml", chart.svg.encode("utf-8"))} | chart._asdict()


def _format_number(record: Mapping[str, Any], key: str, form: str = ".3f") -> str:
    value = get_number(record, key)
    return "" if value is None else format(value, form)


def _format_times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def encode_image(image: ImageArray) -> str:
    """An image, uint8 S x S x 3, as a JPEG thumbnail."""
    small = Image.fromarray(image).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    return _make_uri("image/jpeg", file.getvalue())


def _encode_filters(pixels: npt.NDArray[np.uint8]) -> str:
    """uint8 H x W x 3 as PNG, enlarged here, since printers smooth what they enlarge."""
    return _encode_png(Image.fromarray(pixels.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)))


def _encode_drawing(image: Image.Image) -> str:
    """A drawing of few colors as PNG with a palette, which is smaller."""
    return _encode_png(image.quantize(COLORS, dither=Image.Dither.NONE))


def _encode_png(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return _make_uri("image/png", file.getvalue())


def _make_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
