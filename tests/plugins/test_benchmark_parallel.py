"""`alexnet benchmark parallel` and docs/parallel.md: bytes as shapes have them, tables as the code computes them."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alexnet_cli.core import devices
from alexnet_cli.errors import AlexNetError
from alexnet_cli.recipe import PAPER
from alexnet_plugins.benchmark import parallel
from alexnet_plugins.benchmark.command import Topic, benchmark
from alexnet_plugins.benchmark.parallel import Job, RankGroup, scale_to_batch
from parallel_costs import (
    FLOAT,
    HALF,
    STRATEGIES,
    activation_bytes,
    bytes_table,
    count_parameters,
    expected_rate,
    sent_bytes,
    speed_table,
)

SMALL = replace(PAPER, width=1 / 16)
JOB = Job(SMALL, batch=4, steps=1, processes=2, threads=1, parallel="tower", gpus="none")
PAGE = (Path(__file__).resolve().parents[2] / "docs" / "parallel.md").read_text(encoding="utf-8")
B = 128


def test_the_bytes_of_the_whole_network() -> None:
    there_and_back, logits = 2 * 4, 4
    towers = {
        "conv3": B * 128 * 13 * 13 * there_and_back,
        "fc6": B * 128 * 6 * 6 * there_and_back,
        "fc7": B * 2048 * there_and_back,
        "fc8": B * 1000 * logits,
    }
    assert sent_bytes(PAPER, B, 2, "tower") == towers
    assert sum(count_parameters(PAPER).values()) == 60_965_224
    data = sum(sent_bytes(PAPER, B, 2, "data").values())
    assert data == 60_965_224 * 4
    assert sum(towers.values()) / data == pytest.approx(0.121, abs=0.001)  # more than the tenth aimed at
    assert sum(sent_bytes(PAPER, B, 2, "tower", HALF).values()) / data == pytest.approx(0.061, abs=0.001)
    hybrid = {
        "fc6": B // 2 * 9216 * there_and_back,
        "fc7": B * 2048 * there_and_back,
        "fc8": B * 1000 * logits + B // 2 * 1000 * 4,
    }
    assert activation_bytes(PAPER, B, 2, "hybrid") == hybrid


@pytest.mark.slow
def test_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "RECIPE", SMALL)
    monkeypatch.setattr(devices, "has_cpu_bf16", lambda: False)
    benchmark(Topic.parallel, rounds=1, seconds=0.0, jobs=2, batch_size=3, gpus="none", json=True, quiet=True)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["name"] == "parallel fp32"
    assert set(found["ratio"]) == {"one process, 2 threads", "data", "hybrid"}
    assert found["sent_bytes"]["ours"] == {
        "conv3": B * 8 * 13 * 13 * 8, "fc6": B * 8 * 6 * 6 * 8, "fc7": B * 128 * 8, "fc8": B * 1000 * 4,
    }  # fmt: skip
    assert found["sent_bytes"]["data"] == {layer: 4 * n for layer, n in count_parameters(SMALL).items()}
    assert found["sent_bytes"]["hybrid"] == sent_bytes(SMALL, B, 2, "hybrid")
    assert {"exchange for conv3 alone, there and back", "exchange for fc6 alone, there and back"} == set(
        found["seconds"]
    )
    assert any("4 images per step" in note for note in found["notes"]), "of three, two processes make four"


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["tower", pytest.param("data", marks=pytest.mark.slow), pytest.param("hybrid", marks=pytest.mark.slow)]
)
def test_four_send_what_is_on_paper(way: Any) -> None:
    low = devices.has_cpu_bf16()
    recipe = replace(SMALL, precision="bf16" if low else "fp32")
    with RankGroup(replace(JOB, recipe=recipe, batch=8, processes=4, parallel=way)) as group:
        every = group.call("count_sent_bytes")
    assert all(sent == every[0] for sent in every)
    expected = sent_bytes(recipe, 8, 4, way, HALF if low else FLOAT)
    assert scale_to_batch(every[0], 1) == pytest.approx(expected, abs=3)  # rounded by parameter


def test_only_activations_grow_with_the_batch() -> None:
    sent = {"conv3": 10, "conv3 gradients": 7, "fc6 images": 1, "fc6": 2}
    assert scale_to_batch(sent, 4) == {"conv3": 47, "fc6": 12}


def test_what_fails_in_a_process_is_told() -> None:
    with RankGroup(replace(JOB, processes=3)) as group, pytest.raises(AlexNetError, match=r"rank \d of 3: .*odd \(3\)"):
        group.run()
    assert not any(process.is_alive() for process in group.processes)
    with RankGroup(JOB) as group:
        assert group.run() == 4
        group.processes[1].kill()
        with pytest.raises(AlexNetError, match=r"died|rank 0 of 2"):
            group.run()
    assert not any(process.is_alive() for process in group.processes)


@pytest.mark.parametrize("table", [bytes_table(), speed_table(), speed_table(128)])
def test_the_page_shows_what_the_code_computes(table: str) -> None:
    assert table in PAGE


def test_the_page_holds_paper_against_measurement() -> None:
    """`| fp32 | tower | 46 (..) | 47 |`: measured beside what one process and the exchange alone let expect."""
    for precision, size in (("fp32", FLOAT), ("bf16", HALF)):
        rate, exchange = (float(n) for n in re.findall(rf"{precision}:\s([\d.]+)\simg/s,\s([\d.]+)\sms", PAGE)[0])
        rows = dict(re.findall(rf"\| {precision} \| (\w+) \| [^|]*\| ([\d.]+) \|", PAGE))
        expected = {way: f"{expected_rate(rate, exchange / 1000, way, size):.0f}" for way in STRATEGIES}
        assert rows == expected
