"""`alexnet benchmark infer` and `startup`: from crops to probabilities, and from a command to an answer.

All run the paper's network at full width on the same crops: the files that `alexnet export` writes, and PyTorch in a
process of its own, with threads and memory as any script has them. For `startup`, every run is a process of its own.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Generator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import helper, numpy_helper
from torch import nn

from alexnet_cli.core.data.classes import ClassName
from alexnet_cli.core.export.export import build_onnx
from alexnet_cli.core.export.quantize import measure_ranges, to_int8
from alexnet_cli.core.inference import onnx_graph
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.architecture import layer_widths
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.model.network import Network, initialize, parameters_by_name
from alexnet_cli.errors import AlexNetError
from alexnet_cli.recipe import PAPER, SIDE, Recipe
from alexnet_plugins.benchmark import images as benchmark_pictures
from alexnet_plugins.benchmark.stopwatch import Contest, Pass, fresh_process
from alexnet_plugins.benchmark.training import CLASSES, FORMATS, Conditions, Layout, arithmetic, build_stock

if TYPE_CHECKING:
    from alexnet_cli.core.parallel.placement import Placement

RECIPE = replace(PAPER, dropout_inverted=True)  # dropout as torch has it: the same network in all
BATCHES = (1, 64)
CALIBRATION = 8  # pictures: weights that have learned nothing have no accuracy to lose
GRAY = 120

Crops = npt.NDArray[np.float32]
SCRIPT = """\
import sys

import torch
from PIL import Image
from torch import nn
from torchvision import transforms


class TowerNorm(nn.LocalResponseNorm):
    def forward(self, x):
        n, c, h, w = x.shape
        return super().forward(x.reshape(2 * n, c // 2, h, w)).reshape(n, c, h, w)


def norm():
    return TowerNorm(5, alpha=5e-4, beta=0.75, k=2.0)


def conv(*shape, **where):
    return [nn.Conv2d(*shape, **where), nn.ReLU()]


a, b, c, d, e, f, classes = map(int, sys.argv[3:])
network = nn.Sequential(
    nn.ZeroPad2d((0, 3, 0, 3)), *conv(3, a, 11, stride=4), norm(), nn.MaxPool2d(3, 2),
    *conv(a, b, 5, padding=2, groups=2), norm(), nn.MaxPool2d(3, 2),
    *conv(b, c, 3, padding=1), *conv(c, d, 3, padding=1, groups=2), *conv(d, e, 3, padding=1, groups=2),
    nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(36 * e, f), nn.ReLU(), nn.Dropout(), nn.Linear(f, f), nn.ReLU(),
    nn.Dropout(), nn.Linear(f, classes),
)
network.load_state_dict(torch.load(sys.argv[1]))
network.eval()
to_tensor = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224), transforms.PILToTensor()])
with torch.inference_mode():
    picture = to_tensor(Image.open(sys.argv[2]).convert("RGB")).float() - 120
    top = network(picture[None]).softmax(1)[0].topk(min(5, classes))
for index, probability in zip(top.indices.tolist(), top.values.tolist()):
    print(f"class {index:4}  {probability:.2f}")
"""


def compare_inference(
    placement: Placement, batch: int | None, workers: int, scratch: Path, *, bf16: bool
) -> Generator[Contest]:
    """For each number of crops at a time, one for the float32 file and one for the int8 file."""
    device, on_gpu = placement.device, placement.device.type == "cuda"
    sessions = {
        name: Session(path, provider="cuda" if on_gpu else "cpu", gpu=device.index or 0, threads=workers)
        for name, path in write_files(scratch).items()
    }
    with fresh_process() as process:
        for size in (batch,) if batch else BATCHES:
            conditions = Conditions(RECIPE, size, 1, str(device), workers)
            theirs = {"stock: contiguous, float32": _stock_in_process(process, conditions, "contiguous", bf16=False)}
            if bf16:
                theirs["stock: channels-last, bf16"] = _stock_in_process(
                    process, conditions, "channels-last", bf16=True
                )
            ours = {
                name: functools.partial(_run_session, session, make_crops(size)) for name, session in sessions.items()
            }
            where, many = placement.name if on_gpu else "cpu", "crop" if size == 1 else "crops"
            notes = [f"{where}, {size} {many} at a time, float32; the weights are drawn"]
            peers = {"ours, fp16": "fp16", "ONNX's own LRN operator": "operator", "limit: no normalization": "bare"}
            yield Contest(f"infer fp32, {size}", ours["fp32"], theirs | {k: ours[v] for k, v in peers.items()}, notes)
            peers = {"ours, fp32": "fp32", "limit: no normalization": "bare int8"}
            yield Contest(f"infer int8, {size}", ours["int8"], theirs | {k: ours[v] for k, v in peers.items()}, notes)


def make_crops(count: int) -> Crops:
    """Noise in 0..255, N x 3 x S x S."""
    shape = (count, 3, RECIPE.input_size, RECIPE.input_size)
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8).astype(np.float32)


def make_model(recipe: Recipe) -> Model:
    """The network with its initial values; what is subtracted is gray."""
    network = Network(recipe, CLASSES)
    initialize(network)
    tensors = {name: value.detach().numpy() for name, value in parameters_by_name(network)}
    tensors["mean"] = np.full((3, SIDE, SIDE), GRAY, np.float32)
    return Model(Path("drawn"), tensors, recipe, tuple(ClassName(f"class {i}") for i in range(CLASSES)), {})


def write_files(folder: Path) -> dict[str, Path]:
    """Ours in every precision, the same with ONNX's operator, and without normalization."""
    whole, bare = make_model(RECIPE), make_model(replace(RECIPE, lrn="none"))
    protos = {
        "fp32": onnx_graph.build_graph(whole),
        "int8": quantize(whole),
        "operator": use_lrn_operator(onnx_graph.build_graph(whole), RECIPE),
        "fp16": build_onnx(whole, "fp16"),
        "bare": onnx_graph.build_graph(bare),
        "bare int8": quantize(bare),
    }
    files = {name: folder / f"{name}.onnx" for name in protos}
    for name, proto in protos.items():
        onnx_graph.save_graph(proto, files[name])
    return files


def quantize(model: Model) -> onnx.ModelProto:
    """The int8 graph; calibrated on noise."""
    proto = onnx_graph.build_graph(model, rows=True)
    return to_int8(proto, measure_ranges(proto, make_crops(CALIBRATION).astype(np.uint8)))


def use_lrn_operator(proto: onnx.ModelProto, recipe: Recipe) -> onnx.ModelProto:
    """The same network with ONNX's own operator for normalization across maps; towers become images."""
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
        tower, result_of = f"{node.name}.tower", f"{node.name}.normalized"
        graph.node.append(helper.make_node("Reshape", [node.input[0], f"{node.name}.apart"], [tower]))
        graph.node.append(helper.make_node("LRN", [tower], [result_of], **settings))
        graph.node.append(helper.make_node("Reshape", [result_of, f"{node.name}.whole"], [node.output[0]]))
    used = {name for node in graph.node for name in node.input}
    for tensor in [tensor for tensor in graph.initializer if tensor.name not in used]:
        graph.initializer.remove(tensor)
    return result


def _run_session(session: Session, batch: Crops) -> int:
    return len(session.probabilities(batch))


def _stock_in_process(process: ProcessPoolExecutor, conditions: Conditions, layout: Layout, *, bf16: bool) -> Pass:
    return lambda: process.submit(run_stock, conditions, layout, bf16).result()


def run_stock(conditions: Conditions, layout: Layout, bf16: bool) -> int:
    """A pass of the same network from torch's own parts: as in ours, from crops in memory to answers in memory."""
    network = _cached_stock(conditions.recipe, conditions.device, conditions.threads, layout)
    images = _cached_images(conditions.batch, layout).to(conditions.device)
    with torch.inference_mode(), arithmetic(conditions.device, bf16=bf16):
        return len(torch.softmax(network(images).float(), 1).cpu())


@functools.cache
def _cached_stock(recipe: Recipe, device: str, threads: int, layout: Layout) -> nn.Module:
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False  # float32 is to mean the same as in ours
    return build_stock(recipe, CLASSES).eval().to(device).to(memory_format=FORMATS[layout])


@functools.cache
def _cached_images(count: int, layout: Layout) -> torch.Tensor:
    return torch.from_numpy(make_crops(count) - GRAY).contiguous(memory_format=FORMATS[layout])


def compare_startup(scratch: Path, picture: Path | None) -> Generator[Contest]:
    """One for the float32 file, one for the int8 file, against a script of torch and torchvision."""
    files = write_files(scratch)
    if picture is None:
        picture = scratch / "picture.jpg"
        picture.write_bytes(benchmark_pictures.picture(0))
    ours = {kind: _run_python("-m", "alexnet_cli", "predict", str(picture), "-w", str(files[kind]), "-q")
            for kind in ("fp32", "int8", "fp16")}  # fmt: skip
    rival = _run_python(*write_script(scratch), str(picture), *script_arguments())
    bare = _run_python("-c", "import numpy, PIL.Image, onnxruntime, typer")
    notes = ["each a fresh process, files in the cache of the system: start, import, open, one picture, five answers"]
    peers = {"a script of torch and torchvision": rival, "limit: the imports alone": bare}
    yield Contest("startup fp32", ours["fp32"], peers | {"ours, fp16": ours["fp16"]}, notes, unit="s")
    yield Contest("startup int8", ours["int8"], peers | {"ours, fp32": ours["fp32"]}, notes, unit="s")


def write_script(scratch: Path) -> list[str]:
    """The script, and the weights of the same network as anybody keeps them."""
    (scratch / "script.py").write_text(SCRIPT, encoding="utf-8")
    values = make_model(RECIPE).tensors
    parts = build_stock(RECIPE, CLASSES)
    places = [name for name, part in parts.named_children() if any(True for _ in part.parameters())]
    numbers = [i for i, (_, part) in enumerate(parts.named_children()) if any(True for _ in part.parameters())]
    state = {
        f"{number}.{kind}": torch.from_numpy(values[f"{place}.{kind}"].copy())
        for number, place in zip(numbers, places, strict=True)
        for kind in ("weight", "bias")
    }
    torch.save(state, scratch / "weights.pt")
    return [str(scratch / "script.py"), str(scratch / "weights.pt")]


def script_arguments() -> list[str]:
    """Of conv1 to conv5, of fc6, and the number of classes."""
    per_tower = layer_widths(RECIPE)
    counts = [RECIPE.towers * per_tower[layer] for layer in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6")]
    return [str(count) for count in (*counts, CLASSES)]


def _run_python(*words: str) -> Pass:
    """Python with these words, until it has ended."""

    def run() -> int:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise AlexNetError(f"{' '.join(words[:3])} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return 1

    return run
