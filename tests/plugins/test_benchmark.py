"""The command that compares: turns are taken in order, ratios are of rounds, the result names all it should."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_plugins.benchmark import data as benchmark_data
from alexnet_plugins.benchmark import images as benchmark_pictures
from alexnet_plugins.benchmark import stopwatch
from alexnet_plugins.benchmark.command import Topic, benchmark
from alexnet_plugins.benchmark.data import resize_with_pillow
from alexnet_plugins.benchmark.stopwatch import Contest, Times


def test_turns_are_taken_in_order() -> None:
    turns: list[str] = []

    def named(name: str) -> stopwatch.Pass:
        def work() -> int:
            turns.append(name)
            return 1

        return work

    times = Times.of(Contest("x", named("A"), {"b": named("B"), "c": named("C")}))
    assert list(stopwatch.run_rounds(times, 2, seconds=0)) == [0, 1]
    assert "".join(turns) == "ABC" * 3  # the first is for warming up
    assert [len(times.ours), len(times.peers["b"]), len(times.peers["c"])] == [2, 2, 2]


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    times = Times(Contest("x", int, {"b": int}), [10.0, 4.0, 30.0], {"b": [5.0, 1.0, 10.0]})
    assert times.ratio("b") == 3.0  # 2, 4, 3; the ratio of the medians is 2
    found = times.as_dict()
    assert (found["ours"], found["peers"], found["ratio"]) == (10.0, {"b": 5.0}, {"b": 3.0})
    assert found["spread"] == {"ours": [4.0, 30.0], "b": [1.0, 10.0]}


def test_a_timing_lasts_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.4, 0.8, 1.2])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert stopwatch.measure_rate(lambda: 6, 1.0) == pytest.approx(18 / 1.2)


def test_drawn_pictures_are_the_same_every_time_and_as_large_as_photographs() -> None:
    drawn = [benchmark_pictures.picture(number) for number in range(8)]
    assert drawn[3] == benchmark_pictures.picture(3)
    assert len(set(drawn)) == 8
    assert 60_000 < np.mean([len(data) for data in drawn]) < 160_000  # ImageNet: 110 kB
    for data in drawn:
        with Image.open(io.BytesIO(data)) as image:
            assert max(image.size) == 500
            assert 333 <= min(image.size) < 417


def test_the_pillow_pipeline_does_the_same_work(tmp_path: Path) -> None:
    from alexnet_cli.core.data import images

    data = benchmark_pictures.picture(0)
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "out").mkdir()
    resize_with_pillow(tmp_path / "out", [tmp_path / "a.jpg"])
    with Image.open(tmp_path / "out" / "a.jpg") as image:
        theirs = np.asarray(image).astype(float)
    ours = images.resize_and_crop(images.decode(data))
    assert np.abs(theirs - ours).mean() < 6


@pytest.mark.parametrize("topic", [Topic.load, Topic.prepare])
@pytest.mark.filterwarnings("default")
def test_the_command(topic: Topic, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_data, "IMAGES", 2 * benchmark_data.BATCH)
    benchmark(topic=topic, images=16, rounds=1, seconds=0.0, jobs=1, json=True, quiet=True)
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "alexnet.benchmark/1"
    assert found["name"] == topic.value
    assert found["unit"] == "img/s"
    assert found["hardware"]["workers"] == 1
    assert {"python", "torch", "simplejpeg"} <= set(found["versions"])
    usual = "ImageFolder + DataLoader" if topic is Topic.load else "Pillow, 1 processes"
    limit = "limit: decode alone" if topic is Topic.load else "limit: codec and resize alone"
    assert {usual, limit} <= set(found["peers"])
    assert set(found["ratio"]) == set(found["peers"])
    assert found["ratio"][usual] == pytest.approx(found["ours"] / found["peers"][usual])
    assert "drawn for it" in found["notes"][0]
