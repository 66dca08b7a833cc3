"""Training runs for tests: text, flags, runs in a folder, losses that are not finite."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch

import prepare_data
import train
from config_model import ModelConfig, TrainConfig
from runtime.base import cli
from runtime.checkpoint.read import read_checkpoint
from runtime.training.task import GivenTask

MODEL = [
    "--d_model",
    "16",
    "--transformer_blocks",
    "1",
    "--num_heads",
    "2",
    "--num_kv_heads",
    "1",
    "--d_ff",
    "16",
    "--num_experts",
    "4",
    "--context_length",
    "16",
    "--expert_activation",
    "swiglu",
]
SPEED = [
    "--batch_size",
    "2",
    "--grad_accum",
    "2",
    "--warmup_steps",
    "3",
    "--lr",
    "1e-2",
    "--min_lr",
    "1e-3",
    "--log_interval",
    "2",
    "--val_interval",
    "4",
    "--val_steps",
    "2",
    "--save_interval",
    "1000",
    "--device",
    "cpu",
    "--dtype",
    "float32",
]


def write_text(path: Path, seed: int, documents: int = 60) -> Path:
    """Documents of made-up words that follow each other with some regularity, as JSON lines."""
    r = np.random.default_rng(seed)
    words = ["tom", "saw", "a", "red", "ball", "and", "ran", "home", "to", "mum", "sun", "sky"]
    lines = []
    for _ in range(documents):
        at, text = int(r.integers(12)), []
        for _ in range(20):
            at = (at + int(r.integers(1, 4))) % 12
            text.append(words[at])
        lines.append(json.dumps({"text": " ".join(text) + "."}))
    path.write_text("\n".join(lines))
    return path


def prepared(folder: Path) -> Path:
    """Write byte shards of made-up text, and return their folder."""
    code = prepare_data.main(
        [
            "--files",
            str(write_text(folder / "t.jsonl", 0)),
            "--val_files",
            str(write_text(folder / "v.jsonl", 1, 20)),
            "--tokenizer",
            "byte",
            "--out_dir",
            str(folder / "set"),
            "--num_proc",
            "1",
        ]
    )
    assert not code
    return folder / "set"


class Run:
    """`train.main` in a folder of its own."""

    def __init__(self, data: Path, folder: Path):
        self.ckpt_dir, self.graph_dir = folder / "ckpt", folder / "graphs"
        self.folders = [
            "--data_dir",
            str(data),
            "--ckpt_dir",
            str(self.ckpt_dir),
            "--graph_dir",
            str(self.graph_dir),
        ]

    def __call__(self, *flags: str, fresh: bool = True) -> int:
        return train.main([*(MODEL + SPEED if fresh else []), *self.folders, *map(str, flags)])

    def final(self):
        checkpoint = read_checkpoint(self.ckpt_dir / "latest.pt", optimizer=True)
        # The file may change below a map.
        copies = [
            {n: t.clone() for n, t in group.items()}
            for group in (checkpoint.model, checkpoint.optimizer)
        ]
        return dataclasses.replace(checkpoint, model=copies[0], optimizer=copies[1])

    def records(self) -> list[dict]:
        return [
            json.loads(line) for line in (self.graph_dir / "metrics.jsonl").read_text().splitlines()
        ]


def parsed(*flags):
    parser = cli.parser("")
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    return parser.parse_args(list(flags))


def settings_of(*flags: str) -> cli.Settings:
    return cli.settings_from(parsed(*flags), ModelConfig, TrainConfig)


class Fixed:
    """A loader over given tensors."""

    def __init__(self, inputs, targets, batch_size):
        self.inputs, self.targets, self.batch_size = inputs, targets, batch_size

    def batch(self, first):
        rows = torch.arange(first, first + self.batch_size) % len(self.inputs)
        return self.inputs[rows], self.targets[rows]


def poisoned(steps: set[int], where: str):
    """next_token_loss that is not finite at some calls."""
    calls = iter(range(10_000))

    def loss_fn(model, batch):
        out = train.next_token_loss(model, batch)
        if not model.training or next(calls) not in steps:
            return out
        bad = out.cross_entropy_sum * (math.nan if where == "loss" else 1.0)
        if where == "gradient":
            # Value 0, gradient infinite times 0.
            bad = bad + (model.embed.weight.sum() * 0).sqrt()
        return out._replace(cross_entropy_sum=bad)

    return loss_fn


def callers() -> list[str]:
    """Names of the functions that are being carried out, the innermost first."""
    frame, found = sys._getframe(1), []
    while frame:
        found.append(frame.f_code.co_name)
        frame = frame.f_back
    return found


def poison(monkeypatch, bad: range, how=lambda loss: loss * math.nan) -> list[int]:
    """Replace the loss of some training calls, and return the calls that were made.

    Calls are micro-batches; the two of the dry run are not counted.
    """
    real, calls, poisoned_calls = train.next_token_loss, [0], []

    def loss_fn(model, batch):
        out = real(model, batch)
        if model.training and "train_step" in callers():
            calls[0] += 1
            if calls[0] - 1 in bad:
                poisoned_calls.append(calls[0] - 1)
                return out._replace(cross_entropy_sum=how(out.cross_entropy_sum))
        return out

    monkeypatch.setattr(train, "next_token_loss", loss_fn)
    return poisoned_calls


def assert_same(a, b) -> None:
    """Two checkpoints, bit for bit: weights, optimizer, step, tokens, data position."""
    assert a.model.keys() == b.model.keys() and a.optimizer.keys() == b.optimizer.keys()
    assert all(torch.equal(a.model[n], b.model[n]) for n in a.model)
    assert all(torch.equal(a.optimizer[n], b.optimizer[n]) for n in a.optimizer)
    mine, theirs = (
        {k: v for k, v in c.run.items() if k not in ("run_id", "train_seconds", "window")}
        for c in (a, b)
    )
    assert mine == theirs and a.step == b.step


def comparable(records: list[dict]) -> list[dict]:
    """Metrics without what a clock put into them."""
    return [
        {
            k: v
            for k, v in r.items()
            if k
            not in ("run_id", "seconds", "tokens_per_sec", "waiting_share", "mfu", "memory_bytes")
        }
        for r in records
    ]


def fit(
    model,
    loader,
    config,
    loss_fn=train.next_token_loss,
    *,
    optimizer=None,
    state=None,
    val_batches=(),
    dtype=torch.float32,
    **hooks,
):
    """Call train.fit with a task of these parts; `hooks` are the fields of train.Hooks."""
    return train.fit(
        model,
        GivenTask(loader, loss_fn, val_batches),
        config,
        train.Hooks(**hooks),
        optimizer=optimizer,
        state=state,
        dtype=dtype,
    )
