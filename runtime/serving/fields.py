"""The fields of a request: flags of predict.py under their own names, and those of the API.

Each is an `option(...)` of a dataclass, so that parsing, the ranges, /openapi.json and the server's
own flags share one list. `parse` returns such a dataclass and the names that it does not know.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from config_model import check_field, option
from runtime.data.tokenizer import without_surrogates
from runtime.serving.errors import refused, told
from runtime.serving.request import MOST_TOP, as_in_predict

# Each token's text is compared with all of them.
MOST_STOPS, MOST_STOP_CHARACTERS = 64, 500
# Settings of drawing whose defaults are the server's flags.
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "when_full")


@dataclass(frozen=True, kw_only=True)
class CommonFields:
    """What all completions may ask for."""

    model: str = option("", "a name from /v1/models; empty or default = the first")
    # At most what fits slots and queue, which the server's flags say.
    n: int = option(1, "answers for each prompt; answer i is drawn with seed + i", minimum=1)
    stream: bool = option(False, "send the answer in parts, as server-sent events")
    temperature: float | None = as_in_predict("temperature", None)
    top_k: int | None = as_in_predict("top_k", None)
    top_p: float | None = as_in_predict("top_p", None)
    min_p: float | None = as_in_predict("min_p", None)
    repetition_penalty: float | None = as_in_predict("repetition_penalty", None)
    stop: tuple = option((), "a text or several at which an answer ends; they are not part of it")
    seed: int = as_in_predict("seed")
    when_full: str | None = as_in_predict("when_full", None)
    experts: bool = option(
        False, "add the experts of each token and their routing weights, by block"
    )
    return_token_ids: bool = option(
        False, "add the ids of the answer's tokens, and of the most likely ones with logprobs"
    )


@dataclass(frozen=True, kw_only=True)
class CompletionFields(CommonFields):
    """What POST /v1/completions may ask for, next to its prompt."""

    max_tokens: int | None = option(
        None,
        "maximum number of new tokens; 0 = none, to score a prompt with echo (default: 16)",
        minimum=0,
        maximum=100_000_000,
    )
    logprobs: int | None = option(
        None,
        "log-probability of each token, and of so many of the most likely ones in its place",
        minimum=0,
        maximum=MOST_TOP,
    )
    echo: bool = option(False, "start the answer with the prompt, and score its tokens, too")


@dataclass(frozen=True, kw_only=True)
class ChatFields(CommonFields):
    """What POST /v1/chat/completions may ask for, next to its messages."""

    max_tokens: int | None = option(
        None,
        "maximum number of new tokens (default: what fits)",
        minimum=1,
        maximum=100_000_000,
    )
    max_completion_tokens: int | None = option(
        None, "another name of max_tokens", minimum=1, maximum=100_000_000
    )
    logprobs: bool = option(False, "the log-probability of each token")
    top_logprobs: int | None = option(
        None,
        "with logprobs: so many of the most likely tokens in each token's place",
        minimum=0,
        maximum=MOST_TOP,
    )


@dataclass(frozen=True, kw_only=True)
class TokenizeFields:
    """What POST /tokenize may ask for, next to its prompt or messages."""

    model: str = option("", "a name from /v1/models; empty or default = the first")
    add_special_tokens: bool = option(True, "put the start token before a text")
    return_token_strs: bool = option(False, "add the text of each token")


@dataclass(frozen=True, kw_only=True)
class DetokenizeFields:
    """What POST /detokenize may ask for, next to its tokens."""

    model: str = option("", "a name from /v1/models; empty or default = the first")


# Not used, and nothing would change if they were.
NO_EFFECT = frozenset(
    (
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "parallel_tool_calls",
    )
)


def _is_empty(value: object) -> bool:
    return value in ([], {}, "")


def _is_zero(value: object) -> bool:
    return not isinstance(value, bool) and value == 0


def _is_one(value: object) -> bool:
    return not isinstance(value, bool) and value == 1


# What is not honoured, with the values that ask for nothing.
NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "tools": _is_empty,
    "functions": _is_empty,
    "tool_choice": lambda value: value in ("none", "auto"),
    "function_call": lambda value: value in ("none", "auto"),
    "logit_bias": _is_empty,
    "response_format": lambda value: value == {"type": "text"},
    "presence_penalty": _is_zero,
    "frequency_penalty": _is_zero,
    "suffix": _is_empty,
    "best_of": _is_one,
    "modalities": lambda value: value == ["text"],
    "audio": _is_empty,
    "prediction": _is_empty,
    "web_search_options": _is_empty,
    # vLLM's own.
    "min_tokens": _is_zero,
    "ignore_eos": lambda value: value is False,
    "stop_token_ids": _is_empty,
    "bad_words": _is_empty,
    "use_beam_search": lambda value: value is False,
    "length_penalty": _is_one,
    "guided_json": _is_empty,
    "guided_regex": _is_empty,
    "guided_choice": _is_empty,
    "guided_grammar": _is_empty,
    "structured_outputs": _is_empty,
    "add_generation_prompt": lambda value: value is True,
    "continue_final_message": lambda value: value is False,
    "include_stop_str_in_output": lambda value: value is False,
    "truncate_prompt_tokens": _is_empty,
    "prompt_embeds": _is_empty,
    "prompt_logprobs": _is_empty,
    "chat_template": _is_empty,
    "documents": _is_empty,
    # Completions have it; a chat would be answered without its prompt.
    "echo": lambda value: value is False,
}

# The types of fields, in JSON's words.
KINDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}

Fields = TypeVar("Fields")


def kind_of(hint: Any) -> type:
    """Return the type of a field, without its None."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)]
    return kinds[0] if kinds else hint


def parse(fields: type[Fields], body: Mapping[str, Any]) -> tuple[Fields, list[str]]:
    """Return what a body asks for, and the names that are unknown. Raise ApiError.

    null counts as absent. Whole numbers may come as 50.0.
    """
    hints = typing.get_type_hints(fields)
    options = {f.name: f.metadata for f in dataclasses.fields(typing.cast(Any, fields))}
    given: dict[str, Any] = {}
    unknown: list[str] = []
    for name, value in body.items():
        if name in options:
            if value is not None:
                given[name] = _read(name, value, kind_of(hints[name]), options[name])
        elif name in NEUTRAL:
            if value is not None and not NEUTRAL[name](value):
                raise refused(name, f"{name} {told(value)} is not supported: leave it out")
        elif name not in NO_EFFECT:
            unknown.append(name)
    return fields(**given), unknown


def _read(name: str, value: Any, kind: type, limits: Mapping[str, Any]) -> Any:
    """Return a field's value. Raise ApiError that names it."""
    if name == "stop":
        return _stops(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise refused(name, f"{name} must be {KINDS[kind]}, not {told(value)}")
    try:
        return check_field(name, value, kind, limits)
    except OverflowError:
        raise refused(name, f"{name} is too large: {told(value)}") from None
    except ValueError as error:
        raise refused(name, str(error)) from None


def _stops(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise refused("stop", f"stop must be a text or a list of texts, not {told(value)}")
    if len(stops) > MOST_STOPS or any(len(stop) > MOST_STOP_CHARACTERS for stop in stops):
        raise refused(
            "stop",
            f"stop may hold {MOST_STOPS} texts of {MOST_STOP_CHARACTERS} characters: "
            f"these are {len(stops)}, the longest with {max(map(len, stops))}",
        )
    return tuple(without_surrogates(stop) for stop in stops)


def without(body: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return a body without these fields, which are read on their own."""
    return {name: value for name, value in body.items() if name not in names}
