"""Two checkpoints on the same questions: the paired difference of their accuracies.

Most questions are as hard for one model as for the other, so the difference is surer than either
accuracy: each resample draws the same questions for both.

# Q questions
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from runtime.evaluation.bootstrap import RESAMPLES, Array, Interval, difference_intervals
from runtime.evaluation.choices import COLUMNS, Result
from runtime.evaluation.report import Figure, Section, Table, figure, section

NOTE = (
    "A difference above 0 means that the first checkpoint is more often right. It is paired: both "
    "answer the same questions, and each resample draws the same for both. Where both are right on "
    "the same questions, it is exactly 0, from 0 to 0."
)


def compared_section(
    results: Sequence[Result], others: Sequence[Result], name: str, resamples: int = RESAMPLES
) -> Section:
    """Return the differences of two models' results on the same tasks, the first minus the second.

    Each is the accuracy of a task and a way to compare answers, with its interval and n.
    """
    figures: dict[str, Figure] = {}
    rows: list[list] = []
    for mine, other in zip(results, others, strict=True):
        assert mine.task == other.task
        for column, credits, other_credits in _common(mine, other):
            n, found = len(credits), _difference(credits, other_credits, resamples)
            one = figure(found.value, n, found.low, found.high)
            figures[f"{mine.task}_{column}"] = one
            both = [math.fsum(own) / n for own in (credits, other_credits)]
            low, high = one.get("low"), one.get("high")
            rows.append([mine.task, COLUMNS[column], n, *both, one["value"], low, high])
    columns = ["task", "chosen by", "n", "first", "second", "difference", "low", "high"]
    return section(name, figures, Table(columns=columns, rows=rows), notes=[NOTE])


def _common(mine: Result, other: Result) -> Iterator[tuple[str, Array, Array]]:
    """Yield (column, credits [Q], the other's) of the questions that both models were asked.

    A model leaves out answers that its context cannot hold, and has no PMI without a start token.
    """
    for column, credits in mine.credits.items():
        if column not in other.credits:
            continue
        both = (mine.numbers[column], other.numbers[column])
        common, own, theirs = np.intersect1d(*both, assume_unique=True, return_indices=True)
        if len(common):
            yield column, credits[own], other.credits[column][theirs]


def _difference(credits_Q: Array, others_Q: Array, resamples: int) -> Interval:
    """Return the difference of two models' shares of right answers."""
    ones_Q1 = np.ones((len(credits_Q), 1))
    columns = (credits_Q[:, None], ones_Q1, others_Q[:, None], ones_Q1)
    (one,) = difference_intervals(*columns, resamples)
    return one


def as_differences(compared: Section) -> dict[str, dict]:
    """Return the figures of a comparison under the names that the report documents for them."""
    return {
        key: {
            "difference": one["value"],
            "low": one.get("low"),
            "high": one.get("high"),
            "questions": one["n"],
        }
        for key, one in compared["figures"].items()
    }
