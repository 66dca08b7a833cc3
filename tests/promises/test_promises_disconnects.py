"""Check that the guarantee of tests/promises/disconnects.py can be broken."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra: serve)")

from runtime.serving.engine import Engine
from runtime.serving.request import Finished
from runtime.serving.work import Work
from tests.promises import disconnects
from tests.shared_checks import needs_code

pytestmark = needs_code


def points() -> set[str]:
    """Return the points at which clients were not noticed, or not soon."""
    failures = disconnects.disconnects(12).failures
    return {line.split(": ")[0].split(", ")[1] for line in failures if line.startswith("case")}


@pytest.mark.nightly
def test_a_slot_that_is_not_given_back_is_noticed(monkeypatch):
    # Each client is waited for in vain.
    monkeypatch.setattr(disconnects, "PATIENCE_SECONDS", 1)
    monkeypatch.setattr(Work, "cancel", lambda self: None)
    assert points() >= {"queue", "prefill", "token"}


def test_a_slot_that_is_given_back_late_is_noticed(monkeypatch):
    def end_cancelled(self, real=Engine._end_cancelled):
        if not self.statistics.num_passes % 7:
            real(self)

    monkeypatch.setattr(Engine, "_end_cancelled", end_cancelled)
    assert points()


def test_an_end_that_takes_others_with_it_is_noticed(monkeypatch):
    def end_cancelled(self, real=Engine._end_cancelled):
        going = [slot for slot in self._slots.running if slot.answer.ticket.is_cancelled]
        real(self)
        for slot in self._slots.running if going else []:
            self._finish(slot, Finished("cancelled"))

    monkeypatch.setattr(Engine, "_end_cancelled", end_cancelled)
    failures = disconnects.disconnects(12).failures
    assert any("of one who stayed" in line for line in failures)
