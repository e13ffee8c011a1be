"""The commands that installed distributions offer: entry points of the group `alexnet.commands`. Imports none of them.

A command is one annotated function with a docstring, or a typer.Typer; the name of its entry point is the word typed.
Our own and everybody else's come through this door; only ours cannot be replaced.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, EntryPoint, distributions
from typing import Any

from alexnet_cli.errors import MissingError

GROUP = "alexnet.commands"
OURS = "alexnet-cli"


@dataclass(frozen=True)
class Offer:
    """A command that a distribution offers. `status`: ok, disabled, shadowed or conflict; `reason` says why not ok."""

    name: str
    distribution: str
    version: str
    summary: str
    entry: EntryPoint
    status: str = "ok"
    reason: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is built in."""
        return _same(self.distribution, OURS)

    def load(self) -> Any:
        """Import the command: a function or a typer.Typer.

        Raises:
            MissingError: it cannot be imported, or must not be; the message says why.
        """
        if self.status != "ok":
            raise MissingError(f"the command {self.name} of {self.distribution} is {self.status}: {self.reason}", HINT)
        try:
            found = self.entry.load()
        except (Exception, SystemExit) as error:  # a plugin may fail in any way; none may take the others with it
            reason = f"{type(error).__name__}: {error}"
            raise MissingError(
                f"the command {self.name} of {self.distribution} did not load: {reason}", HINT
            ) from error
        if not isinstance(found, Callable):  # type: ignore[arg-type]
            raise MissingError(f"{self.entry.value} of {self.distribution} is not a function or typer.Typer", HINT)
        return found


HINT = "alexnet plugins lists what is installed and why it does not work"


def offers(environment: Mapping[str, str] = os.environ) -> list[Offer]:
    """Every offered command, sorted by name, ours first among equals.

    ALEXNET_PLUGINS limits third parties to the distributions it lists, separated by commas; empty means none.
    """
    found: list[Offer] = []
    for distribution in distributions():
        new = _offered(distribution)
        if new and not any(_same(new[0].distribution, other.distribution) for other in found):
            found += new  # of one distribution that is on the path twice the first, as import has it
    found.sort(key=lambda offer: (offer.name, not offer.ours, offer.distribution))
    return [_judged(offer, found, environment.get("ALEXNET_PLUGINS")) for offer in found]


def _offered(distribution: Distribution) -> list[Offer]:
    """What one distribution offers: nothing if its own records are damaged."""
    try:
        entries = [entry for entry in distribution.entry_points if entry.group == GROUP]
        if not entries:
            return []
        about = {
            key: distribution.metadata[key] for key in ("Name", "Version", "Summary") if key in distribution.metadata
        }
    except Exception:  # half an uninstallation, somebody else's: no reason for our commands to fail
        return []
    name, version, summary = about.get("Name", "(unnamed)"), about.get("Version", "?"), about.get("Summary", "")
    return [Offer(entry.name, name, version, summary, entry) for entry in entries]


def _judged(offer: Offer, every: list[Offer], allowed: str | None) -> Offer:
    if offer.ours:
        return offer
    if not _allowed(offer, allowed):
        return replace(offer, status="disabled", reason="not listed in ALEXNET_PLUGINS")
    rivals = [other for other in every if _rivals(offer, other) and _allowed(other, allowed)]
    if any(rival.ours for rival in rivals):
        return replace(offer, status="shadowed", reason="a built-in command has this name")
    if rivals:
        names = " and ".join(sorted([offer.distribution, *(rival.distribution for rival in rivals)]))
        return replace(offer, status="conflict", reason=f"{names} both offer it; uninstall one, or use ALEXNET_PLUGINS")
    return offer


def _rivals(offer: Offer, other: Offer) -> bool:
    return other.name == offer.name and not _same(other.distribution, offer.distribution)


def _allowed(offer: Offer, allowed: str | None) -> bool:
    return offer.ours or allowed is None or any(_same(offer.distribution, name) for name in allowed.split(","))


def _same(one: str, other: str) -> bool:
    """Whether two names mean one distribution: case, and which of - _ . is used, do not matter to installers."""
    plain = [re.sub(r"[-_.]+", "-", name.strip()).lower() for name in (one, other)]
    return plain[0] == plain[1]


def callable_offers(environment: Mapping[str, str] = os.environ) -> dict[str, Offer]:
    """Name -> the offer that answers to it; of rivals the first, which explains the conflict when called."""
    chosen: dict[str, Offer] = {}
    for offer in offers(environment):
        if offer.status in ("ok", "conflict"):
            chosen.setdefault(offer.name, offer)
    return chosen
