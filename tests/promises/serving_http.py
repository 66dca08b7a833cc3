"""Guarantees of the server over real connections: strangers, clients that go, full queues."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from runtime.serving.engine import Engine
from tests.builders import random_model, tiny_config
from tests.builders_server import BYTE, FakeEngine, Live, live, post, read_all, served_of
from tests.promises import Promise, Tally
from tests.promises.schemas import HAS_SCHEMATHESIS, send_made

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
def a_server(
    prefill_chunk: int = 128,
    max_new_tokens: int = 64,
    slots: int = 4,
    max_waiting: int = 64,
    **settings: Any,
) -> Iterator[Live]:
    """Run a server of a small random model that reads bytes."""
    model = random_model(tiny_config(vocabulary_size=BYTE.vocabulary_size, context_length=64), 3)
    engine = Engine(model.eval(), slots, max_waiting, prefill_chunk, BYTE.banned_ids)
    served = served_of(engine, plain_chat=True, most_choices=68, max_new_tokens=max_new_tokens)
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


def _is_answer(status: int, kind: str, said: bytes) -> bool:
    """Return whether this is an answer or an error of ours, whole."""
    if kind == "text/event-stream":
        return status == 200 and said.endswith(b"data: [DONE]\n\n")
    if kind == "text/plain":
        return status == 200 and said.startswith(b"# ")
    return kind == "application/json" and (status == 200) != (set(json.loads(said)) == {"error"})


def malformed(count: int) -> Tally:
    """73. Bodies with parts that are hostile, missing, torn or of another type.

    Where schemathesis is installed, half of them are its own. Held: an answer below 500, in JSON or
    a stream, and the same answer as ever to the next good request.
    """
    tally, r = Tally(), random.Random(73)
    found: dict[str, int] = {}
    with a_server() as server:
        first = probe(server)

        def send(method: str, path: str, headers: dict[str, str], data: bytes | None) -> None:
            status, told, said = server.ask(path, data, method, headers)
            kind = told["Content-Type"].partition(";")[0]
            found[f"status {status}"] = found.get(f"status {status}", 0) + 1
            good = status < 500 and _is_answer(status, kind, said)
            good = good and (tally.tried % 10 > 0 or probe(server) == first)
            tally.add(good, f"case {tally.tried}: {status} {method} {path} {data!r:.200}")

        if HAS_SCHEMATHESIS:
            send_made(server.json("/openapi.json")[1], count // 2, send)
        found["of schemathesis"] = tally.tried
        while tally.tried < count:
            path, data = stranger(r)
            send("POST", path, {}, data)
        tally.add(probe(server) == first and not faults(server), f"the end: {faults(server)[:3]}")
    tally.detail = dict(sorted(found.items()))
    return tally


def faults(server: Live) -> list[str]:
    return [line for line in server.lines if line.startswith("fault")]


def full_queue(count: int) -> Tally:
    """75. More requests than slots and queue hold, and bodies over the limit, plain and chunked.

    Held: 429 with Retry-After and 413, at once, and nothing of them stays; openai-python, by more
    at a time than fit, tries again by itself until each has its answer.
    """
    tally = Tally()
    _retried(tally, count)
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


def _retried(tally: Tally, count: int) -> None:
    """Let clients that try again ask a server with one slot and one place in its queue."""
    import openai

    with a_server(slots=1, max_waiting=1) as server:

        def asked(seed: int) -> tuple[str, Any]:
            with openai.OpenAI(
                base_url=f"{server.url}/v1", api_key="none", max_retries=1_000
            ) as client:
                answer = client.completions.create(model="toy", **(PROBE | {"seed": seed}))
            choice = answer.choices[0]
            return choice.text, choice.logprobs

        alone = [asked(seed) for seed in range(10)]
        with ThreadPoolExecutor(8) as pool:
            for i, found in enumerate(pool.map(lambda i: asked(i % 10), range(count))):
                tally.add(found == alone[i % 10], f"retried {i}: {found}")
        num_full = sum(" 429 " in line for line in server.lines)
        # Without them nothing was tried again.
        tally.add(num_full > 0, "the queue was never full")
        tally.detail = {"answers that openai-python tried again for": num_full}


def who_may_ask(count: int) -> Tally:
    """76. Each route of the app with each kind of wrong key, Host, Origin and body, in turn.

    Held: its 401, 403 or 415, and never a part of an answer; with what is right, each answers.
    """
    from runtime.serving.app import OPEN_PATHS, Routes

    tally, r = Tally(), random.Random(76)
    routes = [(m, route.path) for route in Routes(None).all() for m in route.methods - {"HEAD"}]
    cases = [
        (method, path, number)
        for method, path in sorted(routes)
        for number in range(len(_wrong(r, method, path in OPEN_PATHS)))
    ]
    asked = dict.fromkeys(routes, 0)
    with a_server(key=KEY) as server:

        def ask(method: str, path: str, headers: dict[str, str]) -> tuple[int, bytes]:
            named = path.replace("{id:path}", "toy")
            status, _, data = server.ask(named, BODIES.get(path), method, headers)
            return status, data

        told = {(method, path): ask(method, path, GOOD) for method, path in routes}
        for route, (status, data) in told.items():
            tally.add(status == 200, f"{route} with all that is right: {status} {data[:200]!r}")
        for i in range(count):
            method, path, number = cases[i % len(cases)]
            wrong, wanted = _wrong(r, method, path in OPEN_PATHS)[number]
            headers = {name: value for name, value in (GOOD | wrong).items() if value is not None}
            status, data = ask(method, path, headers)
            asked[method, path] += 1
            ok = status == wanted and set(json.loads(data)) == {"error"}
            tally.add(ok, f"case {i}: {method} {path} {wrong}: {status} {data[:100]!r}")
    tally.detail = {"routes": len(routes), "fewest times a route": min(asked.values())}
    return tally


def _wrong(r: random.Random, method: str, is_open: bool) -> list[tuple[dict[str, Any], int]]:
    """Return headers of which none may be accepted, each with the status that says so.

    None: without that header.
    """
    letters = "".join(r.choice("abz019-") for _ in range(r.randint(1, 12)))
    key = KEY.decode()
    kinds: list[tuple[dict[str, Any], int]] = [
        ({"Host": f"{letters}.example"}, 403),
        ({"Host": f"127.0.0.1.{letters}"}, 403),
        ({"Host": f"localhost{letters}:8000"}, 403),
        ({"Host": f"127.0.0.1@{letters}"}, 403),
        ({"Origin": f"http://{letters}.example"}, 403),
        ({"Origin": f"http://127.0.0.1.{letters}"}, 403),
        ({"Origin": f"http://localhost@{letters}"}, 403),
        ({"Origin": "null"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": letters}, 403),
        ({"Host": f"{letters}.example", "Origin": f"http://{letters}.example"}, 403),
    ]
    if not is_open:
        wrong = (f"Bearer {letters}", f"{letters} {key}", f"Bearer {key}{letters}", key)
        short = (f"Bearer {key[:-1]}", "Bearer", f"Bearer {key.upper()}", "Bearer \xe9", None)
        kinds += [({"Authorization": value}, 401) for value in (*wrong, *short)]
    if method == "POST":
        types = (f"text/{letters}", "text/plain", "application/x-www-form-urlencoded", "")
        kinds += [({"Content-Type": value}, 415) for value in types]
        kinds.append(({"Content-Type": "text/plain; application/json"}, 415))
        kinds.append(({"Content-Encoding": "gzip"}, 415))
    return kinds


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
        250,
        2_000,
        2_000,
    ),
]
