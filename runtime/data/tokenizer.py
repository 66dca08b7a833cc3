"""Text <-> token ids, over tiktoken: a published vocabulary, the part of one that a text uses, plain bytes, or a BPE trained here.
(A published model's own tokenizer.json is one more: runtime/data/hf_tokenizer.py.)

Nothing is read or downloaded at import. A tokenizer travels as its *state*: plain JSON values that a manifest and a
checkpoint carry. A published vocabulary is stored by name and fingerprint, a compact one with the ids it keeps besides, a
trained or imported one whole, so a checkpoint never meets ids that mean something else.
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
import itertools
import struct
from collections.abc import Sequence

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"
NAMED = ("o200k_base", "gpt2", "cl100k_base")  # vocabularies that tiktoken downloads
IMPORTED = "hf:"  # hf:DIGEST is a published model's tokenizer.json
COMPACT = ":compact"  # o200k_base:compact is o200k_base without the ids that the text does not use
STATE_FILE = (
    "tokenizer.json"  # where a tokenizer that was made from a text is saved, beside the shards
)

# How o200k_base cuts text into words before merging. Trained BPEs use the same rule, which llama.cpp knows as "gpt-4o".
_LETTER_CASE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
WORD_PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTER_CASE[0]}*{_LETTER_CASE[1]}+{_CONTRACTION}",  # word, lower case at its end
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTER_CASE[0]}+{_LETTER_CASE[1]}*{_CONTRACTION}",  # word, upper case at its start
        r"\p{N}{1,3}",  # digits by threes
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",  # punctuation
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",  # white space
    ]
)
BYTE_PATTERN = (
    r"[\s\S]{1,64}"  # bytes never merge, so any cut will do; short pieces are the fastest
)
_NOT_KEPT = 2**32 - 1  # in the place of a base id that a compact vocabulary has no id for
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


def without_surrogates(text: str) -> str:
    """Valid Unicode: surrogate pairs joined, lone ones replaced by U+FFFD. (JSON can spell what UTF-8 cannot hold.)"""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encoding_of(name: str, tokens: list[bytes], pattern: str) -> tiktoken.Encoding:
    """The encoding whose ids are the positions in `tokens`, followed by end-of-text."""
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


class Tokenizer:
    """A vocabulary and its end-of-text id. Ids run from 0 to vocabulary_size - 1; made by load_tokenizer, train_bpe, compacted or tokenizer_from_state.

    An answer ends with one of `stop_ids`, and a text begins behind `start_id` (None: behind nothing). Both are end-of-text, but
    for a published model's tokenizer.
    """

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name = name
        self.encoding = encoding
        self.vocabulary_size: int = encoding.n_vocab
        self.end_of_text_id: int = encoding.eot_token
        self.start_id: int | None = self.end_of_text_id
        self.stop_ids: tuple[int, ...] = (self.end_of_text_id,)

    @property
    def between_documents(self) -> list[int]:
        """Ids behind a document, in a row of them: end-of-text, and what the next one begins behind if that is another id."""
        return [self.end_of_text_id] + [self.start_id] * (
            self.start_id not in (None, self.end_of_text_id)
        )

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of all that decides what an id means: every token's bytes and id, the word pattern, the special tokens."""
        digest = hashlib.sha256(self.encoding._pat_str.encode())
        specials = {text.encode(): i for text, i in self.encoding._special_tokens.items()}
        for kind, tokens in (b"token", self.encoding._mergeable_ranks), (b"special", specials):
            for token, i in sorted(tokens.items(), key=lambda item: item[1]):
                digest.update(kind + struct.pack("<II", i, len(token)) + token)
        return digest.hexdigest()

    @functools.cached_property
    def undecodable_ids(self) -> list[int]:
        """Ids below vocabulary_size that stand for nothing (o200k_base has 19): a model must never sample them."""
        known = {*self.encoding._mergeable_ranks.values(), *self.encoding._special_tokens.values()}
        return [i for i in range(self.vocabulary_size) if i not in known]

    # ------------------------------------------------------------------------------------------------------------ encode
    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Ids of a text, uint32 [tokens]. The words of a special token are ordinary text; lone surrogates become U+FFFD."""
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_to_numpy(without_surrogates(text))
        except (
            ValueError
        ):  # the word pattern gives up on a run of a million spaces or so: cut the text in two
            if len(text) < 2:
                raise
            half = len(text) // 2
            return np.concatenate(
                [self.encode_to_numpy(text[:half]), self.encode_to_numpy(text[half:])]
            )

    def encode(self, text: str) -> list[int]:
        """Ids of a text, as a list."""
        return self.encode_to_numpy(text).tolist()

    def encode_continuation(self, text: str) -> list[int]:
        """Ids of a text that goes on behind another: without what some published tokenizers put before every text."""
        return self.encode(text)

    # ------------------------------------------------------------------------------------------------------------ decode
    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one id; U+FFFD for an id that stands for nothing. ValueError outside the vocabulary."""
        try:
            return self._lookup(token_id)
        except (KeyError, OverflowError):
            if not 0 <= token_id < self.vocabulary_size:
                raise ValueError(
                    f"token id {token_id} is not in {self.name}, which has ids 0 to {self.vocabulary_size - 1}"
                ) from None
            return _REPLACEMENT

    def _lookup(self, token_id: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token_id)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of a sequence of ids."""
        return b"".join(self.token_bytes(int(i)) for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # ------------------------------------------------------------------------------------------------------------- state
    @property
    def made_from_text(self) -> bool:
        """Whether this vocabulary is not known by its name alone, so that it must be stored with what it made."""
        return self.name.startswith(("bpe:", IMPORTED)) or self.name.endswith(COMPACT)

    def summary(self) -> dict:
        """What identifies this tokenizer, in plain JSON values."""
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocabulary_size": self.vocabulary_size,
            "end_of_text_id": self.end_of_text_id,
        }

    def to_state(self) -> dict:
        """All that `tokenizer_from_state` needs, in plain JSON values; a trained BPE carries its tokens (base64, by id)."""
        if not self.made_from_text:
            return self.summary()
        ranks = self.encoding._mergeable_ranks
        return self.summary() | {
            "tokens": [
                base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.__getitem__)
            ]
        }


class CompactTokenizer(Tokenizer):
    """A published vocabulary without the ids that a text does not use: the same tokens, numbered anew in the same order.

    Text is cut as the base cuts it, so a text that uses none but the kept ids has the same tokens. Any other base token is
    spelled with kept ones, the 256 bytes among them.
    """

    def __init__(self, base: Tokenizer, base_ids: Sequence[int]):
        """`base_ids`, by new id: ascending, with all 256 bytes and, last, end-of-text."""
        tokens = [base.token_bytes(i) for i in base_ids[:-1]]
        super().__init__(
            base.name + COMPACT, encoding_of(base.name + COMPACT, tokens, base.encoding._pat_str)
        )  # to look tokens up, not to encode
        self.base, self.base_ids = base, list(base_ids)
        self.new_ids = np.full(base.vocabulary_size, _NOT_KEPT, dtype=np.uint32)  # [base ids]
        self.new_ids[self.base_ids] = np.arange(len(base_ids))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the base's fingerprint and the kept ids."""
        return hashlib.sha256(
            f"compact {self.base.fingerprint}".encode()
            + np.array(self.base_ids, dtype="<u4").tobytes()
        ).hexdigest()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Ids of a text, uint32 [tokens]: the base's, each either renumbered or spelled with kept tokens."""
        base_ids = self.base.encode_to_numpy(text)
        ids = self.new_ids[base_ids]
        if not (missing := ids == _NOT_KEPT).any():
            return ids
        spelled = {
            i: self._spell(self.base.token_bytes(i)) for i in set(base_ids[missing].tolist())
        }
        return np.array(
            [
                i
                for base_id, new_id in zip(base_ids.tolist(), ids.tolist(), strict=True)
                for i in spelled.get(base_id, (new_id,))
            ],
            dtype=np.uint32,
        )

    def _spell(self, token: bytes) -> tuple[int, ...]:
        """The fewest kept tokens that these bytes can be cut into; of equally few, those whose last is the longest.

        (Merging by rank among the kept tokens would often end in single bytes, which training hardly met: a kept token is
        out of its reach if the tokens that merge into it are not kept.)
        """
        kept = self.encoding._mergeable_ranks
        spelling: list[tuple[int, ...]] = [()]  # of the first 0, 1, 2, ... bytes
        for end in range(1, len(token) + 1):
            ways = (
                spelling[start] + (kept[token[start:end]],)
                for start in range(end)
                if token[start:end] in kept
            )
            spelling.append(min(ways, key=len))
        return spelling[-1]

    def summary(self) -> dict:
        """What identifies this tokenizer and its base, in plain JSON values."""
        return super().summary() | {"base_fingerprint": self.base.fingerprint}

    def to_state(self) -> dict:
        """All that `tokenizer_from_state` needs, in plain JSON values: the kept ids of the base, by new id."""
        return self.summary() | {"base_ids": self.base_ids}


class TokenStream:
    """Text from ids as they come: each push returns the characters that are now complete, flush the rest."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Characters completed by this id; "" while it ends inside a character."""
        return self._decoder.decode(self.tokenizer.token_bytes(int(token_id)))

    def flush(self) -> str:
        """What is left: U+FFFD for a character that was never completed. The stream can be used again."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


@functools.cache
def byte_of_character() -> dict[str, int]:
    """The visible character that byte-level BPEs (GPT-2) write for each byte, mapped back: itself if printable Latin-1, else U+0100 up."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = itertools.count(0x100)
    return {chr(b if b in visible else next(hidden)): b for b in range(256)}


@functools.cache
def _character_of_byte() -> dict[int, str]:
    return {byte: character for character, byte in byte_of_character().items()}


def spell(token: bytes) -> str:
    """A token as byte-level BPEs write it: a visible character for each byte."""
    return token.decode("latin-1").translate(_character_of_byte())
