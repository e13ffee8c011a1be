"""`alexnet plugins`: every installed command, where it comes from, and whether it works."""

from __future__ import annotations

from alexnet_cli.console import Reporter
from alexnet_cli.entry_points import CommandEntry, find_entries
from alexnet_cli.errors import MissingError
from alexnet_cli.options import JsonFlag, QuietFlag


def plugins(json: JsonFlag = False, quiet: QuietFlag = False) -> None:
    """List the installed commands and their origin.

    Includes commands of other packages. Shows why a command does not work.
    """
    from rich.table import Table

    reporter = Reporter("plugins", json=json, quiet=quiet)
    rows = [_describe_entry(entry) for entry in find_entries()]
    table = Table("command", "distribution", "version", "status", "reason", box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row.values(), style=None if row["status"] == "ok" else "yellow")
    reporter.result({"plugins": rows})
    reporter.show(table)


def _describe_entry(entry: CommandEntry) -> dict[str, str]:
    status, reason = entry.status, entry.reason
    if status == "ok":
        try:
            entry.load()
        except MissingError as error:
            status, reason = "broken", error.what.partition(" did not load: ")[2] or error.what
    return {
        "name": entry.name, "distribution": entry.distribution, "version": entry.version,
        "status": status, "reason": reason,
    }  # fmt: skip
