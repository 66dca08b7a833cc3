"""Fine-tunings that are killed at any moment and restarted: SFT, adapters, DPO, GRPO."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from pathlib import Path

from tests.builders_posttraining import chats, tiny_base
from tests.promises import Promise, Tally
from tests.promises.runs import Command, home, killed_runs

STEPS = 8
FLAGS = [
    *("--batch_size", "2", "--grad_accum", "2", "--max_steps", str(STEPS), "--warmup_steps", "1"),
    *("--optimizer", "adamw", "--lr", "5e-3", "--min_lr", "1e-3", "--log_interval", "2"),
    *("--val_interval", "4", "--save_interval", "3", "--keep_last", "2", "--score_prompts", "2"),
    *("--max_new_tokens", "6", "--device", "cpu", "--dtype", "float32", "--num_threads", "1"),
]
# Part of the answers to a prompt earn more than the others, so that most steps move something.
REWARD = """
def digits(messages, text, **columns):
    return {"digits": sum(c.isdigit() for c in text) / 6, "short": float(len(text) < 6)}
"""


@functools.cache
def _base() -> Path:
    with contextlib.redirect_stdout(io.StringIO()):
        return tiny_base(home() / "base")


@functools.cache
def _file(kind: str) -> Path:
    """Return a file of conversations, pairs or prompts, or the one with the reward."""
    path = home() / f"{kind}.{'py' if kind == 'reward' else 'jsonl'}"
    if kind == "conversations":
        return chats(path)
    rows = []
    for i in range(40):
        prompt = {"prompt": f"{i} + 1?"}
        answers = {"chosen": f"{i + 1}", "rejected": "many"} if kind == "pairs" else {}
        rows.append(json.dumps(prompt | answers))
    path.write_text(REWARD if kind == "reward" else "\n".join(rows), encoding="utf-8")
    return path


def _flags(kind: str, *more: str) -> list[str]:
    return [*FLAGS, "--init_from", str(_base()), "--data", str(_file(kind)), *more]


def _rewarded() -> list[str]:
    groups = ("--group_size", "4", "--updates_per_rollout", "2", "--kl_coef", "0.01")
    return _flags("prompts", "--reward", f"{_file('reward')}:digits", *groups)


COMMANDS = [
    Command("SFT", "scripts.sft", lambda: _flags("conversations")),
    Command("LoRA", "scripts.sft", lambda: _flags("conversations", "--lora_rank", "4")),
    Command("DPO", "scripts.dpo", lambda: _flags("pairs")),
    Command("GRPO", "scripts.grpo", _rewarded),
]


def same_after_kills(count: int) -> Tally:
    """Kill runs of each kind, `count` times in all."""
    tally = Tally()
    for i, command in enumerate(COMMANDS):
        share = count // len(COMMANDS) + (i < count % len(COMMANDS))
        if not share:
            continue
        states, metrics = killed_runs(share, command=command)
        for found in (states, metrics):
            tally.tried += found.tried
            tally.held += found.held
            tally.failures += [f"{command.name}: {line}" for line in found.failures]
        tally.detail[f"kills of {command.name}"] = states.detail["kills"]
    return tally


PROMISES = [
    Promise(
        44,
        "A fine-tuning (SFT, LoRA, DPO, GRPO) killed (-9) at any moment and restarted: the same "
        "run, bit for bit",
        same_after_kills,
        2,
        80,
        80,
        "",
    ),
]
