"""What a parsed request asks of the engine: one job for each answer, and how it is to be told."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from runtime.data.tokenizer import NoTokenizer
from runtime.serving.errors import refused
from runtime.serving.fields import SAMPLING, CommonFields
from runtime.serving.request import Request, Sampling
from runtime.serving.served import Served


@dataclass(frozen=True)
class Job:
    """One answer. num_hidden: ids at the prompt's start that the client did not send."""

    request: Request
    num_hidden: int = 0


@dataclass(frozen=True)
class Asking:
    """A request to complete something, parsed.

    num_per_prompt: answers for each prompt; the jobs are in the prompts' order. top: how many of
    the most likely tokens are told with each token; None = no log-probabilities. unknown: names of
    fields that nobody reads.
    """

    kind: Literal["text", "chat"]
    jobs: list[Job]
    num_per_prompt: int
    seed: int
    stops: tuple[str, ...]
    stream: bool
    include_usage: bool
    echo: bool
    top: int | None
    experts: bool
    token_ids: bool
    unknown: tuple[str, ...]


def draw_seed(given: int) -> int:
    """Return the seed that was given, or a new one: it is told, so that an answer can be had again.

    Below 2^53, which JavaScript's numbers hold.
    """
    return given if given >= 0 else secrets.randbelow(2**53)


def stream_usage(body: dict[str, Any], stream: bool) -> bool:
    """Return whether a stream is to end with its usage. Raise ApiError."""
    options = body.get("stream_options")
    if options is None:
        return False
    if not isinstance(options, dict) or not stream:
        raise refused("stream_options", "stream_options is an object, for stream true alone")
    wants = options.get("include_usage", False)
    if wants is not None and not isinstance(wants, bool):
        raise refused("stream_options", "stream_options.include_usage must be true or false")
    return bool(wants)


def most_new_tokens(
    served: Served,
    ids: Sequence[int],
    asked: int | None,
    otherwise: int,
    when_full: str,
    name: str = "max_tokens",
) -> int:
    """Return the most new tokens of an answer. Raise ApiError if prompt and answer do not fit.

    asked: the field of that name; None = `otherwise`, or less where the context has less room.
    """
    context, most = served.context_length, served.most_new_tokens
    if len(ids) > context:
        raise refused(
            "messages" if otherwise == 0 else "prompt",
            f"the prompt has {len(ids):,} tokens, and the context holds {context:,}: shorten it",
            "context_length_exceeded",
        )
    # The last token that is drawn is never read.
    room = context - len(ids) + 1
    if asked is None:
        return min(otherwise or most, most, most if when_full == "slide" else room)
    if asked > most:
        raise refused(name, f"{name} may be {most:,} on this server, not {asked:,}")
    if asked > room and when_full != "slide":
        raise refused(
            name,
            f"the prompt's {len(ids):,} tokens and {name} {asked:,} do not fit the context of "
            f"{context:,}: lower {name} to {room:,}, or set when_full to slide",
            "context_length_exceeded",
        )
    return asked


def sampling_of(served: Served, fields: CommonFields, seed: int, max_new_tokens: int) -> Sampling:
    """Return how an answer is drawn: the request's settings, else the server's."""
    given = {name: getattr(fields, name) for name in SAMPLING}
    settings = {name: value for name, value in given.items() if value is not None}
    return Sampling(
        **(served.limits.defaults | settings),
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop_ids=tuple(served.rendering.stop_ids),
    )


def check_ids(served: Served, ids: Sequence[Any], param: str) -> tuple[int, ...]:
    """Return token ids, whole numbers as integers. Raise ApiError for what is none of the model."""
    found = []
    for i in ids:
        number = int(i) if type(i) is float and i.is_integer() else i
        if type(number) is not int or not 0 <= number < served.vocabulary_size:
            raise refused(
                param,
                f"{param} holds {str(i)[:40]}, and this model's token ids are 0 to "
                f"{served.vocabulary_size - 1:,}",
            )
        found.append(number)
    return tuple(found)


def check_stops(served: Served, stops: tuple[str, ...]) -> None:
    """Raise ApiError if a model without a tokenizer is to stop at a text."""
    if any(stops) and isinstance(served.tokenizer, NoTokenizer):
        raise refused("stop", "stop is a text, and this model has token ids instead of texts")


def check_choices(served: Served, num_prompts: int, n: int) -> None:
    """Raise ApiError for more answers than can ever wait together."""
    most = served.limits.most_choices
    if num_prompts * n > most:
        raise refused(
            "n" if n > 1 else "prompt",
            f"prompts ({num_prompts:,}) times n ({n}) may be at most {most}, which fit this "
            "server's slots and queue: send several requests",
        )


def jobs_of(
    served: Served,
    fields: CommonFields,
    prompts: Sequence[tuple[tuple[int, ...], int]],
    most: Sequence[int],
    seed: int,
    **wanted: Any,
) -> list[Job]:
    """Return n jobs for each prompt.

    prompts: (ids, num_hidden). most: new tokens of each. wanted: what else the engine's request
    says. Answer i of every prompt has seed + i: alone it would be the same.
    """
    return [
        Job(
            Request(
                ids=ids,
                sampling=sampling_of(served, fields, (seed + i) % 2**63, max_new),
                experts=fields.experts,
                **wanted,
            ),
            num_hidden,
        )
        for (ids, num_hidden), max_new in zip(prompts, most, strict=True)
        for i in range(fields.n)
    ]
