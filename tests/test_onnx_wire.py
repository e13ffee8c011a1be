"""What is let in: every file that export writes, of every recipe; and the one reader below it hides nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from foreign_files import inside, integer, single, varint
from hostile import MUTATIONS, bounded, generated, mutated, told
from hypothesis import given
from hypothesis import strategies as st
from model_files import random_model

from alexnet_cli.core import calibration, onnx_fp16, onnx_graph, onnx_int8, onnx_mapped, onnx_shapes, onnx_wire
from alexnet_cli.core.export import drawn_crops
from alexnet_cli.core.protobuf import Message
from alexnet_cli.core.session import Session
from alexnet_cli.errors import WeightsError
from alexnet_cli.recipe import CAFFE, FAST, KRIZHEVSKY, PAPER, TINY, Recipe

NARROW = replace(PAPER, width=1 / 64)
RECIPES = {
    "paper": NARROW,
    "krizhevsky": replace(KRIZHEVSKY, width=1 / 64),
    "caffe": replace(CAFFE, width=1 / 64),
    "caffenet": replace(CAFFE, width=1 / 64, stage1_order="relu-pool-norm", stage2_order="relu-pool-norm"),
    "fast": replace(FAST, width=1 / 64),
    "tiny": replace(TINY, width=1 / 64),
    "one tower": replace(NARROW, towers=1),
    "small pooling": replace(NARROW, pool_size=2),
    "unpadded": replace(NARROW, edge_padding=False),
    "no norm": replace(NARROW, lrn="none"),
    "within a map": replace(NARROW, lrn="within-map"),
    "another power": replace(NARROW, lrn_beta=0.5),
    "tanh": replace(NARROW, activation="tanh"),
    "sigmoid": replace(NARROW, activation="sigmoid"),
    "colour": replace(NARROW, mean="rgb"),
}


def protos(recipe: Recipe) -> dict[str, onnx.ModelProto]:
    """The graph in every precision, as export makes it."""
    model = random_model(recipe, 4)
    whole, rows = onnx_graph.build(model), onnx_graph.build(model, rows=True)
    ranges = calibration.ranges(rows, drawn_crops(recipe.input_size, 2))
    return {"fp32": whole, "fp16": onnx_fp16.halved(whole), "int8": onnx_int8.quantised(rows, ranges)}


@pytest.mark.parametrize("name", RECIPES)
def test_whatever_export_writes_is_let_in_and_runs(tmp_path: Path, name: str) -> None:
    crops = drawn_crops(RECIPES[name].input_size, 2)
    answers = {}
    for precision, proto in protos(RECIPES[name]).items():
        path = tmp_path / f"{precision}.onnx"
        onnx_graph.save(proto, path)
        assert {node.op_type for node in proto.graph.node} <= onnx_shapes.OPERATORS.keys()
        onnx_wire.check(path)
        answers[precision] = Session(path, provider="cpu", few=True).logits(crops)
    spread = float(np.ptp(answers["fp32"]))
    for precision, share in (("fp16", 0.005), ("int8", 0.1)):
        np.testing.assert_allclose(answers[precision], answers["fp32"], atol=share * spread)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return {precision: proto.SerializeToString() for precision, proto in protos(NARROW).items()}


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@given(MUTATIONS, st.sampled_from([3000, 10**9]))
@generated(40)
def test_damaged_files_that_are_mapped(
    tmp_path_factory: pytest.TempPathFactory,
    whole: dict[str, bytes],
    precision: str,
    mutations: list[tuple[str, int, bytes]],
    within: int,
) -> None:
    """Refused, or opened; and what is opened classifies a picture, or says that it cannot be run."""
    path = tmp_path_factory.getbasetemp() / "damaged.onnx"
    path.write_bytes(mutated(whole[precision], mutations, within))
    with bounded(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(onnx_mapped, "APART_BYTES", 1000)  # most tensors of so narrow a network
        opened = told(lambda: Session(path, provider="cpu", few=True))
        if not isinstance(opened, str):
            crops = np.zeros((1, 3, opened.crop, opened.crop), np.float32)
            chances = told(lambda: opened.probabilities(crops))
            assert isinstance(chances, str) or chances.shape == (1, len(opened.classes))


def test_what_fails_only_when_it_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """ONNX Runtime's own words are no message, and its log is not for the terminal."""
    proto = protos(NARROW)["int8"]
    scale = next(t for t in proto.graph.initializer if t.name == "centred.scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(np.ones(5, np.float32), scale.name))  # for each of five channels
    onnx_graph.save(proto, tmp_path / "a.onnx")
    with pytest.raises(WeightsError, match="cannot be run"):
        Session(tmp_path / "a.onnx", provider="cpu").logits(drawn_crops(224, 1))
    assert not capfd.readouterr().err


def test_the_mean_image_is_found_without_onnx(tmp_path: Path) -> None:
    for precision, proto in protos(NARROW).items():
        onnx_graph.save(proto, tmp_path / "a.onnx")
        mean = random_model(NARROW, 4).mean
        np.testing.assert_allclose(
            Session(tmp_path / "a.onnx", few=True).mean(), mean, atol=0 if precision == "fp32" else 0.1
        )
    constants = [t for t in proto.graph.initializer if t.name != "mean"]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(constants)
    onnx_graph.save(proto, tmp_path / "a.onnx")
    assert onnx_mapped.constant(tmp_path / "a.onnx", "mean") is None


def test_fields_are_whole_and_numbers_cannot_hide() -> None:
    parts = [integer(1, 300), single(3, 1) + single(3, 2), inside(5, b"abc"), integer(2**29 - 1, 0)]
    fields = list(Message(memoryview(b"".join(parts))).fields())
    assert [bytes(field.whole) for field in fields] == parts
    assert [field.number for field in fields] == [1, 3, 5, 2**29 - 1]
    for number in (0, 2**29, 2**29 + 7, 2**40):  # a reader that keeps 32 bits of a tag would see 0, 0, 7, 0
        with pytest.raises(ValueError, match="a field of number"):
            list(Message(memoryview(varint(number << 3) + b"\x00")).fields())
