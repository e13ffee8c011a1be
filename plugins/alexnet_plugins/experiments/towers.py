"""Do the towers part by color (section 6.1)? First-layer filters of trainings on photographs, with controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from alexnet_cli.core.analysis.filters import compute_auc, measure_chroma, split_towers
from alexnet_cli.core.runs.run import Run
from alexnet_cli.recipe import TINY
from alexnet_plugins.experiments.experiment import Chart, Experiment, Job, Result, Table, Verdict
from alexnet_plugins.experiments.study import BASE, Switch, find_done_runs, make_cells, train_cells
from alexnet_plugins.experiments.table import OUR_COLOR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SEEDS = 3
PERMUTATIONS = 10_000
SIGNIFICANT = 0.05
RECIPE = replace(TINY, name="towers", conv1_width=1.0)
CONDITIONS = (
    BASE,
    Switch("meet-at-conv2", "6.1", {"cross_talk": ["conv2", "conv3", "fc6", "fc7"]}),
    Switch("joint-norm", "6.1", {"lrn_joint": True}),
    Switch("one-tower", "6.1", {"towers": 1}),
)
INITIAL = "initial values"
WORDS = {
    "base": "two towers that meet at layers 3, 6, 7 and 8, as in the paper",
    "meet-at-conv2": "two towers that meet at layer 2 already",
    "joint-norm": "two towers, response normalization across both",
    "one-tower": "a single tower, its filters divided into halves",
    INITIAL: "two towers before the first step",
}
PROTOCOL = (
    f"Recipe tiny ({TINY.epochs} epochs, a quarter of the paper's width) on photographs, but with the paper's 48 + 48 "
    f"filters in layer 1, {SEEDS} seeds. For each filter: its color share, which is 0 for gray and 1 for opponent "
    "colors. The AUC says how well the color share separates the two towers: 0.5 is not at all, 1 completely. It "
    "counts the same whichever tower has the color.",
    f"Verdict: the mean AUC of all seeds against {PERMUTATIONS:,} random divisions of each run's filters into two "
    "halves. The controls differ from the base in one thing each: "
    + "; ".join(f"{name}: {words}" for name, words in WORDS.items() if name != "base") + ".",
)  # fmt: skip
LIMITS = (
    "The paper's towers were trained for 90 epochs on 1.2 million photographs at full width.",
    "Color share counts all filters alike, also those that have learned little.",
)


class Separation(NamedTuple):
    """How far color separates the towers of several runs: the AUC of each, their mean, and its p-value.

    `limit` is the mean AUC that chance exceeds in 5 % of random divisions: what could have been seen.
    """

    aucs: list[float]
    mean: float
    p_value: float
    limit: float


def measure_separation(runs: Sequence[npt.NDArray[np.float32]]) -> Separation:
    """Measure the first-layer filters of several runs, each 2N x 3 x 11 x 11: the first half against the second."""
    random, null, aucs = np.random.default_rng(0), np.zeros(PERMUTATIONS), []
    for weight in runs:
        first, second = (measure_chroma(kernels) for kernels in split_towers(weight, 2))
        aucs.append(compute_auc(first, second))
        values = np.concatenate([first, second])
        shuffled = random.permuted(np.tile(values.argsort().argsort(), (PERMUTATIONS, 1)), axis=1)
        sums = shuffled[:, : len(first)].sum(axis=1) - len(first) * (len(first) - 1) / 2
        share = sums / (len(first) * len(second))
        null += np.maximum(share, 1 - share)
    mean = float(np.mean(aucs))
    null /= len(runs)
    p_value = float((1 + (null >= mean).sum()) / (1 + PERMUTATIONS))
    return Separation(aucs, mean, p_value, float(np.quantile(null, 1 - SIGNIFICANT)))


def train(job: Job) -> None:
    """Train every condition with every seed."""
    train_cells(job, make_cells(RECIPE, CONDITIONS, SEEDS))


def conclude(folder: Path) -> Result:
    """Compare the conditions in what has been trained so far."""
    done = find_done_runs(folder, CONDITIONS)
    kept = {switch.name: [_read_filters(run) for run in runs.values()] for switch, runs in done.items()}
    filters = {name: [epochs[max(epochs)] for epochs in runs] for name, runs in kept.items()}
    if "base" in kept:
        filters[INITIAL] = [epochs[0] for epochs in kept["base"]]
    found = {name: measure_separation(weights) for name, weights in filters.items()}
    verdict, finding = _conclude(found)
    rows = [
        (
            name, WORDS[name], len(s.aucs), " ".join(f"{auc:.2f}" for auc in s.aucs),
            round(s.mean, 3), s.p_value, round(s.limit, 3),
        )
        for name, s in found.items()
    ]  # fmt: skip
    headings = ("condition", "", "seeds", "AUC of each seed", "mean AUC", "p", "AUC that would have been seen")
    curves = {name: [_auc_by_epoch(epochs) for epochs in runs] for name, runs in kept.items()}
    points = [
        (name, number, epoch, auc)
        for name, runs in curves.items()
        for number, curve in enumerate(runs)
        for epoch, auc in curve.items()
    ]
    caption = "How well color separates the towers, epoch by epoch; a line for each seed. 0.5 is not at all."
    chart = Chart(partial(_draw, curves), caption, Table("auc", caption, ("condition", "seed", "epoch", "AUC"), points))
    missing = [
        f"{switch.name}: {SEEDS - len(done.get(switch, {}))} of {SEEDS} seeds"
        for switch in CONDITIONS
        if len(done.get(switch, {})) < SEEDS
    ]
    return Result(
        verdict, finding, PROTOCOL, LIMITS, [Table("towers", "Separation by color", headings, rows)], chart, missing
    )


def _conclude(found: Mapping[str, Separation]) -> tuple[Verdict, str]:
    if "base" not in found:
        return "undecided", "No training has finished yet."
    base = found["base"]
    finding = (
        f"After training, color separates the towers with a mean AUC of {base.mean:.2f} "
        f"({', '.join(f'{auc:.2f}' for auc in base.aucs)}), p = {base.p_value:.4f}."
    )
    controls = [f"{name} {s.mean:.2f} (p = {s.p_value:.2f})" for name, s in found.items() if name != "base"]
    finding += f" Controls: {', '.join(controls)}."
    if len(base.aucs) < SEEDS:
        return "undecided", finding
    if base.p_value <= SIGNIFICANT:
        return "agrees", finding
    return "disagrees", f"{finding} A mean AUC above {base.limit:.2f} would have been seen."


def _read_filters(run: Run) -> dict[int, npt.NDArray[np.float32]]:
    """Epoch -> the filters of layer 1; 0 is before the first step."""
    return {epoch: np.load(file) for epoch, file in run.kept_filters.items()}


def _auc_by_epoch(epochs: Mapping[int, npt.NDArray[np.float32]]) -> dict[int, float]:
    halves = {epoch: split_towers(weight, 2) for epoch, weight in epochs.items()}
    return {epoch: compute_auc(measure_chroma(one), measure_chroma(other)) for epoch, (one, other) in halves.items()}


def _draw(curves: Mapping[str, Sequence[Mapping[int, float]]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (name, runs) in zip(
        figure.subplots(1, max(1, len(curves)), sharey=True, squeeze=False)[0], curves.items(), strict=False
    ):
        for curve in runs:
            axes.plot(list(curve), list(curve.values()), color=OUR_COLOR, linewidth=1)
        axes.axhline(0.5, color="gray", linewidth=1)
        axes.set(title=name, xlabel="epoch", ylim=(0.45, 1))
    figure.axes[0].set_ylabel("AUC of color")
    return figure


TOWERS = Experiment(
    name="towers",
    section="6.1",
    claim="The kernels on GPU 1 are largely color-agnostic, while the kernels on GPU 2 are largely color-specific. "
    "This specialization occurs during every run and is independent of any particular random weight initialization.",
    data="Imagenette, prepared (alexnet prepare)",
    time="about 6 hours on 2 cores",
    found="",
    train=train,
    conclude=conclude,
)
