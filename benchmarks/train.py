"""Whole training steps (forward, backward, clipping, AdamW): tokens/s, MFU, memory and where the
time goes, ours and others'.

    python -m benchmarks.train --name cpu_4x512 --d_model 256 --transformer_blocks 6 \\
        --num_heads 8 --num_kv_heads 4 --d_ff 512 --vocabulary_size 8192 \\
        --context_length 512 --batch_size 4 --grad_accum 1 --expert_activation swiglu \\
        --no-expert_bias --no-out_proj_bias --no-head_bias --no-use_attention_bias
    python -m benchmarks.train --name default_gpu --batch_size 16 --grad_accum 1 \\
        --variants ours,ours_compiled,loop

Takes every flag of train.py. The data are windows of the shards in --data_dir or GPTOSS_DATA, or
random ids where neither is given. All sides have the same weights at the start, tokens, arithmetic,
optimizer, threads and allocator, and must agree on the first step's loss. Ours runs in `train.fit`,
as users run it. On a CPU all variants are in one process and take turns; a sample during which
other processes used more than 0.15 core is measured again. On a GPU they follow one another.
Figures are medians; they go to benchmarks/results/train_NAME.json.
"""

from __future__ import annotations

from runtime.base import process
from runtime.data.loader import WindowLoader
from runtime.training.plan import TrainPlan, with_loss_rows
from runtime.training.setup import set_up
from runtime.training.state import RunState
from runtime.training.task import GivenTask

# ruff: noqa: E402
process.before_torch()  # what it sets is read when torch loads

import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

import model as model_module
import train
from benchmarks.baselines import LoopMoE, build_hf, check_hf, check_loop, dense_config
from benchmarks.common import (
    Samples,
    alternate_undisturbed,
    peak_resident_bytes,
    run_worker,
    save_results,
    summary,
)
from config_model import (
    ModelConfig,
    TrainConfig,
    active_parameters,
    flops_per_token,
    total_parameters,
)
from model import LLM
from runtime.base import cli
from runtime.base.device import (
    autocast,
    choose_device,
    choose_dtype,
    device_name,
    is_out_of_memory,
    make_deterministic,
    peak_flops,
    release_memory,
    synchronize,
)
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.base.text import human_bytes
from runtime.data.loader import prefetch
from runtime.data.shards import TokenShards, open_data
from runtime.kernels import choose, loss_in_c, newton_schulz, squares
from runtime.training.optimizer import build_adamw

VARIANTS = {
    "ours": "this repository, eager",
    "ours_compiled": "this repository with --compile",
    "ours_without_c": "this repository as without a C compiler: PyTorch's operations (a CPU)",
    "loop": (
        "the usual way: a Python loop over expert modules, all attention scores, all logits "
        "(benchmarks/baselines.py)"
    ),
    "hf_eager": (
        "transformers' Mixtral (Qwen3-MoE with qk_norm), experts_implementation eager, SDPA"
    ),
    "hf_grouped": "the same, experts_implementation grouped_mm",
    "hf_grouped_bf16": (
        "the same with weights, gradients and moments in bfloat16, for autocast does not reach "
        "grouped_mm: less precise than all others"
    ),
    "dense": "this repository, one expert of top_k * d_ff: equal active FLOPs",
    "dense_compiled": "the same with --compile",
}
DEFAULT_VARIANTS = ("ours", "ours_compiled", "loop", "hf_eager", "hf_grouped", "dense")
RATIOS_TO = ("loop", "hf_grouped", "ours_without_c")
# Others than ours have no Muon.
SAME_ON_ALL_SIDES = dict(
    optimizer="adamw",
    state_dtype="float32",
    micro_batch="batch_size",
    document_mask=False,
    compile=False,
    profile=False,
    resume=False,
    init_from="",
)
WARM_UP_STEPS = 2
GEMM_SIZE = 1024  # rows and columns on a CPU; four times as many on a GPU
PROFILED_STEPS = 3
OPENMP_SPIN_COUNT = (
    "300000"  # what GNU OpenMP takes where GOMP_SPINCOUNT is not set (libgomp manual, 4.19)
)


# --------------------------------------------------------------------------------- what is measured
class RandomTokens:
    """Uniformly random ids in the place of a split's shards."""

    end_of_text_id, folder = 0, "random ids"

    def __init__(self, vocabulary_size: int, num_tokens: int, seed: int):
        self.vocabulary_size, self.num_tokens = vocabulary_size, num_tokens
        self._ids = np.random.default_rng(seed).integers(
            vocabulary_size, size=num_tokens, dtype=np.uint32
        )

    def read(self, start: int, count: int) -> np.ndarray:
        """As TokenShards.read."""
        return self._ids[start : start + count].astype(np.int64)


@dataclass(frozen=True)
class Setting:
    """What is the same for all variants."""

    model_config: ModelConfig
    config: TrainConfig
    device: torch.device
    dtype: torch.dtype
    tokens: TokenShards | RandomTokens
    ranks: Ranks = ONE_PROCESS

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return self.config.batch_size * self.config.grad_accum


def make_setting(args: argparse.Namespace) -> Setting:
    """Flags -> setting. ValueError for what cannot be compared."""
    settings = cli.settings_from(args, ModelConfig, TrainConfig)
    config, model_config = settings.build(TrainConfig), settings.build(ModelConfig)
    names = (getattr(args, "variants", None) or "loop").split(",")
    only_ours = all(name.startswith(("ours", "dense")) for name in names)
    for name, value in SAME_ON_ALL_SIDES.items():
        if getattr(config, name) != value and not (name == "optimizer" and only_ours):
            hint = ": compiled or not is chosen by --variants" if name == "compile" else ""
            raise ValueError(
                f"this benchmark runs with {name} {value!r} on all sides, not "
                f"{getattr(config, name)!r}{hint}"
            )
    if args.allocator == "tuned":  # as train.make_plan
        torch.set_num_threads(
            config.num_threads or min(torch.get_num_threads(), process.usable_cores())
        )
        process.keep_freed_memory()
    elif config.num_threads:
        torch.set_num_threads(config.num_threads)
    if config.deterministic:
        make_deterministic()
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    if dtype == torch.float16:
        raise ValueError("the baselines have no loss scaling: choose --dtype bfloat16 or float32")
    data_dir = getattr(args, "data_dir", os.environ.get("GPTOSS_DATA"))
    if data_dir is not None:
        tokens, _ = open_data(data_dir)
        if "vocabulary_size" not in settings.explicit:
            model_config = replace(model_config, vocabulary_size=tokens.vocabulary_size)
        if model_config.vocabulary_size < tokens.vocabulary_size:
            raise ValueError(
                f"vocabulary_size {model_config.vocabulary_size:,} is smaller than the data's "
                f"{tokens.vocabulary_size:,}: "
                "leave --vocabulary_size out"
            )
    else:
        tokens = random_tokens(model_config, config)
    config = replace(
        config, dtype=str(dtype).removeprefix("torch."), schedule="constant", warmup_steps=0
    )
    return Setting(model_config, config, device, dtype, tokens)


def random_tokens(model_config: ModelConfig, config: TrainConfig) -> RandomTokens:
    """Random ids for a few different steps."""
    return RandomTokens(
        model_config.vocabulary_size,
        16 * config.batch_size * config.grad_accum * model_config.context_length + 1,
        config.seed,
    )


class Ours:
    """Our model in our `fit`."""

    def __init__(self, setting: Setting, model_config: ModelConfig, compiled: bool = False):
        self.setting, self.model_config, self.compiled = setting, model_config, compiled
        loader = WindowLoader(
            setting.tokens,
            model_config.context_length,
            setting.config.batch_size,
            setting.config.seed,
        )
        plan = TrainPlan(
            model_config=model_config,
            config=replace(setting.config, compile=compiled),
            device=setting.device,
            dtype=setting.dtype,
            task=GivenTask(loader, train.next_token_loss),
            source=None,
            notes=[],
            ranks=setting.ranks,
        )
        # As train.py does on a GPU.
        plan = with_loss_rows(plan)
        self.task = plan.task
        self.model, self.optimizer, _ = set_up(plan, train.forward_backward)
        self.state = RunState()
        self.facts: dict = {}
        self.waiting_for_data = 0.0  # share of the last run's time

    def run(self, steps: int) -> float:
        """Train for `steps` steps more; returns their mean cross-entropy."""
        records: list[dict] = []
        config = replace(
            self.setting.config,
            max_steps=self.state.step + steps,
            log_interval=self.state.step + steps,
        )  # one log line, at the end
        self.state = train.fit(
            self.model,
            self.task,
            config,
            train.Hooks(on_log=records.append),
            optimizer=self.optimizer,
            state=self.state,
            dtype=self.setting.dtype,
            ranks=self.setting.ranks,
        )
        self.waiting_for_data = records[-1]["waiting_share"]
        return records[-1]["loss"]


@contextlib.contextmanager
def without_c() -> Iterator[None]:
    """Let no kernel in C be chosen, as on a machine without a compiler."""
    with contextlib.ExitStack() as stack:
        for module, name, value in (
            (choose, "_in_c", choose.InC()),
            (loss_in_c, "takes", False),
            (squares, "takes", False),
            (newton_schulz, "takes", False),
        ):
            stack.enter_context(mock.patch.object(module, name, return_value=value))
        yield


class OursWithoutC(Ours):
    """Our model in our `fit`, by PyTorch's operations."""

    def __init__(self, setting: Setting, model_config: ModelConfig):
        with without_c():
            super().__init__(setting, model_config)

    def run(self, steps: int) -> float:
        with without_c():
            return super().run(steps)


class Baseline:
    """Any `model(ids, targets) -> (mean cross-entropy, auxiliary losses)` in the plain loop that
    one writes for it.
    """

    def __init__(self, setting: Setting, model: nn.Module):
        self.setting, self.model_config, self.model = setting, setting.model_config, model.train()
        self.optimizer = build_adamw(model, setting.config)
        self.loader = WindowLoader(
            setting.tokens,
            setting.model_config.context_length,
            setting.config.batch_size,
            setting.config.seed,
        )
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self.samples_seen = 0
        self.rows = setting.config.batch_size  # sequences per micro-batch: fewer if they do not fit
        self.facts: dict = {}

    def run(self, steps: int) -> float:
        """As Ours.run; where the memory does not suffice for a micro-batch, it and all after it are
        done in halves.
        """
        total = 0.0
        batch_size, sequences = self.setting.config.batch_size, self.setting.sequences
        with contextlib.closing(
            prefetch(
                [self.loader.batch(first + i) for i in range(0, sequences, batch_size)]
                for first in range(
                    self.samples_seen, self.samples_seen + steps * sequences, sequences
                )
            )
        ) as stream:
            for batches in stream:
                while (loss := self._try_step(batches)) is None:
                    self.optimizer.zero_grad(set_to_none=True)
                    release_memory(self.setting.device)
                    self.rows //= 2
                    self.facts = {
                        "micro_batch_sequences": self.rows,
                        "micro_batch_why": f"out of memory with {2 * self.rows} of {batch_size}",
                    }
                total = total + loss
                self.samples_seen += sequences
        return (total / steps).item()

    def _try_step(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor | None:
        """One step; None if memory ran out in it and smaller micro-batches are possible."""
        try:
            return self._step(batches)
        except (RuntimeError, MemoryError) as error:
            if self.rows == 1 or not is_out_of_memory(error):
                raise
            return None

    def _step(self, batches: list[tuple[Tensor, Tensor]]) -> Tensor:
        setting, total = self.setting, 0.0
        for ids, targets in batches:
            for first in range(0, len(ids), self.rows):
                micro_batch = [
                    t[first : first + self.rows].to(setting.device) for t in (ids, targets)
                ]
                with autocast(setting.device, setting.dtype):
                    cross_entropy, auxiliary = self.model(*micro_batch)
                    share = len(micro_batch[0]) / setting.sequences
                    loss = (cross_entropy + auxiliary) * share
                loss.backward()
                total = total + cross_entropy.detach().float() * share
        if setting.config.grad_clip:
            nn.utils.clip_grad_norm_(self.parameters, setting.config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total


def why_not(name: str, setting: Setting) -> str | None:
    """Why this setting has no such variant, or None if it has."""
    if name not in VARIANTS:
        raise ValueError(f"unknown variant {name!r}: there are {', '.join(VARIANTS)}")
    try:
        if name == "loop":
            check_loop(setting.model_config)
        if name.startswith("hf"):
            check_hf(setting.model_config)
    except ValueError as error:
        return str(error)
    if name == "ours_without_c" and setting.device.type != "cpu":
        return "ours_without_c is for a CPU"
    return (
        "hf_grouped_bf16 needs --dtype bfloat16"
        if name == "hf_grouped_bf16" and setting.dtype != torch.bfloat16
        else None
    )


def build(name: str, setting: Setting, our_weights: bool = True) -> Ours | Baseline:
    """A variant, ready to run; with our initial weights unless only its memory counts."""
    config, compiled = setting.model_config, name.endswith("_compiled")
    if name == "ours_without_c":
        return OursWithoutC(setting, config)
    if name.startswith("ours"):
        return Ours(setting, config, compiled)
    if name.startswith("dense"):
        return Ours(setting, dense_config(config), compiled)
    with setting.device:
        baseline = (
            LoopMoE(config)
            if name == "loop"
            else build_hf(config, "eager" if name == "hf_eager" else "grouped_mm")
        )
        if our_weights:
            torch.manual_seed(setting.config.seed)  # as train.set_up makes them
            baseline.load_from(LLM(config))
    return Baseline(
        setting, baseline.to(setting.device, torch.bfloat16 if name == "hf_grouped_bf16" else None)
    )


def state_bytes(runner: Ours | Baseline) -> int:
    """Bytes of weights, their gradients and the optimizer's state."""
    weights = sum(p.nbytes for p in runner.model.parameters())
    return 2 * weights + sum(
        t.nbytes
        for state in runner.optimizer.state.values()
        for t in state.values()
        if isinstance(t, Tensor)
    )


# -------------------------------------------------------------------------------------------- speed
def seconds_per_step(runner: Ours | Baseline, steps: int) -> float:
    """Mean seconds of `steps` steps, the device's work included."""
    synchronize(runner.setting.device)
    started = time.perf_counter()
    runner.run(steps)
    synchronize(runner.setting.device)
    return (time.perf_counter() - started) / steps


def gemm_timer(setting: Setting, min_seconds: float) -> Callable[[], float]:
    """A function that returns seconds per FLOP of a large matrix product in the setting's
    arithmetic: the practical peak.
    """
    size = GEMM_SIZE if setting.device.type == "cpu" else 4 * GEMM_SIZE
    a, b = (torch.randn(size, size, device=setting.device).to(setting.dtype) for _ in range(2))

    def seconds(times: int) -> float:
        synchronize(setting.device)
        started = time.perf_counter()
        for _ in range(times):
            a @ b.T  # as in a linear layer
        synchronize(setting.device)
        return (time.perf_counter() - started) / times

    seconds(1)
    times = math.ceil(min_seconds / seconds(1))
    return lambda: seconds(times) / (2 * size**3)


def measure_speed(
    runners: dict[str, Ours | Baseline],
    setting: Setting,
    repeats: int,
    min_seconds: float,
    with_gemm: bool,
) -> dict[str, Samples]:
    """Seconds per step of each runner (and per FLOP of a matrix product, under the name gemm),
    taken in turns after a warm-up.

    A sample is as many steps as fill `min_seconds`. The first step's loss goes to the runner's
    facts.
    """
    functions: dict[str, Callable[[], float]] = {}
    for name, runner in runners.items():
        runner.facts["first_loss"] = runner.run(1)
        runner.run(WARM_UP_STEPS - 1)
        steps = math.ceil(min_seconds / seconds_per_step(runner, 1))
        runner.facts["steps_per_sample"] = steps
        functions[name] = lambda runner=runner, steps=steps: seconds_per_step(runner, steps)
    if with_gemm:
        functions["gemm"] = gemm_timer(setting, min_seconds)
    limit = (
        {} if setting.device.type == "cpu" else {"most_foreign_cores": math.inf}
    )  # a GPU does not mind a busy core
    return alternate_undisturbed(functions, repeats, **limit)


def check_same_model(first_losses: dict[str, float], setting: Setting) -> None:
    """ValueError unless all sides began with the same loss; the dense model is another one, and
    dropout draws other numbers.
    """
    losses = {name: loss for name, loss in first_losses.items() if not name.startswith("dense")}
    tolerance = 1e-4 if setting.dtype == torch.float32 else 1e-2
    if (
        losses
        and not setting.model_config.dropout
        and max(losses.values()) - min(losses.values()) > tolerance * max(losses.values())
    ):
        raise ValueError(
            f"the sides do not train the same model, their first losses differ: {losses}"
        )


# ------------------------------------------------------------------------------------------- memory
def cuda_peak_above_states(runner: Ours | Baseline) -> int:
    """Bytes that a step holds above weights, gradients and optimizer state, as PyTorch's allocator
    counts them.
    """
    torch.cuda.reset_peak_memory_stats(runner.setting.device)
    runner.run(1)
    return torch.cuda.max_memory_allocated(runner.setting.device) - state_bytes(runner)


def cpu_peak_above_states(name: str, setting: Setting) -> dict:
    """The same for a CPU, from the resident memory of this process, which should do nothing else;
    no peak where it cannot be asked.
    """
    runner = build(name, setting, our_weights=False)
    runner.run(WARM_UP_STEPS)
    peak = peak_resident_bytes(
        lambda: runner.run(2)
    )  # weights and optimizer state are there before
    gradients = sum(p.nbytes for p in runner.model.parameters())
    return {} if peak is None else {"peak_above_states_bytes": peak - gradients}


# ------------------------------------------------------------------------------------- time by part
PARTS = (
    "attention",
    "router",
    "experts",
    "loss",
    "optimizer",
    "data",
    "other",
    "waiting",
)  # other: embedding, norms, residuals, statistics
RANGES, BACKWARD = ("part:", "bench:"), "autograd::engine::evaluate_function"


@contextlib.contextmanager
def labelled_parts(runner: Ours):
    """Ranges for the profiler around the parts of our step.

    Blocks that were compiled are compiled in parts instead, for there are no ranges inside a
    compiled function.
    """

    def ranged(function: Callable, part: str) -> Callable:
        def call(*args, **kwargs):
            with torch.profiler.record_function(f"part:{part}"):
                return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:

        def label(owner, attribute: str, part: str) -> None:
            stack.enter_context(
                mock.patch.object(owner, attribute, ranged(getattr(owner, attribute), part))
            )

        for block in runner.model.layers:
            if runner.compiled:
                stack.enter_context(mock.patch.object(block, "_compiled_call_impl", None))
                for module in (block.attention, block.moe.router, block.moe.experts):
                    module.compile(fullgraph=True)
            label(
                block.attention,
                "_compiled_call_impl" if runner.compiled else "forward",
                "attention",
            )
            label(block.moe, "forward", "router")  # what else is left of it:
            label(block.moe, "dispatcher", "experts")
        label(model_module, "linear_cross_entropy", "loss")
        if hasattr(train, "to_device"):
            label(train, "to_device", "data")
        for name in ("get_total_norm", "clip_grads_with_norm_", "clip_grad_norm_"):
            label(nn.utils, name, "optimizer")
        if hasattr(train, "total_norm"):
            label(train, "total_norm", "optimizer")
        yield


def time_by_part(runner: Ours, steps: int = PROFILED_STEPS) -> dict:
    """Where the time of `fit` goes, by PyTorch's profiler: shares of the wall time that sum to 1.

    A backward operation belongs to the part whose forward operation made it (they share a sequence
    number). On a CPU time inside an operation counts for its part, and time between operations as
    waiting: for data, logging and Python. On a GPU kernels count for the part that launched them,
    and time without a kernel is waiting. The profiler itself costs time between operations, so on a
    CPU the share of waiting is an upper bound.
    """
    on_gpu = runner.setting.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [
        torch.profiler.ProfilerActivity.CUDA
    ] * on_gpu
    with labelled_parts(runner):
        runner.run(WARM_UP_STEPS)
        with (
            torch.profiler.profile(activities=activities) as profiler,
            torch.profiler.record_function("bench:steps"),
        ):
            runner.run(steps)
            synchronize(runner.setting.device)
    wall, seconds = seconds_of_parts(profiler.events(), on_gpu)
    return {
        "seconds_per_step_under_profiler": wall / steps,
        "steps": steps,
        "shares": {part: value / wall for part, value in seconds.items()},
        "waiting_for_data_share": runner.waiting_for_data,
    }


def what_tokens(tokens) -> str:
    """Return what a setting trains on, in words."""
    if isinstance(tokens, RandomTokens):
        return "random ids"
    return f"windows of {tokens.num_tokens:,} tokens ({tokens.tokenizer_state['name']})"


def seconds_of_parts(all_events: list, on_gpu: bool) -> tuple[float, dict[str, float]]:
    """(wall seconds, seconds by part) of what the profiler recorded inside the range bench:steps;
    see time_by_part.
    """
    events = [event for event in all_events if event.device_type == torch.autograd.DeviceType.CPU]
    whole = next(event for event in events if event.name == "bench:steps")
    wall = whole.time_range.elapsed_us() / 1e6
    # By sequence number: the last forward operation with a number is the one it was given to.
    part_of: dict[int, str] = {}
    seconds = dict.fromkeys(PARTS, 0.0)

    def note(event, part: str) -> None:
        part = _own_part(event.name) or part
        if event.sequence_nr >= 0:
            part_of[event.sequence_nr] = part
        for child in event.cpu_children:
            if not child.name.startswith(BACKWARD):
                note(child, part)

    def add(event, part: str) -> None:
        part = (
            part_of.get(event.sequence_nr, "other")
            if event.name.startswith(BACKWARD)
            else _own_part(event.name) or part
        )
        if on_gpu:  # a range has itself as a kernel
            seconds[part] += (
                sum(kernel.duration for kernel in event.kernels if kernel.name != event.name) / 1e6
            )
        else:
            alone = event.time_range.elapsed_us() - sum(
                child.time_range.elapsed_us() for child in event.cpu_children
            )
            seconds["waiting" if event.name.startswith(RANGES) else part] += alone / 1e6
        for child in event.cpu_children:
            add(child, part)

    note(whole, "other")
    # On a CPU the backward pass is in the same thread; on a GPU it has one of its own.
    for event in [e for e in events if e.cpu_parent is None] if on_gpu else [whole]:
        add(event, "other")
    if on_gpu:
        busy = (
            _covered(
                [
                    (e.time_range.start, e.time_range.end)
                    for e in all_events
                    if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation
                ]
            )
            / 1e6
        )
        seconds["other"] += busy - sum(seconds.values())
        seconds["waiting"] = wall - busy
    return wall, seconds


def _own_part(name: str) -> str | None:
    """The part that an event names by itself."""
    return (
        name.removeprefix("part:")
        if name.startswith("part:")
        else "optimizer"
        if name.startswith("Optimizer.")
        else None
    )


def _covered(intervals: list[tuple[float, float]]) -> float:
    """Length of the union of intervals."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# --------------------------------------------------------------------------------------- the report
def compare(setting: Setting, names: list[str], args: argparse.Namespace, flags: list[str]) -> dict:
    """Everything about every variant, as it is stored."""
    on_gpu = setting.device.type == "cuda"
    one_at_a_time = on_gpu if args.one_at_a_time is None else args.one_at_a_time
    peak = peak_flops(setting.device, setting.dtype)
    samples: dict[str, Samples] = {}
    gemm: list[float] = []
    facts: dict[str, dict] = {}
    parts: dict[str, dict] = {}
    failed: dict[str, str] = {}

    def attempt(what: str, function: Callable[[], None]) -> None:
        """What fails is recorded and told, and must not cost the rest its time on the machine."""
        try:
            function()
        except Exception as error:
            traceback.print_exc()
            failed[what] = " ".join(f"{type(error).__name__}: {error}".split())

    def measure(group: list[str]) -> None:
        runners = {name: build(name, setting) for name in group}
        measured = measure_speed(
            runners, setting, args.repeats, args.min_sample_seconds, with_gemm=peak is None
        )
        if "gemm" in measured:
            gemm.extend(measured.pop("gemm").values)
        mine = {
            name: runner.facts | {"state_bytes": state_bytes(runner)}
            for name, runner in runners.items()
        }
        check_same_model(
            {name: fact["first_loss"] for name, fact in (facts | mine).items()}, setting
        )
        samples.update(measured)
        facts.update(mine)
        for name, runner in runners.items():
            if on_gpu and one_at_a_time:
                facts[name]["peak_above_states_bytes"] = cuda_peak_above_states(runner)
            if args.parts and name.startswith("ours"):
                attempt(
                    f"time by part of {name}",
                    lambda name=name, runner=runner: parts.update({name: time_by_part(runner)}),
                )

    for group in [[name] for name in names] if one_at_a_time else [names]:
        attempt(", ".join(group), lambda group=group: measure(group))
        release_memory(setting.device)
        if one_at_a_time and "torch._dynamo" in sys.modules:
            # What the next variant compiles owes nothing to this one's shapes.
            torch.compiler.reset()
    if args.memory and setting.device.type == "cpu":
        for name in samples:
            attempt(
                f"memory of {name}",
                lambda name=name: facts[name].update(
                    run_worker(
                        "benchmarks.train", [*flags, "--variants", name, "--worker", "memory"]
                    )
                ),
            )
    rows: dict[str, dict] = {}
    if args.allocator_row:
        attempt(
            "allocator row", lambda: rows.update(allocator_row=allocator_row(flags, args.repeats))
        )
    if gemm:
        peak = 1 / statistics.median(gemm)
    return {
        "device": device_name(setting.device),
        "threads": torch.get_num_threads(),
        "allocator": args.allocator,
        "spin_count": os.environ.get("GOMP_SPINCOUNT"),
        "tokens": what_tokens(setting.tokens),
        "tokens_per_step": setting.sequences * setting.model_config.context_length,
        "model": dataclasses.asdict(setting.model_config),
        "train": {
            k: v for k, v in dataclasses.asdict(setting.config).items() if not k.endswith("_dir")
        },
        "parameters": total_parameters(setting.model_config),
        "active_parameters": active_parameters(setting.model_config),
        "peak_flops": {
            "per_second": peak,
            "what": "median rate of a large matrix product in this run"
            if gemm
            else "vendor's dense half-precision peak",
        },
        "order": "one after another" if one_at_a_time else "in turns",
        "repeats": args.repeats,
        "variants": report(samples, facts, setting, peak),
        "time_by_part": parts,
        **rows,
        "failed": failed,
        "method": {
            "ratio": "median tokens/s over the other's median",
            "mfu": "3 x forward FLOPs of top_k experts and causal keys x tokens/s, over peak_flops",
            "memory": "peak of a step minus weights, gradients and optimizer state; "
            + (
                "allocated by PyTorch"
                if on_gpu
                else "resident, in a process of its own, above what is in use between steps"
            ),
            "time_by_part": " ".join(time_by_part.__doc__.split())
            + " The compiled model is compiled in parts for it: attention, router, experts.",
        },
    }


def report(
    samples: dict[str, Samples], facts: dict[str, dict], setting: Setting, peak: float | None
) -> dict[str, dict]:
    """Per variant: speed, its ratio to the baselines, MFU and the facts."""
    tokens = setting.sequences * setting.model_config.context_length
    speeds = {
        name: [tokens / seconds for seconds in sample.values] for name, sample in samples.items()
    }
    median = {name: statistics.median(values) for name, values in speeds.items()}
    variants = {}
    for name, sample in samples.items():
        config = (
            dense_config(setting.model_config) if name.startswith("dense") else setting.model_config
        )
        variants[name] = {
            "what": VARIANTS[name],
            "tokens_per_sec": summary(speeds[name]),
            "ratio_to": {
                other: median[name] / median[other] for other in RATIOS_TO if other in median
            },
            "mfu": 3 * flops_per_token(config) * median[name] / peak,
            "samples": len(sample.values),
            "discarded_samples": sample.discarded,
            "disturbed": sample.disturbed,
            **facts[name],
        }
    return variants


def allocator_row(flags: list[str], repeats: int) -> dict:
    """Ours as PyTorch starts a process, and with our allocator setting, threads and spin count;
    each in its own processes, in turns.
    """
    speeds: dict[str, list[float]] = {"default": [], "tuned": []}
    threads = {}
    for _ in range(repeats):
        for allocator, values in speeds.items():
            extra = ["--num_threads", "0"] if allocator == "default" else []
            result = run_worker(
                "benchmarks.train",
                [
                    *flags,
                    "--variants",
                    "ours",
                    "--allocator",
                    allocator,
                    "--worker",
                    "speed",
                    *extra,
                ],
                GOMP_SPINCOUNT=process.SPIN_COUNT if allocator == "tuned" else OPENMP_SPIN_COUNT,
            )
            values.append(result["tokens_per_sec"])
            threads[allocator] = result["threads"]
    return {
        allocator: {"tokens_per_sec": summary(values), "threads": threads[allocator]}
        for allocator, values in speeds.items()
    } | {
        "ratio": statistics.median(speeds["tuned"]) / statistics.median(speeds["default"]),
        "processes_each": repeats,
    }


def print_table(results: dict) -> None:
    """The figures, for people."""
    print(
        f"{results['device']}, {results['train']['dtype']}, {results['tokens_per_step']:,} "
        f"tokens a step ({results['tokens']}), "
        f"allocator {results['allocator']}"
    )
    print(
        f"{'':18}{'tokens/s':>12}"
        + "".join(f"{'x ' + other:>14}" for other in RATIOS_TO)
        + f"{'MFU':>8}{'peak above states':>20}"
    )
    for name, v in results["variants"].items():
        ratios = "".join(
            f"{v['ratio_to'][other]:>14.2f}" if other in v["ratio_to"] else f"{'':>14}"
            for other in RATIOS_TO
        )
        memory = human_bytes(v["peak_above_states_bytes"]) if "peak_above_states_bytes" in v else ""
        notes = [f"{v['discarded_samples']} samples discarded"] * (v["discarded_samples"] > 0) + [
            "machine was busy"
        ] * v["disturbed"]
        notes += (
            [f"micro-batches of {v['micro_batch_sequences']}"]
            if "micro_batch_sequences" in v
            else []
        )
        print(
            f"{name:18}{v['tokens_per_sec']['median']:>12,.0f}{ratios}{100 * v['mfu']:>7.1f}%"
            f"{memory:>20}  {', '.join(notes)}".rstrip()
        )
    for name, by_part in results["time_by_part"].items():
        print(
            f"time of {name}: "
            + ", ".join(f"{part} {100 * share:.1f}%" for part, share in by_part["shares"].items())
        )
    for name, why in (results["left_out"] | results["failed"]).items():
        print(f"no {name}: {why}")
    if row := results.get("allocator_row"):
        before, after = (
            row[allocator]["tokens_per_sec"]["median"] for allocator in ("default", "tuned")
        )
        print(
            f"allocator and threads: ours {before:,.0f} -> {after:,.0f} tokens/s, x "
            f"{row['ratio']:.2f}"
        )


def work(setting: Setting, args: argparse.Namespace) -> dict:
    """What a process of its own was started for: the memory or the speed of one variant."""
    if args.worker == "memory":
        return cpu_peak_above_states(args.variants, setting)
    runner = build(args.variants, setting)
    seconds = measure_speed(
        {"it": runner}, setting, args.repeats, args.min_sample_seconds, with_gemm=False
    )["it"].values
    return {
        "tokens_per_sec": setting.sequences
        * setting.model_config.context_length
        / statistics.median(seconds),
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--name", required=True, help="results go to benchmarks/results/train_NAME.json"
    )
    parser.add_argument(
        "--variants",
        help=(
            f"comma-separated: {', '.join(VARIANTS)} (default: those of "
            f"{','.join(DEFAULT_VARIANTS)} that the model can be)"
        ),
    )
    parser.add_argument(
        "--repeats", type=int, default=7, help="samples of each variant (default: 7)"
    )
    parser.add_argument(
        "--min_sample_seconds",
        type=float,
        default=0.25,
        help="a sample is as many steps as take this long (default: 0.25)",
    )
    parser.add_argument(
        "--allocator",
        choices=("tuned", "default"),
        default="tuned",
        help="how malloc treats freed memory, on all sides (default: tuned, as train.py does)",
    )
    switch = argparse.BooleanOptionalAction
    parser.add_argument(
        "--one_at_a_time",
        action=switch,
        help="build and measure variants one after another (default: on a GPU)",
    )
    parser.add_argument(
        "--memory",
        action=switch,
        default=True,
        help="on a CPU: measure memory in a process per variant (default: True)",
    )
    parser.add_argument(
        "--parts", action=switch, default=True, help="profile where our time goes (default: True)"
    )
    parser.add_argument(
        "--allocator_row",
        action="store_true",
        help=(
            "also compare ours with PyTorch's own allocator and threads, in processes of their own"
        ),
    )
    parser.add_argument("--worker", choices=("memory", "speed"), help=argparse.SUPPRESS)
    parser.add_argument("--worker_out", help=argparse.SUPPRESS)
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    flags = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(flags)
    if args.repeats < 1 or args.min_sample_seconds <= 0:
        raise ValueError(
            f"repeats must be at least 1 and min_sample_seconds above 0, not {args.repeats} and "
            f"{args.min_sample_seconds}"
        )
    setting = make_setting(args)
    if args.worker:
        Path(args.worker_out).write_text(json.dumps(work(setting, args)))
        return 0
    names = args.variants.split(",") if args.variants else list(DEFAULT_VARIANTS)
    left_out = {name: why for name in names if (why := why_not(name, setting))}
    if left_out and args.variants:
        raise ValueError(next(iter(left_out.values())))
    results = compare(setting, [name for name in names if name not in left_out], args, flags) | {
        "left_out": left_out
    }
    print_table(results)
    if not results["variants"]:
        raise ValueError("nothing could be measured, see above")
    save_results(f"train_{args.name}", results)
    return 1 if results["failed"] else 0


if __name__ == "__main__":
    cli.run_main(main)
