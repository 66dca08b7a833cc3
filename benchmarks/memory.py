"""Measure the memory of CPU training: its growth over the steps, its peak next to the estimate.

    python -m benchmarks.memory --name cpu
    python -m benchmarks.memory --name cpu \\
        --cost_of OLD    # a step's time, that checkout's in turns

Each figure comes from a process of its own, which takes train.py's path from the dry run to the
last step: memory that one setting keeps must not serve the next. Growth is of anonymous memory
(RssAnon in /proc/self/status), which leaves out the pages of libraries. Saved:
benchmarks/results/memory_NAME.json.
"""

from __future__ import annotations

from runtime.base import process
from runtime.training.plan import TrainPlan
from runtime.training.setup import dry_run
from runtime.training.task import GivenTask

# ruff: noqa: E402
process.before_torch()

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import train
from benchmarks.common import REPO, save_results
from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base import cli
from runtime.base.device import DTYPES
from runtime.kernels.choose import choose_kernels
from runtime.training.memory import training_memory_bytes
from runtime.training.optimizer import build_optimizer
from runtime.training.plots import draw_plots

EARLY, LATE = 3, 40  # steps after which the growth is measured
SECONDS = 600
MODEL = dict(
    d_model=128,
    transformer_blocks=2,
    num_heads=4,
    num_kv_heads=2,
    d_ff=2048,
    num_experts=8,
    top_k=2,
    context_length=128,
    vocabulary_size=2048,
    use_attention_bias=False,
    tie_embeddings=True,
    head_bias=False,
)
# Small, because what grew was oneDNN's kernels, whose size is not the model's. The settings that
# grew most come first.
SMALL = dict(d_model=64, d_ff=256, transformer_blocks=4)
GROWTH = [
    dict(
        model=SMALL | dict(expert_activation=activation),
        train=dict(optimizer=optimizer),
        dtype=dtype,
    )
    for optimizer in ("adamw", "muon")
    for activation, dtype in (
        ("gelu", "float32"),
        ("swiglu", "bfloat16"),
        ("gelu", "bfloat16"),
        ("swiglu_clamped", "bfloat16"),
        ("swiglu", "float32"),
        ("swiglu_clamped", "float32"),
        ("gelu", "float16"),
        ("swiglu", "float16"),
        ("swiglu_clamped", "float16"),
    )
]
# Five kinds of runs in which different parts of the estimate are the large ones.
PEAKS = {
    "gelu": dict(model=dict(transformer_blocks=4, context_length=256), dtype="float32"),
    "swiglu, muon, bfloat16": dict(
        model=dict(
            expert_activation="swiglu",
            qk_norm=True,
            d_ff=1024,
            expert_bias=False,
            transformer_blocks=4,
            context_length=256,
        ),
        train=dict(optimizer="muon", grad_accum=2),
        dtype="bfloat16",
    ),
    "learned table": dict(
        model=dict(use_attention_bias=True, d_ff=256, context_length=512), dtype="float32"
    ),
    "clamped, checkpointing": dict(
        model=dict(
            expert_activation="swiglu_clamped", d_ff=1024, transformer_blocks=4, context_length=512
        ),
        train=dict(activation_checkpointing=True, state_dtype="bfloat16"),
        dtype="float32",
    ),
    "large vocabulary": dict(
        model=dict(vocabulary_size=60_000, d_ff=256, tie_embeddings=False, head_bias=True),
        dtype="bfloat16",
    ),
}


# --------------------------------------------------------------------- in a process of its own
class _Batches:
    """Endless random tokens, rare ones among them: each batch is routed in another way."""

    def __init__(self, config: ModelConfig, batch_size: int):
        self.config, self.batch_size = config, batch_size

    def batch(self, first: int) -> tuple[torch.Tensor, torch.Tensor]:
        generator = torch.Generator().manual_seed(first)
        shape = (self.batch_size, self.config.context_length + 1)
        ids = (torch.rand(shape, generator=generator) ** 3 * self.config.vocabulary_size).long()
        return ids[:, :-1], ids[:, 1:]


def _status(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name + ":"))


def train_and_measure(setting: dict) -> dict:
    """Train as train.py does and say what this process held: bytes, and CPU seconds a step."""
    program = _status("VmHWM")
    torch.set_num_threads(setting.get("threads", 1))
    process.keep_freed_memory()
    model_config = ModelConfig(**MODEL | setting.get("model", {}))
    config = TrainConfig(
        **dict(
            batch_size=4,
            grad_accum=1,
            max_steps=setting.get("steps", LATE),
            warmup_steps=1,
            lr=1e-3,
            log_interval=1,
            device="cpu",
        )
        | setting.get("train", {})
    )
    cpu, dtype = torch.device("cpu"), DTYPES[setting["dtype"]]
    torch.manual_seed(0)
    model = LLM(model_config)
    task = GivenTask(_Batches(model_config, config.batch_size), train.next_token_loss)
    plan = TrainPlan(model_config, config, cpu, dtype, task, None, [])
    choose_kernels(model, cpu, dtype)
    model.activation_checkpointing = config.activation_checkpointing
    optimizer = build_optimizer(model, config)
    dry_run(model, optimizer, plan, train.forward_backward)
    anonymous, seconds, started = [], [], [time.process_time()]

    def on_step() -> None:
        anonymous.append(_status("RssAnon"))
        seconds.append(time.process_time() - started[0])
        started[0] = time.process_time()

    records: list[dict] = []
    hooks = train.Hooks(on_log=records.append, on_step=on_step)
    train.fit(model, task, config, hooks, optimizer=optimizer, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        # As at two saves of a run: what the first leaves is in the second's way.
        for _ in range(2):
            draw_plots(records, folder, config.max_steps)
            process.give_back_memory()
    needed = training_memory_bytes(model_config, config, dtype.itemsize)
    return {
        "program": program,
        "peak": _status("VmHWM"),
        "announced": sum(needed.values()),
        "parts": needed,
        "anonymous": anonymous,
        "cpu_seconds": statistics.median(seconds[EARLY:] or seconds),
    }


# -------------------------------------------------------------------------- and from outside
def measured(setting: dict, checkout: Path = REPO) -> dict:
    """train_and_measure in a process of its own, with a checkout's code.

    RuntimeError if it fails.
    """
    # -P: this file's folder, which has a train.py of its own, is no place for modules.
    command = [sys.executable, "-P", str(Path(__file__).resolve()), "--one", json.dumps(setting)]
    env = os.environ | {"PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=checkout, env=env, capture_output=True, text=True, timeout=SECONDS
    )
    if done.returncode:
        raise RuntimeError(f"{setting} failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.splitlines()[-1])


def growth(setting: dict) -> float:
    """Anonymous memory after LATE steps over that after EARLY."""
    anonymous = measured(setting)["anonymous"]
    return anonymous[LATE - 1] / anonymous[EARLY - 1]


def _cost(old: Path, repeats: int) -> list[dict]:
    """CPU seconds a step, of an older checkout and of this one, in turns."""
    rows = []
    for activation in ("gelu", "swiglu"):
        for dtype in ("float32", "bfloat16"):
            setting = dict(
                model=dict(expert_activation=activation, transformer_blocks=2),
                dtype=dtype,
                steps=15,
            )
            seconds = {"old": [], "new": []}
            for _ in range(repeats):
                for name, checkout in (("old", old), ("new", REPO)):
                    seconds[name].append(measured(setting, checkout)["cpu_seconds"])
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            rows.append(
                {"setting": setting, "seconds": seconds, "ratio": medians["old"] / medians["new"]}
            )
            print(
                f"{activation} {dtype}: {medians['old']:.3f} s before, {medians['new']:.3f} s now",
                flush=True,
            )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--name", help="results go to benchmarks/results/memory_NAME.json")
    parser.add_argument(
        "--cost_of", help="an older checkout, whose steps are timed in turns with this one's"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, help="processes of each side (default: 3)"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(train_and_measure(json.loads(args.one))))
        return 0
    if not args.name:
        raise ValueError("give --name NAME (of the machine)")
    results = {"growth": [], "peaks": [], "cost": []}
    for setting in GROWTH:
        anonymous = measured(setting)["anonymous"]
        row = {"setting": setting, "early": anonymous[EARLY - 1], "late": anonymous[LATE - 1]}
        results["growth"].append(row | {"ratio": row["late"] / row["early"]})
        print(
            f"{setting}: x {row['late'] / row['early']:.3f}, {row['late'] / 2**20:.0f} MiB",
            flush=True,
        )
    for name, setting in PEAKS.items():
        found = measured(setting | {"steps": 4})
        results["peaks"].append({"name": name, "setting": setting} | found)
        print(
            f"{name}: {found['peak'] / 2**20:.0f} MiB, announced {found['announced'] / 2**20:.0f}",
            flush=True,
        )
    if args.cost_of:
        results["cost"] = _cost(Path(args.cost_of).resolve(), args.repeats)
    save_results(f"memory_{args.name}", results)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
