"""A mapped file gives the same network; whatever is wrong with a file is left to ONNX Runtime to say."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from model_files import random_model
from onnx import numpy_helper

from alexnet_cli.core import calibration, onnx_fp16, onnx_graph, onnx_int8, onnx_mapped
from alexnet_cli.core.export import drawn_crops
from alexnet_cli.core.session import Session
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import PAPER


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, model = tmp_path_factory.mktemp("mapped"), random_model(replace(PAPER, width=1 / 8))
    rows = onnx_graph.build(model, rows=True)
    protos = {
        "fp32": onnx_graph.build(model),
        "fp16": onnx_fp16.halved(onnx_graph.build(model)),
        "int8": onnx_int8.quantised(rows, calibration.ranges(rows, drawn_crops(224, 2))),
    }
    for name, proto in protos.items():
        onnx_graph.save(proto, folder / f"{name}.onnx")
    return {name: folder / f"{name}.onnx" for name in protos}


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_large_tensors_are_views_of_the_file(files: dict[str, Path], name: str) -> None:
    found = onnx_mapped.mapped(files[name])
    assert found is not None
    content, apart = found
    whole, rest = onnx.load(files[name]), onnx.ModelProto.FromString(content)
    expected = {t.name: numpy_helper.to_array(t) for t in whole.graph.initializer}
    assert {"fc6.weight" if name != "int8" else "fc6.weight.codes"} <= set(apart)
    assert len(content) < 0.2 * files[name].stat().st_size
    for key, value in apart.items():
        np.testing.assert_array_equal(value, expected[key])
        assert not value.flags.owndata
    kept = {t.name: t for t in rest.graph.initializer}
    assert set(kept) == set(expected)
    for key, tensor in kept.items():
        outside = tensor.data_location == onnx.TensorProto.EXTERNAL
        assert outside == (key in apart)
        if not outside:
            np.testing.assert_array_equal(numpy_helper.to_array(tensor), expected[key])
    assert rest.graph.node == whole.graph.node
    assert rest.metadata_props == whole.metadata_props


@pytest.mark.parametrize("name", ["fp32", "fp16", "int8"])
def test_a_mapped_session_answers_alike(files: dict[str, Path], name: str) -> None:
    crops = drawn_crops(224, 3)
    quick, slow = (Session(files[name], provider="cpu", few=few).logits(crops) for few in (True, False))
    np.testing.assert_allclose(quick, slow, atol=1e-4)


def test_damaged_files_are_refused_quickly_and_in_the_same_words(files: dict[str, Path], tmp_path: Path) -> None:
    whole = files["int8"].read_bytes()
    generator = np.random.default_rng(5)
    for number in range(60):
        damaged = bytearray(whole if number % 2 else whole[: int(generator.integers(len(whole)))])
        for place in generator.integers(0, len(damaged), 1 + number % 5):
            damaged[place] = int(generator.integers(256))
        path = tmp_path / "damaged.onnx"
        path.write_bytes(bytes(damaged))
        started = time.perf_counter()
        onnx_mapped.mapped(path)
        assert time.perf_counter() - started < 5
    for content in (b"", b"not a model", whole[: len(whole) // 2], b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f"):
        path.write_bytes(content)
        with pytest.raises(WeightsError, match="cannot be opened"):
            Session(path, provider="cpu", few=True)


def test_a_tensor_that_lies_about_its_size_is_not_mapped(tmp_path: Path) -> None:
    proto = onnx_graph.build(random_model(replace(PAPER, width=1 / 8)))
    tensor = next(t for t in proto.graph.initializer if t.name == "fc6.weight")
    tensor.dims[0] += 1
    onnx_graph.save(proto, tmp_path / "a.onnx")
    assert onnx_mapped.mapped(tmp_path / "a.onnx") is None
    with pytest.raises(WeightsError):
        Session(tmp_path / "a.onnx", provider="cpu", few=True)
