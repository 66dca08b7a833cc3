"""runtime/data/tokenizer.py: every vocabulary is one class, exact both ways.

No wrong one is accepted.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import string
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import requests
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from runtime.data import bpe_trainer, tokenizers
from runtime.data.tokenizer import (
    STATE_FILE,
    WORD_PATTERN,
    CompactTokenizer,
    NoTokenizer,
    Tokenizer,
    TokenStream,
    byte_of_character,
    spell,
)
from runtime.data.tokenizers import compacted, load_tokenizer, tokenizer_from_state, train_bpe
from tests.builders_tokenizer import TALE, stand_in
from tests.conftest import REPO

BYTE = load_tokenizer("byte")


@pytest.fixture
def gpt2(monkeypatch) -> Tokenizer:
    """The stand-in, where tiktoken looks for gpt2."""
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in())
    return load_tokenizer("gpt2")


@pytest.fixture(scope="module")
def compact() -> CompactTokenizer:
    """gpt2's stand-in, without what the first sentence does not use."""
    base = Tokenizer("gpt2", stand_in())
    return compacted(base, base.encode(TALE[0][:46]))


@pytest.fixture(scope="module")
def stories(shared_dir) -> list[str]:
    return [
        json.loads(line)["text"]
        for line in (shared_dir / "tinystories" / "valid.jsonl")
        .read_text(encoding="utf-8")
        .splitlines()
    ]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return train_bpe(TALE * 20, 300)


def test_o200k_is_what_it_says(o200k):
    tokenizer = load_tokenizer("o200k_base")
    assert (tokenizer.vocabulary_size, tokenizer.end_of_text_id) == (200_019, 199_999)
    assert tokenizer.undecodable_ids == [199_998, *range(200_000, 200_018)]
    # Trained BPEs split words exactly as it does.
    assert tokenizer.encoding._pat_str == WORD_PATTERN
    assert tokenizer.encode("Once upon a time") == tokenizer.encoding.encode_ordinary(
        "Once upon a time"
    )


def test_ids_that_stand_for_nothing_decode_to_a_replacement(o200k):
    """P1: 19 of o200k_base's ids are inside its vocabulary but have no bytes.

    One in an answer was a KeyError.
    """
    tokenizer = load_tokenizer("o200k_base")
    for i in tokenizer.undecodable_ids:
        assert tokenizer.decode([i]) == "\N{REPLACEMENT CHARACTER}"
    assert TokenStream(tokenizer).push(200_000) == "\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("token_id", [-1, 257, 2**40])
def test_ids_outside_the_vocabulary_are_named(token_id):
    with pytest.raises(
        ValueError, match=f"token id {token_id} is not in byte, which has ids 0 to 256"
    ):
        BYTE.decode([token_id])


@given(st.lists(st.integers(0, 511)), st.sampled_from([" ", ", ", "\n", " ,[ ]"]))
def test_token_ids_are_text_both_ways(ids, between):
    tokenizer = NoTokenizer(512)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert tokenizer.encode(f"[{between.join(map(str, ids))}]") == ids
    stream = TokenStream(tokenizer)
    assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)
    assert (tokenizer.start_id, tokenizer.end_of_text_id, tokenizer.stop_ids) == (None, None, ())
    with pytest.raises(ValueError, match="token id 512 is not in none, which has ids 0 to 511"):
        tokenizer.decode([512])


def test_byte_tokenizer():
    assert (BYTE.vocabulary_size, BYTE.end_of_text_id, BYTE.undecodable_ids) == (257, 256, [])
    assert BYTE.encode("né") == [0x6E, 0xC3, 0xA9]
    assert BYTE.encode_to_numpy("abc").dtype == np.uint32
    assert BYTE.decode([0x68, 0x69, 256]) == "hi<|endoftext|>"


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_text_survives_the_round_trip(bpe, compact, text):
    for tokenizer in (BYTE, bpe, compact):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.end_of_text_id for i in ids)


def test_special_words_in_a_text_are_ordinary(bpe, compact):
    """A story that spells <|endoftext|> must neither end there nor be rejected."""
    for tokenizer in (BYTE, bpe, compact):
        ids = tokenizer.encode("a<|endoftext|>b")
        assert tokenizer.end_of_text_id not in ids and tokenizer.decode(ids) == "a<|endoftext|>b"


def test_lone_surrogates_become_replacement_characters(bpe, compact):
    """JSON can spell them, UTF-8 cannot.

    tiktoken's numpy path raised UnicodeEncodeError on "\\ud800".
    """
    for tokenizer in (BYTE, bpe, compact):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a\N{REPLACEMENT CHARACTER}b"
        assert tokenizer.decode(tokenizer.encode("\ud83d\ude00")) == "\N{GRINNING FACE}"
    train_bpe(["a\ud800b"], 257)


def test_a_run_of_a_million_spaces_is_encoded(bpe, compact):
    """tiktoken gives up on such a text ("Max stack size exceeded for backtracking").

    One document must not end a run.
    """
    text = "a" + " " * 3_000_000 + "b"
    with pytest.raises(ValueError, match="Regex error"):
        bpe.encoding.encode_to_numpy(text, disallowed_special=())
    assert bpe.decode(bpe.encode(text)) == text
    assert compact.decode(compact.encode(text)) == text


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_stream_gives_whole_characters_and_all_of_them(text):
    stream = TokenStream(BYTE)
    pieces = [stream.push(i) for i in BYTE.encode(text)]
    assert "".join(pieces) + stream.flush() == text
    assert [piece for piece in pieces if piece] == list(text)


def test_stream_flush_shows_a_character_cut_short():
    stream = TokenStream(BYTE)
    assert [stream.push(0xE2), stream.push(0x82)] == ["", ""]
    assert stream.flush() == "\N{REPLACEMENT CHARACTER}"
    assert stream.push(0x41) == "A"


# ------------------------------------------------------------------------------------------ trained
def test_bpe_size_counts_everything(bpe):
    assert (bpe.name, bpe.vocabulary_size, bpe.end_of_text_id, bpe.undecodable_ids) == (
        "bpe:300",
        300,
        299,
        [],
    )


def test_bpe_is_what_the_tokenizers_library_says(stories):
    """Used through tiktoken, trained elsewhere: the two must cut 2,000 real stories alike."""
    from tokenizers import Regex, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainable

    oracle = Trainable(models.BPE())
    oracle.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    oracle.train_from_iterator(
        stories,
        trainers.BpeTrainer(
            vocab_size=2047,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    ours = train_bpe(stories, 2048)
    assert {
        spell(bytes([b])): b for b in range(256)
    } == byte_of_character() and byte_of_character().keys() == set(
        pre_tokenizers.ByteLevel.alphabet()
    )
    spelled = {i: spell(ours.token_bytes(i)) for i in range(2047)}
    for text in stories:
        assert [spelled[i] for i in ours.encode(text)] == oracle.encode(text).tokens


ALPHABETS = {
    "DNA": "ACGT",
    "base64": string.ascii_letters + string.digits,
    "a script without spaces": "".join(map(chr, range(0xE01, 0xE2F))),
    "with marks": "กิดีตุ",
    "punctuation": "-=",
    "minified": "();,.a{}",
    "white space": " \t",
    "line breaks": "\n\r",
    "one letter": "a",
}


@pytest.mark.parametrize("alphabet", ALPHABETS.values(), ids=ALPHABETS)
def test_bpe_training_reads_a_long_word_in_pieces(alphabet):
    """A document of 400,000 letters of DNA made `--tokenizer bpe:400` run for hours.

    The trainer's time is quadratic in a word's length: 80,000 letters of a script without spaces
    took 28 s. So training cuts words, and a document's end is never lost.
    """
    words = pre_tokenizers.Split(Regex(tokenizers.training_pattern()), behavior="isolated")
    text = "".join(random.Random(0).choices(alphabet, k=400_000))
    pieces = [piece for piece, _ in words.pre_tokenize_str(text)]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 2 * tokenizers.BPE_RUN_CHARACTERS + len("x've")
    trained = train_bpe([*TALE * 20, text], 300)
    assert trained.decode(trained.encode(text)) == text


@settings(deadline=None)
@given(st.text("aB1é日ก\u0301 .'\n\t-/", max_size=200))
def test_bpe_training_cuts_short_words_as_encoding_does(text):
    whole, cut = (
        pre_tokenizers.Split(Regex(pattern), behavior="isolated").pre_tokenize_str(text)
        for pattern in (WORD_PATTERN, tokenizers.training_pattern())
    )
    assert whole == cut


@pytest.mark.parametrize("length", [90, 110, 300, 600, 2000])
def test_encoding_does_not_cut_a_long_word(bpe, length):
    """Training cuts words above 256 letters; encoding is byte-pair merging over the whole word."""
    word = "".join(random.Random(length).choices("theo", k=length))
    ranks = bpe.encoding._mergeable_ranks
    parts = [bytes([b]) for b in word.encode()]
    while True:
        pairs = [ranks.get(a + b, len(ranks)) for a, b in itertools.pairwise(parts)]
        if min(pairs, default=len(ranks)) == len(ranks):
            break
        i = pairs.index(min(pairs))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    assert len(parts) < length and bpe.encode(word) == [ranks[part] for part in parts]


INTERRUPTED = """
import random, sys
from runtime.base.cli import run_main
from runtime.data import bpe_trainer, tokenizers

def texts():
    yield "".join(random.Random(0).choices("的一是不了人我在有他这为之大来以个中上们", k=200_000))
    print("all read", flush=True)

# One long word: the trainer's merges then take minutes.
tokenizers.training_pattern = lambda: tokenizers.WORD_PATTERN
run_main(lambda argv: tokenizers.train_bpe(texts(), 8192) and 0)
"""


def start_training() -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore SIGINT, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_ctrl_c_ends_the_training_of_a_bpe():
    """The trainer's merges are one call into Rust, and Python heard Ctrl-C only after it."""
    process = start_training()
    try:
        assert process.stdout.readline() == "all read\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and errors.strip() == "interrupted"


def test_ctrl_c_is_heard_however_shortly_before_the_wait_it_comes():
    """A Ctrl-C right after the last text was lost, once in many runs, and training went on.

    It came after Python's last look at signals and before the system call that reads the merges,
    which then waited to the end. So the main thread must never be in that call.
    """
    readers = []

    class Pipe:
        def read(self) -> bytes:
            readers.append(threading.current_thread())
            return b"merges"

    assert bpe_trainer._read(Pipe()) == b"merges"
    assert readers and readers != [threading.main_thread()]


def test_an_error_in_the_text_ends_the_training_of_a_bpe():
    def texts():
        yield from TALE
        raise ValueError("a.jsonl line 3 is not JSON")

    with pytest.raises(ValueError, match="line 3 is not JSON"):
        train_bpe(texts(), 300)


def parents() -> dict[int, int]:
    """Return the parent of every process, the dead ones left out."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        # A process may end in between.
        with contextlib.suppress(OSError):
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
            if state != "Z":
                found[int(path.parent.name)] = int(parent)
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_is_left_training(number):
    """However its parent ends, the process that computes merges ends too."""
    process = start_training()
    try:
        assert process.stdout.readline() == "all read\n"
        (trainer,) = [pid for pid, parent in parents().items() if parent == process.pid]
        process.send_signal(number)
        process.wait(timeout=30)
        deadline = time.monotonic() + 30
        while (is_there := trainer in parents()) and time.monotonic() < deadline:
            time.sleep(0.01)
        if is_there:
            os.kill(trainer, signal.SIGKILL)
        assert not is_there
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("after", [0, 100_000])
def test_a_trainer_that_dies_is_one_line(monkeypatch, after):
    """The system ends processes when memory runs out: while it reads, or after that."""
    code = f"import os, sys; sys.stdin.buffer.read({after}); os._exit(9)"
    monkeypatch.setattr(bpe_trainer, "START", code)
    with pytest.raises(ValueError, match="trains the tokenizer ended with exit code 9"):
        train_bpe(TALE * 10_000, 300)


TRAINS = """
from runtime.data.tokenizers import train_bpe
from tests.builders_tokenizer import TALE
train_bpe(TALE * 20, 300)
"""


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_bpe_training_shows_progress_on_a_terminal_only():
    """Training on 256 MB takes minutes, and nothing was shown."""
    piped = subprocess.run([sys.executable, "-c", TRAINS], cwd=REPO, stderr=subprocess.PIPE)
    assert (piped.returncode, piped.stderr) == (0, b"")
    ours, theirs = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", TRAINS], cwd=REPO, stderr=theirs)
    os.close(theirs)
    shown = b""
    # At the end of a pseudo-terminal, Linux raises an error.
    with contextlib.suppress(OSError):
        while read := os.read(ours, 4096):
            shown += read
    os.close(ours)
    assert process.wait(timeout=30) == 0 and b"Compute merges" in shown


def test_bpe_training_is_deterministic():
    """In other processes with other hash seeds too: a re-run must write the same bytes."""
    code = (
        "import sys; from runtime.data.tokenizers import train_bpe; print(train_bpe(sys.argv[1:] "
        "* 20, 300).fingerprint)"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, *TALE],
            cwd=REPO,
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert seen == {train_bpe(TALE * 20, 300).fingerprint + "\n"}


def test_bpe_refuses_a_text_that_is_too_small():
    with pytest.raises(
        ValueError,
        match=r"too small for --tokenizer bpe:4096: it gives at most \d+ ids; use bpe:\d+ or less",
    ):
        train_bpe(TALE, 4096)


def test_bpe_reads_a_bounded_sample(monkeypatch):
    monkeypatch.setattr(tokenizers, "BPE_SAMPLE_CHARACTERS", 1000)
    texts = iter(TALE * 1000)
    train_bpe(texts, 280)
    assert sum(map(len, texts)) > sum(map(len, TALE)) * 990


@pytest.mark.parametrize(
    "name",
    [
        "bpe:",
        "bpe:x",
        "bpe:256",
        "bpe:1000001",
        "bpe:-5",
        "bpe:4e3",
        "bpe:²99",
        "bpe:99999999999999",
        "o200k",
        "",
    ],
)
def test_unknown_names_are_refused(name):
    with pytest.raises(
        ValueError,
        match=(
            "SIZE of bpe:SIZE must be|is not one of o200k_base, gpt2, cl100k_base, byte, bpe:SIZE"
        ),
    ):
        load_tokenizer(name)


# ------------------------------------------------------------------------------------------ compact
def test_compact_ids_of_its_text_are_the_bases_renumbered(o200k, stories):
    """Nothing is lost: the same cut, the same order of ids, and back again exactly."""
    base = load_tokenizer("o200k_base")
    used = set().union(*map(base.encode, stories[:300]))
    tokenizer = compacted(base, used)
    every_byte = {base.encoding.encode_single_token(bytes([b])) for b in range(256)}
    assert tokenizer.base_ids == sorted(used | every_byte | {base.end_of_text_id})
    assert (tokenizer.name, tokenizer.vocabulary_size, tokenizer.undecodable_ids) == (
        "o200k_base:compact",
        len(used | every_byte) + 1,
        [],
    )
    assert tokenizer.base_ids[tokenizer.end_of_text_id] == base.end_of_text_id
    for text in stories[:300]:
        ids = tokenizer.encode_to_numpy(text)
        assert (
            ids.dtype == np.uint32
            and [tokenizer.base_ids[i] for i in ids] == base.encode(text)
            and tokenizer.decode(ids) == text
        )
    assert all(
        tokenizer.token_bytes(i) == base.token_bytes(old)
        for i, old in enumerate(tokenizer.base_ids)
    )
    with pytest.raises(
        ValueError, match=f"token id {tokenizer.vocabulary_size} is not in o200k_base:compact"
    ):
        tokenizer.token_bytes(tokenizer.vocabulary_size)


def test_compact_encodes_what_its_text_never_had(o200k, stories):
    """Every Unicode plane and random mixtures.

    Also by the stream, and without end-of-text in between.
    """
    base = load_tokenizer("o200k_base")
    tokenizer, rng = (
        compacted(base, set().union(*map(base.encode, stories[:300]))),
        random.Random(1),
    )

    def draw(first, end):
        return "".join(
            chr(c)
            for c in (rng.randrange(first, end) for _ in range(40))
            if not 0xD800 <= c < 0xE000
        )

    texts = [draw(plane << 16, plane + 1 << 16) for plane in range(17) for _ in range(5)]
    texts += [draw(0, 0x800) + draw(0, 0x110000) + draw(0, 128) for _ in range(200)]
    for text in [
        *texts,
        "def f(x):\r\n\treturn {'<|endoftext|>': x}",
        "\N{GRINNING FACE}\N{ZERO WIDTH JOINER}",
        "你好，世界",
        "",
    ]:
        ids, stream = tokenizer.encode(text), TokenStream(tokenizer)
        assert tokenizer.decode_bytes(ids) == text.encode() and all(
            0 <= i < tokenizer.end_of_text_id for i in ids
        )
        assert "".join(map(stream.push, ids)) + stream.flush() == text


@pytest.mark.parametrize(
    "kept, spelled",
    [
        (["abcde", "ab"], ["abcde"]),
        (["abc", "cd", "de", "ab"], ["abc", "de"]),
        # The longest first token would leave three pieces.
        (["ab", "abc", "bcde"], ["a", "bcde"]),
        # Of equally few: the longest last.
        (["abcd", "bcde"], ["a", "bcde"]),
        (["bc"], ["a", "bc", "d", "e"]),
        ([], ["a", "b", "c", "d", "e"]),
    ],
)
def test_a_token_that_is_not_kept_is_spelled_with_the_fewest_that_are(kept, spelled):
    base = Tokenizer(
        "gpt2", stand_in([b"ab", b"abc", b"cd", b"de", b"bc", b"abcd", b"bcde", b"abcde"])
    )
    tokenizer = compacted(base, [base.encoding.encode_single_token(token) for token in kept])
    assert len(base.encode("abcde")) == 1
    assert [tokenizer.token_bytes(i).decode() for i in tokenizer.encode("1abcde1")] == [
        "1",
        *spelled,
        "1",
    ]


def test_compact_fingerprints_cover_the_base_and_the_ids(gpt2):
    """Two bases that differ in a token that is not kept: another text would be cut otherwise."""
    bases = [Tokenizer("gpt2", stand_in([token])) for token in (b"zq", b"qz")]
    tokenizers = [compacted(base, ids) for base in bases for ids in ([300, 310], [300, 311])]
    assert (
        tokenizers[0].base_ids == tokenizers[2].base_ids
        and len({tokenizer.fingerprint for tokenizer in [*tokenizers, gpt2]}) == 5
    )
    assert compacted(bases[0], np.array([310, 300, 300])).summary() == tokenizers[0].summary()


@pytest.mark.parametrize(
    "name",
    [
        "byte:compact",
        "bpe:300:compact",
        ":compact",
        "o300k:compact",
        "gpt2:compact:compact",
        "bpe:x:compact",
    ],
)
def test_what_cannot_be_compact_is_refused(name):
    for refused in (lambda: load_tokenizer(name), lambda: tokenizer_from_state({"name": name})):
        with pytest.raises(
            ValueError,
            match=(
                f"^tokenizer '{name}': only o200k_base, gpt2, cl100k_base have a :compact form; .*$"
            ),
        ):
            refused()


@pytest.mark.parametrize(
    "change",
    [
        # A byte is missing.
        lambda ids: ids[1:],
        # end-of-text is missing.
        lambda ids: ids[:-1],
        lambda ids: [ids[1], ids[0], *ids[2:]],
        lambda ids: [*ids[:5], ids[5], *ids[5:]],
        lambda ids: [-1, *ids],
        # An id that stands for nothing.
        lambda ids: [*ids, ids[-1] + 1],
        # Another special token.
        lambda ids: [*ids, ids[-1] + 2],
        lambda ids: [*ids, 2**70],
        lambda ids: [*map(float, ids)],
        # Equal to 0 and 1, but no ids.
        lambda ids: [False, True, *ids[2:]],
        lambda ids: [*map(str, ids)],
        lambda ids: [ids],
        lambda ids: {str(i): i for i in ids},
        lambda ids: None,
        lambda ids: 5,
        lambda ids: "",
    ],
)
def test_damaged_compact_states_are_refused(gpt2, change):
    state = json.loads(json.dumps(compacted(gpt2, [300, 310]).to_state()))
    assert (
        state["base_ids"][:2] == [0, 1]
        and tokenizer_from_state(state).base_ids == state["base_ids"]
    )
    with pytest.raises(
        ValueError,
        match=(
            "^the stored tokenizer gpt2:compact is damaged: its base_ids must be ascending ids "
            "of tokens of gpt2, with all .*$"
        ),
    ):
        tokenizer_from_state(state | {"base_ids": change(state["base_ids"])})


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "0" * 64},
        {"vocabulary_size": 258},
        {"end_of_text_id": 0},
        {"base_ids": [300, 311]},
    ],
)
def test_compact_states_must_be_what_they_say(gpt2, change):
    """Well-formed ids that are others than the fingerprint's, too."""
    if "base_ids" in change:
        change = {"base_ids": compacted(gpt2, change["base_ids"]).base_ids}
    with pytest.raises(
        ValueError,
        match=(
            r"^the stored tokenizer gpt2:compact is not the gpt2:compact found here: its \w+ is "
            r".*$"
        ),
    ):
        tokenizer_from_state(compacted(gpt2, [300, 310]).to_state() | change)


def test_a_compact_state_wants_the_base_it_was_made_from(gpt2, monkeypatch):
    state = compacted(gpt2, [300]).to_state()
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", stand_in([b"zq"]))
    for wrong in (state, state | {"base_fingerprint": 5}, {"name": "gpt2:compact"}):
        with pytest.raises(
            ValueError,
            match=(
                "^the stored tokenizer gpt2:compact was made from another gpt2 than the one "
                "found here$"
            ),
        ):
            tokenizer_from_state(wrong)


# -------------------------------------------------------------------------------------------- state
def test_state_travels_as_json(bpe, gpt2, o200k):
    for tokenizer in (
        BYTE,
        bpe,
        compacted(gpt2, gpt2.encode("the dog")),
        load_tokenizer("o200k_base"),
    ):
        again = tokenizer_from_state(json.loads(json.dumps(tokenizer.to_state())))
        assert again.summary() == tokenizer.summary()
        assert again.encode(TALE[0]) == tokenizer.encode(TALE[0])
    # By name, not by its 200,000 tokens.
    assert len(json.dumps(load_tokenizer("o200k_base").to_state())) < 300


def test_fingerprints_tell_vocabularies_apart(bpe):
    other = train_bpe(["entirely different words in this one here " * 5], 300 - 20)
    assert len({BYTE.fingerprint, bpe.fingerprint, other.fingerprint}) == 3


def _swapped(state):
    tokens = state["tokens"]
    return state | {"tokens": tokens[:-2] + tokens[:-3:-1]}


@pytest.mark.parametrize(
    "damage",
    [
        _swapped,
        lambda s: s | {"tokens": s["tokens"][:-1]},
        lambda s: s | {"tokens": s["tokens"][:-1] + s["tokens"][:1]},
        lambda s: s | {"tokens": s["tokens"][:-1] + [""]},
        lambda s: s | {"tokens": s["tokens"][1:2] + s["tokens"][1:]},
        lambda s: s | {"tokens": 5},
        lambda s: s | {"tokens": [1, 2]},
        lambda s: s | {"tokens": ["not base64!"]},
        lambda s: s | {"fingerprint": "0" * 64},
        lambda s: s | {"vocabulary_size": 299},
        lambda s: s | {"end_of_text_id": 0},
        lambda s: s | {"name": "bpe:999999999999"},
        lambda s: s | {"name": "o300k"},
        lambda s: {k: v for k, v in s.items() if k != "name"},
        lambda s: {k: v for k, v in s.items() if k != "tokens"},
        lambda s: [],
    ],
)
def test_damaged_states_are_refused(bpe, damage):
    """P9: another tokenizer's ids gave garbage with exit 0."""
    with pytest.raises(ValueError) as caught:
        tokenizer_from_state(damage(bpe.to_state()))
    assert "\n" not in str(caught.value)


def test_bpe_is_loaded_from_its_folder(bpe, tmp_path):
    with pytest.raises(ValueError, match="give the folder"):
        load_tokenizer("bpe:300")
    with pytest.raises(ValueError, match="does not exist"):
        load_tokenizer("bpe:300", tmp_path)
    (tmp_path / STATE_FILE).write_text(json.dumps(bpe.to_state()))
    assert load_tokenizer("bpe:300", tmp_path).fingerprint == bpe.fingerprint
    with pytest.raises(ValueError, match="holds bpe:300, not bpe:400"):
        load_tokenizer("bpe:400", tmp_path)
    (tmp_path / STATE_FILE).write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        load_tokenizer("bpe:300", tmp_path)


def test_compact_is_loaded_from_its_folder(gpt2, tmp_path):
    with pytest.raises(
        ValueError, match="tokenizer gpt2:compact is made from a text: give the folder"
    ):
        load_tokenizer("gpt2:compact")
    tokenizer = compacted(gpt2, gpt2.encode("the dog"))
    (tmp_path / STATE_FILE).write_text(json.dumps(tokenizer.to_state()))
    assert load_tokenizer("gpt2:compact", tmp_path).fingerprint == tokenizer.fingerprint
    with pytest.raises(ValueError, match="holds gpt2:compact, not o200k_base:compact"):
        load_tokenizer("o200k_base:compact", tmp_path)


# ------------------------------------------------------------------------------------------ network
def test_a_failed_download_is_one_line_with_a_way_out(monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise requests.ConnectionError("no\nnetwork")

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", no_network)
    with pytest.raises(
        ValueError,
        match=(
            "gpt2 could not be downloaded .*no network.*TIKTOKEN_CACHE_DIR to a folder with "
            "vocab.bpe and encoder.json,.*--tokenizer byte.*bpe:8192"
        ),
    ) as caught:
        load_tokenizer("gpt2")
    assert "\n" not in str(caught.value)


@pytest.fixture
def no_network(monkeypatch):
    """Nothing is downloaded, and no vocabulary is loaded yet."""

    def fails(*args, **kwargs):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(requests, "get", fails)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})


def test_a_vocabulary_is_found_under_its_plain_name(o200k, shared_dir, tmp_path, monkeypatch):
    """TIKTOKEN_CACHE_DIR with o200k_base.tiktoken in it: "could not be downloaded".

    tiktoken looks for a SHA-1 that is named nowhere. A folder that is not writable will do.
    """
    expected = load_tokenizer("o200k_base").fingerprint
    folder = tmp_path / "vocabularies"
    folder.mkdir()
    shutil.copy(shared_dir / "o200k_base.tiktoken", folder)
    folder.chmod(0o500)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(folder))
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    assert load_tokenizer("o200k_base").fingerprint == expected
    assert [path.name for path in folder.iterdir()] == ["o200k_base.tiktoken"]


def test_another_file_under_a_plain_name_is_not_read(no_network, tmp_path, monkeypatch):
    (tmp_path / "o200k_base.tiktoken").write_text("IQ== 0\n")
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"no network\): .*o200k_base.tiktoken is another file or damaged; set"
    ) as caught:
        load_tokenizer("o200k_base")
    assert "\n" not in str(caught.value)


def test_import_reaches_for_nothing():
    """Reliability 33: importing downloads nothing.

    The original implementation downloaded its tokenizer while its config was imported.
    """
    code = """
import sys
events = []
def hook(event, args):
    if event.startswith("socket."):
        events.append((event, args))
sys.addaudithook(hook)
import runtime.data.tokenizers, tiktoken.registry
assert not events, events
assert not tiktoken.registry.ENCODINGS
assert not {"tokenizers", "datasets", "torch", "requests"} & set(sys.modules), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPO, check=True)
