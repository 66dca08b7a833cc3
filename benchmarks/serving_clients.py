"""Clients of the benchmarks of serving: raw HTTP over asyncio, as cheap as they can be in Python.

They share the cores with the server, so what they cost is measured with what they measure.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

COMPLETIONS = "/v1/completions"


@dataclass
class Answered:
    """What a client got, and when. Seconds are from the first byte of the request on.

    tokens: of the answer, as its usage says. events_s: of a stream, when each event came.
    """

    status: int
    tokens: int
    seconds: float
    body: dict[str, Any]
    events_s: list[float] = field(default_factory=list)

    @property
    def gaps_s(self) -> list[float]:
        """Return the seconds between the events of a stream that have text."""
        return [b - a for a, b in zip(self.events_s, self.events_s[1:], strict=False)]


class Client:
    """A connection that is kept, for one request after another."""

    def __init__(self, address: tuple[str, int]):
        self.address = address
        self.reader: asyncio.StreamReader | None = None
        self.writer: asyncio.StreamWriter | None = None

    async def ask(self, body: dict[str, Any], path: str = COMPLETIONS) -> Answered:
        """Send a request and read its answer, streamed or not."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(*self.address)
        started = time.perf_counter()
        self.writer.write(request_of(body, path))
        status, headers = await self._head()
        if b"chunked" in headers.get(b"transfer-encoding", b""):
            return await self._streamed(status, started)
        data = await self._reader.readexactly(int(headers[b"content-length"]))
        seconds, answer = time.perf_counter() - started, json.loads(data)
        return Answered(status, _tokens(answer), seconds, answer)

    @property
    def _reader(self) -> asyncio.StreamReader:
        assert self.reader is not None
        return self.reader

    async def _head(self) -> tuple[int, dict[bytes, bytes]]:
        lines = (await self._reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
        pairs = (line.partition(b":") for line in lines[1:] if line)
        headers = {name.strip().lower(): value.strip().lower() for name, _, value in pairs}
        return int(lines[0].split()[1]), headers

    async def _streamed(self, status: int, started: float) -> Answered:
        """Read server-sent events. Only the last that is JSON is parsed: it has the usage."""
        reader, times, last, rest = self._reader, [], b"{}", b""
        while size := int(await reader.readuntil(b"\r\n"), 16):
            # With the line end after it.
            data = rest + (await reader.readexactly(size + 2))[:-2]
            now = time.perf_counter() - started
            *events, rest = data.split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    last = event[6:]
                    times.append(now)
        await reader.readuntil(b"\r\n")
        seconds, answer = time.perf_counter() - started, json.loads(last)
        # The last event is the usage, which is no token.
        return Answered(status, _tokens(answer), seconds, answer, times[:-1])

    async def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None


def request_of(body: dict[str, Any], path: str = COMPLETIONS) -> bytes:
    """Return a request's bytes."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def _tokens(answer: dict[str, Any]) -> int:
    return (answer.get("usage") or {}).get("completion_tokens", 0)


@dataclass
class Load:
    """What clients got together. client_cores: CPU time of this process per second."""

    answers: list[Answered]
    seconds: float
    client_cores: float

    @property
    def tokens(self) -> int:
        return sum(one.tokens for one in self.answers)

    @property
    def tokens_per_sec(self) -> float:
        return self.tokens / self.seconds


def load(address: tuple[str, int], bodies: Sequence[Sequence[dict[str, Any]]]) -> Load:
    """Return what clients get at the same time; bodies: of each client, one after another.

    Raise ValueError for an answer that is an error.
    """

    async def all_clients() -> list[list[Answered]]:
        return await asyncio.gather(*(_in_turn(address, own) for own in bodies))

    started, cpu = time.perf_counter(), time.process_time()
    answers = [one for own in asyncio.run(all_clients()) for one in own]
    seconds = time.perf_counter() - started
    for one in answers:
        if one.status != 200 or not one.tokens:
            raise ValueError(f"the server answered {one.status}: {str(one.body)[:300]}")
    return Load(answers, seconds, (time.process_time() - cpu) / seconds)


async def _in_turn(address: tuple[str, int], bodies: Sequence[dict[str, Any]]) -> list[Answered]:
    client = Client(address)
    try:
        return [await client.ask(body) for body in bodies]
    finally:
        await client.close()
