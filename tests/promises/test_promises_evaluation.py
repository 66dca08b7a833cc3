"""Check that the guarantees of tests/promises/evaluation.py can be broken."""

from __future__ import annotations

import random

import numpy as np

from runtime.data.formats import Counts
from runtime.evaluation import bootstrap, choice_formats, choices, compared, information
from runtime.evaluation.bootstrap import difference_intervals
from runtime.evaluation.evaluate import Scorer as Used
from runtime.inference.scorer import Scorer, Scores
from tests.promises import evaluation


def test_intervals_that_are_too_narrow_are_noticed(monkeypatch):
    monkeypatch.setattr(bootstrap, "tail", lambda documents: 0.4)
    monkeypatch.setattr(compared, "NORMAL_975", 0.3)
    assert evaluation.coverage(50).held == 0


def test_what_was_too_sure_before_is_noticed(monkeypatch):
    """A basic interval of the calibration error, and a bootstrap of answers that rarely differ."""

    def basic(sums_DK, resamples, seed, real=evaluation.calibration_intervals):
        error, gap = real(sums_DK, resamples, seed)
        # Its upper end is that of the resampled errors.
        return error._replace(low=max(0.0, 2 * error.value - error.high)), gap

    def drawn(mine_Q, other_Q):
        ones = np.ones((len(mine_Q), 1))
        return difference_intervals(mine_Q[:, None], ones, other_Q[:, None], ones, 100)[0]

    monkeypatch.setattr(evaluation, "calibration_intervals", basic)
    monkeypatch.setattr(evaluation, "paired_difference", drawn)
    failures = evaluation.coverage(50).failures
    missed = {line.split(":")[0] for line in failures}
    assert {f"_calibrated of {D} documents" for D in (12, 30, 100)} <= missed
    assert {f"_rarely of {D} documents" for D in (12, 30)} <= missed


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
