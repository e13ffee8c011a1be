"""Find the commands of installed distributions: entry points of the group `alexnet.commands`. Imports none of them.

A command is one annotated function with a docstring, or a typer.Typer; the name of its entry point is the word typed.
Built-ins and third parties use the same group; only built-ins cannot be replaced.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

from alexnet_cli.errors import MissingError

GROUP = "alexnet.commands"
BUILTIN = "alexnet-cli"


@dataclass(frozen=True)
class CommandEntry:
    """A command of a distribution. `status` is ok, disabled, shadowed or conflict; `reason` says why it is not ok."""

    name: str
    distribution: str
    version: str
    summary: str
    entry: EntryPoint
    status: str = "ok"
    reason: str = ""

    @property
    def is_builtin(self) -> bool:
        """Whether the command comes with this package."""
        return _is_same_name(self.distribution, BUILTIN)

    def load(self) -> Any:
        """Import the command: a function or a typer.Typer.

        Raises:
            MissingError: the command cannot be imported, or its status is not ok.
        """
        if self.status != "ok":
            raise MissingError(f"the command {self.name} of {self.distribution} is {self.status}: {self.reason}", HINT)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # libraries greet on import; stdout carries only results
                command = self.entry.load()
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; none may take the others with it
            reason = f"{type(error).__name__}: {error}"
            raise MissingError(
                f"the command {self.name} of {self.distribution} did not load: {reason}", HINT
            ) from error
        if not isinstance(command, Callable):  # type: ignore[arg-type]
            raise MissingError(f"{self.entry.value} of {self.distribution} is not a function or typer.Typer", HINT)
        return command


HINT = "alexnet plugins lists what is installed and why it does not work"


def find_entries(environment: Mapping[str, str] = os.environ) -> list[CommandEntry]:
    """Return every command, sorted by name, the built-in first among equals.

    ALEXNET_PLUGINS limits third parties to the distributions it lists, separated by commas; empty means none.
    """
    entries: list[CommandEntry] = []
    for distribution in distributions():
        new = _read_entries(distribution)
        if new and not any(_is_same_name(new[0].distribution, other.distribution) for other in entries):
            entries += new  # a distribution that is on the path twice counts once, as for import
    entries.sort(key=lambda entry: (entry.name, not entry.is_builtin, entry.distribution))
    return [_set_status(entry, entries, environment.get("ALEXNET_PLUGINS")) for entry in entries]


def _read_entries(distribution: Distribution) -> list[CommandEntry]:
    """Return the commands of one distribution; none if its metadata is corrupt."""
    try:
        entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
        if not entries:
            return []
        keys = ("Name", "Version", "Summary")
        about = {key: distribution.metadata[key] for key in keys if key in distribution.metadata}
    except Exception:  # a half-removed distribution must not break the other commands
        return []
    name, version, summary = about.get("Name", "(unnamed)"), about.get("Version", "?"), about.get("Summary", "")
    return [CommandEntry(entry.name, name, version, summary, entry) for entry in entries]


def _set_status(entry: CommandEntry, entries: list[CommandEntry], allowed: str | None) -> CommandEntry:
    if entry.is_builtin:
        return entry
    if not _is_allowed(entry, allowed):
        return replace(entry, status="disabled", reason="not listed in ALEXNET_PLUGINS")
    rivals = [other for other in entries if _is_rival(entry, other) and _is_allowed(other, allowed)]
    if any(rival.is_builtin for rival in rivals):
        return replace(entry, status="shadowed", reason="a built-in command has this name")
    if rivals:
        names = " and ".join(sorted([entry.distribution, *(rival.distribution for rival in rivals)]))
        reason = f"{names} both have this command; uninstall one, or use ALEXNET_PLUGINS"
        return replace(entry, status="conflict", reason=reason)
    return entry


def _is_rival(entry: CommandEntry, other: CommandEntry) -> bool:
    return other.name == entry.name and not _is_same_name(other.distribution, entry.distribution)


def _is_allowed(entry: CommandEntry, allowed: str | None) -> bool:
    return entry.is_builtin or allowed is None or any(_is_same_name(entry.distribution, n) for n in allowed.split(","))


def _is_same_name(one: str, other: str) -> bool:
    """Compare names of distributions as installers do: ignoring case, and with - _ . alike."""
    plain = [re.sub(r"[-_.]+", "-", name.strip()).lower() for name in (one, other)]
    return plain[0] == plain[1]


def find_callable_entries(environment: Mapping[str, str] = os.environ) -> dict[str, CommandEntry]:
    """Return name -> command. Of rivals it is the first, which explains the conflict when it is called."""
    chosen: dict[str, CommandEntry] = {}
    for entry in find_entries(environment):
        if entry.status in ("ok", "conflict"):
            chosen.setdefault(entry.name, entry)
    return chosen
