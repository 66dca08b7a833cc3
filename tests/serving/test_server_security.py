"""Who may ask: every route of the app, with every wrong key, Host, Origin and Content-Type."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("uvicorn", reason="the server's packages are not installed (extra: serve)")

from runtime.serving.app import OPEN_PATHS, Routes
from tests.builders_server import BYTE, FakeEngine, live, served_of
from tests.children import run as run_child

KEY = b"right-key"
GOOD = {"Authorization": "Bearer right-key"}
ORIGIN = "http://localhost:3000"
# From the app itself: a route that is added later is asked, too.
ROUTES = [
    (method, route.path.replace("{id:path}", "toy"))
    for route in Routes(None).all()
    for method in sorted(route.methods - {"HEAD"})
]
WRONG_KEYS = (
    {},
    {"Authorization": ""},
    {"Authorization": "Bearer"},
    {"Authorization": "Bearer "},
    {"Authorization": "Bearer wrong-key"},
    {"Authorization": "Bearer right-ke"},
    {"Authorization": "Bearer right-key2"},
    {"Authorization": "Bearer RIGHT-KEY"},
    {"Authorization": "Basic right-key"},
    {"Authorization": "right-key"},
    {"Authorization": "Bearer right-key\u00e9"},
    {"X-Api-Key": "right-key"},
)
WRONG_HOSTS = (
    "evil.example",
    "evil.example:8000",
    "127.0.0.1.evil.example",
    "localhost.evil.example",
    "127.0.0.1@evil.example",
    "evil.example@127.0.0.1",
    "127.0.0.2",
    "0.0.0.0",
    "",
    "127.0.0.1, evil.example",
    "127.0.0.1:99999999",
    "localhost:",
    "[::2]",
)
WRONG_ORIGINS = (
    {"Origin": "http://evil.example"},
    {"Origin": "null"},
    {"Origin": ""},
    {"Origin": "http://127.0.0.1"},
    {"Origin": "http://127.0.0.1:1"},
    {"Origin": "http://localhost:3001"},
    {"Origin": "https://localhost:3000"},
    {"Origin": "http://localhost:3000.evil.example"},
    {"Origin": "file://"},
    {"Sec-Fetch-Site": "cross-site"},
    {"Sec-Fetch-Site": "same-site"},
    {"Origin": "http://evil.example", "Sec-Fetch-Site": "same-origin"},
)
WRONG_TYPES = (
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "",
    "application/jsonp",
    "text/json",
    "text/plain; application/json",
)


@pytest.fixture(scope="module")
def server():
    with live(
        served_of(FakeEngine(BYTE.encode("x"))), key=KEY, allow_origin=[ORIGIN], allow_host=["box"]
    ) as running:
        yield running


def ask(server, method: str, path: str, headers: dict[str, str]):
    body = None if method == "GET" else {"prompt": "a", "tokens": [1], "max_tokens": 1}
    return server.ask(path, body, method, headers)


def test_the_routes_are_those_of_the_note():
    assert {path for _, path in ROUTES} >= {"/", "/health", "/metrics", "/v1/completions"}
    assert len(ROUTES) >= 12 and {"/", "/experts", "/health"} == OPEN_PATHS


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_but_the_open_ones_wants_the_key(server, method, path):
    """vLLM's key guards some of its routes only."""
    for wrong in WRONG_KEYS:
        status, headers, data = ask(server, method, path, wrong)
        if path in OPEN_PATHS:
            assert status == 200
            continue
        assert status == 401 and headers["WWW-Authenticate"] == "Bearer", wrong
        error = json.loads(data)["error"]
        assert error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
        assert "right-key" not in data.decode()
    assert ask(server, method, path, GOOD)[0] in (200, 400)
    # A scheme is written in any case.
    assert ask(server, method, path, {"Authorization": "bearer right-key"})[0] in (200, 400)


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_refuses_a_foreign_host(server, method, path):
    """A name of another site that points at 127.0.0.1 (DNS rebinding) must not work."""
    for host in WRONG_HOSTS:
        status, _, data = ask(server, method, path, GOOD | {"Host": host})
        # h11 refuses a few of them itself.
        assert status in (403, 400), host
        assert b"error" in data
    for host in ("localhost", "LOCALHOST:9999", "[::1]:80", "127.0.0.1", "box", "box:8"):
        assert ask(server, method, path, GOOD | {"Host": host})[0] in (200, 400), host
    twice = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nHost: evil.example\r\n\r\n"
    assert server.raw(twice.encode()).startswith((b"HTTP/1.1 403", b"HTTP/1.1 400"))
    none = f"{method} {path} HTTP/1.0\r\nAuthorization: Bearer right-key\r\n\r\n"
    assert server.raw(none.encode()).startswith(b"HTTP/1.1 403")


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_every_route_refuses_a_foreign_origin(server, method, path):
    for wrong in WRONG_ORIGINS:
        status, headers, data = ask(server, method, path, GOOD | wrong)
        assert status == 403, wrong
        assert json.loads(data)["error"]["code"] == "origin_not_allowed"
        assert "Access-Control-Allow-Origin" not in headers
    ours = {"Origin": server.url, "Sec-Fetch-Site": "same-origin"}
    assert ask(server, method, path, GOOD | ours)[0] in (200, 400)
    theirs = {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"}
    status, headers, _ = ask(server, method, path, GOOD | theirs)
    assert status in (200, 400) and headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "Access-Control-Allow-Credentials" not in headers and headers["Vary"] == "Origin"


@pytest.mark.parametrize(("method", "path"), [pair for pair in ROUTES if pair[0] == "POST"])
def test_every_post_wants_json(server, method, path):
    """A page of another site may send text/plain without asking this server first."""
    for kind in WRONG_TYPES:
        assert ask(server, method, path, GOOD | {"Content-Type": kind})[0] == 415, kind
    for kind in ("application/json; charset=utf-8", "APPLICATION/JSON"):
        assert ask(server, method, path, GOOD | {"Content-Type": kind})[0] in (200, 400)
    assert ask(server, method, path, GOOD | {"Content-Encoding": "gzip"})[0] == 415
    assert ask(server, method, path, GOOD | {"Content-Encoding": "identity"})[0] in (200, 400)


def test_a_link_opens_the_page_and_nothing_else(server):
    """A repeatable link is clicked in other places; its sender cannot read what opens."""
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    document = link | {"Sec-Fetch-Dest": "document"}
    assert ask(server, "GET", "/", document)[0] == 200
    for wrong in (link, link | {"Sec-Fetch-Dest": "iframe"}, document | {"Origin": "null"}):
        assert ask(server, "GET", "/", wrong)[0] == 403
    assert ask(server, "GET", "/v1/models", document | GOOD)[0] == 403
    assert ask(server, "GET", "/health", document)[0] == 403


def test_a_preflight_is_answered_to_allowed_origins_alone(server):
    asks = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, content-type,x-stainless-os, b\u00e4d",
    }
    private = {"Access-Control-Request-Private-Network": "true"}
    status, headers, data = server.ask(
        "/v1/completions", None, "OPTIONS", asks | private | {"Origin": ORIGIN}
    )
    assert status == 204 and not data
    assert headers["Access-Control-Allow-Origin"] == ORIGIN
    names = headers["Access-Control-Allow-Headers"]
    assert names == "authorization, content-type, x-stainless-os"
    assert headers["Access-Control-Allow-Methods"] == "GET, POST"
    assert headers["Access-Control-Allow-Private-Network"] == "true"
    for origin in ("http://evil.example", "null", ORIGIN.upper() + "x"):
        status, headers, _ = server.ask("/v1/completions", None, "OPTIONS", {"Origin": origin})
        assert status == 403 and "Access-Control-Allow-Origin" not in headers
    # Without an Origin it is no preflight.
    assert server.ask("/v1/completions", None, "OPTIONS")[0] == 401
    assert server.ask("/v1/completions", None, "OPTIONS", GOOD)[0] == 405


def test_errors_and_unknown_paths_are_guarded_and_have_the_same_headers(server):
    for path in ("/nothing", "/v1/models/x", "/../etc/passwd", "//", "/v1/%2e%2e/x", "/health/"):
        assert server.ask(path)[0] == 401
        status, headers, _ = server.ask(path, headers=GOOD)
        assert status == 404 and headers["X-Content-Type-Options"] == "nosniff"
    status, headers, _ = server.ask("/v1/models/x", headers=GOOD | {"Origin": ORIGIN})
    # So that a page can read what is wrong.
    assert status == 404 and headers["Access-Control-Allow-Origin"] == ORIGIN


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--host", "0.0.0.0"], "there is no key"),
        (["--api_key_file", "/none"], "cannot be read"),
        (["--port", "70000"], "port must be at most 65535"),
        (["--slots", "0"], "slots must be at least 1"),
        (["--allow_origin", "*"], "--allow_origin"),
        (["--ckpt", "default=x.pt"], "default"),
        (["--ckpt", "nothing.pt", "--port", "0"], "nothing.pt"),
        (["--api_key", "secret"], "--api_key"),
    ],
    ids=range(8),
)
def test_a_wrong_flag_ends_with_a_line_before_anything_is_served(flags, says):
    ended = run_child(["-m", "scripts.serve", *flags], timeout=300)
    assert ended.returncode == 2 and says in ended.stderr
    assert ended.stderr.count("\n") == 1 and "Traceback" not in ended.stderr
    assert "serve  " not in ended.stdout
