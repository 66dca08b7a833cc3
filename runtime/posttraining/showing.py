"""Show what is learned of one example, before the first step: a wrong mask is seen at once."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from runtime.base.text import visible
from runtime.data.tokenizer import Tokenizer

WIDTH = 100
# Of a longer example the middle is left out.
MOST_LINES = 40
_LEARNED, _PLAIN = "\033[32m", "\033[0m"
# A character and whether it is learned.
Cell = tuple[str, bool]


def show_example(
    ids: Sequence[int],
    is_target: Iterable[Any],
    tokenizer: Tokenizer,
    colour: bool,
    width: int = WIDTH,
) -> str:
    """Return an example's text in lines of at most `width` columns.

    What is learned is green on a terminal (colour), and in [brackets] elsewhere.
    """
    cells: list[Cell] = []
    at = 0
    for learned, group in groupby(bool(each) for each in is_target):
        count = len(list(group))
        text = visible(tokenizer.decode(ids[at : at + count]))
        at += count
        if learned and not colour:
            text = f"[{text}]"
        cells += [(character, learned) for character in text]
    lines = [line for paragraph in _paragraphs(cells) for line in _wrapped(paragraph, width)]
    if len(lines) > MOST_LINES:
        left_out = len(lines) - MOST_LINES + 1
        half = MOST_LINES // 2
        note = [(character, False) for character in f"... {left_out:,} lines ..."]
        lines = [*lines[:half], note, *lines[-(MOST_LINES - half - 1) :]]
    return "\n".join(_drawn(line, colour) for line in lines)


def _paragraphs(cells: list[Cell]) -> list[list[Cell]]:
    """Return the cells between newlines."""
    paragraphs: list[list[Cell]] = [[]]
    for cell in cells:
        if cell[0] == "\n":
            paragraphs.append([])
        else:
            # A tab has no width of its own.
            paragraphs[-1].append((" ", cell[1]) if cell[0] == "\t" else cell)
    return paragraphs


def _columns(character: str) -> int:
    """Return how many columns of a terminal a character takes."""
    if unicodedata.combining(character) or unicodedata.category(character) in ("Cf", "Me", "Mn"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _wrapped(cells: list[Cell], width: int) -> list[list[Cell]]:
    """Return lines of at most `width` columns, broken after a blank where there is one."""
    lines: list[list[Cell]] = []
    line: list[Cell] = []
    used = 0
    for cell in cells:
        columns = _columns(cell[0])
        if used + columns > width:
            blank = max((i for i, (c, _) in enumerate(line) if c == " "), default=len(line) - 1)
            lines.append(line[: blank + 1])
            line = line[blank + 1 :]
            used = sum(_columns(c) for c, _ in line)
        line.append(cell)
        used += columns
    return [*lines, line]


def _drawn(line: list[Cell], colour: bool) -> str:
    """Return a line's text; with `colour`, each run of learned characters begins and ends it."""
    text = ""
    for learned, group in groupby(line, key=lambda cell: cell[1]):
        run = "".join(character for character, _ in group)
        text += f"{_LEARNED}{run}{_PLAIN}" if colour and learned else run
    return text
