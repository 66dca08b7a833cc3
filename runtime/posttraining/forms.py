"""Recognise what a row of a chat file is by its keys, and make an example of it.

Published chats have few forms: OpenAI's messages, ShareGPT's conversations, Alpaca's instruction
and output, prompt and completion, preference pairs, prompts for a reward. Nothing is guessed in
silence: what has no counterpart here is refused by its name, and a row without an answer is
dropped with its reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.base.cli import did_you_mean
from runtime.data.chat import ROLES, is_trained
from runtime.data.formats import Counts, cleaned, column_of

# What a row becomes, and the command that learns from it.
KINDS = {"conversations": "sft", "pairs": "dpo", "prompts": "grpo"}

# Why a row is dropped.
NO_ANSWER = "without an answer"
NO_TARGET = "without an answer to train on"
NO_PROMPT = "with an empty message of the user"
USER_LAST = "ending with the user"
ANSWER_LAST = "ending with an answer"
EQUAL_ANSWERS = "with two equal answers"

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
_KNOWN_IN_MESSAGE = ("role", "content", "from", "value", "train", "weight")

# Turns text that holds a whole dialogue, as HH-RLHF's does, into messages.
DIALOGUE_TO_MESSAGES = (
    'parts = re.split(r"\\n\\n(Human|Assistant): ", text)[1:]; '
    'messages = [{"role": "user" if who == "Human" else "assistant", "content": said} '
    "for who, said in zip(parts[::2], parts[1::2])]"
)

Message = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages whose answers are learned. where: file and line, for error lines."""

    messages: list[Message]
    where: str = ""

    @property
    def opening(self) -> list[Message]:
        """Messages before the first answer: those that a held-out conversation is known by."""
        return before_answer(self.messages)


@dataclass(frozen=True, slots=True)
class Pair:
    """A prompt, and two continuations of it: the chosen one is better than the rejected one."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    where: str = ""

    @property
    def opening(self) -> list[Message]:
        """Messages before the first answer."""
        return before_answer(self.prompt)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Messages to answer, and the row's other columns, which the reward is given."""

    messages: list[Message]
    columns: dict[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def opening(self) -> list[Message]:
        """Messages before the first answer."""
        return before_answer(self.messages)


Example = Conversation | Pair | Prompt


class Dropped(Exception):
    """A row that cannot be learned from; the text is the reason, as it is counted."""


def before_answer(messages: list[Message]) -> list[Message]:
    """Return the messages before the first one of the assistant; all if they would be none."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    return messages[:first] or messages


@dataclass(frozen=True)
class Form:
    """One form of rows: the keys that it needs, the kind of example, and how that is made."""

    kind: str
    needs: tuple[str, ...]
    make: Callable[[Row, Context], Example]

    @property
    def name(self) -> str:
        """The keys, as they are said."""
        return ", ".join(self.needs)


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
            raise ValueError(f"{what} must be text, not {_shown(value)}")
        return cleaned(value, self.where, self.counts)


def _shown(value: object) -> str:
    """Return a value for an error line, with its type, cut if it is long."""
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 40 else text[:37] + '...'}"


# ------------------------------------------------------------------------------------- messages
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
        raise ValueError(f"{what} must be a list of messages, not {_shown(value)}")
    messages, keys = [], None
    for number, message in enumerate(value, 1):
        here = f"{what}, message {number}"
        if not isinstance(message, dict):
            raise ValueError(f"{here} must have role and content, not be {_shown(message)}")
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
        raise ValueError(f"{here} has mixed keys ({', '.join(map(str, message))}): use one form")
    if not openai and not sharegpt:
        names = ", ".join(map(str, message)) or "nothing"
        raise ValueError(f"{here} has {names}, but needs role and content")
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
        raise ValueError(f"{here}: {keys[0]} must be one of {allowed}, not {_shown(role)}")
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
            said = f"a part of type {kind!r}" if kind else f"the part {_shown(part)}"
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


def check_conversation(messages: list[Message]) -> None:
    """Raise Dropped, with the reason, for messages that teach nothing."""
    answers = [m for m in messages if m["role"] == "assistant"]
    if not answers or not all(m["content"].strip() for m in answers):
        raise Dropped(NO_ANSWER)
    if messages[-1]["role"] != "assistant":
        raise Dropped(USER_LAST)
    if not all(m["content"].strip() for m in messages if m["role"] == "user"):
        raise Dropped(NO_PROMPT)
    if all(m.get("train") is False or m.get("weight") == 0 for m in answers):
        raise Dropped(NO_TARGET)


# ------------------------------------------------------------------------------- the forms
def _with_system(messages: list[Message], row: Row, context: Context) -> list[Message]:
    """Return messages after those that the column "system" holds."""
    system = context.text(row.get("system"), "system")
    if not system.strip():
        return messages
    if messages and messages[0]["role"] == "system":
        if messages[0]["content"] == system:
            return messages
        raise ValueError("it has a column system and another message of the system: keep one")
    return [{"role": "system", "content": system}, *messages]


def _listed(key: str) -> Callable[[Row, Context], Conversation]:
    def make(row: Row, context: Context) -> Conversation:
        messages = messages_of(row[key] if row[key] is not None else [], key, context)
        messages = _with_system(messages, row, context)
        check_conversation(messages)
        return Conversation(messages, context.where)

    return make


def _alpaca(row: Row, context: Context) -> Conversation:
    texts = [context.text(row.get(name), name) for name in ("instruction", "input", "output")]
    asked = "\n\n".join(text for text in texts[:2] if text.strip())
    messages = []
    history = row.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"history must be a list of [question, answer], not {_shown(history)}")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"history must hold [question, answer], not {_shown(turn)}")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append({"role": role, "content": context.text(text, "history")})
    messages += [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": texts[2]},
    ]
    messages = _with_system(messages, row, context)
    check_conversation(messages)
    return Conversation(messages, context.where)


def _either(value: object, role: str, what: str, context: Context) -> list[Message]:
    """Return messages of a text, which is one message, or of a list of messages."""
    if isinstance(value, list):
        return messages_of(value, what, context)
    return [{"role": role, "content": context.text(value, what)}]


def _completion(row: Row, context: Context) -> Conversation:
    _refuse_label(row)
    prompt = _with_system(_either(row["prompt"], "user", "prompt", context), row, context)
    completion = _either(row["completion"], "assistant", "completion", context)
    # What stands in the prompt is read, not learned.
    messages = untrained(prompt) + completion
    check_conversation(messages)
    return Conversation(messages, context.where)


def _refuse_label(row: Row) -> None:
    label = row.get("label")
    is_truth = isinstance(label, bool) or label in (0, 1)
    if is_truth or (isinstance(label, str) and label.lower() in ("true", "false", "0", "1")):
        raise ValueError(
            "it has a label for each answer (KTO): keep the rows with a true one for scripts.sft, "
            "without the label, or make chosen and rejected of two rows for scripts.dpo"
        )


def untrained(messages: list[Message]) -> list[Message]:
    """Return messages of which none is learned."""
    return [
        {"role": "assistant", "content": m["content"], "train": False}
        if m["role"] == "assistant"
        else m
        for m in messages
    ]


def _pair(row: Row, context: Context) -> Pair:
    sides = []
    for name in ("chosen", "rejected"):
        value = row[name]
        if isinstance(value, str) and value.startswith(("\n\nHuman:", "Human:")):
            raise ValueError(
                f"{name} holds a dialogue as text (HH-RLHF): make messages of chosen and of "
                f"rejected first: {DIALOGUE_TO_MESSAGES}"
            )
        sides.append(_either(value, "assistant", name, context))
    return _pair_of(sides, row, context)


def _pair_of(sides: list[list[Message]], row: Row, context: Context) -> Pair:
    """Return the pair of a prompt's two answers, or of two whole conversations."""
    given = row.get("prompt")
    prompt = _either(given, "user", "prompt", context) if given is not None else []
    chosen, rejected = sides
    if not chosen or not rejected:
        raise Dropped(NO_ANSWER)
    # Whole conversations begin with a message that is no answer.
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        common = _common_prefix(chosen, rejected)
        shared = chosen[:common]
        texts = [m["content"].strip() for m in shared]
        if prompt and prompt[-1]["content"].strip() not in texts:
            raise ValueError("prompt is in neither conversation: leave the column out")
        prompt, chosen, rejected = shared, chosen[common:], rejected[common:]
        if chosen == rejected:
            raise Dropped(EQUAL_ANSWERS)
        if not chosen or not rejected:
            raise Dropped(NO_ANSWER)
    elif given is None:
        raise ValueError(
            "it has no prompt, and chosen and rejected are no whole conversations: "
            "give the column prompt, or both as lists of messages"
        )
    prompt = _with_system(prompt, row, context)
    if chosen == rejected:
        raise Dropped(EQUAL_ANSWERS)
    for side in (chosen, rejected):
        if side[0]["role"] != "assistant":
            raise ValueError(
                "chosen and rejected differ in a message of the "
                f"{side[0]['role']}: they need one prompt"
            )
        check_conversation(prompt + side)
    return Pair(untrained(prompt), chosen, rejected, context.where)


def _common_prefix(a: list[Message], b: list[Message]) -> int:
    """Return how many messages two conversations have in common at their start."""
    for i, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return i
    return min(len(a), len(b))


def _prompt(row: Row, context: Context) -> Prompt:
    messages = _with_system(_either(row["prompt"], "user", "prompt", context), row, context)
    if not messages or not all(m["content"].strip() for m in messages if m["role"] == "user"):
        raise Dropped(NO_PROMPT)
    if messages[-1]["role"] == "assistant":
        raise Dropped(ANSWER_LAST)
    columns = {name: value for name, value in row.items() if name != "prompt"}
    return Prompt(untrained(messages), columns, context.where)


# The first that fits is taken; of two conversations in one row, none is.
FORMS = (
    Form("pairs", ("prompt", "chosen", "rejected"), _pair),
    Form("pairs", ("chosen", "rejected"), _pair),
    Form("conversations", ("messages",), _listed("messages")),
    Form("conversations", ("conversations",), _listed("conversations")),
    Form("conversations", ("conversation",), _listed("conversation")),
    Form("conversations", ("instruction", "output"), _alpaca),
    Form("conversations", ("prompt", "completion"), _completion),
    Form("prompts", ("prompt",), _prompt),
)
COLUMNS = tuple(dict.fromkeys(name for form in FORMS for name in form.needs)) + (
    "system",
    "input",
    "history",
)


def read_columns(text: str) -> dict[str, str]:
    """Return name -> column of "prompt=question,completion=answer". Raise ValueError."""
    columns = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, equals, column = (piece.strip() for piece in part.partition("="))
        if not equals or not name or not column:
            raise ValueError(
                f"--columns {text!r}: write NAME=COLUMN, such as prompt=question,completion=answer"
            )
        if name not in COLUMNS:
            raise ValueError(
                f"--columns: {name!r} is unknown{did_you_mean([name], COLUMNS)} "
                f"(known: {', '.join(COLUMNS)})"
            )
        if name in columns:
            raise ValueError(f"--columns names {name!r} twice")
        columns[name] = column
    return columns


def renamed(row: Row, columns: Mapping[str, str], where: str) -> Row:
    """Return a row with the columns under the names that the forms know.

    Raise ValueError if the row has no such column.
    """
    if not columns:
        return row
    try:
        found = {name: column_of(row, column, where) for name, column in columns.items()}
    except ValueError as error:
        raise ValueError(str(error).replace("--text_column", "--columns NAME=COLUMN")) from None
    return {name: value for name, value in row.items() if name not in columns.values()} | found


def recognise(row: Row, want: str, columns: Mapping[str, str]) -> Form:
    """Return the form of a row. want: a kind; "" = any. columns: those that the user named.

    Raise ValueError, with what is known, for a row of no form, of another kind, or of two forms.
    """
    asked = set(columns) - {"system", "input", "history"}
    fitting = [
        form
        for form in FORMS
        if all(name in row for name in form.needs) and asked <= set(form.needs)
    ]
    wanted = [form for form in fitting if want in ("", form.kind)]
    # Tables and Parquet files have all columns in all rows: those with null are of other rows.
    filled = [f for f in wanted if all(row[name] is not None for name in f.needs)] or wanted
    if not filled:
        raise ValueError(_unknown(row, want, fitting))
    if want != "pairs" and len(talks := [f for f in filled if f.kind == "conversations"]) > 1:
        raise ValueError(
            f"the row has mixed keys, {talks[0].name} and also {talks[1].name}: "
            f"choose with --columns, such as {talks[0].needs[0]}={talks[0].needs[0]}"
        )
    return filled[0]


def _unknown(row: Row, want: str, fitting: list[Form]) -> str:
    """Return the error line for a row that is none of the wanted kind."""
    has = f"the row has {', '.join(map(str, row)) or 'no columns'}"
    if fitting:
        kind = fitting[0].kind
        advice = f"they are for scripts.{KINDS[kind]}"
        if kind == "pairs" and want == "conversations":
            advice += "; for the chosen answers alone give "
            advice += (
                "--columns prompt=prompt,completion=chosen"
                if "prompt" in row
                else "--columns messages=chosen"
            )
        return f"{has}, which are {kind} ({fitting[0].name}), not {want}: {advice}"
    if list(row) == ["text"]:
        return (
            f"{has}: plain text is for pre-training (prepare_data.py); "
            "a chat has messages, or prompt and completion"
        )
    known = "; ".join(form.name for form in FORMS if want in ("", form.kind))
    return (
        f"{has}, none of the known forms ({known}): "
        "name the columns, such as --columns prompt=question,completion=answer"
    )
