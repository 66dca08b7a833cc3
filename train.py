"""Shards -> checkpoint.

    python train.py                                the 3.66 B default
    python train.py --preset nano                  minutes on a laptop
    python train.py --resume                       go on where the run in checkpoints/ stopped, bit for bit on a CPU

The step is in `fit`, which is given its model, data and loss; everything around it (settings, memory, metrics, checkpoints,
signals) is below. What a step does is a function of (weights, optimizer state, seed, step), so a resumed run repeats nothing
and skips nothing: data order comes from (seed, epoch), and the random numbers of dropout from (seed, step).
"""

from __future__ import annotations

from runtime.base import process

process.before_torch()  # here, for PyTorch reads it when it loads
# ruff: noqa: E402

import contextlib
import dataclasses
import functools
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from config_model import (
    ModelConfig,
    TrainConfig,
)
from model import LLM, Output
from runtime.base import cli
from runtime.base.device import (
    autocast,
    peak_memory_bytes,
    peak_memory_line,
    release_memory,
    to_device,
)
from runtime.base.process import StopRequest
from runtime.base.text import human_bytes, human_seconds
from runtime.checkpoint.folder import restore_names, step_files
from runtime.checkpoint.read import read_checkpoint
from runtime.checkpoint.write import check_disk_space, save_checkpoint
from runtime.data.loader import micro_batches, prefetch
from runtime.data.shards import open_data
from runtime.training.optimizer import build_optimizer
from runtime.training.plan import (
    TrainPlan,
    check_memory,
    checkpoint_bytes,
    describe,
    initial_state,
    make_plan,
    saved_state,
    with_largest_micro_batch,
)
from runtime.training.reporter import PROFILED_STEPS, Reporter, profiled
from runtime.training.setup import out_of_memory_advice, runs, set_up
from runtime.training.state import (
    RecentLoss,
    RunState,
    Totals,
    TrainingDiverged,
    perplexity,
    train_record,
)
from runtime.training.task import Batch, Pretraining, Task

MOST_SKIPPED_IN_A_ROW = 25
# float16's smallest normal number: a gradient that overflows even at this scale is not a matter of
# scale.
SMALLEST_LOSS_SCALE = 2.0**-14


# ------------------------------------------------------------------------------- schedule and losses
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


def pretraining(config: TrainConfig) -> Task:
    """Return the task of pre-training on the shards in config.data_dir."""
    train, val = open_data(config.data_dir)
    if not config.document_mask:
        return Pretraining(train, val, next_token_loss)
    loss = functools.partial(packed_documents_loss, end_of_text_id=train.end_of_text_id)
    return Pretraining(train, val, loss)


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


# ------------------------------------------------------------------------------------------ the step
class StepResult(NamedTuple):
    """What a step did. All of it is on the device, and nothing has been waited for."""

    sums: dict[str, Tensor]  # numbers to log, by name; train_record divides them
    grad_norm: Tensor  # 0-dim, before clipping
    skipped: Tensor  # 0-dim bool


def forward_backward(
    model: LLM,
    task: Task,
    batch: Batch,
    dtype: torch.dtype,
    divisor: int = 1,
    grad_accum: int = 1,
    scaler: torch.amp.GradScaler | None = None,
) -> Output:
    """Add the gradients of sum(cross-entropy) / divisor + auxiliary losses / grad_accum."""
    device = model.embed.weight.device
    with autocast(device, dtype):
        out = task.loss(model, to_device(batch, device))
        loss = out.cross_entropy_sum / divisor + (out.aux_loss + out.z_loss) / grad_accum
    (loss if scaler is None else scaler.scale(loss)).backward()
    return out


def train_step(
    model: LLM,
    task: Task,
    batches: list[Batch],
    divisor: int,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    recent: RecentLoss,
    config: TrainConfig,
    dtype: torch.dtype,
) -> StepResult:
    """Take one optimizer step on the micro-batches `batches`.

    Minimise sum(cross-entropy) / divisor, which is the gradient of the one big batch, plus the mean
    of the auxiliary losses. A step whose loss or gradient is not finite, or whose loss is a spike,
    changes nothing.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    losses: Tensor | float = 0.0
    router: dict[str, Tensor] = {}
    for batch in batches:
        out = forward_backward(model, task, batch, dtype, divisor, config.grad_accum, scaler)
        losses = losses + torch.stack((out.cross_entropy_sum, out.aux_loss, out.z_loss)).detach()
        for name, value in out.router.logged().items():
            router[name] = router.get(name, 0.0) + value / config.grad_accum
    cross_entropy, aux_loss, z_loss = losses
    mean_loss = cross_entropy / divisor
    norm, skipped = _update(
        optimizer, scaler, parameters, cross_entropy, config.grad_clip, recent.is_spike(mean_loss)
    )
    if config.spike_sigmas:
        recent.add(mean_loss, skipped)
    # A row of ones moves nothing.
    model.balance_experts(torch.where(skipped, 1.0, router["expert_load"]))
    optimizer.zero_grad(set_to_none=True)
    sums = {
        "cross_entropy": cross_entropy,
        "targets": torch.full_like(norm, divisor),
        "steps": torch.ones_like(norm),
        "aux_loss": aux_loss / config.grad_accum,
        "z_loss": z_loss / config.grad_accum,
        **router,
    }
    return StepResult(sums, norm, skipped)


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


# ------------------------------------------------------------------------------------------ the loop
@dataclass
class Hooks:
    """What the loop calls; by default nothing.

    on_log(record): every log_interval steps ("train") and after each validation ("val").
    on_save(state, val_loss, is_best): every save_interval steps (not amid skipped ones), at the
        end, and when stopped.
    on_step(): after each step.
    stop_requested(): whether to save and stop after this step.
    """

    on_log: Callable[[dict], None] = lambda record: None
    on_save: Callable[[RunState, float | None, bool], None] = lambda state, val_loss, is_best: None
    on_step: Callable[[], None] = lambda: None
    stop_requested: Callable[[], bool] = lambda: False


class Due(NamedTuple):
    """What is due after a step."""

    log: bool
    validate: bool
    save: bool
    last: bool
    stop: bool


def what_is_due(step: int, config: TrainConfig, validates: bool, stop: bool) -> Due:
    """Return what is due after `step` steps."""
    last = step == config.max_steps
    save = last or step % config.save_interval == 0
    return Due(
        log=last or step % config.log_interval == 0,
        validate=validates and (save or step % config.val_interval == 0),
        save=save,
        last=last,
        stop=stop,
    )


def fit(
    model: LLM,
    task: Task,
    config: TrainConfig,
    hooks: Hooks | None = None,
    *,
    optimizer: Optimizer | None = None,
    state: RunState | None = None,
    dtype: torch.dtype = torch.float32,
) -> RunState:
    """Train `model` in place until config.max_steps or a requested stop; return the state reached.

    The host waits for the device only where something is due (Hooks), and every
    MOST_SKIPPED_IN_A_ROW steps (MPS: at each). The optimizer must be one that can be told to skip a
    step, as torch's fused ones can; else ValueError. Raises TrainingDiverged.
    """
    hooks = hooks or Hooks()
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
    validation = task.validation(model.config, config)
    totals, recent = Totals(state, device), RecentLoss(state, config.spike_sigmas, device)
    model.train()
    with contextlib.closing(_steps(model, task, config, state)) as stream:
        for step in range(state.step, config.max_steps):
            started = time.perf_counter()
            batches, divisor = next(stream)
            waited = time.perf_counter() - started
            lr = learning_rate(step, config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            # Dropout is a function of (seed, step), so a resume needs no state of the generator.
            torch.manual_seed((config.seed * 1_000_003 + step) % 2**63)
            result = train_step(
                model, task, batches, divisor, optimizer, scaler, recent, config, dtype
            )
            totals.add(result.sums, result.grad_norm, result.skipped)

            tokens = sum(batch[0].numel() for batch in batches)
            state.step = step + 1
            state.samples_seen += config.batch_size * config.grad_accum
            state.tokens_seen += tokens
            due = what_is_due(state.step, config, bool(validation), hooks.stop_requested())
            reading = any(due) or state.step % MOST_SKIPPED_IN_A_ROW == 0
            if reading:
                totals.wait()
            seconds = time.perf_counter() - started
            state.train_seconds += seconds
            totals.add_on_host(tokens=tokens, seconds=seconds, waiting_seconds=waited)
            hooks.on_step()
            if not reading:
                continue

            grad_norm = totals.store(state)
            state.scaler = scaler.state_dict() if scaler.is_enabled() else {}
            if config.spike_sigmas:
                state.recent_loss = recent.numbers.tolist()
            _check_progress(state, config, scaler)
            if due.log:
                hooks.on_log(train_record(state, lr, grad_norm))
                totals.clear()
                state.window = {}
            val_loss = None
            if due.validate:
                val_loss = evaluate(model, validation, task.loss, dtype)
                hooks.on_log(_val_record(state, val_loss, task.score(model)))
            # Amid skipped steps there is nothing new to save, and no good place to go back to.
            if (due.save and not state.skipped_in_a_row) or due.last or due.stop:
                is_best = _is_best(val_loss, state.best_val_loss)
                if is_best:
                    state.best_val_loss = val_loss
                hooks.on_save(state, val_loss, is_best)
            if due.stop:
                break
    return state


def _steps(
    model: LLM, task: Task, config: TrainConfig, state: RunState
) -> Iterator[tuple[list[Batch], int]]:
    """Return the micro-batches and the divisor of each step left, fetched ahead if they may be."""
    loader = task.loader(model.config, config)
    pinned = model.embed.weight.device.type == "cuda"
    samples = config.batch_size * config.grad_accum
    # Computed now: the state moves on.
    firsts = [state.samples_seen + i * samples for i in range(config.max_steps - state.step)]
    made = (micro_batches(loader, task.count, config, first, pinned) for first in firsts)
    return prefetch(made) if task.fetch_ahead else made


def _check_progress(state: RunState, config: TrainConfig, scaler: torch.amp.GradScaler) -> None:
    """Raise TrainingDiverged after too many skipped steps in a row."""
    # A scaler that is still falling may yet find a scale at which gradients are finite.
    settled = not scaler.is_enabled() or scaler.get_scale() < SMALLEST_LOSS_SCALE
    if state.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW and settled:
        raise TrainingDiverged(
            f"{state.skipped_in_a_row} steps in a row were skipped (step {state.step}), for their gradients were not finite"
            + (" or their losses spikes" if config.spike_sigmas else "")
            + ": go back to the last checkpoint with a lower --lr or a longer --warmup_steps, or "
            "try --dtype float32"
        )


def _val_record(state: RunState, val_loss: float, score: dict[str, float]) -> dict:
    """Return the log record of a validation."""
    record = {
        "kind": "val",
        "step": state.step,
        "tokens_seen": state.tokens_seen,
        "loss": val_loss,
        "perplexity": perplexity(val_loss),
    }
    return record | ({"score": score} if score else {})


def _is_best(val_loss: float | None, best: float | None) -> bool:
    """Return whether a validation loss is the lowest so far."""
    if val_loss is None or not math.isfinite(val_loss):
        return False
    return best is None or val_loss < best


# -------------------------------------------------------------------------------------------- a run
def run(plan: TrainPlan) -> int:
    """Carry out a plan; return the exit code (0, or 128 + the signal that stopped it)."""
    if plan.config.micro_batch == "auto":
        plan = with_largest_micro_batch(plan, lambda candidate: runs(candidate, forward_backward))
    config, needed = plan.config, check_memory(plan)
    for line in plan.notes + schedule_notes(plan) + describe(plan, needed):
        print(line)
    sys.stdout.flush()
    if config.resume:
        # A kill between a save and its names left those of an older one.
        restore_names(plan.source)
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
    while True:
        reporter = Reporter(plan, state)
        try:
            return _train(plan, state, reporter)
        except TrainingDiverged as error:
            plan, state = _rolled_back(plan, state, error)
        finally:
            reporter.close()


def schedule_notes(plan: TrainPlan) -> list[str]:
    """Return a line about the learning rate where a resumed run has another max_steps."""
    if not plan.config.resume:
        return []
    config, before = plan.config, TrainConfig(**plan.source.train_config)
    if config.max_steps == before.max_steps:
        return []
    step = plan.source.step
    return [
        f"max_steps {before.max_steps:,} -> {config.max_steps:,}: the learning rate goes on from {learning_rate(step, config):.3g} "
        f"(before: {learning_rate(step - 1, before):.3g})"
    ]


def _rolled_back(
    plan: TrainPlan, diverged: RunState, error: TrainingDiverged
) -> tuple[TrainPlan, RunState]:
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
            state = saved_state(source)
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


def _train(plan: TrainPlan, state: RunState, reporter: Reporter) -> int:
    """Set up, train, and print how it ended."""
    config = plan.config
    model, optimizer, seconds = set_up(plan, forward_backward)
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
            tokenizer_state=plan.task.tokenizer_state,
            data_fingerprint=plan.task.fingerprint,
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
        hooks = Hooks(reporter.on_log, on_save, on_step, stop.requested)
        fit(model, plan.task, config, hooks, optimizer=optimizer, state=state, dtype=plan.dtype)
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
    settings = cli.settings_from(parser.parse_args(argv), ModelConfig, TrainConfig)
    return run(make_plan(settings, pretraining))


if __name__ == "__main__":
    cli.run_main(main)
