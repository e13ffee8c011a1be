"""The ablation's arithmetic against scipy, numpy and a literal loop; the paper's numbers against the authors' logs."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from alexnet_cli.core.runs.run import Run
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import CAFFE, KRIZHEVSKY, PAPER, TINY
from alexnet_cli.recipe_io import apply_changes
from alexnet_plugins.experiments import table
from alexnet_plugins.experiments.study import BASE, SWITCHES, TRAINING_IMAGES, Switch, choose_switches

SWITCH = {switch.name: switch for switch in SWITCHES}
LOGS = {  # top-1 and top-5 error in the comments of the authors' configurations: the ablation, and what it is beside
    "no-norm": ((42.034, 19.362), (40.664, 18.210)),
    "pool-2x2": ((41.058, 18.510), (40.664, 18.210)),
    "one-tower": ((39.168, 18.229), (37.473, 16.999)),
}


@pytest.mark.parametrize(("name", "logged"), LOGS.items())
def test_the_papers_differences_are_those_of_the_logs(
    name: str, logged: tuple[tuple[float, float], tuple[float, float]]
) -> None:
    (top1, top5), (base1, base5) = logged
    assert SWITCH[name].top1 == pytest.approx(round(top1 - base1, 1) / 100)
    assert SWITCH[name].top5 == pytest.approx(round(top5 - base5, 1) / 100)
    assert SWITCH[name].paper == f"+{top1 - base1:.1f} / +{top5 - base5:.1f}"


def test_every_switch_changes_every_recipe_or_is_left_out() -> None:
    for base in (PAPER, TINY, KRIZHEVSKY):
        switches, off = choose_switches(base)
        assert (switches, off) == (list(SWITCHES), [])
        assert switches[0] is BASE
        assert len({switch.apply(base) for switch in switches}) == len(SWITCHES)
    assert not SWITCH["no-norm"].apply(KRIZHEVSKY).within_norm_2
    assert [switch.name for switch in choose_switches(CAFFE)[1]] == ["no-color-shift"]
    assert [switch.name for switch in choose_switches(PAPER, ["tanh"])[0]] == ["base", "tanh"]
    with pytest.raises(UsageError) as caught:
        choose_switches(PAPER, ["tan"])
    assert "did you mean tanh?" in caught.value.hint


@pytest.mark.parametrize("n", [2, 3, 7])
def test_the_interval_is_scipys(n: int) -> None:
    values = np.random.default_rng(n).normal(0.3, 0.02, n)
    found = table.estimate_mean(values.tolist())
    assert found is not None
    assert found.half is not None
    from scipy import stats

    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high), rel=1e-4)
    assert found.spread == pytest.approx(values.std(ddof=1))


def test_one_value_has_no_interval_and_none_is_nothing() -> None:
    one = table.estimate_mean([0.25])
    assert one == table.Estimate(0.25, None, None, (0.25,))
    assert table.estimate_mean([]) is None


def test_the_curve_is_a_mean_over_the_last_steps() -> None:
    errors = np.random.default_rng(1).random(137)  # of each step
    ends = sorted({*range(10, 138, 10), 78, 137})  # where records are: every ten, and at the ends of epochs
    starts = [0, *ends[:-1]]
    records = [
        {"event": "step", "step": b, "top1_error": errors[a:b].mean()} for a, b in zip(starts, ends, strict=True)
    ]
    found = table.smooth_training_error([{"event": "start", "step": 0}, *records])
    wanted = []
    for end in ends:
        begin = max((s for s in starts if end - s >= table.WINDOW), default=None)
        if begin is not None:
            wanted.append((end, errors[begin:end].mean()))
    assert [step for step, _ in found] == [step for step, _ in wanted]
    np.testing.assert_allclose([e for _, e in found], [e for _, e in wanted])
    assert table.smooth_training_error([]) == []


def made_up(
    folder: Path, errors: dict[int, float], slow: int = 1, status: str = "finished", activation: str = "relu"
) -> dict[int, Run]:
    """Runs that ended with such errors, and learned `slow` times as slowly as 0.9 at the start, 0 after 100 steps."""
    runs = {}
    for seed, error in errors.items():
        run = Run.create(f"s{seed}", apply_changes(TINY, {"seed": seed, "activation": activation}), {}, folder)
        for step in range(10, 201, 10):
            run.log({"event": "step", "epoch": 1, "step": step, "top1_error": max(0.0, 0.9 - 0.009 * step / slow)})
        fields = {"top1_error": error, "top5_error": error / 5}
        run.log({"event": "validation", "epoch": 1, "step": 200, "top1_error": 1.0})
        run.log({"event": "validation", "epoch": 2, "step": 200, **fields})
        (run.path / TRAINING_IMAGES).write_text(json.dumps({"top1_error": error**2, "top5_error": 0.0}))
        run.update({"status": status})
        runs[seed] = run
    return runs


@pytest.fixture
def rows(tmp_path: Path) -> list[table.Row]:
    base = made_up(tmp_path / "base", {0: 0.30, 1: 0.33, 2: 0.36})
    runs = {
        BASE: base,
        SWITCH["no-norm"]: made_up(tmp_path / "a", {0: 0.32, 1: 0.36, 2: 0.38}),
        SWITCH["pool-2x2"]: made_up(tmp_path / "b", {0: 0.28, 1: 0.31, 2: 0.345}),
        SWITCH["one-tower"]: made_up(tmp_path / "c", {0: 0.31, 1: 0.32, 2: 0.36}),
        SWITCH["no-dropout"]: made_up(tmp_path / "d", {1: 0.9}),
        SWITCH["tanh"]: made_up(tmp_path / "e", {0: 0.4}, slow=2, activation="tanh"),
        SWITCH["sigmoid"]: made_up(tmp_path / "f", {0: 0.9}, status="failed"),
    }
    return table.build_rows(runs)


def test_differences_are_taken_in_pairs(rows: list[table.Row]) -> None:
    row = {r.switch.name: r for r in rows}
    difference = row["no-norm"].top1_difference
    assert difference is not None
    assert difference.half is not None
    from scipy import stats

    test = stats.ttest_rel([0.32, 0.36, 0.38], [0.30, 0.33, 0.36])
    interval = test.confidence_interval(0.95)
    assert (difference.mean - difference.half, difference.mean + difference.half) == pytest.approx(interval, rel=1e-3)
    verdicts = {name: r.verdict for name, r in row.items()}
    assert verdicts == {
        "base": None, "no-norm": "agrees", "pool-2x2": "disagrees", "one-tower": "undecided", "no-dropout": None,
        "tanh": None, "sigmoid": None,
    }  # fmt: skip
    gap = row["no-norm"].gap_difference
    assert gap is not None
    assert gap.values == pytest.approx([0.32 - 0.32**2 - 0.21, 0.36 - 0.36**2 - 0.2211, 0.38 - 0.38**2 - 0.2304])
    alone = row["no-dropout"].top1_difference
    assert alone is not None
    assert alone.mean == pytest.approx(0.9 - 0.33), "paired with the same seed"
    assert (row["sigmoid"].top1, row["sigmoid"].diverged, row["sigmoid"].seeds) == (None, (0,), ())
    assert row["base"].top1_difference is None


def test_steps_to_a_training_error(rows: list[table.Row]) -> None:
    """The window of 50 steps, five records of ten, is the mean of a straight line: its middle record counts."""

    def first(slow: int) -> int:
        return next(
            step for step in range(50, 201, 10)
            if np.mean([max(0.0, 0.9 - 0.009 * s / slow) for s in range(step - 40, step + 1, 10)]) <= 0.25
        )  # fmt: skip

    assert table.count_steps_by_activation(rows, 0.25) == {"relu": [first(1)] * 3, "tanh": [first(2)]}
    assert table.count_steps_by_activation(rows, 0.001)["tanh"] == [None]


def test_the_files_hold_the_table(rows: list[table.Row]) -> None:
    lines = list(csv.DictReader(io.StringIO(table.format_csv(rows, 0.25))))
    assert [line["switch"] for line in lines] == [row.switch.name for row in rows]
    assert float(lines[1]["top1_difference"]) == pytest.approx(0.07 / 3)
    assert float(lines[1]["paper_top1_difference"]) == 0.014
    assert lines[1]["seeds"] == "0 1 2"
    assert lines[6]["top1_error"] == ""
    whole = json.loads(table.format_json(rows, {"data": "d"}, 0.25))
    assert whole["rows"][1]["top1_error"]["values"] == [0.32, 0.36, 0.38]
    assert whole["rows"][0]["curves"][0][0][0] == 50


def test_the_picture(rows: list[table.Row]) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    png = table.draw_chart(rows, "made up", 0.25)
    with matplotlib.rc_context({"text.usetex": True, "figure.facecolor": "black"}):
        assert table.draw_chart(rows, "made up", 0.25) == png, "the user's settings do not count"
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        assert picture.width > 1200
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    for color in (table.OUR_COLOR, table.PAPER_COLOR):
        rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(pixels - rgb).max(2) < 8).sum() > 100
    alone = Switch("base", "-")
    assert table.draw_chart([replace(rows[0], switch=alone, curves=())], "one row", 0.25)[:4] == b"\x89PNG"
    one_activation = table.draw_chart([row for row in rows if row.activation != "tanh"], "no figure 1", 0.25)
    with Image.open(io.BytesIO(one_activation)) as narrow:
        assert narrow.width < 900
