"""The shell: a lazy group of commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from alexnet_cli import __version__
from alexnet_cli.console import STDERR, visible
from alexnet_cli.entry_points import HINT, Offer, callable_offers
from alexnet_cli.errors import AlexNetError, LostError, MissingError, Terminated, memory_ended, told

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
SWALLOW = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
SPINS = "2000"  # some microseconds: enough where nobody else wants the cores
CTRL_C = 130  # exit code


class LazyGroup(TyperGroup):
    """Commands from entry points. Ours are light and imported for help; others only when they are called."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.offers = callable_offers()
        self.theirs: Offer | None = None  # the command that runs, if it is somebody else's
        self.commands = _Loaded(self.offers)  # a mapping, so that "Did you mean" sees every name

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was typed, and import it if it is somebody else's."""
        name, command, rest = super().resolve_command(ctx, args)
        offer = self.offers.get(name or "")
        if offer and not offer.ours and not ctx.resilient_parsing:
            command, self.theirs = _imported(offer), offer
        return name, command, rest

    def invoke(self, ctx: Any) -> None:
        """Run the command; what its function returns is no exit code. Errors of others are not ours."""
        try:
            super().invoke(ctx)
        except Exception as error:
            known = isinstance(error, AlexNetError | OSError | typer.Exit | typer.Abort)
            if self.theirs is None or known or hasattr(error, "format_message"):
                raise
            what = (
                f"the command {self.theirs.name} of {self.theirs.distribution} failed: {type(error).__name__}: {error}"
            )
            raise AlexNetError(what, f"tell its authors; alexnet --debug {self.theirs.name} shows where") from error


class _Loaded(dict[str, Any]):
    """Name -> command, made on first access."""

    def __init__(self, offers: dict[str, Offer]) -> None:
        super().__init__(dict.fromkeys(offers))
        self.offers = offers

    def __getitem__(self, name: str) -> Any:
        if super().__getitem__(name) is None:
            offer = self.offers[name]
            self[name] = _imported(offer) if offer.ours else _stub(offer, offer.summary or "(no description)")
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """As __getitem__, or the default."""
        return self[name] if name in self else default  # noqa: SIM401 - get is what this defines

    def items(self) -> Any:
        """Pairs, each made."""
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        """Commands, each made."""
        return [self[name] for name in self]


def _imported(offer: Offer) -> Any:
    """The command, or a stub that explains why it cannot be had."""
    try:
        return _command(offer.name, offer.load())
    except MissingError as error:
        return _stub(offer, f"(did not load: {error.what.partition(': ')[2] or error.what})", error)
    except Exception as error:  # Typer refuses some signatures, and does so with an assertion
        reason = f"the command {offer.name} of {offer.distribution} cannot be built: {error}"
        return _stub(offer, f"(did not load: {error})", MissingError(reason, HINT))


def _command(name: str, found: Any, help_text: str | None = None, settings: dict[str, Any] = HELP_OPTIONS) -> Any:
    """A function or typer.Typer as a command of that name."""
    if isinstance(found, typer.Typer):
        command = typer.main.get_command(found)
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        app.command(name, help=help_text, context_settings=settings)(found)
        command = typer.main.get_command(app)
    command.name = name
    return command


def _stub(offer: Offer, text: str, error: MissingError | None = None) -> Any:
    """A command that stands in for one that is not imported; whatever is typed after it, it gives the reason."""

    def explain() -> None:
        if error is not None:
            raise error
        offer.load()

    return _command(offer.name, explain, text, SWALLOW)


app = typer.Typer(
    cls=LazyGroup,
    name="alexnet",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP_OPTIONS,
    epilog="A first look: alexnet demo. Then: alexnet prepare FOLDER, alexnet train --recipe tiny (with a GPU: fast), "
    "alexnet evaluate.",
)


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"alexnet {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_version, is_eager=True, help="Show the version and quit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """AlexNet (Krizhevsky, Sutskever, Hinton 2012) as it was: two towers, from a folder of pictures to an ONNX file."""
    ctx.obj = {"debug": debug}
    if ctx.invoked_subcommand is None:
        sys.stdout.write(ctx.get_help() + "\n")
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code (see errors.py)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _make_streams_safe()
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # what is started with `nohup` or `&` ignores it
        signal.signal(signal.SIGINT, _stop)
    _stopped.clear()
    _share_cores()
    debug = "--debug" in arguments[:1]
    before, asked = arguments[:debug], arguments[debug:]
    if asked[:1] == ["help"]:  # as it is typed elsewhere
        arguments = [*before, *(word for word in asked if word != "help"), "--help"]

    def run() -> Any:
        return typer.main.get_command(app).main(args=arguments, prog_name="alexnet", standalone_mode=False)

    code = _guarded(run, debug, arguments)
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _quiet_pipe()
    sys.exit(code)


_stopped: list[BaseException] = []  # what signals have raised: an import that one cuts short can fail in another way


def _stop(number: int, _frame: object) -> None:
    _stopped.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
    raise _stopped[-1]


def _share_cores() -> None:
    """Have threads that wait for each other sleep soon, as a library read by torch is told before it is loaded.

    By default they spin for milliseconds, several times a step; where another program wants the same cores, each of
    them then waits for the other, and training was seen to run at a sixth of its speed.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def _make_streams_safe() -> None:
    """A closed stream swallows what is written to it; what an encoding lacks is shown as an escape."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - for as long as we run
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _guarded(run: Callable[[], Any], debug: bool, typed: Sequence[str] = ()) -> int:
    """The exit code of `run`, which does what was typed; every error becomes two lines on stderr."""
    try:
        code = run()
        if code == CTRL_C:  # the parser has caught it and says nothing
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _quiet_pipe()
    except (Exception, KeyboardInterrupt, Terminated) as error:
        if debug:
            traceback.print_exc()
        what, hint, code = _told(error, typed)
        if not _left_for_the_launcher(error, what, hint, code):
            STDERR.write(f"error: {visible(what)}\n" + (f"hint: {visible(hint)}\n" if hint else ""))
        return code


def _left_for_the_launcher(error: BaseException, what: str, hint: str, code: int) -> bool:
    """Leave the error where torch's launchers look, for one process of several, or for the demo.

    Returns whether one of ours tells it for us.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not path:
        return False
    now = time.time()
    about = {"what": what, "hint": hint, "code": code, "lost": isinstance(error, LostError), "time": now}
    message = {"message": what, "extraInfo": {"timestamp": f"{now:.0f}"}}
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        json.dump({"message": message, "alexnet": about}, file)
        return "ALEXNET_LAUNCHER" in os.environ or "ALEXNET_DEMO" in os.environ
    return False


def _told(error: BaseException, typed: Sequence[str] = ()) -> tuple[str, str, int]:
    """What to say of an error, what to do about it, and the exit code."""
    if hasattr(error, "format_message"):  # the parser's errors; their base has no public name before Typer 0.27.2
        return _format_parser_error(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "stopped by Ctrl-C", "", CTRL_C
    if isinstance(error, Terminated):
        return "stopped by SIGTERM", "", error.exit_code
    if _stopped and not (isinstance(error, AlexNetError | OSError) or memory_ended(error)):
        return _told(_stopped[0])
    return told(error)


def _format_parser_error(error: Any) -> tuple[str, str, int]:
    """Return the parser's own message, its "Did you mean ...?" or the command's help as the hint, and the exit code."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path if context is not None else 'alexnet'} --help"
    if suggested := re.search(r"(?:Did you mean (.+)\?|\(Possible options: (.+)\))$", message):
        message, hint = message[: suggested.start()].rstrip(" ."), f"did you mean {suggested[1] or suggested[2]}?"
    return message, hint, int(getattr(error, "exit_code", 2))


def _quiet_pipe() -> int:
    """The reader of our output has left: nothing to say, and nowhere to say it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


if __name__ == "__main__":
    main()
