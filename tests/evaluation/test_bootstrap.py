"""runtime/evaluation/bootstrap: intervals that hold the true value as often as they say."""

from __future__ import annotations

import math

import numpy as np
import pytest

from runtime.base.shares import wilson
from runtime.evaluation import bootstrap
from runtime.evaluation.bootstrap import difference_intervals, ratio_intervals, student_quantile

SETS = 1000
# Bits per byte of the texts that are made up, and how documents differ.
TRUE_RATE, SPREAD_RATE, SPREAD_LENGTH = 0.8, 0.15, 0.5


def made_up(documents: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return bits and bytes of documents [D, 1], whose lengths and rates vary.

    A document's rate does not depend on its length, so the true ratio of sums is TRUE_RATE.
    """
    sizes_D1 = generator.lognormal(6.0, SPREAD_LENGTH, (documents, 1))
    rates_D1 = TRUE_RATE + SPREAD_RATE * generator.standard_normal((documents, 1))
    return sizes_D1 * rates_D1, sizes_D1


@pytest.mark.parametrize("documents", [12, 50])
def test_intervals_hold_the_true_value_in_95_percent_of_sets(documents):
    """93 to 97 % of 1,000 sets: more than 2.9 standard deviations of a share of 95 %.

    Percentiles of the resamples alone hold it in 89 % of the sets of 12 documents.
    """
    generator, hits = np.random.default_rng(7), 0
    for seed in range(SETS):
        (one,) = ratio_intervals(*made_up(documents, generator), resamples=400, seed=seed)
        hits += one.low <= TRUE_RATE <= one.high
    assert 0.93 <= hits / SETS <= 0.97


def test_a_paired_interval_holds_the_true_difference_and_is_far_tighter():
    generator, hits, widths = np.random.default_rng(3), 0, []
    for seed in range(300):
        bits_D1, sizes_D1 = made_up(40, generator)
        # The other model needs 0.02 bits per byte more, give or take.
        noise_D1 = 0.01 * generator.standard_normal(sizes_D1.shape)
        other_D1 = bits_D1 + sizes_D1 * (0.02 + noise_D1)
        (one,) = difference_intervals(
            bits_D1, sizes_D1, other_D1, sizes_D1, resamples=300, seed=seed
        )
        hits += one.low <= -0.02 <= one.high
        (alone,) = ratio_intervals(bits_D1, sizes_D1, resamples=300, seed=seed)
        widths.append((one.high - one.low) / (alone.high - alone.low))
    # A share of 0.95 of 300: 3.5 standard deviations are 0.044.
    assert hits / 300 >= 0.90
    assert np.median(widths) < 0.15


def test_a_model_against_itself_is_exactly_zero():
    bits, sizes = made_up(30, np.random.default_rng(0))
    assert difference_intervals(bits, sizes, bits.copy(), sizes.copy()) == [(0.0, 0.0, 0.0)]


def test_a_ratio_is_of_sums_and_not_a_mean_of_ratios():
    bits, sizes = np.array([[10.0], [0.0]]), np.array([[10.0], [90.0]])
    assert ratio_intervals(bits, sizes)[0].value == 0.1


@pytest.mark.parametrize("share", [0, 1])
def test_none_of_few_documents_is_not_none_of_all(share):
    """Of 205 tokens in a bin none was right, and the interval was 0 to 0: resamples of zeros."""
    tops_D1, bottoms_D1 = np.full((20, 1), 3.0 * share), np.full((20, 1), 3.0)
    (one,) = ratio_intervals(tops_D1, bottoms_D1)
    assert one == (share, *wilson(20 * share, 20)) and one.low < one.high


def test_equal_documents_leave_nothing_to_chance():
    bits, sizes = np.full((9, 1), 3.0), np.full((9, 1), 4.0)
    assert ratio_intervals(bits, sizes) == [(0.75, 0.75, 0.75)]


@pytest.mark.parametrize("documents", [1, 2, bootstrap.FEWEST_DOCUMENTS - 1])
def test_few_documents_have_a_value_and_no_interval(documents):
    """What was called a 95 % interval held the true value in 48 % of sets of 2 documents."""
    bits, sizes = made_up(documents, np.random.default_rng(0))
    (one,) = ratio_intervals(bits, sizes)
    assert one.value == bits.sum() / sizes.sum()
    assert math.isnan(one.low) and math.isnan(one.high)


def test_a_figure_of_few_documents_has_no_interval_among_many():
    """Of 40 documents one reaches position 512: all resamples have its loss, from 2.5 to 2.5."""
    tops, bottoms = np.full((40, 2), 2.0), np.ones((40, 2))
    tops[:, 1] = bottoms[:, 1] = 0.0
    tops[3, 1], bottoms[3, 1] = 5.0, 2.0
    whole, part = ratio_intervals(tops, bottoms)
    assert (whole.low, whole.high) == (2.0, 2.0)
    assert part.value == 2.5 and math.isnan(part.low) and math.isnan(part.high)
    _, less = difference_intervals(tops, bottoms, tops, bottoms)
    assert less.value == 0.0 and math.isnan(less.low)


def test_a_figure_of_some_documents_is_no_surer_because_others_say_nothing():
    """Its interval is as wide as that of these documents alone, but for the draws."""
    bits, sizes = made_up(12, np.random.default_rng(5))
    none = np.zeros((88, 1))
    (alone,) = ratio_intervals(bits, sizes, resamples=20_000)
    (among,) = ratio_intervals(np.vstack([bits, none]), np.vstack([sizes, none]), 20_000)
    assert among.value == alone.value
    # How many of them are drawn varies, too: by 1/12 of the variance, and the tails by more.
    assert 0.97 < (among.high - among.low) / (alone.high - alone.low) < 1.25


def test_a_figure_of_nothing_is_not_defined():
    tops = np.array([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0]])
    whole, none = ratio_intervals(tops, (tops > 0).astype(float))
    assert whole.value == 2.0 and math.isnan(none.value) and math.isnan(none.low)


def test_figures_of_one_pass_share_their_draws():
    """So figures do not depend on how many others are asked for, nor on other columns."""
    bits, sizes = made_up(25, np.random.default_rng(1))
    (alone,) = ratio_intervals(bits, sizes)
    pair = ratio_intervals(np.hstack([sizes, bits]), np.hstack([bits, sizes]))
    assert pair[1] == alone


def test_draws_in_many_parts_are_draws(monkeypatch):
    """Sets above the limit of one draw are drawn in parts, and all resamples are there."""
    monkeypatch.setattr(bootstrap, "DRAWN_AT_ONCE", 64)
    bits, sizes = made_up(30, np.random.default_rng(1))
    sums = bootstrap.resampled_sums(np.hstack([bits, sizes]), 101, 0)
    assert sums.shape == (101, 2) and len(np.unique(sums[:, 0])) == 101


@pytest.mark.parametrize(
    "freedom, expected, bound",
    # Tables of Student's distribution, 97.5 %.
    [(1, 12.7062, 1e-5), (2, 4.30265, 1e-5), (3, 3.18245, 2e-3), (9, 2.26216, 1e-5)],
)
def test_student_quantiles_are_those_of_tables(freedom, expected, bound):
    assert student_quantile(0.975, freedom) == pytest.approx(expected, rel=bound)
