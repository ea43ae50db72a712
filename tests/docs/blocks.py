"""The fenced blocks of the documentation and of README.md, with the marks that say how a test runs them.

A mark is a comment in the line above a fence:

======================  ==========================================================================================
``test: run``           the default of ``python`` and ``console`` blocks: executed, output of a console is compared
``test: check``         needs a cluster or a network: syntax, options and names are checked, nothing is executed
``test: file=NAME``     written to this file, for the blocks after it
``test: tree``          a ``text`` block: files and folders, each of which exists
``test: output``        a ``text`` block: what the Python blocks above it print on rank 0
======================  ==========================================================================================

``mermaid`` blocks are diagrams. Every other block without a mark is an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))

_FENCE = re.compile(
    r"^(?: *<!-- test: (?P<mark>.*?) -->\n)?"
    r"(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
_DEFAULTS = {"python": "run", "console": "run", "mermaid": "diagram"}


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes
    ----------
    page : Path
    line : int
        Of its first line on the page, from 1.
    language, mark, text : str
    """

    page: Path
    line: int
    language: str
    mark: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def file(self) -> str:
        """The file that the text goes to; empty for none."""
        return self.mark.removeprefix("file=") if self.mark.startswith("file=") else ""

    def commands(self) -> Iterator[tuple[str, str]]:
        """Yield each command of a console block with the output that the page shows for it."""
        for part in re.split(r"^\$ ", self.text, flags=re.MULTILINE)[1:]:
            command, _, output = re.sub(r"\\\n *", "", part).partition("\n")
            yield command, output.strip("\n")


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in order."""
    text = page.read_text()
    found = []
    for match in _FENCE.finditer(text):
        indent = len(match["indent"])
        body = "".join(line[indent:] for line in match["text"].splitlines(keepends=True))
        mark = match["mark"] or _DEFAULTS.get(match["language"], "")
        line = text[: match.start("text")].count("\n") + 1
        found.append(Block(page, line, match["language"], mark, body))
    return found


# Seconds and commits differ from run to run.
_VARYING = re.compile(r"\bin \d+\.\d s\b|\b[0-9a-f]{8,40}\b|\b\d{4}-\d\d-\d\d \d\d:\d\d\b")


def matches(shown: str, said: str) -> bool:
    """Whether an output is what a page shows; ``...`` there stands for any text."""
    shown, said = (_VARYING.sub("*", text.strip()) for text in (shown, said))
    pattern = ".*".join(re.escape(part) for part in shown.split("..."))
    return re.fullmatch(pattern, said, re.DOTALL) is not None
