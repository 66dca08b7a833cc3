"""Guarantee of the server about clients that go: at each point of a request and its answer."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from typing import Any

from runtime.serving.engine import Engine
from runtime.serving.request import Finished, OnEvent, Request, Ticket, Token
from tests.builders_server import Live, post, wait_for
from tests.promises import Promise, Tally
from tests.promises.serving_http import a_server, faults

PATH = "/v1/completions"
POINTS = ("head", "body", "queue", "prefill", "token", "last")
# What has not happened after this does not.
PATIENCE_SECONDS = 60
# Passes that may be read until the slot of a client that went is free.
MOST_PASSES = 2
# Of the engine: prompts are read in several passes.
PREFILL_CHUNK = 8
MOST_TOKENS = 100_000
# Seeds of those that go are above.
FIRST_SEED = 1_000_000
# Clients that stay, and what they ask again and again.
STAYING = 3
BODIES: list[dict[str, Any]] = [
    {"prompt": "a b", "max_tokens": 12, "seed": 1, "logprobs": 2},
    {"prompt": "The same beginning of both", "max_tokens": 20, "seed": 2, "n": 2},
    {"prompt": "The same beginning of all", "max_tokens": 7, "seed": 3, "temperature": 0.0},
    {"prompt": "x", "max_tokens": 40, "seed": 4, "experts": True},
]


class Gated:
    """Lets an engine read a pass when a test says so, and notes what becomes of some requests."""

    def __init__(self, engine: Engine):
        self.engine = engine
        self._read, self._submit = engine._reader.read, engine.submit
        engine._reader.read = self.read  # type: ignore[method-assign]
        engine.submit = self.submit  # type: ignore[method-assign]
        self.changed = threading.Condition()
        # Passes that may be read; None: all.
        self.allowed: int | None = None
        self.waits = False
        # Of the client that goes: its answers, the tokens of each, and the pass at its end.
        self.tickets: list[Ticket] = []
        self.tokens: dict[int, int] = {}
        self.ended: dict[int, int] = {}

    # ---------------------------------------------------------------- on the engine's thread, loop
    def read(self, parts):
        with self.changed:
            self.waits = True
            self.changed.notify_all()
            free = self.changed.wait_for(lambda: self.allowed != 0, 2 * PATIENCE_SECONDS)
            assert free, "a pass that nobody allowed"
            self.waits = False
            if self.allowed is not None:
                self.allowed -= 1
        return self._read(parts)

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        if request.sampling.seed < FIRST_SEED:
            return self._submit(request, on_event)
        index = len(self.tickets)

        def noted(event) -> None:
            with self.changed:
                if isinstance(event, Token):
                    self.tokens[index] = self.tokens.get(index, 0) + 1
                elif isinstance(event, Finished):
                    self.ended[index] = self.engine.statistics.num_passes
                self.changed.notify_all()
            on_event(event)

        ticket = self._submit(request, noted)
        with self.changed:
            self.tickets.append(ticket)
            self.changed.notify_all()
        return ticket

    # --------------------------------------------------------------------------- on the test's own
    def until(self, what) -> bool:
        with self.changed:
            return self.changed.wait_for(what, PATIENCE_SECONDS)

    @contextlib.contextmanager
    def closed(self) -> Iterator[None]:
        """Read no pass but those of `step`."""
        with self.changed:
            self.allowed = 0
            self.tickets, self.tokens, self.ended = [], {}, {}
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        with self.changed:
            self.allowed = None
            self.changed.notify_all()

    def step(self) -> None:
        """Read one pass, and draw."""
        assert self.until(lambda: self.waits), "no pass is to be read"
        with self.changed:
            self.allowed, self.waits = 1, False
            self.changed.notify_all()
        assert self.until(lambda: self.waits or len(self.ended) == len(self.tickets))

    def is_reading(self) -> bool:
        """Return whether a part of a prompt of those that go has been read, and not all."""
        for slot in self.engine._slots.running:
            answer = slot.answer
            if answer is not None and answer.ticket in self.tickets:
                has_begun = answer.text.cache.length > answer.num_reused
                if has_begun and not answer.has_started:
                    return True
        return False


def _body(point: str, r: random.Random, i: int) -> dict:
    """Return what a client asks that goes at a point. Nothing of its prompt is known already."""
    letters = "".join(r.choice("abcdefghijklmnop") for _ in range(r.randint(30, 45)))
    body = {
        "prompt": letters,
        "seed": FIRST_SEED + 10 * i,
        "n": r.choice((1, 1, 2)),
        "stream": r.random() < 0.5,
        "logprobs": r.choice((None, 5)),
        "experts": r.random() < 0.3,
        # It would run for minutes.
        "max_tokens": MOST_TOKENS,
        "when_full": "slide",
    }
    if point == "last":
        body["max_tokens"], body["n"] = r.randint(1, 6), 1
    return body


def _reach(gate: Gated, point: str, body: dict, r: random.Random) -> None:
    """Let passes be read until a request is at a point."""
    assert gate.until(lambda: len(gate.tickets) == body["n"]), "it was not taken"
    if point == "queue":
        return
    most = body["max_tokens"]
    tokens = most if point == "last" else r.randint(1, 30)

    def is_there() -> bool:
        if point == "prefill":
            return gate.is_reading()
        return gate.tokens.get(0, 0) >= tokens or 0 in gate.ended

    for _ in range(300):
        if is_there():
            return
        gate.step()
    raise AssertionError(f"the {point} did not come")


def _goes(server: Live, gate: Gated, point: str, r: random.Random, i: int) -> int:
    """Let a client go at a point; return the passes that its slot was taken after that.

    Raise AssertionError if it is not noticed.
    """
    body = _body(point, r, i)
    request = post(PATH, body)
    head = request.index(b"\r\n\r\n") + 4
    ends = {"head": r.randrange(head - 1), "body": r.randrange(head, len(request))}
    with gate.closed():
        with server.connect() as connection:
            connection.sendall(request[: ends.get(point, len(request))])
            if point not in ends:
                _reach(gate, point, body, r)
                if point in ("token", "last") and body["stream"]:
                    assert connection.recv(r.choice((1, 100, 4_000)))
            if r.random() < 0.3:
                # A reset, not a proper end.
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        if point in ends:
            return 0
        before = gate.engine.statistics.num_passes

        def is_noticed() -> bool:
            return all(t.is_cancelled or i in gate.ended for i, t in enumerate(gate.tickets))

        wait_for(is_noticed, PATIENCE_SECONDS)
        gate.open()
        assert gate.until(lambda: len(gate.ended) == len(gate.tickets)), "its slot is taken"
        return max(gate.ended.values()) - before


@contextlib.contextmanager
def _others(server: Live, first: list, found: list[int], wrong: list[str]) -> Iterator[None]:
    """Let clients ask the same again and again, and compare what they get."""
    ends = threading.Event()

    def stay(number: int) -> None:
        r = random.Random(number)
        while not ends.is_set():
            j = r.randrange(len(BODIES))
            status, answer = server.json(PATH, BODIES[j])
            found[number] += 1
            if [status, answer.get("choices")] != first[j]:
                wrong.append(f"answer {j} of one who stayed: {status} {answer}")

    threads = [threading.Thread(target=stay, args=(n,), daemon=True) for n in range(STAYING)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ends.set()
        for thread in threads:
            thread.join(PATIENCE_SECONDS)


def disconnects(count: int) -> Tally:
    """74. Clients that go in head, body, queue, prefill, at token k or the last, often by a reset.

    Held: their slots are free two passes after they have gone, the answers of others, who ask all
    the time, have the bits that they have alone, and at the end no slot is taken.
    """
    tally, r = Tally(), random.Random(74)
    where = dict.fromkeys(POINTS, 0)
    answers, wrong = [0] * STAYING, []
    with a_server(PREFILL_CHUNK, MOST_TOKENS) as server:
        (served,) = server.state.models.by_name.values()
        alone = [server.json(PATH, body) for body in BODIES]
        first = [[status, answer["choices"]] for status, answer in alone]
        gate = Gated(served.engine)
        with _others(server, first, answers, wrong):
            for i in range(count):
                point = POINTS[i % len(POINTS)]
                where[point] += 1
                try:
                    passes = _goes(server, gate, point, r, i)
                    tally.add(passes <= MOST_PASSES, f"case {i}, {point}: {passes} passes")
                except AssertionError as error:
                    tally.add(False, f"case {i}, {point}: {error}")

        def is_free() -> bool:
            gauges = served.engine.gauges()
            return gauges.num_running + gauges.num_waiting + server.state.num_active == 0

        with contextlib.suppress(AssertionError):
            wait_for(is_free, PATIENCE_SECONDS)
        tally.add(is_free(), "slots are taken, and nobody waits for them")
        tally.add(not wrong and min(answers) > 0, f"{answers} answers: {wrong[:3]}")
        tally.add(not faults(server), f"faults: {faults(server)[:3]}")
    tally.detail = {f"at the {at}": n for at, n in where.items()} | {"of others": sum(answers)}
    return tally


PROMISES: list[Promise] = [
    Promise(
        79,
        "Clients that go, at any point, free their slots, and nobody else's answer changes",
        disconnects,
        42,
        500,
        500,
    ),
]
