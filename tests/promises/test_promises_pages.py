"""Check that the guarantees of tests/promises/pages.py can be broken."""

from __future__ import annotations

from runtime.training.curves import Follower
from tests.promises import pages


def test_a_reader_that_raises_is_noticed(monkeypatch):
    def poll(self, real=Follower.poll):
        if self.folder.name == "broken":
            raise ValueError("damaged")
        return real(self)

    monkeypatch.setattr(Follower, "poll", poll)
    assert pages.damaged_runs(4).held == 0


def test_a_run_that_takes_the_other_with_it_is_noticed(monkeypatch):
    def poll(self, real=Follower.poll):
        return self.folder.name == "broken" and real(self)

    monkeypatch.setattr(Follower, "poll", poll)
    assert pages.damaged_runs(4).held == 0
