"""`alexnet plugins`: every command that is installed, where it comes from, and whether it works."""

from __future__ import annotations

from alexnet_cli.console import Reporter
from alexnet_cli.entry_points import Offer, offers
from alexnet_cli.errors import MissingError
from alexnet_cli.options import JsonFlag, QuietFlag


def plugins(json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """List the installed commands, ours and others'.

    Says what is wrong with those that do not work.
    """
    from rich.table import Table

    reporter = Reporter("plugins", json=json, quiet=quiet)
    rows = [_row(offer) for offer in offers()]
    table = Table("command", "distribution", "version", "status", "reason", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values(), style=None if row["status"] == "ok" else "yellow")
    reporter.result({"plugins": rows})
    reporter.show(table)


def _row(offer: Offer) -> dict[str, str]:
    status, reason = offer.status, offer.reason
    if status == "ok":
        try:
            offer.load()
        except MissingError as error:
            status, reason = "broken", error.what.partition(" did not load: ")[2] or error.what
    return {
        "name": offer.name, "distribution": offer.distribution, "version": offer.version,
        "status": status, "reason": reason,
    }  # fmt: skip
