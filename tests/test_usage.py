"""The parser's words become ours, whichever version of Typer says them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from alexnet_cli import usage


class ParserError(Exception):
    """What Typer raises, as far as we look at it."""

    exit_code = 2
    ctx = SimpleNamespace(command_path="alexnet train")

    def format_message(self) -> str:
        return str(self)


@pytest.mark.parametrize(
    ("said", "what", "hint"),
    [
        (
            "Invalid value for '--parallel': Value error, 'towers' is not one of 'auto', 'tower', 'data', 'hybrid'",
            "--parallel towers: there is no such choice",
            "did you mean tower? there are: auto, tower, data, hybrid",
        ),
        (
            "Invalid value for '--freeze': 'x' is not one of 'none', 'conv'.",
            "--freeze x: there is no such choice",
            "there are: none, conv",
        ),
        (
            "Invalid value for '--seed': Input should be a valid integer, unable to parse string as an integer",
            "--seed: it should be a valid integer",
            "alexnet train --help",
        ),
        (
            "Invalid value for '--seed': 'x' is not a valid integer.",
            "--seed: 'x' is not a valid integer",
            "alexnet train --help",
        ),
        ("No such option: --epoch Did you mean --epochs?", "No such option: --epoch", "did you mean --epochs?"),
        (
            "Invalid value for '-k' / '--top-k': Input should be greater than or equal to 1",
            "-k / --top-k: it should be greater than or equal to 1",
            "alexnet train --help",
        ),
        (
            "Option '-k' requires an argument.",
            "-k: its value is missing",
            "type it after -k, with a space between",
        ),
        ("Got unexpected extra argument (a)", "one word too many: a", "alexnet train --help"),
        ("No such option: --a. (Possible options: --b, --c)", "No such option: --a", "did you mean --b, --c?"),
        ("Missing argument\n'SOURCE'.", "Missing argument 'SOURCE'", "alexnet train --help"),
    ],
)
def test_two_lines(said: str, what: str, hint: str) -> None:
    assert usage.told(ParserError(said)) == (what, hint, 2)
