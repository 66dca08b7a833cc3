"""Find a piece of code by what it says, and replace it, however the file is formatted."""

from __future__ import annotations

import ast
import functools
import re

# `tokenize` does not read fragments: an anchor may open a bracket that it does not close.
TOKEN = re.compile(
    r"""(?P<skip>\s+|\\\n|\#[^\n]*)
    |(?P<string>(?<!\w)[rbfuRBFU]{0,2}(?:\"{3}(?s:\\.|.)*?\"{3}|'{3}(?s:\\.|.)*?'{3}
        |"(?:\\(?s:.)|[^"\\\n])*"|'(?:\\(?s:.)|[^'\\\n])*'))
    |(?P<other>\d[\w.]*|\w+|->|:=|\.\.\.|(?:\*\*|//|<<|>>|[-+*/%&|^@<>=!])=?|.)""",
    re.VERBOSE,
)


@functools.cache
def _value(literal: str) -> str:
    """Return what a string literal means, whatever its quotes."""
    try:
        return ast.dump(ast.parse(literal, mode="eval"))
    except SyntaxError:
        return literal


@functools.lru_cache(maxsize=64)
def _tokens(code: str) -> list[tuple[str, int, int]]:
    """Return (token, start, end) of Python code, also of a fragment of it.

    Left out is what a formatter may change: comments, white space, a comma that closes a list.
    """
    found: list[tuple[str, int, int]] = []
    for match in TOKEN.finditer(code):
        if match.lastgroup == "skip":
            continue
        text = _value(match[0]) if match.lastgroup == "string" else match[0]
        if text in (")", "]", "}") and found and found[-1][0] == ",":
            found.pop()
        found.append((text, *match.span()))
    return found


def find(source: str, old: str, python: bool) -> list[tuple[int, int]]:
    """Return the (start, end) of each place in a source that reads as `old`.

    Python is compared token by token. Other text, and what lies inside a string or a comment, is
    compared character by character, each run of white space as one space.
    """
    found = []
    if python:
        there, wanted = _tokens(source), [text for text, _, _ in _tokens(old)]
        texts, count = [text for text, _, _ in there], len(wanted)
        found = (
            [
                (there[at][1], there[at + count - 1][2])
                for at in range(len(there) - count + 1)
                if texts[at] == wanted[0] and texts[at : at + count] == wanted
            ]
            if wanted
            else []
        )
    if not found and old.strip():
        pattern = r"\s+".join(map(re.escape, old.split()))
        found = [match.span() for match in re.finditer(pattern, source)]
    return found


def same(one: str, other: str) -> bool:
    """Return whether two pieces of Python say the same, token by token."""
    return [text for text, _, _ in _tokens(one)] == [text for text, _, _ in _tokens(other)]


def replace(source: str, old: str, new: str, python: bool) -> str:
    """Return a source with `new` where it reads as `old`. Raise ValueError unless that is once.

    The lines of `new` after the first are indented as the line in which it begins.
    """
    places = find(source, old, python)
    if len(places) != 1:
        raise ValueError(f"{len(places)} times, not once: {old!r}")
    ((start, end),) = places
    indent = re.match(r"[ \t]*", source[source.rfind("\n", 0, start) + 1 :])[0]
    return source[:start] + re.sub(r"\n(?=[^\n])", "\n" + indent, new) + source[end:]
