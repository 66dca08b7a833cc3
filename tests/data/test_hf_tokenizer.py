"""runtime/data/hf_tokenizer.py: tokenizer.json gives our ids in `tokenizers` and transformers.

A published one is used as it is.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import tiktoken
import tiktoken_ext.openai_public as published

from config_model import PredictConfig
from runtime.data import hf_tokenizer as module
from runtime.data.hf_tokenizer import (
    OURS,
    SPACE,
    HuggingFaceTokenizer,
    TokenizerError,
    byte_level_merges,
    check_tokenizer,
    write_tokenizer,
)
from runtime.data.tokenizer import (
    WORD_PATTERN,
    Tokenizer,
    TokenStream,
    byte_of_character,
    encoding_of,
    spell,
)
from runtime.data.tokenizers import (
    compacted,
    load_tokenizer,
    read_tokenizer,
    tokenizer_from_state,
    train_bpe,
)
from runtime.inference.predictor import Completion
from tests.builders_inference import (
    biased_model,
    draw_given_ids,
    predict_with,
    predictor_of,
    repl_with,
    save,
)
from tests.builders_tokenizer import stand_in, write_folder

BYTE = load_tokenizer("byte")
FILES = (module.TOKENIZER_FILE, module.CONFIG_FILE, module.SPECIALS_FILE)
FAMILIES = {
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
}
SPECIAL_TEXT = "a <|endoftext|>b<|reserved_3|> <|endofprompt|>"


@pytest.fixture
def run(capsys):
    return predict_with(capsys)


@pytest.fixture
def drawn(monkeypatch):
    return draw_given_ids(monkeypatch)


@pytest.fixture
def repl(monkeypatch, capsys):
    return repl_with(monkeypatch, capsys)


def library(folder: Path):
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(folder / module.TOKENIZER_FILE))


def ids_of(theirs, text: str) -> list[int]:
    return theirs.encode(text, add_special_tokens=False).ids


def auto_tokenizer(folder: Path, family: str):
    """What transformers makes of the folder, as part of a model of that family."""
    from transformers import AutoTokenizer

    (folder / "config.json").write_text(
        json.dumps({"model_type": family, "architectures": [FAMILIES[family]]})
    )
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def odd() -> list[str]:
    """Return odd texts: the check's, other random ones, every kind of run.

    Also contractions in any case before any letter.
    """
    rng = random.Random(7)
    runs = [
        unit * count
        for unit in (" ", "\n", "\t", "a", "A", "=", "/", "é", "世", "0", "ab", " \n", "'s")
        for count in (1, 2, 3, 4, 5, 7, 16, 31, 64, 65, 127, 200)
    ]
    letters = [chr(rng.randrange(0x21, 0x3000)) for _ in range(300)] + list("sStTmMdDrRlLvVſK")
    contractions = [
        f"{rng.choice('aAéǅ世1 ')}'{letter}{rng.choice(['', 'e', 'L', 'll', 's', ' '])}"
        for letter in letters
        for _ in range(2)
    ]
    return [*module.CHECK_TEXTS, *module._random_texts(1500)[300:], *runs, *contractions]


@pytest.fixture(scope="module")
def bpe(tales) -> Tokenizer:
    return train_bpe(tales[:400], 2000)


@pytest.fixture(scope="module")
def o200k_folder(o200k, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("o200k_json")
    write_tokenizer(load_tokenizer("o200k_base"), folder, 1024)
    return folder


@pytest.fixture
def bpe_folder(bpe, tmp_path) -> Path:
    folder = tmp_path / "bpe"
    write_tokenizer(bpe, folder, 64)
    return folder


# --------------------------------------------------------------------------------------------- ours
@pytest.mark.nightly
@pytest.mark.slow
def test_o200k_in_the_library(o200k_folder, tales, odd):
    """Thousands of texts, and every id.

    The hole at 199,998 made end-of-text 199,998 in other converters, so a model never stopped.
    """
    ours, theirs = load_tokenizer("o200k_base"), library(o200k_folder)
    for text in [*tales, *odd]:
        assert ids_of(theirs, text) == ours.encode(text), text[:80]
    assert theirs.get_vocab_size() == 200_019 and sorted(theirs.get_vocab().values()) == list(
        range(200_019)
    )
    assert (theirs.token_to_id("<|endoftext|>"), theirs.token_to_id("<|endofprompt|>")) == (
        199_999,
        200_018,
    )
    # Of no token: padding takes it.
    assert theirs.id_to_token(199_998) == "<|pad|>"
    assert all(theirs.id_to_token(i) == spell(ours.token_bytes(i)) for i in range(199_998))


@pytest.mark.nightly
@pytest.mark.slow
def test_every_character_in_o200k(o200k_folder):
    """Two engines with their own Unicode tables cut words.

    No character of the lower planes may have different classes in them.
    """
    ours, theirs = load_tokenizer("o200k_base"), library(o200k_folder)
    characters = [
        chr(c) for c in (*range(0xD800), *range(0xE000, 0x11000), *range(0x11000, 0x110000, 31))
    ]
    for context in ("a{}b's {} 1{}", "{0}{0} A{0}a\n"):
        # Some at a time: the call costs more than the text.
        for start in range(0, len(characters), 16):
            text = "".join(context.format(*[c] * 3) for c in characters[start : start + 16])
            assert ids_of(theirs, text) == ours.encode(text), [
                hex(ord(c)) for c in characters[start : start + 16]
            ]


@pytest.mark.parametrize("name", ["byte", "bpe", "o200k"])
def test_transformers_gives_the_same_ids(name, bpe, tales, odd, tmp_path, o200k_folder):
    """Another tokenizer_class would have cut words by Qwen's rule or Llama's.

    (qwen3_moe and mixtral.)
    """
    ours = {"byte": BYTE, "bpe": bpe, "o200k": load_tokenizer("o200k_base")}[name]
    if name == "o200k":
        shutil.copytree(o200k_folder, tmp_path, dirs_exist_ok=True)
    else:
        write_tokenizer(ours, tmp_path, 64)
    texts = tales[:300] + odd[::3]
    expected = [ours.encode(text) for text in texts]
    for family in FAMILIES if name == "bpe" else ["qwen3_moe"]:
        theirs = auto_tokenizer(tmp_path, family)
        assert theirs(texts, add_special_tokens=False).input_ids == expected
        # As in training, a text begins with the start token.
        assert theirs(texts).input_ids == [[ours.start_id, *ids] for ids in expected]
        assert theirs.batch_decode(expected[::5]) == [ours.decode(ids) for ids in expected[::5]]
        assert (
            len(theirs) == ours.vocabulary_size
            and theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text_id
        )
        assert (
            theirs.model_max_length == (1024 if name == "o200k" else 64)
            and (theirs.pad_token, theirs.pad_token_id) == ("<|pad|>", module.pad_id(ours))
            and theirs.padding_side == "left"
        )
    # To transformers it is the token, unless it gets the flag that we always give.
    plain = dict(add_special_tokens=False)
    assert theirs(SPECIAL_TEXT, **plain).input_ids.count(ours.end_of_text_id) == 1
    assert theirs(SPECIAL_TEXT, split_special_tokens=True, **plain).input_ids == ours.encode(
        SPECIAL_TEXT
    )
    assert theirs.decode([ours.end_of_text_id], skip_special_tokens=True) == ""


UNUSED = {"byte": 255, "bpe": 255, "o200k": 199_998}


@pytest.mark.parametrize("name", UNUSED)
def test_padding_is_an_id_that_no_text_has(name, bpe, tales, odd, o200k):
    """Padding as end-of-text would leave the ends of texts out of Trainer's labels.

    Byte 0xFF is in no UTF-8 text. o200k_base has ids without a token.
    """
    ours = {"byte": BYTE, "bpe": bpe, "o200k": load_tokenizer("o200k_base")}[name]
    assert module.pad_id(ours) == UNUSED[name] != ours.end_of_text_id
    text = "".join(chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000)
    texts = [*tales[:200], *odd, text, "\udcff\ud800", "\N{LATIN SMALL LETTER Y WITH DIAERESIS}"]
    assert not any((ours.encode_to_numpy(each) == UNUSED[name]).any() for each in texts)


def test_padding_is_end_of_text_where_every_id_has_a_use(tmp_path):
    """A vocabulary with a token of bytes 0xFF may need that byte: then there is no unused id."""
    tokens = [bytes([b]) for b in range(256)] + [b"\xff\xff"]
    ours = Tokenizer("bpe:258", encoding_of("bpe:258", tokens, WORD_PATTERN))
    assert (module.pad_id(ours), module.pad_word(ours)) == (257, "<|endoftext|>")
    write_tokenizer(ours, tmp_path, 64)
    assert auto_tokenizer(tmp_path, "qwen3_moe").pad_token_id == 257
    assert read_tokenizer(tmp_path).to_state() == ours.to_state()


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_the_file_puts_the_start_before_a_text(name, bpe, tmp_path):
    """Without it, pipeline("text-generation") continued other texts than predict.py."""
    ours = {"byte": BYTE, "bpe": bpe}[name]
    write_tokenizer(ours, tmp_path, 64)
    theirs, start = library(tmp_path), ours.start_id
    for text in ("", "a b", "a<|pad|><|endoftext|>"):
        assert theirs.encode(text, add_special_tokens=False).ids == ids_of(theirs, text)
        assert theirs.encode(text).ids == [start, *ids_of(theirs, text)]
    assert theirs.encode("a", "b").ids == [start, *ours.encode("a"), start, *ours.encode("b")]
    path = tmp_path / module.TOKENIZER_FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | {"post_processor": None}), encoding="utf-8")
    with pytest.raises(TokenizerError, match="does not start '' as"):
        module.check_start(tmp_path, ours)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_files_from_before_padding_are_still_ours(name, bpe, tmp_path):
    """Folders without padding and start, as they were written before, import as what they were."""
    ours = {"byte": BYTE, "bpe": bpe}[name]
    write_tokenizer(ours, tmp_path, 64)
    path = tmp_path / module.TOKENIZER_FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    words = data["model"]["vocab"]
    words["\N{LATIN SMALL LETTER Y WITH DIAERESIS}"] = words.pop("<|pad|>")
    data["post_processor"] = None
    data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] != 255]
    path.write_text(json.dumps(data), encoding="utf-8")
    again = read_tokenizer(tmp_path)
    assert again.to_state() == ours.to_state() and type(again) is Tokenizer


def test_a_text_may_be_the_word_of_padding(bpe, tmp_path):
    """The library took the text <|pad|> for padding: with bytes, a whole text is one word."""
    for ours in (BYTE, bpe):
        write_tokenizer(ours, tmp_path, 64)
        theirs = library(tmp_path)
        theirs.encode_special_tokens = True
        assert ids_of(theirs, "<|pad|>") == ours.encode("<|pad|>")


@pytest.mark.parametrize(
    "name, pad_token, word",
    [("mixtral", None, "<unk>"), ("mixtral", "</s>", "</s>"), ("qwen", None, "<|endoftext|>")],
)
def test_a_published_tokenizer_without_padding_gets_it(name, pad_token, word, request, tmp_path):
    """Mixtral names none, so that its batches fail: bytes spell what it does not know, so <unk>
    is in no text. A token that the publisher chose stays.
    """
    shutil.copytree(request.getfixturevalue(name), tmp_path / "a")
    path = tmp_path / "a" / module.CONFIG_FILE
    config = json.loads(path.read_text()) | {"pad_token": pad_token}
    path.write_text(json.dumps(config))
    ours = read_tokenizer(tmp_path / "a")
    write_tokenizer(ours, tmp_path / "b", 64)
    theirs = auto_tokenizer(tmp_path / "b", {"mixtral": "mixtral", "qwen": "qwen3_moe"}[name])
    assert (theirs.pad_token, theirs.pad_token_id) == (word, module.pad_id(ours))
    short, long = theirs(["a", "a b c d"], padding=True)["attention_mask"]
    # Where the publisher chose the token, its side stays too: right, which is the default.
    assert short[0 if pad_token is None else -1] == 0 and all(long)


def test_special_words_in_the_library(bpe_folder, bpe):
    theirs = library(bpe_folder)
    assert ids_of(theirs, "a<|endoftext|>b") == [
        *bpe.encode("a"),
        bpe.end_of_text_id,
        *bpe.encode("b"),
    ]
    theirs.encode_special_tokens = True
    assert ids_of(theirs, SPECIAL_TEXT) == bpe.encode(SPECIAL_TEXT)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "cl100k_base"])
def test_the_other_published_vocabularies_cut_words_as_tiktoken_does(
    name, monkeypatch, tales, odd, tmp_path
):
    """Their real rules, with a stand-in's tokens.

    {1,3}+ is possessive to tiktoken and "threes, repeated" to the library; $ ends a text or a line.
    """
    monkeypatch.setattr(published, "load_tiktoken_bpe", lambda *a, **k: {})
    monkeypatch.setattr(published, "data_gym_to_mergeable_bpe_ranks", lambda *a, **k: {})
    pattern = getattr(published, name)()["pat_str"]
    digits_and_space = [
        f"{i:0{n}}".encode() for n in (2, 3, 4, 5) for i in range(0, 10**n, 7 ** (n - 2) * 3)
    ] + [b"\n  ", b"  ", b"\n\n", b" \n"]
    base = stand_in(
        [token for token in digits_and_space if token not in stand_in()._mergeable_ranks]
    )
    encoding = tiktoken.Encoding(
        name,
        pat_str=pattern,
        mergeable_ranks=base._mergeable_ranks,
        special_tokens=base._special_tokens,
    )
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, name, encoding)
    ours = load_tokenizer(name)
    write_tokenizer(ours, tmp_path, 64)
    theirs = library(tmp_path)
    for text in [
        *tales[:200],
        *odd,
        "00010203 40506 0700 003",
        "a\n  ",
        "a\n  b  ",
        "a \n\n  \n  ",
    ]:
        assert ids_of(theirs, text) == ours.encode(text), text[:80]
    assert module.special_words(ours) == {
        f"<|reserved_{ours.end_of_text_id - 1}|>": ours.end_of_text_id - 1,
        "<|endoftext|>": ours.end_of_text_id,
        f"<|reserved_{ours.end_of_text_id + 1}|>": ours.end_of_text_id + 1,
        "<|other|>": ours.end_of_text_id + 2,
    }
    assert read_tokenizer(tmp_path).summary() == ours.summary()


def merged(word: bytes, ranks: dict[tuple[bytes, bytes], int]) -> list[bytes]:
    """Tokenize a word by merging alone, as llama.cpp does.

    The first pair of the list wins, of equal ones the leftmost; no whole word is looked up.
    """
    parts = [bytes([b]) for b in word]
    while pairs := [
        (ranks[pair], i)
        for i, pair in enumerate(zip(parts, parts[1:], strict=False))
        if pair in ranks
    ]:
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_merging_alone_makes_the_same_tokens(bpe, o200k, tales, odd):
    """llama.cpp looks up no whole words under o200k_base's rule.

    Each token must come from its merges.
    """
    for tokenizer, texts in (
        (bpe, tales[:60] + odd[::9]),
        (load_tokenizer("o200k_base"), tales[:30] + odd[::9]),
    ):
        merges = byte_level_merges(tokenizer)
        ranks = {pair: i for i, pair in enumerate(merges)}
        assert len(ranks) == len(merges) and all(
            a + b in tokenizer.encoding._mergeable_ranks for a, b in merges[::50]
        )
        made = [tokenizer.encoding._mergeable_ranks[a + b] for a, b in merges]
        assert made == sorted(made)
        for word in _words(tokenizer, texts):
            assert b"|".join(merged(word.encode(), ranks)) == b"|".join(
                map(tokenizer.token_bytes, tokenizer.encode(word))
            ), word
        tokens = random.Random(1).sample(sorted(tokenizer.encoding._mergeable_ranks), 1500)
        assert all(merged(token, ranks) == [token] for token in tokens)
    assert len(merges) == 446_189 and byte_level_merges(BYTE) == []


def _words(tokenizer: Tokenizer, texts: list[str]) -> set[str]:
    """The distinct pieces that the word pattern cuts texts into."""
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    split = Split(Regex(tokenizer.encoding._pat_str), "isolated")
    return {word for text in texts for word, _ in split.pre_tokenize_str(text)}


def test_a_compact_vocabulary_is_refused_in_a_line(tmp_path):
    base = Tokenizer("gpt2", stand_in())
    for refused in (
        lambda: write_tokenizer(compacted(base, [300]), tmp_path, 64),
        lambda: byte_level_merges(compacted(base, [300])),
    ):
        with pytest.raises(
            ValueError,
            match=(
                "^tokenizer gpt2:compact cannot be exported: .*prepare the text with --tokenizer "
                "gpt2 or bpe:SIZE.*$"
            ),
        ):
            refused()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: data["added_tokens"].clear(), "does not have the tokens"),
        (
            lambda data: data["added_tokens"].append(
                data["added_tokens"][0] | {"id": 2000, "content": "<|im_end|>"}
            ),
            "does not have the tokens",
        ),
        (lambda data: data["model"]["merges"].reverse(), "gives other ids than bpe:2000"),
        (
            lambda data: (
                data["model"]["merges"].__delitem__(slice(100, None))
                or data["model"].update(ignore_merges=False)
            ),
            "gives other ids",
        ),
        (
            lambda data: data["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(
                Regex=r"\S+|\s+"
            ),
            "gives other ids",
        ),
        (
            lambda data: data["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "gives other ids",
        ),
        (lambda data: data.update(normalizer={"type": "NFC"}), "gives other ids"),
    ],
)
def test_the_check_sees_what_is_off(bpe_folder, bpe, damage, message):
    check_tokenizer(bpe_folder, bpe)
    path = bpe_folder / module.TOKENIZER_FILE
    data = json.loads(path.read_text(encoding="utf-8"))
    damage(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    (bpe_folder / "config.json").write_text('{"eos_token_id": 0}')
    with pytest.raises(TokenizerError, match=message) as caught:
        check_tokenizer(bpe_folder, bpe)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 1
    # Now a user's own tokenizer.
    assert isinstance(read_tokenizer(bpe_folder), HuggingFaceTokenizer)


def test_writing_ends_with_the_check(bpe, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "byte_level_merges", lambda tokenizer: [])
    with pytest.raises(TokenizerError, match="gives other ids"):
        write_tokenizer(bpe, tmp_path, 64)


def test_o200k_is_read_as_what_it_was(o200k_folder):
    assert read_tokenizer(o200k_folder).to_state() == load_tokenizer("o200k_base").to_state()


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_there_and_back_is_bitwise(name, bpe, tmp_path):
    """A file of ours is read as what it was, not as a foreign vocabulary.

    A trained BPE keeps all its tokens in their order.
    """
    ours = {"byte": BYTE, "bpe": bpe}[name]
    write_tokenizer(ours, tmp_path / "a", 64)
    again = read_tokenizer(tmp_path / "a")
    assert again.to_state() == ours.to_state() and type(again) is Tokenizer
    assert again.start_id == again.end_of_text_id and again.stop_ids == (again.end_of_text_id,)
    write_tokenizer(again, tmp_path / "b", 64)
    assert all(
        (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        for file in FILES
    )


def test_it_stays_ours_when_transformers_saves_it(bpe, bpe_folder, tmp_path):
    """A user fine-tunes elsewhere and saves.

    With added tokens it is another tokenizer, which keeps ours out of its config.
    """
    theirs = auto_tokenizer(bpe_folder, "qwen3_moe")
    theirs.save_pretrained(tmp_path / "saved")
    assert read_tokenizer(tmp_path / "saved").to_state() == bpe.to_state()
    theirs.add_tokens(["<think>"])
    theirs.save_pretrained(tmp_path / "more")
    more = read_tokenizer(tmp_path / "more")
    assert (
        isinstance(more, HuggingFaceTokenizer)
        and more.vocabulary_size == 2001
        and OURS not in more.config
    )
    assert [more.start_id, *more.encode("<think>x")] == theirs("<think>x").input_ids
    assert more.encode("<think>x") == [2000, *bpe.encode("x")]
    # Its texts began after nothing.
    assert more.start_id == bpe.start_id


def test_ours_without_tiktokens_file_is_what_its_tokenizer_json_says(tmp_path, monkeypatch):
    """An export with o200k_base is complete, yet could not be imported without a download.

    tiktoken's copy of the vocabulary was needed.
    """
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in())
    ours = load_tokenizer("gpt2")
    write_tokenizer(ours, tmp_path / "a", 64)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "empty"))
    with pytest.raises(ValueError, match="could not be downloaded"):
        load_tokenizer("gpt2")
    again = read_tokenizer(tmp_path / "a")
    write_tokenizer(again, tmp_path / "b", 64)
    for theirs in (again, read_tokenizer(tmp_path / "b")):
        assert isinstance(theirs, HuggingFaceTokenizer) and OURS not in theirs.config
        assert (theirs.start_id, theirs.stop_ids, theirs.vocabulary_size) == (
            ours.start_id,
            ours.stop_ids,
            ours.vocabulary_size,
        )
        assert all(theirs.encode(text) == ours.encode(text) for text in module.CHECK_TEXTS)


# ------------------------------------------------------------------------------------------- theirs


@pytest.mark.parametrize("name", ["mixtral", "qwen"])
def test_a_published_tokenizer_gives_its_own_ids(name, request, tales, odd):
    folder = request.getfixturevalue(name)
    ours, theirs = read_tokenizer(folder), library(folder)
    theirs.no_truncation()
    assert (ours.name, ours.made_from_text) == (f"hf:{ours.fingerprint[:12]}", True)
    for text in [*tales[:200], *odd]:
        ids = ours.encode(text)
        assert ids == ids_of(theirs, text) == ours.encode_to_numpy(text).tolist()
        assert ours.decode(ids).removeprefix(" " * (name == "mixtral")) == theirs.decode(
            ids, skip_special_tokens=False
        )
    for i in range(ours.vocabulary_size):
        if (
            i not in ours.undecodable_ids
            and (word := theirs.id_to_token(i))
            and not word.startswith("<")
            and not ours.token_bytes(i).startswith(b" ")
        ):
            assert theirs.decode([i]) == ours.decode([i])


def test_what_begins_and_ends_a_text(mixtral, qwen):
    sentencepiece, chat = read_tokenizer(mixtral), read_tokenizer(qwen)
    assert (
        sentencepiece.start_id,
        sentencepiece.end_of_text_id,
        sentencepiece.stop_ids,
        sentencepiece.between_documents,
    ) == (1, 2, (2,), [2, 1])
    # A text ends otherwise than a turn.
    assert (chat.start_id, chat.end_of_text_id, chat.stop_ids, chat.between_documents) == (
        None,
        800,
        (802, 800),
        [800],
    )
    assert (BYTE.start_id, BYTE.stop_ids, BYTE.between_documents) == (256, (256,), [256])


def test_ids_of_bytes_and_of_nothing(mixtral, qwen):
    ours = read_tokenizer(mixtral)
    assert (ours.vocabulary_size, ours.undecodable_ids) == (957, [700]) and ours.token_bytes(
        700
    ) == "\N{REPLACEMENT CHARACTER}".encode()
    assert (
        ours.encode("\N{GRINNING FACE}")[-4:] == [701 + b for b in "\N{GRINNING FACE}".encode()]
        and ours.token_bytes(701 + 0xF0) == b"\xf0"
    )
    stream = TokenStream(ours)
    assert [stream.push(i) for i in ours.encode("\N{GRINNING FACE}")[-4:]] == [
        "",
        "",
        "",
        "\N{GRINNING FACE}",
    ]
    assert ours.token_bytes(2) == b"</s>" and SPACE not in ours.decode(ours.encode("the cat"))
    for i in (-1, 957):
        with pytest.raises(ValueError, match=f"token id {i} is not in hf:"):
            ours.token_bytes(i)
    assert read_tokenizer(qwen).token_bytes(803) == b"<think>"


def test_special_words_of_published_tokenizers_are_ordinary_text(mixtral, qwen):
    for folder, word in ((mixtral, "</s>"), (qwen, "<|im_end|>")):
        ours = read_tokenizer(folder)
        ids = ours.encode(f"a{word}b")
        assert not set(ids) & {*ours.stop_ids} and ours.decode(ids).strip() == f"a{word}b"
        # The library's flag is in none of its files.
        for again in (
            copy.deepcopy(ours),
            tokenizer_from_state(json.loads(json.dumps(ours.to_state()))),
        ):
            assert again.encode(f"a{word}b") == ids and again.to_state() == ours.to_state()
    assert ours.encode("a\ud800") == ours.encode("a\N{REPLACEMENT CHARACTER}")


def metaspace(**settings):
    """Return changes for a tokenizer.json: spaces written by a pre-tokenizer, as newer files do.

    Older ones use the normalizer.
    """
    return {
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, **settings},
    }


@pytest.mark.parametrize(
    "change",
    [
        {},
        metaspace(prepend_scheme="always", split=True),
        metaspace(prepend_scheme="first", split=False),
        metaspace(add_prefix_space=True),
        metaspace(prepend_scheme="never"),
    ],
    ids=str,
)
def test_what_goes_on_begins_with_no_space(change, mixtral, tmp_path, tales):
    """Typed after "Once upon a ti", "+me" was fed to an imported Mixtral as " me".

    Its tokenizer puts a space before every text.
    """
    data = json.loads((mixtral / "tokenizer.json").read_text(encoding="utf-8"))
    ours = read_tokenizer(
        write_folder(tmp_path, data | change, generation_config={"eos_token_id": 2})
    )
    rng = random.Random(0)
    for text in [tale[:200].strip() for tale in tales[:40]]:
        whole, cut = ours.encode(text), rng.randrange(1, len(text))
        for at in (cut, text.index(" ")):
            rest = ours.encode_continuation(text[at:])
            assert ours.decode(rest) == text[at:]
            assert ours.decode(ours.encode(text[:at]) + rest) == ours.decode(whole)
        # Cut between words, the ids are those of the whole.
        assert ours.encode(text[:at]) + rest == whole
    assert ours.encode_continuation("") == [] and ours.encode_continuation(
        "a\ud800"
    ) == ours.encode_continuation("a\N{REPLACEMENT CHARACTER}")


def test_words_that_each_get_a_space_keep_it(mixtral, tmp_path):
    """T5 strips white space first and then puts a space before each word.

    That space is the only one between two words.
    """
    pre_tokenizer = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "WhitespaceSplit"},
            metaspace(prepend_scheme="always")["pre_tokenizer"],
        ],
    }
    data = json.loads((mixtral / "tokenizer.json").read_text(encoding="utf-8")) | {
        "normalizer": None,
        "pre_tokenizer": pre_tokenizer,
    }
    ours = read_tokenizer(write_folder(tmp_path, data, generation_config={"eos_token_id": 2}))
    assert ours.decode(ours.encode_continuation("the cat")) == " the cat"


def test_byte_level_texts_go_on_as_they_begin(qwen, bpe, tmp_path):
    """Special words are ordinary text.

    Unless the file puts a space before them, as GPT-2's once did.
    """
    for tokenizer in (read_tokenizer(qwen), bpe):
        assert all(
            tokenizer.encode_continuation(text) == tokenizer.encode(text)
            for text in (*module.CHECK_TEXTS, "<|im_end|>")
        )
    data = json.loads((qwen / "tokenizer.json").read_text(encoding="utf-8"))
    data["pre_tokenizer"] = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    prefixed = read_tokenizer(write_folder(tmp_path, data, generation_config={"eos_token_id": 800}))
    assert (
        prefixed.decode(prefixed.encode("me")) == " me"
        and prefixed.decode(prefixed.encode_continuation("me")) == "me"
    )
    assert prefixed.decode(
        prefixed.encode_continuation("me<|im_end|>")
    ) == "me<|im_end|>" and 802 not in prefixed.encode_continuation("me<|im_end|>")


@pytest.mark.parametrize(
    "change",
    [
        {"tokenizer_json": 5},
        {"tokenizer_json": "{"},
        {"tokenizer_json": "{}"},
        {"tokenizer_json": "[]"},
        {"tokenizer_config": None},
        {"stop_ids": None},
        {"stop_ids": []},
        {"stop_ids": [2**40]},
        {"stop_ids": ["2"]},
        {"stop_ids": [True]},
        {"stop_ids": [700]},
        {"stop_ids": [3]},
        {"start_id": [1]},
        {"start_id": 9999},
        {"fingerprint": "0" * 64},
        {"name": "hf:"},
        {"end_of_text_id": 1},
        {"vocabulary_size": 5},
    ],
)
def test_damaged_states_are_refused(mixtral, change):
    state = read_tokenizer(mixtral).to_state()
    with pytest.raises(ValueError) as caught:
        tokenizer_from_state(state | change)
    assert "\n" not in str(caught.value)


def test_a_published_tokenizer_is_one_of_a_kind(mixtral, tmp_path):
    """Its digest is of what the file says, not of how it is laid out; a name alone makes none."""
    state = read_tokenizer(mixtral).to_state()
    shutil.copytree(mixtral, tmp_path / "again")
    path = tmp_path / "again" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8"))))
    assert read_tokenizer(tmp_path / "again").to_state() == state
    data = json.loads(path.read_text())
    data["model"]["merges"].reverse()
    path.write_text(json.dumps(data))
    assert read_tokenizer(tmp_path / "again").name != state["name"]
    with pytest.raises(
        ValueError, match="comes with a model: give the folder or checkpoint that has it"
    ):
        load_tokenizer(state["name"])


@pytest.mark.parametrize("name", ["mixtral", "qwen"])
def test_a_published_tokenizer_goes_back_as_it_came(name, request, tmp_path, tales, odd):
    """With its chat template; and with a class that transformers 4 knows."""
    ours = read_tokenizer(request.getfixturevalue(name))
    write_tokenizer(ours, tmp_path / "a", 64)
    shutil.copy(request.getfixturevalue(name) / "config.json", tmp_path / "a")
    if name == "qwen":
        shutil.copy(request.getfixturevalue(name) / "generation_config.json", tmp_path / "a")
    again = read_tokenizer(tmp_path / "a")
    assert again.summary() == ours.summary() and again.config["chat_template"] == ours.config[
        "chat_template"
    ] in ("{{ messages }}", "{{ bos }}")
    write_tokenizer(again, tmp_path / "b", 64)
    assert all(
        (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        for file in FILES
    )
    theirs = auto_tokenizer(tmp_path / "a", {"mixtral": "mixtral", "qwen": "qwen3_moe"}[name])
    assert (
        json.loads((tmp_path / "a" / module.CONFIG_FILE).read_text())["tokenizer_class"]
        == "PreTrainedTokenizerFast"
    )
    assert (theirs.eos_token, theirs.chat_template) == (
        {"mixtral": "</s>", "qwen": "<|im_end|>"}[name],
        ours.config["chat_template"],
    )
    for text in [*tales[:50], *odd[::5]]:
        assert theirs(text).input_ids == [ours.start_id] * (
            ours.start_id is not None
        ) + ours.encode(text)


def test_merges_of_a_published_tokenizer(qwen, mixtral, bpe, bpe_folder):
    data = json.loads((qwen / "tokenizer.json").read_text(encoding="utf-8"))
    to_byte = byte_of_character()
    assert byte_level_merges(read_tokenizer(qwen)) == [
        tuple(bytes(to_byte[c] for c in part) for part in pair) for pair in data["model"]["merges"]
    ]
    config = json.loads((bpe_folder / module.CONFIG_FILE).read_text())
    del config[OURS]
    # Merges in the older spelling, "a b".
    (bpe_folder / module.CONFIG_FILE).write_text(json.dumps(config))
    foreign = read_tokenizer(bpe_folder)
    assert isinstance(foreign, HuggingFaceTokenizer) and byte_level_merges(
        foreign
    ) == byte_level_merges(bpe)
    with pytest.raises(ValueError, match="is not a byte-level BPE"):
        byte_level_merges(read_tokenizer(mixtral))


def test_folders_that_have_none(tmp_path, mixtral, monkeypatch):
    def refused(message):
        with pytest.raises(ValueError, match=message) as caught:
            read_tokenizer(tmp_path / "m")
        assert "\n" not in str(caught.value)

    data = json.loads((mixtral / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "m").mkdir()
    refused("m has no tokenizer.json: .*save_pretrained")
    write_folder(tmp_path / "m", data)
    refused("does not say which id ends a text")
    for config in ({"eos_token_id": 957}, {"eos_token_id": "2"}, {"eos_token_id": [2, None]}):
        write_folder(tmp_path / "m", data, generation_config=config)
        refused("no such ids to stop at")
    write_folder(
        tmp_path / "m",
        data | {"decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True}},
        generation_config={"eos_token_id": 2},
    )
    refused("decodes in a way that is not supported here")
    write_folder(tmp_path / "m", {"model": {"type": "BPE"}})
    refused("cannot be used as a tokenizer")
    # What prepare_data.py calls tokenizer.json.
    write_folder(tmp_path / "m", BYTE.to_state())
    refused("is not a tokenizer.json of the tokenizers library")
    for text in ("{", "[]", "\xff"):
        (tmp_path / "m" / "tokenizer.json").write_bytes(text.encode("latin-1"))
        refused("tokenizer.json (is not JSON|must hold a JSON object)")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    write_folder(tmp_path / "m", data)
    refused("needs the tokenizers library: pip install tokenizers")


@pytest.mark.parametrize("word", [5, [1], {"content": 5}, {"content": ["a"]}, True])
def test_a_first_token_that_is_no_word_is_one_line(mixtral, tmp_path, word):
    """Such a bos_token was handed to the library, which raised a TypeError."""
    data = json.loads((mixtral / "tokenizer.json").read_text(encoding="utf-8"))
    for config in ({"add_bos_token": True, "bos_token": word}, {"eos_token": word}):
        write_folder(
            tmp_path,
            data,
            tokenizer_config=config,
            **({} if "eos_token" in config else {"generation_config": {"eos_token_id": 2}}),
        )
        with pytest.raises(
            ValueError, match="tokenizer_config.json: (bos|eos)_token must be a token's word"
        ):
            read_tokenizer(tmp_path)
        (tmp_path / "generation_config.json").unlink(missing_ok=True)


@pytest.mark.parametrize(
    "file, content",
    [
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}'),
        ("tokenizer_config.json", b'{"\\udfff": [1]}'),
        ("chat_template.jinja", b"{{ \xff }}"),
    ],
)
def test_what_could_not_be_exported_again_is_not_imported(mixtral, tmp_path, file, content):
    """JSON can spell half a character.

    It was imported, and its export ended in an error that named no file.
    """
    shutil.copytree(mixtral, tmp_path / "m")
    (tmp_path / "m" / file).write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"m: tokenizer_config.json or chat_template.jinja is not valid UTF-8 text",
    ) as caught:
        read_tokenizer(tmp_path / "m")
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------- in a checkpoint
def test_predict_goes_on_behind_what_is_there(mixtral, tmp_path, repl, drawn):
    """`+me` continued with " me".

    What was drawn before a stop text was read again with one more space before it.
    """
    tokenizer = read_tokenizer(mixtral)
    ckpt = save(tmp_path, biased_model(vocabulary_size=tokenizer.vocabulary_size), tokenizer)
    drawn.ids = tokenizer.encode_continuation("me, a cat!")
    repl(ckpt, ":n 90\n:stop cat\nOnce upon a ti\n+dog\n")
    first, second = (call[0][0] for call in drawn.calls)
    assert first == [1, *tokenizer.encode("Once upon a ti")] and second[: len(first)] == first
    assert tokenizer.decode(second[len(first) :]) == "me, a dog"


def test_predict_begins_and_stops_as_the_model_was_trained(mixtral, qwen, tmp_path, run, drawn):
    """An imported model's prompts start with its own first id, or none.

    Any of its end ids ends an answer.
    """
    for folder, before, stops in ((mixtral, [1], [2]), (qwen, [], [802, 800])):
        tokenizer = read_tokenizer(folder)
        ckpt = save(
            tmp_path / folder.name,
            biased_model(vocabulary_size=tokenizer.vocabulary_size + 3),
            tokenizer,
        )
        predictor, _ = predictor_of(ckpt)
        assert predictor.tokenizer.to_state() == tokenizer.to_state()
        for end in stops:
            drawn.ids, drawn.calls = [*tokenizer.encode("the cat"), end], []
            assert run("--ckpt", ckpt, "--prompt", "once", "--temperature", 0).startswith("once")
            ((prompts, _, settings),) = drawn.calls
            assert prompts == [before + tokenizer.encode("once")] and settings["stop_ids"] == stops
            size = tokenizer.vocabulary_size
            assert settings["banned_ids"] == [*tokenizer.undecodable_ids, size, size + 1, size + 2]
            completion = Completion(prompts[0])
            list(predictor.complete([completion], PredictConfig(ckpt=ckpt), [0]))
            assert completion.ended == "end of text" and completion.text == tokenizer.decode(
                tokenizer.encode("the cat")
            )
        # A model always has something to read.
        assert predictor.prompt_ids("") == (before + tokenizer.encode("") or [800])
