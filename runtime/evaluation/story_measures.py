"""Measures of generated stories that need no judge. Each means something next to human text alone.

Every measure gives, for one text, a numerator and a denominator, so that a figure is a ratio of
sums over texts and can be resampled by text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from runtime.evaluation.sentences import mentions

# Votes that a name needs, and the share of them, before its pronoun counts as known.
FEWEST_VOTES, CLEAR_SHARE = 5, 0.8
_PRONOUN = re.compile(r"\b(he|him|his|she|her|hers)\b", re.IGNORECASE)
_HE = frozenset(("he", "him", "his"))
_ENDS_WELL = re.compile(r"[.!?\u2026][\"'\u201d\u2019)]*$")
_QUOTES = {"\u201c": 1, "\u201d": -1}

# Numerator and denominator of one text.
Ratio = tuple[float, float]


def grams(text_words: Sequence[str], size: int) -> list[tuple[str, ...]]:
    """Return the runs of `size` words."""
    return list(zip(*(text_words[i:] for i in range(size)), strict=False))


def repeated(text_words: Sequence[str], size: int = 4) -> Ratio:
    """Return the runs of `size` words that the text had before, of all its runs."""
    own = grams(text_words, size)
    return len(own) - len(set(own)), len(own)


def distinct(text_words: Sequence[str], size: int) -> Ratio:
    """Return the different runs of `size` words, of all runs.

    Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models". It
    falls with the length, so compare texts of the same length.
    """
    own = grams(text_words, size)
    return len(set(own)), len(own)


def shared(texts: Sequence[Sequence[str]], size: int = 4) -> list[Ratio]:
    """Return for each text its different runs that another of the texts has, of all of them."""
    own = [set(grams(text, size)) for text in texts]
    in_texts = Counter(gram for some in own for gram in some)
    return [(sum(in_texts[gram] > 1 for gram in some), len(some)) for some in own]


def is_closed(prompt: str, continuation: str) -> bool:
    """Return whether a continuation ends after a sentence, with all double quotes closed.

    Quotes that the prompt opens count.
    """
    if not continuation.strip():
        return False
    text = prompt + continuation
    depth = sum(text.count(mark) * step for mark, step in _QUOTES.items())
    return bool(_ENDS_WELL.search(text.rstrip())) and text.count('"') % 2 == 0 and depth == 0


# ------------------------------------------------------------------------------ names
def first_name(text: str) -> str:
    """Return the first name in a text; "" if there is none."""
    return next((name for name, _ in mentions(text)), "")


def returns(prompt: str, continuation: str) -> Ratio:
    """Return whether the first name of a prompt is in its continuation; 0 of 0 without a name."""
    name = first_name(prompt)
    if not name:
        return 0, 0
    return float(bool(re.search(rf"\b{re.escape(name)}\b", continuation))), 1


def new_names(prompt: str, continuation: str) -> Ratio:
    """Return the names that a continuation introduces and uses again, of those it introduces."""
    found = mentions(f"{prompt} {continuation}")
    old = {name for name, at in found if at < len(prompt)}
    counts = Counter(name for name, _ in found if name not in old)
    return sum(count > 1 for count in counts.values()), len(counts)


def pronouns(text: str, start: int = 0) -> list[tuple[str, bool]]:
    """Return (name, whether it is a he) for each name that a pronoun follows before another name.

    start: pronouns before it do not count. Within quotes somebody else may be meant; that is as
    true of human text.
    """
    found = mentions(text)
    ends = [at for _, at in found[1:]] + [len(text)] * bool(found)
    result = []
    for (name, at), end in zip(found, ends, strict=True):
        if match := _PRONOUN.search(text, max(at, start), max(end, start)):
            result.append((name, match[0].lower() in _HE))
    return result


def known_pronouns(texts: Iterable[str]) -> dict[str, bool]:
    """Return name -> whether it is a he, of names whose pronoun texts agree on."""
    votes: dict[str, Counter[bool]] = {}
    for text in texts:
        for name, is_he in pronouns(text):
            votes.setdefault(name, Counter())[is_he] += 1
    known = {}
    for name, counts in votes.items():
        (is_he, most), total = counts.most_common(1)[0], counts.total()
        if total >= FEWEST_VOTES and most >= CLEAR_SHARE * total:
            known[name] = is_he
    return known


def pronoun_fits(prompt: str, continuation: str, known: dict[str, bool]) -> Ratio:
    """Return whether the first pronoun after the prompt's first name is the one that it has.

    Only pronouns of the continuation count. 0 of 0 where no such pronoun is known or found.
    """
    name = first_name(prompt)
    if name not in known:
        return 0, 0
    found = pronouns(f"{prompt} {continuation}", len(prompt))
    own = [is_he for other, is_he in found if other == name]
    return (float(own[0] == known[name]), 1) if own else (0, 0)
