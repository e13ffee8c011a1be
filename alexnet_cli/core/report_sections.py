"""What each section of a report's page says: words, rows of tables, pictures with the texts that stand for them.

Every function gives the values of names that pages/report.html uses. Escaping is the page's affair.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from alexnet_cli.core import confusion_matrix, filter_picture, report_pictures, results
from alexnet_cli.core.evaluate import Evaluation
from alexnet_cli.core.evidence import Example
from alexnet_cli.core.history import number
from alexnet_cli.core.report import Report, Value, told_apart
from alexnet_cli.core.report_charts import Chart

Row = tuple[Any, ...]
Names = dict[str, Any]

MOST = 10  # classes and pairs in a table
MATRIX = 20  # classes whose confusions are a table too
CHANCE = 0.05  # p-values above this are called chance
SOURCES = {"-": "", "code": "authors' code"}
WIDEST = 1000  # pixels of a picture that the page does not make smaller


def recipe(report: Report) -> Names:
    """The recipe beside the paper's."""
    values = report.values
    changed = [_value(v) for v in values if v.value != v.paper]
    same = [_value(v) for v in values if v.value == v.paper]
    words = (
        f"Recipe {report.recipe.name}: {len(same)} of {len(values)} values are the paper's: those of its text, with "
        "the one correction that it needs to start learning, a deviation of 0.03 in layers 3 to 5, as in the authors' "
        "code."
    )
    heads = ("Value", "Here", "The paper", "Where in the paper")
    return {"words": words, "heads": heads, "changed": changed, "same": same, "about": {v.key: v.about for v in values}}


def _value(value: Value) -> Row:
    source = f"section {value.source}" if value.source[:1].isdigit() else SOURCES[value.source]
    return value.key, _written(value.value), _written(value.paper), source


def _written(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value) if value != () else "none"


def curves(report: Report, charts: Mapping[str, Chart]) -> Names:
    """Loss and errors, drawn and in numbers."""
    history = report.history
    if report.recipe.schedule == "one-cycle":
        words = "The rate goes through one cycle, changed at every step: there are no drops to mark."
    elif history.drops:
        words = f"The rate was divided after epoch {_list(history.drops)}, where the dotted lines are."
    else:
        words = "The rate has not been divided yet."
    words += " Training curves are means over the steps, with dropout and distorted pictures; validation is without."
    keys = ("train_loss", "loss", "train_top1_error", "top1_error", "top5_error")
    rows = [
        (
            epoch["epoch"], *(_number(epoch, key) if "loss" in key else _percent(number(epoch, key)) for key in keys),
            _number(epoch, "lr", ".3g"), _number(epoch, "images_per_second", ",.0f"),
            "after it" if epoch["epoch"] in history.drops else "",
        )
        for epoch in history.epochs
    ]  # fmt: skip
    heads = (
        "Epoch", "Training loss", "Validation loss", "Training top-1", "Validation top-1", "Validation top-5",
        "Rate", "Images/s", "Rate drops",
    )  # fmt: skip
    drawn = [_chart(charts[name]) for name in ("loss", "errors", "rate") if name in charts]
    heads, *rows = _told([heads, *rows], 5, report)
    return {"charts": drawn, "words": words, "heads": heads, "rows": rows}


def filters(report: Report, charts: Mapping[str, Chart]) -> Names | None:
    """Figure 3, and how far the towers differ."""
    found = report.specialisation
    if found is None:
        return None
    limits = filter_picture.joint_limits(report.towers)
    towers, rows = [], []
    for i, (kernels, limit, tower) in enumerate(zip(report.towers, limits, found.towers, strict=True), 1):
        grid = filter_picture.grid(kernels, limit, filter_picture.columns_for(len(kernels)))
        size = f"{kernels.shape[2]}×{kernels.shape[3]}"
        share = f"{found.means[i - 1]:.2f}"
        alt = f"The {len(kernels)} kernels of tower {i}, {size} pixels each, zero in grey; colour share {share}."
        caption = f"Tower {i} of {len(found.towers)}: {len(kernels)} kernels of {size}, colour share {share}"
        towers.append({"uri": report_pictures.enlarged(grid), "alt": alt, "caption": caption})
        rows.append((
            f"Tower {i}", len(kernels), share, f"{tower.mean(tower.frequency):.2f}",
            f"{tower.mean(tower.selectivity):.2f}", int(tower.dead.sum()), int(tower.undertrained.sum()),
        ))  # fmt: skip
    heads = ("Tower", "Kernels", "Colour share", "Cycles a pixel", "One orientation", "Dead", "Noise")
    curve = [
        (epoch["epoch"], *(_number(epoch, key) for key in ("specialisation", "chroma_tower1", "chroma_tower2")))
        for epoch in report.history.epochs
        if number(epoch, "chroma_tower1") is not None
    ]
    return {
        "words": "The kernels of layer 1, figure 3 of the paper: all on one scale, zero in mid-grey, so that what "
        "looks faint is faint. Colour share is 0 for grey, 0.67 for noise and 1 for opponent colours.",
        "towers": towers, "heads": heads, "rows": rows, "verdict": _verdict(report),
        "chart": _chart(charts["towers"]) if "towers" in charts else None,
        "curve": curve, "curve_heads": ("Epoch", "AUC", "Colour share, tower 1", "Colour share, tower 2"),
    }  # fmt: skip


def _verdict(report: Report) -> str:
    """Whether the towers differ, and whether the kernels allow to say so."""
    found = report.specialisation
    if found is None or found.auc is None or found.interval is None or found.p_value is None:
        return "There are no two towers to compare."
    low, high = found.interval
    told = f"By colour the towers are told apart with an area under the curve of {found.auc:.2f}"
    told += f" (95 % interval {low:.2f} to {high:.2f}; 0.5 is chance, 1 is complete), p = {found.p_value:.4f}: "
    if found.undertrained:
        return f"{told}of noise, which says nothing. The kernels still look like what they started from."
    differ = "no more than chance" if found.p_value > CHANCE else "the towers differ"
    return (
        f"{told}{differ}. In the paper one tower grows colour-agnostic kernels, the other colour-specific ones, always."
    )


def outcome(report: Report) -> Names | None:
    """Errors, best and worst classes, confusions."""
    found, counts = report.evidence, report.evidence.counts
    if counts is None:
        return None
    names = told_apart(report.classes)
    ranked = sorted(results.count_per_class(counts, report.classes), key=lambda row: float(row["top1_error"]))
    rows = [_class(row, counts, names) for row in ranked]
    title = f"{counts.images:,} validation pictures, top-1 error {counts.top1_error:.1%}"
    image = confusion_matrix.draw_confusion_matrix(counts.confusion, names, title)
    pairs = [(names[true], names[seen], times) for true, seen, times in results.find_mistakes(counts, MOST)]
    first = (
        f" The most frequent mistake: {pairs[0][0]} taken for {pairs[0][1]}, {_times(pairs[0][2])}." if pairs else ""
    )
    right = f"{1 - counts.top1_error:.1%} of the pictures are on the diagonal"
    alt = f"Confusion matrix of {len(ranked)} classes: {right}.{first}"
    small = len(names) <= MATRIX
    heads, *errors = _told([
        ("Protocol", "Pictures", "Top-1 error", "Top-5 error", "Loss"),
        *(_total(totals) for totals in found.totals), *_known(found.totals),
    ], 3, report)  # fmt: skip
    class_heads, *rows = _told([("Class", "Pictures", "Right", "Among five", "Most often taken for"), *rows], 3, report)
    class_title, tables = _ranked(rows, [float(row["top1_error"]) < 1 for row in ranked])
    return {
        "heads": heads, "errors": errors, "class_title": class_title, "class_heads": class_heads, "classes": tables,
        "pairs": pairs,
        "picture": {
            "uri": report_pictures.drawing(image), "alt": alt, "width": min(image.width, WIDEST),
            "caption": "Rows are true classes, columns what the network saw: blue is right, red a mistake, "
            "and darker is a larger share of the row.",
        },
        "matrix_heads": ("True class", *names),
        "matrix": [(n, *r) for n, r in zip(names, counts.confusion.tolist(), strict=True)] if small else [],
    }  # fmt: skip


def _told(rows: Sequence[Row], top5: int, report: Report) -> list[Row]:
    """The rows without their column of top-5, where every answer is among the five likeliest."""
    return [row[:top5] + row[top5 + 1 :] for row in rows] if report.few_classes else list(rows)


def _ranked(rows: Sequence[Row], known: Sequence[bool]) -> tuple[str, list[tuple[str, Sequence[Row]]]]:
    """A title, and tables with their captions, of classes in order; few are in one. `known`: any picture is right."""
    if len(rows) == 1:
        return "The class", [("The only class that has pictures", rows)]
    if len(rows) <= MOST:
        return "The classes", [("All classes, those recognised best first", rows)]
    most = min(MOST, len(rows) // 2)
    best = rows[: min(most, sum(known))]
    tables = [("Classes that are recognised best", best), ("Classes that are recognised worst", rows[: -most - 1 : -1])]
    return "Best and worst classes", [(caption, shown) for caption, shown in tables if shown]


def _class(row: Mapping[str, Any], counts: Evaluation, names: Sequence[str]) -> Row:
    true = row["index"]
    wrong = counts.confusion[true].copy()
    wrong[true] = 0
    seen = int(wrong.argmax())
    other = f"{names[seen]}, {_times(int(wrong[seen]))}" if wrong[seen] else "nothing else"
    return names[true], row["images"], _percent(1 - row["top1_error"]), _percent(1 - row["top5_error"]), other


def _total(totals: Mapping[str, Any]) -> Row:
    one, five = (
        f"{totals[f'{k}_error']:.1%} ({low:.1%} to {high:.1%})"
        for k in ("top1", "top5")
        for low, high in [totals[f"{k}_error_interval"]]
    )
    return results.PROTOCOL[totals["views"]], f"{totals['images']:,}", one, five, f"{totals['loss']:.3f}"


def _known(totals: Sequence[Mapping[str, Any]]) -> list[Row]:
    known = totals[0].get("published") if totals else None
    if not known:
        return []
    what = f"published: {known['source']}, {results.PROTOCOL[known['views']]}"
    return [(what, f"{results.VALIDATION_IMAGES:,}", f"{known['top1_error']:.1%}", f"{known['top5_error']:.1%}", "")]


def examples(report: Report) -> Names | None:
    """Pictures that the network was sure of."""
    found, names = report.evidence, told_apart(report.classes)
    if not found.right and not found.wrong:
        return None
    some = report.data is None or found.looked < len(report.data.split("val"))
    pictures = f"{found.looked:,} validation pictures, spread evenly over all of them"
    words = (
        f"Of {pictures if some else f'all {found.looked:,} validation pictures'}, those whose answers have the "
        "highest probability, which stands beside them; each class once before any comes twice."
    )
    right, wrong = ([_example(names, one) for one in some] for some in (found.right, found.wrong))
    return {"words": words, "right": right, "wrong": wrong}


def _example(names: Sequence[str], one: Example) -> Names:
    true, seen, sure = names[one.true], names[one.seen], f"{one.probability:.0%}"
    if one.true == one.seen:
        alt, caption = f"A picture of {true}, recognised.", f"{true}, {sure}"
    else:
        alt, caption = f"A picture of {true}, taken for {seen}.", f"{true}, taken for {seen}, {sure}"
    return {"uri": report_pictures.photograph(one.picture), "alt": alt, "caption": caption}


def nearest(report: Report) -> Names | None:
    """Figure 4 (right)."""
    found, data = report.evidence.nearest, report.data
    if not found or data is None:
        return None
    names, rows = told_apart(data.classes), []
    for i, one in enumerate(found, 1):
        shown = [
            {
                "uri": report_pictures.photograph(picture), "alt": f"Training picture of {names[label]}.",
                "caption": f"{names[label]}, {distance:.3g}",
            }
            for picture, label, distance in one.near
        ]  # fmt: skip
        name, same = names[one.true], sum(label == one.true for _, label, _ in one.near)
        uri = report_pictures.photograph(one.picture)
        asked = {"uri": uri, "alt": f"Validation picture of {name}.", "caption": name}
        rows.append({"title": f"Picture {i}: {name}, {same} of {len(shown)} of its class", "shown": [asked, *shown]})
    words = (
        "Figure 4 (right) of the paper: a validation picture, framed, and the training pictures nearest to it in the "
        "activations of layer 7, with their Euclidean distances."
    )
    return {"words": words, "rows": rows}


def _chart(chart: Chart) -> Names:
    return {"uri": report_pictures.svg(chart.svg), "alt": chart.alt, "caption": chart.caption}


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _number(record: Mapping[str, Any], key: str, form: str = ".3f") -> str:
    value = number(record, key)
    return "" if value is None else format(value, form)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
