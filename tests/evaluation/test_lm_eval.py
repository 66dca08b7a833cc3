"""What lm-evaluation-harness asks, answered without it: scores, generated text, its absence."""

from __future__ import annotations

import sys

import pytest
import torch

from runtime.data.tokenizers import load_tokenizer
from runtime.evaluation.choices import Request, answers
from runtime.evaluation.lm_eval import Reader, find_tasks
from runtime.inference.scorer import Scorer
from tests.builders import random_model, tiny_config
from tests.builders_inference import biased_model

BYTE = load_tokenizer("byte")
END = BYTE.end_of_text_id
CONTEXT = 64


@pytest.fixture(scope="module")
def reader() -> Reader:
    config = tiny_config(vocabulary_size=BYTE.vocabulary_size, context_length=CONTEXT)
    return Reader(Scorer(random_model(config, 1)), BYTE, BYTE.banned_ids)


def speller(text: str) -> Reader:
    """A model that always finds the bytes of a text most likely, in their order in it."""
    biases = {byte: 40.0 - i for i, byte in enumerate(text.encode())}
    model = biased_model(0, biases, vocabulary_size=BYTE.vocabulary_size, context_length=CONTEXT)
    with torch.no_grad():
        model.out_head.weight.zero_()
    return Reader(Scorer(model), BYTE)


def test_the_start_token_comes_once(reader):
    """lm-eval gives it as the context of a text that has none."""
    bare, given = ([*b"Tom"], [*b" ran"]), ([END, *b"Tom"], [*b" ran"])
    assert reader.log_likelihoods([bare]) == reader.log_likelihoods([given])
    (expected,) = answers(reader.scorer, [Request((END, *b"Tom ran"), 4)])
    assert reader.log_likelihoods([bare]) == [(expected.log_prob, expected.is_greedy)]
    (window,) = answers(reader.scorer, [Request((*b"Tom ran",), 3)])
    assert reader.log_likelihoods([bare], starts=False) == [(window.log_prob, window.is_greedy)]


def test_an_empty_continuation_is_certain_and_a_long_context_is_cut(reader):
    long = ([*b"a" * 100], [*b" ran"])
    cut = ([*b"a" * (CONTEXT + 1 - 4)], [*b" ran"])
    found = reader.log_likelihoods([([*b"Tom"], []), long, cut])
    assert found[0] == (0.0, True)
    assert found[1] == reader.log_likelihoods([cut], starts=False)[0]


def test_a_generated_answer_ends_before_its_stop_text():
    reader = speller("a")
    assert reader.all_generated(["x"], {"max_gen_toks": 5}) == ["aaaaa"]
    settings = {"max_gen_toks": 9, "until": ["aaa"]}
    assert reader.all_generated(["x", "yy", "z"], settings) == [""] * 3
    # The end of text never shows.
    stops = biased_model(
        0, {END: 40.0}, vocabulary_size=BYTE.vocabulary_size, context_length=CONTEXT
    )
    with torch.no_grad():
        stops.out_head.weight.zero_()
    assert Reader(Scorer(stops), BYTE).all_generated(["x"], {}) == [""]


def test_what_may_be_a_stop_text_is_text_at_the_end():
    """The text that waited for the rest of a stop text must not be lost."""
    assert speller("a").all_generated(["x"], {"max_gen_toks": 4, "until": ["ab"]}) == ["aaaa"]


def test_a_part_of_a_character_at_the_end_is_shown_unless_a_stop_text_came():
    first = "\u00e9".encode()[:1].decode("latin-1")
    model = biased_model(
        0, {ord(first): 40.0}, vocabulary_size=BYTE.vocabulary_size, context_length=CONTEXT
    )
    with torch.no_grad():
        model.out_head.weight.zero_()
    found = Reader(Scorer(model), BYTE).all_generated(["x"], {"max_gen_toks": 2})
    assert found == ["\N{REPLACEMENT CHARACTER}" * 2]


def test_greedy_unless_the_task_samples_and_each_answer_by_itself(reader):
    settings = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    together = reader.all_generated(["Tom", "Mia ran"], settings)
    alone = [reader.all_generated([text], settings)[0] for text in ("Tom", "Mia ran")]
    assert together == alone
    greedy = reader.all_generated(["Tom"], {"max_gen_toks": 12, "temperature": 1.0})
    assert greedy == reader.all_generated(["Tom"], {"max_gen_toks": 12, "do_sample": False})
    assert greedy != together[:1]


def test_a_context_without_room_is_read_from_its_end(reader):
    short = {"max_gen_toks": 10}
    long = "a" * 200 + "Tom"
    assert reader.all_generated([long], short) == reader.all_generated(["x" + long[-120:]], short)
    assert reader.all_generated([long], {"max_gen_toks": 10_000})[0] is not None


def test_a_setting_that_is_not_known_is_refused(reader):
    with pytest.raises(ValueError, match="asks to generate with num_beams, which is not known"):
        reader.all_generated(["x"], {"num_beams": 4})


def test_without_a_token_before_a_text_it_is_refused(reader):
    class Bare:
        start_id = end_of_text_id = None

    with pytest.raises(ValueError, match="neither a start token nor end-of-text"):
        Reader(reader.scorer, Bare())


def test_without_lm_eval_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r'pip install -e "\.\[lm-eval\]"'):
        find_tasks(["hellaswag"])
