"""Hostile model files, checkpoints, prepared sets and recipes: each gives an error or correct results."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from alexnet_cli.core.data import shards
from alexnet_cli.core.data.loader import Loader, all_batches
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.model import model_file
from alexnet_cli.core.model.architecture import PARAMETERS, tensor_shapes
from alexnet_cli.core.runs.run import MODEL, Run
from alexnet_cli.core.training import checkpoint
from alexnet_cli.errors import DataError, RecipeError, WeightsError
from alexnet_cli.recipe import PAPER, TINY
from alexnet_cli.recipe_io import load_recipe
from hostile import JSON, MUTATIONS, corrupt, limit_time_and_memory, repeatable, replace_part, result_or_message
from model_files import random_model, save_model, save_onnx

RECIPE = replace(TINY, width=1 / 64)


@pytest.fixture(autouse=True)
def _limits() -> Iterator[None]:
    with limit_time_and_memory():
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a valid model file and its ONNX file."""
    folder = tmp_path_factory.mktemp("models")
    model = model_file.read_model(save_model(random_model(RECIPE, 4), folder / "valid.safetensors"))
    save_onnx(model, folder / "valid.onnx")
    return folder


def read_error(path: Path) -> str:
    """Return the error of reading a model file; empty if it can be read, and then its tensors fit its recipe."""
    model = result_or_message(lambda: model_file.read_model(path))
    if isinstance(model, str):
        return model
    shapes = tensor_shapes(model.recipe, len(model.classes))
    assert {name: tensor.shape for name, tensor in model.tensors.items()} == shapes
    assert all(isinstance(name.name, str) for name in model.classes)
    return ""


def split_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header and the tensors of a safetensors file."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header: Any, tensors: bytes, size: int | None = None) -> bytes:
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text) if size is None else size) + text + tensors


@given(MUTATIONS)
@repeatable(15)
def test_corrupt_model_files(folder: Path, mutations: list[tuple[str, int, bytes]]) -> None:
    (folder / "x.safetensors").write_bytes(corrupt((folder / "valid.safetensors").read_bytes(), mutations, 4000))
    read_error(folder / "x.safetensors")


@pytest.mark.parametrize(
    "lie",
    [{"shape": [2**62]}, {"dtype": "F64"}, {"dtype": 7}, {"data_offsets": [0, 2**63]}, None],
)
def test_a_header_that_does_not_fit_its_tensors(folder: Path, lie: dict[str, Any] | None) -> None:
    header, tensors = split_safetensors(folder / "valid.safetensors")
    rest = {k: v for k, v in header.items() if k != "fc7.weight"}
    header = rest if lie is None else header | {"fc7.weight": header["fc7.weight"] | lie}
    (folder / "x.safetensors").write_bytes(join_safetensors(header, tensors))
    assert read_error(folder / "x.safetensors")


def test_a_wrong_header_size_takes_no_memory(folder: Path) -> None:
    header, tensors = split_safetensors(folder / "valid.safetensors")
    path = folder / "x.safetensors"
    for size in (0, 2**31, 2**64 - 1):
        path.write_bytes(join_safetensors(header, tensors, size))
        assert read_error(path)
    path.write_bytes(join_safetensors(header, tensors, 90 << 20))  # parsed, such a header could take gigabytes
    os.truncate(path, 95 << 20)
    assert "its header has 94,371,840 bytes" in read_error(path)
    path.unlink()


@pytest.mark.parametrize("kind", ["safetensors", "onnx"])
@given(data=st.data())
@repeatable(20)
def test_corrupt_metadata(folder: Path, kind: str, data: st.DataObject) -> None:
    """Any JSON in any place: an error, or probabilities of the file's classes."""
    path = folder / f"x.{kind}"
    proto = onnx.load(folder / "valid.onnx")
    header, tensors = split_safetensors(folder / "valid.safetensors")
    text = header["__metadata__"] if kind == "safetensors" else {p.key: p.value for p in proto.metadata_props}
    key = data.draw(st.sampled_from([k for k in text if not k.startswith("Image.")]))
    steps = data.draw(st.lists(st.integers(0, 60), max_size=3))
    junk = data.draw(JSON | st.sampled_from(["[" * 100_000, '{"a":' * 50_000, "9" * 5000, "", "NaN"]))
    try:
        old = json.loads(text[key])
    except ValueError:
        old = text[key]
    lie = junk if isinstance(junk, str) and len(junk) > 100 else json.dumps(replace_part(old, steps, junk))
    if kind == "safetensors":
        path.write_bytes(join_safetensors(header | {"__metadata__": text | {key: lie}}, tensors))
        if read_error(path):
            return
    else:
        next(p for p in proto.metadata_props if p.key == key).value = lie
        onnx.save(proto, path)
    opened = result_or_message(lambda: Session(path, provider="cpu"))
    if not isinstance(opened, str):
        side = opened.recipe.input_size
        probabilities = opened.probabilities(np.zeros((1, 3, side, side), np.float32))
        assert probabilities.shape == (1, len(opened.classes))


def test_metadata_that_contradicts_the_recipe(folder: Path) -> None:
    header, tensors = split_safetensors(folder / "valid.safetensors")
    text = header["__metadata__"]
    five = json.dumps([{"name": f"c{i}"} for i in range(5)])
    crop = json.dumps(json.loads(text["preprocess"]) | {"crop": 227})
    bgr = json.dumps(json.loads(text["preprocess"]) | {"channels": "BGR"})
    lies = {
        "fc8.weight is 4 x 64, but recipe tiny with 5 classes needs 5 x 64": {"classes": five},
        "crop is 227": {"preprocess": crop},
    }
    lies |= {"channels is 'BGR'": {"preprocess": bgr}}
    for words, lie in lies.items():
        (folder / "x.safetensors").write_bytes(join_safetensors(header | {"__metadata__": text | lie}, tensors))
        assert words in read_error(folder / "x.safetensors")


@pytest.mark.parametrize("place", [0, len(PARAMETERS) - 1])
def test_the_first_layer_that_differs_is_named(tmp_path: Path, place: int) -> None:
    """All tensors from `place` on have wrong shapes: the message names the first one and both shapes."""
    model = random_model(RECIPE, 4)
    names = PARAMETERS[place:]
    wrong = {name: model.tensors[name][:-1] if name in names[:1] else model.tensors[name][1:] for name in names}
    path = save_model(replace(model, tensors={**model.tensors, **wrong}), tmp_path / "x.safetensors")
    shape, needed = (" x ".join(map(str, tensors[names[0]].shape)) for tensors in (wrong, model.tensors))
    with pytest.raises(WeightsError) as error:
        model_file.read_model(path)
    assert f"{names[0]} is {shape}, but recipe tiny with 4 classes needs {needed}" in error.value.what


def test_weights_with_nan(folder: Path) -> None:
    from alexnet_cli.core.inference.predict import compute_probabilities

    model = random_model(RECIPE, 4)
    model.tensors["conv1.bias"][:] = np.nan
    with pytest.raises(WeightsError, match="computes NaN"):
        compute_probabilities(np.zeros((1, 256, 256, 3), np.uint8), Session(model, provider="cpu"))


# Checkpoints


def checkpoint_with(folder: Path, velocity: bytes, position: Any = None) -> Path:
    """Write a checkpoint with correct checksums."""
    place = folder / "checkpoint"
    place.mkdir(exist_ok=True)
    shutil.copy(folder / "valid.safetensors", place / MODEL)
    (place / checkpoint.OPTIMIZER).write_bytes(velocity)
    sums = {name: sha256((place / name).read_bytes()).hexdigest() for name in (MODEL, checkpoint.OPTIMIZER)}
    meta = {"schema": checkpoint.SCHEMA, "step": 1, "sha256": sums, "position": position or {"step": 3, "epoch": 1}}
    (place / checkpoint.META).write_text(json.dumps(meta))
    return place


VELOCITY = safetensors.torch.save({"conv1.weight": torch.ones(3, 4)})


@pytest.mark.parametrize(
    ("velocity", "position", "error"),
    [
        (b"", None, "cannot be read"),
        (VELOCITY[:-1], None, "cannot be read"),
        (pickle.dumps(1), None, "cannot be read"),
        (safetensors.torch.save({"conv1.weight": torch.ones(3, dtype=torch.float64)}), None, "is not float32"),
        (VELOCITY, "step 3", "has no position"),
    ],
)
def test_corrupt_checkpoints(folder: Path, velocity: bytes, position: Any, error: str) -> None:
    assert error in str(result_or_message(lambda: checkpoint.load(checkpoint_with(folder, velocity, position))))


def test_corrupt_checkpoint_metadata(folder: Path) -> None:
    place = checkpoint_with(folder, VELOCITY)
    assert isinstance(result_or_message(lambda: checkpoint.load(place)), checkpoint.Checkpoint)
    for junk in ("", "[" * 100_000, "[]"):
        (place / checkpoint.META).write_text(junk)
        assert isinstance(result_or_message(lambda: checkpoint.load(place)), str)


# Prepared sets


def load_all(path: Path) -> None:
    """Open a prepared set and load all images, as evaluation does."""
    dataset = shards.open_dataset(path)
    dataset.mean_image()
    split = dataset.split("val")
    with Loader(split, 8, 1) as loader:
        for batch in loader.batches(all_batches(len(split), 8)):
            assert all(split.key(int(row)) for row in batch.rows)


@pytest.fixture
def copy(prepared: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(prepared, tmp_path / "copy"))


@given(data=st.data())
@repeatable(20)
def test_corrupt_dataset_json(copy: Path, prepared: Path, data: st.DataObject) -> None:
    record = json.loads((prepared / "dataset.json").read_text())
    steps = data.draw(st.lists(st.integers(0, 20), max_size=5))
    (copy / "dataset.json").write_text(json.dumps(replace_part(record, steps, data.draw(JSON))))
    result_or_message(lambda: load_all(copy))


@pytest.mark.parametrize("name", ["../secret.tar", "{folder}/secret.tar"])
def test_shards_outside_of_their_folder(copy: Path, name: str) -> None:
    (copy.parent / "secret.tar").write_bytes((copy / "val-000000.tar").read_bytes())
    record = json.loads((copy / "dataset.json").read_text())
    record["splits"]["val"]["shards"][0]["file"] = name.format(folder=copy.parent)
    (copy / "dataset.json").write_text(json.dumps(record))
    assert "is damaged" in str(result_or_message(lambda: load_all(copy)))


@given(st.sampled_from(["val.index.npy", "mean.npy", "val-000000.tar"]), MUTATIONS, st.booleans())
@repeatable(15)
def test_corrupt_files_of_a_set(
    copy: Path, prepared: Path, name: str, mutations: list[tuple[str, int, bytes]], header: bool
) -> None:
    (copy / name).write_bytes(corrupt((prepared / name).read_bytes(), mutations, 200 if header else None))
    result_or_message(lambda: load_all(copy))
    shutil.copy(prepared / name, copy / name)


@pytest.mark.parametrize(
    ("field", "value"),
    [("offset", 2**63), ("size", 2**32 - 1), ("shard", 7), ("label", 99)],
)
def test_index_rows_out_of_range(copy: Path, field: str, value: int) -> None:
    rows = np.load(copy / "val.index.npy")
    rows[field][3] = value
    np.save(copy / "val.index.npy", rows)
    with pytest.raises(DataError):
        load_all(copy)


def npy(shape: str, dtype: str = "'<f4'") -> bytes:
    text = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text) + 1) + text + b"\n"


@pytest.mark.parametrize(
    "content",
    [
        npy("(3, 256, 256)"), npy(f"({2**40},)"), npy("(3,)", "'|O'") + pickle.dumps([1, 2, 3]), b"",
    ],
)  # fmt: skip
def test_corrupt_arrays(copy: Path, content: bytes) -> None:
    for name in ("mean.npy", "val.index.npy"):
        kept = (copy / name).read_bytes()
        (copy / name).write_bytes(content)
        with pytest.raises(DataError, match="damaged"):
            load_all(copy)
        (copy / name).write_bytes(kept)


def test_dataset_json_that_is_huge_or_a_pipe(copy: Path) -> None:
    os.truncate(copy / "dataset.json", 1 << 36)
    with pytest.raises(DataError):
        load_all(copy)
    (copy / "dataset.json").unlink()
    os.mkfifo(copy / "dataset.json")
    with pytest.raises(DataError):
        load_all(copy)


def test_dataset_json_that_would_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("[" + "[]," * 6_000_000 + "[]]")
    with pytest.raises(DataError, match="more than 16,777,216"):
        shards.open_dataset(tmp_path)


# Recipes and records


@pytest.mark.parametrize("text", ["a = " + "[" * 9000, ".".join("a" * 100_000) + " = 1", "seed = " + "9" * 5000, "\0"])
def test_recipes_that_would_fill_the_memory(text: str, tmp_path: Path) -> None:
    """Without a limit, a key of 100,000 parts took more than 20 GB."""
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(RecipeError, match=r"is not TOML|it has [0-9,]+ bytes|is not UTF-8 text"):
        load_recipe(str(tmp_path / "r.toml"))


def test_corrupt_metrics(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n' + "[" * 100_000 + '\n{"step": 2')
    assert Run(tmp_path).records() == [{"step": 1}]


@pytest.mark.parametrize("recipe", [PAPER, replace(PAPER, towers=1), replace(TINY, width=0.3)])
def test_shapes_are_those_of_the_network(recipe: Any) -> None:
    """The table for model files against the modules that PyTorch builds."""
    from alexnet_cli.core.model.network import Network, parameters_by_name

    with torch.device("meta"):
        network = Network(recipe, 7)
    built = {name: tuple(parameter.shape) for name, parameter in parameters_by_name(network)}
    assert tensor_shapes(recipe, 7) == built | {"mean": (3, 256, 256)}
