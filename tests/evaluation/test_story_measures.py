"""Measures of stories: known answers, and copies from a training text."""

from __future__ import annotations

import random

import numpy as np
import pytest

from runtime.evaluation import copied
from runtime.evaluation.copied import RUN_WORDS, CopySearch
from runtime.evaluation.sentences import words
from runtime.evaluation.story_measures import (
    distinct,
    first_name,
    is_closed,
    known_pronouns,
    new_names,
    pronoun_fits,
    repeated,
    returns,
    shared,
)

LETTERS = "bcdfghjklmnpqrstvwxz"


def word(number: int) -> str:
    return "".join(LETTERS[number // 20**i % 20] for i in range(3))


def test_repetition_has_a_known_share():
    """The same 10 words four times: of 37 runs of four, the first 10 are new."""
    text = [word(i) for i in range(10)] * 4
    assert repeated(text) == (27, 37) and distinct(text, 4) == (10, 37)
    assert distinct(text, 1) == (10, 40) and repeated(text[:10]) == (0, 7)
    assert repeated([]) == distinct(["a"], 2) == (0, 0)


def test_what_texts_share_is_not_what_one_repeats():
    """A model that always tells the same story repeats nothing within it."""
    same = [word(i) for i in range(10)]
    other = [word(i) for i in range(50, 60)]
    assert shared([same, same, other]) == [(7, 7), (7, 7), (0, 7)]
    assert shared([same + same, other]) == [(0, 10), (0, 7)]


@pytest.mark.parametrize(
    "text, closed",
    [
        ("They went home.", True),
        ('"Yes!" she said. "Bye."', True),
        ('"Yes! she said.', False),
        ("They went", False),
        ("They went home. \n", True),
        ("\u201cYes.\u201d", True),
        ("\u201cYes.", False),
        ("", False),
        ("He said, 'Bye!'", True),
    ],
)
def test_a_story_is_closed_after_a_sentence_and_its_quotes(text, closed):
    assert is_closed("One.", text) is closed


def test_quotes_that_the_prompt_opens_are_closed_in_the_continuation():
    """Only the continuation was looked at: a mark that closes the prompt's quotes opened some."""
    assert is_closed('He said, "Go. Run.', ' Now!" They ran.')
    assert not is_closed('He said, "Go. Run.', " They ran.")
    assert not is_closed("One. Two.", " ")


# ------------------------------------------------------------------------------ names
PROMPT = "There was a boy called Tom. Tom had a ball."


def test_the_first_name_returns_or_not():
    assert first_name(PROMPT) == "Tom" and first_name("A cat sat.") == ""
    assert returns(PROMPT, " Then Tom ran.") == (1, 1)
    assert returns(PROMPT, " Tommy ran.") == (0, 1) and returns(PROMPT, "") == (0, 1)
    assert returns("A cat sat.", "Tom ran.") == (0, 0)


def test_a_new_name_should_be_used_again():
    assert new_names(PROMPT, " He met Mia and Ben. Mia ran, and Tom sat.") == (1, 2)
    assert new_names(PROMPT, " He met Tom.") == (0, 0)


def test_pronouns_of_names_are_learned_where_texts_agree():
    texts = [f"It was {name}. {pronoun} ran." for name, pronoun in (("Tom", "He"), ("Mia", "She"))]
    texts = texts * 5 + ["It was Sam. He ran.", "It was Sam. She ran."] * 5
    assert known_pronouns(texts) == {"Tom": True, "Mia": False}
    assert known_pronouns(texts[:8]) == {}


def test_a_pronoun_fits_the_first_name():
    known = {"Tom": True}
    assert pronoun_fits(PROMPT, " He sat.", known) == (1, 1)
    assert pronoun_fits(PROMPT, " She sat. He ran.", known) == (0, 1)
    # Another name comes first: the pronoun may be its own.
    assert pronoun_fits(PROMPT, " He met Mia. She sat.", known) == (1, 1)
    assert pronoun_fits(PROMPT, " So did Mia. She sat.", known) == (0, 0)
    assert pronoun_fits(PROMPT, " It rained.", known) == (0, 0)
    assert pronoun_fits(PROMPT, " He sat.", {}) == (0, 0)


# ------------------------------------------------------------------------------ copies
def plain_search(texts: list[str], training: list[str]) -> list[tuple[int, int, int]]:
    """Return (runs, copied runs, longest copy) of each text, by comparing all with all."""
    found = []
    sources = [words(document) for document in training]
    for text in texts:
        own = words(text)
        longest_at = []
        for i in range(len(own)):
            longest = 0
            for source in sources:
                for j in range(len(source)):
                    n = 0
                    while i + n < len(own) and j + n < len(source) and own[i + n] == source[j + n]:
                        n += 1
                    longest = max(longest, n)
            longest_at.append(longest)
        runs = max(0, len(own) - RUN_WORDS + 1)
        most = max(longest_at, default=0)
        found.append(
            (runs, sum(n >= RUN_WORDS for n in longest_at), most if most >= RUN_WORDS else 0)
        )
    return found


@pytest.mark.parametrize("seed", range(8))
def test_copies_are_those_of_a_plain_search(seed, monkeypatch):
    """In parts of few words, and with words that repeat so much that runs overlap themselves."""
    r = random.Random(seed)
    monkeypatch.setattr(copied, "PART_WORDS", r.choice([1, 50, 100_000]))
    vocabulary = [word(i) for i in range(r.choice([2, 5, 300]))]
    training = [" ".join(r.choice(vocabulary) for _ in range(r.randint(0, 60))) for _ in range(6)]
    texts = []
    for _ in range(4):
        source = words(r.choice(training))
        start = r.randint(0, len(source))
        piece = source[start : start + r.randint(0, 30)]
        texts.append(" ".join([*(r.choice(vocabulary) for _ in range(5)), *piece, "unseen"] * 2))
    search = CopySearch(texts)
    search.read(training)
    found = zip(search.num_runs, search.num_copied, search.longest, strict=True)
    assert [tuple(map(int, one)) for one in found] == plain_search(texts, training)


def test_a_copy_of_known_length_is_found_across_case_and_punctuation():
    source = [word(i) for i in range(100)]
    text = " ".join([word(200), *source[20:40], word(201)])
    search = CopySearch([text, "nothing here"])
    search.read([", ".join(source).upper()])
    assert search.num_runs.tolist() == [15, 0]
    assert search.num_copied.tolist() == [13, 0] and search.longest.tolist() == [20, 0]


def test_a_copy_does_not_join_two_documents():
    """The end of one document and the start of the next are no passage of the training text."""
    source = [word(i) for i in range(12)]
    search = CopySearch([" ".join(source)])
    search.read([" ".join(source[:6]), " ".join(source[6:])])
    assert search.num_copied.tolist() == [0]


def test_equal_hashes_of_other_words_are_no_copy(monkeypatch):
    """The training text had words that no text has, so no hash was ever met by other words."""
    monkeypatch.setattr(copied, "_FACTOR", np.uint64(0))
    first, second, *rest = [word(i) for i in range(12)]
    # Every run that ends with the same word has the same hash now; all words are known.
    search = CopySearch([" ".join([first, second, *rest])])
    search.read([" ".join([second, first, *rest[:6]])])
    assert search.num_copied.tolist() == [0] and search.longest.tolist() == [0]
    search.read([" ".join([first, second, *rest[:6]])])
    assert search.num_copied.tolist() == [1] and search.longest.tolist() == [8]
