"""`alexnet benchmark infer`: crops to probabilities, in the files that `alexnet export` writes and in PyTorch.

All run the paper's network at full width on the same crops. PyTorch has a process of its own, with threads and memory
as any script has them.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from alexnet_cli.core import calibration, export, onnx_graph, onnx_int8
from alexnet_cli.core.network import Network, initialise, parameters_by_name
from alexnet_cli.core.session import Session
from alexnet_cli.core.sources import ClassName
from alexnet_cli.core.weights import Model
from alexnet_cli.recipe import PAPER, SIDE, Recipe
from alexnet_plugins.benchmark_step import CLASSES, FORMATS, Layout, arithmetic, stock

if TYPE_CHECKING:
    from alexnet_cli.core.placement import Placement
    from alexnet_cli.core.stopwatch import Contest, Pass

RECIPE = replace(PAPER, dropout_inverted=True)  # dropout as torch has it: the same network in all
BATCHES = (1, 64)
CALIBRATION = 8  # pictures: weights that have learned nothing have no accuracy to lose
GREY = 120

Crops = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Conditions:
    """What network, how many crops at a time, where, with how many threads."""

    recipe: Recipe
    batch: int
    device: str
    threads: int


def contests(placement: Placement, batch: int | None, workers: int, scratch: Path, *, bf16: bool) -> Generator[Contest]:
    """For each number of crops at a time, one for the float32 file and one for the int8 file."""
    from alexnet_cli.core.stopwatch import Contest

    device, on_gpu = placement.device, placement.device.type == "cuda"
    sessions = {
        name: Session(path, provider="cuda" if on_gpu else "cpu", gpu=device.index or 0, threads=workers)
        for name, path in write_files(scratch).items()
    }
    # A process that is started fresh: a forked one would inherit the settings of this one.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, initializer=_as_any_script) as process:
        for size in (batch,) if batch else BATCHES:
            conditions = Conditions(RECIPE, size, str(device), workers)
            theirs = {"stock: contiguous, float32": _apart(process, conditions, "contiguous", bf16=False)}
            if bf16:
                theirs["stock: channels-last, bf16"] = _apart(process, conditions, "channels-last", bf16=True)
            ours = {name: functools.partial(_pass, session, crops(size)) for name, session in sessions.items()}
            where, many = placement.name if on_gpu else "cpu", "crop" if size == 1 else "crops"
            notes = [f"{where}, {size} {many} at a time, float32; the weights are drawn"]
            peers = {"ours, fp16": "fp16", "ONNX's own LRN operator": "operator", "limit: no normalisation": "bare"}
            yield Contest(f"infer fp32, {size}", ours["fp32"], theirs | {k: ours[v] for k, v in peers.items()}, notes)
            peers = {"ours, fp32": "fp32", "limit: no normalisation": "bare int8"}
            yield Contest(f"infer int8, {size}", ours["int8"], theirs | {k: ours[v] for k, v in peers.items()}, notes)


def crops(count: int) -> Crops:
    """Noise in 0..255, N x 3 x S x S."""
    shape = (count, 3, RECIPE.input_size, RECIPE.input_size)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8).astype(np.float32)


def model(recipe: Recipe) -> Model:
    """The network with its initial values; what is subtracted is grey."""
    network = Network(recipe, CLASSES)
    initialise(network)
    tensors = {name: value.detach().numpy() for name, value in parameters_by_name(network)}
    tensors["mean"] = np.full((3, SIDE, SIDE), GREY, np.float32)
    return Model(Path("drawn"), tensors, recipe, tuple(ClassName(f"class {i}") for i in range(CLASSES)), {})


def write_files(folder: Path) -> dict[str, Path]:
    """Ours in every precision, the same with ONNX's operator, and without normalisation."""
    whole, bare = model(RECIPE), model(replace(RECIPE, lrn="none"))
    protos = {
        "fp32": onnx_graph.build(whole),
        "int8": int8(whole),
        "operator": with_operator(onnx_graph.build(whole), RECIPE),
        "bare": onnx_graph.build(bare),
        "bare int8": int8(bare),
    }
    files = {name: folder / f"{name}.onnx" for name in (*protos, "fp16")}
    for name, proto in protos.items():
        onnx_graph.save(proto, files[name])
    export.export_unverified(whole, files["fp16"], "fp16")
    return files


def int8(of: Model) -> onnx.ModelProto:
    """The int8 graph; calibrated on noise."""
    proto = onnx_graph.build(of, rows=True)
    return onnx_int8.quantised(proto, calibration.ranges(proto, crops(CALIBRATION).astype(np.uint8)))


def with_operator(proto: onnx.ModelProto, recipe: Recipe) -> onnx.ModelProto:
    """The same network with ONNX's own operator for normalisation across maps; towers become images."""
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    del graph.node[:]
    alpha = recipe.lrn_alpha * recipe.input_divisor**2 * recipe.lrn_size  # the operator divides it by the size
    settings: dict[str, Any] = {"size": recipe.lrn_size, "alpha": alpha, "beta": recipe.lrn_beta, "bias": recipe.lrn_k}
    biases = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.name.endswith(".bias")}
    for node in proto.graph.node:
        if ".norm." in node.name:
            continue
        if not node.name.endswith(".norm"):
            graph.node.append(node)
            continue
        maps = biases[f"{node.name.removesuffix('.norm')}.bias"]
        for part, count in (("apart", maps // recipe.towers), ("whole", maps)):
            shape = np.array([-1, count, 0, 0], np.int64)
            graph.initializer.append(numpy_helper.from_array(shape, f"{node.name}.{part}"))
        tower, result_of = f"{node.name}.tower", f"{node.name}.normalised"
        graph.node.append(helper.make_node("Reshape", [node.input[0], f"{node.name}.apart"], [tower]))
        graph.node.append(helper.make_node("LRN", [tower], [result_of], **settings))
        graph.node.append(helper.make_node("Reshape", [result_of, f"{node.name}.whole"], [node.output[0]]))
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    return result


def _pass(session: Session, batch: Crops) -> int:
    return len(session.probabilities(batch))


def _apart(process: ProcessPoolExecutor, conditions: Conditions, layout: Layout, *, bf16: bool) -> Pass:
    return lambda: process.submit(stock_pass, conditions, layout, bf16).result()


def _as_any_script() -> None:
    """Before torch is loaded: threads that wait do so as they do where nobody has told them otherwise."""
    os.environ.pop("GOMP_SPINCOUNT", None)


def stock_pass(conditions: Conditions, layout: Layout, bf16: bool) -> int:
    """A pass of the same network from torch's own parts: as in ours, from crops in memory to answers in memory."""
    network = _network(conditions.recipe, conditions.device, conditions.threads, layout)
    images = _images(conditions.batch, layout).to(conditions.device)
    with torch.inference_mode(), arithmetic(conditions.device, bf16=bf16):
        return len(torch.softmax(network(images).float(), 1).cpu())


@functools.cache
def _network(recipe: Recipe, device: str, threads: int, layout: Layout) -> nn.Module:
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean the same as in ours
    return stock(recipe, CLASSES).eval().to(device).to(memory_format=FORMATS[layout])


@functools.cache
def _images(count: int, layout: Layout) -> torch.Tensor:
    return torch.from_numpy(crops(count) - GREY).contiguous(memory_format=FORMATS[layout])
