"""The report that `alexnet train` leaves behind when it ends, however it ends. See `alexnet report` for all of it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from alexnet_cli.console import Reporter
from alexnet_cli.errors import AlexNetError, WeightsError

if TYPE_CHECKING:
    from alexnet_cli.core.training import Training

SECONDS = 10.0  # that pictures may go through a trained network once more, for confusions, examples and neighbours


def leave_report(reporter: Reporter, training: Training, stopped: bool) -> None:
    """Write report.html into the run. Who has `stopped` it waits for what is quick alone, and for no picture.

    Whatever goes wrong with it is a warning: what was trained is safe.
    """
    try:
        from alexnet_cli.core import report_page, weights
        from alexnet_cli.core.ranks import ALONE
        from alexnet_cli.core.report import gather
        from alexnet_cli.core.runs import find_weights

        run = training.run
        try:
            model = weights.read(find_weights(str(run.path)))
        except WeightsError:  # before the first checkpoint
            model = None
        alone = replace(training.placement, precision="fp32", ranks=ALONE, names=())
        budget = 0.0 if stopped else SECONDS
        report_page.write(gather(run, model, training.data, alone, budget), run.path / report_page.FILE)
    except Exception as error:  # of drawing, of the disk, of a damaged picture: none may lose a training
        what = error.what if isinstance(error, AlexNetError) else f"{type(error).__name__}: {error}"
        reporter.warn(f"no report was written: {what}", f"the training is safe; alexnet report -w {training.run.name}")
        return
    except KeyboardInterrupt:  # a second Ctrl-C: go on to the message that says what is saved
        reporter.warn("no report was written: interrupted", f"alexnet report -w {training.run.name} writes it")
        return
    reporter.line("report", str(run.path / report_page.FILE))
