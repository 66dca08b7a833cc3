"""Write our tokenizers as Hugging Face's tokenizer.json, and use any published tokenizer.json.

Needs the `tokenizers` library. The file gives the same ids as our tokenizer for every text without
a special token's word. Such a word is plain text to us. To `tokenizers` and transformers it is that
token, unless `encode_special_tokens = True` is set there (`split_special_tokens=True` in
transformers): then all texts agree. The file puts the start token before a text, as in training,
unless it is told `add_special_tokens=False`. It puts nothing after a text.
"""

from __future__ import annotations

import datetime
import functools
import hashlib
import json
import random
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runtime.base.files import write_text_atomic
from runtime.data import chat_spellings
from runtime.data.tokenizer import (
    CHAT_WORDS,
    COMPACT,
    END_OF_TEXT,
    NoTokenizer,
    Tokenizer,
    byte_of_character,
    spell,
    without_surrogates,
)

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIALS_FILE = "special_tokens_map.json"
# Newer folders have here what older ones have in tokenizer_config.json.
TEMPLATE_FILE = "chat_template.jinja"
# Key in tokenizer_config.json: state of the tokenizer that the file was written from.
OURS = "gptoss_tokenizer"
# What a SentencePiece vocabulary writes for a space.
SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
SPECIALS = ("bos_token", "eos_token", "unk_token", "pad_token")
# The word of the id that padding has in the files of our tokenizers.
PAD = "<|pad|>"
# A byte of no UTF-8 text (RFC 3629), so no text has a token with it.
NEVER_IN_UTF8 = b"\xff"
# What stands for the words of special tokens, by their number: HIDDEN where a message holds them,
# RESPELLED where a chat template wrote them. No text has these, because nobody knows the secret.
# U+FDD0 and U+FDD1 are noncharacters (Unicode 16.0, section 23.7).
_SECRET = secrets.randbelow(10**30)
HIDDEN, RESPELLED = f"\ufdd0{_SECRET},{{}}\ufdd1", f"\ufdd1{_SECRET},{{}}\ufdd0"
# Texts that must give our ids: prose, code, contractions, scripts, emoji, control characters,
# white space, long runs of one character, and nothing.
CHECK_TEXTS = (
    "Once upon a time, there was a little girl named Lily. She didn't like the big, red ball; "
    "it wasn't hers!\n\n\"I'LL SHARE,\" said Tom's mom.\r\n",
    "def f(x_1: int) -> dict:\r\n"
    "\treturn {'a': x_1 ** 2, \"b\": [0x1F, 1e-9]}  # 3 33 333 3333 33333.50\n\n\n    pass\n",
    "DON'T don'T we'Ve they'RE I'm I'M he'd you'll 'S'T ''s ' 't naïve fiancée "
    "cafe\N{COMBINING ACUTE ACCENT} ǅ ŉ ß ſ 'ſ",
    "für Gäste geschlossen, стоял туман, 灯台は静かだった。 안녕하세요 你好，世界 "
    "नमस्ते สวัสดี שלום مرحبا ٣٤٥٦ ⅻ½²",
    "\N{FAMILY}\N{MAN}\N{ZERO WIDTH JOINER}\N{WOMAN}\N{ZERO WIDTH JOINER}\N{GIRL} "
    "\N{REGIONAL INDICATOR SYMBOL LETTER U}\N{REGIONAL INDICATOR SYMBOL LETTER N}"
    "\N{WAVING HAND SIGN}\N{EMOJI MODIFIER FITZPATRICK TYPE-5}",
    "\0\1\x1b[0m\x7f\x85\xa0\N{ZERO WIDTH NO-BREAK SPACE}\N{LINE SEPARATOR}\N{IDEOGRAPHIC SPACE}"
    "\N{REPLACEMENT CHARACTER}\U0010ffff",
    "a" + " " * 300 + "b\t\t\t\n \n  \n   end  ",
    "=" * 131 + "-" * 67 + "a" * 90 + "0" * 40,
    "/" * 9 + "\n/\r\n//x.y?z=1&q=%20#!",
    " ",
    "",
)


class TokenizerError(ValueError):
    """A tokenizer.json that does not give the ids it should give."""

    exit_code = 1


def _library():
    try:
        import tokenizers
    except ImportError:
        raise ValueError(
            "tokenizer.json needs the tokenizers library: pip install tokenizers"
        ) from None
    return tokenizers


# ------------------------------------------------------------------------------ our tokenizers
def byte_level_merges(tokenizer: Tokenizer) -> list[tuple[bytes, bytes]]:
    """Return the pairs that a byte-level BPE merges, in order. Raise ValueError for other kinds.

    tiktoken has no list: it joins the two neighbours that make the lowest id. So the list has every
    way to cut a token into two others (446,189 for o200k_base), sorted by the token's id. Then
    merging reaches each token of o200k_base. That matters to readers that do not look up whole
    words first (llama.cpp).
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.merges()
    _refuse_compact(tokenizer)
    ranks = tokenizer.encoding._mergeable_ranks
    ways = [
        (rank, left, right)
        for token, rank in ranks.items()
        for cut in range(1, len(token))
        if (left := ranks.get(token[:cut])) is not None
        and (right := ranks.get(token[cut:])) is not None
    ]
    token_of = {rank: token for token, rank in ranks.items()}
    return [(token_of[left], token_of[right]) for _, left, right in sorted(ways)]


def special_words(tokenizer: Tokenizer) -> dict[str, int]:
    """Return word -> id for tokens of ours that no text contains: special tokens and unused ids.

    Readers of tokenizer.json number such tokens consecutively, so a gap in the ids would move
    end-of-text.
    """
    fillers = {f"<|reserved_{i}|>": i for i in tokenizer.undecodable_ids}
    return dict(sorted((tokenizer.special_tokens | fillers).items(), key=lambda item: item[1]))


def pad_id(tokenizer: Tokenizer) -> int | None:
    """Return the id of padding: one that no text contains if there is one, else end-of-text.

    None if the tokenizer is unknown.

    Padding must not cost a row of the embedding, so the id is one of the vocabulary. transformers
    leaves labels with this id out of the loss, and end-of-text is worth learning.
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.pad_id
    if isinstance(tokenizer, NoTokenizer):
        return None
    if tokenizer.undecodable_ids:
        return tokenizer.undecodable_ids[0]
    never = {t: i for t, i in tokenizer.encoding._mergeable_ranks.items() if NEVER_IN_UTF8 in t}
    return never[NEVER_IN_UTF8] if never.keys() == {NEVER_IN_UTF8} else tokenizer.end_of_text_id


def pad_word(tokenizer: Tokenizer) -> str:
    """Return the token of padding, as tokenizer.json writes it."""
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return tokenizer.word(tokenizer.pad_id)
    return END_OF_TEXT if pad_id(tokenizer) == tokenizer.end_of_text_id else PAD


def _vocabulary(tokenizer: Tokenizer, with_pad: bool = True) -> tuple[dict, dict]:
    """Return (ordinary, added) tokens of tokenizer.json for ours, word -> id in the ids' order.

    The id of padding is `PAD` in both, unless it is end-of-text. with_pad False: as in the files
    that had no padding.
    """
    ranks = tokenizer.encoding._mergeable_ranks
    words = {spell(token): ranks[token] for token in sorted(ranks, key=ranks.__getitem__)}
    added = special_words(tokenizer)
    pad = pad_id(tokenizer)
    if not with_pad or pad is None or pad == tokenizer.end_of_text_id:
        return words, added
    if pad in ranks.values():
        # The library finds the id of an added token among the ordinary ones.
        words = {PAD if i == pad else word: i for word, i in words.items()}
    added = {word: i for word, i in added.items() if i != pad} | {PAD: pad}
    return words, dict(sorted(added.items(), key=lambda item: item[1]))


def _refuse_compact(tokenizer: Tokenizer) -> None:
    """Raise ValueError for a compact vocabulary."""
    if tokenizer.name.endswith(COMPACT):
        base = tokenizer.name.removesuffix(COMPACT)
        raise ValueError(
            f"tokenizer {tokenizer.name} cannot be exported: it spells the tokens of {base} that "
            f"it lacks with others, which no BPE does; prepare the text with --tokenizer {base} "
            "or bpe:SIZE, and train the model to export on that"
        )


def _tokenizer_json(tokenizer: Tokenizer) -> dict:
    """Return the tokenizer.json of a tokenizer of ours, as JSON values."""
    merges, (words, added) = byte_level_merges(tokenizer), _vocabulary(tokenizer)
    start, start_id = next(entry for entry in added.items() if entry[1] == tokenizer.start_id)
    # Oniguruma, which `tokenizers` uses, reads {1,3}+ as a repetition and $ as an end of line.
    # Possessive or not changes no match here.
    pattern = re.sub(r"([+*?]|\{\d+,\d+\})\+", r"\1", tokenizer.encoding._pat_str).replace(
        "$", r"(?![\s\S])"
    )
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": word, **flags} for word, i in added.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": _starting_with(start, start_id),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            # A word that is a token is that token, as in tiktoken. Not where a word is a whole text
            # (bytes, without merges): it could be `PAD`.
            "ignore_merges": bool(merges),
            "vocab": words,
            "merges": [f"{spell(left)} {spell(right)}" for left, right in merges],
        },
    }


def _starting_with(word: str, token_id: int | None) -> dict:
    """Return the post-processor that puts a token before a text, and before each text of a pair."""

    def parts(text: str) -> list[dict]:
        return [
            {"SpecialToken": {"id": word, "type_id": 0}},
            {"Sequence": {"id": text, "type_id": 0}},
        ]

    return {
        "type": "TemplateProcessing",
        "single": parts("A"),
        "pair": parts("A") + parts("B"),
        "special_tokens": {word: {"id": word, "ids": [token_id], "tokens": [word]}},
    }


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, context_length: int, padding_side: str = "left"
) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, and check them.

    With chat ids also chat_template.jinja. The model may have more rows than there are ids.
    padding_side: of our tokenizers; new tokens come on the right. Raise ValueError for a
    compact vocabulary and TokenizerError if the written files give other ids (see check_tokenizer).
    """
    if isinstance(tokenizer, HuggingFaceTokenizer):
        text, config = tokenizer.text, dict(tokenizer.config)
        # transformers 5 calls the class so; version 4 does not know that name.
        if config.get("tokenizer_class") == "TokenizersBackend":
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if not config.get("pad_token"):
            config = {"padding_side": "left"} | config | {"pad_token": pad_word(tokenizer)}
    else:
        text = canonical_json(_tokenizer_json(tokenizer))
        # The class: without one, or with a model's own, transformers 5 cuts words by that class's
        # rule. No clean-up: version 4 would drop spaces.
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],
            "bos_token": END_OF_TEXT,
            "eos_token": END_OF_TEXT if tokenizer.chat is None else CHAT_WORDS[1],
            "pad_token": pad_word(tokenizer),
            "padding_side": padding_side,
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
            OURS: tokenizer.to_state(),
        }
        if tokenizer.chat is not None:
            # transformers 5 reads the file, version 4 the key.
            config["chat_template"] = chat_spellings.JINJA
            write_text_atomic(folder / TEMPLATE_FILE, chat_spellings.JINJA)
    write_text_atomic(folder / TOKENIZER_FILE, text)
    write_text_atomic(folder / CONFIG_FILE, json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    specials = {key: config[key] for key in SPECIALS if config.get(key)}
    specials_text = json.dumps(specials, ensure_ascii=False, indent=2) + "\n"
    write_text_atomic(folder / SPECIALS_FILE, specials_text)
    check_tokenizer(folder, tokenizer)
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        check_start(folder, tokenizer)


def check_start(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise TokenizerError unless the folder's tokenizer.json puts the start token before texts."""
    path = folder / TOKENIZER_FILE
    theirs = load_library_tokenizer(path.read_text(encoding="utf-8"), path)
    for text in ("", "a b"):
        ours, found = [tokenizer.start_id, *tokenizer.encode(text)], theirs.encode(text).ids
        if ours != found:
            raise TokenizerError(
                f"{path} does not start {text!r} as {tokenizer.name} does: it gives {found} "
                f"instead of {ours}"
            )


def check_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    """Raise TokenizerError unless the folder's tokenizer.json agrees with the tokenizer.

    It must have the same tokens, and give the same ids on CHECK_TEXTS and 300 random texts. What it
    puts before a text is not asked: older files of ours put nothing there.
    """
    path = folder / TOKENIZER_FILE
    theirs = load_library_tokenizer(path.read_text(encoding="utf-8"), path)
    theirs.encode_special_tokens = True
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        known = [_vocabulary(tokenizer, with_pad) for with_pad in (True, False)]
        if theirs.get_vocab() not in [words | added for words, added in known]:
            raise TokenizerError(
                f"{path} does not have the tokens of {tokenizer.name} under their ids"
            )
    marks = f"a {END_OF_TEXT}{END_OF_TEXT} b{PAD}{''.join(CHAT_WORDS)}"
    for text in (*CHECK_TEXTS, *_random_texts(300), marks, PAD):
        ours, found = tokenizer.encode(text), theirs.encode(text, add_special_tokens=False).ids
        if ours != found:
            raise TokenizerError(
                f"{path} gives other ids than {tokenizer.name}: for {text[:40]!r} it gives "
                f"{found[:12]} instead of {ours[:12]}"
            )


def _random_texts(count: int) -> list[str]:
    """Return short texts from all of Unicode, always the same: one script each, some with ASCII."""
    rng = random.Random(0)
    texts = []
    for _ in range(count):
        # Blocks of common scripts, of punctuation and emoji, and one anywhere.
        blocks = [0, 0x20, 0x300, 0x900, 0x2000, 0x3000, 0xAC00, 0x1F300, rng.randrange(0x110000)]
        first = rng.choice(blocks)
        last = min(first + 0x200, 0x110000)
        drawn = [
            # From the block, from ASCII, a space, a newline or an apostrophe.
            rng.choice([rng.randrange(first, last), rng.randrange(128), 0x20, 0x0A, 0x27])
            for _ in range(rng.randrange(40))
        ]
        texts.append("".join(chr(c) for c in drawn if not 0xD800 <= c < 0xE000))
    return texts


# ------------------------------------------------------------------------ published tokenizers
class HuggingFaceTokenizer(Tokenizer):
    """A published tokenizer.json: byte-level (GPT-2, Qwen3, gpt-oss) or SentencePiece (Mixtral).

    Special tokens are never found in a text. One like SentencePiece puts a space before every
    text, so decoding what was encoded shows one more at the start. The state carries the file's
    text, and its tokenizer_config.json for the export.
    """

    # What a chat template takes as the time; None: that of the clock. Not part of the state.
    now: datetime.datetime | None = None

    def __init__(self, text: str, config: dict, stop_ids: Sequence[int], start_id: int | None):
        """Read a tokenizer.json. Raise ValueError if it cannot be used here.

        text: as `canonical_json` writes it; stop_ids: all ids that end a completion.
        """
        self.text, self.config = text, config
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.name = f"hf:{self.fingerprint[:12]}"
        self._tokenizer = load_library_tokenizer(text, self.name)
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab()
        self.vocabulary_size = max(vocabulary.values(), default=-1) + 1
        self._token = _token_bytes(json.loads(text), vocabulary, self.name)
        named = [*stop_ids] if start_id is None else [*stop_ids, start_id]
        if not stop_ids or not all(type(i) is int and i in self._token for i in named):
            raise ValueError(
                f"{self.name} has no such ids to stop at and start with: "
                f"{list(stop_ids)}, {start_id}"
            )
        # A chat model's first stop id ends a turn, not a text.
        ends = [i for i in stop_ids if self._token[i] == END_OF_TEXT.encode()]
        self.end_of_text_id = (ends or stop_ids)[0]
        self.stop_ids, self.start_id = tuple(stop_ids), start_id

    @functools.cached_property
    def undecodable_ids(self) -> list[int]:
        """Ids below vocabulary_size without a token."""
        return [i for i in range(self.vocabulary_size) if i not in self._token]

    @functools.cached_property
    def pad_id(self) -> int:
        """The id of padding: its pad_token, or an id that its texts do not need.

        An unknown token is not needed where bytes spell what is unknown (Mixtral). Else it is
        end-of-text.
        """
        if (named := special_id(self.config, "pad_token", self._tokenizer)) is not None:
            return named
        model = json.loads(self.text)["model"]
        unknown = (model.get("byte_fallback") and model.get("unk_token")) or ""
        found = self._tokenizer.token_to_id(unknown)
        # Not stop_ids[0]: a chat model's ends a turn. A published tokenizer always has this id.
        assert self.end_of_text_id is not None
        return self.end_of_text_id if found is None else found

    def word(self, token_id: int) -> str:
        """Return a token as tokenizer.json writes it."""
        return self._tokenizer.id_to_token(token_id)

    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return a text's ids, uint32 [tokens].

        Special tokens' words are plain text; lone surrogates become U+FFFD.
        """
        return np.array(_ids(self._tokenizer, text), dtype=np.uint32)

    def encode_continuation(self, text: str) -> list[int]:
        """Return the ids of a text that continues another: no space is put before it."""
        return _ids(self._inside, text)

    def encode_with_specials(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens' words are these tokens."""
        return _ids(self._knowing_specials, text)

    def guarded(self, text: str) -> str:
        """Return a message's text without words of special tokens: `encode_guarded` knows them.

        Its end cannot become one with what a template writes after it. The same text if there is
        nothing to guard.
        """
        begun = (word[:n] for word in self._special_words for n in range(1, len(word)))
        end = HIDDEN.format("") if text.endswith(tuple(begun)) else ""
        return self._replaced(HIDDEN, text) + end

    def encode_guarded(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens' words are these tokens, or guarded.

        Those are text. Raise ValueError if this tokenizer.json cannot tell them apart.
        """
        text = self._replaced(RESPELLED, text).replace(HIDDEN.format(""), "")
        for i, word in enumerate(self._special_words):
            text = text.replace(HIDDEN.format(i), word)
        return _ids(self._respelling, text)

    def _replaced(self, spelling: str, text: str) -> str:
        """Return a text with another spelling of the words of special tokens."""
        if not self._special_words:
            return text
        numbers = {word: i for i, word in enumerate(self._special_words)}
        # The longest first, as the library finds them.
        words = re.compile("|".join(map(re.escape, numbers)))
        return words.sub(lambda match: spelling.format(numbers[match[0]]), text)

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """Spelling -> id of the special tokens."""
        return {word: self._tokenizer.token_to_id(word) for word in self._special_words}

    @functools.cached_property
    def finds_specials_elsewhere(self) -> bool:
        """Whether it finds special tokens in a normalized text, where their words may not stand."""
        added = json.loads(self.text).get("added_tokens") or []
        return any(token.get("special") and token.get("normalized") for token in added)

    @functools.cached_property
    def _special_words(self) -> list[str]:
        """The words of special tokens, the longest first."""
        added = json.loads(self.text).get("added_tokens") or []
        words = {token["content"] for token in added if token.get("special") and token["content"]}
        return sorted(words, key=lambda word: (-len(word), word))

    @functools.cached_property
    def _respelling(self):
        """The library's tokenizer that knows special tokens by words which no text holds."""
        data = json.loads(self.text)
        names = {word: RESPELLED.format(i) for i, word in enumerate(self._special_words)}
        for token in data["added_tokens"] or []:
            token["content"] = names.get(token["content"], token["content"])
        model = data["model"]
        if isinstance(vocabulary := model.get("vocab"), dict):
            model["vocab"] = {names.get(word, word): i for word, i in vocabulary.items()}
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        library = load_library_tokenizer(canonical_json(data), self.name)
        before, after = self._tokenizer.get_vocab(), library.get_vocab()
        if {names.get(word, word): i for word, i in before.items()} != after:
            raise ValueError(
                f"{self.name} cannot tell a special token's word in a message from the token: "
                "leave such words out of the messages"
            )
        return library

    @functools.cached_property
    def _knowing_specials(self):
        """The library's tokenizer for text that a chat template wrote."""
        return load_library_tokenizer(self.text, self.name)

    @functools.cached_property
    def _inside(self):
        """The library's tokenizer for text that continues another."""
        data = json.loads(self.text)
        if (inside := _without_prefix(data)) is data:
            return self._tokenizer
        library = load_library_tokenizer(canonical_json(inside), self.name)
        library.encode_special_tokens = True
        return library

    def _lookup(self, token_id: int) -> bytes:
        return self._token[token_id]

    def merges(self) -> list[tuple[bytes, bytes]]:
        """Return its merges as bytes, in order. Raise ValueError unless it is a byte-level BPE."""
        data = json.loads(self.text)
        if data["model"].get("type") != "BPE" or not _is_byte_level(data):
            raise ValueError(
                f"tokenizer {self.name} is not a byte-level BPE, so it has no merges of bytes"
            )
        to_byte = byte_of_character()
        pairs = (
            merge.split(" ") if isinstance(merge, str) else merge
            for merge in data["model"]["merges"]
        )
        return [
            (bytes(map(to_byte.__getitem__, left)), bytes(map(to_byte.__getitem__, right)))
            for left, right in pairs
        ]

    def summary(self) -> dict:
        """Return what identifies this tokenizer, as plain JSON values."""
        return super().summary() | {"start_id": self.start_id, "stop_ids": list(self.stop_ids)}

    def to_state(self) -> dict:
        """Return all that `from_state` needs, as plain JSON values."""
        return self.summary() | {"tokenizer_json": self.text, "tokenizer_config": self.config}

    def __reduce__(self):
        # The library's own pickle forgets that special tokens are text.
        return HuggingFaceTokenizer, (self.text, self.config, self.stop_ids, self.start_id)


def from_state(state: dict) -> HuggingFaceTokenizer:
    """Return the tokenizer that `to_state` described. Raise ValueError if it is malformed."""
    text, config = state.get("tokenizer_json"), state.get("tokenizer_config")
    stop_ids = state.get("stop_ids")
    if not isinstance(text, str) or not isinstance(config, dict) or not isinstance(stop_ids, list):
        raise ValueError(
            f"the stored tokenizer {state['name']} is damaged: "
            "its tokenizer.json or stop_ids are missing"
        )
    try:
        return HuggingFaceTokenizer(text, config, stop_ids, state.get("start_id"))
    except json.JSONDecodeError:
        raise ValueError(
            f"the stored tokenizer {state['name']} is damaged: its tokenizer.json is not JSON"
        ) from None


def special_id(config: dict, key: str, library) -> int | None:
    """Return the id of a special token in tokenizer_config.json, given as word or description."""
    word = config.get(key)
    word = word.get("content") if isinstance(word, dict) else word
    if word is not None and not isinstance(word, str):
        raise ValueError(f"{CONFIG_FILE}: {key} must be a token's word or null, not {word!r}")
    return library.token_to_id(word) if word else None


def canonical_json(data: dict) -> str:
    """Return JSON in one fixed spelling, so that its digest identifies a tokenizer."""
    return json.dumps(data, ensure_ascii=False, sort_keys=True, separators=(",", ":"))


def load_library_tokenizer(text: str, where: object):
    """Return the library's tokenizer of a tokenizer.json. Raise a one-line ValueError."""
    library = _library()
    try:
        return library.Tokenizer.from_str(text)
    except Exception as error:
        # The library raises nothing narrower.
        raise ValueError(
            f"{where} cannot be used as a tokenizer: {' '.join(str(error).split())[:200]}"
        ) from None


def _ids(library, text: str) -> list[int]:
    """Return the library's ids of a text; lone surrogates become U+FFFD."""
    try:
        return library.encode(text, add_special_tokens=False).ids
    except TypeError:
        # What the library raises for a surrogate.
        return library.encode(without_surrogates(text), add_special_tokens=False).ids


def _without_prefix(data: dict) -> dict:
    """Return a tokenizer.json that puts no space before a text.

    Only the first pre-tokenizer changes: later ones see pieces of a text, and their spaces stay.
    """
    normalizers = [step for step in _steps(data, "normalizer") if step.get("type") != "Prepend"]
    splitters = _steps(data, "pre_tokenizer")
    if splitters and ("add_prefix_space" in splitters[0] or splitters[0]["type"] == "Metaspace"):
        # Older files of Metaspace also have add_prefix_space.
        plain = {key: value for key, value in splitters[0].items() if key != "add_prefix_space"}
        if plain["type"] == "Metaspace":
            first = plain | {"prepend_scheme": "never"}
        else:
            first = plain | {"add_prefix_space": False}
        splitters = [first, *splitters[1:]]
    if (normalizers, splitters) == (_steps(data, "normalizer"), _steps(data, "pre_tokenizer")):
        return data
    return data | {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": splitters},
    }


def _steps(data: dict, part: str) -> list[dict]:
    """Return the steps of tokenizer.json's normalizer, pre_tokenizer or decoder."""
    step = data.get(part)
    if not step:
        return []
    # A sequence has its steps under one of these names; anything else is itself the only step.
    steps = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}
    return step.get(steps[part], [step])


def _is_byte_level(data: dict) -> bool:
    return any(step.get("type") == "ByteLevel" for step in _steps(data, "decoder"))


def _token_bytes(data: dict, vocabulary: dict[str, int], name: str) -> dict[int, bytes]:
    """Return bytes by id. Raise ValueError unless byte-level or with SentencePiece's spaces."""
    if _is_byte_level(data):
        to_byte = byte_of_character()

        def read(word: str) -> bytes:
            if to_byte.keys() >= set(word):
                return bytes(map(to_byte.__getitem__, word))
            return word.encode()

    elif any(
        SPACE in (step.get("replacement"), (step.get("pattern") or {}).get("String"))
        for step in _steps(data, "decoder")
    ):

        def read(word: str) -> bytes:
            is_byte = data["model"].get("byte_fallback") and re.fullmatch("<0x[0-9A-F]{2}>", word)
            return bytes([int(word[3:5], 16)]) if is_byte else word.replace(SPACE, " ").encode()
    else:
        raise ValueError(
            f"{name} decodes in a way that is not supported here: its vocabulary must be "
            f"byte-level or write {SPACE} for a space"
        )
    added = {token["content"] for token in data.get("added_tokens") or []}
    return {i: word.encode() if word in added else read(word) for word, i in vocabulary.items()}
