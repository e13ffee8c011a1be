"""The replay of the first-layer filters: frames, durations, scale, size, damaged files."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageSequence

from alexnet_cli.core.analysis import filters
from alexnet_cli.core.analysis.filter_replay import Replay, draw_replay, read_kept_filters
from alexnet_cli.core.analysis.filters import Kernels
from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import DataError

SHAPE = (12, 3, 5, 5)


def kept(epochs: int, shape: tuple[int, ...] = SHAPE) -> dict[int, Kernels]:
    """Random filters that grow: the last ones have the largest weights."""
    generator = np.random.default_rng(1)
    return {e: ((1 + e) * generator.uniform(-1, 1, shape)).astype(np.float32) for e in range(epochs)}


def read_back(data: bytes) -> tuple[list[Image.Image], list[int], int]:
    """Frames, durations in milliseconds and number of repetitions (0: forever) of an animation."""
    with Image.open(io.BytesIO(data)) as image:
        frames, durations = [], []
        for frame in ImageSequence.Iterator(image):
            frames.append(frame.convert("RGB"))
            durations.append(frame.info["duration"])
        return frames, durations, image.info["loop"]


def tile(replay: Replay, frame: Image.Image, tower: int, number: int) -> np.ndarray:
    """The pixels of one of six filters 5 x 5 in a row of a tower, one pixel for each weight."""
    zoom = round(560 / 37)
    left, top = zoom * (6 * number + 1), 26 * (tower + 1) + zoom * (7 * tower + 1)
    pixels = np.asarray(frame)[top : top + 5 * zoom, left : left + 5 * zoom]
    return pixels[zoom // 2 :: zoom, zoom // 2 :: zoom]


@pytest.mark.parametrize("kind", ["webp", "gif"])
def test_frames_and_durations_read_back(kind: str) -> None:
    replay = draw_replay(kept(5), 2, "")
    frames, durations, loop = read_back(replay.encode(kind))  # type: ignore[arg-type]
    assert durations == [500, 500, 500, 500, 3000]
    assert loop == 0
    assert list(replay.epochs) == [0, 1, 2, 3, 4]
    for frame, drawn in zip(frames, replay.frames, strict=True):
        difference = np.abs(np.asarray(frame, int) - np.asarray(drawn, int))
        assert difference.max() == 0 if kind == "webp" else difference.mean() < 3  # 1,800 random colors become 256


@pytest.mark.parametrize("scale", ["joint", "each"])
def test_a_filter_has_one_scale_in_all_epochs(scale: str) -> None:
    """Against a literal loop over the weights of a filter."""
    series = kept(4)
    replay = draw_replay(series, 2, "", scale=scale)  # type: ignore[arg-type]
    for epoch, frame in zip(replay.epochs, replay.frames, strict=True):
        for tower, number in ((0, 2), (1, 5)):
            index = 6 * tower + number
            of_filter = slice(index, index + 1) if scale == "each" else slice(None)
            limit = max(float(np.abs(weight[of_filter]).max()) for weight in series.values())
            expected = [
                [[round(128 + 127 * float(series[epoch][index, c, y, x]) / limit) for c in range(3)] for x in range(5)]
                for y in range(5)
            ]
            np.testing.assert_allclose(tile(replay, frame, tower, number), expected, atol=1)


def test_the_filters_keep_their_places_when_sorted_by_their_last_color() -> None:
    series = kept(3)
    replay = draw_replay(series, 2, "", chosen=[1], is_sorted=True)
    plain = draw_replay(series, 2, "", chosen=[1])
    order = np.argsort(-filters.measure_chroma(series[2][6:]), kind="stable")
    for frame, unsorted in zip(replay.frames, plain.frames, strict=True):
        for place, number in enumerate(order.tolist()):
            assert (tile(replay, frame, 0, place) == tile(plain, unsorted, 0, number)).all()


def test_the_curve_is_drawn_up_to_the_epoch_of_the_frame() -> None:
    replay = draw_replay(kept(5), 2, "")
    charts = [np.asarray(frame, int)[:, 560:] for frame in replay.frames]
    ends = [int(np.flatnonzero((chart[..., 2] - chart[..., 0] > 90).any(axis=0)).max()) for chart in charts]
    assert np.diff(ends) == pytest.approx([(330 - 60) / 4] * 4, abs=1.5)
    for measured, weight in zip(replay.measured, kept(5).values(), strict=True):
        one, two = filters.measure_chroma(weight[:6]), filters.measure_chroma(weight[6:])
        larger = float(np.mean([a > b for a in one for b in two]))
        assert measured["specialization"] == pytest.approx(max(larger, 1 - larger))


def test_a_long_run_has_evenly_spread_epochs() -> None:
    assert list(draw_replay(kept(21), 1, "", most=6).epochs) == [0, 4, 8, 12, 16, 20]


@pytest.mark.slow
def test_a_long_run_has_at_most_sixty_frames_and_ten_a_second() -> None:
    replay = draw_replay(kept(91), 1, "")
    assert len(replay.frames) == len(set(replay.epochs)) == 60
    assert (replay.epochs[0], replay.epochs[-1]) == (0, 90)
    assert set(replay.durations[:-1]) == {100}


@pytest.mark.slow
def test_thirty_epochs_at_quarter_width_stay_below_two_megabytes() -> None:
    """Even of noise, which compresses worst."""
    replay = draw_replay(kept(31, (24, 3, 11, 11)), 2, "")
    assert len(replay.encode("webp")) < 5e5
    assert len(replay.encode("gif")) < 2e6


@pytest.mark.parametrize("damage", [b"", b"no array", "nan", "shape", "dtype"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: bytes | str) -> None:
    run = Run(tmp_path)
    for epoch, weight in kept(3).items():
        run.keep_filters(epoch, weight)
    assert {epoch: weight.tolist() for epoch, weight in read_kept_filters(run, SHAPE).items()} == {
        epoch: weight.tolist() for epoch, weight in kept(3).items()
    }
    path = tmp_path / "conv1" / "0001.npy"
    if isinstance(damage, bytes):
        path.write_bytes(damage)
    else:
        arrays = {"nan": np.full(SHAPE, np.nan, "f4"), "shape": np.zeros((1, 3), "f4"), "dtype": np.zeros(SHAPE)}
        np.save(path, arrays[damage])
    with pytest.raises(DataError, match=r"0001\.npy is damaged") as caught:
        read_kept_filters(run, SHAPE)
    assert "delete it" in caught.value.hint
