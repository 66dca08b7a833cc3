"""The chat layout: messages -> ids, and which of them are targets.

A conversation starts as any text does, with the tokenizer's start token. Each message is
<|start|>role<|message|>content<|end|>, and <|start|>assistant<|message|> asks for an answer. This
is the layout of OpenAI's harmony (https://github.com/openai/harmony) without channels; o200k_base
has harmony's ids. Role and content are encoded alone, so no token crosses a border, and the
characters <|end|> in a text stay text. A published model keeps its own layout: its chat template,
in runtime/data/chat_template.py.

A message is {"role": ROLES, "content": str}. The answers are targets: content and <|end|> of
assistant messages, unless one has "train": false or "weight": 0.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from runtime.data import chat_template
from runtime.data.hf_tokenizer import HuggingFaceTokenizer
from runtime.data.tokenizer import ChatIds, NoTokenizer, Tokenizer

ROLES = ("system", "developer", "user", "assistant")
TRAIN_ON = ("all", "last")
# Harmony's ids, in a hole of o200k_base: there a chat needs no further rows of the embedding.
HARMONY = ChatIds(start=200_006, end=200_007, message=200_008)
# Keys of published chats with content that has no counterpart in this layout.
_UNKNOWN_CONTENT = ("tool_calls", "tool_call_id", "function_call", "audio", "images", "thinking")


# ------------------------------------------------------------------------------ chat ids
def with_chat(tokenizer: Tokenizer) -> Tokenizer:
    """Return the tokenizer with chat ids: the same ids for texts, and three that no text contains.

    o200k_base gets harmony's ids within its vocabulary, any other tokenizer of ours three appended
    ones. A published model's tokenizer is returned as it is: it has a template. Raise ValueError if
    it has none, and for token ids without a tokenizer.
    """
    if tokenizer.chat is not None:
        return tokenizer
    if isinstance(tokenizer, NoTokenizer):
        raise ValueError(
            "a chat needs the model's tokenizer, and with --tokenizer none there are token ids"
        )
    if isinstance(tokenizer, HuggingFaceTokenizer):
        chat_template.source_of(tokenizer)
        return tokenizer
    size = tokenizer.vocabulary_size
    harmony = tokenizer.name == "o200k_base" and set(HARMONY) <= set(tokenizer.undecodable_ids)
    ids = HARMONY if harmony else ChatIds(start=size, end=size + 1, message=size + 2)
    chatting = copy.copy(tokenizer)
    # Of the vocabulary without the ids.
    chatting.__dict__.pop("undecodable_ids", None)
    chatting.chat, chatting.stop_ids = ids, (ids.end,)
    chatting.vocabulary_size = max(size, *(i + 1 for i in ids))
    chatting.base_fingerprint = tokenizer.fingerprint
    content = f"chat {tokenizer.fingerprint} {ids.start} {ids.end} {ids.message}"
    chatting.fingerprint = hashlib.sha256(content.encode()).hexdigest()
    return chatting


def has_chat(tokenizer: Tokenizer) -> bool:
    """Return whether messages can be rendered with this tokenizer."""
    return tokenizer.chat is not None or bool(chat_template.find_source(tokenizer))


# ------------------------------------------------------------------------------ messages
def check_messages(messages: object) -> None:
    """Raise ValueError unless these are messages of a chat; the line names the message."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"messages must be a list of messages with role and content, not {_shown(messages)}"
        )
    for number, message in enumerate(messages, start=1):
        try:
            _check_message(message)
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None


def check_prompt(messages: object) -> None:
    """Raise ValueError unless these are messages with something to answer at the end."""
    check_messages(messages)
    assert isinstance(messages, list)
    if messages[-1]["role"] == "assistant":
        raise ValueError("the last message is the assistant's: end with one that it can answer")


def _check_message(message: object) -> None:
    if not isinstance(message, dict):
        raise ValueError(f"it must be an object with role and content, not {_shown(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, not {_shown(role)}")
    for key in _UNKNOWN_CONTENT:
        if message.get(key):
            raise ValueError(f"{key} has no counterpart in this chat layout: leave such chats out")
    if not isinstance(content, str):
        raise ValueError(f"content must be a text, not {_shown(content)}")
    is_trained(message)


def is_trained(message: dict) -> bool:
    """Return whether a message's content is a target. Raise ValueError for wrong values."""
    train, weight = message.get("train"), message.get("weight")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"train must be true or false, not {_shown(train)}")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise ValueError(f"weight must be 0 or 1, not {_shown(weight)}")
    if train is not None and weight is not None and train != bool(weight):
        raise ValueError(f"train {str(train).lower()} and weight {weight} contradict each other")
    if message["role"] == "assistant":
        return train is not False and weight != 0
    if train or weight:
        raise ValueError(
            f"only messages of the assistant are trained: leave train and weight out of the "
            f"{message['role']}'s"
        )
    return False


def _shown(value: object) -> str:
    """Return a value for an error line, cut if it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------ messages -> ids
class Rendered(NamedTuple):
    """A conversation's ids; is_target: whether each id is to be learned, at its own position."""

    ids: list[int]
    is_target: list[bool]


def render(messages: Sequence[dict], tokenizer: Tokenizer, train_on: str = "all") -> Rendered:
    """Return a conversation's ids and targets.

    tokenizer: has chat ids (with_chat) or a published model's template. train_on: "all" answers or
    the "last" one. Raise ValueError for wrong messages, another train_on, a tokenizer without a
    chat layout, or a template that renders a prefix of the messages in another way.
    """
    check_messages(messages)
    if train_on not in TRAIN_ON:
        raise ValueError(f"train_on must be {' or '.join(TRAIN_ON)}, not {_shown(train_on)}")
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    trained = [is_trained(m) and (train_on == "all" or i == last) for i, m in enumerate(messages)]
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return Rendered(*chat_template.render(messages, trained, tokenizer))
    chat = _chat_of(tokenizer)
    ids = _start(tokenizer)
    is_target = [False] * len(ids)
    for message, is_answer in zip(messages, trained, strict=True):
        header = _header(message["role"], chat, tokenizer)
        content = [*tokenizer.encode(message["content"]), chat.end]
        ids += header + content
        is_target += [False] * len(header) + [is_answer] * len(content)
    return Rendered(ids, is_target)


def prompt_ids(messages: Sequence[dict], tokenizer: Tokenizer) -> list[int]:
    """Return the ids of messages and of the header after which the assistant answers.

    Raise ValueError as `render` does, and if the last message is the assistant's.
    """
    check_prompt(messages)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        return chat_template.prompt_ids(messages, tokenizer)
    ids = render(messages, tokenizer).ids
    return ids + _header("assistant", _chat_of(tokenizer), tokenizer)


def _chat_of(tokenizer: Tokenizer) -> ChatIds:
    if tokenizer.chat is None:
        raise ValueError(
            f"tokenizer {tokenizer.name} has no chat layout: train the model on chats first "
            "(python -m scripts.sft)"
        )
    return tokenizer.chat


def _start(tokenizer: Tokenizer) -> list[int]:
    return [] if tokenizer.start_id is None else [tokenizer.start_id]


def _header(role: str, chat: ChatIds, tokenizer: Tokenizer) -> list[int]:
    return [chat.start, *tokenizer.encode(role), chat.message]
