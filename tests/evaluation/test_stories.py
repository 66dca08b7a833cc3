"""Generated stories next to human ones: what is continued, measured alike, and repeatable."""

from __future__ import annotations

import math
import random

import pytest
import torch

from runtime.data import toy_stories
from runtime.data.tokenizers import load_tokenizer, train_bpe
from runtime.evaluation import stories
from runtime.evaluation.stories import (
    Measure,
    Writer,
    beginnings,
    bits_measure,
    evaluate_stories,
    figure_of,
)
from runtime.inference.decoder import Decoder
from runtime.inference.scorer import Scorer
from tests.builders import random_model, tiny_config
from tests.builders_evaluation import checkpoint, report_of, write_texts

BYTE = load_tokenizer("byte")
TEXTS = [toy_stories.story(i) for i in range(30)]
CONTEXT = 256


@pytest.fixture(scope="module")
def model():
    config = tiny_config(vocabulary_size=BYTE.vocabulary_size, context_length=CONTEXT)
    model = random_model(config, 1)
    # A model that draws any byte alike.
    with torch.no_grad():
        model.out_head.weight.zero_()
    return model


def writer_of(model, **settings) -> Writer:
    return Writer(Decoder(model), BYTE, BYTE.banned_ids, **(dict(max_new_tokens=40) | settings))


def evaluated(model, texts=TEXTS, training=None, number: int = 6, **settings) -> dict:
    writer = writer_of(model, **settings)
    return evaluate_stories(Scorer(writer.decoder), writer, texts, number, training)


# ------------------------------------------------------------------------------ beginnings
def test_a_beginning_and_its_rest_are_the_story():
    some, others = beginnings(TEXTS, 6)
    assert len(some) == 6 and len(some) + len(others) == len(TEXTS)
    for one in some:
        assert one.prompt + one.rest in [text.strip() for text in TEXTS]
        assert len(stories.sentence_starts(one.prompt)) == stories.PROMPT_SENTENCES
    assert beginnings(["One. Two. Three."], 6) == ([], ["One. Two. Three."])


def test_human_text_is_cut_where_the_models_is(model):
    """Else the human text would be longer, and seem to end better and to repeat more."""
    writer = writer_of(model)
    (one,) = beginnings(TEXTS, 1)[0]
    human = writer.human(one)
    assert len(human.ids) == 40 and not human.ended and one.rest.startswith(human.text)
    whole = writer_of(model, max_new_tokens=10_000)
    room = CONTEXT - len(writer.prompt_ids(one))
    assert len(whole.human(one).ids) == min(room, len(one.rest.encode()))
    short = stories.Beginning("One.", " Two.")
    assert writer.human(short) == stories.Continuation(" Two.", tuple(b" Two."), True)


def test_a_token_over_the_border_loses_no_text_of_the_author(model):
    """Many vocabularies join a full stop and a line's end: the author's rest lacked that line.

    Its bits were those of a text that nobody wrote.
    """
    tokenizer = train_bpe(["One.\nTwo.\n" * 400], 262)
    (token,) = tokenizer.encode(".\n")
    writer = Writer(Decoder(model), tokenizer, tokenizer.banned_ids, max_new_tokens=40)
    human = writer.human(stories.Beginning("One.", "\nTwo."))
    assert token in tokenizer.encode("One.\nTwo.") and human.text == "\nTwo."
    assert human.ids == tuple(tokenizer.encode("\nTwo."))


def test_an_end_takes_a_token_of_the_author_too(model):
    """A model that fills its room has not ended, and an author who did was said to."""
    rest = " Two."
    for room, ended in ((len(rest), False), (len(rest) + 1, True)):
        writer = writer_of(model, max_new_tokens=room)
        assert writer.human(stories.Beginning("One.", rest)).ended == ended


# ------------------------------------------------------------------------------ the model
def test_a_continuation_depends_on_its_beginning_alone(model):
    """Whatever else is generated with it, and in which order: a report can be made again."""
    some, _ = beginnings(TEXTS, 6)
    writer = writer_of(model)
    together = list(writer.written(some))
    assert list(writer.written(some[::-1]))[::-1] == together
    assert [next(iter(writer.written([one]))) for one in some] == together
    assert len({one.text for one in together}) == 6
    assert list(writer_of(model, seed=1).written(some)) != together


def test_a_story_ends_by_itself_or_at_its_limit(model):
    some, _ = beginnings(TEXTS, 2)
    never = Writer(Decoder(model), BYTE, [*BYTE.banned_ids, BYTE.end_of_text_id], 1.0, 12)
    assert [(len(one.ids), one.ended) for one in never.written(some)] == [(12, False)] * 2
    others = [i for i in range(BYTE.vocabulary_size) if i != BYTE.end_of_text_id]
    at_once = Writer(Decoder(model), BYTE, others, 1.0, 12)
    assert [(one.text, one.ended) for one in at_once.written(some)] == [("", True)] * 2


def test_bits_per_byte_of_a_model_that_knows_nothing(model):
    """Uniform over the vocabulary: log2 of its size for each token, here one byte."""
    some, _ = beginnings(TEXTS, 4)
    writer = writer_of(model)
    human = [writer.human(one) for one in some]
    measure = bits_measure(Scorer(writer.decoder), writer, some, human)
    value = figure_of(measure)["value"]
    assert value == pytest.approx(math.log2(BYTE.vocabulary_size), rel=1e-6)


# ------------------------------------------------------------------------------ the section
def test_every_figure_stands_next_to_the_human_one(model):
    found = evaluated(model, training=TEXTS[:3])
    keys = [key for key in found["figures"] if not key.endswith("_human")]
    assert set(found["figures"]) == {*keys, *(f"{key}_human" for key in keys)}
    assert {"repeated_4grams", "ended", "copied_8grams", "longest_copy", "bits_per_byte"} <= {*keys}
    for row in found["rows"]["rows"]:
        assert len(row) == 9
    # Random bytes are no words of a story.
    assert found["figures"]["copied_8grams"]["value"] in (0, None)
    assert "copies were not looked for" in evaluated(model)["notes"][-1]


def test_copies_of_human_text_are_found(model):
    """The human side copies everything if the training text has these very stories."""
    found = evaluated(model, training=TEXTS, max_new_tokens=200)["figures"]
    assert found["copied_8grams_human"]["value"] > 0.9
    assert found["longest_copy_human"]["value"] > 8


def test_the_order_of_documents_changes_no_byte(model):
    texts = TEXTS.copy()
    random.Random(0).shuffle(texts)
    assert evaluated(model, texts) == evaluated(model)


def test_texts_without_stories_are_refused(model):
    with pytest.raises(ValueError, match="no held-out document can be continued"):
        evaluated(model, ["too short"] * 5)


def test_a_figure_has_an_interval_and_counts_what_it_is_of():
    share = figure_of(Measure("a", "a", [(1, 1), (0, 1), (0, 0)], is_share=True))
    assert share["value"] == 0.5 and share["n"] == 2 and share["low"] < 0.5 < share["high"]
    ratio = figure_of(Measure("a", "a", [(1, 10), (3, 10), (2, 20)] * 3))
    assert ratio["value"] == pytest.approx(6 / 40) and ratio["n"] == 120
    assert ratio["low"] < 6 / 40 < ratio["high"]
    mean = figure_of(Measure("a", "a", [(3, 1), (5, 1)], unit="words"))
    assert mean["value"] == 4 and mean["n"] == 2
    assert figure_of(Measure("a", "a", [(0, 0)])) == {"value": None, "n": 0}


def test_resamples_are_those_that_were_asked_for(model, tmp_path):
    """All intervals of stories were of 2,000 resamples, whatever --resamples said."""
    files, ckpt = write_texts(tmp_path / "stories.jsonl", TEXTS), checkpoint(tmp_path, model)
    few, many = (
        report_of(ckpt, files, stories=10, resamples=count)["stories"]["figures"]["words_human"]
        for count in (100, 2000)
    )
    assert few["value"] == many["value"] and few["high"] != many["high"]
    given = Scorer(Decoder(model)), writer_of(model, max_new_tokens=256), TEXTS, 10
    assert evaluate_stories(*given)["figures"]["words_human"] == many
