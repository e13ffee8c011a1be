"""The parts of validation pictures that excite the units of a layer most, for `visualize-filters --layer`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from alexnet_cli.console import Reporter, visible
from alexnet_cli.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image

    from alexnet_cli.core.responses import Responses
    from alexnet_cli.core.session import Convolution, Layer, Session
    from alexnet_cli.core.shards import Split
    from alexnet_cli.core.weights import Model

PATCHES, UNITS = 9, 12  # of a unit; on a page


def strongest(
    reporter: Reporter,
    model: Model,
    layer: Layer | Convolution,
    unit: int | None,
    towers: list[int],
    data: str | None,
    title: str,
) -> tuple[dict[str, Any], Image.Image]:
    """One pass over the validation split: the record for programs, and the page."""
    import numpy as np

    from alexnet_cli.core import qualitative_sheets
    from alexnet_cli.core.contact_sheet import sheet
    from alexnet_cli.core.resolve import find_training_data
    from alexnet_cli.core.session import Session
    from alexnet_cli.core.shards import find_dataset, open_dataset
    from alexnet_cli.core.stimuli import stimuli

    width = len(model.tensors[f"{layer}.bias"])
    shown = _units(unit, towers, width, model.recipe.towers, layer)
    dataset = open_dataset(find_dataset(data or find_training_data(model.path)))
    split = dataset.split("val")
    reporter.line("data", f"{dataset.path} · val · {len(split):,} images")
    ranked = f"{width:,} units"
    if unit is None and len(shown) < width:
        ranked = f"tower {towers[0] + 1} of {model.recipe.towers} · {len(shown):,} of {width:,} units"
    reporter.line("layer", f"{layer} · {ranked} · centre views, {_what(layer)}")
    found = stimuli(_counted(reporter, split, Session(model, layer=layer)), PATCHES)
    if found is None:
        raise DataError(f"{dataset.path}: split val holds no images", "prepare it anew with --val-fraction 0.1")
    units = found.strongest(np.array(shown))[:UNITS].tolist()
    reporter.show(f"        {'unit':<6}{'response':<10}the three pictures that excite it most")
    for number in units:
        names = [dataset.classes[split.labels[row]].name for row in found.rows[number][:3]]
        reporter.show(visible(f"unit    {number:<6}{found.responses[number, 0]:<10.3g}{', '.join(names)}"))
    inputs = (found, units, split, dataset.classes, model.recipe, layer)
    record = {"layer": layer, "data": str(dataset.path), "units": qualitative_sheets.unit_records(*inputs)}
    return record, sheet(qualitative_sheets.unit_rows(*inputs), f"{title}, validation pictures of {dataset.name}")


def _units(unit: int | None, towers: list[int], width: int, of: int, layer: str) -> list[int]:
    """The units to choose from: one, or those of some towers."""
    if unit is None:
        return [number for tower in towers for number in range(tower * width // of, (tower + 1) * width // of)]
    if unit >= width:
        raise UsageError(f"--unit {unit}: {layer} has units 0 to {width - 1}", f"such as --unit {width - 1}")
    if unit * of // width not in towers:
        raise UsageError(f"--unit {unit} is in tower {unit * of // width + 1}", "leave --tower out")
    return [unit]


def _what(layer: str) -> str:
    """What is compared."""
    return "highest response before the nonlinearity" if layer.startswith("conv") else "highest activation"


def _counted(reporter: Reporter, split: Split, session: Session) -> Iterator[Responses]:
    """The responses, counted on their way."""
    from alexnet_cli.core.responses import responses

    if session.fallback:
        reporter.warn(f"the network runs on the CPU: {session.fallback}", "see `alexnet doctor`")
    with reporter.progress("val", len(split)) as progress:
        for batch in responses(split, session):
            yield batch
            progress.advance(len(batch.rows))
