"""POST /v1/chat/completions, before the engine: a body becomes an `Asking`."""

from __future__ import annotations

from typing import Any

from runtime.data.chat import check_prompt
from runtime.serving.asking import (
    Asking,
    check_choices,
    check_ids,
    check_stops,
    draw_seed,
    jobs_of,
    most_new_tokens,
    stream_usage,
)
from runtime.serving.errors import ApiError, refused, told
from runtime.serving.fields import ChatFields, parse, without
from runtime.serving.served import Served

# With --plain_chat: a model that was not trained on chats never stops after an answer.
PLAIN_STOP = "\nUser:"
# Of a message. Others would change what the model is to read.
_NOT_READ = ("tool_calls", "tool_call_id", "function_call", "audio", "images", "thinking")


def ask_chat(body: dict[str, Any], served: Served) -> Asking:
    """Return what a body asks for. Raise ApiError that names the field which is wrong."""
    fields, unknown = parse(ChatFields, without(body, "messages", "stream_options"))
    messages = messages_of(body.get("messages"))
    ids = chat_ids(messages, served)
    check_choices(served, 1, fields.n)
    stops = fields.stop + ((PLAIN_STOP,) if _is_plain(served) else ())
    check_stops(served, stops)
    when_full = fields.when_full or served.limits.defaults["when_full"]
    name, asked = _max_tokens(fields)
    most = most_new_tokens(served, ids, asked, 0, when_full, name)
    seed, top = draw_seed(fields.seed), _top(fields)
    return Asking(
        kind="chat",
        jobs=jobs_of(served, fields, [(ids, len(ids))], [most], seed, logprobs=top),
        num_per_prompt=fields.n,
        seed=seed,
        stops=stops,
        stream=fields.stream,
        include_usage=stream_usage(body, fields.stream),
        echo=False,
        top=top,
        experts=fields.experts,
        token_ids=fields.return_token_ids,
        unknown=tuple(unknown),
    )


def messages_of(given: Any) -> list[dict[str, Any]]:
    """Return messages of role and text. Raise ApiError that names the one that is wrong."""
    if not isinstance(given, list) or not given:
        raise refused("messages", f"messages must be a list of messages, not {told(given)}")
    messages = [_message(one, f"messages[{number}]") for number, one in enumerate(given)]
    try:
        check_prompt(messages)
    except ValueError as error:
        raise refused("messages", str(error)) from None
    return messages


def _message(given: Any, param: str) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise refused(param, f"{param} must be an object with role and content, not {told(given)}")
    for key in _NOT_READ:
        if given.get(key):
            raise refused(f"{param}.{key}", f"{param}.{key} is not supported: leave it out")
    return {"role": given.get("role"), "content": _content(given.get("content"), param)}


def _content(given: Any, param: str) -> str:
    """Return a message's text. It may come as a list of parts of type text."""
    if not isinstance(given, list):
        return given
    texts = []
    for part in given:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise refused(
                f"{param}.content",
                f"{param}.content may hold parts of type text alone, not {told(part)}",
            )
        texts.append(text)
    return "".join(texts)


def chat_ids(messages: list[dict[str, Any]], served: Served) -> tuple[int, ...]:
    """Return the ids after which the model answers. Raise ApiError."""
    try:
        if _is_plain(served):
            ids = served.rendering.text_ids("\n".join(one["content"] for one in messages))
        elif served.rendering.has_chat:
            ids = served.rendering.chat_ids(messages)
        else:
            raise ApiError(
                400,
                f"{served.name} was not trained on chats: use /v1/completions, train it with "
                "python -m scripts.sft, or start the server with --plain_chat",
                param="messages",
                code="no_chat_template",
            )
    except ValueError as error:
        raise refused("messages", str(error)) from None
    return check_ids(served, ids, "messages")


def _is_plain(served: Served) -> bool:
    return served.limits.plain_chat and not served.rendering.has_chat


def _max_tokens(fields: ChatFields) -> tuple[str, int | None]:
    """Return the name under which a limit came, and the limit."""
    first, second = fields.max_tokens, fields.max_completion_tokens
    if first is not None and second is not None and first != second:
        raise refused(
            "max_completion_tokens",
            f"max_tokens {first} and max_completion_tokens {second} contradict: give one",
        )
    return ("max_completion_tokens", second) if first is None else ("max_tokens", first)


def _top(fields: ChatFields) -> int | None:
    if fields.top_logprobs is not None and not fields.logprobs:
        raise refused("top_logprobs", "top_logprobs needs logprobs true")
    return (fields.top_logprobs or 0) if fields.logprobs else None
