"""Models with random weights and drawn pictures, for tests that need a network but not a trained one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alexnet_cli.core.classes import ClassName
from alexnet_cli.core.weights import Model, metadata
from alexnet_cli.recipe import Recipe

TWO_TOWERS = (48, 128, 192, 192, 128, 2048, 2048)
ONE_TOWER = (48, 128, 192, 192, 256, 4096, 4096)
KERNELS = (11, 5, 3, 3, 3)


def random_model(recipe: Recipe, classes: int = 10, seed: int = 0, info: Mapping[str, Any] | None = None) -> Model:
    """Weights whose activations neither die nor explode; biases and the mean image vary too."""
    generator = np.random.default_rng(seed)
    per_tower = TWO_TOWERS if recipe.towers == 2 else ONE_TOWER
    c = [recipe.towers * max(1, round(n * recipe.width)) for n in per_tower]
    seen = [3, c[0] // recipe.towers, c[1], c[2] // recipe.towers, c[3] // recipe.towers]
    shapes = {f"conv{i + 1}": (c[i], seen[i], k, k) for i, k in enumerate(KERNELS)}
    shapes |= {"fc6": (c[5], c[4] * 36), "fc7": (c[6], c[5]), "fc8": (classes, c[6])}  # type: ignore[dict-item]
    tensors = {}
    for layer, shape in shapes.items():
        scale = np.sqrt(2 / np.prod(shape[1:]))
        scale *= 1 if layer != "conv1" else recipe.input_divisor / 20
        tensors[f"{layer}.weight"] = (scale * generator.standard_normal(shape)).astype(np.float32)
        tensors[f"{layer}.bias"] = (0.3 * generator.standard_normal(shape[0])).astype(np.float32)
    tensors["mean"] = generator.uniform(60, 180, (3, 256, 256)).astype(np.float32)
    names = tuple(ClassName(f"class {i}", f"n{i:08d}") for i in range(classes))
    return Model(Path("random"), tensors, recipe, names, dict(info or {}))


def save_model(model: Model, path: Path) -> Path:
    """Write a model file; returns its path."""
    from safetensors.numpy import save_file

    save_file(dict(model.tensors), path, metadata(model.recipe, model.classes, model.info))
    return path


def draw(path: Path, seed: int, size: tuple[int, int] = (300, 280)) -> str:
    """A random, blotchy picture; returns its path."""
    small = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return str(path)
