"""Guarantees of reliability, each counted.

A function tries it many times and counts how often it held. pytest runs them with small counts at
every push and larger ones nightly (`make test-nightly`); `python -m benchmarks.reliability` (`make
figures`) runs them with the counts that README.md quotes. The numbers are those of the README's
list.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class Tally:
    """How often something held. A failure is a line with the seed or case that reproduces it."""

    held: int = 0
    tried: int = 0
    failures: list[str] = field(default_factory=list)
    # What else was counted, e.g. {"kills": 57, "kills inside a save": 19}
    detail: dict[str, int | float | str] = field(default_factory=dict)

    def add(self, ok: bool, what: str) -> None:
        """Count one try."""
        self.tried += 1
        self.held += bool(ok)
        if not ok:
            self.failures.append(what)

    def check(self) -> None:
        """Raise AssertionError unless something was tried and it held every time."""
        assert self.tried and self.held == self.tried, (
            f"held {self.held} of {self.tried}:\n" + "\n".join(self.failures[:20])
        )


@dataclass(frozen=True)
class Promise:
    """One row of the README's table."""

    # Of the list; rows are in this order.
    number: int
    # What is promised, as a reader wants it said.
    text: str
    # Tries it about so many times.
    run: Callable[[int], Tally]
    # Count in make test; 0: too long for every push.
    at_push: int
    # Count in make test-nightly.
    nightly: int
    # Count for the README.
    published: int
    reference: str = (
        # What the same test finds in the original implementation, where that was measured.
        ""
    )
