"""`alexnet benchmark infer` and `startup`: from crops to probabilities, and from a command to an answer.

All run the paper's network at full width on the same crops: the files that `alexnet export` writes, and PyTorch in a
process of its own. For `startup`, every pass is a new process.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Generator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.devices import check_onnx_providers
from alexnet_cli.core.export.export import build_onnx
from alexnet_cli.core.export.quantize import measure_ranges, to_int8
from alexnet_cli.core.inference import onnx_graph
from alexnet_cli.core.inference.session import CUDA, Session
from alexnet_cli.core.model.architecture import PARAMETERS, norm_spec
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.model.network import Network, initialize, parameters_by_name
from alexnet_cli.core.parallel.placement import place
from alexnet_cli.errors import AlexNetError
from alexnet_cli.recipe import PAPER, SIDE, Recipe
from alexnet_plugins.benchmark import stock_network
from alexnet_plugins.benchmark.sample_images import draw_jpeg, find_jpegs
from alexnet_plugins.benchmark.stock_network import GRAY
from alexnet_plugins.benchmark.timing import BenchmarkCase, BenchmarkOptions, Work, start_script_process
from alexnet_plugins.benchmark.training import (
    CLASSES,
    Conditions,
    build_stock,
    get_memory_format,
    set_script_defaults,
    stock_arithmetic,
)

RECIPE = replace(PAPER, dropout_inverted=True)  # PyTorch's dropout, so that all run one network
BATCHES = (1, 64)
CALIBRATION_IMAGES = 8  # random weights have no accuracy to lose

Crops = npt.NDArray[np.float32]


def compare_inference(options: BenchmarkOptions) -> Generator[BenchmarkCase]:
    """Yield for each number of crops at a time a case of the float32 file and one of the int8 file.

    All run on the CPU if ONNX Runtime cannot use the GPU.
    """
    gpus, workers, remarks = options.gpus, options.workers, list[str]()
    placement = place(gpus, "fp32")
    if placement.device.type == "cuda" and (state := check_onnx_providers().get(CUDA, "not installed")) != "ok":
        remarks = [f"on the CPU: ONNX Runtime cannot use {placement.name} ({CUDA}: {state})"]
        gpus = "none"
        placement = place(gpus, "fp32")
    has_bf16 = place(gpus, "bf16").precision == "bf16"
    device, on_gpu = placement.device, placement.device.type == "cuda"
    sessions = {
        name: Session(path, provider="cuda" if on_gpu else "cpu", gpu=device.index or 0, threads=workers)
        for name, path in write_files(options.scratch).items()
    }
    with start_script_process() as process:

        def run_apart(conditions: Conditions, *, channels_last: bool, bf16: bool) -> Work:
            return lambda: process.submit(run_stock, conditions, channels_last, bf16).result()

        for size in (options.batch_size,) if options.batch_size else BATCHES:
            conditions = Conditions(RECIPE, size, 1, str(device), workers)
            stock = {"stock: contiguous, float32": run_apart(conditions, channels_last=False, bf16=False)}
            if has_bf16:
                stock["stock: channels-last, bf16"] = run_apart(conditions, channels_last=True, bf16=True)
            crops = make_crops(size)
            ours = {name: functools.partial(_run_session, session, crops) for name, session in sessions.items()}
            where, noun = placement.name if on_gpu else "cpu", "crop" if size == 1 else "crops"
            notes = [f"{where}, {size} {noun} at a time, float32; random weights", *remarks]
            fp32_peers = stock | {
                "ours, fp16": ours["fp16"],
                "ONNX's own LRN operator": ours["operator"],
                "limit: no normalization": ours["bare"],
            }
            int8_peers = stock | {"ours, fp32": ours["fp32"], "limit: no normalization": ours["bare int8"]}
            yield BenchmarkCase(f"infer fp32, {size}", ours["fp32"], fp32_peers, notes)
            yield BenchmarkCase(f"infer int8, {size}", ours["int8"], int8_peers, notes)


def make_crops(count: int) -> Crops:
    """Return noise in 0..255, float32 N x 3 x S x S."""
    shape = (count, 3, RECIPE.input_size, RECIPE.input_size)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8).astype(np.float32)


def make_model(recipe: Recipe) -> Model:
    """Return the network with its initial weights and a gray mean image."""
    network = Network(recipe, CLASSES)
    initialize(network)
    tensors = {name: value.detach().numpy() for name, value in parameters_by_name(network)}
    tensors["mean"] = np.full((3, SIDE, SIDE), GRAY, np.float32)
    return Model(Path("drawn"), tensors, recipe, tuple(ClassName(f"class {i}") for i in range(CLASSES)), {})


def write_files(folder: Path) -> dict[str, Path]:
    """Write ours in every precision, with ONNX's LRN operator, and without normalization. Returns name -> file."""
    model, bare = make_model(RECIPE), make_model(replace(RECIPE, lrn="none"))
    graphs = {
        "fp32": onnx_graph.build_graph(model),
        "int8": _quantize(model),
        "operator": use_lrn_operator(onnx_graph.build_graph(model), RECIPE),
        "fp16": build_onnx(model, "fp16"),
        "bare": onnx_graph.build_graph(bare),
        "bare int8": _quantize(bare),
    }
    files = {name: folder / f"{name}.onnx" for name in graphs}
    for name, graph in graphs.items():
        onnx_graph.save_graph(graph, files[name])
    return files


def _quantize(model: Model) -> onnx.ModelProto:
    """Return the int8 graph, calibrated on noise."""
    graph = onnx_graph.build_graph(model, rows=True)
    return to_int8(graph, measure_ranges(graph, make_crops(CALIBRATION_IMAGES).astype(np.uint8)))


def use_lrn_operator(model: onnx.ModelProto, recipe: Recipe) -> onnx.ModelProto:
    """Return the same network with ONNX's own operator for response normalization, towers as separate images."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    graph = result.graph
    del graph.node[:]
    spec = norm_spec(recipe, "norm")
    alpha = spec.alpha * spec.size  # the operator divides it by the size
    settings: dict[str, Any] = {"size": spec.size, "alpha": alpha, "beta": spec.beta, "bias": spec.k}
    biases = {tensor.name: tensor.dims[0] for tensor in graph.initializer if tensor.name.endswith(".bias")}
    for node in model.graph.node:
        norm, _, part = node.name.partition(".")
        if not norm.startswith("norm"):
            graph.node.append(node)
            continue
        if part:
            continue
        maps = biases[f"conv{norm[-1]}.bias"]
        for suffix, channels in (("split", maps // recipe.towers), ("whole", maps)):
            shape = np.array([-1, channels, 0, 0], np.int64)
            graph.initializer.append(numpy_helper.from_array(shape, f"{node.name}.{suffix}"))
        towers, normalized = f"{node.name}.towers", f"{node.name}.normalized"
        graph.node.append(helper.make_node("Reshape", [node.input[0], f"{node.name}.split"], [towers]))
        graph.node.append(helper.make_node("LRN", [towers], [normalized], **settings))
        graph.node.append(helper.make_node("Reshape", [normalized, f"{node.name}.whole"], [node.output[0]]))
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    return result


def _run_session(session: Session, crops: Crops) -> int:
    return len(session.probabilities(crops))


def run_stock(conditions: Conditions, channels_last: bool, bf16: bool) -> int:
    """Classify crops in memory with PyTorch's own layers. Returns the number of images."""
    network = _get_stock(conditions, channels_last)
    images = _get_images(conditions.batch, channels_last).to(conditions.device)
    with torch.inference_mode(), stock_arithmetic(conditions.device, bf16=bf16):
        return len(torch.softmax(network(images).float(), 1).cpu())


@functools.cache
def _get_stock(conditions: Conditions, channels_last: bool) -> nn.Module:
    set_script_defaults(conditions.threads)
    network = build_stock(conditions.recipe, CLASSES).eval()
    return network.to(conditions.device).to(memory_format=get_memory_format(channels_last))


@functools.cache
def _get_images(count: int, channels_last: bool) -> torch.Tensor:
    return torch.from_numpy(make_crops(count) - GRAY).contiguous(memory_format=get_memory_format(channels_last))


def compare_startup(options: BenchmarkOptions) -> Generator[BenchmarkCase]:
    """Yield a case of the float32 file and one of the int8 file, against a script of torch and torchvision."""
    scratch = options.scratch
    files = write_files(scratch)
    image = next(iter(find_jpegs(options.pictures)), None) if options.pictures else None
    if image is None:
        image = scratch / "image.jpg"
        image.write_bytes(draw_jpeg(0))
    ours = {
        name: _run_python("-m", "alexnet_cli", "predict", str(image), "-w", str(files[name]), "-q")
        for name in ("fp32", "int8", "fp16")
    }
    peers = {
        "a script of torch and torchvision": _run_python(*write_script(scratch), str(image)),
        "limit: the imports alone": _run_python("-c", "import numpy, PIL.Image, onnxruntime, typer"),
    }
    notes = ["a new process each time, files in the system's cache: start, import, open, one image, five labels"]
    yield BenchmarkCase("startup fp32", ours["fp32"], peers | {"ours, fp16": ours["fp16"]}, notes, unit="s")
    yield BenchmarkCase("startup int8", ours["int8"], peers | {"ours, fp32": ours["fp32"]}, notes, unit="s")


def write_script(scratch: Path) -> list[str]:
    """Write the weights of the same network as a PyTorch file. Returns Python's arguments for the script with them."""
    tensors = make_model(RECIPE).tensors
    torch.save({name: torch.from_numpy(tensors[name].copy()) for name in PARAMETERS}, scratch / "weights.pt")
    return ["-P", stock_network.__file__, str(scratch / "weights.pt")]  # -P: import nothing from the script's folder


def _run_python(*arguments: str) -> Work:
    """Start Python with these arguments and wait for its end."""

    def run() -> int:
        done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise AlexNetError(f"{' '.join(arguments[:3])} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return 1

    return run
