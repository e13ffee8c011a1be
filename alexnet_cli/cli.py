"""The command line: a lazy group of commands, and the one place where errors become messages and exit codes."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from alexnet_cli import __version__
from alexnet_cli.console import STDERR, keep_stdout_for_results, make_printable
from alexnet_cli.entry_points import HINT, CommandEntry, find_callable_entries
from alexnet_cli.errors import (
    AlexNetError,
    AlexNetWarning,
    LostError,
    MissingError,
    Terminated,
    format_error,
    is_out_of_memory,
)
from alexnet_cli.suggestions import WORDS, suggest_fix, suggest_option_instead

HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}
ACCEPT_ANYTHING = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
SPIN_COUNT = "2000"  # a few microseconds
CTRL_C = 130  # exit code


class LazyGroup(TyperGroup):
    """Commands from entry points. Built-ins are imported for help; those of other distributions only when called."""

    def __init__(self, *args: Any, **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.entries = find_callable_entries()
        self.third_party: CommandEntry | None = None  # the command that runs, if it is not a built-in
        self.commands = _LazyCommands(self.entries)  # a mapping, so that "Did you mean" sees every name

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Find the command that was typed, and import it if another distribution offers it."""
        name, command, rest = super().resolve_command(ctx, args)
        entry = self.entries.get(name or "")
        if entry and not entry.is_builtin and not ctx.resilient_parsing:
            command, self.third_party = _import_command(entry), entry
        elif entry and "--json" in rest and not {"-h", "--help"} & set(rest) and not ctx.resilient_parsing:
            ctx.with_resource(keep_stdout_for_results())
        ctx.meta[WORDS] = list(rest)  # the parser empties `rest`
        return name, command, rest

    def invoke(self, ctx: Any) -> None:
        """Run the command. Its return value is no exit code; an unexpected error names a third-party command."""
        try:
            super().invoke(ctx)
        except Exception as error:
            if ctx.invoked_subcommand in self.entries:
                self._improve_hint(ctx, error)
            known = isinstance(error, AlexNetError | OSError | typer.Exit | typer.Abort)
            if self.third_party is None or known or hasattr(error, "format_message"):
                raise
            name, distribution = self.third_party.name, self.third_party.distribution
            what = f"the command {name} of {distribution} failed: {type(error).__name__}: {error}"
            raise AlexNetError(what, f"tell its authors; alexnet --debug {name} shows where") from error

    def _improve_hint(self, ctx: Any, error: Any) -> None:
        """Name the command in an error of the parser that does not, and the option that a word was meant for."""
        command = self.commands[ctx.invoked_subcommand]
        if hasattr(error, "format_message") and getattr(error, "ctx", None) is None:
            error.ctx = typer.Context(command, parent=ctx, info_name=ctx.invoked_subcommand)
        elif isinstance(error, AlexNetError):
            error.hint = suggest_option_instead(command, ctx.meta.get(WORDS, []), error.what) or error.hint


class _LazyCommands(dict[str, Any]):
    """Name -> command, built on first access."""

    def __init__(self, entries: dict[str, CommandEntry]) -> None:
        super().__init__(dict.fromkeys(entries))
        self.entries = entries

    def __getitem__(self, name: str) -> Any:
        if super().__getitem__(name) is None:
            entry = self.entries[name]
            summary = entry.summary or "(no description)"
            self[name] = _import_command(entry) if entry.is_builtin else _stub(entry, summary)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        """Return the command of that name, or the default."""
        return self[name] if name in self else default  # noqa: SIM401 - get is what this defines

    def items(self) -> Any:
        """Return (name, command) pairs, all built."""
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        """Return the commands, all built."""
        return [self[name] for name in self]


def _import_command(entry: CommandEntry) -> Any:
    """Return the command, or a stub that raises the reason why it cannot be imported."""
    try:
        return _build_command(entry.name, entry.load())
    except MissingError as error:
        return _stub(entry, f"(did not load: {error.what.partition(': ')[2] or error.what})", error)
    except Exception as error:  # Typer refuses some signatures with an assertion
        reason = f"the command {entry.name} of {entry.distribution} cannot be built: {error}"
        return _stub(entry, f"(did not load: {error})", MissingError(reason, HINT))


def _build_command(
    name: str, target: Any, help_text: str | None = None, settings: dict[str, Any] = HELP_OPTIONS
) -> Any:
    """Return a function or a typer.Typer as a command of that name."""
    if isinstance(target, typer.Typer):
        command = typer.main.get_command(target)
    else:
        app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
        app.command(name, help=help_text, context_settings=settings)(target)
        command = typer.main.get_command(app)
    command.name = name
    return command


def _stub(entry: CommandEntry, text: str, error: MissingError | None = None) -> Any:
    """Return a stand-in for a command that is not imported. Whatever its arguments, calling it raises the reason."""

    def explain() -> None:
        if error is not None:
            raise error
        entry.load()

    return _build_command(entry.name, explain, text, ACCEPT_ANYTHING)


app = typer.Typer(
    cls=LazyGroup,
    name="alexnet",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=HELP_OPTIONS,
    epilog="Try it: alexnet demo. Then: alexnet prepare FOLDER, alexnet train --recipe tiny (GPU: --recipe fast), "
    "alexnet evaluate.",
)


def _show_version(requested: bool) -> None:
    if requested:
        sys.stdout.write(f"alexnet {__version__}\n")
        raise typer.Exit


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", "-V", callback=_show_version, is_eager=True, help="Show the version and exit")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error")] = False,
) -> None:
    """Train, evaluate and export the two-tower AlexNet of Krizhevsky, Sutskever and Hinton (2012)."""
    ctx.obj = {"debug": debug}
    if ctx.invoked_subcommand is None:
        sys.stdout.write(ctx.get_help() + "\n")
        raise typer.Exit(2)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit with its code (see errors.py)."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    _make_streams_safe()
    warnings.formatwarning = _format_warning
    signal.signal(signal.SIGTERM, _raise_signal)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # `nohup` and `&` have it ignored
        signal.signal(signal.SIGINT, _raise_signal)
    _received.clear()
    _limit_thread_spinning()
    warnings.filterwarnings("ignore", module="PIL|pillow_")  # of a file; what matters, we say with its name
    debug = "--debug" in arguments[:1]
    options, words = arguments[:debug], arguments[debug:]
    if words[:1] == ["help"]:
        arguments = [*options, *(word for word in words if word != "help"), "--help"]

    def run() -> Any:
        return typer.main.get_command(app).main(args=arguments, prog_name="alexnet", standalone_mode=False)

    code = _run_guarded(run, debug)
    _stop_raising()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = _silence_stdout()
    atexit.register(setattr, sys, "stdout", sys.stderr)  # what plugins print at exit is no result
    sys.exit(code)


_received: list[BaseException] = []  # what signals raised: an import that one interrupts can fail with another error


def _raise_signal(number: int, _frame: object) -> None:
    _received.append(KeyboardInterrupt() if number == signal.SIGINT else Terminated())
    raise _received[-1]


def _stop_raising() -> None:
    """Let a signal raise nothing from here on: the exit code is known, and a traceback would hide it.

    torchrun sends SIGTERM to every worker when one has ended, often while the others are ending too.
    """
    for number, action in ((signal.SIGTERM, signal.SIG_IGN), (signal.SIGINT, signal.SIG_DFL)):
        if signal.getsignal(number) is _raise_signal:
            signal.signal(number, action)


def _limit_thread_spinning() -> None:
    """Let OpenMP threads sleep soon while they wait. The library reads this variable when torch loads it.

    By default they spin for milliseconds, several times a step. Where another program wants the same cores, each then
    waits for the other: training ran at a sixth of its speed.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def _make_streams_safe() -> None:
    """Replace a closed stream by os.devnull, and let a stream escape what its encoding lacks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - open until exit
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


_format_python_warning = warnings.formatwarning


def _format_warning(message: Warning | str, category: type[Warning], *place: Any, **line: Any) -> str:
    """Return a warning of ours as one line, without its place in the code; any other as Python would show it."""
    if issubclass(category, AlexNetWarning):
        return f"warn    {make_printable(str(message))}\n"
    return _format_python_warning(message, category, *place, **line)


def _run_guarded(run: Callable[[], Any], debug: bool) -> int:
    """Call `run` and return the exit code; every error becomes two lines on stderr."""
    try:
        code = run()
        if code == CTRL_C:  # the parser has caught it and says nothing
            raise KeyboardInterrupt
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        return _silence_stdout()
    except (Exception, KeyboardInterrupt, Terminated) as error:
        _stop_raising()
        if debug:
            traceback.print_exc()
        what, hint, code = _format_any_error(error)
        if not _write_error_file(error, what, hint, code):
            STDERR.write(f"error: {make_printable(what)}\n" + (f"hint: {make_printable(hint)}\n" if hint else ""))
        return code


def _write_error_file(error: BaseException, what: str, hint: str, code: int) -> bool:
    """Write the error to the file that torch's launcher or `alexnet demo` named, if there is one.

    Returns whether that parent is ours and will print the error itself.
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


def _format_any_error(error: BaseException) -> tuple[str, str, int]:
    """Return message, hint and exit code of an error: the parser's, a signal, or any other (errors.format_error)."""
    if hasattr(error, "format_message"):  # their base class has no public name before Typer 0.27.2
        return _format_parser_error(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return "stopped by Ctrl-C", "", CTRL_C
    if isinstance(error, Terminated):
        return "stopped by SIGTERM", "", error.exit_code
    if _received and not (isinstance(error, AlexNetError | OSError) or is_out_of_memory(error)):
        return _format_any_error(_received[0])
    return format_error(error)


def _format_parser_error(error: Any) -> tuple[str, str, int]:
    """Return the parser's message, what was probably meant or the command's --help as the hint, and the exit code."""
    message = " ".join(error.format_message().split()).rstrip(".").replace("Value error, ", "")
    message = re.sub(r"Input should be (.+?)(, unable to .+)?$", r"must be \1", message)
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path if context is not None else 'alexnet'} --help"
    if command := re.search(r"Did you mean (.+)\?$", message):
        message, hint = message[: command.start()].rstrip(" ."), f"did you mean {command[1]}?"
    message = re.sub(r" \((?:Possible options|Did you mean).*\)$", "", message)
    return message, suggest_fix(error) or hint, int(getattr(error, "exit_code", 2))


def _silence_stdout() -> int:
    """Send stdout to os.devnull after its reader has left (`| head`), and return exit code 1."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
