"""Trainings compared: means and spreads over seeds, differences paired by seed, steps to a training error. No torch."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from alexnet_cli.core.runs import Run
from alexnet_cli.core.switches import ACTIVATIONS, BASE, Switch

WINDOW = 50  # steps that a training error is averaged over: a batch alone says little
T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045,
)  # fmt: skip
"""Student's t, 97.5 % quantile, for 1, 2, ... degrees of freedom."""
MOST_SEEDS = len(T975) + 1

Curve = list[tuple[int, float]]
"""(step, training error over the last WINDOW steps)"""


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds, the standard deviation among them, and the half of its 95 % interval (of t); shares.

    One value alone has neither spread nor interval.
    """

    mean: float
    spread: float | None
    half: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One switch: top-1 and top-5 error of the last epoch, and what the base has less, seed by seed.

    `activation` is that of the trainings, where it is what is compared.
    """

    switch: Switch
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    epochs: int | None
    top1: Estimate | None
    top5: Estimate | None
    train_top1: Estimate | None
    top1_difference: Estimate | None
    top5_difference: Estimate | None
    activation: str | None
    curves: tuple[Curve, ...]

    @property
    def verdict(self) -> str | None:
        """Whether it is with the paper, which says that the error rises; None where it says nothing of the error."""
        found = self.top1_difference
        if not self.switch.harmful or found is None or found.half is None:
            return None
        if abs(found.mean) <= found.half:
            return "open"
        return "agrees" if found.mean > 0 else "disagrees"

    def steps_to(self, error: float) -> list[int | None]:
        """For each seed the first step at which the training error is that low."""
        return [next((step for step, e in curve if e <= error), None) for curve in self.curves]


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean, spread and 95 % interval of some values; None of none."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], None, None, tuple(values))
    spread = statistics.stdev(values)
    half = T975[len(values) - 2] * spread / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), spread, half, tuple(values))


def compare(runs: Mapping[Switch, Mapping[int, Run]]) -> list[Row]:
    """A row for each switch that has finished trainings."""
    ends = {switch: {seed: _end(run) for seed, run in found.items()} for switch, found in runs.items()}
    return [_row(switch, runs[switch], own, ends.get(BASE, {})) for switch, own in ends.items()]


def _row(
    switch: Switch,
    runs: Mapping[int, Run],
    ends: Mapping[int, dict[str, Any] | None],
    base: Mapping[int, dict[str, Any] | None],
) -> Row:
    good = {seed: end for seed, end in ends.items() if end}
    pairs = [(end, other) for seed, end in good.items() if switch is not BASE and (other := base.get(seed))]

    def over(key: str) -> Estimate | None:
        return estimate([end[key] for end in good.values()])

    def beyond(key: str) -> Estimate | None:
        return estimate([end[key] - other[key] for end, other in pairs])

    return Row(
        switch, tuple(good), tuple(seed for seed in ends if seed not in good),
        max((end["epoch"] for end in good.values()), default=None),
        over("top1_error"), over("top5_error"), over("train_top1_error"), beyond("top1_error"), beyond("top5_error"),
        next((runs[seed].recipe.activation for seed in good if switch.name in ACTIVATIONS), None),
        tuple(curve(runs[seed].records()) for seed in good),
    )  # fmt: skip


def _end(run: Run) -> dict[str, Any] | None:
    """The last validation; None of a training that broke down."""
    validations = [record for record in run.records() if record.get("event") == "validation"]
    return validations[-1] if validations and run.about.get("status") == "finished" else None


def curve(records: Sequence[Mapping[str, Any]]) -> Curve:
    """The training error as it was learned, averaged over the WINDOW steps before; from the first full window on."""
    steps = [(int(r["step"]), float(r["top1_error"])) for r in records if r.get("event") == "step"]
    sums, total, before = [(0, 0.0)], 0.0, 0
    for step, error in steps:  # a record is the mean of the steps since the one before
        total += error * (step - before)
        before = step
        sums.append((step, total))
    found: Curve = []
    first = 0
    for step, total in sums:
        while first + 1 < len(sums) and step - sums[first + 1][0] >= WINDOW:
            first += 1
        if step - sums[first][0] >= WINDOW:
            found.append((step, (total - sums[first][1]) / (step - sums[first][0])))
    return found


def speeds(rows: Sequence[Row], error: float) -> dict[str, list[int | None]]:
    """Activation -> the step at which each seed's training error is that low (the paper's figure 1)."""
    return {row.activation: row.steps_to(error) for row in rows if row.activation}


def as_dict(row: Row, error: float) -> dict[str, Any]:
    """A row for JSON: shares, steps, and the paper's numbers beside them."""
    switch = row.switch
    estimates = ("top1", "top5", "train_top1", "top1_difference", "top5_difference")
    names = {"top1": "top1_error", "top5": "top5_error", "train_top1": "train_top1_error"}
    found = {names.get(n, n): asdict(value) if (value := getattr(row, n)) else None for n in estimates}
    return {
        "switch": switch.name, "section": switch.section, "settings": switch.settings, "seeds": list(row.seeds),
        "diverged": list(row.diverged), "epochs": row.epochs, **found, "steps_to_error": row.steps_to(error),
        "paper": switch.paper or None, "paper_top1_difference": switch.top1, "paper_top5_difference": switch.top5,
        "verdict": row.verdict,
    }  # fmt: skip


def to_json(rows: Sequence[Row], about: Mapping[str, Any], error: float) -> str:
    """The table and the training curves as a JSON document."""
    whole = [as_dict(row, error) | {"curves": row.curves} for row in rows]
    return json.dumps({"schema": "alexnet.ablation/1", **about, "training_error": error, "rows": whole}) + "\n"


def to_csv(rows: Sequence[Row], error: float) -> str:
    """The table, a row a switch; an estimate takes three columns, its mean, its spread and half its interval."""
    flat = [_flat(as_dict(row, error)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in flat for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flat(line: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            found |= {key: value["mean"], f"{key}_spread": value["spread"], f"{key}_half": value["half"]}
        elif isinstance(value, list):
            found[key] = " ".join("-" if item is None else str(item) for item in value)
        else:
            found[key] = value
    return found
