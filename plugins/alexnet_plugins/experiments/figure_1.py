"""Figure 1 (section 3.1): the epochs that ReLU and tanh need to 25 % training error on CIFAR-10, and a short version.

`figure-1` finds the learning rates and compares several seeds. `figure-1-short` takes these rates, one seed and 40 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from alexnet_plugins.experiments.cifar import (
    RECORDS_PER_EPOCH,
    Condition,
    Training,
    TrainingRecord,
    continue_trainings,
    list_machines,
    read_cifar,
    read_records,
)
from alexnet_plugins.experiments.experiment import Chart, Experiment, Job, Result, Table, Verdict, describe_diverged
from alexnet_plugins.experiments.table import LINES, estimate_mean, round_share

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NETWORK = "19pct"
ACTIVATIONS = ("relu", "tanh", "sigmoid")
RATES = (0.0003, 0.001, 0.003, 0.01, 0.03)
SEEDS = (0, 1, 2)
SEARCH_EPOCHS, FINALISTS = 8, 2
FOUND_RATES = {"relu": 0.003, "tanh": 0.01}  # the best ones that figure-1 has found


@dataclass(frozen=True)
class Goal:
    """A training error to reach, as a share, and the epochs after which a training is given up."""

    error: float
    epochs: int

    def epochs_to_error(self, errors: Sequence[float]) -> float | None:
        """The epochs trained at the middle of the first fifth of an epoch whose training error is below the goal's."""
        return next(((i + 0.5) / RECORDS_PER_EPOCH for i, error in enumerate(errors) if error < self.error), None)

    def has_ended(self, record: TrainingRecord) -> bool:
        """Whether a training that has not reached the error never will."""
        return record.epochs >= self.epochs or record.diverged

    def is_decided(self, record: TrainingRecord) -> bool:
        """Whether a training has reached the error, or never will."""
        return self.epochs_to_error(record.errors) is not None or self.has_ended(record)


WHOLE, SHORT = Goal(0.25, 40), Goal(0.40, 12)
SETTING = (
    "The network is the authors' file layers-19pct.cfg: three convolutions and a fully connected layer, as in the "
    "paper's four-layer network, whose file was not published. CIFAR-10's 50,000 training images, minus their mean, in "
    "the range of 0..255; batch size 128, momentum 0.9, biases at twice the rate of the weights. No regularization of "
    "any kind: no weight decay, no dropout, no crops, no reflections."
)
COUNTING = (
    "The training error is counted while training, over each fifth of an epoch (9,984 images), as cuda-convnet did."
)
PROTOCOL = (
    SETTING,
    f"For each activation, the first seed is trained for {SEARCH_EPOCHS} epochs with each of the rates "
    f"{', '.join(map(str, RATES))}. The {FINALISTS} with the smallest training error go on until one has reached the "
    f"target. With that rate, or the one that came nearest, {len(SEEDS)} seeds are trained for {WHOLE.epochs} epochs. "
    "The same seed means the same initial weights and data order for every activation.",
    f"{COUNTING} The target is reached at the middle of the first fifth with less than {WHOLE.error:.0%}. The ratio is "
    "paired by seed; its interval is Student's 95 % interval over seeds, of the logarithm. Agrees: the whole interval "
    "lies above 1, so ReLU is faster, whatever the factor; disagrees: it lies below. If tanh misses the target "
    "with every seed, the ratios are known only to be larger than a bound: agrees if that is above 1.",
)
SHORT_PROTOCOL = (
    SETTING,
    f"ReLU has the rate {FOUND_RATES['relu']}, tanh {FOUND_RATES['tanh']}: the best that figure-1 found. Each is "
    f"trained with the first seed to the end of the epoch in which it reaches {SHORT.error:.0%} training error, but at "
    f"most for {SHORT.epochs} epochs. Both have the same initial weights and data order.",
    f"{COUNTING} The verdict is always undecided: one seed gives no interval.",
)
LIMITS = (
    "The paper does not say which four-layer network it trained, nor its initial weights; both change the ratio. The "
    "paper itself says that the size of the effect varies with the architecture.",
    "Rates are a factor of about three apart, so the best rate of each activation is known only to about that factor.",
    "The seed that chose the rate is one of those compared.",
    "The interval is over seeds: it says nothing about other networks or data sets.",
)
SHORT_LIMITS = (
    LIMITS[0],
    LIMITS[1],
    f"One seed, and {SHORT.error:.0%} instead of the paper's {WHOLE.error:.0%}: there the ratio may differ.",
)


def train(job: Job) -> None:
    """Find each activation's learning rate with the first seed, then train all seeds with it."""
    data = read_cifar(job.data, job.placement.device)

    def is_tried(record: TrainingRecord) -> bool:
        return record.epochs >= SEARCH_EPOCHS

    def is_searched(record: TrainingRecord) -> bool:
        search = _select_search(read_records(job.folder), record.training.activation)
        found = [WHOLE.epochs_to_error(r.errors) for r in (*search, record)]
        return record.epochs >= min([WHOLE.epochs, *(epochs for epochs in found if epochs)])

    def is_finished(record: TrainingRecord) -> bool:
        return record.epochs >= WHOLE.epochs

    def continue_all(activation: str, rates: Sequence[float], seeds: Sequence[int], is_done: Condition) -> None:
        keys = [(rate, seed) for rate in rates for seed in seeds]
        continue_trainings([_make_training(activation, r, s) for r, s in keys], data, job, is_done)

    for activation in ACTIVATIONS:
        continue_all(activation, RATES, SEEDS[:1], is_tried)
        continue_all(activation, _find_finalists(read_records(job.folder), activation), SEEDS[:1], is_searched)
        best = _find_best_rates(read_records(job.folder), activation)
        continue_all(activation, best, SEEDS, is_finished)


def _make_training(activation: str, rate: float, seed: int) -> Training:
    return Training(network=NETWORK, activation=activation, rate=rate, seed=seed, decay=False)


def _select_search(records: Sequence[TrainingRecord], activation: str) -> list[TrainingRecord]:
    return [r for r in records if (r.training.activation, r.training.seed) == (activation, SEEDS[0])]


def _find_finalists(records: Sequence[TrainingRecord], activation: str) -> list[float]:
    """The rates with the smallest error in the last epoch in which all are trained; none until all were."""
    epoch = slice((SEARCH_EPOCHS - 1) * RECORDS_PER_EPOCH, SEARCH_EPOCHS * RECORDS_PER_EPOCH)
    tried = [
        (math.inf if math.isnan(sum(r.errors[: epoch.stop])) else sum(r.errors[epoch]), r.training.rate)
        for r in _select_search(records, activation)
        if r.epochs >= SEARCH_EPOCHS or WHOLE.has_ended(r)
    ]
    return [rate for _, rate in sorted(tried)[:FINALISTS]] if len(tried) == len(RATES) else []


def _find_best_rates(records: Sequence[TrainingRecord], activation: str) -> list[float]:
    """The rate that reached the target first, or else came nearest in all epochs; none if that is open."""
    rates = _find_finalists(records, activation)
    finalists = [r for r in _select_search(records, activation) if r.training.rate in rates]
    reached = [(epochs, r.training.rate) for r in finalists if (epochs := WHOLE.epochs_to_error(r.errors))]
    ends = [
        (math.inf if r.diverged else sum(r.errors[-RECORDS_PER_EPOCH:]), r.training.rate)
        for r in finalists
        if WHOLE.has_ended(r)
    ]
    if reached:
        return [min(reached)[1]]
    return [min(ends)[1]] if ends and len(ends) == len(finalists) and min(ends)[0] < math.inf else []


def conclude(folder: Path) -> Result:
    """Compare the activations in what has been trained so far."""
    records = read_records(folder)
    best: dict[str, list[TrainingRecord]] = {}
    for activation in ACTIVATIONS:
        rates = _find_best_rates(records, activation)
        best[activation] = [r for r in records if r.training.activation == activation and r.training.rate in rates]
    search = [
        (r.training.activation, r.training.rate, WHOLE.epochs_to_error(r.errors), r.epochs, round_share(r.errors[-1]))
        for r in sorted(records, key=lambda r: (ACTIVATIONS.index(r.training.activation), r.training.rate))
        if r.training.seed == SEEDS[0]
    ]
    headings = ("activation", "rate", "epochs to target", "epochs trained", "last training error")
    verdict, finding = _compare(best, WHOLE)
    ends, chart = _tabulate(best, WHOLE)
    tables = (ends, Table("search", "Search for the learning rate (first seed)", headings, search))
    limits = (*LIMITS, *_list_edges(best))
    return Result(verdict, finding, PROTOCOL, limits, tables, chart, _list_missing(best), list_machines(records))


def train_short(job: Job) -> None:
    """Train the first seed with the rates that are known, until each has reached the error of `SHORT`."""
    data = read_cifar(job.data, job.placement.device)
    trainings = [_make_training(activation, rate, SEEDS[0]) for activation, rate in FOUND_RATES.items()]
    continue_trainings(trainings, data, job, SHORT.is_decided)


def conclude_short(folder: Path) -> Result:
    """Compare what `train_short` has trained so far."""
    records = read_records(folder)
    pairs = FOUND_RATES.items()
    best = {a: [r for r in records if r.training == _make_training(a, rate, SEEDS[0])] for a, rate in pairs}
    verdict, finding = _compare(best, SHORT)  # one seed never decides
    ends, chart = _tabulate(best, SHORT)
    missing = [f"{a}: seed {SEEDS[0]}" for a, found in best.items() if not any(map(SHORT.is_decided, found))]
    return Result(verdict, finding, SHORT_PROTOCOL, SHORT_LIMITS, [ends], chart, missing, list_machines(records))


def _tabulate(best: Mapping[str, Sequence[TrainingRecord]], goal: Goal) -> tuple[Table, Chart]:
    """Return the epochs that each training needed, and the curves of their errors."""
    chosen = [record for records in best.values() for record in records]
    about = [(r.training.activation, r.training.rate, r.training.seed) for r in chosen]
    ends = [
        (*key, goal.epochs_to_error(r.errors), round_share(r.errors[-1])) for key, r in zip(about, chosen, strict=True)
    ]
    curves = [
        (*key, (i + 1) / RECORDS_PER_EPOCH, round_share(error))
        for key, r in zip(about, chosen, strict=True)
        for i, error in enumerate(r.errors)
    ]
    keys = ("activation", "rate", "seed")
    caption = f"Training error of the four-layer network with each activation; the target is {goal.error:.0%}."
    table = Table(
        "epochs", f"Epochs to {goal.error:.0%} training error", (*keys, "epochs", "last training error"), ends
    )
    points = Table("curves", caption, (*keys, "epoch", "training error"), curves)
    return table, Chart(partial(_draw, best, goal), caption, points)


def _compare(best: Mapping[str, Sequence[TrainingRecord]], goal: Goal) -> tuple[Verdict, str]:
    """Compare tanh with ReLU, paired by seed. A seed that never reached the error counts as all of the goal's epochs.

    For tanh this makes the ratio a lower bound, without an interval; for ReLU nothing is decided then.
    """
    relu, tanh = (
        {r.training.seed: goal.epochs_to_error(r.errors) or goal.epochs for r in best[activation] if goal.is_decided(r)}
        for activation in ("relu", "tanh")
    )
    seeds = sorted(relu.keys() & tanh.keys())
    relu_never, never = (sum(epochs[seed] == goal.epochs for seed in seeds) for epochs in (relu, tanh))
    ratio = estimate_mean([math.log(tanh[seed] / relu[seed]) for seed in seeds])
    if ratio is None:
        return "undecided", "ReLU and tanh cannot be compared yet."
    means = [sum(epochs[seed] for seed in seeds) / len(seeds) for epochs in (tanh, relu)]
    times = _floor(math.exp(ratio.mean)) if never else math.exp(ratio.mean)
    more, plural = "more than " if never else "", "" if len(seeds) == 1 else "s"
    finding = (
        f"To {goal.error:.0%} training error, tanh needed {more}{times:.1f} times "
        f"the epochs of ReLU ({more}{means[0]:.1f} against {means[1]:.1f}, {len(seeds)} seed{plural})"
    )
    for activation, count in (("tanh", never), ("ReLU", relu_never)):
        if count:
            finding += f"; {count} of {len(seeds)} seeds of {activation} had not reached it after {goal.epochs} epochs"
    paper = f"The paper says six times to {WHOLE.error:.0%}."
    diverged = [r.training.name for a in ("relu", "tanh") for r in best[a] if r.diverged]
    if relu_never or diverged:
        return "undecided", f"{finding}. {paper}{describe_diverged(diverged)}"
    if ratio.half is None:
        return "undecided", f"{finding}; one seed gives no interval. {paper}"
    if never:
        least = math.exp(min(ratio.values))
        finding += f"; so there is no interval, but each seed's ratio is at least {_floor(least):.1f}. {paper}"
        return ("agrees" if least > 1 and never == len(seeds) else "undecided"), finding
    low, high = math.exp(ratio.mean - ratio.half), math.exp(ratio.mean + ratio.half)
    finding += f"; 95 % interval {low:.1f} to {high:.1f}. {paper}"
    return ("agrees" if low > 1 else "disagrees" if high < 1 else "undecided"), finding


def _floor(bound: float) -> float:
    """Round down to tenths, as a lower bound must be."""
    return math.floor(10 * bound) / 10


def _list_missing(best: Mapping[str, Sequence[TrainingRecord]]) -> list[str]:
    missing = []
    for activation, records in best.items():
        if left := sorted(set(SEEDS) - {r.training.seed for r in records if WHOLE.has_ended(r)}):
            missing.append(f"{activation}: seed {', '.join(map(str, left))} of {WHOLE.epochs} epochs")
    return missing


def _list_edges(best: Mapping[str, Sequence[TrainingRecord]]) -> list[str]:
    """Return a line for each activation whose best rate is the smallest or the largest of the grid."""
    edges = {min(RATES): "smallest", max(RATES): "largest"}
    rates = {activation: records[0].training.rate for activation, records in best.items() if records}
    return [
        f"The best rate of {activation}, {rate}, is the {edges[rate]} that was tried; one beyond it may be faster."
        for activation, rate in rates.items()
        if rate in edges
    ]


def _draw(best: Mapping[str, Sequence[TrainingRecord]], goal: Goal) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for activation, records in best.items():
        color, style = LINES[activation]
        for number, record in enumerate(records):
            epochs = [(i + 1) / RECORDS_PER_EPOCH for i in range(len(record.errors))]
            label = None if number else f"{activation}, rate {record.training.rate:g}"
            axes.plot(epochs, record.errors, color=color, linestyle=style, linewidth=1, label=label)
    axes.axhline(goal.error, color="gray", linewidth=1, label=f"{goal.error:.0%}")
    axes.set(xlabel="epochs", ylabel="training error", ylim=(0, 0.9))
    axes.legend()
    return figure


CLAIM = (
    "A four-layer convolutional network with ReLUs reaches a 25 % training error rate on CIFAR-10 six times "
    "faster than the same network with tanh."
)
FIGURE_1 = Experiment(
    name="figure-1",
    section="3.1",
    claim=CLAIM,
    data="CIFAR-10",
    time="estimated: 2 hours on 2 cores with bf16",
    found="more than 6.5 times (tanh not in 40 epochs, ReLU in 6.1; 3 seeds)",
    train=train,
    conclude=conclude,
)
FIGURE_1_SHORT = Experiment(
    name="figure-1-short",
    section="3.1",
    claim=CLAIM,
    data="CIFAR-10",
    time="3.5 minutes on 2 cores with bf16",
    found="to 40 %, 4.5 times with one seed (7.7 and 1.7 epochs)",
    train=train_short,
    conclude=conclude_short,
)
