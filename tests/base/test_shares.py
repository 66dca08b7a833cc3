"""Intervals of shares."""

from __future__ import annotations

import math

import pytest

from runtime.base.shares import wilson


def test_wilson_against_known_values():
    """Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I."""
    for successes, trials, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert wilson(successes, trials) == pytest.approx((low, high), abs=6e-5)


def test_an_interval_of_nothing_or_everything_is_not_empty():
    """The textbook's interval, share +- 1.96 sqrt(p (1 - p) / n), is a point there."""
    assert wilson(0, 256)[0] == 0 and 0.01 < wilson(0, 256)[1] < 0.02
    assert wilson(256, 256)[1] == 1 and 0.98 < wilson(256, 256)[0] < 0.99


def test_an_interval_holds_its_share():
    """Rounding put the end for 0 of 3 above 0, so "low>0" held where nothing was right."""
    for trials in range(1, 300):
        assert wilson(0, trials)[0] == 0 and wilson(trials, trials)[1] == 1
        for successes in range(trials + 1):
            low, high = wilson(successes, trials)
            assert 0 <= low <= successes / trials <= high <= 1 and low < high


def test_wilson_covers_the_truth():
    """The interval has the true share in about 95 % of all outcomes, weighed by their chance."""
    for trials, truth in ((20, 0.3), (256, 0.5), (256, 0.02)):
        covered = sum(
            math.comb(trials, k) * truth**k * (1 - truth) ** (trials - k)
            for k in range(trials + 1)
            if wilson(k, trials)[0] <= truth <= wilson(k, trials)[1]
        )
        assert 0.92 < covered < 0.98


@pytest.mark.parametrize("successes, trials", [(3, 2), (-1, 2), (0, 0)])
def test_counts_that_are_no_share_are_refused(successes, trials):
    with pytest.raises(ValueError, match="no share"):
        wilson(successes, trials)
