"""Guarantees of the server over real connections: strangers, clients that go, full queues."""

from __future__ import annotations

import contextlib
import copy
import http.client
import json
import random
from collections.abc import Iterator
from typing import Any

from runtime.serving.engine import Engine
from tests.builders import random_model, tiny_config
from tests.builders_server import BYTE, FakeEngine, Live, live, post, read_all, served_of
from tests.promises import Promise, Tally

KEY = b"right-key"
GOOD = {"Authorization": "Bearer right-key"}
# What is asked between others' requests, and must be answered alike each time.
PROBE = {"prompt": "Once", "max_tokens": 5, "seed": 1, "logprobs": 2}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": PROBE
    | {"temperature": 0.5, "top_k": 3, "top_p": 0.9, "stop": ["x", "yz"], "n": 2, "echo": True}
    | {"stream": False, "experts": True, "when_full": "stop", "return_token_ids": True},
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "hello"}]},
        ],
        "max_completion_tokens": 4,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/tokenize": {"prompt": "a text", "add_special_tokens": True},
    "/detokenize": {"tokens": [1, 2, 3]},
}
HOSTILE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    1e308,
    10**30,
    2**63,
    "",
    "\x00\x1b[2J",
    "\ud800",
    "\u202e" * 3,
    "x" * 5_000,
    [],
    [None],
    [[]],
    [[1], "a"],
    [-1, 10**9],
    {},
    {"a": {"b": []}},
    ["a"] * 200,
    [1] * 500,
)
NAMES = ("x\r\ny", "\ud800", "tools", "prompt", "n" * 300)


@contextlib.contextmanager
def a_server(prefill_chunk: int = 128, **settings: Any) -> Iterator[Live]:
    """Run a server of a small random model that reads bytes."""
    model = random_model(tiny_config(vocabulary_size=BYTE.vocabulary_size, context_length=64), 3)
    engine = Engine(model.eval(), 4, 64, prefill_chunk, BYTE.banned_ids)
    served = served_of(engine, plain_chat=True, most_choices=68, max_new_tokens=100_000)
    try:
        with live(served, **settings) as server:
            yield server
    finally:
        engine.close()


def probe(server: Live, headers: dict[str, str] | None = None) -> list:
    status, answer = server.json("/v1/completions", PROBE, headers=headers)
    return [status, answer.get("choices")]


def mutated(r: random.Random, body: Any) -> Any:
    """Return a body with a value, a name or a whole part that is something else."""
    body = json.loads(json.dumps(body))
    for _ in range(r.choice((1, 1, 2, 4))):
        at, places = body, []
        while isinstance(at, (dict, list)) and at:
            key = r.choice(list(at)) if isinstance(at, dict) else r.randrange(len(at))
            places.append((at, key))
            at = at[key]
        if not places:
            return r.choice(HOSTILE)
        where, key = r.choice(places)
        kind = r.randrange(4)
        if kind == 0 and isinstance(where, dict):
            where[r.choice(("x\r\ny", "\ud800", "tools", "prompt", "n" * 300))] = copy.deepcopy(
                r.choice(HOSTILE)
            )
        elif kind == 1:
            del where[key]
        else:
            where[key] = copy.deepcopy(r.choice(HOSTILE))
    return body


def stranger(r: random.Random) -> tuple[str, bytes]:
    """Return (path, body) of a request that is wrong, or odd, in some way."""
    path = r.choice(list(BODIES))
    data = json.dumps(mutated(r, BODIES[path])).encode()
    kind = r.randrange(5)
    if kind == 0:
        data = data[: r.randrange(len(data))]
    elif kind == 1:
        at = r.randrange(len(data))
        data = data[:at] + bytes([r.randrange(256)]) + data[at + 1 :]
    elif kind == 2 and r.random() < 0.2:
        data = r.choice((b"[" * 50_000, b"NaN", b'{"n": ' + b"9" * 5_000 + b"}", b"\xff" * 9))
    return path, data


def malformed(count: int) -> Tally:
    """73. Bodies with parts that are hostile, missing, torn or of another type.

    Held: an answer below 500, in JSON or a stream, and the same answer as ever to the next good
    request.
    """
    tally, r = Tally(), random.Random(73)
    statuses: dict[str, int] = {}
    with a_server() as server:
        first = probe(server)
        for i in range(count):
            path, data = stranger(r)
            status, headers, said = server.ask(path, data)
            kind = headers["Content-Type"].partition(";")[0]
            if kind == "application/json":
                parsed = json.loads(said)
                good = (status == 200) != (set(parsed) == {"error"})
            else:
                good = kind == "text/event-stream" and said.endswith(b"data: [DONE]\n\n")
            statuses[str(status)] = statuses.get(str(status), 0) + 1
            good = good and (i % 10 > 0 or probe(server) == first)
            tally.add(status < 500 and good, f"case {i}: {status} {path} {data[:200]!r}")
        tally.add(probe(server) == first and not faults(server), f"the end: {faults(server)[:3]}")
    tally.detail = {f"status {status}": n for status, n in sorted(statuses.items())}
    return tally


def faults(server: Live) -> list[str]:
    return [line for line in server.lines if line.startswith("fault")]


def full_queue(count: int) -> Tally:
    """75. More requests than slots and queue hold, and bodies over the limit, plain and chunked.

    Held: 429 with Retry-After and 413, at once, and nothing of them stays.
    """
    tally = Tally()
    engine = FakeEngine(BYTE.encode("cat"), at_once=False, most=1)
    with live(served_of(engine), max_body_bytes=2_000) as server, server.connect() as holder:
        holder.sendall(post("/v1/completions", PROBE, "Connection: close"))
        assert engine.wait_until(lambda e: e.open)
        for i in range(count):
            status, headers, _ = server.ask("/v1/completions", PROBE | {"stream": i % 2 == 0})
            full = status == 429 and float(headers["Retry-After"]) > 0
            chunked = post("/v1/completions", b"", "Transfer-Encoding: chunked")
            chunked = chunked.replace(b"Content-Length: 0\r\n", b"")
            if i % 2:
                large = server.ask("/v1/completions", b" " * 2_001)[0] == 413
            else:
                with server.connect() as connection:
                    connection.sendall(chunked + b"7d1\r\n" + b" " * 2_001 + b"\r\n")
                    large = connection.recv(12) == b"HTTP/1.1 413"
            tally.add(full and large and len(engine.open) == 1, f"case {i}: {status}")
        engine.tell(engine.tickets[0])
        tally.add(b"cat" in read_all(holder), "the answer that was there")
    return tally


def who_may_ask(count: int) -> Tally:
    """76. Each route of the app with wrong keys, Hosts, Origins and kinds of body.

    Held: 401, 403 or 415, and never a part of an answer.
    """
    from runtime.serving.app import OPEN_PATHS, Routes

    tally, r = Tally(), random.Random(76)
    routes = [(m, route.path) for route in Routes(None).all() for m in route.methods - {"HEAD"}]
    with a_server(key=KEY) as server:
        for i in range(count):
            method, path = routes[i % len(routes)]
            path = path.replace("{id:path}", "toy")
            wrong, wanted = _wrong(r, method, path in OPEN_PATHS)
            body = None if method == "GET" else PROBE
            try:
                status, _, data = server.ask(path, body, method, GOOD | wrong)
            except http.client.BadStatusLine:
                status, data = 0, b""
            ok = status in (wanted, 400) and b'"choices"' not in data and b'"data"' not in data
            tally.add(ok, f"case {i}: {method} {path} {wrong}: {status}")
    return tally


def _wrong(r: random.Random, method: str, is_open: bool) -> tuple[dict[str, str], int]:
    """Return headers that must not be accepted, and the status that says so."""
    letters = "".join(r.choice("abz019.-") for _ in range(r.randint(1, 12)))
    hosts = (f"{letters}.example", f"127.0.0.1.{letters}", f"localhost{letters}", f"x@{letters}")
    kinds: list[tuple[dict[str, str], int]] = [
        ({"Host": r.choice(hosts)}, 403),
        ({"Origin": f"http://{r.choice(hosts)}"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": r.choice(("cross-site", "same-site", letters))}, 403),
    ]
    if not is_open:
        kinds.append(({"Authorization": f"Bearer {letters}"}, 401))
        kinds.append(({"Authorization": f"{letters} right-key"}, 401))
    if method == "POST":
        kinds.append(({"Content-Type": f"text/{letters}"}, 415))
        kinds.append(({"Content-Encoding": "gzip"}, 415))
    return r.choice(kinds)


PROMISES: list[Promise] = [
    Promise(
        78,
        "Malformed requests get an error below 500, and the next good one its usual answer",
        malformed,
        200,
        10_000,
        10_000,
    ),
    Promise(
        80,
        "A full queue says 429 and when to come back, a large body 413; nothing of them stays",
        full_queue,
        40,
        200,
        200,
    ),
    Promise(
        81,
        "A wrong key, Host, Origin or Content-Type is refused on every route",
        who_may_ask,
        150,
        2_000,
        2_000,
    ),
]
