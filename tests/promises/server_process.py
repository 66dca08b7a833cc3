"""Guarantees of the server as a process: how it ends, what memory it takes, what it does idle."""

from __future__ import annotations

import contextlib
import functools
import json
import random
import re
import signal
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tests.builders_server import events_of, post, read_all, read_one, wait_for
from tests.builders_server_process import SECONDS, Process, serving
from tests.promises import Promise, Tally
from tests.promises.common import attempt

MIB = 2**20
# A server that has not ended at once after this does not.
PATIENCE_SECONDS = SECONDS
STORY = "Once upon a time"
PATH = "/v1/completions"
# Answers that take some hundred passes: the signal finds two of them running, and two that wait.
ANSWERS = [
    {"prompt": STORY, "max_tokens": 200, "seed": 1, "when_full": "slide", "stream": True},
    {"prompt": STORY, "max_tokens": 200, "seed": 2, "when_full": "slide", "logprobs": 2},
    {"prompt": "Tom had a", "max_tokens": 60, "seed": 3, "stream": True, "logprobs": 1},
    {"prompt": "Mia saw a", "max_tokens": 60, "seed": 4},
]
# Until the model ends its text.
ENDLESS = {"prompt": STORY, "max_tokens": 10**6, "when_full": "slide", "stream": True}


def said(data: bytes) -> list:
    """Return what an answer says, whole or streamed: text, log-probabilities, why it ended."""
    head, _, body = data.partition(b"\r\n\r\n")
    assert b" 200 " in head[:20], head[:200]
    if b"chunked" in head:
        parts = re.findall(rb"[0-9a-f]+\r\n((?:data|: ).*?\n\n)\r\n", body, re.DOTALL)
        chunks = events_of(b"".join(parts))
        assert chunks[-1] == "[DONE]", chunks[-1]
        choices = [chunk["choices"][0] for chunk in chunks[:-1]]
    else:
        choices = json.loads(body)["choices"]
    scores = [score for one in choices for score in (one["logprobs"] or {}).get("top_logprobs", [])]
    return ["".join(one["text"] for one in choices), scores, choices[-1]["finish_reason"]]


# ------------------------------------------------------------------------------------------ signals
def _taken(server: Process) -> int:
    """Return how many answers were begun, or wait."""
    text = server.ask("/metrics")[2].decode()
    names = "num_requests_running|num_requests_waiting|request_success_total"
    return sum(int(float(n)) for n in re.findall(rf"^\w+:(?:{names})\{{.*\}} (\S+)$", text, re.M))


def _is_refused(server: Process, path: str) -> bool:
    body = ANSWERS[3] if path == PATH else None
    status, headers, data = server.ask(path, body)
    code = json.loads(data)["error"]["code"]
    return status == 503 and code == "draining" and float(headers["Retry-After"]) > 0


def _drained(server: Process, number: int, alone: list) -> None:
    """Send a signal amid answers: they end as they would have, and nothing else is answered."""
    with contextlib.ExitStack() as stack:
        half, kept, *running = (stack.enter_context(server.connect()) for _ in range(6))
        # Its body comes late: so the drain lasts until the new requests have been refused.
        late = post(PATH, ANSWERS[3], "Connection: close")
        half.sendall(late[:-5])
        kept.sendall(post("/tokenize", {"prompt": STORY}))
        assert b" 200 " in read_one(kept)
        before = _taken(server)
        for connection, body in zip(running, ANSWERS, strict=True):
            connection.sendall(post(PATH, body, "Connection: close"))
        wait_for(lambda: _taken(server) == before + len(ANSWERS), SECONDS)
        server.child.send_signal(number)
        wait_for(lambda: re.search("^drain ", server.text(), re.MULTILINE), SECONDS)
        assert _is_refused(server, PATH) and _is_refused(server, "/health"), "not refused"
        kept.sendall(post(PATH, ANSWERS[3]))
        assert b" 503 " in read_one(kept)[:20], "a kept connection is answered"
        with ThreadPoolExecutor(len(running)) as pool:
            found = [said(data) for data in pool.map(read_all, running)]
        assert found == alone, "an answer is not what it is alone"
        half.sendall(late[-5:])
        assert b" 503 " in read_all(half)[:20], "a request whose body came late is answered"


def _at_once(server: Process, number: int, second: int) -> int:
    """Send two signals amid a stream and a request that never comes; return the second."""
    with server.connect() as half, server.connect() as connection:
        # The model may end its text by itself.
        half.sendall(post(PATH, ENDLESS)[:-5])
        connection.sendall(post(PATH, ENDLESS))
        connection.recv(100)
        server.child.send_signal(number)
        wait_for(lambda: re.search("^drain ", server.text(), re.MULTILINE), SECONDS)
        assert server.child.poll() is None, "it did not wait"
        server.child.send_signal(second)
        assert server.child.wait(PATIENCE_SECONDS) == 128 + second
    return second


def signals(count: int, run: Callable = serving) -> Tally:
    """84. SIGTERM and Ctrl-C, amid answers or idle, once or twice, again and again on one port.

    Held: new requests get 503 while running ones end with the bits they have alone, the exit code
    is 128 + signal, and nothing is left: the next server has the port.
    """
    tally, r = Tally(), random.Random(84)
    flags = ["--slots", "2", "--max_new_tokens", "1000000", "--drain_seconds", "3000"]
    flags += ["--request_seconds", "600"]
    kinds = ("amid answers", "twice", "idle")
    alone: list = []
    port = 0

    def case(kind: str, number: int) -> None:
        nonlocal port
        with run(*flags, port=port) as server:
            port = server.port
            if not alone:
                alone.extend(said(server.raw(PATH, body)) for body in ANSWERS)
            if kind == "twice":
                number = _at_once(server, number, r.choice((signal.SIGTERM, signal.SIGINT)))
            elif kind == "idle":
                server.child.send_signal(number)
            else:
                _drained(server, number, alone)
            code = server.child.wait(SECONDS)
            assert code == 128 + number, f"exit code {code}"
            assert "Traceback" not in server.text(), server.text()[-2_000:]
            with contextlib.suppress(ConnectionRefusedError):
                server.connect().close()
                raise AssertionError("something listens at the port")

    for i in range(count):
        kind, number = kinds[i % 3], (signal.SIGTERM, signal.SIGINT)[i % 2]
        attempt(tally, f"case {i}: {number.name} {kind}", functools.partial(case, kind, number))
    return tally


# ------------------------------------------------------------------------------------------- memory
WARM = 100
MOST_MORE_BYTES = 5 * MIB
MOST_BODY_BYTES = 1 << 16
# What a body over the limit may take: the limit itself, twice while it is joined, and what uvicorn
# and the socket hold of the rest, 64 KiB and 256 KiB. A body that is kept takes all of it.
MOST_OF_LARGE_BYTES, LARGE_BYTES = MIB, 4 * MIB


def mixed(server: Process, i: int) -> tuple[int, tuple[int, ...]]:
    """Ask something; return (status, those that are right), 0 for a client that goes."""
    r = random.Random(i)
    body: dict[str, Any] = {
        "prompt": STORY * r.randint(1, 30),
        "max_tokens": r.randint(1, 12),
        "seed": i,
        "n": r.choice((1, 1, 1, 3)),
        "logprobs": r.choice((None, None, 5)),
        "stream": r.random() < 0.5,
    }
    kind = r.choice(("answer", "answer", "answer", "wrong", "goes", "goes", "host", "path", "type"))
    # All slots taken, and the queue full, is an answer.
    if kind == "answer":
        return server.ask(PATH, body | {"experts": r.random() < 0.3})[0], (200, 429)
    if kind == "wrong":
        wrong: list[Any] = [
            body | {f"temperature{i}": 1, "temperature": -1},
            b"{" * r.randint(1, 9),
        ]
        return server.ask(PATH, r.choice(wrong))[0], (400,)
    if kind == "host":
        return server.ask(PATH, body, Host=f"evil{i}.example")[0], (403,)
    if kind == "path":
        return server.ask(f"/v1/models/no-{i}")[0], (404,)
    if kind == "type":
        return server.ask(PATH, body, **{"Content-Type": f"text/{i}"})[0], (415,)
    request = post(PATH, body | ENDLESS | {"prompt": body["prompt"]})
    with server.connect() as connection:
        connection.sendall(request[: r.choice((10, len(request) - 5, len(request)))])
        if r.random() < 0.7:
            connection.settimeout(0.02)
            with contextlib.suppress(TimeoutError):
                connection.recv(r.randint(1, 3_000))
    return 0, (0,)


def _large(server: Process, i: int) -> bool:
    """Send a body far over the limit, with its length or in chunks; return whether 413 came."""
    with server.connect() as connection:
        request = post(PATH, b"", "Connection: close")
        size = b"Content-Length: 0"
        piece, end = b" " * MOST_BODY_BYTES, b""
        if i % 2:
            request = request.replace(size, b"Content-Length: %d" % LARGE_BYTES)
        else:
            request = request.replace(size, b"Transfer-Encoding: chunked")
            piece, end = b"%x\r\n%s\r\n" % (len(piece), piece), b"0\r\n\r\n"
        # The server may have closed before all is sent.
        with contextlib.suppress(ConnectionError):
            connection.sendall(request)
            for _ in range(LARGE_BYTES // MOST_BODY_BYTES):
                connection.sendall(piece)
            connection.sendall(end)
        return connection.recv(20).startswith(b"HTTP/1.1 413")


def memory(count: int, run: Callable = serving) -> Tally:
    """85. Answers, streams, errors and clients that go, by four at a time; then bodies too large.

    Held: each has its status, the resident memory after all is at most 5 MiB above that after 100,
    and the bodies take no memory.
    """
    tally, statuses = Tally(), dict[int, int]()
    flags = ["--slots", "4", "--max_body_bytes", str(MOST_BODY_BYTES), "--max_waiting", "8"]
    flags += ["--max_new_tokens", "1000000", "--no-log_requests"]
    with run(*flags) as server, ThreadPoolExecutor(4) as pool:

        def some(first: int, last: int) -> int:
            ask = functools.partial(mixed, server)
            for i, (status, right) in zip(
                range(first, last), pool.map(ask, range(first, last)), strict=True
            ):
                tally.add(status in right, f"request {i}: {status}, not {right}")
                statuses[status] = statuses.get(status, 0) + 1
            return server.memory_bytes()

        before = some(0, WARM)
        after = some(WARM, max(count, 2 * WARM))
        # A queue that was full all the time would take no memory.
        tally.add(statuses[200] >= count // 5, f"answered: {statuses}")
        tally.add(after <= before + MOST_MORE_BYTES, f"{before:,} bytes became {after:,}")
        server.forget_peak()
        empty = server.peak_bytes()
        for i in range(max(count // 10, 10)):
            tally.add(_large(server, i), f"large body {i}: no 413")
        more = server.peak_bytes() - empty
        tally.add(more <= MOST_OF_LARGE_BYTES, f"large bodies took {more:,} bytes")
    tally.detail = {
        "answered": statuses[200],
        "largest growth, MiB": round((after - before) / MIB, 1),
        "most that large bodies took, MiB": round(more / MIB, 1),
    }
    return tally


# --------------------------------------------------------------------------------------------- idle
WINDOW_SECONDS = 2.0
MOST_WINDOWS = 15


def _used(server: Process, i: int, held: list[socket.socket]) -> None:
    """Leave the server as clients may leave it. held: gets connections that stay open."""
    r = random.Random(i)
    if i % 4 == 1:
        assert said(server.raw(PATH, ANSWERS[i % 3]))
    elif i % 4 == 2:
        for _ in range(4):
            with server.connect() as connection:
                connection.sendall(post(PATH, ENDLESS)[: r.choice((5, 10**6))])
                connection.settimeout(0.1)
                with contextlib.suppress(TimeoutError):
                    connection.recv(r.randint(1, 3_000))
    elif i % 4 == 3:
        # Connections that are kept, silent, or amid a head: their timers end.
        for part in (b"", b"POST / HT", post("/tokenize", {"prompt": "a"})):
            silent = server.connect()
            silent.sendall(part)
            assert len(part) < 50 or read_one(silent)
            held.append(silent)


def idle(count: int, run: Callable = serving) -> Tally:
    """86. A server of two threads that is new, has answered, was left, or has silent connections.

    Held: soon none of its threads wakes, and no CPU time passes. uvicorn's own loop wakes ten times
    a second.
    """
    tally = Tally()
    with run("--request_seconds", "0.5", "--num_threads", "2", "--max_new_tokens", "1000000") as s:
        for i in range(count):
            held: list[socket.socket] = []
            _used(s, i, held)
            windows = []
            while len(windows) < MOST_WINDOWS and 0 not in windows:
                before = s.wake_ups()
                time.sleep(WINDOW_SECONDS)
                windows.append(s.wake_ups() - before)
            before, ticks = s.wake_ups(), s.cpu_ticks()
            time.sleep(WINDOW_SECONDS)
            woken, used = s.wake_ups() - before, s.cpu_ticks() - ticks
            tally.add(woken == used == 0, f"case {i}: {woken} wake-ups, {used} ticks, {windows}")
            for connection in held:
                connection.close()
    return tally


PROMISES: list[Promise] = [
    Promise(
        84,
        "SIGTERM and Ctrl-C: running answers end as alone, new ones get 503; twice ends at once",
        signals,
        0,
        50,
        50,
    ),
    Promise(
        85,
        "After 1,000 requests of all kinds a server's memory is at most 5 MiB above that after 100",
        memory,
        300,
        1_000,
        1_000,
    ),
    Promise(
        86,
        "An idle server uses no CPU: no thread wakes, whatever clients did before",
        idle,
        1,
        20,
        20,
    ),
]
