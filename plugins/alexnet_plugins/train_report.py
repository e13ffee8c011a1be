"""The report that `alexnet train` leaves at its end and when it is stopped. See `alexnet report` for all of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from alexnet_cli.console import Reporter
from alexnet_cli.errors import AlexNetError, WeightsError

if TYPE_CHECKING:
    from alexnet_cli.core.training import Training

SECONDS = 10.0  # that confusions, examples and neighbours may take together, after a training


def leave_report(
    reporter: Reporter, training: Training, stopped: bool, stop: Callable[[], str | None] = lambda: None
) -> None:
    """Write report.html into the run. Who has `stopped` the training, or asks to `stop` now, waits for what is quick
    alone, and for no picture.

    Whatever goes wrong with it is a warning: what was trained is safe.
    """
    run = training.run
    try:
        from alexnet_cli.core import report_page
        from alexnet_cli.core.evidence import opened
        from alexnet_cli.core.patience import Patience
        from alexnet_cli.core.process_group import ALONE
        from alexnet_cli.core.report import gather
        from alexnet_cli.core.runs import find_weights

        try:
            network = opened(find_weights(str(run.path)))
        except WeightsError:  # before the first checkpoint
            network = None
        alone = replace(training.placement, precision="fp32", ranks=ALONE, names=())
        patience = Patience(0.0 if stopped else SECONDS, stop)
        found = gather(run, network, training.data, alone, patience)
        report_page.write(found, run.path / report_page.FILE)
    except Exception as error:  # of drawing, of the disk, of a damaged picture: none may lose a training
        what = error.what if isinstance(error, AlexNetError) else f"{type(error).__name__}: {error}"
        reporter.warn(f"no report was written: {what}", f"the training is safe; alexnet report -w {run.quoted}")
        return
    except KeyboardInterrupt:  # a second Ctrl-C: go on to the message that says what is saved
        reporter.warn("no report was written: interrupted", f"alexnet report -w {run.quoted} writes it")
        return
    reporter.line("report", str(run.path / report_page.FILE))
    if stopped or not (reason := stop()):
        return
    if found.evidence.missing:
        what = f"{reason}: the training is done and saved, but its report is without what needs pictures"
        reporter.warn(what, f"alexnet report -w {run.quoted} adds it")
    else:
        reporter.line("stop", f"{reason}: the training and its report are done")
