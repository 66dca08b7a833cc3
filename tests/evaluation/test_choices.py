"""Answers by probability: what is scored, by which measure, and what chance and company change."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from runtime.base.shares import wilson
from runtime.data.tokenizers import load_tokenizer, train_bpe
from runtime.evaluation.choice_formats import CHOICES, GREEDY, SCHEMA, Question, Task
from runtime.evaluation.choices import (
    Request,
    answers,
    choices_section,
    credit,
    fitted,
    request,
    score_task,
)
from runtime.inference.scorer import Scorer
from tests.builders import random_model, tiny_config
from tests.builders_evaluation import evaluate_choices

BYTE = load_tokenizer("byte")
END = BYTE.end_of_text_id


class Fixed:
    """Scores by a rule of (ids before, id) in the place of a model."""

    def __init__(self, rule, context: int = 1000):
        self.rule, self.context = rule, context

    def scores(self, documents, firsts):
        for ids, first in zip(documents, firsts, strict=True):
            log_probs = [self.rule(ids[:i], ids[i]) for i in range(first, len(ids))]
            values = np.array(log_probs, dtype=np.float64)
            yield SimpleNamespace(log_probs_T=values, is_greedy_T=values > -1)


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config(vocabulary_size=BYTE.vocabulary_size, context_length=64), 1)


def task_of(*questions: Question) -> Task:
    return Task("task", "plain", questions)


def asked(context: str, *continuations: str, right: int = 0) -> Question:
    return Question(CHOICES, (context,), continuations, right, "task.jsonl line 1")


# ------------------------------------------------------------------------------ requests
def test_a_request_starts_as_training_does_and_is_parted_where_the_context_ends():
    made, is_cut = request(BYTE, "Tom ran", " home.", 100)
    assert made == Request((END, *b"Tom ran home."), 1 + len("Tom ran")) and not is_cut


def test_blanks_at_the_end_of_a_context_belong_to_the_continuation():
    """As lm-eval has it: most vocabularies put a blank before a word into its token."""
    assert request(BYTE, "Tom ran ", "home.", 100) == request(BYTE, "Tom ran", " home.", 100)
    made, _ = request(BYTE, " \n", "home.", 100)
    assert made == Request((END, *b" \nhome."), 1)


def test_tokens_that_reach_over_the_border_count_as_the_answer():
    """The context alone can have as many tokens as all: nothing would be scored."""
    tokenizer = train_bpe(["aaab" * 200, "aaa" * 200], 262)
    whole = tokenizer.encode("aaab")
    for context in ("a", "aa", "aaa"):
        made, _ = request(tokenizer, context, "aaab"[len(context) :], 100)
        assert made.ids[1:] == tuple(whole) and 1 <= made.first < len(made.ids)


def test_a_long_question_is_read_from_its_end_and_a_long_answer_is_refused():
    made, is_cut = fitted(list(range(20)), 15, 8)
    assert made == Request(tuple(range(11, 20)), 4) and is_cut
    made, is_cut = fitted(list(range(9)), 1, 8)
    assert made == Request(tuple(range(9)), 1) and not is_cut
    # Of nine ids, eight are read: the first of them is not the answer's.
    assert fitted(list(range(20)), 12, 8)[0].first == 1
    with pytest.raises(ValueError, match="an answer has 9 tokens, and the model's context 8"):
        fitted(list(range(20)), 11, 8)


def test_an_answer_that_does_not_fit_ends_with_its_line(model):
    question = asked("a", "b" * 100, "c")
    with pytest.raises(ValueError, match=r"^task.jsonl line 1: an answer has 101 tokens"):
        score_task(Scorer(model), BYTE, task_of(question))


def test_equal_requests_are_scored_once():
    seen = []

    class Counting(Fixed):
        def scores(self, documents, firsts):
            documents = list(documents)
            seen.extend(documents)
            return super().scores(documents, firsts)

    scorer = Counting(lambda before, own: -float(own))
    requests = [Request((9, 1, 2), 1), Request((9, 1, 2), 2), Request((9, 1, 2), 1)]
    found = answers(scorer, requests)
    assert seen == [[9, 1, 2]]
    assert [(one.log_prob, one.num_tokens) for one in found] == [(-3, 2), (-2, 1), (-3, 2)]


def test_answers_are_the_models_own_log_probabilities(model):
    """Against log_softmax of the plain model, each text by itself."""
    pairs = [("Tom", " ran"), ("Tom", " sat down"), ("", "Tom ran"), ("It was", " good")]
    requests = [request(BYTE, *pair, 64)[0] for pair in pairs]
    for one, found in zip(requests, answers(Scorer(model), requests), strict=True):
        logits_TV = model(torch.tensor([one.ids[:-1]])).logits[0].double()
        log_probs_TV = logits_TV.log_softmax(1)[one.first - 1 :]
        targets_T = torch.tensor(one.ids[one.first :])
        expected = log_probs_TV.gather(1, targets_T[:, None]).sum().item()
        # Sums of up to 10 of them, each with an error of float32 logits below 64.
        assert abs(found.log_prob - expected) < 10 * 64 * 2**-23 * 64
        assert found.num_tokens == len(targets_T)
        assert found.is_greedy == bool((log_probs_TV.argmax(1) == targets_T).all())


# ------------------------------------------------------------------------------ measures
def test_a_credit_is_shared_by_equal_scores():
    assert credit([1.0, 0.0], 0) == 1 and credit([1.0, 0.0], 1) == 0
    assert credit([1.0, 1.0, 0.0], 1) == 0.5 and credit([1.0, 1.0, 0.0], 2) == 0
    assert credit([2.0] * 4, 3) == 0.25


def test_each_measure_has_its_winner():
    """Three answers, each of which one measure prefers: no column is another one's copy."""
    # "\u00e9" is one character, two bytes and here two tokens.
    log_probs = {ord("a"): -2.0, ord("b"): -0.8, ord("c"): -1.5}

    def rule(before, own):
        # "a" is likely anyway; "c" only after the context.
        if own == ord("c") and ord("Q") not in before:
            return -9.0
        return log_probs.get(own, 0.0)

    expected = {"sum": 0, "per_byte": 1, "per_token": 1, "pmi": 2}
    for right in range(3):
        result = score_task(Fixed(rule), BYTE, task_of(asked("Q", "a", "bbbb", "cc", right=right)))
        won = {name for name, credits in result.credits.items() if credits[0] == 1}
        assert won == {name for name, winner in expected.items() if winner == right}


def test_bytes_and_tokens_are_counted_without_the_blank_and_with_it():
    """Per byte divides by the answer's own bytes, as lm-eval's acc_bytes; a token may have more."""
    # The blank costs 3, every other byte 1: (3 + 1) / 1 byte against (3 + 6) / 6, 4 / 2 and 9 / 7.
    result = score_task(
        Fixed(lambda before, own: -3.0 if own == 32 else -1.0),
        BYTE,
        task_of(asked("Q", "a", "bbbbbb", right=1)),
    )
    assert {name: float(one[0]) for name, one in result.credits.items()} == {
        "sum": 0.0,
        "per_byte": 1.0,
        "per_token": 1.0,
        "pmi": 0.5,
    }


def test_a_schema_has_one_measure_and_a_bare_sentence_no_pmi():
    rule = Fixed(lambda before, own: -1.0 if ord("x") in before else -2.0)
    schema = Question(SCHEMA, ("a", "x"), ("end",), 1)
    assert {n: c.tolist() for n, c in score_task(rule, BYTE, task_of(schema)).credits.items()} == {
        "sum": [1.0]
    }
    bare = score_task(rule, BYTE, task_of(asked("", "ax", "xa", right=1)))
    assert set(bare.credits) == {"sum", "per_byte", "per_token"}


def test_a_greedy_question_needs_every_token():
    rule = Fixed(lambda before, own: -0.5 if own in b" ok" else -2.0)
    good, bad = (Question(GREEDY, ("Q",), (text,), 0) for text in ("ok", "oh"))
    result = score_task(rule, BYTE, task_of(good, bad))
    assert result.credits["greedy"].tolist() == [1.0, 0.0] and result.chances == {}
    section = choices_section([result])
    assert set(section["figures"]) == {"task_greedy"}


# ------------------------------------------------------------------------------ known answers
def test_uniform_logits_give_exactly_chance(model):
    """A model that knows nothing ties on every question, whatever the right answers are."""
    uniform = random_model(model.config, 2)
    with torch.no_grad():
        uniform.out_head.weight.zero_()
    r = random.Random(0)
    questions = []
    for _ in range(40):
        size, length = r.randint(2, 5), r.randint(1, 6)
        texts = ["".join(r.choice("abcdef") for _ in range(length)) for _ in range(size)]
        questions.append(asked("Question", *texts, right=r.randrange(size)))
    section = evaluate_choices(Scorer(uniform), BYTE, [task_of(*questions)])
    chance = math.fsum(1 / len(question.pairs) for question in questions) / 40
    for column in ("sum", "per_byte", "per_token", "pmi"):
        assert section["figures"][f"task_{column}"]["value"] == pytest.approx(chance, abs=1e-12)
        assert section["figures"][f"task_{column}_centered"]["value"] == pytest.approx(0, abs=1e-12)
    (note,) = section["notes"]
    assert "40 questions have likeliest answers of equal score" in note


def test_figures_have_wilsons_interval_chance_and_n():
    rule = Fixed(lambda before, own: -1.0 if own == ord("a") else -2.0)
    questions = [asked("Q", "a", "b", right=0)] * 3 + [asked("Q", "a", "b", right=1)]
    section = evaluate_choices(rule, BYTE, [task_of(*questions)])
    low, high = wilson(3, 4)
    assert section["figures"]["task_sum"] == {"value": 0.75, "n": 4, "low": low, "high": high}
    assert section["figures"]["task_sum_centered"] == {
        "value": 0.5,
        "n": 4,
        "low": 2 * low - 1,
        "high": 2 * high - 1,
    }
    (row,) = [row for row in section["rows"]["rows"] if row[2] == "sum"]
    assert row == ["task", "plain", "sum", 4, 0.75, low, high, 0.5, 0.5]


def test_chance_is_that_of_the_questions_that_a_column_has():
    """A plain question may have no context, and then has no PMI.

    Chance was that of all questions over those with PMI: of 4 questions, half without a context, it
    was 1, and the centered accuracy a division by zero.
    """
    rule = Fixed(lambda before, own: -1.0 if own == ord("a") else -2.0)
    questions = [asked("Q", "a", "b"), asked("", "a", "b"), asked("Q", "c", "a", "b", right=1)]
    section = evaluate_choices(rule, BYTE, [task_of(*questions, asked("", "a", "b", right=1))])
    rows = {row[2]: row for row in section["rows"]["rows"]}
    assert rows["sum"][3] == 4 and rows["sum"][7] == pytest.approx((3 / 2 + 1 / 3) / 4)
    assert rows["PMI"][3] == 2 and rows["PMI"][7] == pytest.approx((1 / 2 + 1 / 3) / 2)
    # Without the context an answer is as likely, so all share the place.
    pmi = section["figures"]["task_pmi"]
    assert pmi["value"] == pytest.approx(5 / 12) and pmi["n"] == 2
    assert section["figures"]["task_pmi_centered"]["value"] == pytest.approx(0)


def test_a_tie_is_counted_once_and_where_it_is():
    """The last question with PMI was looked at again for each question without it."""
    rule = Fixed(lambda before, own: -1.0 if own == ord("a") else -2.0)
    questions = [asked("Q", "a", "b"), asked("", "a", "b"), asked("", "b", "a")]
    assert score_task(rule, BYTE, task_of(*questions)).num_tied == 1
    (note,) = evaluate_choices(rule, BYTE, [task_of(*questions)])["notes"]
    assert note.startswith("task: 1 questions have likeliest answers of equal score")


def test_without_a_start_token_nothing_stands_before_a_bare_answer():
    """An answer of one token ended with a line about the number of a document and a 0.

    A longer one was compared without its first token.
    """

    class Bare:
        start_id = end_of_text_id = None
        encode = BYTE.encode

    rule = Fixed(lambda before, own: -1.0 if own == ord("a") else -2.0)
    result = score_task(rule, Bare(), task_of(asked("Q", "a", "b")))
    assert set(result.credits) == {"sum", "per_byte", "per_token"}
    with pytest.raises(ValueError, match=r"^task.jsonl line 1: .* neither a start token"):
        score_task(rule, Bare(), task_of(asked("", "a", "b")))


def test_questions_made_of_text_that_do_not_fit_are_left_out_and_counted(model):
    """One long last sentence ended the whole evaluation, after all else was measured."""
    questions = [asked("a", "b" * 100, "c"), asked("a", "b", "c")]
    made = Task("ending", "own", questions, is_made=True)
    section = evaluate_choices(Scorer(model), BYTE, [made])
    assert section["figures"]["ending_sum"]["n"] == 1
    assert section["notes"][0].startswith("ending: 1 questions are left out")
    none = evaluate_choices(Scorer(model), BYTE, [Task("a", "own", questions[:1], is_made=True)])
    assert none["figures"] == {} and len(none["notes"]) == 1


def test_a_cut_question_is_counted(model):
    section = evaluate_choices(Scorer(model), BYTE, [task_of(asked("Q" * 100, "a", "b"))])
    assert "task: 1 questions are longer than the context" in section["notes"][0]


# ------------------------------------------------------------------------------ company
@pytest.mark.parametrize("settings", [{}, dict(sliding_window=5)], ids=["full", "window"])
def test_order_and_company_change_no_answer(settings):
    """With the C kernel the same bits: a question alone, and among others in another order."""
    config = tiny_config(vocabulary_size=BYTE.vocabulary_size, context_length=64, **settings)
    scorer = Scorer(random_model(config, 4))
    r = random.Random(1)
    shared = ["Once there was a cat. ", "It rained, so"]
    texts = ["".join(r.choice("abc .") for _ in range(r.randint(1, 12))) + "x" for _ in range(60)]
    requests = [request(BYTE, r.choice(shared), text, 64)[0] for text in texts]
    alone = [answers(scorer, [one])[0] for one in requests]
    order = list(range(60))
    r.shuffle(order)
    mixed = answers(scorer, [requests[i] for i in order])
    for i, found in zip(order, mixed, strict=True):
        if scorer.is_exact:
            assert found == alone[i]
        assert found.log_prob == pytest.approx(alone[i].log_prob, rel=1e-5)
