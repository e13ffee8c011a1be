"""The ablation table and its chart: means over seeds, differences paired by seed, steps to a training error.

The chart needs matplotlib (the extra `charts`).
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from alexnet_cli.core.drawing import use_own_style
from alexnet_cli.core.files import read_text
from alexnet_cli.core.runs.run import Run
from alexnet_plugins.experiments.experiment import Verdict
from alexnet_plugins.experiments.study import BASE, TRAINING_IMAGES, Switch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = 50  # steps over which a training error is averaged; one batch is too noisy
ACTIVATIONS = {"base", "tanh", "sigmoid"}  # switches of the paper's figure 1

Curve = list[tuple[int, float]]
"""(step, mean training error over the last WINDOW steps)"""


@dataclass(frozen=True)
class Estimate:
    """Mean, standard deviation and half the 95 % t-interval of some values, as shares; None if there is one value."""

    mean: float
    spread: float | None
    half: float | None
    values: tuple[float, ...]


@dataclass(frozen=True)
class Row:
    """One switch: errors of the last epoch, as shares, and their differences from the base, paired by seed.

    `train_top1` is the trained network's error on the training images; `gap` is `top1` minus `train_top1`. Both are
    None unless all runs have a file `TRAINING_IMAGES`. `diverged` lists the seeds whose loss became NaN. `activation`
    is set for the rows of the paper's figure 1.
    """

    switch: Switch
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    epochs: int | None
    top1: Estimate | None
    top5: Estimate | None
    train_top1: Estimate | None
    gap: Estimate | None
    top1_difference: Estimate | None
    top5_difference: Estimate | None
    train_top1_difference: Estimate | None
    gap_difference: Estimate | None
    activation: str | None
    curves: tuple[Curve, ...]

    @property
    def verdict(self) -> Verdict | None:
        """Return whether the paper's claim holds here; None without a claim or an interval."""
        difference = self.claimed_difference
        return None if difference is None or difference.half is None else judge(difference)

    @property
    def claimed_difference(self) -> Estimate | None:
        """The difference that the paper's claim is about; None without a claim."""
        differences = {
            "top-1 error": self.top1_difference,
            "training error": self.train_top1_difference,
            "gap": self.gap_difference,
        }
        return differences[self.switch.raises] if self.switch.raises else None

    def count_steps_to(self, error: float) -> list[int | None]:
        """Return for each seed the first step at which the training error is that low, or None."""
        return [next((step for step, e in curve if e <= error), None) for curve in self.curves]


def estimate_mean(values: Sequence[float]) -> Estimate | None:
    """Return mean, spread and 95 % interval of some values; None if there are none."""
    if not values:
        return None
    if len(values) == 1:
        return Estimate(values[0], None, None, tuple(values))
    from scipy.stats import t  # takes about a second to import

    spread = statistics.stdev(values)
    half = float(t.ppf(0.975, len(values) - 1)) * spread / math.sqrt(len(values))
    return Estimate(statistics.fmean(values), spread, half, tuple(values))


def round_share(share: float | None) -> float | None:
    """Round a share to hundredths of a percent; None and NaN become None."""
    return None if share is None or math.isnan(share) else round(share, 4)


def judge(difference: Estimate | None) -> Verdict:
    """Return whether a difference that the paper claims to be positive is: decided if its interval leaves out zero."""
    if difference is None or difference.half is None or abs(difference.mean) <= difference.half:
        return "undecided"
    return "agrees" if difference.mean > 0 else "disagrees"


def judge_all(verdicts: Sequence[Verdict | None]) -> Verdict:
    """Return `disagrees` if one of the claims does, `agrees` if all do, else `undecided`."""
    if "disagrees" in verdicts:
        return "disagrees"
    return "agrees" if verdicts and set(verdicts) == {"agrees"} else "undecided"


def build_rows(runs: Mapping[Switch, Mapping[int, Run]]) -> list[Row]:
    """Return a row for each switch with finished trainings."""
    ends = {switch: {seed: read_errors(run) for seed, run in seeds.items()} for switch, seeds in runs.items()}
    return [build_row(switch, runs[switch], ends[switch], ends.get(BASE, {})) for switch in runs]


def build_row(
    switch: Switch,
    runs: Mapping[int, Run],
    ends: Mapping[int, dict[str, Any] | None],
    base: Mapping[int, dict[str, Any] | None],
) -> Row:
    """Return the row of a switch from its runs, its errors by seed (None: it diverged), and the base's."""
    finished = {seed: end for seed, end in ends.items() if end}
    pairs = [(end, base_end) for seed, end in finished.items() if switch is not BASE and (base_end := base.get(seed))]

    def mean(key: str) -> Estimate | None:
        is_measured = all(key in end for end in finished.values())
        return estimate_mean([end[key] for end in finished.values()]) if is_measured else None

    def difference(key: str) -> Estimate | None:
        is_measured = all(key in end and key in base_end for end, base_end in pairs)
        return estimate_mean([end[key] - base_end[key] for end, base_end in pairs]) if is_measured else None

    return Row(
        switch, tuple(finished), tuple(seed for seed in ends if seed not in finished),
        max((end["epoch"] for end in finished.values()), default=None),
        mean("top1_error"), mean("top5_error"), mean("train_top1_error"), mean("gap"),
        difference("top1_error"), difference("top5_error"), difference("train_top1_error"), difference("gap"),
        next((runs[seed].recipe.activation for seed in finished if switch.name in ACTIVATIONS), None),
        tuple(smooth_training_error(runs[seed].records()) for seed in finished),
    )  # fmt: skip


def read_errors(run: Run) -> dict[str, Any] | None:
    """Return the last epoch and its errors, with training error and gap if measured; None if the training diverged."""
    validations = [record for record in run.records() if record.get("event") == "validation"]
    if not validations or run.about.get("status") != "finished":
        return None
    errors = {key: validations[-1][key] for key in ("epoch", "top1_error", "top5_error")}
    file = run.path / TRAINING_IMAGES
    if file.exists():
        errors["train_top1_error"] = json.loads(read_text(file))["top1_error"]
        errors["gap"] = errors["top1_error"] - errors["train_top1_error"]
    return errors


def smooth_training_error(records: Sequence[Mapping[str, Any]]) -> Curve:
    """Return the training error averaged over the WINDOW steps before each record, from the first full window on."""
    steps = [(int(r["step"]), float(r["top1_error"])) for r in records if r.get("event") == "step"]
    sums, total, before = [(0, 0.0)], 0.0, 0
    for step, error in steps:  # a record is the mean of the steps since the one before
        total += error * (step - before)
        before = step
        sums.append((step, total))
    curve: Curve = []
    first = 0
    for step, total in sums:
        while first + 1 < len(sums) and step - sums[first + 1][0] >= WINDOW:
            first += 1
        if step - sums[first][0] >= WINDOW:
            curve.append((step, (total - sums[first][1]) / (step - sums[first][0])))
    return curve


def count_steps_by_activation(rows: Sequence[Row], error: float) -> dict[str, list[int | None]]:
    """Return activation -> the step at which each seed's training error is that low (the paper's figure 1)."""
    return {row.activation: row.count_steps_to(error) for row in rows if row.activation}


def row_to_dict(row: Row, error: float) -> dict[str, Any]:
    """Return a row for JSON: errors as shares, steps to the training error, and the paper's numbers."""
    switch = row.switch
    estimates = {
        "top1_error": row.top1,
        "top5_error": row.top5,
        "train_top1_error": row.train_top1,
        "gap": row.gap,
        "top1_difference": row.top1_difference,
        "top5_difference": row.top5_difference,
        "train_top1_difference": row.train_top1_difference,
        "gap_difference": row.gap_difference,
    }
    errors = {key: asdict(estimate) if estimate else None for key, estimate in estimates.items()}
    return {
        "switch": switch.name, "section": switch.section, "settings": switch.settings, "seeds": list(row.seeds),
        "diverged": list(row.diverged), "epochs": row.epochs, **errors, "steps_to_error": row.count_steps_to(error),
        "paper": switch.paper or None, "paper_top1_difference": switch.top1, "paper_top5_difference": switch.top5,
        "verdict": row.verdict,
    }  # fmt: skip


def format_json(rows: Sequence[Row], about: Mapping[str, Any], error: float) -> str:
    """Return the table and the training curves as a JSON document."""
    records = [row_to_dict(row, error) | {"curves": row.curves} for row in rows]
    return json.dumps({"schema": "alexnet.ablation/1", **about, "training_error": error, "rows": records}) + "\n"


def format_csv(rows: Sequence[Row], error: float) -> str:
    """Return the table as CSV, one line per switch; an estimate has three columns: mean, spread, half interval."""
    flat = [_flatten(row_to_dict(row, error)) for row in rows]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in flat for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def _flatten(line: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat |= {key: value["mean"], f"{key}_spread": value["spread"], f"{key}_half": value["half"]}
        elif isinstance(value, list):
            flat[key] = " ".join("-" if item is None else str(item) for item in value)
        else:
            flat[key] = value
    return flat


WIDEST_INTERVAL = 3  # times the largest value; longer intervals are cut off
OUR_COLOR, PAPER_COLOR = "#0b5394", "#b45f06"
LINES = {"relu": ("#0b5394", "solid"), "tanh": ("#b45f06", "dashed"), "sigmoid": ("#38761d", "dotted")}


def draw_chart(rows: Sequence[Row], title: str, error: float) -> bytes:
    """Return a PNG: differences from the base in percentage points, and the training errors of the activations.

    The second panel is left out if there are fewer than two activations.
    """
    compared = [row for row in rows if row.top1_difference]
    activations = [row for row in rows if row.activation and any(row.curves)]
    panels, file = 2 if len(activations) > 1 else 1, io.BytesIO()
    with use_own_style({}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(1 + 5.5 * panels, 1.8 + 0.42 * max(6, len(compared))), dpi=130, layout="constrained")
        figure.suptitle(title)
        left, *right = figure.subplots(1, panels, squeeze=False)[0]
        draw_differences(left, compared)
        for axes in right:
            _draw_training_errors(axes, activations, error)
        figure.savefig(file, format="png")
    return file.getvalue()


def draw_differences(axes: Axes, rows: Sequence[Row]) -> None:
    """Draw what each switch adds to the top-1 error, with the interval over seeds and the paper's number."""
    axes.axvline(0, color="gray", linewidth=1)
    for height, row in enumerate(rows):
        difference = row.top1_difference
        if difference is None:
            continue
        values, half = [100 * value for value in difference.values], 100 * (difference.half or 0)
        axes.plot(values, [height] * len(values), ".", color=OUR_COLOR, alpha=0.5)
        axes.errorbar(100 * difference.mean, height, xerr=half, fmt="o", color=OUR_COLOR, capsize=3)
        if row.switch.top1 is not None:
            axes.plot(100 * row.switch.top1, height, "D", mfc="none", color=PAPER_COLOR)
    drawn = [v for row in rows if row.top1_difference for v in (*row.top1_difference.values, row.switch.top1 or 0)]
    low, high = axes.get_xlim()
    most = WIDEST_INTERVAL * 100 * max([0.01, *map(abs, drawn)])  # intervals of two seeds would dwarf the rest
    axes.set_xlim(max(low, -most), min(high, most))
    intervals = any(row.top1_difference and row.top1_difference.half is not None for row in rows)
    ours = "here, with the 95 % interval over seeds" if intervals else "here, one seed"
    axes.plot([], [], "o", color=OUR_COLOR, label=ours)
    axes.plot([], [], "D", mfc="none", color=PAPER_COLOR, label="the paper, on ILSVRC")
    axes.set_yticks(range(len(rows)), [row.switch.name for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("top-1 error minus that of the base, percentage points")
    axes.set_title("Cost of switching each idea off")
    axes.legend(loc="best", fontsize="small")


def _draw_training_errors(axes: Axes, rows: Sequence[Row], error: float) -> None:
    for row in rows:
        color, style = LINES[str(row.activation)]
        for number, curve in enumerate(row.curves):
            percent = [100 * e for _, e in curve]
            axes.plot(
                [step for step, _ in curve],
                percent,
                color=color,
                linestyle=style,
                label=None if number else row.activation,
            )
    axes.axhline(100 * error, color="gray", linewidth=1)
    axes.set_xlabel("step")
    axes.set_ylabel(f"training error over the last {WINDOW} steps, %")
    axes.set_title("Training speed of each activation (figure 1 of the paper)")
    axes.legend(fontsize="small")
