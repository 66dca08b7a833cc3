"""A request while the engine works on it: submitted, followed, cancelled when its client is gone.

The engine's thread calls `_on_event`. There tokens become text, so that a plain answer wakes the
event loop once, at its end, and not for each token.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools

from runtime.serving.answers import Answer, Delta
from runtime.serving.asking import Asking
from runtime.serving.errors import ApiError, refused, try_later
from runtime.serving.metrics import Metrics
from runtime.serving.request import EngineClosed, Event, Finished, QueueFull, Ticket
from runtime.serving.served import Served

# A client that was refused asks again after so long.
RETRY_SECONDS, DRAIN_RETRY_SECONDS = 0.5, 5.0


def draining() -> ApiError:
    return try_later(
        503, "the server is shutting down: ask again later", DRAIN_RETRY_SECONDS, "draining"
    )


def engine_stopped(*names: str) -> ApiError:
    """Return the error of models whose engine's thread has ended. Nothing but a restart helps."""
    return try_later(
        503,
        f"the engine of {', '.join(names)} has stopped: restart the server",
        DRAIN_RETRY_SECONDS,
        "engine_stopped",
    )


class Work:
    """The answers of one request. Made and used on the event loop."""

    def __init__(self, asking: Asking, served: Served, metrics: Metrics):
        self.asking, self.served, self.metrics = asking, served, metrics
        self.loop = asyncio.get_running_loop()
        self.answers = [Answer(asking, job, served.tokenizer) for job in asking.jobs]
        # Of a plain answer, all that has come.
        self.joined = [Delta() for _ in asking.jobs]
        self.tickets: dict[int, Ticket] = {}
        self.open = set(range(len(asking.jobs)))
        self._queue: asyncio.Queue[tuple[int, Delta, bool] | ApiError] = asyncio.Queue()

    def submit(self) -> None:
        """Give all jobs to the engine, or none. Raise ApiError."""
        try:
            for index, job in enumerate(self.asking.jobs):
                on_event = functools.partial(self._on_event, index)
                self.tickets[index] = self.served.engine.submit(job.request, on_event)
        except QueueFull:
            self.cancel()
            raise try_later(
                429, "all slots are taken and the queue is full", RETRY_SECONDS, "queue_full"
            ) from None
        except EngineClosed:
            # Not by the server's end: then nothing is submitted any more.
            self.cancel()
            raise engine_stopped(self.served.name) from None
        except ValueError as error:
            self.cancel()
            raise refused("prompt", str(error)) from None

    def cancel(self) -> None:
        """End what is still open."""
        for index in list(self.open):
            self._close(index)

    def _close(self, index: int) -> None:
        """Take no more of an answer."""
        self.open.discard(index)
        ticket = self.tickets.pop(index, None)
        if ticket is not None:
            self.served.engine.cancel(ticket)

    async def next(self, seconds: float | None = None) -> tuple[int, Delta] | None:
        """Return what comes next: (answer, what is new). None: nothing came in so many seconds.

        Raise ApiError if the engine ends an answer with an error.
        """
        try:
            came = await asyncio.wait_for(self._queue.get(), seconds)
        except TimeoutError:
            return None
        if isinstance(came, ApiError):
            raise came
        index, delta, is_done = came
        if is_done:
            self._close(index)
        return index, delta

    async def whole(self) -> list[Delta]:
        """Return all answers when they are done. Raise ApiError."""
        while self.open:
            await self.next()
        return self.joined

    # ------------------------------------------------------------------ on the engine's thread
    def _on_event(self, index: int, event: Event) -> None:
        answer = self.answers[index]
        if answer.is_done:
            return
        try:
            told = self._told(index, answer, event)
        except Exception as error:
            # A fault of ours must end this request alone, not the engine's thread.
            answer.is_done = True
            told = ApiError(500, f"the answer could not be told: {type(error).__name__}")
        if told is not None:
            # The loop may have ended with the server.
            with contextlib.suppress(RuntimeError):
                self.loop.call_soon_threadsafe(self._queue.put_nowait, told)

    def _told(
        self, index: int, answer: Answer, event: Event
    ) -> tuple[int, Delta, bool] | ApiError | None:
        """Return what the event loop is to hear of an event; None: nothing yet."""
        if isinstance(event, Finished) and event.reason in ("error", "cancelled"):
            answer.is_done = True
            self._count("error" if event.reason == "error" else "abort")
            return ApiError(500, event.message) if event.reason == "error" else draining()
        delta = answer.take(event)
        if answer.is_done:
            self._count(delta.finish_reason or "")
        if self.asking.stream:
            return index, delta, answer.is_done
        joined = self.joined[index]
        joined.text += delta.text
        joined.entries += delta.entries
        joined.finish_reason = delta.finish_reason
        return (index, joined, True) if answer.is_done else None

    def _count(self, reason: str) -> None:
        self.metrics.count(
            "request_success_total", model_name=self.served.name, finished_reason=reason
        )
