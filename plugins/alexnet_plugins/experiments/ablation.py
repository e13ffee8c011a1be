"""The paper's ideas switched off one at a time (sections 3 to 7) on photographs: top-1 error and overfitting."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from alexnet_cli.core.files import read_text
from alexnet_cli.core.runs.run import Run
from alexnet_cli.recipe import TINY
from alexnet_plugins.experiments.experiment import Chart, Experiment, Job, Result, Table, TableValue, describe_diverged
from alexnet_plugins.experiments.study import (
    BASE,
    SWITCHES,
    TEN_VIEWS,
    Switch,
    find_done_runs,
    list_diverged,
    list_machines,
    list_missing,
    make_cells,
    open_imagenette,
    train_cells,
)
from alexnet_plugins.experiments.table import (
    Estimate,
    Row,
    build_row,
    build_rows,
    draw_differences,
    judge_all,
    read_errors,
    round_share,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 3
MOST_SEEDS = 1000
RECIPE = replace(TINY, name="ablation", dropout=0.5, epochs=30)
# No training: the base's runs. Section 6 has 39.0 / 18.3 % with one view and 37.5 / 17.0 % with ten, on ILSVRC-2010.
ONE_VIEW = Switch("one-view", "4.1", {}, "+1.5 / +1.3", 0.015, 0.013, "top-1 error")
CLAIMS = [switch for switch in SWITCHES if switch is BASE or switch.raises]
PROTOCOL = (
    f"Recipe tiny (a quarter of the paper's width) with the paper's dropout of 0.5 and {RECIPE.epochs} epochs, and "
    f"each of the paper's ideas switched off in turn, {SEEDS} seeds each. The same seed means the same weights at the "
    "start, where layers are the same, and images in the same order. Errors are those of the last epoch, center view. "
    "The training error is measured the same way, on the training images; the gap is the top-1 error minus it. "
    "one-view is no training: its difference is the base's error with the center view minus that with ten views.",
    "Differences are from the base, paired by seed, with Student's 95 % interval over seeds. The verdict is on the "
    "top-1 error; for no-crops-flips and no-dropout, where the paper says that there is overfitting, on the gap; for "
    "no-weight-decay on the training error. Agrees: the whole interval lies above zero, as the paper says; disagrees: "
    "it lies below. The verdict on all: agrees if every claim does, disagrees if one does.",
)
LIMITS = (
    "Ten classes and 9,469 training images instead of 1000 and 1.2 million, a quarter of the width: an effect may be "
    "larger or smaller than the paper's.",
    f"Apart from width and epochs, tiny differs from the paper in batch size ({RECIPE.batch_size}), schedule (one "
    f"cycle) and initial values. It smooths labels by {RECIPE.label_smoothing:g}, which may hide what other "
    "regularization does. All was chosen for the base; other settings may help a network without an idea.",
    f"{SEEDS} seeds see differences of about two and a half times their standard deviation over seeds; smaller ones "
    "stay undecided, whatever is true. Intervals are over seeds alone: other validation images would move all errors.",
    "No interval is corrected for the number of claims: of ten, one may leave out zero by chance.",
    "Among ten classes, the top-5 error says little.",
)


def train(job: Job) -> None:
    """Train the base and every switch with every seed, then evaluate the base with ten views."""
    study = open_imagenette(job)
    train_cells(job, study, make_cells(RECIPE, CLAIMS, SEEDS))
    for run in find_done_runs(job.folder, [BASE]).get(BASE, {}).values():
        if job.stop() is None and read_errors(run) and not (run.path / TEN_VIEWS).exists():
            job.advance(0, f"{run.path.name}  ten views")
            study.evaluate_ten_views(run, job.stop)


def conclude(folder: Path) -> Result:
    """Compare the switches with the base in what has been trained so far."""
    done = find_done_runs(folder, CLAIMS)
    one_view, ten_views = _read_views(done.get(BASE, {}))
    rows = build_rows(done)
    if one_view:
        rows.append(build_row(ONE_VIEW, done[BASE], one_view, ten_views))
    headings = (
        "switch", "section", "seeds", "top-1 error", "training error", "gap", "difference", "±",
        "training difference", "training ±", "gap difference", "gap ±", "the paper", "verdict on", "verdict",
        "seeds to decide",
    )  # fmt: skip
    table = Table("ablation", "Errors as shares of the images", headings, [_make_values(row) for row in rows])
    caption = "What switching each idea off adds to the top-1 error. Small points are seeds."
    chart = Chart(partial(_draw, rows), caption, table)
    verdicts = {row.switch.name: row.verdict for row in rows if row.verdict}
    verdict = judge_all([verdicts.get(switch.name) for switch in (*CLAIMS, ONE_VIEW) if switch.raises])
    parts = [
        f"{word}: {', '.join(name for name, found in verdicts.items() if found == word) or 'none'}"
        for word in ("agrees", "disagrees", "undecided")
    ]
    missing = list_missing({**done, ONE_VIEW: one_view}, [*CLAIMS, ONE_VIEW], SEEDS)
    finding = f"{'; '.join(parts)}.{describe_diverged(list_diverged(done))}"
    return Result(verdict, finding, PROTOCOL, LIMITS, (), chart, missing, list_machines(done))


def _read_views(base: Mapping[int, Run]) -> tuple[dict[int, Any], dict[int, Any]]:
    """Seed -> the base's errors with one view (None: it diverged), and with ten, where these were measured."""
    one_view, ten_views = dict[int, Any](), dict[int, Any]()
    for seed, run in base.items():
        end, file = read_errors(run), run.path / TEN_VIEWS
        if end is None or file.exists():
            one_view[seed] = end
        if end and file.exists():
            ten_views[seed] = json.loads(read_text(file))
    return one_view, ten_views


def _make_values(row: Row) -> list[TableValue]:
    means = [round_share(estimate.mean if estimate else None) for estimate in (row.top1, row.train_top1, row.gap)]
    differences = map(_round_estimate, (row.top1_difference, row.train_top1_difference, row.gap_difference))
    return [
        row.switch.name, row.switch.section, len(row.seeds), *means, *itertools.chain(*differences),
        row.switch.paper, row.switch.raises, row.verdict, count_seeds_to_decide(row),
    ]  # fmt: skip


def _round_estimate(estimate: Estimate | None) -> list[TableValue]:
    return [round_share(estimate.mean), round_share(estimate.half)] if estimate else [None, None]


def count_seeds_to_decide(row: Row) -> int | None:
    """How many seeds make the interval shorter than the difference, if mean and spread stay as they are.

    None if it is decided, or if MOST_SEEDS are too few.
    """
    from scipy.stats import t  # takes about a second to import

    difference = row.claimed_difference
    if row.verdict != "undecided" or difference is None or not difference.spread:
        return None
    seeds = np.arange(len(difference.values) + 1, MOST_SEEDS + 1)
    decides = t.ppf(0.975, seeds - 1) * difference.spread / np.sqrt(seeds) < abs(difference.mean)
    return int(seeds[decides.argmax()]) if decides.any() else None


def _draw(rows: Sequence[Row]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    draw_differences(figure.subplots(), [row for row in rows if row.top1_difference])
    return figure


ABLATION = Experiment(
    name="ablation",
    section="3 to 7",
    claim="Each idea lowers the error: response normalization by 1.4 points of top-1 error, overlapping pooling by "
    "0.4, two towers by 1.7, the color shift by more than 1, ten views by 1.5, any middle layer by about 2; "
    "without crops and reflections, or without dropout, there is substantial overfitting; weight decay reduces even "
    "the training error.",
    data="Imagenette, prepared (alexnet prepare)",
    time="estimated: 6 hours on 2 cores with bf16",
    found="agree: towers, crops, dropout, weight decay, ten views; disagrees: layer 4; undecided: 4 (28 trainings)",
    train=train,
    conclude=conclude,
)
