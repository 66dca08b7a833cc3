"""The held-out texts that a model is judged on, in an order of their own.

Texts are sorted by their digest. So no figure depends on the order of files or lines, unless only
the first documents are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.data.file_sets import find_files
from runtime.data.shards import TokenShards
from runtime.data.sources import DEFAULT_COLUMN, FileSource
from runtime.data.tokenizer import Tokenizer, without_surrogates
from runtime.data.tokenizers import tokenizer_from_state

# Tokens of shards that are read at a time.
READ_TOKENS = 1 << 16


@dataclass(frozen=True)
class Documents:
    """Texts, each at least one byte, sorted by their digests; and where they come from."""

    texts: list[str]
    sources: list[str]
    # Hex SHA-256 of the texts' digests in order: the same for the same texts in any order.
    digest: str
    # False if there were more than were asked for: then these are the first.
    are_all: bool = True

    @property
    def num_bytes(self) -> int:
        return sum(len(text.encode()) for text in self.texts)

    def about(self) -> dict:
        """Return what a report says of the texts."""
        return {
            "sources": self.sources,
            "documents": len(self.texts),
            "are_all": self.are_all,
            "bytes": self.num_bytes,
            "sha256": self.digest,
        }


def sorted_documents(texts: Iterable[str], sources: list[str], most: int = 0) -> Documents:
    """Return the first `most` texts that are not empty, sorted; 0 = all. Raise ValueError."""
    kept: list[tuple[bytes, str]] = []
    are_all = True
    # A lone surrogate has no UTF-8, so it has no bytes to count.
    for text in filter(None, map(without_surrogates, texts)):
        if most and len(kept) == most:
            are_all = False
            break
        kept.append((hashlib.sha256(text.encode()).digest(), text))
    if not kept:
        raise ValueError(f"there is no text in {', '.join(sources)}: name a file that holds some")
    kept.sort()
    whole = hashlib.sha256(b"".join(digest for digest, _ in kept)).hexdigest()
    names = sorted(map(without_surrogates, sources))
    return Documents([text for _, text in kept], names, whole, are_all)


def file_documents(names: Iterable[str], column: str = DEFAULT_COLUMN, most: int = 0) -> Documents:
    """Return the documents of files, folders or patterns, in the formats of prepare_data.py."""
    source = FileSource(find_files(names), column)
    return sorted_documents(
        whole_documents(source), [file.path.name for file in source.files], most
    )


def whole_documents(source: FileSource) -> Iterator[str]:
    """Yield whole documents: a source yields long ones in parts."""
    parts: list[str] = []
    for part, ends in source.documents():
        parts.append(part)
        if ends:
            yield "".join(parts)
            parts = []
    if parts:
        yield "".join(parts)


def shard_documents(data_dir: str, most: int = 0) -> Documents:
    """Return the documents of a dataset's validation shards, as text.

    Text has the same bytes for every tokenizer, so models with different ones can be compared.
    """
    shards = TokenShards(Path(data_dir) / "val")
    tokenizer = tokenizer_from_state(shards.tokenizer_state)
    return sorted_documents(_decoded(shards, tokenizer), [Path(data_dir).name + "/val"], most)


def _decoded(shards: TokenShards, tokenizer: Tokenizer) -> Iterator[str]:
    """Yield the text between two end-of-text tokens, without special tokens."""
    specials = list(tokenizer.special_tokens.values())
    rest = np.empty(0, dtype=np.int64)
    for start in range(0, shards.num_tokens, READ_TOKENS):
        ids = shards.read(start, min(READ_TOKENS, shards.num_tokens - start))
        pieces = np.split(ids, np.flatnonzero(ids == shards.end_of_text_id))
        pieces[0] = np.concatenate([rest, pieces[0]])
        for piece in pieces[:-1]:
            yield tokenizer.decode(piece[~np.isin(piece, specials)].tolist())
        rest = pieces[-1]
    yield tokenizer.decode(rest[~np.isin(rest, specials)].tolist())
