"""Bases, data files and runs of post-training for tests: tiny, byte tokens, seconds."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from config_model import TrainConfig
from model import LLM
from runtime.checkpoint.write import save_checkpoint
from runtime.data.chat import with_chat
from runtime.data.tokenizers import load_tokenizer
from tests.builders import tiny_config

# Flags of a run that takes seconds.
QUICK = [
    *("--batch_size", "2", "--max_steps", "6", "--warmup_steps", "1", "--lr", "5e-3"),
    *("--min_lr", "5e-4", "--log_interval", "2", "--val_interval", "3", "--save_interval", "3"),
    *("--score_prompts", "4", "--max_new_tokens", "8", "--device", "cpu", "--dtype", "float32"),
    *("--num_threads", "1"),
]


def tiny_base(
    folder: Path, seed: int = 0, chats: bool = False, document_mask: bool = False, **config
) -> Path:
    """Write an untrained base model of byte tokens, and return its file.

    chats: with chat ids. document_mask: as if it had been trained so.
    """
    torch.manual_seed(seed)
    tokenizer = load_tokenizer("byte")
    tokenizer = with_chat(tokenizer) if chats else tokenizer
    values = dict(vocabulary_size=tokenizer.vocabulary_size, context_length=64) | config
    model = LLM(tiny_config(**values))
    return save_checkpoint(
        folder,
        7,
        model,
        None,
        train_config=TrainConfig(document_mask=document_mask),
        tokenizer_state=tokenizer.to_state(),
    )


def chats(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Write conversations of one or two turns, small sums, as JSON lines."""
    rows = []
    for i in range(seed, seed + count):
        messages = [
            {"role": "user", "content": f"{i} + 1?"},
            {"role": "assistant", "content": f"{i + 1}"},
        ]
        if i % 3 == 0:
            messages += [
                {"role": "user", "content": "and + 2?"},
                {"role": "assistant", "content": f"{i + 3}"},
            ]
        rows.append(json.dumps({"messages": messages}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def pairs(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Write small sums with a right and a wrong answer, as JSON lines."""
    rows = [
        {"prompt": f"{i} + 1?", "chosen": f"{i + 1}", "rejected": f"{i * 7}, or more"}
        for i in range(seed, seed + count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def in_folder(folder: Path) -> list[str]:
    """Return the flags that keep a run's files in a folder."""
    return [
        *("--ckpt_dir", str(folder / "ckpt"), "--graph_dir", str(folder / "graphs")),
        *("--data_dir", str(folder / "none")),
    ]
