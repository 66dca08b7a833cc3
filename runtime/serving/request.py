"""What one asks of the engine (runtime/serving/engine.py), and what it answers.

A `Request` goes in, and events come back through a function that the caller gives: one `Started`
when the prompt has been read, a `Token` for each that is drawn, and one `Finished`, which is always
the last. All of them hold plain numbers and lists, so that they can be compared and written as
JSON. No torch is needed here.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from config_model import PredictConfig, check_fields, option

# Of `logprobs`: as many alternatives for a token as the OpenAI API allows.
MOST_TOP = 20


# ----------------------------------------------------------------------------------------- errors
class RequestRefused(ValueError):
    """A request that this engine cannot honour; the line says what is allowed."""


class QueueFull(Exception):
    """All slots are taken, and as many requests wait as may wait."""


class EngineClosed(Exception):
    """The engine takes no more requests: it is closing, or closed."""


# --------------------------------------------------------------------------------------- requests
def as_in_predict(name: str, default: Any = dataclasses.MISSING) -> Any:
    """Return a field like predict.py's: its range and help text, and its default or this one."""
    field = PredictConfig.__dataclass_fields__[name]
    if default is dataclasses.MISSING:
        default = field.default
    return dataclasses.field(default=default, metadata=field.metadata)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and when that ends. With the same settings, predict.py draws the same.

    Raise ValueError for a field of another type or out of range.
    """

    temperature: float = as_in_predict("temperature")
    top_k: int = as_in_predict("top_k")
    top_p: float = as_in_predict("top_p")
    min_p: float = as_in_predict("min_p")
    repetition_penalty: float = as_in_predict("repetition_penalty")
    when_full: str = as_in_predict("when_full")
    seed: int = option(
        0,
        "random seed; the same seed and settings give the same tokens",
        minimum=0,
        maximum=2**63 - 1,
    )
    max_new_tokens: int = option(
        PredictConfig.max_new_tokens,
        "maximum number of new tokens; 0 = only read the prompt",
        minimum=0,
        maximum=100_000_000,
    )
    stop_ids: tuple = option((), "ids that end an answer; they are its last token")

    def __post_init__(self):
        check_fields(self)
        if not all(type(i) is int for i in self.stop_ids):
            raise ValueError(f"stop_ids must be token ids, not {self.stop_ids!r}")


@dataclass(frozen=True)
class Request:
    """A prompt and what is wanted of it. Stop texts are the caller's: it cancels.

    ids: the prompt, at least one id; its start token is the caller's to put there. logprobs: how
    many of the most likely ids each token comes with, 0 to 20; None = no log-probabilities.
    prompt_logprobs: those of the prompt's tokens, too; with `experts`, also their experts. Such a
    prompt is read whole, whatever the caches hold. experts: each token comes with the experts that
    it was sent to, so it comes when it has been read: one pass later.
    """

    ids: tuple[int, ...]
    sampling: Sampling = Sampling()
    logprobs: int | None = None
    prompt_logprobs: bool = False
    experts: bool = False

    def __post_init__(self):
        if not self.ids:
            raise ValueError("the prompt must have at least one token id")
        if not all(type(i) is int for i in self.ids):
            raise ValueError("the prompt must be token ids")
        top = self.logprobs
        if top is not None and (type(top) is not int or not 0 <= top <= MOST_TOP):
            raise ValueError(f"logprobs must be from 0 to {MOST_TOP}, or None, not {top!r}")


# ----------------------------------------------------------------------------------------- events
# Ids and their log-probabilities, the most likely first; of equals the lowest id.
Top = list[tuple[int, float]]


@dataclass(frozen=True)
class Experts:
    """Where the routers sent a token: by block, strongest first, as many as the top k."""

    # [L][K], and the routing weights of these.
    ids: list[list[int]]
    weights: list[list[float]]


@dataclass(frozen=True)
class PromptScores:
    """The prompt's tokens, scored.

    log_probs [T]: of each token given those before it, in nats; the first has none. tops [T]: the
    most likely ids in its place, where `logprobs` asks for them. experts [T] if asked for.
    """

    log_probs: list[float | None]
    tops: list[Top | None]
    experts: list[Experts] | None


@dataclass(frozen=True)
class Started:
    """The prompt has been read.

    num_prompt_tokens: of which num_reused_tokens did not have to be computed. scores: if asked for.
    """

    num_prompt_tokens: int
    num_reused_tokens: int
    scores: PromptScores | None = None


@dataclass(frozen=True)
class Token:
    """A drawn token; an id that ends the answer is one, too.

    log_prob: of the model's own distribution over the whole vocabulary, in nats, whatever the
    settings of drawing; None if not asked for. top: the most likely ids, without those that stand
    for no text. experts: None if not asked for, and for a last token that the context has no room
    to read.
    """

    id: int
    log_prob: float | None = None
    top: Top | None = None
    experts: Experts | None = None


Reason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class Finished:
    """The last event of a request.

    reason: "stop" = an id that ends; "length" = the most tokens, or a full context, as the message
    says; "cancelled"; "error" = the message says in a line what happened.
    """

    reason: Reason
    message: str = ""


Event = Started | Token | Finished
# Called on the engine's thread. It must return at once.
OnEvent = Callable[[Event], object]


class Ticket:
    """A submitted request, for `Engine.cancel`."""

    def __init__(self, request: Request, on_event: OnEvent):
        self.request, self.on_event = request, on_event
        # Set by `Engine.cancel`, read by the engine's thread.
        self.is_cancelled = False
        # Whether it has ended.
        self.is_done = False
        # Of time.monotonic.
        self.submitted_s = time.monotonic()
        self.last_token_s: float | None = None
