"""The Markdown documents: their code blocks, the commands typed in them, the files they contain, their tables."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))
NOT_RUN = re.compile(r"# needs |--gpus [0-9]|^torchrun |^srun |^make |^pip |/ilsvrc\b")
"""Commands that no test runs: a reader sees that they need ILSVRC, GPUs, other machines or a download."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language and text."""

    language: str
    text: str

    @property
    def commands(self) -> list[str]:
        """Return what is typed after a dollar sign, with continued lines joined; comments stay."""
        if self.language != "console":
            return []
        joined = self.text.replace("\\\n", " ")
        return [re.sub(r" +", " ", line[2:]) for line in joined.splitlines() if line.startswith("$ ")]

    @property
    def file(self) -> str | None:
        """Return the name in a first line such as `# name.py`: the block is the content of that file."""
        match = re.match(r"# ([\w.-]+\.(?:py|toml))\n", self.text)
        return match[1] if match else None


def read_document(document: str) -> str:
    """Return the text of a document, by its path in the repository."""
    return (ROOT / document).read_text(encoding="utf-8")


def find_blocks(text: str) -> list[Block]:
    """Return all fenced blocks, in order."""
    return [Block(language, body) for language, body in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]


def find_mentions(text: str) -> list[str]:
    """Return every `alexnet COMMAND ...` of the text, in blocks and between the lines, each on one line."""
    spans = [re.sub(r"\s+", " ", span) for span in re.findall(r"(?<!`)`(alexnet [^`]+)`(?!`)", text)]
    typed = [command for block in find_blocks(text) for command in block.commands]
    return [m for m in (*spans, *typed) if re.match(r"alexnet [a-z]", m)]


def find_table(first_cell: str) -> list[list[str]]:
    """Return the rows of the table whose header starts with this cell, in whichever document has it."""
    for document in DOCUMENTS:
        _, header, rest = read_document(document).partition(f"| {first_cell} |")
        if header:
            lines = rest.partition("\n\n")[0].splitlines()[2:]  # after the header and the line below it
            return [[cell.strip() for cell in line.strip()[1:-1].split("|")] for line in lines]
    raise AssertionError(f"no document has a table that starts with {first_cell}")


def find_anchors(text: str) -> set[str]:
    """Return the anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"(?m)^#+ (.+)$", re.sub(r"(?ms)^```.*?^```$", "", text))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def fields_of_json() -> dict[str, list[tuple[set[str], set[str]]]]:
    """Return, for each command, the kinds of objects that docs/json.md lists: the required fields, and all fields."""
    kinds: dict[str, list[tuple[set[str], set[str]]]] = {}
    for row in find_table("command | fields"):
        command = re.findall(r"`([\w-]+)", row[0])[0]
        for kind in re.sub(r" \([^)]*\)", "", row[1]).split(" or "):  # fields in parentheses are nested
            fields = re.findall(r"`(\w+)`(\??)", kind)
            required = {field for field, mark in fields if not mark}
            kinds.setdefault(command, []).append((required, {field for field, _ in fields}))
    return kinds
