"""runtime/evaluation/information: what one column tells of another, above chance."""

from __future__ import annotations

import math

import numpy as np

from runtime.evaluation.information import GROUPS, counted, entropy, information


def columns(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return generator.integers(0, 8, count), generator.integers(0, 500, count)


def test_a_copy_tells_everything():
    a_N, _ = columns(5000)
    assert counted(a_N, a_N) == entropy(np.bincount(a_N))


def test_known_information_of_two_bits():
    """b is a's lowest bit: exactly one of a's two bits."""
    a_N = np.arange(4000) % 4
    assert math.isclose(counted(a_N, a_N % 2), 1.0, abs_tol=1e-12)


def test_independent_columns_give_the_shuffled_value():
    """2,000 tokens, 8 experts, 500 kinds: chance alone looks like 0.8 bits of information."""
    a_N, b_N = columns(2000)
    found = information(a_N, b_N, np.arange(2000) * GROUPS // 2000)
    assert found.measured > 0.5
    assert found.low <= 0.0 <= found.high
    assert abs(found.value) < 0.05 * found.measured


def test_a_real_signal_stands_out():
    a_N, b_N = columns(4000)
    a_N = np.where(np.arange(4000) % 2, a_N, b_N % 8)
    found = information(a_N, b_N, np.arange(4000) * GROUPS // 4000)
    assert found.low > 0.2
    assert found.value == found.measured - found.shuffled


def test_one_group_has_no_interval():
    a_N, b_N = columns(100)
    found = information(a_N, b_N, np.zeros(100, dtype=np.int64))
    assert math.isnan(found.low) and math.isfinite(found.value)
