"""How a run fails: with the message in run.json, and as the last of its records. No torch."""

from __future__ import annotations

from contextlib import suppress

from alexnet_cli.core.records import Record, count
from alexnet_cli.core.runs import Run
from alexnet_cli.errors import DataError, StorageError, format_error

NONE = {"status": "running", "reason": None, "error": None, "hint": None}
"""What run.json says while a run goes on, whatever it said before."""


def note(run: Run, error: BaseException, reason: str = "error", status: str = "failed") -> Record | None:
    """Write what the error says into run.json, and as the last record, as far as the disk takes it.

    Returns that record; None where the run, or its records, have their end already.
    """
    what, hint, _ = format_error(error)
    try:
        if run.about.get("status") != "running":  # it has not begun, or has ended, whatever came then
            return None
        records = run.records()
    except DataError:
        records = []
    with suppress(StorageError, DataError):  # what stopped the run is what its user needs to know
        run.update({"status": status, "reason": reason, "error": what, "hint": hint})
    last = records[-1] if records else {}
    if last.get("event") == "end":
        return None
    epoch, step = max(1, count(last, "epoch")), count(last, "step")
    end = Record("end", epoch, step, path=str(run.path), reason=reason, text=what, hint=hint or None)
    with suppress(StorageError):
        run.log(end.as_dict())
    return end
