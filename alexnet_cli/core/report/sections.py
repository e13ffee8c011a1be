"""What each section of a report's page says: words, rows of tables, pictures with the texts that stand for them.

Every function gives the values of names that pages/report.html uses. Escaping is the page's affair.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from alexnet_cli.core.analysis import filter_picture
from alexnet_cli.core.evaluation import results
from alexnet_cli.core.evaluation.confusion_matrix import draw_confusion_matrix
from alexnet_cli.core.evaluation.evaluate import Evaluation
from alexnet_cli.core.model.architecture import LayerSpec, describe_kernel, describe_step, layer_specs
from alexnet_cli.core.report.charts import Chart, draw_network
from alexnet_cli.core.report.collect import Example, RecipeValue, Report, make_names_unique
from alexnet_cli.core.report.history import get_number
from alexnet_cli.recipe import Recipe

Row = tuple[Any, ...]
Names = dict[str, Any]

MOST = 10  # classes and pairs in a table
MATRIX = 20  # classes whose confusions are a table too
CHANCE = 0.05  # p-values above this are called chance
SOURCES = {"-": "", "code": "authors' code"}
MAX_WIDTH = 1000  # pixels of a picture that the page does not make smaller
PHOTOGRAPH, QUALITY = 160, 85  # pixels and JPEG quality of a photograph on the page
ZOOM = 8  # of kernels
COLORS = 128  # of the confusion matrix as PNG; it has few
LAYER_HEADS = ("Layer", "Kernel", "Sees", "Maps or units", "Size", "Then", "Parameters")


def describe_network(report: Report, drawn: bool) -> Names | None:
    """The layers with their sums; None while the number of classes is not known."""
    if not report.classes:
        return None
    recipe = report.model.recipe if report.model else report.recipe
    specs = layer_specs(recipe, len(report.classes))
    meeting = [spec.name[-1] for spec in specs if spec.sees_both]
    towers = f"Two towers, which meet in layers {', '.join(meeting[:-1])} and {meeting[-1]}" if meeting else "One tower"
    count = sum(spec.multiplications for spec in specs)
    words = (
        f"{towers}: figure 2 of the paper, with this recipe's changes. One image takes {count / 1e6:,.0f} million "
        "multiplications."
    )
    total = ("All", "", "", "", "", "", f"{sum(spec.parameters for spec in specs):,}")
    chart = _embed_chart(draw_network(recipe, specs)) if drawn else None
    rows = [_input_row(recipe, specs[0]), *(_layer_row(recipe, spec) for spec in specs), total]
    return {"words": words, "heads": LAYER_HEADS, "rows": rows, "chart": chart}


def _input_row(recipe: Recipe, conv1: LayerSpec) -> Row:
    _, after = conv1.padding
    then = f"{after} zeros right and below" if after else ""
    return ("image", "", "", "3 colors", f"{recipe.input_size}×{recipe.input_size}", then, "")


def _layer_row(recipe: Recipe, spec: LayerSpec) -> Row:
    inputs = f"{spec.inputs:,}"
    if recipe.towers > 1 and spec.name != "conv1":
        inputs += " of both towers" if spec.sees_both else " of its tower"
    maps = " + ".join([f"{spec.maps:,}"] * spec.towers)
    size = f"{spec.side}×{spec.side}" if spec.is_conv else ""
    pooled = f" to {spec.pooled_side}×{spec.pooled_side}"
    steps = [describe_step(recipe, step) + (pooled if step == "pool" else "") for step in spec.then]
    return spec.name, describe_kernel(spec), inputs, maps, size, ", ".join(steps) or "softmax", f"{spec.parameters:,}"


def compare_recipe(report: Report) -> Names:
    """The recipe beside the paper's."""
    values = report.values
    changed = [_recipe_row(v) for v in values if v.value != v.paper]
    same = [_recipe_row(v) for v in values if v.value == v.paper]
    words = (
        f"Recipe {report.recipe.name}: {len(same)} of {len(values)} values are the paper's: those of its text, with "
        "the one correction that it needs to start learning, a deviation of 0.03 in layers 3 to 5, as in the authors' "
        "code."
    )
    heads = ("Value", "Here", "The paper", "Where in the paper")
    return {"words": words, "heads": heads, "changed": changed, "same": same, "about": {v.key: v.about for v in values}}


def _recipe_row(value: RecipeValue) -> Row:
    source = f"section {value.source}" if value.source[:1].isdigit() else SOURCES[value.source]
    return value.key, _format_value(value.value), _format_value(value.paper), source


def _format_value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value) if value != () else "none"


def describe_curves(report: Report, charts: Mapping[str, Chart]) -> Names:
    """Loss and errors, drawn and in numbers."""
    history = report.history
    drops = ", ".join(map(str, history.drops))
    if report.recipe.schedule == "one-cycle":
        words = "The rate goes through one cycle, changed at every step: there are no drops to mark."
    elif history.drops:
        words = f"The rate was divided after epoch {drops}, where the dotted lines are."
    else:
        words = "The rate has not been divided yet."
    words += " Training curves are means over the steps, with dropout and distorted pictures; validation is without."
    keys = ("train_loss", "loss", "train_top1_error", "top1_error", "top5_error")
    rows = [
        (
            epoch["epoch"],
            *(_format_number(epoch, k) if "loss" in k else _format_percent(get_number(epoch, k)) for k in keys),
            _format_number(epoch, "lr", ".3g"), _format_number(epoch, "images_per_second", ",.0f"),
            "after it" if epoch["epoch"] in history.drops else "",
        )
        for epoch in history.epochs
    ]  # fmt: skip
    heads = (
        "Epoch", "Training loss", "Validation loss", "Training top-1", "Validation top-1", "Validation top-5",
        "Rate", "Images/s", "Rate drops",
    )  # fmt: skip
    drawn = [_embed_chart(charts[name]) for name in ("loss", "errors", "rate") if name in charts]
    heads, *rows = _drop_top5([heads, *rows], 5, report)
    return {"charts": drawn, "words": words, "heads": heads, "rows": rows}


def describe_filters(report: Report, charts: Mapping[str, Chart]) -> Names | None:
    """Figure 3, and how far the towers differ."""
    found = report.specialization
    if found is None:
        return None
    limits = filter_picture.shared_limits(report.towers)
    towers, rows = [], []
    for i, (kernels, limit, tower) in enumerate(zip(report.towers, limits, found.towers, strict=True), 1):
        grid = filter_picture.draw_grid(kernels, limit, filter_picture.count_columns(len(kernels)))
        size = f"{kernels.shape[2]}×{kernels.shape[3]}"
        share = f"{found.means[i - 1]:.2f}"
        alt = f"The {len(kernels)} kernels of tower {i}, {size} pixels each, zero in gray; color share {share}."
        caption = f"Tower {i} of {len(found.towers)}: {len(kernels)} kernels of {size}, color share {share}"
        towers.append({"uri": _encode_kernels(grid), "alt": alt, "caption": caption})
        rows.append((
            f"Tower {i}", len(kernels), share, f"{tower.mean(tower.frequency):.2f}",
            f"{tower.mean(tower.selectivity):.2f}", int(tower.dead.sum()), int(tower.undertrained.sum()),
        ))  # fmt: skip
    heads = ("Tower", "Kernels", "Color share", "Cycles a pixel", "One orientation", "Dead", "Noise")
    curve = [
        (epoch["epoch"], *(_format_number(epoch, key) for key in ("specialization", "chroma_tower1", "chroma_tower2")))
        for epoch in report.history.epochs
        if get_number(epoch, "chroma_tower1") is not None
    ]
    return {
        "words": "The kernels of layer 1, figure 3 of the paper: all on one scale, zero in mid-gray, so that what "
        "looks faint is faint. Color share is 0 for gray, 0.67 for noise and 1 for opponent colors.",
        "towers": towers, "heads": heads, "rows": rows, "verdict": _compare_towers(report),
        "chart": _embed_chart(charts["towers"]) if "towers" in charts else None,
        "curve": curve, "curve_heads": ("Epoch", "AUC", "Color share, tower 1", "Color share, tower 2"),
    }  # fmt: skip


def _compare_towers(report: Report) -> str:
    """Whether the towers differ, and whether the kernels allow to say so."""
    found = report.specialization
    if found is None or found.auc is None or found.interval is None or found.p_value is None:
        return "There are no two towers to compare."
    low, high = found.interval
    told = f"By color the towers are told apart with an area under the curve of {found.auc:.2f}"
    told += f" (95 % interval {low:.2f} to {high:.2f}; 0.5 is chance, 1 is complete), p = {found.p_value:.4f}: "
    if found.undertrained:
        return f"{told}of noise, which says nothing. The kernels still look like what they started from."
    differ = "no more than chance" if found.p_value > CHANCE else "the towers differ"
    return (
        f"{told}{differ}. In the paper one tower grows color-agnostic kernels, the other color-specific ones, always."
    )


def describe_results(report: Report) -> Names | None:
    """Errors, best and worst classes, confusions."""
    found, counts = report.evidence, report.evidence.counts
    if counts is None:
        return None
    names = make_names_unique(report.classes)
    ranked = sorted(results.count_per_class(counts, report.classes), key=lambda row: float(row["top1_error"]))
    rows = [_class_row(row, counts, names) for row in ranked]
    title = f"{counts.images:,} validation pictures, top-1 error {counts.top1_error:.1%}"
    image = draw_confusion_matrix(counts.confusion, names, title)
    pairs = [(names[true], names[seen], times) for true, seen, times in results.find_mistakes(counts, MOST)]
    first = (
        f" The most frequent mistake: {pairs[0][0]} taken for {pairs[0][1]}, {_format_times(pairs[0][2])}."
        if pairs
        else ""
    )
    right = f"{1 - counts.top1_error:.1%} of the pictures are on the diagonal"
    alt = f"Confusion matrix of {len(ranked)} classes: {right}.{first}"
    small = len(names) <= MATRIX
    heads, *errors = _drop_top5([
        ("Protocol", "Pictures", "Top-1 error", "Top-5 error", "Loss"),
        *(_totals_row(totals) for totals in found.totals), *_published_rows(found.totals),
    ], 3, report)  # fmt: skip
    class_heads, *rows = _drop_top5(
        [("Class", "Pictures", "Right", "Among five", "Most often taken for"), *rows], 3, report
    )
    class_title, tables = _split_classes(rows, [float(row["top1_error"]) < 1 for row in ranked])
    return {
        "heads": heads, "errors": errors, "class_title": class_title, "class_heads": class_heads, "classes": tables,
        "pairs": pairs,
        "picture": {
            "uri": _encode_drawing(image), "alt": alt, "width": min(image.width, MAX_WIDTH),
            "caption": "Rows are true classes, columns what the network saw: blue is right, red a mistake, "
            "and darker is a larger share of the row.",
        },
        "matrix_heads": ("True class", *names),
        "matrix": [(n, *r) for n, r in zip(names, counts.confusion.tolist(), strict=True)] if small else [],
    }  # fmt: skip


def _drop_top5(rows: Sequence[Row], top5: int, report: Report) -> list[Row]:
    """The rows without their column of top-5, where every answer is among the five likeliest."""
    return [row[:top5] + row[top5 + 1 :] for row in rows] if report.has_few_classes else list(rows)


def _split_classes(rows: Sequence[Row], known: Sequence[bool]) -> tuple[str, list[tuple[str, Sequence[Row]]]]:
    """A title, and tables with their captions, of classes in order; few are in one. `known`: any picture is right."""
    if len(rows) == 1:
        return "The class", [("The only class that has pictures", rows)]
    if len(rows) <= MOST:
        return "The classes", [("All classes, those recognized best first", rows)]
    most = min(MOST, len(rows) // 2)
    best = rows[: min(most, sum(known))]
    tables = [("Classes that are recognized best", best), ("Classes that are recognized worst", rows[: -most - 1 : -1])]
    return "Best and worst classes", [(caption, shown) for caption, shown in tables if shown]


def _class_row(row: Mapping[str, Any], counts: Evaluation, names: Sequence[str]) -> Row:
    true = row["index"]
    wrong = counts.confusion[true].copy()
    wrong[true] = 0
    seen = int(wrong.argmax())
    other = f"{names[seen]}, {_format_times(int(wrong[seen]))}" if wrong[seen] else "nothing else"
    return (
        names[true],
        row["images"],
        _format_percent(1 - row["top1_error"]),
        _format_percent(1 - row["top5_error"]),
        other,
    )


def _totals_row(totals: Mapping[str, Any]) -> Row:
    one, five = (
        f"{totals[f'{k}_error']:.1%} ({low:.1%} to {high:.1%})"
        for k in ("top1", "top5")
        for low, high in [totals[f"{k}_error_interval"]]
    )
    return results.PROTOCOL[totals["views"]], f"{totals['images']:,}", one, five, f"{totals['loss']:.3f}"


def _published_rows(totals: Sequence[Mapping[str, Any]]) -> list[Row]:
    known = totals[0].get("published") if totals else None
    if not known:
        return []
    what = f"published: {known['source']}, {results.PROTOCOL[known['views']]}"
    return [(what, f"{results.VALIDATION_IMAGES:,}", f"{known['top1_error']:.1%}", f"{known['top5_error']:.1%}", "")]


def describe_examples(report: Report) -> Names | None:
    """Pictures that the network was sure of."""
    found, names = report.evidence, make_names_unique(report.classes)
    if not found.right and not found.wrong:
        return None
    some = report.data is None or found.sampled < len(report.data.split("val"))
    pictures = f"{found.sampled:,} validation pictures, spread evenly over all of them"
    words = (
        f"Of {pictures if some else f'all {found.sampled:,} validation pictures'}, those whose answers have the "
        "highest probability, which stands beside them; each class once before any comes twice."
    )
    right, wrong = ([_describe_example(names, one) for one in some] for some in (found.right, found.wrong))
    return {"words": words, "right": right, "wrong": wrong}


def _describe_example(names: Sequence[str], one: Example) -> Names:
    true, seen, sure = names[one.true], names[one.predicted], f"{one.probability:.0%}"
    if one.true == one.predicted:
        alt, caption = f"A picture of {true}, recognized.", f"{true}, {sure}"
    else:
        alt, caption = f"A picture of {true}, taken for {seen}.", f"{true}, taken for {seen}, {sure}"
    return {"uri": _encode_photograph(one.image), "alt": alt, "caption": caption}


def describe_neighbors(report: Report) -> Names | None:
    """Figure 4 (right)."""
    found, data = report.evidence.neighborhoods, report.data
    if not found or data is None:
        return None
    names, rows = make_names_unique(data.classes), []
    for i, one in enumerate(found, 1):
        shown = [
            {
                "uri": _encode_photograph(picture), "alt": f"Training picture of {names[label]}.",
                "caption": f"{names[label]}, {distance:.3g}",
            }
            for picture, label, distance in one.nearest
        ]  # fmt: skip
        name, same = names[one.label], sum(label == one.label for _, label, _ in one.nearest)
        uri = _encode_photograph(one.image)
        asked = {"uri": uri, "alt": f"Validation picture of {name}.", "caption": name}
        rows.append({"title": f"Picture {i}: {name}, {same} of {len(shown)} of its class", "shown": [asked, *shown]})
    words = (
        "Figure 4 (right) of the paper: a validation picture, framed, and the training pictures nearest to it in the "
        "activations of layer 7, with their Euclidean distances."
    )
    return {"words": words, "rows": rows}


def _embed_chart(chart: Chart) -> Names:
    """A chart as an image of the page: inside of the page its style and its names would become those of the page."""
    return {"uri": _make_uri("image/svg+xml", chart.svg.encode("utf-8")), "alt": chart.alt, "caption": chart.caption}


def _format_percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _format_number(record: Mapping[str, Any], key: str, form: str = ".3f") -> str:
    value = get_number(record, key)
    return "" if value is None else format(value, form)


def _format_times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _encode_photograph(pixels: npt.NDArray[np.uint8]) -> str:
    """uint8 S x S x 3, reduced to PHOTOGRAPH pixels."""
    small = Image.fromarray(pixels).resize((PHOTOGRAPH, PHOTOGRAPH), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    small.save(file, "JPEG", quality=QUALITY, optimize=True)
    return _make_uri("image/jpeg", file.getvalue())


def _encode_kernels(pixels: npt.NDArray[np.uint8]) -> str:
    """uint8 H x W x 3, each pixel a square of ZOOM: what prints the page may smooth."""
    file = io.BytesIO()
    Image.fromarray(pixels.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)).save(file, "PNG", optimize=True)
    return _make_uri("image/png", file.getvalue())


def _encode_drawing(image: Image.Image) -> str:
    """A picture of few colors, made small."""
    file = io.BytesIO()
    image.quantize(COLORS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return _make_uri("image/png", file.getvalue())


def _make_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"
