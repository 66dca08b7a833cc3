"""runtime/posttraining/prompts.py: which prompts there are, and which one a sample gets."""

from __future__ import annotations

import pytest

from runtime.data.chat import prompt_ids, with_chat
from runtime.data.tokenizers import load_tokenizer
from runtime.posttraining import tasks
from runtime.posttraining.forms import Conversation, Prompt
from runtime.posttraining.prompts import FilePrompts, ToyPrompts, refilled

BYTE = with_chat(load_tokenizer("byte"))


def prompt(*texts: str, **columns) -> Prompt:
    roles = ["user", "assistant"] * len(texts)
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return Prompt(messages, columns, f"file.jsonl line {len(texts[0])}")


def some(count: int) -> list[Prompt]:
    return [prompt(f"question {i}", number=i) for i in range(count)]


def test_each_prompt_comes_once_an_epoch_in_another_order():
    prompts = FilePrompts(some(40), BYTE, 60)
    assert len(prompts) + len(prompts.held_out) == 40 and prompts.held_out
    N = len(prompts)
    epochs = [
        [prompts.asked(5, epoch * N + i).prompt.columns["number"] for i in range(N)]
        for epoch in range(2)
    ]
    assert epochs[0] != epochs[1] and sorted(epochs[0]) == sorted(epochs[1])
    held = {asked.prompt.columns["number"] for asked in prompts.held_out}
    assert len(set(epochs[0])) == N and not held & set(epochs[0])
    assert prompts.asked(6, 0) != prompts.asked(5, 0) or prompts.asked(6, 1) != prompts.asked(5, 1)
    assert prompts.asked(5, refilled(0, 1)) in [prompts.at(i) for i in range(N)]


def test_ids_end_where_the_answer_begins():
    asked = FilePrompts(some(3), BYTE, 60).asked(0, 0)
    assert asked.ids == prompt_ids(asked.prompt.messages, BYTE)
    raw = FilePrompts(some(3), load_tokenizer("byte"), 60, raw=True).asked(0, 0)
    assert raw.ids[1:] == BYTE.encode(raw.prompt.messages[0]["content"])


def test_long_prompts_are_dropped_cut_or_refused():
    long = [*some(4), prompt("first " * 4, "yes", "second")]
    most = len(prompt_ids(prompt("question 0").messages, BYTE))
    dropped = FilePrompts(long, BYTE, most)
    assert len(dropped) + len(dropped.held_out) == 4
    assert any("1 dropped: 1 longer than" in line for line in dropped.lines)
    cut = FilePrompts(long, BYTE, most, "cut_prompt")
    assert len(cut) + len(cut.held_out) == 5
    assert any("1 were too long and lost their oldest turns" in line for line in cut.lines)
    every = [*(cut.at(i) for i in range(len(cut))), *cut.held_out]
    assert prompt_ids([{"role": "user", "content": "second"}], BYTE) in [one.ids for one in every]
    # What the reward gets is whole.
    assert any(len(one.prompt.messages) == 3 for one in every)
    with pytest.raises(ValueError, match=r"file\.jsonl line 24 has .* tokens, and the context"):
        FilePrompts(long, BYTE, most, "refuse")
    with pytest.raises(ValueError, match="all 4 prompts of the examples are dropped"):
        FilePrompts(some(4), BYTE, 3)


def test_what_has_an_answer_is_no_prompt():
    with pytest.raises(ValueError, match="x line 1 has an answer"):
        FilePrompts([Conversation([], "x line 1")], BYTE, 60)


def test_embedded_requests_come_with_their_items():
    prompts = ToyPrompts(BYTE, 400, 10)
    assert len(prompts) == 10
    asked = prompts.asked(0, 3)
    assert asked.prompt.columns["items"] and asked.ids == prompt_ids(asked.prompt.messages, BYTE)
    assert asked.prompt.messages in [tasks.asked(tasks.request("rl", i)) for i in range(10)]
    with pytest.raises(ValueError, match="lower --max_new_tokens"):
        ToyPrompts(BYTE, 20, 10).asked(0, 0)


def test_a_prompt_that_cannot_be_written_is_named(monkeypatch):
    """A published model's template refuses some messages; its line lacked the file's."""

    def refuses(messages, tokenizer):
        raise ValueError("the chat template refuses these messages")

    monkeypatch.setattr("runtime.posttraining.prompts.prompt_ids", refuses)
    with pytest.raises(ValueError, match=r"^file\.jsonl line 10: the chat template refuses"):
        FilePrompts(some(3), BYTE, 60)
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"^file\.jsonl line 5: --raw continues one text"):
        FilePrompts([prompt("first", "yes", "second")], BYTE, 60, raw=True)
