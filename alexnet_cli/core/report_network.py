"""The section of a report that says what the network is: figure 2 of the paper as a table and a drawing."""

from __future__ import annotations

from typing import Any

from alexnet_cli.core import anatomy, network_picture, report_pictures
from alexnet_cli.core.anatomy import Layer
from alexnet_cli.core.architecture import EDGE_PADDING
from alexnet_cli.core.report import Report
from alexnet_cli.recipe import Recipe

HEADS = ("Layer", "Kernel", "Sees", "Maps or units", "Size", "Then", "Parameters")


def network(report: Report, drawn: bool) -> dict[str, Any] | None:
    """The layers with their sums; None while the number of classes is not known."""
    if not report.classes:
        return None
    recipe = report.model.recipe if report.model else report.recipe
    layers = anatomy.layers(recipe, len(report.classes))
    meeting = [layer.name[-1] for layer in layers if layer.meets]
    towers = f"Two towers, which meet in layers {', '.join(meeting[:-1])} and {meeting[-1]}" if meeting else "One tower"
    often = sum(layer.multiplications for layer in layers)
    words = (
        f"{towers}: figure 2 of the paper, as this recipe has it. One picture takes {often / 1e6:,.0f} million "
        "multiplications."
    )
    total = ("All", "", "", "", "", "", f"{sum(layer.parameters for layer in layers):,}")
    chart = network_picture.draw(layers, recipe.towers, recipe.input_size) if drawn else None
    shown = {"uri": report_pictures.svg(chart.svg), "alt": chart.alt, "caption": chart.caption} if chart else None
    rows = [_picture(recipe), *(_row(layer, recipe) for layer in layers), total]
    return {"words": words, "heads": HEADS, "rows": rows, "chart": shown}


def _picture(recipe: Recipe) -> tuple[str, ...]:
    side, edge = recipe.input_size, EDGE_PADDING
    padded = recipe.input_size == 224 and recipe.edge_padding
    then = f"{edge} zeros right and below" if padded else ""
    return ("picture", "", "", "3 colours", f"{side}×{side}", then, "")


def _row(layer: Layer, recipe: Recipe) -> tuple[str, ...]:
    kernel = f"{layer.kernel}×{layer.kernel}" if layer.kernel else ""
    kernel += f" / {layer.stride}" if layer.stride and layer.stride > 1 else ""
    sees = f"{layer.inputs:,}"
    if recipe.towers > 1 and layer.name != "conv1":
        sees += " of both towers" if layer.meets else " of its tower"
    units = [f"{layer.units:,}"] * (1 if layer.name == "fc8" else recipe.towers)
    size = f"{layer.side}×{layer.side}" if layer.side else ""
    then = [f"{word} to {layer.pooled}×{layer.pooled}" if word.startswith("pool") else word for word in layer.then]
    return layer.name, kernel, sees, " + ".join(units), size, ", ".join(then) or "softmax", f"{layer.parameters:,}"
