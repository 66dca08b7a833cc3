"""Conversations for tests, and a small model that answers some."""

from __future__ import annotations

import functools
import random

import torch
from torch.nn.functional import cross_entropy

from model import LLM
from runtime.data.chat import render, with_chat
from runtime.data.tokenizers import load_tokenizer
from tests.builders import tiny_config
from tests.builders_export import FAMILIES, GPT_OSS

IGNORE = -100
CHAT_BYTE = with_chat(load_tokenizer("byte"))
# With a factor of 1, llama.cpp's rounding of YaRN's ramp has no effect.
EXACT = FAMILIES | {"gpt-oss": GPT_OSS | dict(rope_scaling_factor=1.0)}
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


WORDS = ("cat", "dog", "sun", "tree", "ball", "hat", "boat", "bird", "cake", "frog")


def asked(rng: random.Random) -> list[dict]:
    """Return a chat of one or two questions about WORDS; the last has no answer yet."""
    messages = [{"role": "system", "content": "Be kind."}] if rng.random() < 0.5 else []
    for _ in range(rng.choice([0, 1])):
        messages += answered(rng.choice(WORDS))
    return [*messages, answered(rng.choice(WORDS))[0]]


def answered(word: str) -> list[dict]:
    return [
        {"role": "user", "content": f"A {word}?"},
        {"role": "assistant", "content": f"{WORDS[-1 - WORDS.index(word)]} é!"},
    ]


def chat_batch(rng: random.Random, tokenizer, rows: int, length: int):
    """Return ids and targets [rows, length] of random chats, one a row, padded on the right."""
    ids_BT = torch.zeros(rows, length, dtype=torch.int64)
    targets_BT = torch.full((rows, length), IGNORE)
    for row in range(rows):
        messages = asked(rng)
        word = messages[-1]["content"].removeprefix("A ").removesuffix("?")
        ids, is_target = render([*messages, answered(word)[1]], tokenizer)
        assert len(ids) <= length + 1
        # Each id is predicted at the one before it.
        for t, (i, target) in enumerate(zip(ids[1:], is_target[1:], strict=True)):
            ids_BT[row, t] = ids[t]
            targets_BT[row, t] = i if target else IGNORE
    return ids_BT, targets_BT


@functools.cache
def trained_chat(arch: str, context_length: int = 128) -> LLM:
    """Return a model that answers chats about WORDS, with BYTE's chat ids: a minute of training."""
    shapes = dict(
        vocabulary_size=CHAT_BYTE.vocabulary_size,
        context_length=context_length,
        d_model=64,
        num_heads=8,
        d_ff=64,
    )
    torch.manual_seed(0)
    model, rng = LLM(tiny_config(**shapes | EXACT[arch])), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0)
    for _ in range(400):
        ids_BT, targets_BT = chat_batch(rng, CHAT_BYTE, 16, 96)
        logits_BTV = model(ids_BT).logits
        loss = cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORE)
        if loss < 0.02:
            return model.eval()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    raise AssertionError(f"400 steps were not enough: loss {loss.item():.2g}")
