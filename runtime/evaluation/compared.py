"""Two checkpoints on the same questions: the paired difference of their accuracies.

Most questions are as hard for one model as for the other, so the difference is surer than either
accuracy. Only the questions on which they differ say something, and they may be few, or none: a
bootstrap of a sample without any would be sure that there are none. So the interval is Tango's.

# Q questions
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from runtime.base.shares import NORMAL_975
from runtime.evaluation.bootstrap import FEWEST_DOCUMENTS, Array, Interval
from runtime.evaluation.choices import COLUMNS, Result
from runtime.evaluation.report import Figure, Section, Table, figure, section

NOTE = (
    "A difference above 0 means that the first checkpoint is more often right. It is paired: both "
    "answer the same questions. The interval is Tango's score interval, which holds also where "
    "both are right on the same questions."
)
SAME_NOTE = "Both checkpoints have the same weights, so the difference is exactly 0, from 0 to 0."
# Of the bisection for an end: each halves an interval of at most 2.
HALVINGS = 60


def compared_section(
    results: Sequence[Result], others: Sequence[Result], name: str, are_same: bool = False
) -> Section:
    """Return the differences of two models' results on the same tasks, the first minus the second.

    Each is the accuracy of a task and a way to compare answers, with its interval and n. are_same:
    both are known to be the same model, so nothing is left to chance.
    """
    figures: dict[str, Figure] = {}
    rows: list[list] = []
    for mine, other in zip(results, others, strict=True):
        assert mine.task == other.task
        for column, credits, other_credits in _common(mine, other):
            n, found = len(credits), paired_difference(credits, other_credits, are_same)
            one = figure(found.value, n, found.low, found.high)
            figures[f"{mine.task}_{column}"] = one
            both = [math.fsum(own) / n for own in (credits, other_credits)]
            low, high = one.get("low"), one.get("high")
            rows.append([mine.task, COLUMNS[column], n, *both, one["value"], low, high])
    columns = ["task", "chosen by", "n", "first", "second", "difference", "low", "high"]
    notes = [NOTE, SAME_NOTE] if are_same else [NOTE]
    return section(name, figures, Table(columns=columns, rows=rows), notes=notes)


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


def paired_difference(credits_Q: Array, others_Q: Array, are_same: bool = False) -> Interval:
    """Return the difference of two models' shares of right answers, with its 95 % interval.

    A part of an answer, such as half of a tie, counts as its part: it varies less than the whole
    answers that the interval is made for. Fewer than FEWEST_DOCUMENTS questions have no interval.
    """
    more_Q = credits_Q - others_Q
    n = len(more_Q)
    first, second = (math.fsum(side[side > 0]) for side in (more_Q, -more_Q))
    value = (first - second) / n
    if n < FEWEST_DOCUMENTS:
        return Interval(value, math.nan, math.nan)
    if are_same and not more_Q.any():
        return Interval(0.0, 0.0, 0.0)
    return Interval(value, -_upper(second, first, n), _upper(first, second, n))


def _upper(first: float, second: float, n: int) -> float:
    """Return the upper end of the interval of (first - second) / n.

    first, second: on how many of n questions one model alone is right. The interval holds the
    differences that a score test does not refuse (Tango 1998, "Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design", Statistics in Medicine
    17, 891-908).
    """
    least, most = (first - second) / n, 1.0
    for _ in range(HALVINGS):
        middle = (least + most) / 2
        # The likeliest share of questions that the second alone gets right, given the difference.
        linear = (2 * n - first + second) * middle - first - second
        constant = -second * middle * (1 - middle)
        share = (math.sqrt(max(0.0, linear**2 - 8 * n * constant)) - linear) / (4 * n)
        variance = n * (2 * share + middle * (1 - middle))
        if (first - second - n * middle) ** 2 <= NORMAL_975**2 * variance:
            least = middle
        else:
            most = middle
    return most


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
