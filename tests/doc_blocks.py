"""Fenced code blocks of the documentation: commands, programs, settings and files, each with its location.

A line ``<!-- needs: WHAT -->`` directly above a fence marks a block that cannot run in a test. A fence with
``title="NAME"`` is a file that the reader saves under that name.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
NEEDS = ("cluster", "gpu", "network", "minutes")

_FENCE = re.compile(r"(?P<indent> *)(?P<ticks>`{3,}) *(?P<language>[\w+-]*) *(?P<rest>.*)")
_NEEDS = re.compile(r"<!-- needs: (.*) -->")
_TITLE = re.compile(r'title="([^"]+)"')
_OVERRIDE = re.compile(r"[a-z][a-z0-9_]*(?:\.[a-z0-9_]+)+=")
_INLINE = re.compile(r"`((?:python|deepspeed|torchrun|make) [^`]+)`")
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        path, line: place of the opening fence.
        heading: the last heading above it.
        language: language of the fence, or empty.
        text: content, without the indentation of the fence.
        needs: resource that a test lacks to run it, or None.
        title: file name, None if it is not a file.
    """

    path: Path
    line: int
    heading: str
    language: str
    text: str
    needs: str | None
    title: str | None

    @property
    def runs(self) -> bool:
        """True if a test can run it or save it as a file."""
        return self.needs is None and (self.language in ("bash", "python") or self.title is not None)

    @property
    def place(self) -> str:
        """``file:line``."""
        return f"{self.path.relative_to(ROOT)}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a bash block, its continuation lines joined.

    Attributes:
        line: line number in the page.
        words: arguments as the shell splits them, variables not expanded.
    """

    line: int
    words: tuple[str, ...]

    @property
    def programs(self) -> list[str]:
        """Scripts (``launch/x.py``) and modules (``-m package.module``) of this project in the command."""
        scripts = [word for word in self.words if re.fullmatch(r"(?:launch|benchmarks|docs|tests)/[\w/]+\.py", word)]
        pairs = zip(self.words, self.words[1:], strict=False)
        modules = [f"-m {name}" for flag, name in pairs if flag == "-m" and name.split(".")[0] in OWN_PACKAGES]
        return scripts + modules

    @property
    def overrides(self) -> list[str]:
        """Settings passed to a script of ``launch/``."""
        is_launch = any(program.startswith("launch/") for program in self.programs)
        return [word for word in self.words if is_launch and _OVERRIDE.match(word)]

    @property
    def config(self) -> str | None:
        """The file after ``--config``."""
        return self.words[self.words.index("--config") + 1] if "--config" in self.words[:-1] else None


OWN_PACKAGES = ("collm_dist", "benchmarks", "tests")


def list_pages() -> list[Path]:
    """Return the front page and the pages of the site."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read_blocks(path: Path) -> list[Block]:
    """Return the blocks of a page in order.

    Raises:
        ValueError: a fence is not closed; the message names its place.
    """
    blocks, lines = [], path.read_text(encoding="utf-8").splitlines()
    number, heading = 0, ""
    while number < len(lines):
        opening = _FENCE.fullmatch(lines[number])
        if opening is None:
            heading = lines[number].lstrip("# ") if re.match(r"#+ ", lines[number]) else heading
            number += 1
            continue
        indent, closing = len(opening["indent"]), opening["ticks"]
        ends = (index for index in range(number + 1, len(lines)) if lines[index].strip() == closing)
        end = next(ends, None)
        if end is None:
            raise ValueError(f"{path}:{number + 1}: this fence is not closed")
        marker = _NEEDS.fullmatch(lines[number - 1].strip()) if number else None
        title = _TITLE.search(opening["rest"])
        text = "".join(f"{line[indent:]}\n" for line in lines[number + 1 : end])
        needs = marker[1] if marker else None
        name = title[1] if title else None
        blocks.append(Block(path, number + 1, heading, opening["language"], text, needs, name))
        number = end + 1
    return blocks


def list_commands(text: str, first_line: int = 1) -> Iterator[Command]:
    """Yield the commands of a shell script that starts at ``first_line``.

    Raises:
        ValueError: a quotation is not closed; the message names its line.
    """
    pending, start = "", first_line
    for number, line in enumerate(text.splitlines(), start=first_line):
        if not pending:
            start = number
        pending += line
        if pending.endswith("\\"):
            pending = pending[:-1] + " "
            continue
        try:
            words = shlex.split(pending, comments=True)
        except ValueError:  # a quotation that continues on the next line
            pending += "\n"
            continue
        pending = ""
        if words:
            yield Command(start, tuple(words))
    if pending.strip():
        raise ValueError(f"line {start}: a quotation is not closed")


def list_page_commands(path: Path) -> Iterator[Command]:
    """Yield all commands of a page: those of its bash blocks, then those in text and tables."""
    for block in read_blocks(path):
        if block.language == "bash":
            yield from list_commands(block.text, block.line + 1)
    for number, line in strip_blocks(path):
        for text in _INLINE.findall(line):
            yield Command(number, tuple(shlex.split(text)))


def strip_blocks(path: Path) -> list[tuple[int, str]]:
    """Return a page's numbered lines without fenced blocks and single-line comments."""
    inside, lines = None, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        fence = _FENCE.fullmatch(line)
        if inside is None and fence is None:
            lines.append((number, _COMMENT.sub("", line)))
        elif inside is None and fence is not None:
            inside = fence["ticks"]
        elif line.strip() == inside:
            inside = None
    return lines


def list_anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as code hosts and the site make them."""
    headings = (line for _, line in strip_blocks(path) if re.match(r"#+ ", line))
    return {re.sub(r"[^\w\- ]", "", heading.lstrip("# ").lower()).strip().replace(" ", "-") for heading in headings}
