"""Do the towers part by color (section 6.1)? First-layer filters of trainings on photographs, with controls.

runs/towers/CONDITION-seedN/color_shares.json   the color share of each live filter of layer 1, by epoch and tower
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from alexnet_cli.core.analysis.filters import Vector, compute_auc, measure_live_chroma, split_towers
from alexnet_cli.core.files import read_text, write_text
from alexnet_cli.core.runs.run import Run
from alexnet_cli.recipe import TINY
from alexnet_plugins.experiments.experiment import Chart, Experiment, Job, Result, Table, Verdict, describe_diverged
from alexnet_plugins.experiments.study import (
    BASE,
    Switch,
    find_done_runs,
    list_diverged,
    list_machines,
    list_missing,
    make_cells,
    open_imagenette,
    train_cells,
)
from alexnet_plugins.experiments.table import OUR_COLOR

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHARES = "color_shares.json"
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
    "counts the same whichever tower has the color. A training that diverged is left out.",
    f"p: the share of {PERMUTATIONS:,} random divisions of each run's filters into two halves whose mean AUC is at "
    f"least as high. Agrees: p is at most {SIGNIFICANT} for all seeds together and for each alone, as the paper says "
    f"that it occurs in every run. Disagrees: p is above {SIGNIFICANT} for all together. Undecided: anything else.",
    "The controls differ from the base in one thing each: "
    + "; ".join(f"{name}: {words}" for name, words in WORDS.items() if name != "base") + ".",
)  # fmt: skip
LIMITS = (
    "The paper's towers were trained for 90 epochs on 1.2 million photographs at full width.",
    "Color share counts all filters alike, also those that have learned little; only dead ones are left out.",
    "One data set of ten classes: on another, the towers may part more, or less.",
)


class Separation(NamedTuple):
    """How far color separates the towers of several runs: the AUC and p-value of each, their mean, and its p-value.

    `limit` is the mean AUC that chance exceeds in 5 % of random divisions: what is needed for p = 0.05.
    """

    aucs: list[float]
    p_values: list[float]
    mean: float
    p_value: float
    limit: float


ColorShares = tuple[Vector, Vector]
"""The color shares of the live filters of each tower, or of each half of a single one."""


def measure_separation(runs: Sequence[ColorShares]) -> Separation:
    """Measure how far color separates the towers in one epoch of several runs."""
    random, nulls, aucs = np.random.default_rng(0), [], []
    for first, second in runs:
        aucs.append(compute_auc(first, second))
        nulls.append(_permute_auc(first, second, random))
    mean, null = float(np.mean(aucs)), np.mean(nulls, axis=0)
    p_values = [_compute_p_value(auc, one) for auc, one in zip(aucs, nulls, strict=True)]
    limit = float(np.quantile(null, 1 - SIGNIFICANT))
    return Separation(aucs, p_values, mean, _compute_p_value(mean, null), limit)


def _permute_auc(first: Vector, second: Vector, random: np.random.Generator) -> Vector:
    """Return the AUC, the larger of both directions, of PERMUTATIONS random divisions into groups of these sizes."""
    from scipy.stats import rankdata  # takes about a second to import

    ranks = rankdata(np.concatenate([first, second]))  # equal values share their mean rank
    shuffled = random.permuted(np.tile(ranks, (PERMUTATIONS, 1)), axis=1)
    larger = shuffled[:, : len(first)].sum(axis=1) - len(first) * (len(first) + 1) / 2
    share: Vector = larger / (len(first) * len(second))
    return np.maximum(share, 1 - share)


def _compute_p_value(auc: float, null: Vector) -> float:
    at_least = null >= auc - 1e-9  # equal ones differ by rounding
    return float((1 + at_least.sum()) / (1 + len(null)))


def train(job: Job) -> None:
    """Train every condition with every seed, and measure the filters of each training."""
    train_cells(job, open_imagenette(job), make_cells(RECIPE, CONDITIONS, SEEDS))
    for runs in find_done_runs(job.folder, CONDITIONS).values():
        for run in runs.values():
            if not (run.path / SHARES).exists():
                _measure_filters(run)


def _measure_filters(run: Run) -> None:
    epochs = {epoch: measure_live_chroma(split_towers(np.load(file), 2)) for epoch, file in run.kept_filters.items()}
    shares = {epoch: [[round(float(share), 4) for share in tower] for tower in both] for epoch, both in epochs.items()}
    write_text(run.path / SHARES, json.dumps(shares) + "\n")


def conclude(folder: Path) -> Result:
    """Compare the conditions in what has been trained so far."""
    done = find_done_runs(folder, CONDITIONS)
    kept = _read_shares(done)
    last = {switch.name: [epochs[max(epochs)] for epochs in runs.values()] for switch, runs in kept.items()}
    if BASE in kept:
        last[INITIAL] = [epochs[0] for epochs in kept[BASE].values()]
    found = {name: measure_separation(shares) for name, shares in last.items()}
    verdict, finding = judge_separation(found)
    rows = [
        (
            name, WORDS[name], len(s.aucs), " ".join(f"{auc:.2f}" for auc in s.aucs),
            round(s.mean, 3), s.p_value, round(s.limit, 3),
        )
        for name, s in found.items()
    ]  # fmt: skip
    headings = ("condition", "", "seeds", "AUC of each seed", "mean AUC", "p", f"AUC for p = {SIGNIFICANT}")
    curves = {
        switch.name: {
            seed: {epoch: compute_auc(*shares) for epoch, shares in epochs.items()} for seed, epochs in runs.items()
        }
        for switch, runs in kept.items()
    }
    points = [
        (name, seed, epoch, auc)
        for name, runs in curves.items()
        for seed, curve in runs.items()
        for epoch, auc in curve.items()
    ]
    caption = "How well color separates the towers, epoch by epoch; a line for each seed. 0.5 is not at all."
    chart = Chart(partial(_draw, curves), caption, Table("auc", caption, ("condition", "seed", "epoch", "AUC"), points))
    table, missing = Table("towers", "Separation by color", headings, rows), list_missing(done, CONDITIONS, SEEDS)
    finding += describe_diverged(list_diverged(done))
    return Result(verdict, finding, PROTOCOL, LIMITS, [table], chart, missing, list_machines(done))


def judge_separation(found: Mapping[str, Separation]) -> tuple[Verdict, str]:
    """Return the verdict on the base by the rule in PROTOCOL, and the numbers of all conditions in a sentence."""
    if "base" not in found:
        return "undecided", "No training has finished yet."
    base = found["base"]
    finding = (
        f"After training, color separates the towers with a mean AUC of {base.mean:.2f} "
        f"({', '.join(f'{auc:.2f}' for auc in base.aucs)}), p = {base.p_value:.4f}; each seed alone: "
        f"{', '.join(f'{p:.4f}' for p in base.p_values)}."
    )
    controls = [f"{name} {s.mean:.2f} (p = {s.p_value:.2f})" for name, s in found.items() if name != "base"]
    finding += f" Controls: {', '.join(controls)}."
    if len(base.aucs) < SEEDS:
        return "undecided", finding
    if base.p_value > SIGNIFICANT:
        return "disagrees", f"{finding} A mean AUC above {base.limit:.2f} would have been significant."
    return ("agrees" if max(base.p_values) <= SIGNIFICANT else "undecided"), finding


def _read_shares(done: Mapping[Switch, Mapping[int, Run]]) -> dict[Switch, dict[int, dict[int, ColorShares]]]:
    """Condition -> seed -> epoch -> color shares; epoch 0 is before the first step.

    Only trainings that have them from the first to the last epoch: one that diverged has not.
    """
    kept: dict[Switch, dict[int, dict[int, ColorShares]]] = {}
    for switch, runs in done.items():
        for seed, run in runs.items():
            file = run.path / SHARES
            epochs = json.loads(read_text(file)) if file.exists() else {}
            shares = {int(epoch): (np.array(first), np.array(second)) for epoch, (first, second) in epochs.items()}
            if shares.keys() >= {0, run.recipe.epochs}:
                kept.setdefault(switch, {})[seed] = shares
    return kept


def _draw(curves: Mapping[str, Mapping[int, Mapping[int, float]]]) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (name, runs) in zip(
        figure.subplots(1, max(1, len(curves)), sharey=True, squeeze=False)[0], curves.items(), strict=False
    ):
        for curve in runs.values():
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
    time="2.6 hours on 2 cores with bf16",
    found="three runs together: AUC 0.60, p = 0.02; alone: p = 0.22, 0.34, 0.008",
    train=train,
    conclude=conclude,
)
