"""The models that a server has, by name."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from runtime.data.tokenizer import Tokenizer
from runtime.serving.errors import ApiError, short, told
from runtime.serving.request import OnEvent, Request, Ticket
from runtime.serving.statistics import Gauges, Statistics

NAME = re.compile(r"[\w.+-][\w.+:/@-]{0,99}", re.ASCII)
# What clients send that have no name for it.
ANY_MODEL = ("", "default")


class Engine(Protocol):
    """What the server needs of runtime/serving/engine.py."""

    statistics: Statistics

    @property
    def is_exact(self) -> bool:
        """Whether an answer is the same bits in any company."""

    @property
    def line(self) -> str:
        """What that means, in a line."""

    @property
    def is_open(self) -> bool:
        """Whether it takes requests: not closed, and its thread has not ended."""

    def submit(self, request: Request, on_event: OnEvent) -> Ticket:
        """Queue a request. Raise QueueFull, EngineClosed, or ValueError for what it refuses."""

    def cancel(self, ticket: Ticket) -> None:
        """End a request; its slot is free soon after."""

    def drain(self, seconds: float) -> bool:
        """Finish what is there, take nothing new; return whether all ended in so many seconds."""

    def close(self) -> None:
        """Cancel what is there, and end the thread."""

    def gauges(self) -> Gauges:
        """Return what it holds now."""


class Rendering(Protocol):
    """What the server needs of a LoadedModel (runtime/inference/predictor.py) to make ids."""

    tokenizer: Tokenizer
    stop_ids: list[int]

    @property
    def has_chat(self) -> bool: ...

    def text_ids(self, text: str) -> list[int]: ...

    def chat_ids(self, messages: list[dict]) -> list[int]: ...


@dataclass(frozen=True)
class Limits:
    """What a server allows and assumes, from its flags."""

    # Of drawing, for a request that does not say (fields.SAMPLING).
    defaults: dict[str, Any]
    # Most new tokens of an answer; 0 = the context.
    max_new_tokens: int = 0
    # Requests that fit the slots and the queue.
    most_choices: int = 128
    plain_chat: bool = False


@dataclass(frozen=True)
class Served:
    """A model with its name, its engine and how prompts become ids."""

    name: str
    rendering: Rendering
    engine: Engine
    context_length: int
    # Ids that have a text; the embedding may have rows beyond them.
    vocabulary_size: int
    # Commit of the code, digest of the checkpoint, and how it is computed.
    fingerprint: str
    limits: Limits
    # Experts of a block.
    num_experts: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Tokenizer:
        return self.rendering.tokenizer

    @property
    def most_new_tokens(self) -> int:
        return self.limits.max_new_tokens or self.context_length

    def card(self) -> dict[str, Any]:
        """Return what /v1/models says of it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "gptoss",
            "max_model_len": self.context_length,
            "max_new_tokens": self.most_new_tokens,
            "vocabulary_size": self.vocabulary_size,
            "num_experts": self.num_experts,
            "batch_invariant": self.engine.is_exact,
            "batch_invariant_line": self.engine.line,
            "has_chat_template": self.rendering.has_chat,
            "plain_chat": self.limits.plain_chat,
            "sampling_defaults": self.limits.defaults,
            # They end an answer.
            "stop_token_ids": list(self.rendering.stop_ids),
            "system_fingerprint": self.fingerprint,
        }


class Models:
    """Models by name; the first is the default. Empty while the server loads them."""

    def __init__(self, served: Sequence[Served] = ()):
        self.by_name: dict[str, Served] = {}
        for one in served:
            self.add(one)

    def add(self, served: Served) -> None:
        self.by_name[served.name] = served

    def pick(self, name: object) -> Served:
        """Return the model that a request names. Raise ApiError 404 that names ours."""
        if name is None or name in ANY_MODEL:
            return next(iter(self.by_name.values()))
        if not isinstance(name, str):
            raise ApiError(400, f"model must be a text, not {told(name)}", param="model")
        if name not in self.by_name:
            ours = ", ".join(self.by_name)
            raise ApiError(
                404,
                f"there is no model {short(name)!r}: this server has {ours}",
                param="model",
                code="model_not_found",
            )
        return self.by_name[name]


def named_checkpoints(given: Sequence[str]) -> dict[str, str]:
    """Return name -> path of `--ckpt a=PATH b=PATH`; a path alone is called like its file.

    Raise ValueError for a name twice, or one that a URL or a log line could not hold.
    """
    found: dict[str, str] = {}
    for word in given:
        name, equals, path = word.partition("=")
        # A path may hold an equals sign, too.
        if not equals or Path(word).exists():
            name, path = Path(word).stem, word
        if not NAME.fullmatch(name) or name in ANY_MODEL:
            raise ValueError(
                f"{name!r} cannot be a model's name: give --ckpt NAME=FILE with letters, digits "
                "and . _ + - : / @, and not default"
            )
        if not path:
            raise ValueError(f"--ckpt {word} names no file: give --ckpt NAME=FILE")
        if name in found:
            raise ValueError(
                f"two checkpoints are called {name}: give other names, --ckpt NAME=FILE NAME=FILE"
            )
        found[name] = path
    return found
