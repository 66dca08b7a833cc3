"""Fine-tuning all weights against adapters: speed, peak memory, bytes of optimizer and file.

    python -m benchmarks.lora
    python -m benchmarks.lora --ckpt checkpoints/best.pt --name mine --lora_rank 16

Both sides are scripts.sft on the embedded tasks: the same rows, weights and settings, but for
--lora_rank, with AdamW. Their steps take turns; the rate counts all tokens of the rows. A step
during which other processes used more than 0.15 core is measured again (CPU). Peak memory is that
of a process of its own for each side: of all that it holds on a CPU, of PyTorch's tensors on a GPU.
Figures are medians; saved: benchmarks/results/lora_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import train
from benchmarks.common import alternate_undisturbed, run_worker, save_results, summary
from config_model import total_parameters
from runtime.base import cli
from runtime.base.device import device_name, peak_memory_bytes, synchronize
from runtime.base.files import write_text_atomic
from runtime.base.text import human_bytes
from runtime.checkpoint.adapter import saved_tensors
from runtime.checkpoint.optimizer_state import state_by_name
from runtime.data.loader import micro_batches
from runtime.inference.predictor import READY
from runtime.posttraining.flags import settings_of
from runtime.posttraining.sft import Sft, SftConfig
from runtime.training.plan import make_plan
from runtime.training.setup import set_up
from runtime.training.state import RecentLoss, RunState

SIDES = ("full", "lora")
# Of a process whose memory is read: the second step has everything.
WORKER_STEPS = 3


class Side:
    """A run of scripts.sft, one step at a time."""

    def __init__(self, args: argparse.Namespace, name: str, folder: str):
        flags = ["--init_from", args.ckpt, "--ckpt_dir", f"{folder}/{name}", "--graph_dir", folder]
        flags += ["--optimizer", "adamw", "--score_prompts", "0", "--device", args.device]
        flags += ["--batch_size", str(args.batch_size), "--num_threads", str(args.num_threads)]
        if name == "lora":
            flags += ["--lora_rank", str(args.lora_rank)]
        self.plan = make_plan(settings_of("", flags, SftConfig), Sft, SftConfig)
        self.model, self.optimizer, _ = set_up(self.plan, train.forward_backward)
        self.model.train()
        self.scaler = torch.amp.GradScaler(self.plan.device.type, enabled=False)
        self.recent = RecentLoss(RunState(), 0.0, self.plan.device)
        self.steps = 0

    def step(self) -> float:
        """Take the next step; return its tokens per second."""
        plan, config = self.plan, self.plan.config
        loader = plan.task.loader(plan.model_config, config)
        first = self.steps * config.batch_size * config.grad_accum
        batches, divisor = micro_batches(loader, plan.task.count, config, first, False)
        self.steps += 1
        started = time.perf_counter()
        train.train_step(
            self.model,
            plan.task,
            batches,
            divisor,
            self.optimizer,
            self.scaler,
            self.recent,
            config,
            plan.dtype,
        )
        synchronize(plan.device)
        seconds = time.perf_counter() - started
        return sum(batch[0].numel() for batch in batches) / seconds

    def sizes(self) -> dict[str, int]:
        """Return what is counted and not timed: parameters and bytes."""
        state = state_by_name(self.model, self.optimizer).values()
        saved = saved_tensors(self.model).values()
        optimizer_bytes = sum(tensor.nbytes for tensor in state)
        return {
            "trained_parameters": sum(
                p.numel() for group in self.optimizer.param_groups for p in group["params"]
            ),
            "optimizer_bytes": optimizer_bytes,
            "checkpoint_bytes": optimizer_bytes + sum(tensor.nbytes for tensor in saved),
        }


def worker(args: argparse.Namespace) -> dict:
    """Return the sizes of one side, and the peak memory of this process after a few steps."""
    with tempfile.TemporaryDirectory() as folder:
        side = Side(args, args.worker, folder)
        for _ in range(WORKER_STEPS):
            side.step()
        return side.sizes() | {"peak_bytes": peak_memory_bytes(side.plan.device)}


def compared(args: argparse.Namespace, argv: list[str]) -> tuple[dict[str, dict], Side]:
    """Return the figures of both sides by name, and one of them."""
    memory = {
        name: run_worker("benchmarks.lora", [*argv, "--worker", name], OMP_NUM_THREADS=None)
        for name in SIDES
    }
    with tempfile.TemporaryDirectory() as folder:
        sides = {name: Side(args, name, folder) for name in SIDES}
        functions: dict[str, Callable[[], float]] = {
            name: side.step for name, side in sides.items()
        }
        for function in functions.values():
            # Allocates what the first step needs.
            function()
        samples = alternate_undisturbed(functions, args.repeats)
    full = summary(samples["full"].values)["median"]
    figures = {
        name: memory[name]
        | {
            "tokens_per_s": (rates := summary(sample.values)),
            "times_full": rates["median"] / full,
            "discarded": sample.discarded,
            "disturbed": sample.disturbed,
        }
        for name, sample in samples.items()
    }
    return figures, sides["full"]


def make_parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument("--ckpt", default=str(READY), help="checkpoint (default: the one here)")
    parser.add_argument("--name", default="stories", help="name of the results (default: stories)")
    parser.add_argument("--lora_rank", type=int, default=16, help="rank (default: 16)")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a step (default: 8)")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each side (default: 7)")
    parser.add_argument(
        "--num_threads",
        type=int,
        default=0,
        help="CPU threads; 0 = the cores that this process may use (default: 0)",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--worker", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--worker_out", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    for name in ("lora_rank", "batch_size", "repeats"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(args, name)}")
    if args.worker:
        write_text_atomic(Path(args.worker_out), json.dumps(worker(args)))
        return 0
    given = sys.argv[1:] if argv is None else argv
    figures, side = compared(args, given)
    for name, figure in figures.items():
        print(
            f"{name:5} {figure['tokens_per_s']['median']:8.0f} tokens/s  "
            f"{figure['times_full']:5.2f} x full  peak {human_bytes(figure['peak_bytes'] or 0)}  "
            f"optimizer {human_bytes(figure['optimizer_bytes'])}  "
            f"checkpoint {human_bytes(figure['checkpoint_bytes'])}"
        )
    config = side.plan.model_config
    results = {
        "device": device_name(side.plan.device),
        "threads": torch.get_num_threads(),
        "dtype": side.plan.config.dtype,
        "model": dataclasses.asdict(config),
        "parameters": total_parameters(config),
        "ckpt": Path(args.ckpt).name,
        **{name: getattr(args, name) for name in ("lora_rank", "batch_size", "repeats")},
        "sides": figures,
    }
    save_results(f"lora_{args.name}", results)
    return 0


if __name__ == "__main__":
    cli.run_main(main)
