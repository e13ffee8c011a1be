"""What a Markdown document shows: its code blocks, the commands typed in them, the files they contain."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
ELSEWHERE = re.compile(r"# needs |--gpus [0-9]|^torchrun |^srun |^make |^pip |/ilsvrc\b")
"""Commands that no test runs as they stand: a reader sees that they need ILSVRC, GPUs, other machines or a download."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and text."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """What is typed after a dollar sign, continued lines joined; comments stay."""
        if self.language != "console":
            return []
        joined = self.text.replace("\\\n", " ")
        return [re.sub(r" +", " ", line[2:]) for line in joined.splitlines() if line.startswith("$ ")]

    @property
    def file(self) -> str | None:
        """The name in a first line such as `# name.py`: the block is the content of that file."""
        match = re.match(r"# ([\w.-]+\.(?:py|toml))\n", self.text)
        return match[1] if match else None


def text_of(document: str) -> str:
    """A document of the repository."""
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(text: str) -> list[Block]:
    """All fenced blocks, in order."""
    return [Block(language, body) for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]


def fields_of_json() -> dict[str, list[tuple[set[str], set[str]]]]:
    """What the README says of `--json`: the fields that each kind of a command's objects has always, and all it can."""
    section = text_of("README.md").partition("### For programs")[2].partition("\n### ")[0]
    found: dict[str, list[tuple[set[str], set[str]]]] = {}
    for command, cell in re.findall(r"^\| `([\w-]+).*? \| (.+) \|$", section, re.M):
        for kind in re.sub(r" \([^)]*\)", "", cell).split(" or "):  # what is in parentheses lies deeper
            fields = re.findall(r"`(\w+)`(\??)", kind)
            always = {field for field, mark in fields if not mark}
            found.setdefault(command, []).append((always, {field for field, _ in fields}))
    return found


def mentions(text: str) -> list[str]:
    """Every `alexnet COMMAND ...` of the document, in blocks and in the running text, on one line each."""
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"(?<!`)`(alexnet [^`]+)`(?!`)", text)]
    typed = [command for block in blocks(text) for command in block.commands]
    return [m for m in (*spans, *typed) if re.match(r"alexnet [a-z]", m)]
