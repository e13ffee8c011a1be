"""The report that `alexnet train` leaves at its end and when it is stopped: all that needs no pass of the network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from alexnet_cli.console import Reporter
from alexnet_cli.errors import AlexNetError, WeightsError

if TYPE_CHECKING:
    from alexnet_cli.core.training import Training


def leave_report(reporter: Reporter, training: Training) -> None:
    """Write report.html into the run. `alexnet report` adds what needs a pass of the network.

    Whatever goes wrong is a warning: the training is saved.
    """
    run = training.run
    try:
        from alexnet_cli.core import report_page
        from alexnet_cli.core.report_collect import collect_report, open_model
        from alexnet_cli.core.runs import find_weights

        try:
            network = open_model(find_weights(str(run.path)))
        except WeightsError:  # before the first checkpoint
            network = None
        report_page.write_page(collect_report(run, network, training.data), run.path / report_page.FILE)
    except Exception as error:  # of drawing, of the disk: none may lose a training
        what = error.what if isinstance(error, AlexNetError) else f"{type(error).__name__}: {error}"
        reporter.warn(f"no report was written: {what}", f"the training is safe; alexnet report -w {run.quoted}")
    except KeyboardInterrupt:  # a second Ctrl-C: go on to the message that says what is saved
        reporter.warn("no report was written: interrupted", f"alexnet report -w {run.quoted} writes it")
    else:
        reporter.line("report", str(run.path / report_page.FILE))
