"""The registry of tokenizers: find, train and restore them by name, path or saved state.

A kind of tokenizer is one entry of KINDS. Above that table are the functions of each kind, below it
what others call.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import importlib.util
import json
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tiktoken
import tiktoken.load

from runtime.base.files import read_json_object
from runtime.data import hf_tokenizer
from runtime.data.bpe_trainer import train_merges
from runtime.data.chat import with_chat
from runtime.data.hf_tokenizer import (
    CONFIG_FILE,
    OURS,
    TEMPLATE_FILE,
    TOKENIZER_FILE,
    HuggingFaceTokenizer,
    canonical_json,
    check_tokenizer,
    load_library_tokenizer,
    special_id,
)
from runtime.data.shards import MANIFEST, TokenShards
from runtime.data.tokenizer import (
    BYTE_PATTERN,
    COMPACT,
    IMPORTED,
    NAMED,
    NONE,
    STATE_FILE,
    WORD_PATTERN,
    CompactTokenizer,
    NoTokenizer,
    Tokenizer,
    byte_of_character,
    encoding_of,
    without_surrogates,
)

if TYPE_CHECKING:
    from runtime.checkpoint.format import Checkpoint


# ------------------------------------------------------------------------ published, byte
# What tiktoken downloads for each.
PUBLISHED_FILES = {
    "o200k_base": ("o200k_base.tiktoken",),
    "gpt2": ("vocab.bpe", "encoder.json"),
    "cl100k_base": ("cl100k_base.tiktoken",),
}
_reading_plain_names = threading.Lock()


def _load_published(name: str) -> Tokenizer:
    """Return a published vocabulary. Raise a one-line ValueError if it cannot be downloaded."""
    other: list[Path] = []
    try:
        with _plain_names_too(other):
            return Tokenizer(name, tiktoken.get_encoding(name))
    except (OSError, ValueError) as error:
        # requests' errors are OSErrors; a wrong hash is a ValueError.
        reason = " ".join(str(error).split())[:160]
        damaged = "".join(f"{path} is another file or damaged; " for path in other)
        raise ValueError(
            f"the vocabulary {name} could not be downloaded ({type(error).__name__}: {reason}): "
            f"{damaged}set TIKTOKEN_CACHE_DIR to a folder with "
            f"{' and '.join(PUBLISHED_FILES[name])}, or prepare the text with "
            "--tokenizer byte or --tokenizer bpe:8192, which need no network"
        ) from None


@contextlib.contextmanager
def _plain_names_too(other: list[Path]) -> Iterator[None]:
    """Let tiktoken read a file of TIKTOKEN_CACHE_DIR under its plain name as well.

    tiktoken looks for the SHA-1 of the file's address only, a name that nobody expects. Its own
    check of the content stays: a file that fails it goes to `other`, and is not read.
    """
    folder, read = os.environ.get("TIKTOKEN_CACHE_DIR"), tiktoken.load.read_file_cached

    def read_plain_too(blobpath: str, expected_hash: str | None = None) -> bytes:
        cached = Path(folder or "", hashlib.sha1(blobpath.encode()).hexdigest())
        plain = Path(folder or "", blobpath.rpartition("/")[2])
        if folder and not cached.exists() and plain.is_file():
            content = plain.read_bytes()
            if expected_hash is None or tiktoken.load.check_hash(content, expected_hash):
                return content
            other.append(plain)
        return read(blobpath, expected_hash)

    with _reading_plain_names:
        tiktoken.load.read_file_cached = read_plain_too
        try:
            yield
        finally:
            tiktoken.load.read_file_cached = read


def _load_byte(name: str) -> Tokenizer:
    """Return the 256 bytes and end-of-text = 256."""
    return Tokenizer(name, encoding_of(name, [bytes([b]) for b in range(256)], BYTE_PATTERN))


# ------------------------------------------------------------------------ compact
def compacted(base: Tokenizer, used: Iterable[int]) -> CompactTokenizer:
    """Return a published vocabulary with the ids `used`, the 256 bytes and end-of-text only.

    Any text may need the bytes and end-of-text.
    """
    return CompactTokenizer(base, sorted(_always_kept(base).union(map(int, used))))


def _always_kept(base: Tokenizer) -> set[int]:
    ranks = base.encoding._mergeable_ranks
    assert base.end_of_text_id is not None
    return {*(ranks[bytes([b])] for b in range(256)), base.end_of_text_id}


def _check_compact(name: str) -> None:
    """Raise ValueError unless `name` is a published vocabulary's compact form."""
    if name.removesuffix(COMPACT) not in NAMED:
        raise ValueError(
            f"tokenizer {name!r}: only {', '.join(NAMED)} have a {COMPACT} form; "
            "byte and bpe:SIZE have few ids that a text does not use"
        )


def _restore_compact(state: dict) -> CompactTokenizer:
    """Return a compact tokenizer from its state.

    Raise ValueError unless the base is the same and the ids are ones that `compacted` makes.
    """
    base = _load_published(state["name"].removesuffix(COMPACT))
    if state.get("base_fingerprint") != base.fingerprint:
        raise ValueError(
            f"the stored tokenizer {state['name']} was made from another {base.name} "
            "than the one found here"
        )
    ids = state.get("base_ids")
    known = {*base.encoding._mergeable_ranks.values(), base.end_of_text_id}
    if (
        not isinstance(ids, list)
        or not all(type(i) is int for i in ids)
        or ids != sorted(set(ids))
        or not _always_kept(base) <= set(ids) <= known
    ):
        raise ValueError(
            f"the stored tokenizer {state['name']} is damaged: its base_ids must be ascending ids "
            f"of tokens of {base.name}, with all 256 bytes and end-of-text"
        )
    return CompactTokenizer(base, ids)


# ------------------------------------------------------------------------ bpe:SIZE
# 256 bytes and end-of-text; far above any useful size.
SMALLEST_BPE, LARGEST_BPE = 257, 1_000_000
# A BPE is trained on at most this much text, from the start of the corpus.
BPE_SAMPLE_CHARACTERS = 1 << 28
# Training takes time quadratic in a word's length, so there a longer run of letters, of punctuation
# or of white space is cut. Encoding does not cut: tiktoken merges a long word in n log n.
BPE_RUN_CHARACTERS = 256


def bpe_size(name: str) -> int:
    """Return SIZE of `bpe:SIZE`. Raise ValueError if it is not a number or out of range."""
    digits = name.removeprefix("bpe:")
    if not (
        digits.isascii()
        and digits.isdigit()
        and len(digits) < 10
        and SMALLEST_BPE <= int(digits) <= LARGEST_BPE
    ):
        raise ValueError(
            f"tokenizer {name!r}: SIZE of bpe:SIZE must be a whole number "
            f"from {SMALLEST_BPE} (256 bytes and end-of-text) to {LARGEST_BPE:,}"
        )
    return int(digits)


def training_pattern() -> str:
    """Return WORD_PATTERN for training: each run has at most BPE_RUN_CHARACTERS characters."""
    pattern = WORD_PATTERN
    for times, least in ("*", 0), ("+", 1):
        # After a class of characters: the pattern has no other repetition without a limit.
        pattern = re.sub(rf"(?<=[\]s])\{times}", f"{{{least},{BPE_RUN_CHARACTERS}}}", pattern)
    return pattern


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Return a byte-level BPE of `size` ids (256 bytes, merges, end-of-text), trained on `texts`.

    The same texts give the same ids. The `tokenizers` library trains it, tiktoken runs it. At most
    BPE_SAMPLE_CHARACTERS of text are read, from the start; memory grows only with the number of
    distinct words in them. Progress is shown on a terminal. Raise ValueError if too few pairs occur
    twice in the text.
    """
    name = f"bpe:{size}"
    bpe_size(name)
    if importlib.util.find_spec("tokenizers") is None:
        raise ValueError(f"training {name} needs the tokenizers library: pip install tokenizers")
    merges = train_merges(_sample(texts), size - 1, training_pattern())

    to_byte = byte_of_character()
    tokens = [bytes([b]) for b in range(256)]
    for pair in merges:
        tokens.append(bytes(to_byte[character] for character in "".join(pair)))
    # Two merges can spell one token: it has one id.
    tokens = list(dict.fromkeys(tokens))
    if len(tokens) + 1 < size:
        raise ValueError(
            f"this text is too small for --tokenizer {name}: it gives at most {len(tokens) + 1:,} "
            f"ids; use bpe:{len(tokens) + 1} or less, or more text"
        )
    return _bpe_tokenizer(name, tokens)


def _sample(texts: Iterable[str]) -> Iterator[str]:
    """Yield the first BPE_SAMPLE_CHARACTERS of text; replace lone surrogates as encoding does."""
    left = BPE_SAMPLE_CHARACTERS
    for text in texts:
        yield without_surrogates(text[:left])
        left -= len(text)
        if left <= 0:
            return


def _restore_bpe(state: dict) -> Tokenizer:
    """Return a trained BPE from its state. Raise ValueError if its tokens are damaged."""
    try:
        tokens = [base64.b64decode(token, validate=True) for token in state["tokens"]]
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise ValueError(
            f"the stored tokenizer {state['name']} is damaged: its tokens cannot be read"
        ) from None
    return _bpe_tokenizer(state["name"], tokens)


def _bpe_tokenizer(name: str, tokens: list[bytes]) -> Tokenizer:
    """Return a trained BPE from its tokens by id.

    Raise ValueError unless they are the 256 bytes, then distinct, longer tokens.
    """
    if (
        len(tokens) + 1 != bpe_size(name)
        or tokens[:256] != [bytes([b]) for b in range(256)]
        or len(set(tokens)) < len(tokens)
        or b"" in tokens
    ):
        raise ValueError(
            f"the stored tokenizer {name} is damaged: it must be all 256 bytes, then distinct "
            f"tokens, {name.removeprefix('bpe:')} with end-of-text"
        )
    return Tokenizer(name, encoding_of(name, tokens, WORD_PATTERN))


# ------------------------------------------------------------------------ the table
@dataclass(frozen=True)
class Kind:
    """One kind of tokenizer, found by its name."""

    # Return whether a name is of this kind.
    owns: Callable[[str], bool]
    # Return the tokenizer that a state describes; raise ValueError if it is damaged.
    restore: Callable[[dict], Tokenizer]
    # Raise ValueError for a name of this kind that cannot be made.
    check: Callable[[str], object] = lambda name: None
    # Return the tokenizer from its name alone; None: it must be read from a folder.
    load: Callable[[str], Tokenizer] | None = None
    # What an error line says of a tokenizer without its folder.
    origin: str = "is made from a text: give the folder that prepare_data.py saved it in"


# The first kind that owns a name counts: o200k_base:compact, bpe:SIZE, hf:DIGEST, byte, o200k_base.
KINDS = (
    Kind(lambda name: name.endswith(COMPACT), _restore_compact, check=_check_compact),
    Kind(lambda name: name.startswith("bpe:"), _restore_bpe, check=bpe_size),
    Kind(
        lambda name: name.startswith(IMPORTED),
        hf_tokenizer.from_state,
        origin="comes with a model: give the folder or checkpoint that has it",
    ),
    Kind(lambda name: name == "byte", lambda state: _load_byte(state["name"]), load=_load_byte),
    Kind(
        lambda name: name in NAMED,
        lambda state: _load_published(state["name"]),
        load=_load_published,
    ),
)


def _kind_of(name: str) -> Kind:
    """Return the kind of a name that can be made here. Raise ValueError for any other name."""
    for kind in KINDS:
        if kind.owns(name):
            kind.check(name)
            return kind
    raise ValueError(
        f"tokenizer {name!r} is not one of {', '.join(NAMED)}, byte, bpe:SIZE, "
        f"or one of the first {len(NAMED)} followed by {COMPACT}"
    )


# ------------------------------------------------------------------------ by name, by state
def check_name(name: str) -> None:
    """Raise ValueError unless `name` is a tokenizer that can be made here. Reads nothing."""
    _kind_of(name)


def load_tokenizer(name: str, folder: str | Path | None = None) -> Tokenizer:
    """Return a tokenizer by name. Raise ValueError.

    o200k_base, gpt2 and cl100k_base come from tiktoken, which downloads the vocabulary once and
    checks its hash. `byte` is 256 bytes and end-of-text = 256. `bpe:SIZE` and `NAME:compact` are
    read from `folder`, next to the shards of the text that they were made from.
    """
    kind = _kind_of(name)
    if kind.load is not None:
        return kind.load(name)
    if folder is None:
        raise ValueError(f"tokenizer {name} {kind.origin}")
    path = Path(folder) / STATE_FILE
    try:
        tokenizer = tokenizer_from_state(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ValueError(
            f"{path} does not exist: prepare_data.py --tokenizer {name} writes it"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ValueError(f"{path} is damaged: run prepare_data.py again") from None
    if tokenizer.name != name:
        raise ValueError(f"{path} holds {tokenizer.name}, not {name}")
    return tokenizer


def tokenizer_from_state(state: dict) -> Tokenizer:
    """Return the tokenizer that `to_state` described.

    Raise ValueError if the state is malformed or the vocabulary found here is another one.
    """
    if not isinstance(state, dict) or not isinstance(state.get("name"), str):
        raise ValueError("the stored tokenizer is damaged: it has no name")
    name = state["name"]
    tokenizer = _kind_of(name).restore(state)
    if "chat" in state:
        tokenizer = with_chat(tokenizer)
    for key, value in tokenizer.summary().items():
        if state.get(key) != value:
            raise ValueError(
                f"the stored tokenizer {name} is not the {name} found here: "
                f"its {key} is {state.get(key)!r}, here it is {value!r}"
            )
    return tokenizer


# ------------------------------------------------------------------------ by path, by checkpoint
def tokenizer_of(checkpoint: Checkpoint, name: str = "") -> Tokenizer:
    """Return the checkpoint's tokenizer; `name` (see named_tokenizer) is for one without it.

    "none": token ids instead of text. Raise ValueError if they do not fit.
    """
    path, vocabulary = checkpoint.path, checkpoint.model_config.vocabulary_size
    if checkpoint.tokenizer_state:
        tokenizer = tokenizer_from_state(checkpoint.tokenizer_state)
        known = (tokenizer.fingerprint, tokenizer.base_fingerprint)
        if name == NONE or (name and named_tokenizer(name).fingerprint not in known):
            raise ValueError(
                f"{path} was trained with tokenizer {tokenizer.name}, not {name}: "
                "leave --tokenizer out"
            )
    elif name == NONE:
        tokenizer = NoTokenizer(vocabulary)
    # The original implementation's checkpoints name no tokenizer: it is always o200k_base.
    elif name or vocabulary == 200_019:
        tokenizer = named_tokenizer(name or "o200k_base")
    else:
        raise ValueError(
            f"{path} does not say which tokenizer it was trained with "
            f"(vocabulary {vocabulary:,}): name it with --tokenizer, or say --tokenizer none "
            "to read and write token ids"
        )
    if tokenizer.vocabulary_size > vocabulary:
        raise ValueError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocabulary_size:,} ids, the model in "
            f"{path} only {vocabulary:,}: use the tokenizer that it was trained with"
        )
    return tokenizer


def named_tokenizer(name: str) -> Tokenizer:
    """Return the tokenizer called `name` or found at that path. Raise ValueError.

    A path is a folder with shards (data or data/train), a published model's folder, or a
    checkpoint, whose weights are not read.
    """
    if name in (*NAMED, "byte") or not os.path.exists(name):
        return load_tokenizer(name)
    folder = Path(name)
    if folder.is_file():
        # Here, so that preparing text loads no torch.
        from runtime.checkpoint.format import CheckpointError
        from runtime.checkpoint.read import read_header, unpack

        contents, _ = unpack(folder, read_only=True)
        try:
            state = read_header(contents)["tokenizer"] if "format" in contents else None
            if not state:
                raise ValueError("does not say which tokenizer it was trained with")
            return tokenizer_from_state(state)
        except ValueError as error:
            raise CheckpointError(folder, error) from error
    if (
        not any((place / MANIFEST).exists() for place in (folder, folder / "train"))
        and (folder / hf_tokenizer.TOKENIZER_FILE).exists()
    ):
        return read_tokenizer(folder)
    shards = TokenShards(folder if (folder / MANIFEST).exists() else folder / "train", verify=False)
    return tokenizer_from_state(shards.tokenizer_state)


def read_tokenizer(folder: str | Path) -> Tokenizer:
    """Return the tokenizer of a published model's folder. Raise ValueError if there is none.

    It is one of ours if write_tokenizer made the files, nobody changed them since, and ours can be
    loaded here: the files also work without o200k_base's own, which tiktoken downloads.

    Stop ids are eos_token_id of generation_config.json, else of config.json, else the eos_token of
    tokenizer_config.json. The start id is what tokenizer.json puts before a text, or bos_token if
    add_bos_token says so.
    """
    folder = Path(folder)
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {TOKENIZER_FILE}: in transformers, "
            "AutoTokenizer.from_pretrained(...).save_pretrained(...) writes it from other formats"
        )
    data, config = read_json_object(path), read_json_object(folder / CONFIG_FILE, {})
    if OURS in config:
        try:
            ours = tokenizer_from_state(config[OURS])
            check_tokenizer(folder, ours)
            return ours
        except ValueError:
            # Somebody added tokens, for example: it is a tokenizer of its own, whose texts start
            # with bos_token as ours do.
            config = {key: value for key, value in config.items() if key != OURS} | {
                "add_bos_token": True
            }
    if "model" not in data:
        raise ValueError(
            f"{path} is not a tokenizer.json of the tokenizers library: no model in it"
        )
    try:
        if (folder / TEMPLATE_FILE).is_file():
            config = config | {
                "chat_template": (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
            }
        # JSON can spell a lone surrogate, and no export could write it.
        canonical_json(config).encode()
    except UnicodeError:
        raise ValueError(
            f"{folder}: {CONFIG_FILE} or {TEMPLATE_FILE} is not valid UTF-8 text "
            "(a lone surrogate such as \\ud800?)"
        ) from None
    text = canonical_json(data | {"truncation": None, "padding": None})
    library = load_library_tokenizer(text, path)
    if isinstance(says := config.get("add_bos_token"), bool):
        start_id = special_id(config, "bos_token", library) if says else None
    else:
        framed, plain = (
            library.encode("a", add_special_tokens=special).ids for special in (True, False)
        )
        start_id = framed[0] if framed[: len(plain)] != plain else None
    return HuggingFaceTokenizer(text, config, _stop_ids(folder, config, library), start_id)


def _stop_ids(folder: Path, config: dict, library) -> list[int]:
    """Return a published model's ids that end a text. Raise ValueError if it names none."""
    for name in ("generation_config.json", "config.json"):
        if (ids := read_json_object(folder / name, {}).get("eos_token_id")) is not None:
            return ids if isinstance(ids, list) else [ids]
    if (end := special_id(config, "eos_token", library)) is None:
        raise ValueError(
            f"{folder} does not say which id ends a text: generation_config.json or config.json "
            f"needs eos_token_id, or {CONFIG_FILE} eos_token"
        )
    return [end]
