"""Messages of a chat as files have them -> {"role", "content"}, with what is wrong named.

The styles are OpenAI's (role, content) and ShareGPT's (from, value). What has no counterpart in
our layout, such as calls of tools and images, is refused by its name.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from runtime.base.text import names_of, shown
from runtime.data.chat import ROLES, is_trained
from runtime.data.formats import Counts, cleaned

# ShareGPT's names of the roles, by its key "from".
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "assistant": "assistant",
}
_OPENAI_ROLES = {role: role for role in ROLES}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_TOOL_KEYS = frozenset(("tools", "functions", "tool_calls", "function_call", "tool_call_id"))
_MEDIA_KEYS = frozenset(("image", "images", "video", "videos", "audio", "audios"))
_KNOWN_IN_MESSAGE = frozenset(("role", "content", "from", "value", "train", "weight"))
_EMPTY: tuple[object, ...] = (None, "", "[]", [], {})

Message = dict[str, Any]
Row = dict[str, Any]


@dataclass
class Context:
    """Where a row is, and what is counted while it is read."""

    where: str
    counts: Counts
    # Fields of messages that have no counterpart here, by name.
    left_out: Counter[str]

    def text(self, value: object, what: str) -> str:
        """Return a text as all text is read. Raise ValueError for what is none."""
        if value is None:
            return ""
        if not isinstance(value, str):
            raise ValueError(f"{what} must be text, not {shown(value)}")
        return cleaned(value, self.where, self.counts)


def messages_of(value: object, what: str, context: Context) -> list[Message]:
    """Return messages with role and content, of a list in OpenAI's or in ShareGPT's form.

    Empty messages of the system are left out. Raise ValueError for anything else.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        # Tables have no lists.
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{what} is not JSON: {error}") from None
    if not isinstance(value, list):
        raise ValueError(f"{what} must be a list of messages, not {shown(value)}")
    messages, keys = [], None
    for number, message in enumerate(value, 1):
        here = f"{what}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{here} must have role and content, not be {shown(message)}")
        found = _keys_of(message, here)
        if keys and found != keys:
            raise ValueError(
                f"{here} has {' and '.join(found)}, those before have {' and '.join(keys)}: "
                "use one form"
            )
        keys = found
        made = _message(message, keys, here, context)
        if made["content"] or made["role"] in ("user", "assistant"):
            messages.append(made)
    return messages


def _keys_of(message: Row, here: str) -> tuple[str, str]:
    """Return the names of a message's role and content. Raise ValueError for both, or none."""
    openai = message.get("role") is not None or message.get("content") is not None
    sharegpt = message.get("from") is not None or message.get("value") is not None
    if openai and sharegpt:
        raise ValueError(f"{here} has mixed keys ({names_of(message)}): use one form")
    if not openai and not sharegpt:
        raise ValueError(f"{here} has {names_of(message)}, but needs role and content")
    return ("role", "content") if openai else ("from", "value")


def _message(message: Row, keys: tuple[str, str], here: str, context: Context) -> Message:
    role = message.get(keys[0])
    if further := message.keys() - _KNOWN_IN_MESSAGE:
        refuse_tools(message, here)
        refuse_media(message, here)
        context.left_out.update(str(name) for name in further if message[name])
    if role in _TOOL_ROLES:
        raise ValueError(f"{here} has the role {role!r}: {_NO_TOOLS}")
    known = SHAREGPT_ROLES if keys[0] == "from" else _OPENAI_ROLES
    # A role may be anything that JSON has.
    if not isinstance(role, str) or role not in known:
        allowed = ", ".join(known)
        raise ValueError(f"{here}: {keys[0]} must be one of {allowed}, not {shown(role)}")
    made: Message = {"role": known[role], "content": _content(message.get(keys[1]), here, context)}
    for name in ("train", "weight"):
        if (value := message.get(name)) is not None:
            # Parquet may have made decimals of them.
            made[name] = int(value) if type(value) is float and value in (0, 1) else value
    try:
        is_trained(made)
    except ValueError as error:
        raise ValueError(f"{here}: {error}") from None
    return made


def _content(value: object, here: str, context: Context) -> str:
    """Return a message's text; parts of text are joined. Raise ValueError for other parts."""
    if not isinstance(value, list):
        return context.text(value, f"{here}: content")
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part, dict) or not isinstance(part.get("text"), str):
            said = f"a part of type {kind!r}" if kind else f"the part {shown(part)}"
            raise ValueError(f"{here} has {said}: only text is learned, leave such rows out")
        texts.append(part["text"])
    return context.text("".join(texts), f"{here}: content")


_NO_TOOLS = "calls of tools are not learned here, leave such rows out"


def refuse_tools(row: Row, here: str) -> None:
    """Raise ValueError for a row or a message with tools or their calls."""
    for name in row.keys() & _TOOL_KEYS:
        if row[name] not in _EMPTY:
            raise ValueError(f"{here} has {name}: {_NO_TOOLS}")


def refuse_media(row: Row, here: str) -> None:
    """Raise ValueError for a row or a message with images, video or sound."""
    for name in row.keys() & _MEDIA_KEYS:
        if row[name] not in _EMPTY:
            raise ValueError(f"{here} has {name}: only text is learned, leave such rows out")


def before_answer(messages: list[Message]) -> list[Message]:
    """Return the messages before the first one of the assistant; all if they would be none."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    return messages[:first] or messages


def untrained(messages: list[Message]) -> list[Message]:
    """Return messages of which none is learned."""
    return [
        {"role": "assistant", "content": m["content"], "train": False}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]
