"""`alexnet benchmark`: turns, ratios, drawn images, and the topics prepare and load."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_cli.errors import DataError
from alexnet_plugins.benchmark import data as benchmark_data
from alexnet_plugins.benchmark.command import Topic, benchmark
from alexnet_plugins.benchmark.data import resize_with_pillow
from alexnet_plugins.benchmark.sample_images import draw_jpeg
from alexnet_plugins.benchmark.timing import BenchmarkCase, Timings, Work, measure_rate


def test_all_take_turns_in_order() -> None:
    turns: list[str] = []

    def work(name: str) -> Work:
        return lambda: turns.append(name) or 1  # type: ignore[func-returns-value]

    timings = Timings(BenchmarkCase("x", work("A"), {"b": work("B"), "c": work("C")}))
    assert list(timings.run_rounds(2, seconds=0)) == [0, 1]
    assert "".join(turns) == "ABC" * 3  # the first is for warming up
    assert {name: len(rates) for name, rates in timings.rates.items()} == {"ours": 2, "b": 2, "c": 2}


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    timings = Timings(BenchmarkCase("x", int, {"b": int}))
    timings.rates = {"ours": [10.0, 4.0, 30.0], "b": [5.0, 1.0, 10.0]}
    record = timings.to_dict()
    assert record["ratio"] == {"b": 3.0}  # of 2, 4, 3; the ratio of the medians is 2
    assert (record["ours"], record["peers"]) == (10.0, {"b": 5.0})
    assert record["spread"] == {"ours": [4.0, 30.0], "b": [1.0, 10.0]}


def test_seconds_are_shown_as_seconds() -> None:
    timings = Timings(BenchmarkCase("x", int, {"b": int}, unit="s"))
    timings.rates = {"ours": [2.0, 4.0, 1.0], "b": [0.5, 1.0, 0.5]}
    record = timings.to_dict()
    assert (record["unit"], record["ours"], record["peers"]) == ("s", 0.5, {"b": 2.0})
    assert record["spread"] == {"ours": [0.25, 1.0], "b": [1.0, 2.0]}
    assert record["ratio"] == {"b": 4.0}  # ours is so many times as fast, whatever the unit


def test_a_timing_lasts_as_long_as_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.4, 0.8, 1.2])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert measure_rate(lambda: 6, 1.0) == pytest.approx(18 / 1.2)


def test_drawn_images_are_reproducible_and_as_large_as_photographs() -> None:
    drawn = [draw_jpeg(number) for number in range(8)]
    assert drawn[3] == draw_jpeg(3)
    assert len(set(drawn)) == 8
    assert 60_000 < np.mean([len(data) for data in drawn]) < 160_000  # ImageNet: 110 kB
    for data in drawn:
        with Image.open(io.BytesIO(data)) as image:
            assert max(image.size) == 500
            assert 333 <= min(image.size) < 417


def test_the_pillow_pipeline_does_the_same_work(tmp_path: Path) -> None:
    from alexnet_cli.core.data import images

    data = draw_jpeg(0)
    (tmp_path / "a.jpg").write_bytes(data)
    (tmp_path / "out").mkdir()
    resize_with_pillow(tmp_path / "out", [tmp_path / "a.jpg"])
    with Image.open(tmp_path / "out" / "a.jpg") as image:
        theirs = np.asarray(image).astype(float)
    ours = images.resize_and_crop(images.decode(data))
    assert np.abs(theirs - ours).mean() < 6


@pytest.mark.slow
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
    assert "drawn images" in found["notes"][0]


def test_a_folder_of_own_images_repeats_to_the_number_asked_for(
    pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark(Topic.prepare, pictures=pictures, images=100, rounds=1, seconds=0.0, jobs=1, json=True, quiet=True)
    record = json.loads(capsys.readouterr().out)
    assert record["notes"] == [f"measured on 100 images from 68 files of {pictures}"]


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 0 JPEGs"):
        benchmark(Topic.prepare, pictures=tmp_path, quiet=True)
