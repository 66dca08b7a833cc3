"""Texts as a model reads them: ids, bytes, and what is known of each token of the vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from runtime.data.tokenizer import Tokenizer

# Of a document's ids: nothing predicts the first.
FIRST = 1
# The classes of a token, by its bytes.
CLASSES = ("letters after a space", "letters", "digits", "punctuation", "white space", "special")


@dataclass(frozen=True)
class Encoded:
    """Documents as one model reads them: each begins as a document of its training does.

    ids: of each document, scored from number FIRST on. num_bytes [D]: of the text that is scored.
    """

    ids: list[NDArray[np.uint32]]
    num_bytes: NDArray[np.int64]

    @property
    def num_tokens(self) -> int:
        """Tokens that are scored."""
        return sum(max(0, len(own) - FIRST) for own in self.ids)

    def first_documents(self, most: int) -> Encoded:
        """Return the first documents: they are sorted by digest, so a random part."""
        return Encoded(self.ids[:most], self.num_bytes[:most])

    def counts(self, vocabulary_size: int) -> NDArray[np.int64]:
        """Return how often each token is scored, [V]."""
        counts = np.zeros(vocabulary_size, dtype=np.int64)
        for own in self.ids:
            np.add.at(counts, own[FIRST:], 1)
        return counts


def encode_documents(texts: list[str], tokenizer: Tokenizer) -> Encoded:
    """Return the documents for a model with this tokenizer.

    Its start token comes first and is not scored: it has no bytes. No end-of-text is added, so none
    is scored. A tokenizer without a start token leaves the first token of each text unscored, and
    its bytes out of the count: nothing predicts it.
    """
    start = tokenizer.start_id
    ids, num_bytes = [], []
    for text in texts:
        own = tokenizer.encode_to_numpy(text)
        size = len(text.encode())
        if start is not None:
            own = np.concatenate([np.array([start], dtype=np.uint32), own])
        elif len(own):
            size -= len(tokenizer.token_bytes(int(own[0])))
        ids.append(own)
        num_bytes.append(size)
    return Encoded(ids, np.array(num_bytes, dtype=np.int64))


def token_classes(tokenizer: Tokenizer, vocabulary_size: int) -> NDArray[np.int64]:
    """Return the number in CLASSES of each id, [V]."""
    specials = {*tokenizer.special_tokens.values(), *tokenizer.undecodable_ids}
    special = CLASSES.index("special")
    return np.array(
        [
            special
            if i in specials or i >= tokenizer.vocabulary_size
            else CLASSES.index(class_of(tokenizer.token_bytes(i)))
            for i in range(vocabulary_size)
        ],
        dtype=np.int64,
    )


def class_of(token: bytes) -> str:
    """Return the class of a token's bytes; part of a character counts as a letter."""
    text = token.decode("utf-8", "replace")
    body = text.strip()
    if not body:
        return "white space"
    if all(c.isdigit() for c in body):
        return "digits"
    if any(c.isalnum() or c == "\N{REPLACEMENT CHARACTER}" for c in body):
        return "letters after a space" if text[0].isspace() else "letters"
    return "punctuation"
