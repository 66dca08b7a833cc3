"""How much of some texts stands word for word in a training text, which is read once.

What is looked for is in memory, and the training text, which may be large, is not: memory stays
flat. Words are compared in small letters, without punctuation.

# n words of the texts together  t words of a part of the training text
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.evaluation.sentences import words

# A shorter run of words is common phrases.
RUN_WORDS = 8
# Training text is compared in parts of so many words, of whole documents.
PART_WORDS = 1 << 17
# Any odd number whose bits are mixed: each run is compared word by word before it counts.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
# Between texts, and for words that no text has.
_BREAK = 0


def run_hashes(ids_n: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return a hash of the RUN_WORDS ids from each position on; 0 where a break is among them."""
    count = max(0, len(ids_n) - RUN_WORDS + 1)
    hashes, whole = np.zeros(count, dtype=np.uint64), np.ones(count, dtype=bool)
    for offset in range(RUN_WORDS):
        own = ids_n[offset : offset + count]
        hashes = hashes * _FACTOR + own.astype(np.uint64)
        whole &= own != _BREAK
    # A hash that is 0 by chance becomes another one.
    return np.where(whole, np.maximum(hashes, np.uint64(1)), np.uint64(0))


class CopySearch:
    """Some texts, and which of their runs of RUN_WORDS words a training text has.

    num_runs, num_copied, longest: of each text: its runs, those found so far, and the words of the
    longest copied passage (0 if it has no copied run).
    """

    def __init__(self, texts: Sequence[str]):
        self._ids: dict[str, int] = {}
        flat: list[int] = []
        owners: list[int] = []
        for number, text in enumerate(texts):
            own = [self._ids.setdefault(word, len(self._ids) + 1) for word in words(text)]
            flat += [*own, _BREAK]
            owners += [number] * (len(own) + 1)
        self._flat_n = np.array(flat, dtype=np.int64)
        hashes_n = run_hashes(self._flat_n)
        self._owners_n = np.array(owners, dtype=np.int64)[: len(hashes_n)]
        # Positions of runs, sorted by hash.
        order = np.argsort(hashes_n, kind="stable")
        self._positions = order[hashes_n[order] != 0]
        self._sorted = hashes_n[self._positions]
        self._is_copied_n = np.zeros(len(hashes_n), dtype=bool)
        self._count = len(texts)
        self.longest = np.zeros(len(texts), dtype=np.int64)

    @property
    def num_runs(self) -> NDArray[np.int64]:
        return np.bincount(self._owners_n[self._positions], minlength=self._count)

    @property
    def num_copied(self) -> NDArray[np.int64]:
        return np.bincount(self._owners_n[self._is_copied_n], minlength=self._count)

    def read(self, documents: Iterable[str]) -> None:
        """Look for the runs in further documents of the training text."""
        part: list[int] = []
        known = self._ids.get
        for document in documents:
            part += [known(word, _BREAK) for word in words(document)]
            part.append(_BREAK)
            if len(part) >= PART_WORDS:
                self._compare(np.array(part, dtype=np.int64))
                part = []
        self._compare(np.array(part, dtype=np.int64))

    def _compare(self, ids_t: NDArray[np.int64]) -> None:
        """Mark the runs that a part of the training text has, and measure copied passages."""
        hashes_t = run_hashes(ids_t)
        low = np.searchsorted(self._sorted, hashes_t, "left")
        count = np.searchsorted(self._sorted, hashes_t, "right") - low
        hits = np.flatnonzero((count > 0) & (hashes_t != 0))
        # Each place in the training text with each place in the texts that has the same words.
        there = np.repeat(hits, count[hits])
        within = np.arange(len(there)) - np.repeat(
            np.cumsum(count[hits]) - count[hits], count[hits]
        )
        here = self._positions[np.repeat(low[hits], count[hits]) + within]
        same = np.ones(len(there), dtype=bool)
        for offset in range(RUN_WORDS):
            same &= ids_t[there + offset] == self._flat_n[here + offset]
        here, there = here[same], there[same]
        self._is_copied_n[here] = True
        self._measure(here, there)

    def _measure(self, here: NDArray[np.int64], there: NDArray[np.int64]) -> None:
        """Note passages: runs that follow each other in both texts."""
        if not len(here):
            return
        shift = there - here
        order = np.lexsort((here, shift))
        here, shift = here[order], shift[order]
        begins = np.flatnonzero(np.diff(here, prepend=-2) != 1)
        begins = np.union1d(begins, np.flatnonzero(np.diff(shift, prepend=shift[0])))
        lengths = np.diff(begins, append=len(here)) + RUN_WORDS - 1
        np.maximum.at(self.longest, self._owners_n[here[begins]], lengths)
