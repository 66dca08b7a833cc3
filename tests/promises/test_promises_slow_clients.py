"""Check that the guarantee of tests/promises/slow_clients.py can be broken."""

from __future__ import annotations

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra: serve)")

from runtime.serving.http_server import Deadline
from tests.promises import slow_clients


@pytest.fixture
def short(monkeypatch):
    """Make deadlines short, and those that are missed, too."""
    monkeypatch.setattr(slow_clients, "REQUEST_SECONDS", 0.4)
    monkeypatch.setattr(slow_clients, "PATIENCE", 5)
    return monkeypatch


def failed(*kinds: str) -> set[str]:
    found = slow_clients.slow_clients(10).failures
    return {line.split(",")[0].split(":")[0] for line in found} & {*slow_clients.KINDS, *kinds}


def test_a_deadline_that_is_missing_is_noticed(short):
    """uvicorn has none for what dribbles in."""
    short.setattr(Deadline, "_arm", lambda self: None)
    # Its own timer ends the connections that are kept.
    assert failed() == {"head", "body", "silent"}


def test_a_deadline_that_each_byte_puts_off_is_noticed(short):
    def data_received(self, data, real=Deadline.data_received):
        self._disarm()
        real(self, data)

    short.setattr(Deadline, "data_received", data_received)
    assert failed() == {"head", "body"}


def test_a_stream_that_nobody_reads_and_nobody_cuts_is_noticed(short):
    short.setattr(Deadline, "_watch", lambda self, waiting: None)
    assert failed() == {"unread"}


def test_a_deadline_that_runs_on_while_an_answer_comes_is_noticed(short):
    short.setattr(Deadline, "_follow", lambda self: None)
    assert "a stream" in failed("a stream")


def test_a_deadline_that_is_too_short_is_noticed(short):
    def arm(self):
        self._request_timer = self.loop.call_later(self.request_seconds / 4, self.transport.abort)

    short.setattr(Deadline, "_arm", arm)
    assert failed() >= {"head", "body", "silent"}
