"""Going on with a run: which one, with which recipe, until when."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from alexnet_cli.core.records import epochs_done
from alexnet_cli.core.runs import Run
from alexnet_cli.errors import UsageError
from alexnet_cli.recipe import Recipe, compare_recipes, format_set_option

SHAPE = {"towers", "width"}  # another network, whose weights do not fit
EXIT_CODES = {"Ctrl-C": 130, "SIGTERM": 143, "SIGUSR1": 143, "SIGHUP": 129, "time is up": 75}


def to_continue(resume: str | None, name: str | None) -> Run | None:
    """The run to go on with, or None to start one.

    `resume` is a run, or "auto": the run called `name`, or else the newest if it is not finished, or else none.
    """
    if resume is None:
        return None
    if resume != "auto":
        run = Run.open(resume)
        if name not in (None, run.path.name):
            raise UsageError(f"--resume {resume} goes on with {run.path.name}", f"leave --name {name} out")
        return _trained(run)
    try:
        run = Run.open(name or "latest")
    except UsageError:
        return None
    return _trained(run) if name or run.about.get("status") != "finished" else None


def _trained(run: Run) -> Run:
    """The run, unless its weights were imported: there is no training of theirs to go on with."""
    if "imported" in run.about:
        name = run.path.name
        raise UsageError(f"{name} was imported, not trained", f"start from its weights: --init-from {run.quoted}")
    return run


def agreed(run: Run, wanted: Recipe, said: Collection[str], of_recipe: Collection[str] = ()) -> Recipe:
    """The recipe to go on with; keys in `said` may differ from the run's, and more epochs may follow.

    `of_recipe` are the keys whose values a --recipe gave, to be left out if they are refused.

    Raises:
        UsageError: another key differs that would change the result.
    """
    saved, name = run.recipe, run.path.name
    other = compare_recipes(wanted, saved)

    def leave(*keys: str) -> str:
        return f"leave --recipe out: {name} has its own" if set(keys) & set(of_recipe) else "leave it out"

    for key in sorted(SHAPE & set(other)):
        here, there = other[key]
        what = f"{key} = {here} is another network than that of {name}, which has {there}"
        raise UsageError(what, f"{leave(key)}; or train it as a run of its own")
    if "batch_size" in other:
        here, there = other["batch_size"]
        what = f"batch_size = {here}, but {name} counts its steps in batches of {there}"
        raise UsageError(what, f"{leave('batch_size')}; or start a run of its own: --init-from {run.quoted}")
    # One cycle is planned to its end: with another end every rate is another.
    planned = wanted.schedule == saved.schedule == "one-cycle"
    refused = [key for key in other if key not in said and (planned or key != "epochs")]
    told = ", ".join(f"{key} = {here} instead of {there}" for key, (here, there) in other.items() if key in refused[:4])
    if len(refused) > 1:
        what = f"{name} was trained otherwise: {told}{f', and {len(refused) - 4} more' if len(refused) > 4 else ''}"
        raise UsageError(what, f"{leave(*refused)}; --set KEY=VALUE changes a value from here on")
    done = epochs_done(run.records())
    if wanted.epochs < done:
        least = format_set_option("epochs", done) if planned else f"--epochs {done}"
        raise UsageError(f"epochs = {wanted.epochs}, but {name} has done {done}", f"{least} or more")
    if refused == ["epochs"]:
        what = f"the one-cycle rate of {name} is planned for {saved.epochs} epochs, not {wanted.epochs}"
        force = f"go on all the same, every later rate being another: --set epochs={wanted.epochs}"
        raise UsageError(what, f"{leave('epochs')}, or {force}")
    if refused:
        force = f"go on with it all the same: {format_set_option(refused[0], getattr(wanted, refused[0]))}"
        raise UsageError(f"{name} was trained otherwise: {told}", f"{leave(*refused)}, or {force}")
    return wanted


def changes(run: Run, recipe: Recipe, step: int) -> list[dict[str, Any]]:
    """What was changed on the way to `step`, and what `recipe` changes there, before the run is told of it.

    Each has the `step` after which it holds, the `key`, and what it `was` and `is`. What run.json tells counts as far
    as it leads to the value in recipe.toml: a run can end between the two. What came later than `step` holds from
    there, and what held for no step is not told.
    """
    saved, found = run.recipe, []
    told = run.about.get("changed")
    known = [c for c in told if _is_change(c)] if isinstance(told, list) else []
    new = compare_recipes(recipe, saved)
    for key in dict.fromkeys([*(c["key"] for c in known), *new]):
        own = [c for c in known if c["key"] == key]
        while own and own[-1]["is"] != _plain(getattr(saved, key)):
            own.pop()
        if key in new:
            own.append({"step": step, "key": key, "was": _plain(new[key][1]), "is": _plain(new[key][0])})
        kept: dict[int, dict[str, Any]] = {}
        for change in own:
            at = min(change["step"], step)
            kept[at] = {**change, "step": at, "was": kept.get(at, change)["was"]}
        found += [c for at, c in kept.items() if at and c["was"] != c["is"]]
    return sorted(found, key=lambda change: int(change["step"]))


def _is_change(found: Any) -> bool:
    """Whether run.json, which can hold anything, has one there."""
    return (
        isinstance(found, dict) and set(found) == {"step", "key", "was", "is"}
        and type(found["step"]) is int and found["key"] in {field.name for field in fields(Recipe)}
    )  # fmt: skip


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def seconds(text: str | None) -> float | None:
    """A length of time: 8h, 30m, 45s, 1h30m. UsageError for anything else, a bare number too."""
    if text is None:
        return None
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text)
    if not match or not any(match.groups()):
        raise UsageError(f"--max-time {text} is not a length of time", "such as 8h, 30m, 1h30m or 90s")
    hours, minutes, rest = (int(part or 0) for part in match.groups())
    return hours * 3600 + minutes * 60 + rest


@contextmanager
def asked_to_stop(limit: float | None, parent: int | None = None) -> Iterator[Callable[[], str | None]]:
    """While inside: a function that gives the reason to stop (a key of EXIT_CODES) once there is one.

    Ctrl-C, SIGTERM, SIGUSR1 and a closed terminal are reasons, and so are the end of `limit` seconds and that of the
    process `parent`, which has started this one and would have passed a signal on.
    A second Ctrl-C stops at once.
    """
    reasons: list[str] = []
    deadline = time.monotonic() + limit if limit is not None else None

    def note(number: int, _frame: object) -> None:
        if reasons and number == signal.SIGINT:
            raise KeyboardInterrupt
        reasons.append("Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name)

    def stop() -> str | None:
        if deadline is not None and time.monotonic() >= deadline:
            reasons.append("time is up")
        if parent is not None and os.getppid() != parent:
            reasons.append("SIGTERM")
        return reasons[0] if reasons else None

    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP") if hasattr(signal, name)]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
