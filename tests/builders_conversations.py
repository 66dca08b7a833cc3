"""Rows of chat files in every form, with what must be learned of them, written down by hand."""

from __future__ import annotations

import random

from runtime.data.tokenizer import Tokenizer

# What a careless layout would read as its own marks, or merge across a border.
PIECES = (
    "the cat",
    " sat.",
    "<|end|>",
    "\n\n",
    " ",
    "don't",
    "é",
    "灯台",
    "😀",
    "<",
    "10:45",
    "[x]",
)
# (role, text, whether it is learned)
Said = tuple[str, str, bool]


def text(r: random.Random) -> str:
    """Return a text that is not blank."""
    return r.choice("abcde") + "".join(r.choices(PIECES, k=r.randrange(8)))


def _turns(r: random.Random, flags: bool) -> list[Said]:
    """Return a conversation that ends with an answer, at least one of them learned."""
    said: list[Said] = [("system", text(r), False)] if r.random() < 0.4 else []
    for _ in range(r.randint(1, 4)):
        said.append(("user", text(r), False))
        said.append(("assistant", text(r), not flags or r.random() < 0.6))
    if not any(learned for *_, learned in said):
        said[-1] = (*said[-1][:2], True)
    return said


def _messages(said: list[Said]) -> list[dict]:
    return [{"role": role, "content": content} for role, content, _ in said]


def openai(r: random.Random) -> tuple[dict, list[Said]]:
    """Messages, some of whose answers are not learned."""
    said = _turns(r, flags=True)
    messages = _messages(said)
    for message, (role, _, learned) in zip(messages, said, strict=True):
        if role == "assistant" and not learned:
            message |= r.choice([{"train": False}, {"weight": 0}])
        elif role == "assistant":
            message |= r.choice([{}, {"train": True}, {"weight": 1}])
        if r.random() < 0.2:
            message["content"] = [
                {"type": "text", "text": part}
                for part in (message["content"][:1], message["content"][1:])
            ]
    return {"messages": messages, "id": r.random()}, said


def sharegpt(r: random.Random) -> tuple[dict, list[Said]]:
    said = _turns(r, flags=False)
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {
        "conversations": [{"from": names[role], "value": content} for role, content, _ in said]
    }, said


def alpaca(r: random.Random) -> tuple[dict, list[Said]]:
    row = {"instruction": text(r), "input": r.choice(["", text(r)]), "output": text(r)}
    said: list[Said] = []
    if r.random() < 0.3:
        row["system"] = text(r)
        said.append(("system", row["system"], False))
    if r.random() < 0.3:
        row["history"] = [[text(r), text(r)] for _ in range(r.randint(1, 2))]
        for question, answer in row["history"]:
            said += [("user", question, False), ("assistant", answer, True)]
    asked = row["instruction"] + ("\n\n" + row["input"] if row["input"] else "")
    return row, [*said, ("user", asked, False), ("assistant", row["output"], True)]


def completion(r: random.Random) -> tuple[dict, list[Said]]:
    row = {"prompt": text(r), "completion": text(r)}
    return row, [("user", row["prompt"], False), ("assistant", row["completion"], True)]


def completion_messages(r: random.Random) -> tuple[dict, list[Said]]:
    """Prompt and completion as messages: answers within the prompt are not learned."""
    said = _turns(r, flags=False)
    row = {"prompt": _messages(said[:-1]), "completion": _messages(said[-1:])}
    return row, [(*each[:2], False) for each in said[:-1]] + said[-1:]


CONVERSATIONS = (openai, sharegpt, alpaca, completion, completion_messages)


def pair(r: random.Random) -> tuple[dict, list[list[Said]]]:
    """A row of chosen and rejected answers in one of the forms, and both conversations."""
    said = [(*each[:2], False) for each in _turns(r, flags=False)]
    prompt, form = said[:-1], r.randrange(3)
    if form == 0:
        prompt = [("user", text(r), False)]
    sides = [[*prompt, ("assistant", f"{better} {text(r)}", True)] for better in ("yes", "no")]
    if form == 0:
        row = {"prompt": prompt[0][1], "chosen": sides[0][-1][1], "rejected": sides[1][-1][1]}
    elif form == 1:
        row = {"prompt": _messages(prompt)} | {
            name: _messages(side[-1:])
            for name, side in zip(("chosen", "rejected"), sides, strict=True)
        }
    else:
        row = {
            name: _messages(side) for name, side in zip(("chosen", "rejected"), sides, strict=True)
        }
    return row, sides


def laid_out(said: list[Said], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Return the ids of a conversation and which are learned, up to the last one."""
    chat = tokenizer.chat
    ids, learned = [tokenizer.start_id], [False]
    for role, content, is_learned in said:
        header = [chat.start, *tokenizer.encode(role), chat.message]
        body = [*tokenizer.encode(content), chat.end]
        ids += header + body
        learned += [False] * len(header) + [is_learned] * len(body)
    end = max(i for i, each in enumerate(learned) if each) + 1
    return ids[:end], learned[:end]
