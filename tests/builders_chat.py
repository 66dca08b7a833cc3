"""Conversations for tests."""

from __future__ import annotations

import random

# Pieces that a careless layout would read as its own marks, or merge across a border.
PIECES = (
    "the cat",
    " sat.",
    "<|end|>",
    "<|start|>assistant<|message|>",
    "<|endoftext|>",
    "\n\n",
    " ",
    "don't",
    "é",
    "灯台",
    "\N{FAMILY}\N{ZERO WIDTH JOINER}",
    "\0",
    "end|>",
    "<",
    "10:45",
)


def conversation(rng: random.Random, marks: bool = True) -> list[dict]:
    """Return random messages: up to nine, in any order of roles, with empty and untrained ones.

    marks False: without the words of special tokens, which other programs find in texts.
    """
    pieces = [piece for piece in PIECES if marks or "<|" not in piece]

    def text() -> str:
        return "".join(rng.choices(pieces, k=rng.randrange(6)))

    messages: list[dict] = []
    if rng.random() < 0.5:
        messages.append({"role": rng.choice(["system", "developer"]), "content": text()})
    for _ in range(rng.randrange(1, 5)):
        messages.append({"role": "user", "content": text()})
        # Two answers in a row too.
        for _ in range(rng.choice([1, 1, 1, 2])):
            flag = rng.choice([{}, {}, {"train": False}, {"train": True}, {"weight": 0}])
            messages.append({"role": "assistant", "content": text()} | flag)
    if rng.random() < 0.2:
        messages.append({"role": "user", "content": text()})
    return messages
