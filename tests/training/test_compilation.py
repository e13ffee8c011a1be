"""--compile: the same numbers, the same names, and a network that is compiled once, not at every step."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from alexnet_cli.core.data.loader import Loader, training_batches
from alexnet_cli.core.data.shards import open_dataset
from alexnet_cli.core.model import triton_kernels
from alexnet_cli.core.model.layers import Dropout
from alexnet_cli.core.model.network import Network, parameters_by_name
from alexnet_cli.core.parallel.placement import Placement
from alexnet_cli.core.runs.run import Run
from alexnet_cli.core.training.loop import TrainingLoop
from alexnet_cli.errors import MissingError
from alexnet_cli.recipe import PAPER, TINY
from trainings import new_loop

CPU = torch.device("cpu")
SMALL = replace(TINY, width=1 / 16, batch_size=8, dropout=0.5, epochs=1, precision="fp32")
# torch asks for this where it compiles around something, and hides the warning itself, if it is let
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning"),  # torch 2.11 on itself
]
has_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="torch.compile needs a C++ compiler"
)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[torch.fx.GraphModule]:
    """What torch.compile makes of Python, which here is run as it is: no compiler is needed."""
    made: list[torch.fx.GraphModule] = []

    def as_it_is(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., Any]:
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=as_it_is))
    return made


def losses(prepared: Path, name: str, *, compile: bool) -> tuple[list[float], TrainingLoop]:
    """Of three steps."""
    data = open_dataset(prepared)
    training = new_loop(
        SMALL, data, Run.create(name, SMALL, {}), Placement(CPU, "CPU", "fp32"), threads=1, compile=compile
    )
    training.trainer.begin_epoch()
    with Loader(data.split("train"), 8, 1) as loader:
        batches = loader.batches(training_batches(training.trainer.train_images, 8, 0, 1)[:3])
        return [training.trainer.step(batch).loss.item() for batch in batches], training


def test_three_steps_give_the_same_losses_and_names(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: list[torch.fx.GraphModule]
) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path))
    expected, eager = losses(prepared, "eager", compile=False)
    assert not graphs
    found, training = losses(prepared, "compiled", compile=True)
    assert len(graphs) == 3  # before, between and after the normalizations, and none at the second step
    assert found == pytest.approx(expected, rel=1e-5)
    network = training.trainer.network
    assert [n for n, _ in parameters_by_name(network)] == [n for n, _ in network.named_parameters()]
    for a, b in zip(eager.trainer.network.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_run_goes_on_from_one_that_was_not_compiled(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, graphs: list[torch.fx.GraphModule]
) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path))
    run, place = Run.create("run", SMALL, {}), Placement(CPU, "CPU", "fp32")
    list(new_loop(SMALL, open_dataset(prepared), run, place).fit(max_steps=2))
    last = (run.checkpoints / "last").resolve()
    training = new_loop(SMALL, open_dataset(prepared), Run(run.path), place, threads=1, compile=True)
    assert [r.reason for r in training.fit(last)][-1] == "finished"
    assert graphs


def test_compiled_dropout_draws_a_new_mask_at_every_step(graphs: list[torch.fx.GraphModule]) -> None:
    x, masks = torch.ones(16, 64), []
    layer, again = Dropout(PAPER, salt=6).train(), Dropout(PAPER, salt=6).train()
    quick = torch.compile(layer, dynamic=False, fullgraph=True)
    for step, first_row in ((0, 0), (1, 0), (2, 0), (2, 16)):
        layer.draw(5, step, first_row)
        again.draw(5, step, first_row)
        masks.append(quick(x))
        assert torch.equal(masks[-1], again(x))
    assert len(graphs) == 1
    assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


def test_for_a_gpu_the_network_is_one_graph(
    graphs: list[torch.fx.GraphModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tensors without values. Each normalization and dropout is one step, and nothing is tried out."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)  # which such tensors do not support
    monkeypatch.setattr(triton_kernels, "unavailable_reason", lambda index: pytest.fail("tried while compiling"))
    with FakeTensorMode(), torch.device("cuda"):
        network, x = Network(SMALL, 10), torch.empty(8, 3, 224, 224)
        quick: Callable[[Tensor], Tensor] = torch.compile(network, fullgraph=True, dynamic=False)
        out = quick(x)
    assert (out.shape, out.device.type) == ((8, 10), "cuda")
    steps = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert steps.count(torch.ops.alexnet.response_norm) == steps.count(torch.ops.alexnet.dropout) == 2


def test_captured_graphs_are_for_the_first_piece_of_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Later ones would add their gradients to memory that the graph writes over."""
    network, taken = Network(SMALL, 10), []

    def compile(module: Network, *, dynamic: bool, mode: str = "") -> Callable[[Tensor], Tensor]:
        return lambda x: (taken.append(mode), module(x))[1]  # type: ignore[func-returns-value]

    monkeypatch.setattr(torch, "compile", compile)
    for images, expected in ((128, ["reduce-overhead", "", "reduce-overhead"]), (1024, ["", "", ""])):
        from alexnet_cli.core.training.trainer import (
            compile_network,  # a second, which no other file's worker needs to spend
        )

        quick = compile_network(network, torch.device("cuda"), images)
        for last in (False, True, True):
            quick(torch.zeros(1, 3, 224, 224)).sum().backward()
            if last:
                network.zero_grad()
        assert taken == expected
        taken.clear()


def test_what_cannot_be_compiled_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", (None, str(tmp_path / "none")))
    monkeypatch.setattr("torch._inductor.config.fx_graph_cache", False)
    torch.compiler.reset()
    from alexnet_cli.core.training.trainer import compile_network

    quick = compile_network(Network(SMALL, 10), CPU, 2)
    with pytest.raises(MissingError, match=r"--compile: torch.compile failed: .*C\+\+ compiler"):
        quick(torch.zeros(2, 3, 224, 224))


@pytest.mark.slow
@has_compiler
def test_with_a_real_compiler_too(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALEXNET_RUNS_DIR", str(tmp_path))
    torch.compiler.reset()
    expected, _ = losses(prepared, "eager", compile=False)
    found, _ = losses(prepared, "compiled", compile=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert len(set(found)) == 3
