"""Exported files give the same logits in other programs: OpenCV, OpenVINO, onnx2torch and ONNX's own reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from alexnet_cli.core.export.export import build_int8, synthetic_crops
from alexnet_cli.core.inference.onnx_graph import save_graph
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, TINY, Recipe
from model_files import random_model, save_onnx

Logits = npt.NDArray[np.float32]
RECIPES = {r.name: replace(r, width=1 / 8) for r in (PAPER, KRIZHEVSKY, CAFFE, TINY)}


def run_onnxruntime(path: Path, crops: Logits) -> Logits:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    logits: Logits = session.run(["logits"], {"input": crops})[0]
    return logits


def run_opencv(path: Path, crops: Logits) -> Any:
    network = pytest.importorskip("cv2").dnn.readNetFromONNX(str(path))
    network.setInput(crops)
    return network.forward("logits")


def run_openvino(path: Path, crops: Logits) -> Any:
    openvino = pytest.importorskip("openvino")
    float32 = {"INFERENCE_PRECISION_HINT": "f32"}  # by default it computes in bfloat16 where the CPU can
    return openvino.Core().compile_model(str(path), "CPU", float32)(crops)["logits"]


def run_onnx2torch(path: Path, crops: Logits) -> Any:
    import torch

    with torch.no_grad():
        return pytest.importorskip("onnx2torch").convert(str(path))(torch.from_numpy(crops))[0].numpy()


def check(run: Callable[[Path, Logits], Any], path: Path, recipe: Recipe, images: int, tolerance: float = 5e-6) -> None:
    """`tolerance` is a share of the logits from lowest to highest."""
    crops = synthetic_crops(recipe.input_size, images).astype(np.float32)
    expected = run_onnxruntime(path, crops)
    assert np.ptp(expected) > 0.3
    np.testing.assert_allclose(run(path, crops), expected, atol=tolerance * float(np.ptp(expected)))


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of these packages
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("run", [run_opencv, run_openvino, run_onnx2torch])
def test_float32_in_other_runtimes(run: Callable[[Path, Logits], Any], name: str, tmp_path: Path) -> None:
    check(run, save_onnx(random_model(RECIPES[name]), tmp_path / "a.onnx"), RECIPES[name], 3)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("run", [run_opencv, run_openvino])
def test_int8_in_other_runtimes(run: Callable[[Path, Logits], Any], tmp_path: Path) -> None:
    recipe = RECIPES["paper"]
    save_graph(build_int8(random_model(recipe), synthetic_crops(224, 8)), tmp_path / "a.onnx")
    check(run, tmp_path / "a.onnx", recipe, 3, 0.02)  # a value between two codes may be rounded the other way


@pytest.mark.parametrize("name", RECIPES)
def test_float32_in_the_reference_of_onnx(name: str, tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    recipe = replace(RECIPES[name], width=1 / 32)

    def run(path: Path, crops: Logits) -> Any:
        results: Any = ReferenceEvaluator(onnx.load(path)).run(["logits"], {"input": crops})
        return results[0]

    check(run, save_onnx(random_model(recipe), tmp_path / "a.onnx"), recipe, 1)
