"""What it costs to train on two ranks instead of in one process, on the same two cores.

    python -m benchmarks.ranks
    python -m benchmarks.ranks --tokens 1024 --sides "one process" "FSDP"

No claim of speed: two ranks on one machine share its cores and its memory's bandwidth, and gloo
copies through them. It bounds what is wasted. A step has two micro-batches, and all sides take the
same ones: one process with two threads; two processes that share nothing, each with a thread and a
micro-batch, as the limit of what ranks can reach; two ranks with FSDP, and with experts on both.
The model has 81 M parameters (d_model 256, 6 blocks, 32 experts of 512), in float32, with AdamW.

Sides take turns, each in steps after one to warm up. A turn during which other processes used more
than 0.15 core is taken again. Collectives wait for the slower rank: that is counted as theirs.
CPU seconds are those of all processes of a side; a busy neighbour changes them less.
Saved: benchmarks/results/ranks_NAME.json.
"""

from __future__ import annotations

from runtime.base import process

# ruff: noqa: E402
process.before_torch()

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist

import train
from benchmarks.common import FOREIGN_CORES, cpu_clock, foreign_cores, save_results, summary
from config_model import ModelConfig, TrainConfig, total_parameters
from model import LLM
from runtime.base import cli
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.data.loader import micro_batches
from runtime.kernels.choose import choose_kernels
from runtime.training.optimizer import build_optimizer
from runtime.training.state import RecentLoss, RunState
from runtime.training.task import GivenTask
from tests.builders_ranks import Windows
from tests.ranks import run_on

MODEL = dict(
    d_model=256,
    transformer_blocks=6,
    num_heads=8,
    num_kv_heads=4,
    head_dim=32,
    num_experts=32,
    d_ff=512,
    top_k=2,
    context_length=512,
    vocabulary_size=8192,
    expert_activation="swiglu",
    expert_bias=False,
    out_proj_bias=False,
    head_bias=False,
    use_attention_bias=False,
    tie_embeddings=True,
)
RANKS = 2
# A turn may take this long: it makes a model of 81 M parameters and takes some steps.
TURN_SECONDS = 600
# torch.distributed's functions, those of before 2.13 too, and what their time is called.
COLLECTIVES = {
    "all_gather_single": "gather weights",
    "all_gather_into_tensor": "gather weights",
    "reduce_scatter_single": "sum gradients",
    "reduce_scatter_tensor": "sum gradients",
    "all_to_all_single": "exchange rows",
    "all_reduce": "agree",
    "all_gather": "agree",
}
SAME_LOSS = 1e-5


class Side(NamedTuple):
    """How the two micro-batches of a step are taken.

    processes, threads: of each. settings: of training. shares: whether the processes are ranks of
    one run.
    """

    processes: int
    threads: int
    shares: bool = True
    settings: dict = {}


SIDES = {
    "one process": Side(1, RANKS, shares=False),
    "nothing shared": Side(RANKS, 1, shares=False),
    "FSDP": Side(RANKS, 1),
    "FSDP, --shard none": Side(RANKS, 1, settings=dict(shard="none")),
    "--expert_parallel 2": Side(RANKS, 1, settings=dict(expert_parallel=RANKS)),
}

UNSHARED = ("one process", "nothing shared")


class Turn(NamedTuple):
    """What one process measured in its steps.

    seconds: of each step. parts: seconds per step by part. loss: the cross-entropy of the first
    step's micro-batches. clocks: cpu_clock before and after the timed steps.
    """

    seconds: list[float]
    parts: dict[str, float]
    loss: float
    clocks: tuple[tuple[float, float, float], tuple[float, float, float]]


# ------------------------------------------------------------------------------------- in the ranks
def turn(ranks: Ranks, side: Side, model: dict, sequences: int, steps: int) -> Turn:
    """Take steps, and one before them. model: its settings; sequences: of a micro-batch."""
    torch.set_num_threads(side.threads)
    process.keep_freed_memory()
    together = ranks if side.shares else ONE_PROCESS
    model_config = ModelConfig(**model)
    # Where nothing is shared, each process has a step of its own.
    micro = RANKS if side.shares or side.processes == 1 else 1
    config = TrainConfig(batch_size=sequences, grad_accum=micro, **side.settings)
    torch.manual_seed(0)
    llm = LLM(model_config)
    choose_kernels(llm, torch.device("cpu"), torch.float32)
    together.arrange(config.expert_parallel, config.shard, model_config.num_experts)
    together.shard(llm, torch.float32)
    optimizer = build_optimizer(llm, config, together)
    task = GivenTask(Windows(model_config, sequences), train.next_token_loss)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    recent = RecentLoss(RunState(), 0.0, torch.device("cpu"))
    llm.train()
    seconds, losses, clocks = [], [], []
    parts: dict[str, float] = {}
    with timed_parts(optimizer, parts):
        for step in range(steps + 1):
            if step == 1:
                parts.clear()
                clocks.append(cpu_clock())
            # The other process begins at sequence number `sequences` where nothing is shared.
            own = ranks.rank * sequences if micro == 1 else 0
            first = step * RANKS * sequences + own
            batches, divisor = micro_batches(
                *(task.given_loader, task.count, config, first, False),
                together.mine(config.grad_accum),
            )
            (divisor,) = together.sum_on_host(divisor)
            if side.processes > 1:
                dist.barrier()
            started = time.perf_counter()
            result = train.train_step(
                *(llm, task, batches, divisor, optimizer, scaler, recent, config, torch.float32),
                step=step,
                ranks=together,
            )
            seconds.append(time.perf_counter() - started)
            losses.append(result.sums["cross_entropy"].item())
        clocks.append(cpu_clock())
    torch.set_num_threads(1)
    parts = {name: total / steps for name, total in parts.items()}
    return Turn(seconds[1:], parts, losses[0], (clocks[0], clocks[1]))


@contextmanager
def timed_parts(optimizer: torch.optim.Optimizer, parts: dict[str, float]) -> Iterator[None]:
    """Add to `parts` the seconds that collectives and the optimizer's step take in here."""
    inside = False

    def timed(function: Callable, part: str) -> Callable:
        def call(*args, **kwargs):
            nonlocal inside
            if inside:
                return function(*args, **kwargs)
            inside, started = True, time.perf_counter()
            try:
                work = function(*args, **kwargs)
                if work is not None and kwargs.get("async_op"):
                    work.wait()
            finally:
                inside = False
                parts[part] = parts.get(part, 0.0) + time.perf_counter() - started
            return work

        return call

    with mock.patch.multiple(
        dist,
        **{
            name: timed(getattr(dist, name), part)
            for name, part in COLLECTIVES.items()
            if hasattr(dist, name)
        },
    ):
        optimizer.step = timed(optimizer.step, "optimizer")  # type: ignore[method-assign]
        yield


# ------------------------------------------------------------------------------------------ figures
class Measured(NamedTuple):
    """The turns of a side.

    seconds: of its steps. cpu_seconds: a step's, of all processes, one number a turn. parts: by
    part, one dict a turn. disturbed: whether other processes were busy.
    """

    seconds: list[float]
    cpu_seconds: list[float]
    parts: list[dict[str, float]]
    disturbed: bool
    discarded: int


def measured(
    names: list[str], tokens: int, rounds: int, steps: int, model: dict = MODEL
) -> dict[str, Measured]:
    """Return what each side's turns gave, undisturbed ones if there are enough of them."""
    sequences = tokens // model["context_length"]
    clean: dict[str, list[list[Turn]]] = {name: [] for name in names}
    spoilt: dict[str, list[tuple[float, list[Turn]]]] = {name: [] for name in names}
    losses = {}
    for _ in range(4 * rounds):
        for name in names:
            side = SIDES[name]
            if len(clean[name]) == rounds:
                continue
            turns = run_on(
                side.processes, turn, side, model, sequences, steps, seconds=TURN_SECONDS
            )
            losses[name] = loss_of(side, turns)
            foreign = foreign_in(turns)
            if foreign <= FOREIGN_CORES:
                clean[name].append(turns)
            else:
                spoilt[name].append((foreign, turns))
            print(
                f"{tokens:6,} tokens  {name:20} {statistics.median(slowest(turns)):6.2f} s a step, "
                f"others used {foreign:.2f} cores",
                flush=True,
            )
    first = losses[names[0]]
    for name, loss in losses.items():
        if abs(loss / first - 1) > SAME_LOSS:
            raise ValueError(f"{name} has another first loss than {names[0]}: {loss}, {first}")
    found = {}
    for name in names:
        missing = rounds - len(clean[name])
        by_noise = sorted(spoilt[name], key=lambda pair: pair[0])
        chosen = clean[name] + [turns for _, turns in by_noise[:missing]]
        found[name] = Measured(
            [seconds for turns in chosen for seconds in slowest(turns)],
            [own_cpu(turns) / steps for turns in chosen],
            [mean_parts(turns) for turns in chosen],
            missing > 0,
            len(spoilt[name]),
        )
    return found


def slowest(turns: list[Turn]) -> list[float]:
    """Return the seconds of each step until its last process was done."""
    return [max(times) for times in zip(*(one.seconds for one in turns), strict=True)]


def mean_parts(turns: list[Turn]) -> dict[str, float]:
    """Return the seconds of each part, the mean of the processes."""
    names = sorted({name for one in turns for name in one.parts})
    return {name: statistics.mean(one.parts.get(name, 0.0) for one in turns) for name in names}


def loss_of(side: Side, turns: list[Turn]) -> float:
    """Return the cross-entropy of a step's two micro-batches."""
    return turns[0].loss if side.shares else sum(one.loss for one in turns)


def foreign_in(turns: list[Turn]) -> float:
    """Return the cores that processes other than these used on average."""
    (wall, machine, _), (wall_after, machine_after, _) = turns[0].clocks
    return foreign_cores((wall, machine, 0.0), (wall_after, machine_after, own_cpu(turns)))


def own_cpu(turns: list[Turn]) -> float:
    """Return the CPU seconds of the timed steps, of all processes together."""
    return sum(one.clocks[1][2] - one.clocks[0][2] for one in turns)


def figures(found: dict[str, Measured]) -> dict[str, dict]:
    """Return a side's seconds by part, and its ratios to the sides that share nothing."""
    medians = {name: statistics.median(one.seconds) for name, one in found.items()}
    cpu = {name: statistics.median(one.cpu_seconds) for name, one in found.items()}
    result = {}
    for name, one in found.items():
        names = sorted({part for parts in one.parts for part in parts})
        parts = {p: statistics.median(x.get(p, 0.0) for x in one.parts) for p in names}
        result[name] = {
            "seconds": summary(one.seconds),
            "cpu_seconds": summary(one.cpu_seconds),
            "parts": parts | {"compute": max(medians[name] - sum(parts.values()), 0.0)},
            "ratio_to": {
                other: medians[name] / medians[other]
                for other in UNSHARED
                if other in medians and other != name
            },
            "cpu_ratio_to": {
                other: cpu[name] / cpu[other]
                for other in UNSHARED
                if other in cpu and other != name
            },
            "disturbed": one.disturbed,
            "discarded": one.discarded,
        }
    return result


def table(tokens: int, result: dict[str, dict]) -> str:
    """Return the figures of one size as a table in Markdown."""
    names = ["compute", *dict.fromkeys(COLLECTIVES.values()), "optimizer"]
    lines = [
        f"| {tokens:,} tokens a rank | s a step | x one process | x nothing shared | CPU s a step "
        f"| x one process | {' | '.join(names)} |",
        "|---" * (6 + len(names)) + "|",
    ]
    for name, one in result.items():
        ratios = [one["ratio_to"].get(other) for other in UNSHARED]
        cells = [name + " (machine was busy)" * one["disturbed"], f"{one['seconds']['median']:.2f}"]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
        ratio = one["cpu_ratio_to"].get("one process")
        cells += [f"{one['cpu_seconds']['median']:.2f}", "" if ratio is None else f"{ratio:.2f}"]
        cells += [f"{one['parts'][p]:.2f}" if p in one["parts"] else "" for p in names]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument("--name", default="cpu", help="the result is ranks_NAME.json (default cpu)")
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[8192, 1024],
        help="tokens of a rank's micro-batch, multiples of 512 (default: 8192 1024)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each side (default: 5)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps a turn (default: 2)")
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=[*SIDES], help="default: all of them"
    )
    args = parser.parse_args(argv)
    check(args)
    config = ModelConfig(**MODEL)
    result = {
        str(tokens): figures(measured(args.sides, tokens, args.rounds, args.steps))
        for tokens in args.tokens
    }
    for tokens, one in result.items():
        print(f"\n{table(int(tokens), one)}")
    parameters = total_parameters(config)
    save_results(
        f"ranks_{args.name}",
        {"parameters": parameters, "model": MODEL, "device": "cpu", "by_tokens": result},
    )
    return 0


def check(args: argparse.Namespace) -> None:
    """Raise ValueError for settings that cannot be measured."""
    context = MODEL["context_length"]
    if min(args.rounds, args.steps) < 1:
        raise ValueError(
            f"--rounds and --steps must be at least 1, not {args.rounds}, {args.steps}"
        )
    for tokens in args.tokens:
        if tokens < 1 or tokens % context:
            raise ValueError(f"--tokens {tokens} is no multiple of {context}, the context")
    if (os.cpu_count() or 1) < RANKS:
        raise ValueError(f"this needs {RANKS} cores, and there is 1")


if __name__ == "__main__":
    cli.run_main(main)
