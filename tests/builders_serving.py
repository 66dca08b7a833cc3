"""Requests, and an engine that reads one pass at a time, for tests of serving."""

from __future__ import annotations

import contextlib
import dataclasses
import random
import threading
from collections.abc import Callable, Iterator, Sequence

import torch

from model import LLM
from model import generate as plain_generate
from runtime.inference.decoder import Decoder
from runtime.inference.quantize import quantize_
from runtime.serving.engine import Engine
from runtime.serving.request import (
    Event,
    Finished,
    PromptScores,
    Request,
    Sampling,
    Started,
    Token,
)
from tests.builders import random_model, tiny_config

CONTEXT = 48
# What the C kernel does in a loop of its own; widths around the 8 or 16 lanes of a vector.
MODELS = {
    "SwiGLU": dict(d_ff=72),
    "GELU with biases": dict(
        d_ff=40, expert_activation="gelu", expert_bias=True, qkv_bias=True, head_bias=True
    ),
    "sinks and windows": dict(
        d_ff=72,
        expert_activation="swiglu_clamped",
        expert_bias=True,
        attention_sinks=True,
        router_bias=True,
        sliding_window=11,
        window_pattern="alternating",
    ),
    "odd sizes": dict(d_model=60, d_ff=44, head_dim=22, num_heads=4),
    "a learned bias": dict(d_ff=40, use_attention_bias=True, use_rope=False),
}
# A request that fails a test rather than hold it up.
PATIENCE_SECONDS = 300


def model_of(name: str = "SwiGLU", packed: str = "", **changes) -> LLM:
    config = tiny_config(context_length=CONTEXT, **MODELS[name] | changes)
    model = random_model(config, 5).eval()
    return quantize_(model, packed) if packed else model


class Client:
    """Collects what a request is answered."""

    def __init__(self, engine: Engine, request: Request, then: Callable[[Event], object] = id):
        self.events: list[Event] = []
        self._then, self._done = then, threading.Event()
        self.ticket = engine.submit(request, self._take)

    def _take(self, event: Event) -> None:
        assert not self._done.is_set(), "an event after the last"
        self.events.append(event)
        try:
            self._then(event)
        finally:
            if isinstance(event, Finished):
                self._done.set()

    def wait(self) -> list[Event]:
        assert self._done.wait(PATIENCE_SECONDS), f"no end after {self.events[-1:]}"
        return self.events

    @property
    def ids(self) -> list[int]:
        return [event.id for event in self.wait() if isinstance(event, Token)]

    @property
    def end(self) -> Finished:
        last = self.wait()[-1]
        assert isinstance(last, Finished)
        return last

    @property
    def reused(self) -> int:
        started = self.wait()[0]
        assert isinstance(started, Started)
        return started.num_reused_tokens

    @property
    def scores(self) -> PromptScores:
        started = self.wait()[0]
        assert isinstance(started, Started) and started.scores is not None
        return started.scores


def engine_of(model: LLM, native: bool = True, **settings):
    return engine_of_decoder(Decoder(model, native=native), **settings)


@contextlib.contextmanager
def engine_of_decoder(decoder: Decoder, **settings) -> Iterator[Engine]:
    engine = Engine(decoder, **settings)
    try:
        yield engine
    finally:
        engine.close()


class Stepped:
    """Lets an engine read one pass at a time. `read`: what to do in a pass; the engine's own."""

    def __init__(self, engine: Engine):
        self.engine, self.read = engine, engine._reader.read
        self._allowed, self._done = threading.Semaphore(0), threading.Semaphore(0)
        # Of each pass: the tokens read of each text.
        self.counts: list[list[int]] = []
        engine._reader.read = self._read  # type: ignore[method-assign]

    def _read(self, parts):
        assert self._allowed.acquire(timeout=PATIENCE_SECONDS)
        self.counts.append([part.count for part in parts])
        try:
            return self.read(parts)
        finally:
            self._done.release()

    def passes(self, count: int = 1) -> None:
        """Read so many passes; the last one's tokens may not be drawn yet."""
        for _ in range(count):
            self._allowed.release()
            assert self._done.acquire(timeout=PATIENCE_SECONDS)

    def free(self) -> None:
        """Let the engine read what it wants."""
        self._allowed.release(1_000_000)


def request_of(ids, max_new_tokens: int = 6, **more) -> Request:
    """Return a request; settings of drawing and fields of Request may be given."""
    own = {f.name for f in dataclasses.fields(Request)}
    sampling = {key: more.pop(key) for key in list(more) if key not in own}
    return Request(tuple(ids), Sampling(max_new_tokens=max_new_tokens, **sampling), **more)


def random_request(r: random.Random, V: int, context: int) -> Request:
    """Return a request with random settings; many prompts share a beginning."""
    start = [(7 * i + r.choice((1, 2))) % V for i in range(r.choice((0, 10, 25)))]
    start = start[:1] + [(start[0] + 3 * i) % V for i in range(1, len(start))]
    ids = start + [r.randrange(V) for _ in range(r.randint(1, context // 3))]
    scored = r.random() < 0.3
    return request_of(
        ids,
        r.choice((1, 3, 8, 20, context)),
        temperature=r.choice((0.0, 0.7, 1.0, 1.5)),
        top_k=r.choice((0, 5, 50)),
        top_p=r.choice((0.8, 1.0)),
        min_p=r.choice((0.0, 0.05)),
        repetition_penalty=r.choice((1.0, 1.0, 1.3)),
        seed=r.randrange(2**31),
        stop_ids=tuple(r.sample(range(V), r.choice((0, 1, 3)))),
        when_full=r.choice(("stop", "slide")),
        logprobs=r.choice((None, 0, 3)),
        prompt_logprobs=scored,
        experts=r.random() < 0.4,
    )


def comparable(events: list[Event]) -> list[Event]:
    """Return events without what may depend on the company: the tokens that were reused."""
    return [
        dataclasses.replace(event, num_reused_tokens=0) if isinstance(event, Started) else event
        for event in events
    ]


def answers_alone(engine: Engine, requests: list[Request]) -> list[list[Event]]:
    """Return what requests are answered one after the other, with nothing reused."""
    answers = []
    for request in requests:
        answers.append(comparable(Client(engine, request).wait()))
        for slot in engine._slots.all:
            engine._slots.clear(slot)
    return answers


def answers_in_company(
    engine: Engine,
    requests: list[Request],
    r: random.Random,
    clients: int = 3,
    victims: Sequence[int] = (),
) -> list[list[Event]]:
    """Return what requests are answered together, at least so many at a time.

    Each last event brings the next one, and any event may bring more. victims: numbers of requests
    that are cancelled sooner or later, if they have not ended by then.
    """
    asked: dict[int, Client] = {}
    left = list(range(len(requests)))
    r.shuffle(left)
    all_in = threading.Event()

    def more(event: Event | None = None) -> None:
        if victims and r.random() < 0.3:
            victim = asked.get(r.choice(victims))
            if victim is not None:
                engine.cancel(victim.ticket)
        # One of them always comes when another ends.
        least = 1 if isinstance(event, Finished) else 0
        for _ in range(r.choice((least, least, least, least, 1, 2))):
            if left:
                # The list before the request: this is called from its own events, too.
                i = left.pop()
                asked[i] = Client(engine, requests[i], more)
        if not left:
            all_in.set()

    first = [left.pop() for _ in range(min(clients, len(left)))]
    # Here, and from then on by the engine's thread alone.
    with engine._changed:
        for i in first:
            asked[i] = Client(engine, requests[i], more)
        if not left:
            all_in.set()
    assert all_in.wait(PATIENCE_SECONDS)
    return [comparable(asked[i].wait()) for i in range(len(requests))]


def ids_of_generate(model: LLM, request: Request, **more) -> list[int]:
    """Return what model.generate draws for a request."""
    s = request.sampling
    drawn = plain_generate(
        model,
        torch.tensor([request.ids]),
        s.max_new_tokens,
        temperature=s.temperature,
        top_k=s.top_k,
        top_p=s.top_p,
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        stop_ids=s.stop_ids,
        slide=s.when_full == "slide",
        generator=torch.Generator().manual_seed(s.seed),
        **more,
    )
    return [int(ids) for ids in drawn]
