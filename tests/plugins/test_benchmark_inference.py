"""`alexnet benchmark infer` and `startup`: what is compared is one network, and the commands say what they should."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from alexnet_cli.core.export.export import synthetic_crops
from alexnet_cli.core.inference import onnx_graph
from alexnet_cli.core.inference.session import Session
from alexnet_cli.core.parallel.placement import Placement, place
from alexnet_cli.recipe import CAFFE, PAPER, Recipe
from alexnet_plugins.benchmark import inference
from alexnet_plugins.benchmark.command import Topic, benchmark
from alexnet_plugins.benchmark.sample_images import draw_jpeg
from alexnet_plugins.benchmark.stock_network import GRAY
from alexnet_plugins.benchmark.timing import BenchmarkOptions
from alexnet_plugins.benchmark.training import Conditions
from model_files import random_model

SMALL = replace(PAPER, width=1 / 16, dropout_inverted=True)


@pytest.mark.parametrize("recipe", [SMALL, replace(PAPER, towers=1, width=1 / 16, lrn_alpha=1e-3)])
def test_the_operator_is_the_same_network(recipe: Recipe, tmp_path: Path) -> None:
    model, crops = random_model(recipe), synthetic_crops(recipe.input_size, 3)
    proto = inference.use_lrn_operator(onnx_graph.build_graph(model), recipe)
    onnx.checker.check_model(proto, full_check=True)
    assert [node.op_type for node in proto.graph.node].count("LRN") == 2
    (tmp_path / "a.onnx").write_bytes(proto.SerializeToString())
    expected = Session(model, provider="cpu").logits(crops)
    np.testing.assert_allclose(Session(tmp_path / "a.onnx", provider="cpu").logits(crops), expected, atol=1e-4)
    assert CAFFE.lrn_joint  # not a recipe for this: its maps are not apart


def test_every_file_runs_and_stock_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "RECIPE", SMALL)
    crops = inference.make_crops(2)
    answers = {
        name: Session(path, provider="cpu").logits(crops) for name, path in inference.write_files(tmp_path).items()
    }
    np.testing.assert_allclose(answers["operator"], answers["fp32"], atol=1e-5)
    for name in ("fp16", "int8"):
        np.testing.assert_allclose(answers[name], answers["fp32"], atol=0.05 * float(np.ptp(answers["fp32"])))
    assert np.abs(answers["bare"] - answers["fp32"]).max() > 1e-4
    assert inference.run_stock(Conditions(SMALL, 2, 1, "cpu", 1), False, False) == 2


@pytest.mark.slow
def test_the_script_gives_the_answers_of_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch and torchvision as a user has them, against our file: same network, same picture."""
    monkeypatch.setattr(inference, "RECIPE", SMALL)
    random = replace(random_model(SMALL, 1000), recipe=SMALL)
    random.tensors["mean"][:] = GRAY
    monkeypatch.setattr(inference, "make_model", lambda recipe: random)
    picture = tmp_path / "a.jpg"
    picture.write_bytes(draw_jpeg(1))
    words = [sys.executable, *inference.write_script(tmp_path), str(picture)]
    said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=100).stdout.split()
    from alexnet_cli.core.inference.predict import predict

    (found,) = predict([str(picture)], Session(random, provider="cpu"))
    indices, chances = [int(w) for w in said[1::3]], [float(w) for w in said[2::3]]
    assert set(indices[:2]) <= {label.index for label in found.top}
    np.testing.assert_allclose(chances, [label.probability for label in found.top], atol=0.03)


def test_all_are_measured_on_the_cpu_if_only_torch_has_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As with the package onnxruntime beside a CUDA build of torch."""
    gpu = Placement(torch.device("cuda", 0), "GPU 0 H200", "bf16")
    monkeypatch.setattr(inference, "RECIPE", SMALL)
    monkeypatch.setattr(inference, "place", lambda gpus, precision: gpu if gpus is None else place(gpus, precision))
    monkeypatch.setattr(inference, "check_onnx_providers", lambda: {"CPUExecutionProvider": "ok"})
    monkeypatch.setattr(inference, "start_script_process", lambda: ThreadPoolExecutor(1))
    monkeypatch.setattr(inference, "run_stock", lambda conditions, *_: conditions.device)
    cases = inference.compare_inference(BenchmarkOptions(tmp_path, None, None, 1, 1, 2, None))
    case = next(cases)
    assert case.ours() == 2
    assert str(case.peers["stock: contiguous, float32"]()) == "cpu"
    assert case.notes[0].startswith("cpu, 2 crops")
    assert case.notes[1] == "on the CPU: ONNX Runtime cannot use GPU 0 H200 (CUDAExecutionProvider: not installed)"
    cases.close()


def test_infer_says_what_it_should(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "RECIPE", SMALL)
    benchmark(Topic.infer, rounds=1, seconds=0.0, jobs=1, batch_size=2, gpus="none", json=True, quiet=True)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in found] == ["infer fp32, 2", "infer int8, 2"]
    for line in found:
        assert {"stock: contiguous, float32", "limit: no normalization"} <= set(line["peers"])
        assert line["unit"] == "img/s"
        assert {"torch", "numpy"} <= set(line["versions"])
    assert {"ours, fp16", "ONNX's own LRN operator"} <= set(found[0]["peers"])
    assert "ours, fp32" in found[1]["peers"]


@pytest.mark.slow
def test_startup_says_what_it_should(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "RECIPE", SMALL)
    benchmark(Topic.startup, rounds=1, json=True, quiet=True)
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["name"] for line in found] == ["startup fp32", "startup int8"]
    for line in found:
        assert line["unit"] == "s"
        assert line["rounds"] == 1
        assert {"a script of torch and torchvision", "limit: the imports alone"} <= set(line["ratio"])
