"""How much memory a run takes: guarantee 34."""

from __future__ import annotations

from benchmarks.memory import EARLY, GROWTH, LATE, measured
from tests.promises import Promise, Tally

MOST_GROWTH = 1.1


def memory_does_not_grow(count: int) -> Tally:
    """34. Runs of every expert activation, optimizer and dtype, each in a process of its own.

    Anonymous memory after 40 steps against that after 3.
    """
    tally, largest = Tally(), 0.0
    for setting in GROWTH[:count]:
        anonymous = measured(setting)["anonymous"]
        early, late = anonymous[EARLY - 1], anonymous[LATE - 1]
        largest = max(largest, late / early)
        tally.add(late <= MOST_GROWTH * early, f"{setting}: {early:,} bytes, then {late:,}")
    tally.detail = {"largest ratio": round(largest, 3)}
    return tally


PROMISES = [
    Promise(
        34,
        "Memory after 40 steps is at most 1.1 times that after 3, for each activation, "
        "optimizer, dtype",
        memory_does_not_grow,
        0,
        len(GROWTH),
        len(GROWTH),
    ),
]
