"""What excites each unit of layers 1 to 5: patches of validation images for the page of `export --format html`."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image

from alexnet_cli.core.analysis.units import (
    BATCH,
    ActivationBatch,
    TopActivations,
    cut_receptive_field,
    read_images,
    update_top_activations,
)
from alexnet_cli.core.data.images import ImageArray
from alexnet_cli.core.data.shards import Split
from alexnet_cli.core.data.views import make_views
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.architecture import CONV_LAYERS, list_layers
from alexnet_cli.core.model.model_file import Model

IMAGES = 1000  # of the validation split, spread evenly
PATCHES = 4  # of each unit
SIDE, COLUMNS, QUALITY = 48, 32, 60  # pixels of a patch, patches in a row of a sheet, quality of the WebP sheet


def find_patches(model: Model, split: Split, advance: Callable[[int], None]) -> dict[str, Any]:
    """Return the top patches of every unit as a sheet for each layer: WebP as data URLs, unit by unit.

    `advance` is called with the number of images that a batch had.
    """
    session = Session(model, layers=[layer for layer in list_layers(model.recipe) if layer in CONV_LAYERS])
    rows, top = split.spread_rows(IMAGES), dict[str, TopActivations]()
    images = dict[int, ImageArray]()
    with closing(read_images(split, rows.tolist())) as decoded:
        pairs = zip(rows.tolist(), decoded, strict=True)
        while part := list(islice(pairs, BATCH)):
            images |= part
            crops = np.concatenate([make_views(image, model.recipe.input_size, 1) for _, image in part])
            for layer, values in session.activations(crops).items():
                batch = ActivationBatch(np.array([row for row, _ in part]), values)
                top[layer] = update_top_activations(top.get(layer), batch, PATCHES)
            advance(len(part))
    count = min(PATCHES, len(rows))
    sheets = {layer: _draw_sheet(found, images, model, layer) for layer, found in top.items()}
    return {"images": len(rows), "count": count, "side": SIDE, "columns": COLUMNS, "sheets": sheets}


def _draw_sheet(top: TopActivations, images: dict[int, ImageArray], model: Model, layer: str) -> str:
    """All patches of a layer, row by row, as a data URL."""
    patches = [
        cut_receptive_field(images[row], model.recipe, layer, (int(y), int(x)))
        for row, (y, x) in zip(top.rows.ravel().tolist(), top.positions.reshape(-1, 2), strict=True)
    ]
    sheet = Image.new("RGB", (SIDE * COLUMNS, SIDE * -(-len(patches) // COLUMNS)))
    for i, patch in enumerate(patches):
        tile = Image.fromarray(patch).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        sheet.paste(tile, (i % COLUMNS * SIDE, i // COLUMNS * SIDE))
    file = io.BytesIO()
    sheet.save(file, "WEBP", quality=QUALITY, method=6)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
