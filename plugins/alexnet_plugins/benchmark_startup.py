"""`alexnet benchmark startup`: from a command to an answer about one picture, each time in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_cli.errors import AlexNetError
from alexnet_plugins import benchmark_infer, benchmark_pictures
from alexnet_plugins.benchmark_step import CLASSES, stock

if TYPE_CHECKING:
    from alexnet_cli.core.stopwatch import Contest, Pass

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


def contests(scratch: Path, picture: Path | None) -> Generator[Contest]:
    """One for the float32 file, one for the int8 file, against a script of torch and torchvision."""
    from alexnet_cli.core.stopwatch import Contest

    files = benchmark_infer.write_files(scratch)
    if picture is None:
        picture = scratch / "picture.jpg"
        picture.write_bytes(benchmark_pictures.picture(0))
    ours = {kind: _process("-m", "alexnet_cli", "predict", str(picture), "-w", str(files[kind]), "-q")
            for kind in ("fp32", "int8", "fp16")}  # fmt: skip
    rival = _process(*script(scratch), str(picture), *widths_and_classes())
    bare = _process("-c", "import numpy, PIL.Image, onnxruntime, typer")
    notes = ["each a fresh process, files in the cache of the system: start, import, open, one picture, five answers"]
    peers = {"a script of torch and torchvision": rival, "limit: the imports alone": bare}
    yield Contest("startup fp32", ours["fp32"], peers | {"ours, fp16": ours["fp16"]}, notes, unit="s")
    yield Contest("startup int8", ours["int8"], peers | {"ours, fp32": ours["fp32"]}, notes, unit="s")


def script(scratch: Path) -> list[str]:
    """The script, and the weights of the same network as anybody keeps them."""
    import torch

    (scratch / "script.py").write_text(SCRIPT, encoding="utf-8")
    values = benchmark_infer.model(benchmark_infer.RECIPE).tensors
    parts = stock(benchmark_infer.RECIPE, CLASSES)
    places = [name for name, part in parts.named_children() if any(True for _ in part.parameters())]
    numbers = [i for i, (_, part) in enumerate(parts.named_children()) if any(True for _ in part.parameters())]
    state = {
        f"{number}.{kind}": torch.from_numpy(values[f"{place}.{kind}"].copy())
        for number, place in zip(numbers, places, strict=True)
        for kind in ("weight", "bias")
    }
    torch.save(state, scratch / "weights.pt")
    return [str(scratch / "script.py"), str(scratch / "weights.pt")]


def widths_and_classes() -> list[str]:
    """Of conv1 to conv5, of fc6, and the number of classes."""
    from alexnet_cli.core.architecture import layer_widths

    per_tower, recipe = layer_widths(benchmark_infer.RECIPE), benchmark_infer.RECIPE
    counts = [recipe.towers * per_tower[layer] for layer in ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6")]
    return [str(count) for count in (*counts, CLASSES)]


def _process(*words: str) -> Pass:
    """Python with these words, until it has ended."""

    def run() -> int:
        done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
        if done.returncode:
            raise AlexNetError(f"{' '.join(words[:3])} ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        return 1

    return run
