"""Servers for tests: models and engines behind them, in a thread of this process, and raw requests.

A `FakeEngine` answers when a test says so; everything else is the real thing.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from config_model import PredictConfig
from runtime.data.chat import has_chat, prompt_ids
from runtime.data.tokenizer import Tokenizer
from runtime.data.tokenizers import load_tokenizer
from runtime.serving.fields import SAMPLING
from runtime.serving.request import (
    Finished,
    OnEvent,
    QueueFull,
    Request,
    RequestRefused,
    Started,
    Ticket,
    Token,
)
from runtime.serving.served import Limits, Models, Served
from runtime.serving.statistics import Gauges, Statistics

BYTE = load_tokenizer("byte")
END = BYTE.end_of_text_id
JSON = {"Content-Type": "application/json"}
DEFAULTS = {name: getattr(PredictConfig, name) for name in SAMPLING} | {"when_full": "stop"}


@dataclass
class Rendering:
    """What `LoadedModel` does for the server, of a tokenizer alone."""

    tokenizer: Tokenizer = BYTE

    @property
    def stop_ids(self) -> list[int]:
        return list(self.tokenizer.all_stop_ids)

    @property
    def has_chat(self) -> bool:
        return has_chat(self.tokenizer)

    def text_ids(self, text: str) -> list[int]:
        return [self.tokenizer.start_id, *self.tokenizer.encode(text)]

    def chat_ids(self, messages: list[dict]) -> list[int]:
        return prompt_ids(messages, self.tokenizer)


class FakeEngine:
    """Draws the same ids for everyone: at once, or when a test calls `tell`."""

    is_exact, line, is_open = True, "a test's engine", True

    def __init__(self, ids: Sequence[int] = (), at_once: bool = True, most: int = 1_000):
        self.ids, self.at_once, self.most = list(ids), at_once, most
        self.tickets: list[Ticket] = []
        self.cancelled: list[Ticket] = []
        self.refuses = self.fails = ""
        self.is_closed = False
        self.statistics = Statistics()
        self.changed = threading.Condition()

    @property
    def open(self) -> list[Ticket]:
        return [t for t in self.tickets if not t.is_done and t not in self.cancelled]

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        if self.refuses:
            raise RequestRefused(self.refuses)
        if len(self.open) >= self.most:
            raise QueueFull("full")
        ticket = Ticket(request, on_event)
        with self.changed:
            self.tickets.append(ticket)
            self.changed.notify_all()
        if self.at_once:
            threading.Thread(target=self.tell, args=(ticket,)).start()
        return ticket

    def tell(self, ticket: Ticket, ids: Sequence[int] | None = None, ends: bool = True) -> None:
        """Send the events of an answer."""
        ids = self.ids if ids is None else ids
        request = ticket.request
        ticket.on_event(Started(len(request.ids), 0))
        most = request.sampling.max_new_tokens
        for i in ids[:most]:
            score = None if request.logprobs is None else -0.5
            top = None if request.logprobs is None else [(i, -0.5)][: request.logprobs]
            ticket.on_event(Token(i, score, top))
        if ends:
            ticket.is_done = True
            end = Finished("stop" if ids[:most][-1:] == [END] else "length")
            ticket.on_event(Finished("error", self.fails) if self.fails else end)

    def cancel(self, ticket: Ticket) -> None:
        with self.changed:
            if not ticket.is_done:
                self.cancelled.append(ticket)
            self.changed.notify_all()

    def wait_until(self, what: Callable[[FakeEngine], object]) -> bool:
        with self.changed:
            return self.changed.wait_for(lambda: what(self), 60)

    def drain(self, seconds: float) -> bool:
        return not self.open

    def close(self) -> None:
        self.is_closed = True

    def gauges(self) -> Gauges:
        return Gauges(len(self.open), 0, 8, 0, 1)


def served_of(
    engine: Any = None, name: str = "toy", tokenizer: Tokenizer = BYTE, **limits: Any
) -> Served:
    """Return a served model of bytes with a context of 64."""
    return Served(
        name=name,
        rendering=Rendering(tokenizer),
        engine=engine or FakeEngine(BYTE.encode(" cat")),
        context_length=64,
        vocabulary_size=tokenizer.vocabulary_size,
        fingerprint="abc-123",
        limits=Limits(**({"defaults": DEFAULTS} | limits)),
    )


@dataclass
class Live:
    """A running server of this process, and what it logged."""

    state: Any
    server: Any
    port: int
    lines: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self,
        path: str,
        body: Any = None,
        method: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Return (status, headers, body). A body that is not bytes is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        sent = (JSON if data is not None else {}) | (headers or {})
        method = method or ("GET" if data is None else "POST")
        connection.putrequest(method, path, skip_host="Host" in sent, skip_accept_encoding=True)
        for name, value in sent.items():
            connection.putheader(name, value)
        if data is not None:
            connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data)
        answer = connection.getresponse()
        found = answer.status, answer.headers, answer.read()
        connection.close()
        return found

    def json(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        status, _, data = self.ask(path, body, **options)
        return status, json.loads(data)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def raw(self, data: bytes) -> bytes:
        """Return all that comes until the server closes the connection."""
        with self.connect() as connection:
            connection.sendall(data)
            return read_all(connection)

    def events(self, path: str, body: dict, **options: Any) -> list[Any]:
        """Return the events of a stream, parsed; the last must be [DONE]."""
        status, headers, data = self.ask(path, body | {"stream": True}, **options)
        assert status == 200 and headers["Content-Type"].startswith("text/event-stream"), data
        return events_of(data)

    def end(self) -> None:
        self.server.loop.call_soon_threadsafe(self.server.ended.set)


def events_of(data: bytes) -> list[Any]:
    parts = [part for part in data.decode("ascii").split("\n\n") if part]
    told = [part.removeprefix("data: ") for part in parts if not part.startswith(":")]
    return [json.loads(part) if part != "[DONE]" else part for part in told]


def read_all(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(1 << 16):
            found += chunk
    return found


def read_one(connection: socket.socket) -> bytes:
    """Return one answer whose length its head says, of a connection that is kept."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += _more(connection)
    head, _, body = found.partition(b"\r\n\r\n")
    match = re.search(rb"^content-length: (\d+)", head, re.MULTILINE | re.IGNORECASE)
    assert match is not None, head
    while len(body) < int(match[1]):
        body += _more(connection)
    return head + b"\r\n\r\n" + body


def _more(connection: socket.socket) -> bytes:
    chunk = connection.recv(1 << 16)
    assert chunk, "the connection has ended"
    return chunk


def post(path: str, body: Any, *lines: str) -> bytes:
    """Return a POST as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = [f"POST {path} HTTP/1.1", "Host: 127.0.0.1", "Content-Type: application/json"]
    head += [f"Content-Length: {len(data)}", *lines]
    return "\r\n".join([*head, "", ""]).encode() + data


@contextlib.contextmanager
def live(
    *served: Served,
    key: bytes = b"",
    allow_host: Sequence[str] = (),
    allow_origin: Sequence[str] = (),
    max_body_bytes: int = 1 << 20,
    request_seconds: float = 60.0,
    drain_seconds: float = 60.0,
    ping_seconds: float = 60.0,
    is_loading: bool = False,
) -> Iterator[Live]:
    """Run a server in a thread."""
    from runtime.serving.app import State, make_app
    from runtime.serving.http_server import Server, config_of, listening_socket
    from runtime.serving.security import rules_of
    from runtime.serving.start import drained

    listening = listening_socket("127.0.0.1", 0)
    port, ready = listening.getsockname()[1], threading.Event()
    lines: list[str] = []

    def run() -> None:
        async def main() -> None:
            state = State(
                models=Models(served or [served_of()]),
                rules=rules_of("127.0.0.1", allow_host, allow_origin, key),
                version="test",
                max_body_bytes=max_body_bytes,
                log=lines.append,
                ping_seconds=ping_seconds,
                is_loading=is_loading,
            )

            async def begin() -> None:
                server.loop = asyncio.get_running_loop()
                ready.set()

            server = Server(
                config_of(make_app(state), request_seconds),
                begin,
                lambda: drained(state, drain_seconds),
            )
            found.append(Live(state, server, port, lines))
            await server.serve(sockets=[listening])

        asyncio.run(main())

    found: list[Live] = []
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(60)
    try:
        yield found[0]
    finally:
        with contextlib.suppress(RuntimeError):
            found[0].end()
        thread.join(60)
        assert not thread.is_alive()


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)
