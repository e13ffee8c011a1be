"""`visualize-filters --layer`: the parts of validation images that most activate the units of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from alexnet_cli.console import Reporter, make_printable
from alexnet_cli.errors import UsageError

if TYPE_CHECKING:
    from alexnet_cli.core.analysis.units import ActivationBatch
    from alexnet_cli.core.data.shards import Split
    from alexnet_cli.core.inference.session import Session
    from alexnet_plugins.visualize.figure import FigureRequest

PATCHES, UNITS = 9, 12  # patches of each unit, units in the figure


def draw_unit_patches(request: FigureRequest, layer: str, unit: int | None, data: str | None, tower: str) -> None:
    """Draw the top patches of one unit, or of the strongest units; one pass over the validation split."""
    import numpy as np

    from alexnet_cli.core.analysis.units import find_top_activations, make_records, make_sheet_rows
    from alexnet_cli.core.data.shards import find_dataset, open_dataset
    from alexnet_cli.core.drawing import draw_sheet
    from alexnet_cli.core.inference.session import Session
    from alexnet_cli.core.model.architecture import check_layers, last_step_name
    from alexnet_cli.core.runs.resolve import find_training_data

    reporter, model = request.reporter, request.model
    check_layers(model.recipe, [layer])
    width, towers = len(model.tensors[f"{layer}.bias"]), model.recipe.towers
    candidates = _choose_units(unit, request.towers, width, towers, layer)
    dataset = open_dataset(find_dataset(data or find_training_data(model.path)))
    split = dataset.nonempty_split("val")
    reporter.line("data", f"{dataset.path} · val · {len(split):,} images")
    searched = f"{width:,} units"
    if unit is None and len(candidates) < width:
        searched = f"tower {request.towers[0] + 1} of {towers} · {len(candidates):,} of {width:,} units"
    measure = "highest activation before the nonlinearity" if layer.startswith("conv") else "highest activation"
    reporter.line("layer", f"{layer} · {searched} · center views, {measure}")
    session = Session(model, layers=[layer if layer.startswith("conv") else last_step_name(model.recipe, layer)])
    top = find_top_activations(_compute_with_progress(reporter, split, session), PATCHES)
    assert top is not None, "the split has images"
    units = top.sort_units(np.array(candidates))[:UNITS].tolist()
    reporter.show(f"        {'unit':<6}{'activation':<12}classes of the top three images")
    for number in units:
        names = [dataset.classes[split.labels[row]].name for row in top.rows[number][:3]]
        reporter.show(make_printable(f"unit    {number:<6}{top.values[number, 0]:<12.3g}{', '.join(names)}"))
    parts = [f"{layer}-units", request.tower_name] if unit is None else [f"{layer}-unit{unit}"]
    path = request.choose_path(*parts, dataset=dataset)
    title = ", ".join([layer, *request.origin, f"validation images of {dataset.name}"])
    rows = make_sheet_rows(top, units, split, dataset.classes, model.recipe, layer)
    records = make_records(top, units, split, dataset.classes, model.recipe, layer)
    record = {"tower": tower, "layer": layer, "data": str(dataset.path), "units": records}
    request.save(draw_sheet(rows, title), path, record)


def _choose_units(unit: int | None, chosen: list[int], width: int, towers: int, layer: str) -> list[int]:
    """The units to choose from: the one named with --unit, or all of the chosen towers."""
    if unit is None:
        return [number for i in chosen for number in range(i * width // towers, (i + 1) * width // towers)]
    if unit >= width:
        raise UsageError(f"--unit {unit}: {layer} has units 0 to {width - 1}", f"for example: --unit {width - 1}")
    if unit * towers // width not in chosen:
        raise UsageError(f"--unit {unit} is in tower {unit * towers // width + 1}", "remove --tower")
    return [unit]


def _compute_with_progress(reporter: Reporter, split: Split, session: Session) -> Iterator[ActivationBatch]:
    """Compute the activations of a split batch by batch, with a progress bar."""
    from alexnet_cli.core.analysis.units import iterate_activations

    if session.fallback_reason:
        reporter.warn(f"the network runs on the CPU: {session.fallback_reason}", "see `alexnet doctor`")
    with reporter.progress("val", len(split)) as progress:
        for batch in iterate_activations(split, session):
            yield batch
            progress.advance(len(batch.rows))
