"""Shards -> checkpoint.

    python train.py                                the 3.66 B default
    python train.py --preset nano                  minutes on a laptop
    python train.py --resume                       go on where the run in checkpoints/ stopped, bit for bit on a CPU

The step is in `fit`, which is given its model, data and loss; everything around it (settings, memory, metrics, checkpoints,
signals) is below. What a step does is a function of (weights, optimizer state, seed, step), so a resumed run repeats nothing
and skips nothing: data order comes from (seed, epoch), and the random numbers of dropout from (seed, step).
"""

from __future__ import annotations

from runtime import process

process.before_torch()  # here, for PyTorch reads it when it loads
# ruff: noqa: E402

import contextlib
import dataclasses
import functools
import math
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from config_model import (
    PRESETS,
    ModelConfig,
    TrainConfig,
    flops_per_token,
    loss_chunk_rows,
    parameter_counts,
    total_parameters,
)
from model import IGNORE, LLM, Output
from runtime import cli, known
from runtime.check_kernels import settle_kernels
from runtime.checkpoint import (
    Checkpoint,
    build_model,
    check_disk_space,
    find_latest,
    folder_has_run,
    load_training_state,
    read_checkpoint,
    restore_names,
    save_checkpoint,
    step_files,
)
from runtime.data import TokenShards, WindowLoader, open_data, prefetch, validation_batches
from runtime.device import (
    autocast,
    choose_device,
    choose_dtype,
    choose_kernels,
    device_name,
    explained_out_of_memory,
    has_room,
    is_out_of_memory,
    make_deterministic,
    memory_bytes,
    peak_flops,
    peak_memory_bytes,
    peak_memory_line,
    release_memory,
    synchronize,
)
from runtime.files import write_text_atomic
from runtime.memory import training_memory_bytes
from runtime.metrics import HEALTHY_LOAD, MetricsLog, make_sinks
from runtime.optimizer import build_optimizer, initialise_state
from runtime.plots import draw_plots
from runtime.text import human_bytes, human_count, human_seconds

# With --resume these may be given anew; every other setting is the run's and must stay what it is.
FREE_ON_RESUME = {
    "data_dir",
    "ckpt_dir",
    "graph_dir",
    "device",
    "compile",
    "activation_checkpointing",
    "profile",
    "num_threads",
    "log_interval",
    "val_interval",
    "val_steps",
    "save_interval",
    "keep_last",
    "max_steps",
    "max_rollbacks",
    "resume",
    "wandb",
    "tensorboard",
}
# With --init_from the architecture is the weights' own; these change neither what they are nor what they mean.
FREE_ON_INIT = {
    "context_length",
    "sliding_window",
    "window_pattern",
    "rope_theta",
    "rope_scaling",
    "rope_scaling_factor",
    "top_k",
    "capacity_factor",
    "aux_loss_coef",
    "z_loss_coef",
    "router_bias_rate",
    "dropout",
}
STOP_SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP")
    if hasattr(signal, name)
]
SAME_SIGNAL_SECONDS = 1.0  # wrappers pass Ctrl-C on to a child that the terminal has already told: one wish, two signals
MOST_SKIPPED_IN_A_ROW = 25
PROFILED_STEPS = (5, 1, 3)  # --profile: passed over, warming the profiler up, recorded
SMALLEST_LOSS_SCALE = (
    2.0**-14
)  # float16's smallest normal number: a gradient that overflows even so is not a matter of scale


class TrainingDiverged(ValueError):
    """The loss or its gradient is not finite and does not recover."""

    exit_code = 3


# ----------------------------------------------------------------------------------------------------------------- the step
@dataclass
class RunState:
    """Everything besides weights and optimizer state that a run needs to go on. Plain numbers: it is saved as JSON."""

    step: int = 0  # optimizer steps done, skipped ones included
    samples_seen: int = 0  # sequences taken from the loader
    tokens_seen: int = 0
    skipped_steps: int = (
        0  # steps without an update, because a gradient was not finite or the loss a spike
    )
    skipped_in_a_row: int = 0
    rollbacks: int = 0  # times that it went back to a checkpoint
    best_val_loss: float | None = None
    train_seconds: float = 0.0  # spent in steps; validation, saving and plotting excluded
    run_id: str = ""
    scaler: dict = field(default_factory=dict)  # float16's loss scaler
    window: dict = field(default_factory=dict)  # sums since the last log line (Totals)
    recent_loss: list = field(default_factory=lambda: [0.0, 0.0, 0.0])  # RecentLoss


def learning_rate(step: int, config: TrainConfig) -> float:
    """Rate of step number `step` (0 is the first): linear warm-up, then cosine (Loshchilov & Hutter 2016) to min_lr, wsd
    (Hu et al. 2024, "MiniCPM": constant, then linear to min_lr over the last decay_fraction) or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    first = (
        config.warmup_steps
        if config.schedule == "cosine"
        else max(config.warmup_steps, round(config.max_steps * (1 - config.decay_fraction)))
    )
    done = min(max((step - first) / max(config.max_steps - 1 - first, 1), 0.0), 1.0)
    falling = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr + (config.lr - config.min_lr) * falling


def next_token_loss(model: LLM, batch: tuple[Tensor, Tensor]) -> Output:
    """The loss of pre-training: each target is the token after its input."""
    inputs_BT, targets_BT = batch
    return model(inputs_BT, targets_BT)


def packed_documents_loss(model: LLM, batch: tuple[Tensor, Tensor], end_of_text_id: int) -> Output:
    """next_token_loss where no token sees the documents before its own. An end-of-text token begins the document after it: it
    is all that the next token may see, as at the start of an answer in predict.py."""
    inputs_BT, targets_BT = batch
    positions_T = torch.arange(inputs_BT.shape[1], device=inputs_BT.device)
    starts_BT = torch.where(inputs_BT == end_of_text_id, positions_T, 0).cummax(dim=1).values
    return model(inputs_BT, targets_BT, starts_BT=starts_BT)


def to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Tensors of a batch on `device`; a CUDA device takes pinned ones while the host goes on. (MPS would read memory that may have
    been given back by then: PyTorch issue 139550.)"""
    return tuple(t.to(device, non_blocking=device.type == "cuda") for t in batch)


@torch.no_grad()
def evaluate(
    model: LLM,
    batches: Iterable,
    loss_fn: Callable = next_token_loss,
    dtype: torch.dtype = torch.float32,
) -> float:
    """Mean cross-entropy (nats) over the valid targets of `batches`; auxiliary losses are not in it. Draws no random numbers."""
    device, was_training = model.embed.weight.device, model.training
    model.eval()
    sums = []
    try:
        for batch in batches:
            with autocast(device, dtype):
                out = loss_fn(model, to_device(batch, device))
            sums.append(
                torch.stack((out.cross_entropy_sum, out.num_targets.to(out.cross_entropy_sum)))
            )
        totals = torch.stack(sums).tolist()  # the one wait for the device
    finally:
        model.train(was_training)
    return sum(total for total, _ in totals) / sum(count for _, count in totals)


class RecentLoss:
    """Running mean and variance of the steps' losses, kept on the device, to tell a spike from noise without waiting."""

    KEEP = 0.95  # of the statistics at each step: about 20 steps count, so that a fall at the start is soon forgotten
    FEWEST_STEPS = 50  # before which nothing is a spike
    LEAST_DEVIATION = 0.01  # of the mean: late in training the loss hardly moves, and a hair's breadth is no spike

    def __init__(self, state: RunState, sigmas: float, device: torch.device):
        self.sigmas = sigmas
        self.numbers = torch.tensor(
            state.recent_loss,
            dtype=torch.float32 if device.type == "mps" else torch.float64,
            device=device,
        )  # steps, mean, variance

    def is_spike(self, loss: Tensor) -> Tensor | None:
        """Whether a step's mean cross-entropy is one, 0-dim bool on the device; None where nobody asks."""
        if not self.sigmas:
            return None
        steps, mean, variance = self.numbers
        deviation = torch.maximum(variance.sqrt(), self.LEAST_DEVIATION * mean)
        return (steps >= self.FEWEST_STEPS) & (loss > mean + self.sigmas * deviation)

    def add(self, loss: Tensor, bad: Tensor) -> None:
        """Count a step, unless it is `bad`."""
        steps, mean, variance = self.numbers
        share = torch.maximum(
            1 / (steps + 1), torch.full_like(steps, 1 - self.KEEP)
        )  # a plain mean at first
        off = loss.to(mean) - mean
        self.numbers = torch.where(
            bad,
            self.numbers,
            torch.stack(
                (steps + 1, mean + share * off, (1 - share) * (variance + share * off * off))
            ),
        )


class Totals:
    """Sums over the steps since the last log line, kept on the device: a step adds to them and only `read` waits for it."""

    def __init__(self, state: RunState, model: LLM, device: torch.device):
        dtype = torch.float32 if device.type == "mps" else torch.float64
        rows = (model.config.transformer_blocks, model.config.num_experts + 2)
        zeros = {"losses": torch.zeros(5), "router": torch.zeros(rows)}
        self.sums = {
            name: torch.tensor(state.window[name], dtype=torch.float64)
            if name in state.window
            else zero
            for name, zero in zeros.items()
        }
        self.sums = {name: tensor.to(dtype).to(device) for name, tensor in self.sums.items()}
        self.skipped = torch.tensor(
            [state.skipped_steps, state.skipped_in_a_row], dtype=dtype, device=device
        )
        self.host = {
            name: state.window.get(name, 0) for name in ("tokens", "seconds", "waiting_seconds")
        }
        self.grad_norm = torch.zeros((), dtype=dtype, device=device)

    def add(
        self, bad: Tensor, losses: Tensor, router: Tensor, grad_norm: Tensor, **host: float
    ) -> None:
        """Add a step. losses [5]: cross-entropy, valid targets, steps, auxiliary loss, z-loss; router [L, E + 2]: loads, entropy,
        dropped share. A step that is `bad` (0-dim bool), and so skipped, counts its time and tokens, not its losses."""
        for name, value in (("losses", losses), ("router", router)):
            self.sums[name] += torch.where(bad, 0.0, value.to(self.sums[name]))
        self.skipped[0] += bad
        self.skipped[1] = (self.skipped[1] + 1) * bad
        self.grad_norm = grad_norm.to(self.skipped)
        for name, value in host.items():
            self.host[name] += value

    def read(self, state: RunState) -> float:
        """Wait for the device, put everything into `state` and return the last step's gradient norm."""
        shape = self.sums["router"].shape
        *numbers, total, in_a_row, grad_norm = torch.cat(
            (self.sums["losses"], self.sums["router"].flatten(), self.skipped, self.grad_norm[None])
        ).tolist()
        state.window = self.host | {
            "losses": numbers[:5],
            "router": [numbers[5 + i * shape[1] : 5 + (i + 1) * shape[1]] for i in range(shape[0])],
        }
        state.skipped_steps, state.skipped_in_a_row = int(total), int(in_a_row)
        return grad_norm

    def clear(self) -> None:
        """Begin the next window."""
        for tensor in self.sums.values():
            tensor.zero_()
        self.host = dict.fromkeys(self.host, 0)


def fit(
    model: LLM,
    loader,
    config: TrainConfig,
    loss_fn: Callable[[LLM, tuple], Output] = next_token_loss,
    *,
    optimizer=None,
    state: RunState | None = None,
    val_batches: Iterable = (),
    dtype: torch.dtype = torch.float32,
    on_log: Callable[[dict], None] = lambda record: None,
    on_save: Callable[[RunState, float | None, bool], None] = lambda state, val_loss, is_best: None,
    on_step: Callable[[], None] = lambda: None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> RunState:
    """Train `model` in place until config.max_steps, or until `stop_requested()` after a step; returns the state reached.

    loader: `.batch(first_sample) -> (inputs, targets)` gives config.batch_size samples from an endless, numbered stream.
    loss_fn(model, batch) -> Output: the step minimises sum(cross_entropy_sum) / sum(valid targets) over its grad_accum
    micro-batches, which is the gradient of the one big batch, plus the mean of their auxiliary losses.
    on_log gets a record every log_interval steps ("train") and after each validation ("val"); on_save(state, val_loss,
    is_best) is called every save_interval steps (not amid skipped ones), at the end, and when stopped; on_step() after each step. The host waits
    for the device only where one of the first two is due, and every MOST_SKIPPED_IN_A_ROW steps (MPS: at each). The optimizer
    must be one that can be told to skip a step, as torch's fused ones can. Raises TrainingDiverged, and ValueError for another.
    """
    state = state or RunState()
    optimizer = optimizer or build_optimizer(model, config)
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            f"fit cannot tell {type(optimizer).__name__} to skip a step whose gradient is not finite: make it with fused=True, or by build_optimizer"
        )
    device = model.embed.weight.device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    samples_per_step = config.batch_size * config.grad_accum
    steps = range(state.step, config.max_steps)
    firsts = range(
        state.samples_seen, state.samples_seen + len(steps) * samples_per_step, samples_per_step
    )  # made now: the state moves on
    stream = prefetch(
        _micro_batches(loader, config, first_sample, device) for first_sample in firsts
    )
    totals, recent = Totals(state, model, device), RecentLoss(state, config.spike_sigmas, device)
    model.train()
    with contextlib.closing(stream):
        for step in steps:
            started = time.perf_counter()
            micro_batches, valid_targets = next(stream)
            waited = time.perf_counter() - started
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            torch.manual_seed(
                (config.seed * 1_000_003 + step) % 2**63
            )  # dropout: a function of (seed, step), so a resume needs no RNG state
            losses, router = 0.0, 0.0
            for batch in micro_batches:
                with autocast(device, dtype):
                    out = loss_fn(model, to_device(batch, device))
                    loss = (
                        out.cross_entropy_sum / valid_targets
                        + (out.aux_loss + out.z_loss) / config.grad_accum
                    )
                scaler.scale(loss).backward()
                losses = (
                    losses + torch.stack((out.cross_entropy_sum, out.aux_loss, out.z_loss)).detach()
                )
                router = (
                    router
                    + torch.cat(
                        (
                            out.router.load,
                            out.router.entropy[:, None],
                            out.router.dropped_share[:, None],
                        ),
                        dim=1,
                    )
                    / config.grad_accum
                )
            norm, bad = _update(
                optimizer,
                scaler,
                parameters,
                losses[0],
                config.grad_clip,
                recent.is_spike(losses[0] / valid_targets),
            )
            if config.spike_sigmas:
                recent.add(losses[0] / valid_targets, bad)
            model.balance_experts(torch.where(bad, 1.0, router[:, :-2]))
            optimizer.zero_grad(set_to_none=True)

            state.step, state.samples_seen = step + 1, state.samples_seen + samples_per_step
            tokens = sum(batch[0].numel() for batch in micro_batches)
            state.tokens_seen += tokens
            last, stopping = state.step == config.max_steps, stop_requested()
            logging, saving = (
                state.step % config.log_interval == 0 or last,
                state.step % config.save_interval == 0 or last,
            )
            validating = bool(val_batches) and (state.step % config.val_interval == 0 or saving)
            step_losses = torch.stack(
                (
                    losses[0],
                    torch.full_like(norm, valid_targets),
                    torch.ones_like(norm),
                    *(losses[1:] / config.grad_accum),
                )
            )
            totals.add(
                bad, step_losses, router, norm, tokens=tokens, seconds=0.0, waiting_seconds=waited
            )
            grad_norm = None
            if (
                logging
                or saving
                or validating
                or stopping
                or state.step % MOST_SKIPPED_IN_A_ROW == 0
            ):
                grad_norm = totals.read(state)
            seconds = time.perf_counter() - started
            state.train_seconds += seconds
            totals.host["seconds"] += seconds
            on_step()
            if grad_norm is None:
                continue
            state.window["seconds"] = totals.host["seconds"]
            state.scaler = scaler.state_dict() if scaler.is_enabled() else {}
            if config.spike_sigmas:
                state.recent_loss = recent.numbers.tolist()
            if state.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW and (
                not scaler.is_enabled() or scaler.get_scale() < SMALLEST_LOSS_SCALE
            ):
                raise TrainingDiverged(
                    f"{state.skipped_in_a_row} steps in a row were skipped (step {state.step}), for their gradients were not finite"
                    + (" or their losses spikes" if config.spike_sigmas else "")
                    + ": go back to the last "
                    "checkpoint with a lower --lr or a longer --warmup_steps, or try --dtype float32"
                )
            if logging:
                on_log(_train_record(state, lr, grad_norm))
                totals.clear()
                state.window = {}
            val_loss = None
            if validating:
                val_loss = evaluate(model, val_batches, loss_fn, dtype)
                on_log(
                    {
                        "kind": "val",
                        "step": state.step,
                        "tokens_seen": state.tokens_seen,
                        "loss": val_loss,
                        "perplexity": _perplexity(val_loss),
                    }
                )
            if (
                (saving and not state.skipped_in_a_row) or last or stopping
            ):  # amid skipped steps there is nothing new to save, and no good place to go back to
                is_best = (
                    val_loss is not None
                    and math.isfinite(val_loss)
                    and (state.best_val_loss is None or val_loss < state.best_val_loss)
                )
                state.best_val_loss = val_loss if is_best else state.best_val_loss
                on_save(state, val_loss, is_best)
            if stopping:
                break
    return state


def _micro_batches(
    loader, config: TrainConfig, first_sample: int, device: torch.device
) -> tuple[list[tuple[Tensor, ...]], int]:
    """The micro-batches of a step, in pinned memory if they go to a GPU, and how many targets in them are valid."""
    batches = [loader.batch(first_sample + i * config.batch_size) for i in range(config.grad_accum)]
    valid_targets = sum(int((batch[1] != IGNORE).sum()) for batch in batches)
    return [
        tuple(t.pin_memory() for t in batch) for batch in batches
    ] if device.type == "cuda" else batches, valid_targets


def _update(
    optimizer,
    scaler,
    parameters: list[Tensor],
    cross_entropy: Tensor,
    grad_clip: float,
    is_spike: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Clip and take the optimizer's step, unless loss or gradient are not finite, or the loss is a spike: then nothing changes.

    Returns (gradient norm before clipping, whether the step was skipped), both 0-dim and on the device: it decides by itself.
    """
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    bad = ~torch.isfinite(norm + cross_entropy)
    bad = bad if is_spike is None else bad | is_spike
    if scaler.is_enabled() or norm.device.type == "mps":
        # The scaler tells the optimizer to change nothing where a gradient is not finite; MPS's kernel does not listen.
        if norm.device.type != "mps" or not bad:
            if grad_clip:
                torch.nn.utils.clip_grads_with_norm_(parameters, grad_clip, norm)
            scaler.step(optimizer)
    else:
        # What GradScaler tells a fused optimizer: divide by grad_scale on the way (clipping costs no pass of its own), and
        # change nothing where found_inf is 1.
        optimizer.grad_scale = (norm / grad_clip).clamp(min=1.0).float() if grad_clip else None
        optimizer.found_inf = bad.float()
        optimizer.step()
    scaler.update()
    return norm, bad


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _train_record(state: RunState, lr: float, grad_norm: float) -> dict:
    """A log record: means over the window, losses by valid targets, the rest by steps; a window of skipped steps has none."""
    cross_entropy, targets, steps, aux_loss, z_loss = state.window["losses"]
    seconds = max(state.window["seconds"], 1e-9)
    nan = math.nan
    loss = cross_entropy / targets if steps else nan
    router = [[value / steps if steps else nan for value in row] for row in state.window["router"]]
    return {
        "kind": "train",
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "loss": loss,
        "perplexity": _perplexity(loss),
        "aux_loss": aux_loss / steps if steps else nan,
        "z_loss": z_loss / steps if steps else nan,
        "lr": lr,
        "grad_norm": grad_norm,
        "tokens_per_sec": state.window["tokens"] / seconds,
        "waiting_share": state.window["waiting_seconds"] / seconds,
        "seconds": state.train_seconds,
        "skipped_steps": state.skipped_steps,
        "expert_load": [row[:-2] for row in router],
        "router_entropy": [row[-2] for row in router],
        "dropped_share": [row[-1] for row in router],
    }


# ----------------------------------------------------------------------------------------------------------- what is to run
@dataclass
class Plan:
    """A run, decided and checked, before anything large is made."""

    model_config: ModelConfig
    config: TrainConfig
    device: torch.device
    dtype: torch.dtype
    train: TokenShards
    val: TokenShards
    source: Checkpoint | None  # what is resumed or started from
    notes: list[str]
    loss_rows: int = 0  # of logits that the loss holds at a time; 0 = the model's choice


def make_plan(settings: cli.Settings) -> Plan:
    """Settings -> plan. Raises ValueError for whatever cannot be honoured."""
    notes: list[str] = []
    source = None
    if settings.values.get("resume"):
        if settings.values.get("init_from"):
            raise ValueError(
                "give either --resume (go on with a run) or --init_from (start a new run from weights), not both"
            )
        if settings.preset:
            raise ValueError(
                f"--resume goes on with the run's own settings: leave out --preset {settings.preset}"
            )
        source, skipped = find_latest(settings.values.get("ckpt_dir", TrainConfig.ckpt_dir))
        notes += [f"skipped a damaged checkpoint: {line}" for line in skipped] + [
            f"resuming {source.path} at step {source.step:,}"
        ]
        config, model_config = _resumed_configs(settings, source)
        before = TrainConfig(**source.train_config)
        if config.max_steps != before.max_steps:
            notes.append(
                f"max_steps {before.max_steps:,} -> {config.max_steps:,}: the learning rate goes on from {learning_rate(source.step, config):.3g} "
                f"(before: {learning_rate(source.step - 1, before):.3g})"
            )
    else:
        config = settings.build(TrainConfig)
        if folder_has_run(config.ckpt_dir):
            raise ValueError(
                f"{config.ckpt_dir} holds the checkpoints of another run: go on with it by --resume, or give this run another --ckpt_dir"
            )
        model_config = (
            None if config.init_from else settings.build(ModelConfig)
        )  # with it, settings are the weights' with some changes, not the default's
    torch.set_num_threads(
        config.num_threads or min(torch.get_num_threads(), process.usable_cores())
    )
    process.keep_freed_memory()
    device = choose_device(config.device)
    if config.deterministic:
        make_deterministic()
    dtype = choose_dtype(config.dtype, device)
    if config.spike_sigmas and dtype == torch.float16:
        raise ValueError(
            "spike_sigmas skips steps that float16's loss scaler would take: use --dtype bfloat16 or float32"
        )
    train, val = open_data(config.data_dir)
    if config.resume:
        if source.data_fingerprint != train.manifest["pair"]:
            raise ValueError(
                f"{config.data_dir} is not the text that {source.path} was trained on: give the run's own --data_dir, or start anew with --init_from"
            )
    else:
        if config.init_from:
            source = read_checkpoint(config.init_from)
            model_config = _initial_config(settings, source)
            notes.append(
                f"starting from the weights of {source.path} (step {source.step:,})"
                + (
                    f"; the architecture is theirs, preset {settings.preset} sets the training only"
                    if settings.preset
                    else ""
                )
            )
        elif "vocabulary_size" not in settings.explicit:
            model_config = dataclasses.replace(model_config, vocabulary_size=train.vocabulary_size)
        _check_vocabulary(model_config, train, source)
    config = dataclasses.replace(config, dtype=str(dtype).removeprefix("torch."))
    return with_loss_rows(Plan(model_config, config, device, dtype, train, val, source, notes))


def _resumed_configs(settings: cli.Settings, source: Checkpoint) -> tuple[TrainConfig, ModelConfig]:
    """The checkpoint's settings, with those given anew that may be. Raises ValueError for the others, and for a finished run."""
    if source.is_reference_format or not source.run:
        raise ValueError(
            f"{source.path} holds no run to go on with: start a new one from its weights with --init_from {source.path}"
        )
    saved = source.train_config | dataclasses.asdict(source.model_config)
    given = {name: settings.values[name] for name in settings.explicit}
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != saved.get(name):
            raise ValueError(
                f"--{name} {value} differs from the run in {source.path}, which has {saved.get(name)}: leave it out to go on, or start "
                "a new run with another --ckpt_dir (and --init_from)"
            )
    free = {name: value for name, value in given.items() if name in FREE_ON_RESUME}
    folder = {
        "ckpt_dir": settings.values.get("ckpt_dir", TrainConfig.ckpt_dir)
    }  # the run may have been moved
    try:
        config = TrainConfig(
            **source.train_config | free | folder | {"resume": True, "init_from": ""}
        )
    except TypeError as error:
        raise ValueError(
            f"{source.path} has training settings that this version does not know: {error}"
        ) from error
    if config.max_steps < source.step:  # fewer steps would rewrite history
        raise ValueError(
            f"the run in {config.ckpt_dir} is at step {source.step}, beyond --max_steps {config.max_steps}: raise it to train further"
        )
    return config, source.model_config


def _saved_state(source: Checkpoint) -> RunState:
    """The run state in a checkpoint. Raises ValueError if it is not one of this version."""
    expected = dataclasses.asdict(RunState())
    if (
        source.run.keys() | {"rollbacks", "recent_loss"} != expected.keys()
    ):  # the first versions had not these two
        raise ValueError(
            f"{source.path} was saved by a version with another run state ({', '.join(sorted(source.run.keys() ^ expected.keys()))}): start from its weights with --init_from"
        )
    return RunState(**source.run)


def _initial_config(settings: cli.Settings, source: Checkpoint) -> ModelConfig:
    """The architecture of the weights, with explicit settings that do not change their shapes."""
    names = {f.name for f in dataclasses.fields(ModelConfig)} & settings.explicit
    theirs = dataclasses.asdict(source.model_config) | {
        "head_dim": source.model_config.attention_head_dim
    }
    for name in sorted(
        names - FREE_ON_INIT
    ):  # 8 heads of 4 features have the shapes of 4 of 8, and are another function
        if settings.values[name] not in (theirs[name], getattr(source.model_config, name)):
            raise ValueError(
                f"--{name} does not fit the weights in {source.path}, whose {name} is {theirs[name]}, not {settings.values[name]}: leave it out"
            )
    config = dataclasses.replace(
        source.model_config, **{name: settings.values[name] for name in names}
    )
    with torch.device("meta"):
        mine, theirs = (dict(LLM(c).named_parameters()) for c in (config, source.model_config))
    for name in mine.keys() | theirs.keys():
        if (name in mine) != (name in theirs) or mine[name].shape != theirs[name].shape:
            raise ValueError(
                f"{', '.join('--' + n for n in sorted(names))} does not fit the weights in {source.path} ({name} differs): leave it out"
            )
    return config


def _with_config(source: Checkpoint, config: ModelConfig) -> Checkpoint:
    """A checkpoint's weights under a config that may balance its experts otherwise: a selection bias comes (as 0) or goes."""
    biases = {
        f"layers.{block}.moe.router.selection_bias": torch.zeros(config.num_experts)
        for block in range(config.transformer_blocks)
    }
    model = {name: tensor for name, tensor in source.model.items() if name not in biases}
    model |= (
        {name: source.model.get(name, zero) for name, zero in biases.items()}
        if config.router_bias_rate
        else {}
    )
    return dataclasses.replace(source, model_config=config, model=model)


def _check_vocabulary(
    model_config: ModelConfig, train: TokenShards, source: Checkpoint | None
) -> None:
    if model_config.vocabulary_size < train.vocabulary_size:
        raise ValueError(
            f"vocabulary_size {model_config.vocabulary_size:,} is smaller than the data's {train.vocabulary_size:,} ({train.tokenizer_state['name']}): "
            "leave --vocabulary_size out to take the data's, or prepare the text with the model's tokenizer"
        )
    theirs = source and source.tokenizer_state
    if theirs and theirs["fingerprint"] != train.tokenizer_state["fingerprint"]:
        name = train.tokenizer_state["name"] + (
            " of another text" if train.tokenizer_state["name"] == theirs["name"] else ""
        )
        raise ValueError(
            f"{source.path} was trained with tokenizer {theirs['name']} and {train.folder} was made with {name}: prepare the text with the former"
        )


def check_memory(plan: Plan) -> dict[str, int]:
    """Estimated memory by part; ValueError if the weights, gradients and optimizer state alone exceed what the device has."""
    on_gpu = plan.device.type == "cuda"
    needed = training_memory_bytes(
        plan.model_config, plan.config, plan.dtype.itemsize, on_gpu, plan.loss_rows
    )
    # Gradients are as large as the weights, also where they are not there at the step's peak.
    fixed = 2 * needed["weights"] + needed["optimizer state"]
    memory = memory_bytes(plan.device)
    if memory and fixed > memory[1]:
        raise ValueError(
            f"{human_count(total_parameters(plan.model_config))} parameters need {human_bytes(fixed)} for weights, gradients and optimizer state, and "
            f"{device_name(plan.device)} has {human_bytes(memory[1])}: choose a smaller model, e.g. --preset {_fitting_preset(memory[1]) if plan.device.type == 'cuda' else 'nano'}"
        )
    return needed


def _fitting_preset(total_bytes: int) -> str:
    """The largest preset whose training fits."""
    cost = {
        name: sum(
            training_memory_bytes(
                ModelConfig(**p.model), TrainConfig(**p.train), 2, on_gpu=True
            ).values()
        )
        for name, p in PRESETS.items()
    }
    return max(
        (name for name in cost if cost[name] < 0.95 * total_bytes), key=cost.get, default="nano"
    )


def with_loss_rows(plan: Plan) -> Plan:
    """The plan with as many rows of logits at a time as its GPU has memory for; always the same where
    the run is to give the same bits."""
    if plan.device.type != "cuda" or plan.config.deterministic:
        return plan
    needed = check_memory(dataclasses.replace(plan, loss_rows=0))
    spare = memory_bytes(plan.device)[0] - sum(needed.values())
    return dataclasses.replace(plan, loss_rows=loss_chunk_rows(plan.model_config, True, spare))


def with_largest_micro_batch(plan: Plan) -> Plan:
    """The plan with the largest micro-batch that fits its device, and as many of them as keep the sequences per step.

    A validation keeps its windows, rounded up
    to whole micro-batches. A CPU goes by the estimate and 80 % of the free memory. A GPU tries, the largest whose estimate fits first, and uncompiled:
    compiling takes a minute and then needs less.
    Raises ValueError if not one sequence fits.
    """
    config = plan.config
    sequences = config.batch_size * config.grad_accum
    plans = [
        dataclasses.replace(
            plan,
            loss_rows=0,
            config=dataclasses.replace(
                config,
                batch_size=b,
                grad_accum=sequences // b,
                micro_batch="batch_size",
                val_steps=-(-config.val_steps * config.batch_size // b),
            ),
        )
        for b in range(sequences, 0, -1)
        if sequences % b == 0
    ]
    memory = memory_bytes(plan.device)
    if memory is None:
        raise ValueError(
            f"the memory of {device_name(plan.device)} is not known: give --batch_size instead of --micro_batch auto"
        )
    on_gpu = plan.device.type == "cuda"
    for candidate in plans:
        needed = check_memory(candidate)
        # Of a CPU's memory the program has its share already.
        estimate = sum(needed.values()) - needed["program"]
        likely = (
            estimate < 0.8 * memory[0]
            if not on_gpu
            else estimate <= memory[0] or candidate is plans[-1]
        )
        if likely and (not on_gpu or _runs(candidate)):
            c = candidate.config
            return dataclasses.replace(
                with_loss_rows(candidate),
                notes=[
                    *plan.notes,
                    f"micro-batch {c.batch_size} x {c.grad_accum} is the largest that fits, of {sequences} sequences a step",
                ],
            )
    raise ValueError(
        f"not even one sequence of {plan.model_config.context_length} tokens fits {device_name(plan.device)}, which has {human_bytes(memory[0])} free and needs about "
        f"{human_bytes(estimate)}: lower --context_length, take --activation_checkpointing, or a smaller model"
    )


def _runs(plan: Plan) -> bool:
    """Whether a step of the plan runs on its device, uncompiled, with memory to spare. Leaves nothing."""
    try:
        set_up(dataclasses.replace(plan, config=dataclasses.replace(plan.config, compile=False)))
        return has_room(plan.device)
    except ValueError as error:
        if not is_out_of_memory(error.__cause__ or error):
            raise
        return False
    finally:
        release_memory(plan.device)


def describe(plan: Plan, needed: dict[str, int]) -> list[str]:
    """The lines printed before step 1."""
    c, t = plan.model_config, plan.config
    table = parameter_counts(c)["attention bias table"]
    real = known.counts(c)
    total = real.total
    lines = [
        f"model    {human_count(total)} parameters, {human_count(real.active)} active per token"
        + (
            f" ({human_count(total - table)} + {human_count(table)} position table; see --preset gptoss-modern)"
            if table > 0.1 * total
            else ""
        )
    ]
    lines += [
        f"note     {line}"
        for line in (real.note, "" if plan.source else known.initial_note(c))
        if line
    ]
    tokens = t.batch_size * t.grad_accum * c.context_length
    epoch = plan.train.num_tokens
    lines.append(
        f"data     {epoch:,} training and {plan.val.num_tokens:,} validation tokens ({plan.train.tokenizer_state['name']}) in {t.data_dir}"
    )
    lines.append(
        f"steps    {t.max_steps:,} steps of {t.batch_size} x {t.grad_accum} sequences x {c.context_length} = {tokens:,} tokens: {human_count(t.max_steps * tokens)} tokens, "
        f"{t.max_steps * tokens / epoch:.2f} epochs"
    )
    memory = memory_bytes(plan.device)
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in needed.items() if size)
    lines.append(
        f"memory   about {human_bytes(sum(needed.values()))} ({parts})"
        + (f"; {human_bytes(memory[0])} free" if memory else "")
    )
    checkpoint, kept = (
        human_bytes(checkpoint_bytes(needed)),
        f"{t.keep_last} and the best"
        if t.keep_last
        else f"{max(t.max_steps // t.save_interval, 1)}",
    )
    lines.append(
        f"disk     {checkpoint} a checkpoint in {t.ckpt_dir}; {kept} are kept, and one more is written before an old one goes"
    )
    options = [
        name.replace("_", " ")
        for name in ("document_mask", "activation_checkpointing", "deterministic")
        if getattr(t, name)
    ]
    lines.append(
        f"device   {device_name(plan.device)}, {t.dtype}{', compiled' if t.compile else ''}; {t.optimizer}{', ' if options else ''}{', '.join(options)}"
    )
    return lines


def checkpoint_bytes(needed: dict[str, int]) -> int:
    """Bytes of a checkpoint: the weights and the optimizer's state, of a memory estimate."""
    return needed["weights"] + needed["optimizer state"]


def loss_of(plan: Plan) -> Callable[[LLM, tuple], Output]:
    """The plan's loss."""
    return (
        functools.partial(packed_documents_loss, end_of_text_id=plan.train.end_of_text_id)
        if plan.config.document_mask
        else next_token_loss
    )


def dry_run(model: LLM, optimizer, loader: WindowLoader, plan: Plan) -> float:
    """Two micro-batches forward and backward, with the optimizer's state in place and nothing updated: out-of-memory comes now.

    The second meets the gradients of the first where a step has more than one micro-batch; where it
    has not, that would ask for memory that no step needs. Returns the seconds that the second took;
    the first warms up.
    """
    initialise_state(optimizer)
    model.train()
    for _ in range(2):
        if plan.config.grad_accum == 1:
            optimizer.zero_grad(set_to_none=True)
        started = time.perf_counter()
        with autocast(plan.device, plan.dtype):
            out = loss_of(plan)(model, to_device(loader.batch(0), plan.device))
        (out.cross_entropy_sum + out.aux_loss + out.z_loss).backward()
        synchronize(plan.device)
        seconds = time.perf_counter() - started
    optimizer.zero_grad(set_to_none=True)
    return seconds


def out_of_memory_advice(plan: Plan):
    """Context that turns a device's out-of-memory into one line that says what to lower."""
    return explained_out_of_memory(
        plan.device,
        f"lower --batch_size (now {plan.config.batch_size}; raise --grad_accum as much to keep the tokens per step), or "
        "take --micro_batch auto or --activation_checkpointing; then lower --context_length or the model",
    )


class StopRequest:
    """The first SIGINT, SIGTERM, SIGUSR1 or SIGHUP asks the run to finish its step, save and leave; a later one ends it at once.
    What the run was told to ignore (SIGHUP under nohup) stays ignored."""

    def __init__(self):
        self.signal: int | None = None

    def __enter__(self):
        self._before = {
            s: signal.signal(s, self._on_signal)
            for s in STOP_SIGNALS
            if signal.getsignal(s) != signal.SIG_IGN
        }
        return self

    def __exit__(self, *_):
        for s, handler in self._before.items():
            signal.signal(s, handler)

    def _on_signal(self, number, frame):
        if self.signal is not None:
            if time.monotonic() - self._asked > SAME_SIGNAL_SECONDS:
                os._exit(128 + number)
            return
        self.signal, self._asked = number, time.monotonic()
        os.write(
            2,
            f"\n{signal.Signals(number).name}: finishing this step, then saving; once more to leave at once\n".encode(),
        )

    def requested(self) -> bool:
        return self.signal is not None


# -------------------------------------------------------------------------------------------------------------- the reporter
class Reporter:
    """Progress bar, log lines, metrics and plots of a run."""

    def __init__(self, plan: Plan, state: RunState):
        config, resume_step = plan.config, state.step if plan.config.resume else None
        real = known.counts(plan.model_config)
        info = {
            "run_id": state.run_id,
            "model": dataclasses.asdict(plan.model_config),
            "train": dataclasses.asdict(config),
            "source": plan.train.manifest["source"],
            "parameters": real.total,
            "active_parameters": real.active,
            "device": device_name(plan.device),
            "torch": torch.__version__,
            "command": " ".join(sys.argv),
        }
        sinks = make_sinks(
            config.graph_dir,
            wandb=config.wandb,
            tensorboard=config.tensorboard,
            run_info=info,
            resume_step=resume_step,
        )
        self.plan, self.state = plan, state
        self.log = MetricsLog(config.graph_dir, resume_step, info, sinks)
        for message in self.log.take_messages():
            print(message)
        self.flops_per_token = 3 * flops_per_token(plan.model_config)
        self.peak = peak_flops(plan.device, plan.dtype)
        self.can_plot = self.can_log = self.healthy = True
        self.bar = tqdm(
            total=config.max_steps,
            initial=state.step,
            unit="step",
            disable=None,
            dynamic_ncols=True,
        )

    def say(self, line: str) -> None:
        tqdm.write(line)
        sys.stdout.flush()

    def on_log(self, record: dict) -> None:
        """Complete a record of `fit`, store and show it."""
        if record["kind"] == "val":
            record["bits_per_byte"] = record["loss"] / math.log(2) / self.plan.val.bytes_per_token
            self.say(
                f"step {record['step']:>7,}  validation loss {record['loss']:.4f}  perplexity {record['perplexity']:.2f}  bits/byte {record['bits_per_byte']:.4f}"
            )
        else:
            if self.peak:
                record["mfu"] = record["tokens_per_sec"] * self.flops_per_token / self.peak
            shown = {
                "loss": f"{record['loss']:.4f}",
                "tok/s": human_count(record["tokens_per_sec"]),
            } | ({"MFU": f"{100 * record['mfu']:.1f}%"} if self.peak else {})
            self.bar.set_postfix(shown, refresh=False)
            self.bar.update(record["step"] - self.bar.n)
            if self.bar.disable:
                left = (
                    (self.plan.config.max_steps - record["step"])
                    * self.state.train_seconds
                    / record["step"]
                )
                self.say(
                    f"step {record['step']:>7,}  "
                    + "  ".join(f"{k} {v}" for k, v in shown.items())
                    + f"  lr {record['lr']:.2e}  grad norm {record['grad_norm']:.2f}  ETA {human_seconds(left)}"
                )
            if record["step"] > self.plan.config.warmup_steps:
                self._watch_experts(record)
        self._log(lambda: self.log.append(record))

    def _watch_experts(self, record: dict) -> None:
        """Say when experts leave the healthy range and when all are back in it."""
        loads = [
            (load, block, expert)
            for block, row in enumerate(record["expert_load"])
            for expert, load in enumerate(row)
        ]
        ill = [
            one
            for one in loads
            if not HEALTHY_LOAD[0] <= one[0] <= HEALTHY_LOAD[1] and math.isfinite(one[0])
        ]
        bounds = " to ".join(f"{100 * share:.0f}" for share in HEALTHY_LOAD)
        if ill and self.healthy:
            load, block, expert = max(ill, key=lambda one: abs(math.log(max(one[0], 1e-9))))
            self.say(
                f"step {record['step']:>7,}  warning: {len(ill)} of {len(loads)} experts get less or more than {bounds} % of their fair share, expert {expert} of "
                f"block {block} {100 * load:.0f} %: if it stays so, raise --aux_loss_coef or set --router_bias_rate (see latest_expert_load.png)"
            )
        elif not ill and not self.healthy:
            self.say(
                f"step {record['step']:>7,}  all experts are back at {bounds} % of their fair share"
            )
        self.healthy = not ill

    def write_json(self) -> None:
        self._log(self.log.write_json)

    def _log(self, write: Callable[[], None]) -> None:
        """Metrics are worth a line when they cannot be written, but never the run."""
        if not self.can_log:
            return
        try:
            write()
        except OSError as error:
            self.can_log = False
            self.say(f"no more metrics: {error} (training goes on)")
        for message in self.log.take_messages():
            self.say(message)

    def plots(self, step: int) -> None:
        """Draw what there is. Plots are a comfort: whatever is wrong with them is said once and the run goes on."""
        if not self.can_plot:
            return
        try:
            draw_plots(self.log.stream(), self.plan.config.graph_dir, step)
            process.give_back_memory()
        except (ImportError, OSError, ValueError) as error:
            self.can_plot = False
            self.say(f"no plots: {error} (the metrics are in {self.log.path})")

    def close(self) -> None:
        self.bar.close()
        self._log(self.log.finish)


# --------------------------------------------------------------------------------------------------------------------- main
def initial_state(plan: Plan) -> RunState:
    """Where the run starts: at step 0, or where the checkpoint that it resumes says."""
    if not plan.config.resume:
        return RunState(run_id=os.urandom(8).hex())
    state = _saved_state(plan.source)
    if (
        plan.config.val_steps != plan.source.train_config["val_steps"]
    ):  # another average: not to be compared with
        state.best_val_loss = None
    return state


def set_up(plan: Plan) -> tuple[LLM, torch.optim.Optimizer, WindowLoader, float]:
    """Model, optimizer and loader of a plan, ready for `fit`, and the seconds that a micro-batch takes."""
    config = plan.config
    loader = WindowLoader(
        plan.train, plan.model_config.context_length, config.batch_size, config.seed
    )
    with out_of_memory_advice(plan):
        if config.init_from:
            model = build_model(_with_config(plan.source, plan.model_config), plan.device)
        else:
            torch.manual_seed(config.seed)
            with plan.device:
                model = LLM(plan.model_config)
        choose_kernels(model, plan.device, plan.dtype)
        for line in settle_kernels(model):
            tqdm.write(f"note     {line}")
        optimizer = build_optimizer(model, config)
        if config.resume:
            load_training_state(plan.source, model, optimizer)
        model.activation_checkpointing = config.activation_checkpointing
        model.loss_rows = plan.loss_rows
        if config.compile:
            model.compile_in_place()
        return model, optimizer, loader, dry_run(model, optimizer, loader, plan)


@contextlib.contextmanager
def profiled(plan: Plan, state: RunState, say: Callable[[str], None]):
    """Gives what to call after each step. With config.profile the last of PROFILED_STEPS is followed by a trace and a table in graph_dir."""
    if not plan.config.profile:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    folder = Path(plan.config.graph_dir)

    def write(profiler):
        column = "self_device_time_total" if plan.device.type == "cuda" else "self_cpu_time_total"
        profiler.export_chrome_trace(str(folder / "trace.json"))
        write_text_atomic(
            folder / "trace.txt",
            profiler.key_averages().table(sort_by=column, row_limit=40, max_name_column_width=60),
        )
        say(
            f"profile  of steps {state.step - PROFILED_STEPS[-1] + 1} to {state.step}: {folder / 'trace.json'} (open it at ui.perfetto.dev), {folder / 'trace.txt'}"
        )

    skip, warm_up, record = PROFILED_STEPS
    with profile(
        schedule=schedule(skip_first=skip, wait=0, warmup=warm_up, active=record, repeat=1),
        on_trace_ready=write,
    ) as profiler:
        yield profiler.step


def run(plan: Plan) -> int:
    """Carry out a plan; returns the exit code (0, or 128 + the signal that stopped it)."""
    if plan.config.micro_batch == "auto":
        plan = with_largest_micro_batch(plan)
    config, needed = plan.config, check_memory(plan)
    for line in plan.notes + describe(plan, needed):
        print(line)
    sys.stdout.flush()
    if config.resume:
        restore_names(plan.source)  # a kill between a save and its names left those of an older one
    state = initial_state(plan)
    if state.step == config.max_steps:
        print(
            f"done already: all {state.step:,} steps of the run in {config.ckpt_dir} are taken; raise --max_steps to train further"
        )
        return 0
    if config.profile and (left := config.max_steps - state.step) < sum(PROFILED_STEPS):
        raise ValueError(
            f"--profile needs {sum(PROFILED_STEPS)} steps, of which it records the last {PROFILED_STEPS[-1]}, and {left} are left: raise --max_steps"
        )
    check_disk_space(config.ckpt_dir, checkpoint_bytes(needed))
    val_batches = validation_batches(
        plan.val, plan.model_config.context_length, config.batch_size, config.val_steps
    )
    while True:
        reporter = Reporter(plan, state)
        try:
            return _train(plan, state, reporter, val_batches)
        except TrainingDiverged as error:
            plan, state = _rolled_back(plan, state, error)
        finally:
            reporter.close()


def _rolled_back(plan: Plan, diverged: RunState, error: TrainingDiverged) -> tuple[Plan, RunState]:
    """The run from its last checkpoint without a skipped step behind it, and on behind the data that it met since. Raises the error where there is none, or
    not another time."""
    error.__traceback__ = (
        None  # it holds the model and the optimizer, which are about to be made again
    )
    release_memory(plan.device)
    if diverged.rollbacks >= plan.config.max_rollbacks:
        raise error
    for _, path in reversed(step_files(plan.config.ckpt_dir)):
        try:
            source = read_checkpoint(path, optimizer=True)
            state = _saved_state(source)
        except ValueError:  # damaged: an older one will do
            continue
        if state.run_id == diverged.run_id and not state.skipped_in_a_row:
            break
    else:
        raise error
    print(
        f"{error.args[0].partition(':')[0]}: back to step {state.step:,}, and on behind the data met since (rollback {diverged.rollbacks + 1} of at most {plan.config.max_rollbacks})",
        flush=True,
    )
    state.samples_seen, state.rollbacks = diverged.samples_seen, diverged.rollbacks + 1
    return dataclasses.replace(
        plan, source=source, config=dataclasses.replace(plan.config, resume=True, init_from="")
    ), state


def _train(plan: Plan, state: RunState, reporter: Reporter, val_batches) -> int:
    """The part of `run` that takes long."""
    config = plan.config
    model, optimizer, loader, seconds = set_up(plan)
    left = (config.max_steps - state.step) * config.grad_accum * seconds
    peak = peak_memory_bytes(plan.device)
    reporter.say(
        f"ready    a micro-batch takes {seconds:.2f} s, the run about {human_seconds(left)}"
        + (f"; peak memory of the process so far {human_bytes(peak)}" if peak else "")
    )

    def on_save(state: RunState, val_loss: float | None, is_best: bool) -> None:
        reporter.write_json()
        save_checkpoint(
            config.ckpt_dir,
            state.step,
            model,
            optimizer,
            train_config=dataclasses.replace(config, resume=False, profile=False),
            val_loss=val_loss,
            tokenizer_state=plan.train.tokenizer_state,
            data_fingerprint=plan.train.manifest["pair"],
            run=dataclasses.asdict(state),
            keep_last=config.keep_last,
            is_best=is_best,
        )
        reporter.plots(state.step)

    with (
        StopRequest() as stop,
        out_of_memory_advice(plan),
        profiled(plan, state, reporter.say) as on_step,
    ):
        fit(
            model,
            loader,
            config,
            loss_of(plan),
            optimizer=optimizer,
            state=state,
            val_batches=val_batches,
            dtype=plan.dtype,
            on_log=reporter.on_log,
            on_save=on_save,
            on_step=on_step,
            stop_requested=stop.requested,
        )
    reporter.close()
    print(peak_memory_line(plan.device, sum(check_memory(plan).values())))
    if state.skipped_steps:
        print(f"{state.skipped_steps} steps were skipped because a gradient was not finite")
    if state.step < config.max_steps:
        print(
            f"stopped after step {state.step:,}, saved in {config.ckpt_dir}; go on with: python train.py --resume --ckpt_dir {shlex.quote(config.ckpt_dir)}"
        )
        return 128 + stop.signal
    print(
        f"done: {state.step:,} steps, {state.tokens_seen:,} tokens in {human_seconds(state.train_seconds)}; checkpoints in {config.ckpt_dir}, plots in {config.graph_dir}"
    )
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(
        __doc__, "Settings: a flag beats --config, which beats --preset, which beats the default."
    )
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    return run(make_plan(cli.settings_from(parser.parse_args(argv), ModelConfig, TrainConfig)))


if __name__ == "__main__":
    cli.run_main(main)
