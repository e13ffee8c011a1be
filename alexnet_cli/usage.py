"""What the parser of the command line says, in our two lines. Its words differ between versions of Typer."""

from __future__ import annotations

import re
from typing import Any


def told(error: Any) -> tuple[str, str, int]:
    """What to say of an error of the parser, what to do about it, and the exit code."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path if context is not None else 'alexnet'} --help"
    suggested = re.search(r"(?:Did you mean (.+)\?|\(Possible options: (.+)\))$", message)
    if suggested:
        message, hint = message[: suggested.start()].rstrip(" ."), f"did you mean {suggested[1] or suggested[2]}?"
    invalid = re.fullmatch(r"Invalid value for '(.+?)': (?:Value error, )?(.+)", message)
    if invalid:
        message, hint = _invalid(invalid[1], invalid[2], hint)
    return message, hint, int(getattr(error, "exit_code", 2))


def _invalid(option: str, reason: str, hint: str) -> tuple[str, str]:
    """The error of a value that an option cannot have; where there are choices, the hint lists them."""
    choice = re.fullmatch(r"'(.*)' is not one of (.+)", reason)
    if not choice:
        reason = reason.partition(", unable to parse")[0].replace("Input should", "it should")
        return f"{option}: {reason}", hint
    from difflib import get_close_matches  # which only an error needs

    choices = re.findall(r"'([^']*)'", choice[2])
    near = get_close_matches(choice[1], choices, 1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{option} {choice[1]}: there is no such choice", f"{guess}there are: {', '.join(choices)}"
