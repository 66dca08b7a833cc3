"""Answer many requests at a time: continuous batching over one Decoder. No HTTP here.

`Engine.submit` puts a request into a queue, and events come back (runtime/serving/request.py). One
thread owns the decoder. Each of its turns admits requests into free slots, in their order, and
reads one mixed pass: the next token of every text that is being answered, and chunks of the prompts
of others. So no long prompt stalls the others, and each weight is read once for all.

What is promised:

* With the C kernel (`is_exact`) an answer has the same bits alone and in any company, whenever and
  however its prompt is read, with log-probabilities and experts. Its tokens are those of predict.py
  with the same seed and settings. Elsewhere that holds up to the rounding of logits, as `line`
  says.
* Nothing hangs: each request ends with one Finished event, whatever fails. Logits that are not
  finite end their own request alone.
* An idle engine waits and computes nothing. Memory does not grow with the number of requests.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence

import numpy as np
import torch

from model import LLM
from runtime.base.text import visible
from runtime.inference.decoder import Decoder
from runtime.serving.answer import Answer, PartRows
from runtime.serving.readers import Part, Reading, reader_of
from runtime.serving.request import (
    EngineClosed,
    Event,
    Finished,
    OnEvent,
    QueueFull,
    Request,
    RequestRefused,
    Ticket,
    Token,
)
from runtime.serving.slots import Slot, Slots, share_chunk
from runtime.serving.statistics import Gauges, Statistics

NOT_FINITE = (
    "the model's logits are not finite: its weights are damaged, or too large for its dtype"
)
CLOSED, STOPPED = "the server is shutting down", "the engine stopped"


class Engine:
    """A model that answers many requests at a time.

    source: a finished plain model, or a Decoder that has one, which is the engine's from now on.
    slots: requests that are answered at a time. max_waiting: requests that wait for a slot.
    prefill_chunk: tokens of prompts in one pass. banned_ids: never drawn (Predictor.banned_ids).
    Raise ValueError if the slots do not fit the memory.
    """

    def __init__(
        self,
        source: LLM | Decoder,
        slots: int = 8,
        max_waiting: int = 64,
        prefill_chunk: int = 128,
        banned_ids: Sequence[int] = (),
    ):
        for name, value, least in (
            ("slots", slots, 1),
            ("max_waiting", max_waiting, 0),
            ("prefill_chunk", prefill_chunk, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.decoder = source if isinstance(source, Decoder) else Decoder(source)
        self.config, self.device = self.decoder.config, self.decoder.device
        self.max_waiting, self.prefill_chunk = max_waiting, prefill_chunk
        self.banned_ids = tuple(banned_ids)
        self._banned = frozenset(banned_ids)
        self._slots = Slots(self.decoder, slots)
        self._reader = reader_of(self.decoder)
        # By slot: each answer's own chance.
        self._generators: list[torch.Generator] = [torch.Generator(self.device)] * slots
        self.statistics = Statistics(
            expert_tokens_LE=np.zeros(
                (self.config.transformer_blocks, self.config.num_experts), np.int64
            )
        )
        self._numbers = itertools.count()
        # What other threads touch: only with this lock.
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._tickets: set[Ticket] = set()
        # Requests whose last event has not been delivered.
        self._num_unsent = 0
        self._has_cancelled = self._is_draining = self._is_closing = False
        # By a fault, not by `close`.
        self._has_stopped = False
        self._has_begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        # Before another engine draws, or a model is compared (base/device.py: one_thread).
        self._has_begun.wait()

    # -------------------------------------------------------------------------- for other threads
    @property
    def is_exact(self) -> bool:
        """Return whether an answer has the same bits in whatever company."""
        return self._reader.is_exact

    @property
    def line(self) -> str:
        """Return in a line what reads, and what that means for the last digits."""
        return self._reader.line

    @property
    def memory_line(self) -> str:
        """Return in a line what the slots take of the memory."""
        return self._slots.line

    @property
    def context(self) -> int:
        """Return the tokens of prompt and answer that fit a slot."""
        return self.config.context_length

    @property
    def is_open(self) -> bool:
        """Return whether requests are taken."""
        return not self._is_draining and self._thread.is_alive()

    def check(self, request: Request) -> None:
        """Raise RequestRefused, with a line, for a request that this model cannot honour."""
        V, sampling = self.config.vocabulary_size, request.sampling
        for name, ids in (("prompt", request.ids), ("stop_ids", sampling.stop_ids)):
            if ids and not 0 <= min(ids) <= max(ids) < V:
                wrong = next(i for i in ids if not 0 <= i < V)
                raise RequestRefused(f"{name}: token ids must be from 0 to {V - 1}, not {wrong}")
        if len(request.ids) <= self.context:
            return
        long = f"the prompt has {len(request.ids)} tokens and the context {self.context}"
        if sampling.when_full == "stop":
            raise RequestRefused(f"{long}: shorten it, or use when_full slide to read its end")
        if request.prompt_logprobs:
            raise RequestRefused(f"{long}: log-probabilities are for prompts that fit")

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Put a request into the queue; on_event is called on the engine's thread.

        Raise RequestRefused, QueueFull, or EngineClosed.
        """
        self.check(request)
        ticket = Ticket(request, on_event)
        with self._changed:
            if not self.is_open:
                raise EngineClosed(STOPPED if self._has_stopped else CLOSED)
            if len(self._tickets) >= len(self._slots.all) + self.max_waiting:
                self.statistics.num_refused_full += 1
                raise QueueFull(
                    f"{len(self._slots.all)} requests are being answered and {self.max_waiting} "
                    "wait: try again later"
                )
            self._tickets.add(ticket)
            self._num_unsent += 1
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """End a request, at any stage; its slot is free after the pass that is being read.

        It still gets Finished. One that has ended already is left as it is.
        """
        with self._changed:
            ticket.is_cancelled = self._has_cancelled = True
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait for those that are there; return whether all ended."""
        with self._changed:
            self._is_draining = True
            return self._changed.wait_for(lambda: not self._num_unsent, seconds)

    def close(self) -> None:
        """End all requests as cancelled, and the engine's thread."""
        with self._changed:
            self._is_draining = self._is_closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def gauges(self) -> Gauges:
        """Return what the engine holds now."""
        # A slot may change hands while this reads: the numbers are for a graph.
        running = [slot for slot in self._slots.all if slot.answer is not None]
        return Gauges(
            num_running=len(running),
            num_waiting=len(self._waiting),
            num_slots=len(self._slots.all),
            num_cached_tokens=sum(slot.text.cache.length for slot in running),
            most_cached_tokens=len(self._slots.all) * self.context,
        )

    # ------------------------------------------------------------------------- the engine's thread
    @torch.inference_mode()
    def _run(self) -> None:
        torch.get_num_threads()
        self._has_begun.set()
        try:
            while self._wait():
                try:
                    self._turn()
                except Exception as error:
                    traceback.print_exc()
                    self.statistics.num_failures += 1
                    self._end_failed(Finished("error", f"the engine failed: {_said(error)}"))
                    self.decoder.forget()
        finally:
            with self._changed:
                self._is_draining, self._has_stopped = True, not self._is_closing
            closed = Finished("cancelled", CLOSED)
            self._end_all(Finished("error", STOPPED) if self._has_stopped else closed)

    def _wait(self) -> bool:
        """Wait until there is something to do; return whether the engine continues."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._tickets)
            return not self._is_closing

    def _turn(self) -> None:
        """End what was cancelled, admit what waits, read one pass, and draw."""
        self._end_cancelled()
        # Before a slot whose text is waited for gets another prompt.
        self._slots.end_waits()
        self._admit()
        parts = self._plan()
        if not parts:
            return
        reading = self._reader.read([part for _, part in parts])
        self.statistics.num_passes += 1
        if reading.experts_LNK is not None:
            self.statistics.count_experts(reading.experts_LNK)
        self._draw(self._taken(parts, reading), reading)

    def _end_cancelled(self) -> None:
        with self._changed:
            if not self._has_cancelled:
                return
            self._has_cancelled = False
            waiting = [ticket for ticket in self._waiting if ticket.is_cancelled]
            for ticket in waiting:
                self._waiting.remove(ticket)
        for ticket in waiting:
            self._end(ticket, Finished("cancelled"))
        for slot in self._slots.running:
            if slot.answer is not None and slot.answer.ticket.is_cancelled:
                self._finish(slot, Finished("cancelled"))

    def _admit(self) -> None:
        """Give free slots to the requests that wait, first come, first served."""
        while self._slots.free:
            with self._changed:
                if not self._waiting:
                    return
                ticket = self._waiting.popleft()
            slot = self._slots.take(ticket, next(self._numbers))
            answer = slot.answer
            assert answer is not None
            self._generators[slot.number] = answer.generator(self.device)
            answer.prepare_drawing(self.banned_ids, self._generators, self.device)
            self.statistics.queue_seconds.add(time.monotonic() - ticket.submitted_s)

    def _plan(self) -> list[tuple[Slot, Part]]:
        """Return what the next pass reads: a token of each text, and chunks of prompts."""
        reading: list[tuple[Slot, Answer]] = []
        counts: dict[int, int] = {}
        for slot in self._slots.running:
            answer = slot.answer
            assert answer is not None
            if answer.slides():
                self._slots.cut(slot, 0)
            if answer.wait is not None:
                continue
            if answer.unread == 1:
                counts[slot.number] = 1
            else:
                reading.append((slot, answer))
        shares = share_chunk([answer.unread for _, answer in reading], self.prefill_chunk)
        counts |= {slot.number: n for (slot, _), n in zip(reading, shares, strict=True) if n}
        return [
            (slot, slot.answer.part(counts[slot.number]))
            for slot in self._slots.running
            if slot.answer is not None and slot.number in counts
        ]

    def _taken(
        self, parts: list[tuple[Slot, Part]], reading: Reading
    ) -> list[tuple[Slot, PartRows]]:
        """Take what a pass has read; return the slots that draw now."""
        ready, row, token = [], 0, 0
        for slot, part in parts:
            rows = PartRows(part, reading, row, token, self._banned)
            row, token = row + len(part.rows), token + part.count
            answer = slot.answer
            assert answer is not None
            if not answer.keep_prompt_scores(rows):
                self._spoil(slot)
                continue
            if answer.unread:
                continue
            if answer.pending is not None:
                pending, answer.pending = answer.pending, None
                experts = rows.experts(part.count - 1)
                self._send_token(answer, dataclasses.replace(pending, experts=experts))
            if not answer.has_started:
                self.statistics.num_prompt_tokens += answer.num_prompt
                self.statistics.num_reused_tokens += answer.num_reused
                self._send(answer.ticket, answer.started())
            if answer.end is not None:
                self._finish(slot, answer.end)
            else:
                ready.append((slot, rows))
        return ready

    def _draw(self, ready: list[tuple[Slot, PartRows]], reading: Reading) -> None:
        """Draw a token for each of some slots; those with the same settings together."""
        groups: dict[tuple, list[tuple[Slot, PartRows]]] = {}
        for slot, rows in ready:
            assert slot.answer is not None
            groups.setdefault(slot.answer.draws_like, []).append((slot, rows))
        ids = [[] if slot.answer is None else slot.answer.ids for slot in self._slots.all]
        for group in groups.values():
            first = group[0][0].answer
            assert first is not None
            logits_BV = reading.logits_RV[[rows.last_row for _, rows in group]]
            drawn_B, _ = first.drawing([slot.number for slot, _ in group], ids, logits_BV)
            for (slot, rows), token in zip(group, drawn_B.tolist(), strict=True):
                if token < 0:
                    self._spoil(slot)
                else:
                    self._take(slot, rows, token)

    def _take(self, slot: Slot, rows: PartRows, token: int) -> None:
        """Append a drawn token, send it or keep it until its experts are known, or end."""
        answer = slot.answer
        assert answer is not None
        self.statistics.num_generated_tokens += 1
        answer.take(token)
        event = Token(token)
        if answer.request.logprobs is not None:
            last = len(rows.part.rows) - 1
            top = rows.top(last, answer.request.logprobs)
            event = Token(token, rows.log_prob(last, token), top)
        if answer.reads_drawn:
            answer.pending = event
            return
        self._send_token(answer, event)
        if answer.end is not None:
            self._finish(slot, answer.end)

    # --------------------------------------------------------------------------- events and ends
    def _send_token(self, answer: Answer, token: Token) -> None:
        now, ticket = time.monotonic(), answer.ticket
        if ticket.last_token_s is None:
            self.statistics.time_to_first_token_seconds.add(now - ticket.submitted_s)
        else:
            self.statistics.inter_token_latency_seconds.add(now - ticket.last_token_s)
        ticket.last_token_s = now
        self._send(ticket, token)

    def _send(self, ticket: Ticket, event: Event) -> None:
        """Deliver an event. A caller that cannot take it loses its own request, and no other."""
        try:
            ticket.on_event(event)
        except Exception as error:
            if not ticket.is_cancelled:
                self.statistics.num_failures += 1
                print(f"an event could not be delivered: {_said(error)}", file=sys.stderr)
                self.cancel(ticket)

    def _spoil(self, slot: Slot) -> None:
        """End an answer whose logits are not finite, and zero its slot."""
        self._slots.clear(slot)
        self._finish(slot, Finished("error", NOT_FINITE))

    def _finish(self, slot: Slot, finished: Finished) -> None:
        """Free a slot, and end its answer."""
        assert slot.answer is not None
        ticket, slot.answer.is_over = slot.answer.ticket, True
        self._slots.release(slot)
        self._end(ticket, finished)

    def _end(self, ticket: Ticket, finished: Finished) -> None:
        """Deliver a request's last event."""
        with self._changed:
            # First: who gets the event may submit the next one.
            self._tickets.discard(ticket)
        self.statistics.finished[finished.reason] += 1
        self.statistics.request_seconds.add(time.monotonic() - ticket.submitted_s)
        ticket.is_done = True
        try:
            self._send(ticket, finished)
        finally:
            with self._changed:
                self._num_unsent -= 1
                self._changed.notify_all()

    def _end_failed(self, finished: Finished) -> None:
        """End the requests of a turn that failed. Those that wait are not of it, and stay.

        If there are no others it was theirs: else the next turn would fail again, and so on.
        """
        running = self._slots.running
        with self._changed:
            # Also one that was on its way to a slot.
            ended = self._tickets.difference(self._waiting)
            if not ended:
                ended = set(self._waiting)
                self._waiting.clear()
        for slot in running:
            assert slot.answer is not None
            ended.discard(slot.answer.ticket)
            self._finish(slot, finished)
        for ticket in ended:
            self._end(ticket, finished)

    def _end_all(self, finished: Finished) -> None:
        """End all requests, those that wait, too."""
        with self._changed:
            self._waiting.clear()
            count = len(self._tickets)
        # A callback that raises what ends a thread must not keep the others from their ends.
        for _ in range(count):
            try:
                self._end_failed(finished)
                break
            except BaseException:
                traceback.print_exc()


def _said(error: BaseException) -> str:
    """Return an error in a line."""
    return f"{type(error).__name__}: {visible(' '.join(str(error).split())[:300])}"
