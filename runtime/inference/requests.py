"""What predict.py is asked to answer: the prompts and messages of its flags and files."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

from config_model import PredictConfig
from runtime.data.chat import check_prompt
from runtime.data.formats import read_jsonl
from runtime.data.text_files import check_nuls, open_text
from runtime.inference.console import read_prompts
from runtime.inference.predictor import Prompt


def requested_prompts(prompt: str | None, config: PredictConfig) -> list[Prompt] | None:
    """Return the prompts of the flags; None: stdin. Raise ValueError if flags conflict."""
    given = [
        name
        for name, value in (
            ("prompt", prompt is not None),
            ("prompt_file", config.prompt_file),
            ("messages", config.messages),
        )
        if value
    ]
    if len(given) > 1:
        raise ValueError(f"give either {' or '.join(given)}, not both")
    if given and config.interactive:
        raise ValueError(
            "interactive asks for prompts itself: leave prompt, prompt_file and messages out"
        )
    if prompt is not None:
        return [prompt]
    if config.prompt_file:
        return list(read_prompts(config.prompt_file))
    if config.messages:
        return list(read_messages(config.messages))
    if config.num_samples > 1 and (config.interactive or sys.stdin.isatty()):
        raise ValueError(
            "num_samples is for a prompt or a prompt_file: leave it out in interactive mode"
        )
    return None


def read_messages(path: str) -> list[list[dict]]:
    """Return the conversations of a file; "-" is stdin.

    A conversation is a list of messages, or an object with them as "messages". The file is JSON of
    one or of a list of conversations, or JSON lines of them, in UTF-8, UTF-16 or UTF-32. Raise
    ValueError, with the line's number, for anything else, and if there is nothing to answer.
    """
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    name = "stdin" if path == "-" else path
    advice = "save the messages as UTF-8 text"
    with open_text(lambda: io.BytesIO(data), name, advice=advice) as file:
        text = file.read()
    check_nuls(text, name)
    rows = _rows(text, name)
    if not rows:
        raise ValueError(
            f'{name} holds no messages: write [{{"role": "user", "content": "..."}}] there'
        )
    conversations = []
    for where, row in rows:
        messages: Any = row.get("messages") if isinstance(row, dict) else row
        try:
            check_prompt(messages)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        conversations.append(messages)
    return conversations


def _rows(text: str, name: str) -> list[tuple[str, object]]:
    """Return (where, conversation) for each conversation of a file."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # One JSON value after the other.
        return list(read_jsonl(text.split("\n"), name))
    if not isinstance(value, list):
        return [(name, value)]
    if all(isinstance(row, dict) and "messages" not in row for row in value):
        return [(name, value)] if value else []
    return [(f"{name} conversation {n}", row) for n, row in enumerate(value, start=1)]
