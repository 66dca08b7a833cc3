"""The server over real connections: answers, streams, errors, clients that go, and its end.

The engine is a test's, so that the test says when a token comes. Real ones are in
test_server_clients.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra: serve)")

from runtime.serving.http_server import MOST_AHEAD_BYTES, protocol_with
from runtime.serving.request import EngineClosed
from tests.builders_server import (
    BYTE,
    END,
    JSON,
    FakeEngine,
    events_of,
    live,
    post,
    read_all,
    served_of,
    wait_for,
)

BODY = {"prompt": "secret", "max_tokens": 4}


@pytest.fixture(scope="module")
def server():
    with live() as running:
        yield running


def held(most: int = 1_000) -> FakeEngine:
    return FakeEngine(BYTE.encode("cats"), at_once=False, most=most)


def head(connection: socket.socket) -> bytes:
    """Read until the end of an answer's head."""
    found = b""
    while b"\r\n\r\n" not in found:
        found += connection.recv(1 << 16)
    return found


def answer_of(connection: socket.socket) -> bytes:
    """Read an answer whose length is known, and no more."""
    found = head(connection)
    start, _, rest = found.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", start)[1])
    while len(rest) < length:
        rest += connection.recv(length - len(rest))
    return start


# ---------------------------------------------------------------------------------------- answers
def test_a_completion_is_answered_whole(server):
    status, headers, data = server.ask("/v1/completions", BODY | {"mirostat": 1, "x,\u20acy": 2})
    answer = json.loads(data)
    assert status == 200 and answer["choices"][0]["text"] == " cat"
    assert headers["X-Gptoss-Ignored"] == "mirostat, x \\u20acy"
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert "Access-Control-Allow-Origin" not in headers
    assert answer["usage"]["completion_tokens"] == 4


def test_a_stream_is_the_same_text_then_usage_then_done(server):
    *chunks, usage, done = server.events(
        "/v1/completions", BODY | {"stream_options": {"include_usage": True}, "n": 2}
    )
    assert done == "[DONE]" and usage["choices"] == [] and usage["usage"]["completion_tokens"] == 8
    assert all(chunk["usage"] is None for chunk in chunks)
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == " cat"
        assert [c["finish_reason"] for c in mine] == [None] * (len(mine) - 1) + ["length"]
    assert len({chunk["id"] for chunk in chunks}) == 1
    _, headers, _ = server.ask("/v1/completions", BODY | {"stream": True})
    assert headers["X-Accel-Buffering"] == "no" and "Content-Encoding" not in headers


def test_a_plain_chat_streams_its_role_first():
    with live(served_of(plain_chat=True)) as server:
        body = {"messages": [{"role": "user", "content": "a"}]}
        *chunks, done = server.events("/v1/chat/completions", body)
        deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert [delta.get("role") for delta in deltas[1:]] == [None] * (len(deltas) - 1)
        assert "".join(delta.get("content", "") for delta in deltas) == " cat"
        assert deltas[-1] == {} and chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert done == "[DONE]"
        plain = server.json("/v1/chat/completions", body)[1]["choices"][0]
        assert plain["message"]["content"] == " cat"


def test_a_stop_text_cancels_what_the_engine_still_draws():
    """Its slot is free at once, and neither text nor usage knows of later tokens."""
    engine = held()
    with live(served_of(engine)) as server:
        results: list = []
        body = BODY | {"stop": "at", "max_tokens": 20}
        thread = threading.Thread(target=lambda: results.append(server.json(*ask)), daemon=True)
        ask = ("/v1/completions", body)
        thread.start()
        assert engine.wait_until(lambda e: e.tickets)
        engine.tell(engine.tickets[0], BYTE.encode("cat and more"), ends=False)
        thread.join(60)
        assert engine.wait_until(lambda e: e.cancelled)
        status, answer = results[0]
        assert status == 200 and answer["choices"][0]["text"] == "c"
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["usage"]["completion_tokens"] == 3


def test_several_models_are_told_apart_by_name():
    engines = {"a": FakeEngine(BYTE.encode("one")), "b/c": FakeEngine(BYTE.encode("two"))}
    with live(*(served_of(engine, name) for name, engine in engines.items())) as server:
        for name, text in ((None, "one"), ("default", "one"), ("a", "one"), ("b/c", "two")):
            answer = server.json("/v1/completions", BODY | {"model": name})[1]
            assert answer["choices"][0]["text"] == text
        assert [m["id"] for m in server.json("/v1/models")[1]["data"]] == ["a", "b/c"]
        # openai-python quotes the slash.
        assert server.json("/v1/models/b%2Fc")[1]["id"] == "b/c"
        status, answer = server.json("/v1/completions", BODY | {"model": "gpt-4"})
        assert status == 404 and answer["error"]["code"] == "model_not_found"
        assert server.json("/v1/models/x")[0] == 404
        assert server.json("/tokenizer_info?model=b/c")[0] == 200
        assert server.json("/tokenizer_info?model=x")[0] == 404


def test_the_other_routes_answer(server):
    assert server.json("/health") == (200, {"status": "ok"})
    assert server.json("/tokenize", {"prompt": "a"})[1]["tokens"] == [END, 97]
    assert server.json("/detokenize", {"tokens": [97]})[1] == {"prompt": "a"}
    assert server.json("/openapi.json")[1]["openapi"] == "3.1.0"
    status, headers, data = server.ask("/")
    assert status == 200 and "Content-Security-Policy" in headers and data


def test_the_metrics_are_prometheus_text(server):
    server.ask("/v1/completions", BODY)
    status, headers, data = server.ask("/metrics")
    text = data.decode()
    assert status == 200 and headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert 'gptoss:num_requests_running{model_name="toy"} 0' in text
    assert 'gptoss:time_to_first_token_seconds_bucket{model_name="toy",le="+Inf"} 0' in text
    route = 'gptoss:http_requests_total{method="POST",route="/v1/completions",status="200"}'
    assert route in text
    assert 'finished_reason="length"' in text
    names = [line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")]
    assert len(names) == len(set(names)) > 10
    for line in text.splitlines():
        assert line.startswith("#") or line.startswith(tuple(names)), line
        float(line.rsplit(" ", 1)[1]) if not line.startswith("#") else None


# ----------------------------------------------------------------------------------------- errors
def test_what_is_no_route_or_method_is_told_with_the_routes(server):
    status, answer = server.json("/v1/responses", BODY)
    assert status == 404 and "/v1/chat/completions" in answer["error"]["message"]
    # As the documents spell them: starlette writes {id:path}.
    assert "/v1/models/{id}" in answer["error"]["message"]
    status, headers, data = server.ask("/v1/completions")
    error = json.loads(data)["error"]
    assert status == 405 and headers["Allow"] == "POST" and error["code"] == "method_not_allowed"
    # It was the bare words Method Not Allowed.
    assert error["message"] == "this route is for POST alone"
    status, headers, data = server.ask("/health", method="DELETE")
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert server.ask("/health", method="DELETE")[0] == 405
    assert server.ask("/v1/completions/", BODY)[0] == 404


def test_errors_have_the_form_that_openai_python_reads(server):
    status, answer = server.json("/v1/completions", BODY | {"temperature": -1})
    assert status == 400 and set(answer) == {"error"}
    assert answer["error"]["param"] == "temperature"
    assert answer["error"]["type"] == "invalid_request_error"
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert server.json("/v1/completions", b"{")[0] == 400


def test_a_full_queue_says_when_to_come_back_and_gives_back_what_it_took():
    engine = held(most=3)
    with live(served_of(engine)) as server:
        thread = threading.Thread(target=server.ask, args=("/v1/completions", BODY), daemon=True)
        thread.start()
        assert engine.wait_until(lambda e: e.open)
        # Two of these fit, and the third does not: neither may stay.
        status, headers, data = server.ask("/v1/completions", BODY | {"n": 3})
        error = json.loads(data)["error"]
        assert status == 429 and float(headers["Retry-After"]) > 0
        assert error["type"] == "rate_limit_error" and error["code"] == "queue_full"
        assert len(engine.open) == 1
        status, _, _ = server.ask("/v1/completions", BODY | {"n": 3, "stream": True})
        assert status == 429
        for ticket in engine.open:
            engine.tell(ticket)
        thread.join(60)


def test_what_the_engine_refuses_or_fails_at_is_told():
    engine = FakeEngine(BYTE.encode("ab"))
    with live(served_of(engine)) as server:
        engine.refuses = "too long for this engine"
        status, answer = server.json("/v1/completions", BODY)
        assert (status, answer["error"]["message"]) == (400, "too long for this engine")
        engine.refuses, engine.fails = "", "the model's logits are not finite"
        status, answer = server.json("/v1/completions", BODY)
        assert status == 500 and answer["error"]["type"] == "server_error"
        assert "not finite" in answer["error"]["message"]
        # In a stream the status is out: an event says it, and [DONE] does not come.
        _, _, data = server.ask("/v1/completions", BODY | {"stream": True})
        events = events_of(data)
        assert events[-1]["error"]["type"] == "server_error" and "[DONE]" not in events


def test_a_fault_of_ours_ends_one_request_and_says_no_more_than_its_kind():
    class Broken(FakeEngine):
        def submit(self, request, on_event):
            raise KeyError("a text of the user")

    with live(served_of(Broken())) as server:
        status, answer = server.json("/v1/completions", BODY)
        assert status == 500 and "text of the user" not in json.dumps(answer)
        assert "fault    KeyError in /v1/completions" in server.lines
        assert server.ask("/health")[0] == 200


def test_log_lines_have_routes_and_no_text(server):
    before = len(server.lines)
    server.ask("/v1/completions", BODY)
    server.ask("/v1/models/%1b%5b2Jsecret")
    server.ask("/secret%0apath")
    server.ask("/health")
    wait_for(lambda: len(server.lines) >= before + 3)
    lines = server.lines[before:]
    assert [line.split()[1:4] for line in lines] == [
        ["POST", "/v1/completions", "200"],
        ["GET", "/v1/models/{id:path}", "404"],
        ["GET", "unknown", "404"],
    ]
    assert "secret" not in "".join(server.lines)


# ----------------------------------------------------------------------------------------- bodies
def test_a_body_over_the_limit_is_refused_by_its_head_and_by_its_length():
    with live(max_body_bytes=1_000) as server:
        big = {"prompt": "x" * 2_000}
        assert server.json("/v1/completions", big)[0] == 413
        assert server.json("/tokenize", big)[1]["error"]["code"] == "body_too_large"
        # By its head alone: nothing of the body has been sent.
        request = post("/v1/completions", b"", "Connection: close")
        request = request.replace(b"Content-Length: 0", b"Content-Length: 1001")
        with server.connect() as connection:
            connection.sendall(request)
            assert head(connection).startswith(b"HTTP/1.1 413 ")
        # Chunked, and endless: the sum counts.
        chunked = post("/v1/completions", b"", "Transfer-Encoding: chunked")
        chunked = chunked.replace(b"Content-Length: 0\r\n", b"")
        with server.connect() as connection:
            connection.sendall(chunked + b"1f4\r\n" + b"x" * 500 + b"\r\n")
            connection.sendall(b"258\r\n" + b"x" * 600 + b"\r\n")
            assert head(connection).startswith(b"HTTP/1.1 413 ")
        whole = b"".join(b"%x\r\n%s\r\n" % (1, bytes([byte])) for byte in json.dumps(BODY).encode())
        assert b" 200 " in server.raw(
            chunked.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n", 1) + whole + b"0\r\n\r\n"
        )


# ------------------------------------------------------------------------------ clients that go
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tokens", [0, 2])
def test_a_client_that_goes_frees_its_slot(stream, tokens):
    """A plain answer's client, too: a thread per request would compute for nobody until its end."""
    engine = held()
    with live(served_of(engine)) as server:
        with server.connect() as connection:
            connection.sendall(post("/v1/completions", BODY | {"stream": stream, "n": 2}))
            assert engine.wait_until(lambda e: len(e.tickets) == 2)
            if tokens:
                engine.tell(engine.tickets[0], BYTE.encode("ca"), ends=False)
            if tokens and stream:
                assert b"200 OK" in head(connection)
        assert engine.wait_until(lambda e: len(e.cancelled) == 2)
        wait_for(lambda: server.state.num_active == 0)
        # Late events of a cancelled answer harm nobody.
        engine.tell(engine.tickets[0])
        assert server.ask("/health")[0] == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_after_it_sent_a_further_request_frees_its_slot(stream):
    """uvicorn reads no more when a further request comes early, and so it missed the end."""
    engine = held()
    with live(served_of(engine)) as server:
        with server.connect() as connection:
            connection.sendall(post("/v1/completions", BODY | {"stream": stream}))
            assert engine.wait_until(lambda e: e.tickets)
            connection.sendall(post("/tokenize", {"prompt": "a"}))
        assert engine.wait_until(lambda e: e.cancelled)
        # A client that stays gets both answers, in their order.
        with server.connect() as connection:
            connection.sendall(post("/v1/completions", BODY))
            assert engine.wait_until(lambda e: len(e.tickets) == 2)
            connection.sendall(post("/tokenize", {"prompt": "a"}, "Connection: close"))
            engine.tell(engine.tickets[1])
            found = read_all(connection)
    assert found.count(b"HTTP/1.1 200 ") == 2 and found.index(b"cats") < found.index(b"[256,97]")


def test_further_requests_do_not_fill_the_memory():
    engine = held()
    with live(served_of(engine)) as server, server.connect() as connection:
        connection.sendall(post("/v1/completions", BODY))
        assert engine.wait_until(lambda e: e.tickets)

        def send() -> None:
            with contextlib.suppress(OSError):
                connection.sendall(b"x" * (1 << 24))

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        (protocol,) = server.server.server_state.connections
        wait_for(lambda: protocol.flow.read_paused)
        # The last of the reads, of at most 256 KiB each, may have been begun below the limit.
        assert len(protocol.conn.trailing_data[0]) <= MOST_AHEAD_BYTES + (1 << 18)
        engine.tell(engine.tickets[0])
        assert b"200 OK" in head(connection)
        # The rest is no request, and ends the connection.
        sending.join(60)
        assert not sending.is_alive()


def test_a_client_that_goes_while_it_sends_is_no_fault():
    engine = held()
    with live(served_of(engine)) as server:
        request = post("/v1/completions", BODY)
        for end in (10, len(request) - 5):
            with server.connect() as connection:
                connection.sendall(request[:end])
        wait_for(lambda: any("499" in line for line in server.lines))
        assert not engine.tickets and not any("fault" in line for line in server.lines)


def test_a_queued_stream_is_kept_alive_by_comments():
    engine = held()
    with live(served_of(engine), ping_seconds=0.01) as server, server.connect() as connection:
        connection.sendall(post("/v1/completions", BODY | {"stream": True}, "Connection: close"))
        found = head(connection)
        while found.count(b": ping\n\n") < 2:
            found += connection.recv(1 << 16)
        engine.tell(engine.tickets[0])
        assert b"[DONE]" in read_all(connection)


# ------------------------------------------------------------------------------ slow and silent
def test_a_request_that_dribbles_in_is_cut_and_a_stream_lives():
    """uvicorn waits for ever for the rest of a head or a body."""
    engine = held()
    with live(served_of(engine), request_seconds=0.4) as server:
        request = post("/v1/completions", BODY)
        parts = {
            "silent": b"",
            "a part of the head": request[:30],
            "a part of the body": request[:-3],
            "a second request": post("/tokenize", {"prompt": "a"}) + request[:30],
            "a second body": post("/tokenize", {"prompt": "a"}) + request[:-3],
            "a body that is refused": request[:-3].replace(b"application/json", b"text/plain"),
        }
        streaming = server.connect()
        streaming.sendall(post("/v1/completions", BODY | {"stream": True}))
        assert engine.wait_until(lambda e: e.tickets)
        for what, part in parts.items():
            with server.connect() as connection:
                connection.sendall(part)
                found = read_all(connection)
                assert found.count(b"HTTP/1.1") == (
                    what.startswith("a second") or "refused" in what
                )
        # Longer than any deadline, and no data came from its client.
        engine.tell(engine.tickets[0])
        assert b"cats"[:1] in head(streaming) or streaming.recv(1 << 16)
        streaming.close()


def test_the_deadline_runs_again_for_the_next_request_of_a_kept_connection():
    """A timer that is set once, at the connection, lets the second request dribble for ever."""
    with live(request_seconds=0.4) as server, server.connect() as connection:
        connection.sendall(post("/tokenize", {"prompt": "a"}))
        assert b" 200 " in answer_of(connection)
        connection.sendall(post("/tokenize", {"prompt": "a"})[:40])
        assert read_all(connection) == b""


def test_a_kept_connection_answers_again_and_closes_when_idle():
    with live(request_seconds=0.4) as server, server.connect() as connection:
        for _ in range(3):
            connection.sendall(post("/tokenize", {"prompt": "a"}))
            assert b" 200 " in answer_of(connection)
        assert read_all(connection) == b""


@pytest.mark.nightly
def test_a_client_that_does_not_read_is_cut():
    """Its answer would wait in memory, and its slot with it, as long as it likes."""
    engine = FakeEngine(at_once=False)
    with live(served_of(engine, max_new_tokens=10**7), request_seconds=0.4) as server:
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", server.port))
        body = BODY | {"stream": True, "max_tokens": 10**6, "when_full": "slide"}
        connection.sendall(post("/v1/completions", body))
        assert engine.wait_until(lambda e: e.tickets)
        # About 30 MB, which no socket's buffers hold.
        engine.tell(engine.tickets[0], [97] * 100_000, ends=False)
        assert engine.wait_until(lambda e: e.cancelled)
        connection.close()


def test_a_client_that_reads_a_part_and_stops_is_cut_in_time():
    """The time of those who had read a little began again only at its end: it was twice as long."""
    timers: list[tuple] = []
    waiting, cut = 1_000, []
    protocol = object.__new__(protocol_with(8.0))
    protocol.loop = SimpleNamespace(call_later=lambda *timer: timers.append(timer))
    protocol.transport = SimpleNamespace(
        get_write_buffer_size=lambda: waiting, abort=lambda: cut.append(True)
    )
    protocol._watch(waiting)
    waiting, seconds = 500, 0.0
    while not cut:
        delay, check, *arguments = timers.pop()
        seconds += delay
        check(*arguments)
    assert 8.0 <= seconds <= 10.0
    # One that reads a byte in each 8 seconds is not: it may have a bad line.
    cut.clear()
    protocol._watch(waiting)
    for step in range(40):
        delay, check, *arguments = timers.pop()
        waiting -= step % 4 == 0
        check(*arguments)
    assert not cut


def test_what_is_no_http_gets_one_answer_and_no_fault(server, capfd):
    for garbage in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100,
        b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"hello\r\n\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nnot-a-size\r\n",
        b"POST /tokenize HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: text/plain\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with server.connect() as connection:
            connection.sendall(garbage)
            first = connection.recv(1 << 16)
            assert first.startswith(b"HTTP/1.1 4"), garbage[:60]
            if b"text/plain" in garbage:
                # After the refusal, so that its answer has begun.
                connection.sendall(b"not-a-size\r\n")
                read_all(connection)
    assert server.ask("/health")[0] == 200
    assert "Traceback" not in capfd.readouterr().err


# -------------------------------------------------------------------------------- beginning, end
def test_while_it_loads_it_says_so():
    with live(is_loading=True) as server:
        for path, body in (("/health", None), ("/v1/models", None), ("/v1/completions", BODY)):
            status, headers, data = server.ask(path, body)
            assert status == 503 and headers["Retry-After"]
            assert json.loads(data)["error"]["code"] == "loading"
        server.state.is_loading = False
        assert server.ask("/health")[0] == 200


def test_a_server_whose_engine_has_stopped_says_so():
    """A supervisor asks for /health, which said ok while no request could be answered."""
    engine, other = held(), held()
    with live(served_of(engine, "a"), served_of(other, "b")) as server:
        assert server.ask("/health")[0] == 200
        other.is_open = False
        status, headers, data = server.ask("/health")
        assert status == 503 and headers["Retry-After"]
        error = json.loads(data)["error"]
        assert error["code"] == "engine_stopped"
        assert error["message"] == "the engine of b has stopped: restart the server"
        # The other model is answered still.
        assert server.ask("/v1/models")[0] == 200


def test_a_request_to_a_stopped_engine_is_told_so():
    """It was told that the server is shutting down, and to ask again later."""

    class Dead(FakeEngine):
        def submit(self, request, on_event):
            raise EngineClosed("the engine stopped")

    with live(served_of(Dead(), "a"), served_of(name="b")) as server:
        for stream in (False, True):
            body = BODY | {"model": "a", "stream": stream}
            status, headers, data = server.ask("/v1/completions", body)
            error = json.loads(data)["error"]
            assert status == 503 and headers["Retry-After"]
            assert error["code"] == "engine_stopped"
            assert error["message"] == "the engine of a has stopped: restart the server"
        assert server.ask("/v1/completions", BODY | {"model": "b"})[0] == 200


def test_openapi_says_how_many_answers_fit_the_slots_and_the_queue():
    """It said 128 whatever the flags, and larger servers refused what fitted them."""
    for most in (5, 300):
        with live(served_of(most_choices=most, plain_chat=True)) as server:
            paths = server.json("/openapi.json")[1]["paths"]
            for path in ("/v1/completions", "/v1/chat/completions"):
                content = paths[path]["post"]["requestBody"]["content"]["application/json"]
                assert content["schema"]["properties"]["n"]["maximum"] == most
                messages = [{"role": "user", "content": "a"}]
                body = {"prompt": "a", "messages": messages, "max_tokens": 1}
                assert server.ask(path, body | {"n": most})[0] == 200
                status, answer = server.json(path, body | {"n": most + 1})
                assert status == 400 and answer["error"]["param"] == "n"


@pytest.mark.nightly
def test_at_its_end_it_lets_a_slow_client_read_its_whole_answer():
    """A plain answer counted as told when it was handed over, and what its client had not read a
    second after the drain was cut off.
    """
    engine = FakeEngine()
    # More than the buffers of both sides hold.
    engine.line = "x" * (1 << 24)
    with live(served_of(engine)) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        found = head(connection)
        server.end()
        wait_for(lambda: server.state.is_draining)
        assert server.state.num_active == 1
        found += read_all(connection)
    assert len(json.loads(found.partition(b"\r\n\r\n")[2])["data"][0]["batch_invariant_line"]) > 1e7


def test_at_its_end_it_finishes_what_is_there_and_begins_nothing():
    engine = held()
    with live(served_of(engine)) as server:
        results: list = []
        thread = threading.Thread(
            target=lambda: results.append(server.json("/v1/completions", BODY)), daemon=True
        )
        thread.start()
        assert engine.wait_until(lambda e: e.tickets)
        server.end()
        wait_for(lambda: server.state.is_draining)
        for path, body in (("/health", None), ("/v1/completions", BODY)):
            status, headers, data = server.ask(path, body)
            assert status == 503 and json.loads(data)["error"]["type"] == "server_error"
            assert float(headers["Retry-After"]) > 0
        assert not engine.is_closed
        engine.tell(engine.tickets[0])
        thread.join(60)
        assert results[0][0] == 200 and results[0][1]["choices"][0]["text"] == "cats"
        wait_for(lambda: engine.is_closed)


def test_the_drain_has_an_end():
    engine = held()
    with live(served_of(engine), drain_seconds=0.2) as server, server.connect() as connection:
        connection.sendall(post("/v1/completions", BODY))
        assert engine.wait_until(lambda e: e.tickets)
        server.end()
        wait_for(lambda: engine.is_closed)


def test_two_servers_do_not_share_a_port(server):
    from runtime.serving.http_server import listening_socket, url_of

    with pytest.raises(ValueError, match=f"port {server.port} of 127.0.0.1 cannot be used"):
        listening_socket("127.0.0.1", server.port)
    # localhost may be ::1 first; the URL that is printed must work for every client.
    listening = listening_socket("localhost", 0)
    port = listening.getsockname()[1]
    assert url_of(listening) == f"http://127.0.0.1:{port}"
    # A connection that the server closes first leaves the port in TIME_WAIT.
    with socket.create_connection(("127.0.0.1", port)) as client:
        listening.accept()[0].close()
        assert client.recv(1) == b""
    listening.close()
    listening_socket("127.0.0.1", port).close()
    with pytest.raises(ValueError, match="--host no.such.host.invalid"):
        listening_socket("no.such.host.invalid", 0)


def test_a_host_that_no_dns_could_hold_is_refused_by_its_flag():
    """Its error was "encoding with 'idna' codec failed", which names no flag."""
    from runtime.serving.http_server import listening_socket

    for host in ("a" * 70, "a..b"):
        with pytest.raises(ValueError, match="^--host a.* is no address of this machine"):
            listening_socket(host, 0)


def test_the_drain_always_says_what_it_waits_for(capsys):
    """Ctrl-C at an idle server printed nothing."""
    with live(served_of(FakeEngine())):
        pass
    assert capsys.readouterr().out == "drain    requests being answered: 0\n"


def test_a_head_of_many_unknown_names_passes_a_proxy(server):
    """20 names of emoji made a header of 8 KB, and nginx answers 502 to heads above 4 KB."""
    names = {"\U0001f600" * 39 + str(i): 1 for i in range(100)}
    status, headers, _ = server.ask("/v1/completions", BODY | names)
    assert status == 200 and headers["X-Gptoss-Ignored"].startswith("\\U0001f600")
    assert sum(len(name) + len(value) + 4 for name, value in headers.items()) < 2_000


@pytest.mark.parametrize(
    "names", [[" a"], ["a "], [""], ["", "b"], [f"{i:02}{'a' * 36}" for i in range(80)]]
)
def test_blanks_at_the_ends_of_unknown_names_do_not_cost_the_answer(server, names):
    """h11 sends no header that begins or ends with a blank: the client was left without an answer.

    The list of many names was cut after a comma and its blank.
    """
    status, headers, data = server.ask("/v1/completions", BODY | dict.fromkeys(names, 1))
    assert status == 200 and json.loads(data)["choices"]
    assert headers["X-Gptoss-Ignored"] == ", ".join(names)[:1_000].strip()


def test_a_body_with_two_lengths_is_refused(server):
    """h11 reads the chunks; a proxy that reads Content-Length would see another request in them."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    body = "Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    found = server.raw((head + body + "GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n").encode())
    assert found.startswith(b"HTTP/1.1 400 ") and b"not both" in found
    # The connection ends with it.
    assert found.count(b"HTTP/1.1 ") == 1


def test_get_has_no_body_to_read(server):
    assert server.ask("/health", headers=JSON)[0] == 200


def test_a_kept_connection_waits_for_no_acknowledgement():
    """asyncio turned Nagle's algorithm off only where the socket names its protocol, and ours had
    the number 0. The second answer on a connection came 40 ms late: its body waited until the
    client's system had acknowledged its head. One client got half the tokens/s of predict.py.
    """
    from runtime.serving.http_server import listening_socket

    async def delays() -> int:
        accepted: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connection = writer.get_extra_info("socket")
            accepted.set_result(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = listening_socket("127.0.0.1", 0)
        async with await asyncio.start_server(handle, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            try:
                return await accepted
            finally:
                writer.close()

    assert asyncio.run(delays())
