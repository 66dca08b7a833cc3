"""A published model's chat template: messages -> ids, and which of them are targets.

A template is a jinja2 program that writes a chat as text with the words of special tokens. What it
knows is what transformers gives it: messages, add_generation_prompt, the special tokens of
tokenizer_config.json, raise_exception, strftime_now and tojson.

Where a model is asked, such words in a message's own text stay text: else a message could end
itself and begin one of another role. In training they become special tokens, as in transformers:
there the template's text does not tell who wrote them.

Answers are found by prefixes: what the template writes for the messages before an answer, with the
header of the next, must be the beginning of what it writes with the answer.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Sequence

from runtime.data.hf_tokenizer import HuggingFaceTokenizer
from runtime.data.tokenizer import Tokenizer

# Keys of tokenizer_config.json that a template may name, as transformers hands them over.
_SPECIALS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
# Keys of a message that are ours.
_OURS = ("train", "weight")


def find_source(tokenizer: Tokenizer) -> str:
    """Return a published model's chat template; "" if it has none, as no tokenizer of ours has.

    An older tokenizer_config.json may hold several templates; one of them is named "default".
    """
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        return ""
    source = tokenizer.config.get("chat_template")
    if isinstance(source, list):
        named = (one for one in source if isinstance(one, dict) and one.get("name") == "default")
        source = next(named, {}).get("template")
    return source if isinstance(source, str) else ""


def source_of(tokenizer: Tokenizer) -> str:
    """Return a published model's chat template. Raise ValueError if it has none."""
    source = find_source(tokenizer)
    if not source:
        raise ValueError(
            f"tokenizer {tokenizer.name} has no chat template: import the chat form of this "
            "model, or put a chat_template.jinja into its folder and import it again"
        )
    return source


def prompt_ids(messages: Sequence[dict], tokenizer: HuggingFaceTokenizer) -> list[int]:
    """Return the ids that ask for an answer to the messages. Raise a one-line ValueError."""
    guarded = [
        {
            key: tokenizer.guarded(value) if isinstance(value, str) else value
            for key, value in message.items()
        }
        for message in messages
    ]
    text = _text(guarded, tokenizer, asks=True)
    if guarded == [*messages] and not tokenizer.finds_specials_elsewhere:
        return tokenizer.encode_with_specials(text)
    return tokenizer.encode_guarded(text)


def render(
    messages: Sequence[dict], trained: Sequence[bool], tokenizer: HuggingFaceTokenizer
) -> tuple[list[int], list[bool]]:
    """Return a conversation's ids, and for each whether it is a target.

    trained: of each message, whether its text and the stop id after it are targets. Raise
    ValueError if the template writes a part of the chat in another way than it does alone.
    """
    encode = tokenizer.encode_with_specials
    ids = encode(_text(messages, tokenizer))
    is_target = [False] * len(ids)
    for number in (i for i, is_answer in enumerate(trained) if is_answer):
        if number == 0:
            raise ValueError("the first message is an answer: a template has no prompt before it")
        before = encode(_text(messages[:number], tokenizer, asks=True))
        through = encode(_text(messages[: number + 1], tokenizer))
        if through[: len(before)] != before or ids[: len(through)] != through:
            raise ValueError(
                f"message {number + 1}: the chat template of {tokenizer.name} writes the answer in "
                "another way than its prompt, or than within the whole chat (as one that leaves "
                "out earlier thoughts): train on the last answer, or change the template"
            )
        stops = [i for i in range(len(before), len(through)) if through[i] in tokenizer.stop_ids]
        # What follows the stop id is the template's, such as a line break.
        end = stops[-1] + 1 if stops else len(through)
        is_target[len(before) : end] = [True] * (end - len(before))
    return ids, is_target


def _text(messages: Sequence[dict], tokenizer: HuggingFaceTokenizer, asks: bool = False) -> str:
    """Return what the template writes. asks: with the header of an answer at the end."""
    config = tokenizer.config
    specials = {
        key: value.get("content") if isinstance(value, dict) else value
        for key in _SPECIALS
        if (value := config.get(key)) is not None
    }
    plain = [{k: v for k, v in m.items() if k not in _OURS and v is not None} for m in messages]
    template, errors = _compiled(source_of(tokenizer), tokenizer.name)
    try:
        return template.render(
            messages=plain,
            add_generation_prompt=asks,
            strftime_now=(tokenizer.now or datetime.datetime.now()).strftime,
            **specials,
        )
    except errors as error:
        line = " ".join(str(error).split())
        raise ValueError(
            f"the chat template of {tokenizer.name} refuses these messages: {line}"
        ) from None


@functools.lru_cache(maxsize=16)
def _compiled(source: str, name: str):
    """Return the template, and what rendering it may raise. Raise a one-line ValueError."""
    try:
        import jinja2.ext
        import jinja2.sandbox
    except ImportError:
        raise ValueError(f"the chat template of {name} needs jinja2: pip install jinja2") from None

    class Generation(jinja2.ext.Extension):
        """Marks of what the assistant says, which change no text."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=line)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    # A template is a stranger's program.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.globals["raise_exception"] = refuse
    environment.filters["tojson"] = to_json
    # What a program may raise; a RecursionError is a RuntimeError.
    errors = (
        jinja2.TemplateError,
        TypeError,
        ValueError,
        LookupError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
    )
    try:
        return environment.from_string(source), errors
    except jinja2.TemplateError as error:
        line = " ".join(str(error).split())
        raise ValueError(f"the chat template of {name} cannot be read: {line}") from None
