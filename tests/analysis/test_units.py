"""Activations of units and their top images, compared with PyTorch and with a sort of all activations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from alexnet_cli.core.analysis.units import (
    ActivationBatch,
    cut_receptive_field,
    find_top_activations,
    iterate_activations,
    read_images,
)
from alexnet_cli.core.data import images
from alexnet_cli.core.data.shards import Split, open_dataset
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model.architecture import receptive_field
from alexnet_cli.core.model.model_file import Model
from alexnet_cli.core.model.network import network_from_model
from alexnet_cli.errors import DataError, WeightsError
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, Recipe
from model_files import random_model, save_onnx


@pytest.fixture(scope="module")
def split(prepared: Path) -> Split:
    return open_dataset(prepared).split("val")


def in_torch(model: Model, split: Split, layer: str) -> torch.Tensor:
    """A layer's output over the split, by a hook on the module of that name."""
    low, size = (256 - model.recipe.input_size) // 2, model.recipe.input_size
    window = slice(low, low + size)
    decoded = [images.decode(bytes(split.jpeg(row))).transpose(2, 0, 1)[:, window, window] for row in range(len(split))]
    mean = model.mean[:, window, window]
    if model.recipe.mean == "rgb":
        mean = model.mean.mean((1, 2), keepdims=True)
    network, seen = network_from_model(model), []
    network.get_submodule(layer).register_forward_hook(lambda _m, _i, output: seen.append(output.clone()))
    with torch.no_grad():
        network(torch.from_numpy(np.stack(decoded) - mean) / model.recipe.input_divisor)
    result: torch.Tensor = seen[0]
    return result


@pytest.mark.parametrize(
    ("recipe", "layer"),
    [
        (PAPER, "conv1"),
        (replace(PAPER, towers=1), "conv5"),
        (PAPER, "drop7"),
        (CAFFE, "drop6"),
        (CAFFE, "conv2"),
        (KRIZHEVSKY, "conv3"),
    ],
)
def test_responses_are_those_of_torch(recipe: Recipe, layer: str, split: Split, tmp_path: Path) -> None:
    model = random_model(replace(recipe, width=1 / 32))
    save_onnx(model, tmp_path / "m.onnx")
    expected = in_torch(model, split, layer).numpy()
    for source in (model, tmp_path / "m.onnx"):
        found = list(iterate_activations(split, Session(source, layers=[layer])))
        assert np.concatenate([rows for rows, _ in found]).tolist() == list(range(20))
        np.testing.assert_allclose(np.concatenate([v for _, v in found]), expected, rtol=1e-3, atol=1e-4)


def test_a_session_computes_nothing_behind_its_layer(split: Split) -> None:
    model = random_model(replace(PAPER, width=1 / 32))
    broken = dict(model.tensors) | {"conv4.weight": np.full_like(model.tensors["conv4.weight"], np.nan)}
    found = next(iter(iterate_activations(split, Session(replace(model, tensors=broken), layers=["conv3"]))))
    assert np.isfinite(found.values).all()
    with pytest.raises(WeightsError, match="computes NaN"):
        next(iter(iterate_activations(split, Session(replace(model, tensors=broken), layers=["conv4"]))))


def test_pictures_come_in_the_order_of_the_rows_and_a_damaged_one_is_named(split: Split) -> None:
    found = list(read_images(split, [7, 0, 7]))
    assert [(p == images.decode(bytes(split.jpeg(r)))).all() for p, r in zip(found, [7, 0, 7], strict=True)] == [
        True
    ] * 3

    class Damaged(Split):
        def jpeg(self, row: int) -> memoryview:
            return memoryview(b"\xff\xd8 nothing") if row == 3 else super().jpeg(row)

    damaged = Damaged(split.name, split.folder, split.rows, split.files)
    with pytest.raises(DataError, match=r"\(row 3\) of split val"):
        list(read_images(damaged, range(5)))


def batches(values: np.ndarray, size: int) -> list[ActivationBatch]:
    return [
        ActivationBatch(np.arange(i, min(i + size, len(values))), values[i : i + size])
        for i in range(0, len(values), size)
    ]


@pytest.mark.parametrize(("size", "k"), [(1, 3), (4, 3), (50, 9), (7, 60)])
def test_the_strongest_are_found_in_one_pass_whatever_the_batch(size: int, k: int) -> None:
    values = np.random.default_rng(0).integers(-9, 9, (50, 6, 3, 4)).astype(np.float32)  # with many ties
    found = find_top_activations(batches(values, size), k)
    assert found is not None
    for unit in range(6):
        answers = [(-float(values[i, unit].max()), i) for i in range(50)]
        best = sorted(answers)[:k]
        assert found.rows[unit].tolist() == [i for _, i in best]
        assert found.values[unit].tolist() == [-v for v, _ in best]
        for row, (y, x) in zip(found.rows[unit], found.positions[unit], strict=True):
            assert values[row, unit, y, x] == values[row, unit].max()
    order = found.sort_units(np.array([4, 1, 5]))
    assert found.values[order, 0].tolist() == sorted(found.values[[4, 1, 5], 0].tolist(), reverse=True)


def test_layers_without_maps_have_one_place_and_no_pictures_give_nothing() -> None:
    values = np.random.default_rng(1).standard_normal((10, 5)).astype(np.float32)
    found = find_top_activations(batches(values, 4), 2)
    assert found is not None
    assert (found.rows == np.argsort(-values, axis=0)[:2].T).all()
    assert not found.positions.any()
    assert find_top_activations([], 3) is None


def test_a_patch_is_gray_outside_the_image() -> None:
    image = np.random.default_rng(0).integers(0, 100, (256, 256, 3), dtype=np.uint8)
    (top, bottom), (left, right) = (receptive_field(PAPER, "conv3", p, clipped=False) for p in (0, 6))
    patch = cut_receptive_field(image, PAPER, "conv3", (0, 6))
    assert patch.shape == (99, 99, 3)
    assert top < 16 < bottom < 240
    assert (patch[: 16 - top] == 128).all()
    assert (patch[16 - top :] == image[16:bottom, left:right]).all()
