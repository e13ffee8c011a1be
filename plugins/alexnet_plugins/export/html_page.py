"""`alexnet export --format html`: one HTML file in which the network runs. Its source is in page/, joined here.

Weights are int8 with a float32 scale per row (a filter or unit), the mean image is int16. All numbers lie in one block
of bytes, gzipped and written as base64; a JSON block has the geometry of `layer_specs`, the class names, and the
offsets into the bytes. Text from files goes into JSON only, which the page never takes for HTML; the page's policy
allows no request and no script but its own.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

import alexnet_cli
from alexnet_cli.core.analysis.filters import measure_specialization, split_towers
from alexnet_cli.core.data.shards import Dataset
from alexnet_cli.core.data.views import cut_views, make_views
from alexnet_cli.core.evaluation.evaluate import Classify, match_classes
from alexnet_cli.core.evaluation.towers import NETWORKS, TowerTable, count_sample
from alexnet_cli.core.files import write_chunks
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.architecture import (
    POOL_STRIDE,
    LayerSpec,
    Step,
    layer_specs,
    list_layers,
    norm_spec,
    step_name,
)
from alexnet_cli.core.model.model_file import Model, silence_tower
from alexnet_cli.errors import WeightsError, storage_errors
from alexnet_cli.recipe import SIDE, Recipe

PART = 3 * 2**22  # bytes of gzip in one block of base64: a multiple of 3, so that no block but the last is padded
CONV_CODES, FC_CODES = 127, 95  # largest code of a weight; gzip makes 6 % less of 95, so that full width stays < 70 MB
ROWS = 256  # rows quantized at once, which bounds the memory
NAME, CODE = re.compile(r"\{\{ ([\w.]+) \}\}"), re.compile(r"<(?:script|style)>(.*?)</(?:script|style)>", re.DOTALL)

Array = npt.NDArray[np.float32]


class _Bytes:
    """The numbers of the network, one after the other; every array begins at a multiple of four bytes."""

    def __init__(self) -> None:
        self.chunks, self.size = list[bytes](), 0

    def add(self, values: npt.NDArray[Any]) -> int:
        """Append an array, little endian; returns its offset."""
        content = values.astype(values.dtype.newbyteorder("<")).tobytes()
        content += bytes(-len(content) % 4)
        self.chunks.append(content)
        self.size += len(content)
        return self.size - len(content)

    def add_rows(self, rows: Array, highest: int, factor: float = 1.0, bits: int = 8) -> dict[str, int]:
        """Append rows as whole numbers up to `highest`, and the scale of each row; returns where they are."""
        codes, scales = round_rows(rows, highest)
        return {
            "codes": self.add(codes.astype(np.int8 if bits == 8 else np.int16)),
            "scales": self.add(scales * np.float32(factor)),
            "rows": len(rows), "columns": rows.shape[1], "bits": bits,
        }  # fmt: skip


def round_rows(rows: Array, highest: int) -> tuple[npt.NDArray[np.int16], Array]:
    """Return whole numbers from -highest to highest, and the scale of each row: rows = codes * scales, rounded."""
    scales = np.abs(rows).max(1) / np.float32(highest)
    codes = np.empty(rows.shape, np.int16)
    for first in range(0, len(rows), ROWS):
        part = slice(first, first + ROWS)
        codes[part] = np.rint(rows[part] / np.where(scales[part] > 0, scales[part], 1)[:, None])
    return codes, scales


def round_weights(model: Model) -> Model:
    """Return the model with the weights that the page computes with."""
    tensors = dict(model.tensors)
    for layer in list_layers(model.recipe):
        weight = model.tensors[f"{layer}.weight"]
        codes, scales = round_rows(weight.reshape(len(weight), -1), FC_CODES if weight.ndim == 2 else CONV_CODES)
        tensors[f"{layer}.weight"] = (codes * scales[:, None]).reshape(weight.shape)
    return replace(model, tensors=tensors)


def build_page(
    model: Model, title: str, patches: dict[str, Any] | None = None, towers: dict[str, Any] | None = None
) -> list[str]:
    """Return the pieces of the page.

    `patches` is what `patches.find_patches` found, `towers` what `measure_towers` measured; either with the name
    of the data set as `data`.

    Raises:
        WeightsError: weights are NaN or infinite.
    """
    about, numbers = describe_network(model)
    about |= {"title": title, "version": alexnet_cli.__version__, "patches": patches, "measured": towers}
    packed = gzip.compress(b"".join(numbers), mtime=0)
    source = {name: _read_source(name) for name in ("page.html", "page.css", "network.js", "worker.js", "app.js")}
    text = NAME.sub(lambda match: source.get(match[1], match[0]), source["page.html"])
    before, after = text.split("{{ data }}")
    parts = (base64.b64encode(packed[first : first + PART]).decode() for first in range(0, len(packed), PART))
    return [
        before.replace("{{ policy }}", _make_policy(text), 1),
        f'<script type="application/json" id="about">{_format_json(about)}</script>\n',
        *(f'<script type="text/plain" class="numbers">{part}</script>\n' for part in parts),
        after,
    ]


def write_page(pieces: Iterable[str], path: Path) -> None:
    """Write the page atomically. Raises StorageError."""
    with storage_errors(path):
        write_chunks(path, (piece.encode() for piece in pieces))


def _read_source(name: str) -> str:
    return files("alexnet_plugins.export").joinpath("page", name).read_text(encoding="utf-8")


def _format_json(value: Any) -> str:
    """JSON that cannot end the script element it lies in, and is ASCII even if a name has half a surrogate pair."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _make_policy(text: str) -> str:
    """The content security policy: nothing is loaded; only the scripts and the style of the page run."""
    hashes = [hashlib.sha256(code.encode()).digest() for code in CODE.findall(text)]
    allowed = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in hashes)
    return f"default-src 'none'; script-src {allowed}; style-src {allowed}; worker-src blob:; img-src data: blob:"


def describe_network(model: Model) -> tuple[dict[str, Any], list[bytes]]:
    """Return what the page's JavaScript needs to know, and the bytes that the offsets in it point into.

    Raises:
        WeightsError: weights are NaN or infinite.
    """
    recipe, numbers, layers = model.recipe, _Bytes(), list[dict[str, Any]]()
    mean = model.mean
    if recipe.mean == "rgb":
        mean = np.broadcast_to(mean.mean((1, 2), dtype=np.float64).astype(np.float32)[:, None, None], mean.shape)
    center = cut_views(mean, recipe.input_size, 1)[0].transpose(1, 2, 0)
    about = {
        "recipe": recipe.name, "towers": recipe.towers, "classes": [name.name for name in model.classes],
        "size": SIDE, "side": recipe.input_size, "signed": recipe.activation == "tanh",
        "mean": numbers.add_rows(np.ascontiguousarray(center).reshape(1, -1), 2**15 - 1, bits=16), "layers": layers,
    }  # fmt: skip
    maps, side = 3, int(recipe.input_size)  # of all towers together, as the next layer sees them
    for spec in layer_specs(recipe, len(model.classes)):
        weight = model.tensors[f"{spec.name}.weight"]
        if not all(np.isfinite(model.tensors[f"{spec.name}.{part}"]).all() for part in ("weight", "bias")):
            raise WeightsError(f"{model.path}: {spec.name} has weights that are NaN or infinite", "the file is corrupt")
        if spec.is_conv:
            weight = weight.transpose(0, 2, 3, 1)  # a filter's maps innermost, as the page keeps maps
        layers.append({
            "name": spec.name, "towers": spec.towers, "maps": spec.maps, "inputs": spec.inputs, "inputMaps": maps,
            "seesBoth": spec.sees_both, "kernel": spec.kernel if spec.is_conv else 0, "stride": spec.stride,
            "before": spec.padding[0], "inputSide": side, "side": spec.side,
            "weight": numbers.add_rows(
                weight.reshape(len(weight), -1), CONV_CODES if spec.is_conv else FC_CODES, _factor(spec, recipe)
            ),
            "bias": numbers.add(model.tensors[f"{spec.name}.bias"]),
            "then": [_describe_step(step, spec, recipe) for step in spec.then],
            "shown": step_name(recipe, spec.name, "activation"),
            "last": step_name(recipe, spec.name, spec.then[-1]) if spec.then else spec.name,
        })  # fmt: skip
        maps, side = spec.biases, spec.pooled_side or spec.side
    colors = measure_specialization(split_towers(model.tensors["conv1.weight"], recipe.towers))
    about["colors"] = {"shares": colors.means, "pValue": colors.p_value, "differ": colors.is_significant}
    return about, numbers.chunks


def _factor(spec: LayerSpec, recipe: Recipe) -> float:
    """The input's divisor and dropout's test-time factor, which belong to the scale of the weights."""
    if spec.name == "conv1":
        return 1 / recipe.input_divisor
    return recipe.dropout_factor if spec.name in ("fc7", "fc8") else 1.0


def _describe_step(step: Step, spec: LayerSpec, recipe: Recipe) -> dict[str, Any]:
    """What follows a layer, with all of its numbers."""
    name = step_name(recipe, spec.name, step)
    if step == "activation":
        return {"kind": "activation", "name": name, "function": recipe.activation}
    if step == "pool":
        return {
            "kind": "pool", "name": name, "size": recipe.pool_size, "stride": POOL_STRIDE, "side": spec.pooled_side
        }  # fmt: skip
    if step == "dropout":
        return {"kind": "dropout", "name": name}
    return {"name": name, **norm_spec(recipe, step)._asdict()}


def measure_towers(model: Model, data: Dataset, advance: Callable[[int], None]) -> dict[str, Any]:
    """Return what the page shows of the answers to at most SAMPLE validation images.

    For each of NETWORKS, in color and in gray: the share of right answers, the most frequent answer with its share, and
    a remark if guessing is as good. `constant` is the share of right answers of always saying the most frequent class.
    `colorful` is the tower that certainly loses more without color, if any; `needs` has for each tower the classes that
    need it more, at most two.
    `advance` is called with the number of images that a batch had.

    Raises:
        DataError: the network does not know the classes of the data set.
    """
    output_of, split = match_classes(model.classes, data.classes, model.path), data.split("val")
    classify = {tower: _make_classifier(model if tower is None else silence_tower(model, tower)) for tower in NETWORKS}
    counts = count_sample(classify, model, split, output_of, advance)
    table = TowerTable.from_record(counts.make_record(model.classes, 1, {}))
    shown = [
        {
            "right": 1 - error.top1_error, "answer": error.top_answer, "share": error.top_answer_share,
            "remark": remark.partition(" than ")[0],  # "no better", "not certainly better", or empty
        }
        for error, remark in zip(table.errors, table.list_remarks(), strict=True)
    ]  # fmt: skip
    networks = list(zip(shown[:3], shown[3:], strict=True))  # each in color and in gray
    needs = [[need.index for need in table.list_needs(tower)[:2]] for tower in (1, 2)]
    colorful = table.find_color_tower()
    return {
        "images": table.images, "constant": 1 - table.commonest_error, "networks": networks, "colorful": colorful,
        "needs": needs,
    }  # fmt: skip


def _make_classifier(model: Model) -> Classify:
    session = Session(model)

    def classify(images: Tensor) -> Any:
        return session.probabilities(
            np.concatenate([make_views(image, session.recipe.input_size, 1) for image in images.numpy()])
        )

    return classify
