"""Intervals of shares: how sure a count of successes in trials is."""

from __future__ import annotations

import math

# The 97.5 % point of the standard normal distribution, for intervals of 95 %.
NORMAL_975 = 1.959963984540054


def wilson(successes: float, trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a binomial share.

    Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference". It is never
    empty, holds the share, and stays within 0 to 1, also where nothing or everything succeeded.
    """
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} successes in {trials} trials are no share")
    share, square = successes / trials, NORMAL_975**2
    center = share + square / (2 * trials)
    half = NORMAL_975 * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    scale = 1 + square / trials
    # Rounded, an end can lie within the share: of 0 in 3 the lower one was 5e-17.
    return min(share, max(0.0, (center - half) / scale)), max(
        share, min(1.0, (center + half) / scale)
    )
