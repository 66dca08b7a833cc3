"""Recognise what a row of a chat file is by its keys, and make an example of it.

Published chats have few forms: OpenAI's messages, ShareGPT's conversations, Alpaca's instruction
and output, prompt and completion, preference pairs, prompts for a reward. Nothing is guessed in
silence: what has no counterpart here is refused by its name, and a row without an answer is
dropped with its reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from runtime.base.cli import did_you_mean
from runtime.base.text import names_of, shown
from runtime.data.formats import column_of
from runtime.posttraining.messages import (
    Context,
    Message,
    Row,
    before_answer,
    messages_of,
    untrained,
)

# What a row becomes, and the command that learns from it.
KINDS = {"conversations": "sft", "pairs": "dpo", "prompts": "grpo"}

# Why a row is dropped.
NO_ANSWER = "without an answer"
NO_TARGET = "without an answer to train on"
NO_PROMPT = "with an empty message of the user"
USER_LAST = "ending with the user"
ANSWER_LAST = "ending with an answer"
EQUAL_ANSWERS = "with two equal answers"

# Turns text that holds a whole dialogue, as HH-RLHF's does, into messages.
DIALOGUE_TO_MESSAGES = (
    'parts = re.split(r"\\n\\n(Human|Assistant): ", text)[1:]; '
    'messages = [{"role": "user" if who == "Human" else "assistant", "content": said} '
    "for who, said in zip(parts[::2], parts[1::2])]"
)


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
        raise ValueError(f"history must be a list of [question, answer], not {shown(history)}")
    for turn in history:
        if not isinstance(turn, list) or len(turn) != 2:
            raise ValueError(f"history must hold [question, answer], not {shown(turn)}")
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
    if chosen == rejected:
        raise Dropped(EQUAL_ANSWERS)
    # Whole conversations, which hold their prompt.
    if given is None or "assistant" not in (chosen[0]["role"], rejected[0]["role"]):
        common = _common_prefix(chosen, rejected)
        shared = chosen[:common]
        if prompt and prompt[-1]["content"].strip() not in [m["content"].strip() for m in shared]:
            raise ValueError("prompt is in neither conversation: leave the column out")
        prompt, chosen, rejected = shared, chosen[common:], rejected[common:]
        if not chosen or not rejected:
            raise Dropped(NO_ANSWER)
        if not prompt and chosen[0]["role"] == "assistant":
            raise ValueError(
                "it has no prompt, and chosen and rejected have no message in common: "
                "give the column prompt, or whole conversations"
            )
    prompt = _with_system(prompt, row, context)
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
    return Prompt(messages, columns, context.where)


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
    has = f"the row has {names_of(row)}"
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
    # The row's own names, where they are enough.
    needs = {"pairs": ("prompt", "chosen", "rejected"), "prompts": ("prompt",)}.get(
        want, ("prompt", "completion")
    )
    texts = [str(name) for name, value in row.items() if isinstance(value, str)]
    texts = texts if len(texts) >= len(needs) else ["question", "answer", "other"]
    example = ",".join(f"{name}={text}" for name, text in zip(needs, texts, strict=False))
    return (
        f"{has}, none of the known forms ({known}): name the columns, such as --columns {example}"
    )
