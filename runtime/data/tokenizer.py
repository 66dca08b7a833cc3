"""Text <-> token ids, with tiktoken.

Kinds: a published vocabulary, the part of one that a text uses, plain bytes, a BPE trained here. A
published model's own tokenizer.json is one more kind: runtime/data/hf_tokenizer.py. A model whose
tokenizer is unknown has token ids instead of text: NoTokenizer.

Nothing is read or downloaded at import. A tokenizer is stored as its *state*: plain JSON values in
a manifest or a checkpoint. A published vocabulary is stored by name and fingerprint, a compact one
also with the ids that it keeps, a trained or imported one whole. So ids in a checkpoint never get
another meaning.
"""

from __future__ import annotations

import base64
import codecs
import functools
import hashlib
import itertools
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tiktoken

END_OF_TEXT = "<|endoftext|>"
# Vocabularies that tiktoken downloads.
NAMED = ("o200k_base", "gpt2", "cl100k_base")
# Token ids instead of text.
NONE = "none"
# hf:DIGEST is a published model's tokenizer.json.
IMPORTED = "hf:"
# o200k_base:compact is o200k_base without the ids that the text does not use.
COMPACT = ":compact"
# Where a tokenizer that was made from a text is saved, next to the shards.
STATE_FILE = "tokenizer.json"

# How o200k_base cuts text into words before merging. Trained BPEs use the same rule, which
# llama.cpp knows as "gpt-4o".
_LETTER_CASE = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
WORD_PATTERN = "|".join(
    [
        # A word that ends in lower case.
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTER_CASE[0]}*{_LETTER_CASE[1]}+{_CONTRACTION}",
        # A word that starts in upper case.
        rf"[^\r\n\p{{L}}\p{{N}}]?{_LETTER_CASE[0]}+{_LETTER_CASE[1]}*{_CONTRACTION}",
        # Digits in threes.
        r"\p{N}{1,3}",
        # Punctuation.
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        # White space.
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
# Bytes never merge, so any cut will do; short pieces are the fastest.
BYTE_PATTERN = r"[\s\S]{1,64}"
# Stands for a base id that a compact vocabulary does not have.
_NOT_KEPT = 2**32 - 1
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}".encode()


class ChatIds(NamedTuple):
    """Ids around the messages of a chat; runtime/data/chat.py has the layout."""

    start: int
    end: int
    message: int


# How the ids of ChatIds are spelled, in its order.
CHAT_WORDS = ("<|start|>", "<|end|>", "<|message|>")


def without_surrogates(text: str) -> str:
    """Return valid Unicode: surrogate pairs joined, lone surrogates replaced by U+FFFD.

    JSON can spell what UTF-8 cannot hold.
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def encoding_of(name: str, tokens: list[bytes], pattern: str) -> tiktoken.Encoding:
    """Return the encoding whose ids are the positions in `tokens`, then end-of-text."""
    ranks = {token: i for i, token in enumerate(tokens)}
    return tiktoken.Encoding(
        name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
    )


class Tokenizer:
    """A vocabulary and its end-of-text id. Ids are 0 to vocabulary_size - 1.

    Made by load_tokenizer, train_bpe, compacted or tokenizer_from_state. Generation stops at
    `stop_ids`; `start_id` is prepended to every text (None: nothing is). Both are end-of-text,
    except in a published model's tokenizer and in one with chat ids, which stops at `chat.end`.
    """

    # Set by with_chat (runtime/data/chat.py): ids that no text contains. None: no chat ids.
    chat: ChatIds | None = None
    # Fingerprint of the vocabulary without the chat ids; "" if it has none.
    base_fingerprint: str = ""

    def __init__(self, name: str, encoding: tiktoken.Encoding):
        self.name = name
        self.encoding = encoding
        self.vocabulary_size: int = encoding.n_vocab
        # None: no id ends a text.
        self.end_of_text_id: int | None = encoding.eot_token
        self.start_id: int | None = self.end_of_text_id
        self.stop_ids: tuple[int, ...] = (self.end_of_text_id,)

    @property
    def between_documents(self) -> list[int]:
        """Ids between two documents: end-of-text, then the start token if it differs."""
        if self.end_of_text_id is None:
            return []
        if self.start_id is None or self.start_id == self.end_of_text_id:
            return [self.end_of_text_id]
        return [self.end_of_text_id, self.start_id]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of everything that gives an id its meaning.

        That is every token's bytes and id, the word pattern and the special tokens.
        """
        digest = hashlib.sha256(self.encoding._pat_str.encode())
        specials = {text.encode(): i for text, i in self.encoding._special_tokens.items()}
        for kind, tokens in (b"token", self.encoding._mergeable_ranks), (b"special", specials):
            for token, i in sorted(tokens.items(), key=lambda item: item[1]):
                digest.update(kind + struct.pack("<II", i, len(token)) + token)
        return digest.hexdigest()

    @property
    def eos_id(self) -> int | None:
        """The id that other programs call eos: the end of an answer, else of a text."""
        return self.end_of_text_id if self.chat is None else self.chat.end

    @property
    def all_stop_ids(self) -> tuple[int, ...]:
        """stop_ids, then end-of-text: a chat model may also end a text."""
        end = () if self.end_of_text_id is None else (self.end_of_text_id,)
        return tuple(dict.fromkeys((*self.stop_ids, *end)))

    @property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of the tokens that `encode` never yields."""
        if self.chat is None:
            return self.encoding._special_tokens
        return self.encoding._special_tokens | dict(zip(CHAT_WORDS, self.chat, strict=True))

    @functools.cached_property
    def undecodable_ids(self) -> list[int]:
        """Ids below vocabulary_size without a token (o200k_base has 19)."""
        known = {*self.encoding._mergeable_ranks.values(), *self.special_tokens.values()}
        return [i for i in range(self.vocabulary_size) if i not in known]

    @property
    def banned_ids(self) -> list[int]:
        """Ids that generation never draws: those without a token, and a message's header."""
        headers = [] if self.chat is None else [self.chat.start, self.chat.message]
        return self.undecodable_ids + headers

    # -------------------------------------------------------------------------- encode
    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return a text's ids, uint32 [tokens].

        Special tokens' words are plain text; lone surrogates become U+FFFD.
        """
        try:
            return self.encoding.encode_to_numpy(text, disallowed_special=())
        except UnicodeEncodeError:
            return self.encode_to_numpy(without_surrogates(text))
        except ValueError:
            # The word pattern fails on a run of about a million spaces: cut the text in two.
            if len(text) < 2:
                raise
            half = len(text) // 2
            return np.concatenate(
                [self.encode_to_numpy(text[:half]), self.encode_to_numpy(text[half:])]
            )

    def encode(self, text: str) -> list[int]:
        """Return a text's ids as a list."""
        return self.encode_to_numpy(text).tolist()

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that continues another.

        Some published tokenizers put a space before every text: that is left out here.
        """
        return self.encode(text)

    # -------------------------------------------------------------------------- decode
    def token_bytes(self, token_id: int) -> bytes:
        """Return an id's bytes; U+FFFD if it has no token. Raise ValueError if out of range."""
        if self.chat is not None and token_id in self.chat:
            return CHAT_WORDS[self.chat.index(token_id)].encode()
        try:
            return self._lookup(token_id)
        except (KeyError, OverflowError):
            if not 0 <= token_id < self.vocabulary_size:
                raise ValueError(
                    f"token id {token_id} is not in {self.name}, "
                    f"which has ids 0 to {self.vocabulary_size - 1}"
                ) from None
            return _REPLACEMENT

    def _lookup(self, token_id: int) -> bytes:
        return self.encoding.decode_single_token_bytes(token_id)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the bytes of a sequence of ids."""
        return b"".join(self.token_bytes(int(i)) for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    # -------------------------------------------------------------------------- state
    @property
    def made_from_text(self) -> bool:
        """Whether the name alone does not identify this vocabulary, so it must be stored."""
        return self.name.startswith(("bpe:", IMPORTED)) or self.name.endswith(COMPACT)

    def summary(self) -> dict:
        """Return what identifies this tokenizer, as plain JSON values."""
        about = {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "vocabulary_size": self.vocabulary_size,
            "end_of_text_id": self.end_of_text_id,
        }
        if self.chat is not None:
            about["chat"] = self.chat._asdict() | {"base_fingerprint": self.base_fingerprint}
        return about

    def to_state(self) -> dict:
        """Return all that `tokenizer_from_state` needs, as plain JSON values.

        A trained BPE carries its tokens: base64, by id.
        """
        if not self.made_from_text:
            return self.summary()
        ranks = self.encoding._mergeable_ranks
        return self.summary() | {
            "tokens": [
                base64.b64encode(token).decode() for token in sorted(ranks, key=ranks.__getitem__)
            ]
        }


class CompactTokenizer(Tokenizer):
    """A published vocabulary without the ids that a text does not use, renumbered in order.

    Text is cut as the base cuts it, so a text that uses only kept ids has the same tokens. Any
    other base token is spelled with kept tokens; the 256 bytes are always kept.
    """

    def __init__(self, base: Tokenizer, base_ids: Sequence[int]):
        """base_ids: by new id, ascending, with all 256 bytes, end-of-text last."""
        name = base.name + COMPACT
        tokens = [base.token_bytes(i) for i in base_ids[:-1]]
        # This encoding looks tokens up; it does not encode.
        super().__init__(name, encoding_of(name, tokens, base.encoding._pat_str))
        self.base, self.base_ids = base, list(base_ids)
        self.new_ids = np.full(base.vocabulary_size, _NOT_KEPT, dtype=np.uint32)  # [base ids]
        self.new_ids[self.base_ids] = np.arange(len(base_ids))

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the base's fingerprint and the kept ids."""
        kept = np.array(self.base_ids, dtype="<u4").tobytes()
        return hashlib.sha256(f"compact {self.base.fingerprint}".encode() + kept).hexdigest()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return a text's ids, uint32 [tokens]: renumbered base ids or spelled with kept ones."""
        base_ids = self.base.encode_to_numpy(text)
        ids = self.new_ids[base_ids]
        if not (missing := ids == _NOT_KEPT).any():
            return ids
        spelled = {
            i: self._spell(self.base.token_bytes(i)) for i in set(base_ids[missing].tolist())
        }
        pairs = zip(base_ids.tolist(), ids.tolist(), strict=True)
        spelled_ids = [i for base_id, new_id in pairs for i in spelled.get(base_id, (new_id,))]
        return np.array(spelled_ids, dtype=np.uint32)

    def _spell(self, token: bytes) -> tuple[int, ...]:
        """Return the fewest kept tokens that spell these bytes; a tie: the longest last token.

        Merging by rank among the kept tokens would often end in single bytes, which training hardly
        saw: a kept token cannot be reached if the tokens that merge into it are not kept.
        """
        kept = self.encoding._mergeable_ranks
        # By number of bytes spelled: 0, 1, 2, ...
        spelling: list[tuple[int, ...]] = [()]
        for end in range(1, len(token) + 1):
            ways = (
                spelling[start] + (kept[token[start:end]],)
                for start in range(end)
                if token[start:end] in kept
            )
            spelling.append(min(ways, key=len))
        return spelling[-1]

    def summary(self) -> dict:
        """Return what identifies this tokenizer and its base, as plain JSON values."""
        return super().summary() | {"base_fingerprint": self.base.fingerprint}

    def to_state(self) -> dict:
        """Return all that `tokenizer_from_state` needs: also the base's kept ids, by new id."""
        return self.summary() | {"base_ids": self.base_ids}


class NoTokenizer(Tokenizer):
    """Token ids written as numbers, for a model whose tokenizer is unknown.

    The text "12 7 99" is three ids, and they decode to " 12 7 99". No id begins or ends a text, and
    none is left out. It is not stored anywhere.
    """

    def __init__(self, vocabulary_size: int):
        self.name = NONE
        self.vocabulary_size = vocabulary_size
        self.end_of_text_id = self.start_id = None
        self.stop_ids = ()
        self.undecodable_ids = []

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return the ids that a text names, uint32 [tokens]: numbers between blanks or commas.

        Brackets around them do not count. Raise ValueError for anything else.
        """
        words = text.translate(dict.fromkeys(map(ord, "[],"), " ")).split()
        for word in words:
            # A longer number is never an id, and a much longer one takes long to read.
            if not (word.isascii() and word.isdigit() and len(word) < 20):
                raise ValueError(
                    f"{word[:40]!r} is no token id: this model's tokenizer is unknown, so a prompt "
                    f"is numbers from 0 to {self.vocabulary_size - 1:,}, such as 12 7 99"
                )
            if int(word) >= self.vocabulary_size:
                raise ValueError(
                    f"token id {word} is beyond this model's vocabulary: "
                    f"its ids are 0 to {self.vocabulary_size - 1:,}"
                )
        return np.array(list(map(int, words)), dtype=np.uint32)

    def _lookup(self, token_id: int) -> bytes:
        if not 0 <= token_id < self.vocabulary_size:
            raise KeyError(token_id)
        return f" {token_id}".encode()


class TokenStream:
    """Text from ids as they arrive: each push returns the completed characters, flush the rest.

    Chat ids show nothing.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this id completes; "" while it ends inside a character."""
        if self.tokenizer.chat is not None and token_id in self.tokenizer.chat:
            return ""
        return self._decoder.decode(self.tokenizer.token_bytes(int(token_id)))

    def flush(self) -> str:
        """Return the rest: U+FFFD for an incomplete character. The stream can be used again."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Return visible character -> byte, as byte-level BPEs (GPT-2) write bytes.

    A byte that is printable Latin-1 is itself; the others are numbered from U+0100.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = itertools.count(0x100)
    return {chr(b if b in visible else next(hidden)): b for b in range(256)}


@functools.cache
def _character_of_byte() -> dict[int, str]:
    return {byte: character for character, byte in byte_of_character().items()}


def spell(token: bytes) -> str:
    """Return a token as byte-level BPEs write it: one visible character per byte."""
    return token.decode("latin-1").translate(_character_of_byte())
