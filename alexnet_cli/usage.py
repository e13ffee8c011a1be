"""What the parser of the command line says, in our two lines. Its words differ between versions of Typer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEAR = 0.7  # how alike a word must be to one that exists, to be taken for it: 1 is equal
COMMANDS = {"classify": "predict", "infer": "predict", "test": "evaluate", "validate": "evaluate"}  # what others say
OPTIONS = {"--switch": "--only", "--switches": "--only"}  # the same of options, where a command has them
FOLDERS = {"--verify": "prepared"}  # where what an option asks for lies, if its value was left out and the source given
WORDS_TO = {"--weights": "-w", "--data": "--data"}  # the options that a lone word is most likely meant for


def told(error: Any, typed: Sequence[str] = ()) -> tuple[str, str, int]:
    """What to say of an error of the parser, what to do about it, and the exit code."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = getattr(error, "ctx", None)
    options = _options(context)
    hint = help_ = f"{context.command_path if context is not None else 'alexnet'} --help"
    suggested = re.search(r"(?:Did you mean (.+)\?|\(Possible options: (.+)\))$", message)
    if suggested:
        message, hint = message[: suggested.start()].rstrip(" ."), f"did you mean {suggested[1] or suggested[2]}?"
    if invalid := re.fullmatch(r"Invalid value for '(.+?)': (?:Value error, )?(.+)", message):
        message, hint = _invalid(invalid[1].replace("' / '", " / "), invalid[2], hint)
    elif lacking := re.fullmatch(r"Option '(.+?)' requires an argument", message):
        message, hint = f"{lacking[1]}: its value is missing", _value(lacking[1], typed)
    elif (none := re.fullmatch(r"No such command '(.+?)'", message)) and none[1] in COMMANDS:
        hint = f"did you mean '{COMMANDS[none[1]]}'?"
    elif options and (unknown := re.fullmatch(r"No such option: (--[\w-]+)", message)):
        hint = _nearest(unknown[1], options) or help_
    elif extra := re.fullmatch(r"Got unexpected extra argument(?:\(s\)|s)? \((\S+)\)", message):
        message, option = f"one word too many: {extra[1]}", _option_of(extra[1], options)
        hint = f"did you mean {option} {extra[1]}?" if option else hint
    return message, hint, int(getattr(error, "exit_code", 2))


def _options(context: Any) -> dict[str, str]:
    """The long options of the command that was typed, and what each says of its value."""
    parameters = getattr(getattr(context, "command", None), "params", ())
    told = ((p, f"{getattr(p, 'help', None) or ''} {p.metavar or ''}".strip()) for p in parameters)
    return {word: about for parameter, about in told for word in parameter.opts if word.startswith("--")}


def _value(option: str, typed: Sequence[str]) -> str:
    """About an option without a value: `prepare pets --verify` likely is `prepare --verify prepared/pets`."""
    if option in FOLDERS and len(typed) == 3 and typed[2] == option:
        return f"did you mean alexnet {typed[0]} {option} {FOLDERS[option]}/{Path(typed[1]).resolve().name}?"
    return f"type it after {option}, with a space between"


def _option_of(word: str, options: dict[str, str]) -> str | None:
    """The option that a lone word is likely the value of: a file of the kind that is written, or one to be read."""
    suffix = re.search(r"\.[a-z]+$", word)
    if suffix and suffix[0] in options.get("--output", ""):
        return "-o"
    return next((WORDS_TO[option] for option in WORDS_TO if option in options), None)


def _nearest(typed: str, options: dict[str, str]) -> str:
    """What an unknown option was likely meant to be: another one, or a value of the recipe; empty if that is not clear.

    Looks for one alone: the parser's own guess has others, which are no more than somewhat alike.
    """
    if (other := OPTIONS.get(typed)) in options:
        return f"did you mean {other}? {options[other].partition(' [')[0]}"
    from difflib import get_close_matches  # which only an error needs

    settings = {}
    if "--set" in options:
        from alexnet_cli.recipe import PAPER

        settings = {key.replace("_", "-"): f"--set {key}=..." for key in vars(PAPER)}
    known = settings | {option[2:]: option for option in options}  # without the dashes, in which all are alike
    near = get_close_matches(typed[2:], known, 1, NEAR)
    return f"did you mean {known[near[0]]}?" if near else ""


def _invalid(option: str, reason: str, hint: str) -> tuple[str, str]:
    """The error of a value that an option cannot have; where there are choices, the hint lists them."""
    choice = re.fullmatch(r"'(.*)' is not one of (.+)", reason)
    if not choice:
        reason = reason.partition(", unable to parse")[0].replace("Input should", "it should")
        return f"{option}: {reason}", hint
    from difflib import get_close_matches

    choices = re.findall(r"'([^']*)'", choice[2])
    near = get_close_matches(choice[1], choices, 1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{option} {choice[1]}: there is no such choice", f"{guess}there are: {', '.join(choices)}"
