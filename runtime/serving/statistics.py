"""What the engine counts and measures, for /metrics.

Memory does not grow with the number of requests: a histogram keeps counts of ranges.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass, field

import numpy as np

# Upper ends of the ranges, seconds: from a token of a small model to a long answer.
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300)
REASONS = ("stop", "length", "cancelled", "error")


class Histogram:
    """Counts of observations by range, as Prometheus has them.

    bounds: the upper ends, each of which belongs to its range. counts: one for each, and one for
    what is larger than all.
    """

    def __init__(self, bounds: tuple[float, ...] = SECONDS):
        self.bounds, self.counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> list[tuple[float, int]]:
        """Return (upper end, observations up to it); the last end is infinity."""
        ends = (*self.bounds, float("inf"))
        return list(zip(ends, np.cumsum(self.counts).tolist(), strict=True))


@dataclass
class Statistics:
    """Counters since the start, and histograms of seconds."""

    num_prompt_tokens: int = 0
    # Of these: they did not have to be computed.
    num_reused_tokens: int = 0
    num_generated_tokens: int = 0
    num_passes: int = 0
    # Passes or callbacks that raised an error.
    num_failures: int = 0
    num_refused_full: int = 0
    finished: dict[str, int] = field(default_factory=lambda: dict.fromkeys(REASONS, 0))
    queue_seconds: Histogram = field(default_factory=Histogram)
    time_to_first_token_seconds: Histogram = field(default_factory=Histogram)
    inter_token_latency_seconds: Histogram = field(default_factory=Histogram)
    request_seconds: Histogram = field(default_factory=Histogram)
    # [L, E] int64: tokens by block and expert. PyTorch counts the tokens of those requests that ask
    # for experts.
    expert_tokens_LE: np.ndarray = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def count_experts(self, experts_LNK: np.ndarray) -> None:
        """Count a pass's experts; -1 is none."""
        # Column 0 is none.
        L, columns = self.expert_tokens_LE.shape[0], self.expert_tokens_LE.shape[1] + 1
        flat = experts_LNK + (1 + columns * np.arange(L))[:, None, None]
        counts = np.bincount(flat.ravel(), minlength=L * columns).reshape(L, columns)
        self.expert_tokens_LE += counts[:, 1:]


@dataclass(frozen=True)
class Gauges:
    """What the engine holds now."""

    num_running: int
    num_waiting: int
    num_slots: int
    # Tokens whose keys the running requests hold, and so many fit.
    num_cached_tokens: int
    most_cached_tokens: int
