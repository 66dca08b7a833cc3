"""Check that the guarantees of tests/promises/server_process.py can be broken."""

from __future__ import annotations

import functools

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra: serve)")

from tests.builders_server_process import HAS_FORK, HAS_PROC, serving
from tests.promises import server_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (HAS_FORK and HAS_PROC), reason="needs fork and /proc"),
]


def with_fault(code: str):
    """Return what runs the server after some code that breaks it."""
    start = "\nimport sys\nfrom scripts.serve import main\nsys.exit(main())\n"
    return functools.partial(serving, command=("-c", code + start))


NO_DRAIN = """
from runtime.serving import start
async def drained(state, seconds):
    state.is_draining = True
    print("drain    at once", flush=True)
    for served in state.models.by_name.values():
        served.engine.close()
start.drained = drained
"""
STILL_ANSWERS = """
from runtime.serving.app import State
State.refusal = lambda self: None
"""
ONE_SIGNAL = """
from runtime.serving.http_server import Server
def on_signal(self, number):
    self.signal = self.signal or number
    self.ended.set()
Server._on_signal = on_signal
"""


@pytest.mark.parametrize("code", [NO_DRAIN, STILL_ANSWERS], ids=["no drain", "still answers"])
def test_an_end_that_is_no_drain_is_noticed(code):
    assert len(server_process.signals(1, with_fault(code)).failures) == 1


@pytest.mark.nightly
def test_a_second_signal_that_ends_nothing_is_noticed(monkeypatch):
    monkeypatch.setattr(server_process, "PATIENCE_SECONDS", 3)
    (failure,) = server_process.signals(2, with_fault(ONE_SIGNAL)).failures
    assert "twice" in failure


LEAK = """
from runtime.serving.app import Guard
kept = []
def note(self, *given, real=Guard._note):
    kept.append(b"x" * 80_000)
    real(self, *given)
Guard._note = note
"""
WHOLE_BODIES = """
from runtime.serving import app
async def read_body(request, most):
    data = await request.body()
    if len(data) > most:
        raise app.too_large(most)
    return data
app.read_body = read_body
app.check_length = lambda head, most: None
"""


@pytest.mark.parametrize(
    ("code", "says"),
    [(LEAK, "bytes became"), (WHOLE_BODIES, "large bodies took")],
    ids=["a leak", "whole bodies"],
)
def test_memory_that_grows_is_noticed(code, says):
    assert says in server_process.memory(200, with_fault(code)).failures[0]


POLLS = """
import uvicorn
from runtime.serving.http_server import Server
def begin(self, real=Server.main_loop):
    import asyncio
    async def poll():
        while True:
            await asyncio.sleep(0.1)
    self.polling = asyncio.ensure_future(poll())
    return real(self)
Server.main_loop = begin
"""


@pytest.mark.nightly
def test_a_server_that_looks_ten_times_a_second_is_noticed(monkeypatch):
    """That is what uvicorn does: too little for the ticks of a few seconds."""
    monkeypatch.setattr(server_process, "MOST_WINDOWS", 1)
    assert server_process.idle(1, with_fault(POLLS)).failures
