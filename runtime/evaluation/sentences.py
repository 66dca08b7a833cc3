"""Where sentences of a text begin, and which of its words are names: rules, no model."""

from __future__ import annotations

import re

# A sentence ends after its mark and the quotes that follow it, if blanks come next.
_END = re.compile(r"[.!?\u2026][\"'\u201d\u2019)]*(\s+)(?=\S)")
LONGEST_TITLE = len(" Prof.")
_TITLE = re.compile(r"\b(Mr|Mrs|Ms|Dr|St|Prof)\.$")
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_LETTERS = re.compile(r"[^\W\d_]+")
# Of Tom's, this is Tom.
_CAPITALISED = re.compile(r"(?<![\w'\u2019])(?![a-z])[^\W\d_]{2,}")
_AFTER_A_WORD = re.compile(r"[a-z,] $")
_NO_NAMES = """
    Monday Tuesday Wednesday Thursday Friday Saturday Sunday
    January February March April May June July August September October November December
    Christmas Easter Halloween English Mr Mrs Ms Dr St Prof
"""
NO_NAMES = frozenset(_NO_NAMES.split())


def sentence_starts(text: str) -> list[int]:
    """Return where each sentence of a text begins; [] for a text without characters.

    A mark within quotes that a small letter follows ("Stop!" he said.) ends no sentence.
    """
    starts = [0] if text.strip() else []
    for match in _END.finditer(text):
        before = text[max(0, match.start(1) - LONGEST_TITLE) : match.start(1)]
        if text[match.end()].islower() or _TITLE.search(before):
            continue
        starts.append(match.end())
    return starts


def words(text: str) -> list[str]:
    """Return the words of a text in small letters, apostrophes included, without punctuation."""
    return _WORD.findall(text.lower())


def mentions(text: str) -> list[tuple[str, int]]:
    """Return (name, position) for each mention of a name, in the text's order.

    A name is a word with a capital that follows a word or a comma somewhere in the text, and that
    the text never has in small letters.
    """
    small = set(_LETTERS.findall(text))
    found, inside = [], set()
    for match in _CAPITALISED.finditer(text):
        word = match[0]
        if word[1:].islower() and word not in NO_NAMES and word.lower() not in small:
            found.append((word, match.start()))
            if _AFTER_A_WORD.search(text[max(0, match.start() - 2) : match.start()]):
                inside.add(word)
    return [(name, at) for name, at in found if name in inside]
