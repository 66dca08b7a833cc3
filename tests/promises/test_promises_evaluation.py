"""Check that the guarantees of tests/promises/evaluation.py can be broken."""

from __future__ import annotations

import random

import numpy as np

from runtime.data.formats import Counts
from runtime.evaluation import bootstrap, choice_formats, choices, information
from runtime.evaluation.evaluate import Scorer as Used
from runtime.inference.scorer import Scorer, Scores
from tests.promises import evaluation


def test_intervals_that_are_too_narrow_are_noticed(monkeypatch):
    monkeypatch.setattr(bootstrap, "tail", lambda documents: 0.1)
    assert evaluation.coverage(150).held == 0


def test_a_second_model_that_is_scored_otherwise_is_noticed(monkeypatch):
    """The other checkpoint's scores are a little off."""
    calls = iter(range(100))

    def scores(self, documents, firsts=None, real=Scorer.scores):
        off = 1e-12 * next(calls)
        for one in real(self, documents, firsts):
            yield Scores(one.log_probs_T + off, *one[1:])

    monkeypatch.setattr(Used, "scores", scores)
    assert evaluation.against_itself(1).held == 0


def test_a_score_that_depends_on_its_company_is_noticed(monkeypatch):
    def scores(self, documents, firsts=None, real=Scorer.scores):
        for number, one in enumerate(real(self, documents, firsts)):
            off = 1e-9 * number * random.random()
            yield Scores(one.log_probs_T * (1 + off), *one[1:])

    monkeypatch.setattr(Used, "scores", scores)
    assert evaluation.same_bytes(2).held == 0


def test_a_wrong_answer_is_noticed(monkeypatch):
    """Ties are worth more than chance, all runs repeat, no copy is found, chance is left out."""
    monkeypatch.setattr(choices, "credit", lambda scores, right: float(right == 0) + 1e-3)
    monkeypatch.setattr(evaluation, "repeated", lambda words: (len(words), len(words)))
    monkeypatch.setattr(evaluation.CopySearch, "read", lambda self, documents: None)
    falling = iter(np.arange(10_000.0)[::-1])
    monkeypatch.setattr(information, "counted", lambda a_N, b_N: float(next(falling)))
    assert evaluation.known_answers(4).held == 0


def test_rows_that_are_left_out_in_silence_are_noticed(monkeypatch):
    def rows(file, counts: Counts, real=choice_formats.read_rows):
        rows = list(real(file, counts))
        yield from rows[:1] * len(rows)

    monkeypatch.setattr(choice_formats, "read_rows", rows)
    assert evaluation.hostile_tasks(10).held < 10
