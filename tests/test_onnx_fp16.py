"""The half-precision graph: every recipe, what stays float32, the size."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from model_files import random_model
from onnx import TensorProto
from test_onnx_graph import VARIANTS

from alexnet_cli.core import onnx_fp16, onnx_graph
from alexnet_cli.core.export import drawn_crops, verify
from alexnet_cli.core.session import Session
from alexnet_cli.recipe import PAPER


@pytest.mark.parametrize("name", VARIANTS)
def test_every_recipe_stays_within_halfs_rounding(name: str, tmp_path: Path) -> None:
    model = random_model(replace(VARIANTS[name], width=1 / 16))
    whole = onnx_graph.build(model)
    half = onnx_fp16.halved(whole)
    onnx.checker.check_model(half, full_check=True)
    (tmp_path / "a.onnx").write_bytes(half.SerializeToString())
    session, crops = Session(tmp_path / "a.onnx", provider="cpu"), drawn_crops(model.recipe.input_size, 6)
    reference = Session(model, provider="cpu").logits
    assert verify(reference, session.logits, crops, "fp16").passed
    assert not verify(reference, session.logits, crops).passed or name == "sigmoid"  # it is another precision
    np.testing.assert_allclose(session.probabilities(crops).sum(1), 1, atol=1e-5)
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*half.graph.input, *half.graph.output)}
    assert set(kinds.values()) == {TensorProto.FLOAT}
    weights = {c.name: c.data_type for c in half.graph.initializer}
    assert weights["fc6.weight"] == weights["conv1.weight"] == TensorProto.FLOAT16
    norms = [kind for key, kind in weights.items() if "norm" in key or "within" in key]
    assert TensorProto.FLOAT16 not in norms
    assert half.ByteSize() - whole.ByteSize() / 2 < 40_000  # what is not weights stays as it is


def test_another_network_is_noticed(tmp_path: Path) -> None:
    model = random_model(replace(PAPER, width=1 / 16))
    wrong = replace(model, recipe=replace(model.recipe, lrn_joint=True))
    crops = drawn_crops(224, 6)
    first, second = (Session(m, provider="cpu").logits for m in (model, wrong))
    assert not verify(first, second, crops, "fp16").passed
