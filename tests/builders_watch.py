"""Runs for tests of the pages of curves: what training writes, made up."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

from runtime.training.metrics import MetricsLog

MODEL = {
    "d_model": 128,
    "transformer_blocks": 4,
    "num_experts": 8,
    "top_k": 2,
    "d_ff": 256,
    "context_length": 256,
    "vocabulary_size": 4096,
    "num_heads": 4,
    "num_kv_heads": 2,
}
TOKENS_PER_STEP = 2048


def info_of(run_id: str, max_steps: int = 1000, **train: object) -> dict:
    """Return the "run" of a metrics.json."""
    return {
        "run_id": run_id,
        "model": MODEL,
        "train": {"max_steps": max_steps, "lr": 6e-3, "optimizer": "muon", **train},
        "source": {"tokenizer": "bpe:4096", "validation": "0123abcd"},
        "parameters": 1_500_000,
        "active_parameters": 800_000,
        "device": "cpu",
        "torch": "2.13.0",
        "command": "train.py --preset nano",
    }


def train_record(step: int, L: int = 4, E: int = 8, seed: int = 0, floor: float = 1.2) -> dict:
    """Return a training record as the loop makes it; the same for the same arguments."""
    r = random.Random(f"{seed} {step}")
    loss = floor + 7 * math.exp(-step / 150) + r.gauss(0, 0.03)
    load = [[math.exp(r.gauss(0, 0.25)) for _ in range(E)] for _ in range(L)]
    # One expert starves at first and recovers.
    load[0][1] = min(1.0, step / 600)
    return {
        "kind": "train",
        "step": step,
        "tokens_seen": TOKENS_PER_STEP * step,
        "loss": loss,
        "perplexity": math.exp(loss),
        "aux_loss": 0.02 + 0.001 * r.random(),
        "z_loss": 0.001,
        "lr": 6e-3 * min(1.0, step / 50),
        "grad_norm": abs(r.gauss(0.6, 0.2)),
        "tokens_per_sec": r.gauss(9_000, 300),
        "waiting_share": 0.01,
        "seconds": 0.25 * step,
        "skipped_steps": 0,
        "expert_load": load,
        "router_entropy": [1.9 - 0.1 * block for block in range(L)],
        "dropped_share": [0.0] * L,
    }


def val_record(step: int, floor: float = 1.3) -> dict:
    loss = floor + 7 * math.exp(-step / 150)
    return {
        "kind": "val",
        "step": step,
        "tokens_seen": TOKENS_PER_STEP * step,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": loss / math.log(2) / 4,
    }


class MadeRun:
    """A run in `folder` that a test continues: `train` appends records."""

    def __init__(
        self, folder: Path, run_id: str = "a", seed: int = 0, resume_step=None, **train: object
    ):
        self.folder, self.seed = folder, seed
        self.log = MetricsLog(folder, resume_step, info_of(run_id, **train))  # type: ignore

    def train(self, first: int, last: int, every: int = 10, **changes: object) -> MadeRun:
        """Append records of steps `first` to `last`, all of them multiples of `every`."""
        for step in range(first, last + 1, every):
            self.log.append(train_record(step, seed=self.seed) | changes)
            if step % (10 * every) == 0:
                self.log.append(val_record(step))
        return self

    def note(self, name: str, *notes: dict) -> MadeRun:
        """Append lines to events.jsonl or samples.jsonl."""
        with open(self.folder / f"{name}.jsonl", "a", encoding="utf-8") as file:
            file.writelines(json.dumps(one | {"run_id": self.log.run_id}) + "\n" for one in notes)
        return self


def write_long_run(folder: Path, records: int, L: int, E: int, seed: int = 0) -> Path:
    """Write a run of many blocks and experts, a record a step; faster than MadeRun."""
    folder.mkdir(parents=True)
    run_id = f"long-{seed}"
    some = [train_record(step, L, E, seed) for step in range(16)]
    for record in some:
        record["expert_load"] = [
            [float(f"{load:.6g}") for load in row] for row in record["expert_load"]
        ]
    with open(folder / "metrics.jsonl", "w", encoding="ascii") as file:
        for step in range(1, records + 1):
            record = some[step % 16] | {
                "step": step,
                "tokens_seen": TOKENS_PER_STEP * step,
                "seconds": 0.25 * step,
                "run_id": run_id,
            }
            file.write(json.dumps(record, separators=(",", ":")) + "\n")
    info = info_of(run_id, records)
    info["model"] |= {"transformer_blocks": L, "num_experts": E}
    (folder / "metrics.json").write_text(json.dumps({"run": info, "train": [], "val": []}))
    return folder
