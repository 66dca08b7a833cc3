"""uvicorn with h11, and what it lacks: deadlines for those who send or read slowly, and a drain.

uvicorn waits for ever for a request that dribbles in (its issue 157), and for a client that does
not read. Here a request must have come `request_seconds` after its connection or, on a kept
connection, after its first byte; and what is written must go out in that time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterator

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from runtime.serving.errors import ApiError
from runtime.serving.json_body import write_json

# Each holds a file; the usual limit of a process is 1,024.
MOST_CONNECTIONS = 512
# Once drained, connections that are kept are closed.
CLOSE_SECONDS = 1
# Of a client that does not read, `request_seconds` are looked at in so many parts.
PARTS = 4
# Of further requests that come before the answer. More stay in the system's buffers.
MOST_AHEAD_BYTES = 65_536
REQUEST_HAS_COME = (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)


class Deadline(H11Protocol):
    """A connection that is cut when a request, or the reading of an answer, takes too long."""

    request_seconds = 10.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._request_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        # So that pause_writing tells of every byte that waits, after the answer's end, too.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
            return
        self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self.resume_writing()
        super().connection_lost(exc)

    # ------------------------------------------------------------------ requests that come slowly
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._keep_reading()
        self._follow()

    def _keep_reading(self) -> None:
        """Read on behind a request that is being answered, because its client's end comes there.

        uvicorn stops reading when a further request comes early, and then a client that goes is
        not noticed: its answer would be computed to its end.
        """
        comes_early = self.conn.their_state is h11.DONE and self.conn.our_state is not h11.DONE
        if comes_early and len(self.conn.trailing_data[0]) <= MOST_AHEAD_BYTES:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._follow()

    def _follow(self) -> None:
        """Run the timer while a part of a request has come, and only then.

        Between two requests of a kept connection uvicorn's own timer runs. Bytes of a second
        request that came with the first start the timer with the second's turn.
        """
        state = self.conn.their_state
        waits = state is h11.IDLE and self.conn.trailing_data[0] == b""
        if state in REQUEST_HAS_COME or (waits and self.cycle is not None):
            self._disarm()
        elif self._request_timer is None and not self.transport.is_closing():
            self._arm()

    def _arm(self) -> None:
        self._request_timer = self.loop.call_later(self.request_seconds, self.transport.abort)

    def _disarm(self) -> None:
        if self._request_timer is not None:
            self._request_timer.cancel()
            self._request_timer = None

    # -------------------------------------------------------------------- clients that do not read
    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _watch(self, waiting: int, idle_parts: int = 0) -> None:
        self._write_timer = self.loop.call_later(
            self.request_seconds / PARTS, self._check, waiting, idle_parts
        )

    def _check(self, before: int, idle_parts: int) -> None:
        """Cut the connection if none of the bytes that waited has gone out for too long."""
        waiting = self.transport.get_write_buffer_size()
        idle_parts = idle_parts + 1 if waiting >= before else 0
        if idle_parts == PARTS:
            self.transport.abort()
        else:
            self._watch(waiting, idle_parts)

    # ------------------------------------------------------------------------ what is no request
    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, if an answer has not begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        body = write_json(ApiError(400, "this is no HTTP request").body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body)))]
        response = h11.Response(
            status_code=400, headers=[*headers, ("connection", "close")], reason="Bad Request"
        )
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


def protocol_with(request_seconds: float) -> type[Deadline]:
    """Return the protocol with this deadline. uvicorn makes one for each connection."""
    return type("Deadline", (Deadline,), {"request_seconds": request_seconds})


# ------------------------------------------------------------------------------------------ socket
def listening_socket(host: str, port: int) -> socket.socket:
    """Return a socket that listens. Raise ValueError if it cannot.

    localhost is 127.0.0.1, which every client tries. Where a connection of an earlier server still
    closes (TIME_WAIT) the port can be used; where another server listens, it cannot.
    """
    host = "127.0.0.1" if host.lower() == "localhost" else host
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        # With the protocol's number: asyncio turns Nagle's algorithm off for that of TCP alone, and
        # with it a kept connection waits 40 ms for each answer that is sent in two parts.
        listening = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        # UnicodeError: a name that DNS could not hold.
        raise ValueError(f"--host {host} is no address of this machine: {error}") from None
    try:
        if os.name == "posix":
            # On Windows this would let two servers share a port.
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(MOST_CONNECTIONS)
    except OSError as error:
        listening.close()
        raise ValueError(
            f"port {port} of {host} cannot be used ({error.strerror}): give another --port, or 0 "
            "for any that is free"
        ) from None
    return listening


def url_of(listening: socket.socket) -> str:
    """Return the URL of a socket on this machine."""
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


# ------------------------------------------------------------------------------------------ server
class Server(uvicorn.Server):
    """Runs until a signal: SIGTERM or Ctrl-C drains, a second one ends it at once.

    begin: awaited once the port answers, to load the models. drain: awaited after the first signal.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        begin: Callable[[], Awaitable[None]],
        drain: Callable[[], Awaitable[None]],
    ):
        super().__init__(config)
        self.begin, self.drain = begin, drain
        self.signal = 0
        self.has_begun = False
        self.failure: BaseException | None = None

    async def main_loop(self) -> None:
        """Wait for a signal. Nothing wakes this meanwhile: an idle server uses no CPU."""
        await self.on_tick(0)
        self.ended = asyncio.Event()
        beginning = asyncio.ensure_future(self._begin())
        with self._signals():
            await self.ended.wait()
            if self.failure is None:
                await self.drain()
        await beginning

    async def _begin(self) -> None:
        try:
            await self.begin()
            self.has_begun = True
        except Exception as error:
            self.failure = error
            self.ended.set()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT)
        before = {}
        for number in numbers:
            try:
                loop.add_signal_handler(number, self._on_signal, number)
            except (NotImplementedError, RuntimeError, ValueError):
                # Windows, or a thread of a test.
                with contextlib.suppress(ValueError):
                    before[number] = signal.signal(number, self._on_signal_elsewhere)
        try:
            yield
        finally:
            for number in numbers:
                if number in before:
                    signal.signal(number, before[number])
                else:
                    with contextlib.suppress(NotImplementedError, RuntimeError, ValueError):
                        loop.remove_signal_handler(number)

    def _on_signal_elsewhere(self, number: int, frame: object) -> None:
        self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        # Loading cannot be interrupted, and a second signal means now.
        if self.signal or not self.has_begun:
            print(f"end      at once: {'a second signal' if self.signal else 'still loading'}")
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + number)
        self.signal = number
        self.ended.set()

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[override]
        """Leave signals alone: main_loop has them."""
        yield


def config_of(app: Callable, request_seconds: float) -> uvicorn.Config:
    """Return uvicorn's settings."""
    # Of its messages, the faults.
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    return uvicorn.Config(
        app,
        http=protocol_with(request_seconds),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        date_header=False,
        timeout_keep_alive=request_seconds,  # type: ignore[arg-type]
        timeout_graceful_shutdown=CLOSE_SECONDS,
    )
