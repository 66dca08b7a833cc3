"""Guarantees of the server against clients that send or read slowly, or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import random
import re
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest import mock

from runtime.serving.request import OnEvent, Request, Ticket
from tests.builders_server import (
    BYTE,
    FakeEngine,
    Live,
    live,
    post,
    read_all,
    read_one,
    served_of,
    wait_for,
)
from tests.promises import Promise, Tally

# The server's deadline, and what its promise adds to it.
REQUEST_SECONDS, MORE_SECONDS = 1.0, 1.0
# After so many deadlines a connection that is still there is one that stays.
PATIENCE = 12
# Connections at a time: the server takes 512.
WAVE = 100
# A byte each: no request has come when its deadline has.
BYTES_PER_DEADLINE = 20
EARLY_SECONDS = 0.02
KINDS = ("head", "body", "silent", "kept", "unread")
# So that little of a stream fits the buffers between.
SEND_BUFFER_BYTES, RECEIVE_BUFFER_BYTES = 16_384, 2_048
HELD, UNREAD = 3, 600
PROBE = {"prompt": "Once", "max_tokens": 9, "seed": 1}
SLIDES = {"when_full": "slide"}


class Streams(FakeEngine):
    """Answers at once; HELD tokens when a test says so; UNREAD tokens, which never end."""

    def __init__(self) -> None:
        super().__init__(BYTE.encode(" cat"), at_once=False, most=10_000)

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        ticket = super().submit(request, on_event)
        most = request.sampling.max_new_tokens
        if most == UNREAD:
            threading.Thread(target=self.tell, args=(ticket, [97] * most, False)).start()
        elif most != HELD:
            threading.Thread(target=self.tell, args=(ticket,)).start()
        return ticket

    @property
    def held(self) -> list[Ticket]:
        return [one for one in self.open if one.request.sampling.max_new_tokens == HELD]


@dataclass
class Slow:
    """A client that takes its time. left: what it dribbles.

    first_s, last_s: its deadline began between these times.
    """

    kind: str
    connection: socket.socket
    first_s: float
    last_s: float
    left: bytes = b""

    @property
    def port(self) -> int:
        return self.connection.getsockname()[1]

    def dribble(self) -> None:
        if self.left:
            with contextlib.suppress(OSError):
                self.connection.sendall(self.left[:1])
                self.left = self.left[1:]


def slow(server: Live, kind: str, r: random.Random) -> Slow:
    """Connect, and send what comes before the wait: at times one whole request."""
    connection = socket.socket()
    if kind == "unread":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
    connection.settimeout(60)
    first_s = time.monotonic()
    connection.connect(("127.0.0.1", server.port))
    if kind == "kept" or (kind in ("head", "body") and r.random() < 0.5):
        connection.sendall(post("/tokenize", {"prompt": "a"}))
        read_one(connection)
    if kind in ("head", "body"):
        first_s = time.monotonic()
    request = _request(kind, r)
    end = request.index(b"\r\n\r\n") + 4
    parts = {
        "head": r.randint(1, end - 2 * BYTES_PER_DEADLINE),
        "body": r.randint(end, end + 20),
        "unread": len(request),
    }
    now = parts.get(kind, 0)
    connection.sendall(request[:now])
    return Slow(kind, connection, first_s, time.monotonic(), request[now:] if now else b"")


def _request(kind: str, r: random.Random) -> bytes:
    """Return a request with a body that takes long to dribble in, in chunks or with its length."""
    if kind == "unread":
        return post("/v1/completions", PROBE | {"max_tokens": UNREAD, "stream": True} | SLIDES)
    path = r.choice(("/v1/completions", "/v1/chat/completions", "/tokenize"))
    if r.random() < 0.5:
        return post(path, {"prompt": "a" * 500})
    request = post(path, b"", "Transfer-Encoding: chunked")
    return request.replace(b"Content-Length: 0\r\n", b"") + 100 * b"1\r\na\r\n"


@dataclass
class Times:
    """When a server lost the connection of each port, and when what it wrote there last stalled.

    late_s: how late its event loop was at most. So the server is measured on a busy machine, too.
    """

    lost_s: dict[int, float] = field(default_factory=dict)
    stalled_s: dict[int, float] = field(default_factory=dict)
    late_s: float = 0.0


@contextlib.contextmanager
def watched(engine: Streams) -> Iterator[tuple[Live, Times]]:
    """Run a server, and note its times."""
    from runtime.serving import http_server

    times = Times()

    def protocol_with(seconds: float, real=http_server.protocol_with) -> type:
        base = real(seconds)

        def connection_lost(self, error):
            times.lost_s[self.client[1]] = time.monotonic()
            base.connection_lost(self, error)

        def pause_writing(self):
            times.stalled_s[self.client[1]] = time.monotonic()
            base.pause_writing(self)

        own = {"connection_lost": connection_lost, "pause_writing": pause_writing}
        return type("Noted", (base,), own)

    with (
        mock.patch.object(http_server, "protocol_with", protocol_with),
        live(
            served_of(engine, max_new_tokens=10**6),
            request_seconds=REQUEST_SECONDS,
        ) as server,
    ):
        loop = server.server.loop
        for listening in (one for it in server.server.servers for one in it.sockets):
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)

        def beat(due: float) -> None:
            times.late_s = max(times.late_s, loop.time() - due)
            due = loop.time() + 0.05
            loop.call_at(due, beat, due)

        loop.call_soon_threadsafe(beat, loop.time() + 60)
        yield server, times


def _wave(
    server: Live, kinds: list[str], r: random.Random, times: Times
) -> list[tuple[str, float, float]]:
    """Let slow clients come, and wait until they are gone.

    Return (kind, most, least) of each: seconds after its deadline began. Infinity: it stays.
    """
    clients = [slow(server, kind, r) for kind in kinds]
    end = time.monotonic() + PATIENCE * REQUEST_SECONDS
    while time.monotonic() < end and any(one.port not in times.lost_s for one in clients):
        time.sleep(REQUEST_SECONDS / BYTES_PER_DEADLINE)
        for one in clients:
            one.dribble()
    for one in clients:
        if one.kind == "unread" and one.port in times.stalled_s:
            one.first_s = one.last_s = times.stalled_s[one.port]
    lost = [(one, times.lost_s.get(one.port, math.inf)) for one in clients]
    for one in clients:
        one.connection.close()
    return [(one.kind, at - one.first_s, at - one.last_s) for one, at in lost]


def slow_clients(count: int) -> Tally:
    """83. Heads and bodies that dribble in, silence at first or later, streams that nobody reads.

    Held: each has its deadline, not less, and is gone a second later; streams in flight end whole,
    and the next request has its answer.
    """
    tally, r = Tally(), random.Random(83)
    engine = Streams()
    longest: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    with watched(engine) as (server, times):
        first = server.json("/v1/completions", PROBE)[1]["choices"]
        for start in range(0, count, WAVE):
            times.lost_s.clear()
            times.stalled_s.clear()
            times.late_s = 0.0
            kinds = [KINDS[i % len(KINDS)] for i in range(start, min(start + WAVE, count))]
            with server.connect() as held:
                body = PROBE | {"max_tokens": HELD, "stream": True}
                held.sendall(post("/v1/completions", body, "Connection: close"))
                assert engine.wait_until(lambda e: e.held)
                (ticket,) = engine.held
                found = _wave(server, kinds, r, times)
                engine.tell(ticket)
                data = read_all(held).decode()
            most = REQUEST_SECONDS + MORE_SECONDS + times.late_s
            for kind, at_most, at_least in found:
                longest[kind] = max(longest[kind], at_least)
                # A timer may ring a clock's tick early.
                ok = at_most >= REQUEST_SECONDS - EARLY_SECONDS and at_least <= most
                tally.add(ok, f"{kind}, from {start}: {at_least:.2f} s, at most {most:.2f}")
            text = "".join(json.loads(f'"{t}"') for t in re.findall(r'"text":"(.*?)"', data))
            tally.add("[DONE]" in data and text == " ca", f"a stream: {data!r}")
            again = server.json("/v1/completions", PROBE)[1]["choices"]
            tally.add(again == first, f"the next request: {again}")

        def is_free() -> bool:
            return not (server.state.num_active or engine.open)

        with contextlib.suppress(AssertionError):
            wait_for(is_free, PATIENCE)
        tally.add(is_free(), f"{server.state.num_active} requests are left")
    tally.detail = {f"longest, {kind}, s": round(s, 2) for kind, s in longest.items()}
    return tally


PROMISES: list[Promise] = [
    Promise(
        83,
        "A client that sends or reads slowly or not at all is cut in time, and no other is",
        slow_clients,
        50,
        1_000,
        1_000,
    ),
]
