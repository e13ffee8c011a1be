"""Section 6.1 on an imported network: the towers of a .caffemodel are measured like those of a trained run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import weights_files as files
from commands import alexnet

WIDER = 4  # times the kernels of weights_files: 12 a tower, a quarter of the paper's
TOWER = WIDER * files.C["conv1"] // 2


@pytest.fixture
def layers() -> dict[str, tuple[files.Floats, files.Floats]]:
    """A network of a quarter of the width; but for layer 1, whose kernels a test gives, all weights are one value."""
    layers = {}
    for layer, (first, *rest) in files.SHAPES.items():
        seen = [n * (WIDER if i == 0 and layer != "conv1" else 1) for i, n in enumerate(rest)]
        count = first if layer == "fc8" else first * WIDER
        layers[layer] = (np.full((count, *seen), 0.01, np.float32), np.zeros(count, np.float32))
    return layers


def measure_towers(
    layers: dict[str, tuple[files.Floats, files.Floats]], kernels: files.Floats, home: Path
) -> dict[str, Any]:
    """Import a Caffe network (BGR) with this first layer; returns the JSON of `visualize-filters`."""
    layers["conv1"] = (kernels, layers["conv1"][1])
    (home / "network.caffemodel").write_bytes(files.caffemodel(layers, 2))
    assert alexnet("import-weights", "network.caffemodel", "-q", folder=home).returncode == 0
    result = alexnet("visualize-filters", "-w", "network", "--json", folder=home)
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout))


def noise(count: int, seed: int) -> files.Floats:
    return np.random.default_rng(seed).standard_normal((count, 3, 11, 11), dtype=np.float32)


def test_random_kernels_have_two_thirds_color_and_equal_towers(
    layers: dict[str, tuple[files.Floats, files.Floats]], tmp_path: Path
) -> None:
    summary = measure_towers(layers, noise(2 * TOWER, 1), tmp_path)
    low, high = summary["auc_interval"]
    assert low <= 0.5 <= summary["auc"] <= high
    assert summary["p_value"] > 0.05
    assert list(summary["chroma_fraction"].values()) == pytest.approx([2 / 3] * 2, abs=0.03)
    assert summary["undertrained"]


@pytest.mark.parametrize("color_tower", [1, 2])
def test_a_planted_color_tower_is_found(
    layers: dict[str, tuple[files.Floats, files.Floats]], tmp_path: Path, color_tower: int
) -> None:
    """Stripes, gray in one tower, red against blue in the other."""
    x = np.arange(11, dtype=np.float32)
    waves = np.sin(np.linspace(0.4, 1.2, TOWER, dtype=np.float32)[:, None] * x)
    stripes = np.tile(waves[:, None, None], (1, 1, 11, 1))
    gray = stripes * np.ones((3, 1, 1), np.float32)
    color = stripes * np.array([-1, 0, 1], np.float32)[:, None, None]
    planted = [gray, color] if color_tower == 2 else [color, gray]
    summary = measure_towers(layers, np.concatenate(planted) + 0.05 * noise(2 * TOWER, 2), tmp_path)
    assert summary["auc"] == 1
    assert summary["auc_interval"][0] > 0.5
    assert summary["p_value"] < 0.001
    chroma = summary["chroma_fraction"]
    assert chroma[f"tower{color_tower}"] > 0.95
    assert chroma[f"tower{3 - color_tower}"] < 0.05
    assert not summary["undertrained"]
