"""Mutual information of two columns of whole numbers, next to its value by chance.

The information that is counted in a sample is too large, because rare pairs look like structure:
with many values the excess is as large as real signals. So it is counted again after shuffling one
column, which leaves the excess alone, and the difference is the figure.

# N tokens
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.evaluation.bootstrap import COVERAGE, student_quantile

# Parts of the documents that are left out in turn, for the interval; of fewer there is none.
GROUPS = 10
FEWEST_GROUPS = 5

Whole = NDArray[np.int64]


class Information(NamedTuple):
    """Bits that one column tells of another. value = measured - shuffled, with a 95 % interval."""

    value: float
    low: float
    high: float
    measured: float
    shuffled: float


def entropy(counts: NDArray) -> float:
    """Return the entropy (bits) of the distribution that counts are of."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def counted(a_N: Whole, b_N: Whole) -> float:
    """Return the mutual information (bits) of the empirical distribution of two columns."""
    width = int(b_N.max()) + 1
    pairs = np.bincount(a_N * width + b_N) if len(a_N) else np.zeros(1)
    return entropy(np.bincount(a_N)) + entropy(np.bincount(b_N)) - entropy(pairs)


def half_width(value: float, left_out: list[float]) -> float:
    """Return half of the 95 % interval of a value: a jackknife that leaves out a group at a time.

    left_out: the value without each group (Kott 2001, "The Delete-a-Group Jackknife"). NaN for
    fewer than FEWEST_GROUPS: each would change all.
    """
    count = len(left_out)
    if count < FEWEST_GROUPS:
        return math.nan
    spread = math.fsum((part - value) ** 2 for part in left_out)
    error = math.sqrt(spread * (count - 1) / count)
    return error * student_quantile(0.5 + COVERAGE / 2, count - 1)


def without_each(groups_N: Whole) -> list[NDArray[np.bool_]]:
    """Return which tokens are left without each group, [N] bool; groups that are all are not."""
    masks = [groups_N != group for group in np.unique(groups_N)]
    return [mask for mask in masks if mask.any()]


def entropy_of(a_N: Whole, groups_N: Whole) -> tuple[float, float, float]:
    """Return the entropy (bits) of a column and its interval."""
    value = entropy(np.bincount(a_N))
    parts = [entropy(np.bincount(a_N[kept])) for kept in without_each(groups_N)]
    half = half_width(value, parts)
    return value, value - half, value + half


def information(a_N: Whole, b_N: Whole, groups_N: Whole, seed: int = 0) -> Information:
    """Return the information that b tells of a, above that of a shuffled b.

    groups [N] from 0 to GROUPS - 1: tokens of one document are in one.
    """
    b_N = np.unique(b_N, return_inverse=True)[1].astype(np.int64)
    shuffled_N = np.random.Generator(np.random.PCG64(seed)).permutation(b_N)
    measured, by_chance = counted(a_N, b_N), counted(a_N, shuffled_N)
    value = measured - by_chance
    parts = [
        counted(a_N[kept], b_N[kept]) - counted(a_N[kept], shuffled_N[kept])
        for kept in without_each(groups_N)
    ]
    half = half_width(value, parts)
    return Information(value, value - half, value + half, measured, by_chance)
