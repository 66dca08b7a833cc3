"""The HTTP side: routes, and the guard that every request passes first.

`Guard` looks at a request's head (runtime/serving/security.py) before anything is read, makes every
error an answer that OpenAI's clients understand, and counts and logs. Routes parse with pure
functions, on another thread, because a long text takes long to encode.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from runtime.serving.asking import Asking
from runtime.serving.chat import ask_chat
from runtime.serving.completions import ask_completion
from runtime.serving.errors import ApiError, try_later
from runtime.serving.json_body import read_object, write_json
from runtime.serving.metrics import CONTENT_TYPE, Metrics
from runtime.serving.openapi import document
from runtime.serving.pages import PATHS, the_page
from runtime.serving.security import (
    HEADERS,
    Head,
    Rules,
    check,
    cors_headers,
    preflight_headers,
)
from runtime.serving.served import Models, Served
from runtime.serving.shapes import Shapes
from runtime.serving.tokens import detokenize, tokenize, tokenizer_info
from runtime.serving.work import DRAIN_RETRY_SECONDS, Work, draining, engine_stopped

# Proxies close a silent connection, and a dead client shows when it is written to.
PING_SECONDS = 15.0
# Of a request whose client was gone, in log lines and metrics: nginx's number.
CLIENT_GONE = 499
# Of the header that lists names which nobody read: proxies refuse heads above 4 KiB (nginx).
MOST_IGNORED_BYTES = 1_000
# Answered while the server loads or shuts down, and without the key.
HEALTH = "/health"
OPEN_PATHS = frozenset({HEALTH, *PATHS})


@dataclass
class State:
    """What all requests share. is_draining: finish what is there, begin nothing."""

    models: Models
    rules: Rules
    version: str
    max_body_bytes: int
    log: Callable[[str], object]
    ping_seconds: float = PING_SECONDS
    is_loading: bool = False
    is_draining: bool = False
    num_active: int = 0

    def __post_init__(self) -> None:
        self.metrics = Metrics()
        self.rules = replace(self.rules, open_paths=OPEN_PATHS, pages=frozenset(PATHS))
        self.idle = asyncio.Event()

    def refusal(self) -> ApiError | None:
        """Return why nothing is answered now; None: requests are answered."""
        if self.is_draining:
            return draining()
        if self.is_loading:
            return try_later(503, "the server is loading", DRAIN_RETRY_SECONDS, "loading")
        return None


# ---------------------------------------------------------------------------------------- routes
class Routes:
    """The routes' functions. They raise ApiError; the guard answers with it."""

    def __init__(self, state: State):
        self.state = state

    def all(self) -> list[Route]:
        return [
            *(Route(path, self.page, methods=["GET"]) for path in PATHS),
            Route(HEALTH, self.health, methods=["GET"]),
            Route("/openapi.json", self.openapi, methods=["GET"]),
            Route("/metrics", self.metrics, methods=["GET"]),
            Route("/v1/models", self.models, methods=["GET"]),
            Route("/v1/models/{id:path}", self.model, methods=["GET"]),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
            Route("/tokenize", self.tokenize, methods=["POST"]),
            Route("/detokenize", self.detokenize, methods=["POST"]),
            Route("/tokenizer_info", self.tokenizer_info, methods=["GET"]),
        ]

    async def page(self, request: Request) -> Response:
        page = the_page()
        return Response(page.text, media_type="text/html", headers=page.headers)

    async def health(self, request: Request) -> Response:
        refusal = self.state.refusal()
        if refusal is not None:
            raise refusal
        models = self.state.models.by_name.items()
        if stopped := [name for name, one in models if not one.engine.is_open]:
            # A supervisor that asks for this restarts the server.
            raise engine_stopped(*stopped)
        return _json({"status": "ok"})

    async def openapi(self, request: Request) -> Response:
        most = max(one.limits.most_choices for one in self.state.models.by_name.values())
        return _json(document(self.state.version, bool(self.state.rules.key), most))

    async def metrics(self, request: Request) -> Response:
        engines = {
            name: (one.engine.statistics, one.engine.gauges())
            for name, one in self.state.models.by_name.items()
        }
        text = self.state.metrics.text(engines)
        return Response(text, headers={"Content-Type": CONTENT_TYPE})

    async def models(self, request: Request) -> Response:
        cards = [one.card() for one in self.state.models.by_name.values()]
        return _json({"object": "list", "data": cards})

    async def model(self, request: Request) -> Response:
        return _json(self.state.models.pick(request.path_params["id"]).card())

    async def completions(self, request: Request) -> Response:
        return await self._answered(request, ask_completion)

    async def chat(self, request: Request) -> Response:
        return await self._answered(request, ask_chat)

    async def tokenize(self, request: Request) -> Response:
        _, (answer, unknown) = await self._parsed(request, tokenize)
        return _json(answer, _ignored(unknown))

    async def detokenize(self, request: Request) -> Response:
        _, (answer, unknown) = await self._parsed(request, detokenize)
        return _json(answer, _ignored(unknown))

    async def tokenizer_info(self, request: Request) -> Response:
        served = self.state.models.pick(request.query_params.get("model"))
        return _json(tokenizer_info(served))

    async def _parsed(self, request: Request, parse: Callable) -> tuple[Served, Any]:
        """Return the model that a body names, and what `parse` makes of both."""
        body = await read_body(request, self.state.max_body_bytes)

        def parsed() -> tuple[Served, Any]:
            given = read_object(body)
            served = self.state.models.pick(given.get("model"))
            return served, parse(given, served)

        return await asyncio.to_thread(parsed)

    async def _answered(self, request: Request, parse: Callable) -> Response:
        served, asking = await self._parsed(request, parse)
        # It may have begun to drain since the guard looked.
        if self.state.is_draining:
            raise draining()
        work, shapes = Work(asking, served, self.state.metrics), Shapes(asking, served)
        work.submit()
        headers = _ignored(asking.unknown)
        if asking.stream:
            events = stream(work, shapes, asking, self.state.ping_seconds)
            return EventStream(events, work, headers)
        try:
            deltas = await while_there(request, work.whole())
        finally:
            work.cancel()
        return _json(shapes.whole(work.answers, deltas), headers)


def _json(value: object, headers: dict[str, str] | None = None) -> Response:
    return Response(write_json(value), media_type="application/json", headers=headers)


def _ignored(unknown: Iterable[str]) -> dict[str, str]:
    """Return the header that lists names which nobody read, in ASCII."""
    names = [ascii(name[:40])[1:-1].replace(",", " ") for name in unknown]
    # No header may begin or end with a blank: h11 ends the connection instead of sending it.
    text = ", ".join(names)[:MOST_IGNORED_BYTES].strip()
    return {"X-Gptoss-Ignored": text} if names else {}


async def read_body(request: Request, most: int) -> bytes:
    """Return a body. Raise ApiError 413 as soon as more has come, whatever its head said."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > most:
            raise too_large(most)
    return bytes(data)


def too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most:,} bytes", code="body_too_large")


async def while_there(request: Request, work: Any) -> Any:
    """Return what `work` returns. Raise ClientDisconnect when the client goes before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect()
    finally:
        for one in (task, gone):
            one.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---------------------------------------------------------------------------------------- streams
class EventStream(StreamingResponse):
    """Server-sent events, which nobody between may hold back; without a client they are cancelled.

    Where the client goes before the first event, the generator never starts: hence the `finally`.
    """

    def __init__(self, events: AsyncIterator[bytes], work: Work, headers: dict[str, str]):
        headers = {"X-Accel-Buffering": "no"} | headers
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self.work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.work.cancel()


async def stream(
    work: Work, shapes: Shapes, asking: Asking, ping_seconds: float
) -> AsyncIterator[bytes]:
    """Yield the events of a streamed answer."""
    begun: set[int] = set()
    tells_tokens = asking.top is not None or asking.experts or asking.token_ids
    try:
        while work.open:
            came = await work.next(ping_seconds)
            if came is None:
                yield b": ping\n\n"
                continue
            index, delta = came
            is_first = shapes.is_chat and index not in begun
            begun.add(index)
            if is_first or delta.text or delta.finish_reason or (delta.entries and tells_tokens):
                yield _event(shapes.chunk(index, delta, is_first))
        if asking.include_usage:
            yield _event(shapes.last_chunk(work.answers))
        yield b"data: [DONE]\n\n"
    except ApiError as error:
        # The status has been sent: clients take an event with an error for one.
        yield _event(error.body())


def _event(value: object) -> bytes:
    return b"data: " + write_json(value) + b"\n\n"


# ------------------------------------------------------------------------------------------ guard
class Guard:
    """Checks each request before its route sees it; answers errors; counts and logs."""

    def __init__(self, app: ASGIApp, state: State, known: list[Route]):
        self.app, self.state = app, state
        self.known: dict[Any, str] = {route.endpoint: route.path for route in known}
        # As they are typed: {id:path} is starlette's.
        self.paths = sorted({route.path.replace(":path}", "}") for route in known})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        head = Head(scope["method"], scope["path"], scope["headers"])
        reply = Reply(send, HEADERS | cors_headers(head, self.state.rules))
        started = time.perf_counter()
        self.state.num_active += 1
        try:
            await self._answer(head, scope, receive, reply)
        finally:
            self.state.num_active -= 1
            if not self.state.num_active:
                self.state.idle.set()
            self._note(head, scope, reply.status, time.perf_counter() - started)

    async def _answer(self, head: Head, scope: Scope, receive: Receive, reply: Reply) -> None:
        try:
            check(head, self.state.rules)
            if head.method == "OPTIONS" and head.values("origin"):
                headers = preflight_headers(head, self.state.rules)
                await Response(status_code=204, headers=headers)(scope, receive, reply)
                return
            check_length(head, self.state.max_body_bytes)
            refusal = self.state.refusal()
            if refusal is not None and head.path not in OPEN_PATHS | {"/metrics"}:
                raise refusal
            # So the router raises its 404 and 405; and it notes the route here.
            scope["app"] = self
            await self.app(scope, receive, reply)
        except ClientDisconnect:
            reply.status = CLIENT_GONE
        except ApiError as error:
            await self._tell(error, scope, receive, reply)
        except HTTPException as error:
            await self._tell(self._of_http(error), scope, receive, reply)
        except Exception as error:
            self.state.log(f"fault    {type(error).__name__} in {self._route(scope)}")
            await self._tell(ApiError(500, "a fault of the server's"), scope, receive, reply)

    def _of_http(self, error: HTTPException) -> ApiError:
        """Return starlette's own errors in our form."""
        if error.status_code == 404:
            return ApiError(
                404, f"there is no such route; there are {', '.join(self.paths)}", code="not_found"
            )
        if error.status_code == 405:
            # starlette writes a set, in any order.
            methods = ", ".join(sorted((error.headers or {}).get("Allow", "").split(", ")))
            return ApiError(
                405,
                f"this route is for {methods} alone",
                code="method_not_allowed",
                headers={"Allow": methods},
            )
        return ApiError(error.status_code, str(error.detail), headers=error.headers)

    async def _tell(self, error: ApiError, scope: Scope, receive: Receive, reply: Reply) -> None:
        # With a part of an answer out, the connection is closed by its end.
        if not reply.has_begun:
            response = Response(
                write_json(error.body()), error.status, error.headers, "application/json"
            )
            await response(scope, receive, reply)

    def _route(self, scope: Scope) -> str:
        """Return the route's own path: what a client wrote there may be anything."""
        return self.known.get(scope.get("endpoint"), "unknown")

    def _note(self, head: Head, scope: Scope, status: int, seconds: float) -> None:
        route = self._route(scope)
        # A closed set: a method may be any word.
        method = head.method if head.method in ("GET", "HEAD", "POST", "OPTIONS") else "other"
        labels = {"method": method, "route": route, "status": str(status)}
        self.state.metrics.count("http_requests_total", **labels)
        if route not in (HEALTH, "/metrics") or status != 200:
            self.state.log(f"request  {method} {route} {status} {1000 * seconds:.0f} ms")


class Reply:
    """`send` with headers of our own, that knows what it has sent."""

    def __init__(self, send: Send, headers: dict[str, str]):
        self.send, self.headers = send, headers
        self.has_begun, self.status = False, CLIENT_GONE

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.has_begun, self.status = True, message["status"]
            headers = MutableHeaders(scope=message)
            for name, value in self.headers.items():
                headers.setdefault(name, value)
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            # uvicorn waits before a part until the one before is out, but not after the last. So
            # the last is empty: a server that ends waits until a slow reader has all.
            await self.send({**message, "more_body": True})
            message = {"type": "http.response.body", "body": b"", "more_body": False}
        await self.send(message)


def check_length(head: Head, most: int) -> None:
    """Raise ApiError 413 for a body that says that it is too large, before it is read.

    And 400 for one with two lengths: a proxy may take the other one, and smuggle a request in.
    """
    if head.values("content-length") and head.values("transfer-encoding"):
        raise ApiError(
            400,
            "give either Content-Length or Transfer-Encoding, not both",
            headers={"Connection": "close"},
        )
    with contextlib.suppress(ValueError):
        if any(int(value) > most for value in head.values("content-length")):
            raise too_large(most)


def make_app(state: State) -> Guard:
    """Return the ASGI application."""
    routes = Routes(state).all()
    # A Router, not a Starlette: that one answers faults itself, in plain text.
    return Guard(Router(routes, redirect_slashes=False), state, routes)
