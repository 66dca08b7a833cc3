"""Intervals by bootstrap over documents: the tokens of one document are not independent.

A figure is a ratio of sums over documents, such as bits to bytes. A resample draws as many
documents as there are, with replacement, and every figure is computed from it again. So figures of
one pass share their resamples, and a difference of two models is paired: both are computed from
the same documents. The interval is a percentile one, a little wider for few documents (Hesterberg
2015, "What Teachers Should Know About the Bootstrap", section 5.1, "expanded percentile").

# D documents  K figures  R resamples
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from runtime.base.shares import wilson

RESAMPLES = 2000
COVERAGE = 0.95
# Of fewer documents a figure has no interval: their resamples are too alike. Between the least and
# the largest of D, the true value is in 1 - 2^(1 - D) of sets: 50 % for 2. Measured: 47, 87, 92 and
# 93 % of sets for 2, 4, 6 and 8.
FEWEST_DOCUMENTS = 8

# Documents drawn at a time; the draws, and so all intervals, depend on it.
DRAWN_AT_ONCE = 1 << 15

Array = NDArray[np.float64]


class Interval(NamedTuple):
    """A value and its 95 % interval; low and high are NaN where there is none."""

    value: float
    low: float
    high: float


def student_quantile(probability: float, freedom: int) -> float:
    """Return a quantile of Student's t distribution; exact for 1 and 2 degrees of freedom.

    Otherwise Cornish and Fisher's expansion (Abramowitz and Stegun 1964, equation 26.7.5): within
    0.2 % for 3 degrees of freedom, and closer for more.
    """
    if freedom == 1:
        return math.tan(math.pi * (probability - 0.5))
    if freedom == 2:
        spread = 2 * probability - 1
        return spread * math.sqrt(2 / (1 - spread**2))
    z, v = NormalDist().inv_cdf(probability), freedom
    terms = (
        (z**3 + z) / (4 * v),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92_160 * v**4),
    )
    return z + sum(terms)


def tail(num_documents: int) -> float:
    """Return the share of resamples below the interval, and above it.

    Resamples of few documents vary too little: by sqrt((D - 1) / D), and with the normal
    distribution's tails in place of Student's.
    """
    quantile = student_quantile(0.5 + COVERAGE / 2, num_documents - 1)
    return NormalDist().cdf(-quantile * math.sqrt(num_documents / (num_documents - 1)))


def resampled_sums(values_DK: Array, resamples: int, seed: int) -> Array:
    """Return the sums [R, K] over documents of `resamples` draws of D documents.

    The draws depend on D, resamples and seed alone. No matrix product: its sums would depend on
    the number of threads.
    """
    generator = np.random.Generator(np.random.PCG64(seed))
    count = len(values_DK)
    at_once = max(1, DRAWN_AT_ONCE // count)
    parts = []
    for first in range(0, resamples, at_once):
        drawn_RD = generator.integers(count, size=(min(at_once, resamples - first), count))
        parts.append(values_DK[drawn_RD].sum(axis=1))
    return np.concatenate(parts)


def ratios(top_K: Array, bottom_K: Array) -> Array:
    """Return top / bottom; NaN where bottom is 0. Shapes broadcast."""
    top_K, bottom_K = np.broadcast_arrays(top_K, bottom_K)
    none_K = np.full(bottom_K.shape, np.nan)
    return np.divide(top_K, bottom_K, out=none_K, where=bottom_K != 0)


def intervals(
    sums_DK: Array,
    figures_of: Callable[[Array], Array],
    resamples: int = RESAMPLES,
    seed: int = 0,
    documents_J: NDArray[np.int64] | None = None,
) -> list[Interval]:
    """Return figures with their intervals. figures_of: sums over documents [..., K] -> [..., J].

    A figure is NaN where it is not defined, such as the mean of nothing; in a resample that does
    not count. documents [J]: those that each figure is of, None = all: what a few documents say is
    no surer because many others say nothing.
    """
    values_J = figures_of(sums_DK.sum(axis=0))
    if documents_J is None:
        documents_J = np.full(len(values_J), len(sums_DK))
    if documents_J.max(initial=0) < FEWEST_DOCUMENTS:
        return [Interval(value, math.nan, math.nan) for value in values_J.tolist()]
    resampled_RJ = figures_of(resampled_sums(sums_DK, resamples, seed))
    columns = zip(values_J.tolist(), resampled_RJ.T, documents_J.tolist(), strict=True)
    return [Interval(value, *_ends(column_R, D)) for value, column_R, D in columns]


def _ends(values_R: Array, num_documents: int) -> tuple[float, float]:
    """Return the ends of the interval of a figure of so many documents; NaN for too few."""
    values_R = values_R[np.isfinite(values_R)]
    if num_documents < FEWEST_DOCUMENTS or not len(values_R):
        return math.nan, math.nan
    share = tail(num_documents)
    low, high = np.quantile(values_R, [share, 1 - share])
    return float(low), float(high)


def ratio_intervals(
    tops_DK: Array, bottoms_DK: Array, resamples: int = RESAMPLES, seed: int = 0
) -> list[Interval]:
    """Return sum(tops) / sum(bottoms) over documents with its interval, for each of K figures."""
    both = np.concatenate([tops_DK, bottoms_DK], axis=1)
    documents_K = np.count_nonzero(bottoms_DK, axis=0)
    found = intervals(
        both, lambda sums: ratios(*np.split(sums, 2, axis=-1)), resamples, seed, documents_K
    )
    return [_not_sure(one, D) for one, D in zip(found, documents_K.tolist(), strict=True)]


def _not_sure(one: Interval, num_documents: int) -> Interval:
    """Return the interval of none or all of so many documents as Wilson's.

    Their resamples are all alike, and would say that no other document is different.
    """
    if one.low == one.high == one.value and one.value in (0, 1):
        return Interval(one.value, *wilson(round(one.value * num_documents), num_documents))
    return one


def difference_intervals(
    tops_DK: Array,
    bottoms_DK: Array,
    other_tops_DK: Array,
    other_bottoms_DK: Array,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> list[Interval]:
    """Return the paired differences of two models' ratios, over the same documents.

    Row d of all arrays is the same document. A model against itself: exactly 0, from 0 to 0.
    """
    four = np.concatenate([tops_DK, bottoms_DK, other_tops_DK, other_bottoms_DK], axis=1)

    def differences(sums: Array) -> Array:
        tops, bottoms, other_tops, other_bottoms = np.split(sums, 4, axis=-1)
        return ratios(tops, bottoms) - ratios(other_tops, other_bottoms)

    documents_K = np.count_nonzero((bottoms_DK != 0) & (other_bottoms_DK != 0), axis=0)
    return intervals(four, differences, resamples, seed, documents_K)
