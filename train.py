"""Train a model on shards written by prepare_data.py.

    python train.py                    the 3.66 B default
    python train.py --preset nano      minutes on a laptop
    python train.py --resume           continue the run in checkpoints/, bit for bit on a CPU

`train_step` is one optimizer step, `fit` the loop around it, `run` a run with its files. A step is
a function of (weights, optimizer state, seed, step), so a resumed run repeats and skips nothing.
Data order comes from (seed, epoch), dropout's random numbers from (seed, step, micro-batch).

    torchrun --standalone --nproc_per_node 8 train.py      on 8 GPUs (docs/distributed.md)
"""

from __future__ import annotations

from runtime.base import process

# Before the next imports, because PyTorch reads its environment when it loads.
process.before_torch()
# ruff: noqa: E402

import contextlib
import dataclasses
import functools
import math
import sys
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from config_model import ModelConfig, TrainConfig
from model import LLM, Output
from runtime.base import cli
from runtime.base.device import autocast, peak_memory_line, to_device
from runtime.base.process import StopRequest
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.checkpoint.folder import restore_names
from runtime.checkpoint.format import Checkpoint
from runtime.checkpoint.write import save_checkpoint
from runtime.data.loader import micro_batches, prefetch
from runtime.data.shards import open_data
from runtime.inference.short_answers import short_answers
from runtime.training.agreed import check_data_and_disk
from runtime.training.closing import closing_lines
from runtime.training.optimizer import build_optimizer, check_skips, total_norm
from runtime.training.plan import (
    TrainPlan,
    check_memory,
    describe,
    initial_state,
    make_plan,
    saved_bytes,
    schedule_notes,
    with_largest_micro_batch,
)
from runtime.training.reporter import PROFILED_STEPS, Reporter, profiled, reporter_of
from runtime.training.rollback import rolled_back
from runtime.training.setup import explained_failures, runs, set_up
from runtime.training.state import (
    METRIC,
    RecentLoss,
    RunState,
    Totals,
    TrainingDiverged,
    train_record,
    val_record,
)
from runtime.training.task import Batch, Pretraining, Task, document_starts
from runtime.training.watching import watched

# Skipped steps in a row that a run survives. The host reads the device at least this often, too.
MOST_SKIPPED_IN_A_ROW = 25
# float16's smallest normal number: no smaller scale mends a gradient that overflows at this one.
SMALLEST_LOSS_SCALE = 2.0**-14


# ------------------------------------------------------------------------------ schedule and losses
def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of step number `step`; 0 is the first.

    Linear warm-up, then one of: cosine to min_lr (Loshchilov & Hutter 2016); wsd, constant and then
    linear to min_lr over the last decay_fraction (Hu et al. 2024, "MiniCPM"); constant.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    first = config.warmup_steps
    if config.schedule == "wsd":
        first = max(first, round(config.max_steps * (1 - config.decay_fraction)))
    # The last step, max_steps - 1, has min_lr.
    done = min(max((step - first) / max(config.max_steps - 1 - first, 1), 0.0), 1.0)
    falling = 1 - done
    if config.schedule == "cosine":
        falling = 0.5 * (1 + math.cos(math.pi * done))
    return config.min_lr + (config.lr - config.min_lr) * falling


def next_token_loss(model: LLM, batch: Batch) -> Output:
    """Return the pass of pre-training: each target is the token after its input."""
    inputs_BT, targets_BT = batch
    return model(inputs_BT, targets_BT)


def packed_documents_loss(model: LLM, batch: Batch, end_of_text_id: int) -> Output:
    """Return next_token_loss where no token sees the documents before its own.

    An end-of-text token begins the document after it. The document's first token then sees that one
    token, as the first token that predict.py generates does.
    """
    inputs_BT, targets_BT = batch
    starts_BT = document_starts(inputs_BT, end_of_text_id)
    return model(inputs_BT, targets_BT, starts_BT=starts_BT)


def pretraining(config: TrainConfig, source: Checkpoint | None = None) -> Task:
    """Return the task of pre-training on the shards in config.data_dir; any weights will do."""
    train, val = open_data(config.data_dir)
    if not config.document_mask:
        return Pretraining(train, val, next_token_loss)
    loss = functools.partial(packed_documents_loss, end_of_text_id=train.end_of_text_id)
    return Pretraining(train, val, loss)


@torch.no_grad()
def evaluate(
    model: LLM,
    batches: Sequence[Batch],
    loss_fn: Callable = next_token_loss,
    dtype: torch.dtype = torch.float32,
    ranks: Ranks = ONE_PROCESS,
) -> float:
    """Return the mean cross-entropy (nats) over the valid targets of `batches`.

    Auxiliary losses are not in it. Draws no random numbers. Each rank takes its batches.
    """
    device, was_training = model.embed.weight.device, model.training
    model.eval()
    sums = []
    try:
        for batch, counts in ranks.share(batches):
            with autocast(device, dtype):
                out = loss_fn(model, to_device(batch, device))
            total = torch.stack((out.cross_entropy_sum, out.num_targets.to(out.cross_entropy_sum)))
            sums.append(total if counts else torch.zeros_like(total))
        # The one host sync.
        totals = ranks.concatenated(torch.stack(sums)).tolist()
    finally:
        model.train(was_training)
    return sum(total for total, _ in totals) / sum(count for _, count in totals)


# ----------------------------------------------------------------------------------------- the step
class StepResult(NamedTuple):
    """What a step did: tensors on the device, without a host sync.

    sums: numbers to log, by name; train_record divides them.
    grad_norm: 0-dim, before clipping.
    skipped: 0-dim bool.
    """

    sums: dict[str, Tensor]
    grad_norm: Tensor
    skipped: Tensor


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
        assert out.cross_entropy_sum is not None, "Task.loss gives the model targets"
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
    step: int = 0,
    ranks: Ranks = ONE_PROCESS,
) -> StepResult:
    """Take step number `step` on this rank's micro-batches; divisor: of those of all ranks.

    Minimise sum(cross-entropy) / divisor + mean of the auxiliary losses. Gradients are those of one
    big batch. A step changes nothing if its loss or gradient is not finite, its loss is a spike, or
    the task says that its batches teach nothing.
    """
    # Add up the gradients of the micro-batches, and what is logged.
    losses: Any = 0.0
    router: dict[str, Tensor] = {}
    metrics: dict[str, Tensor] = {}
    for i, batch in zip(ranks.mine(config.grad_accum), batches, strict=True):
        # Dropout's, so that a resume needs no state of the generator.
        torch.manual_seed(((config.seed * 1_000_003 + step) * 1_000_003 + i) % 2**63)
        out = forward_backward(model, task, batch, dtype, divisor, config.grad_accum, scaler)
        assert out.cross_entropy_sum is not None
        losses = losses + torch.stack((out.cross_entropy_sum, out.aux_loss, out.z_loss)).detach()
        for name, value in out.router.logged().items():
            router[name] = router.get(name, 0.0) + value / config.grad_accum
        for name, value in out.metrics.items():
            metrics[METRIC + name] = metrics.get(METRIC + name, 0.0) + value
    summed = ranks.sum_of({"losses": losses, **router, **metrics})
    cross_entropy, aux_loss, z_loss = summed.pop("losses")

    # Update, or skip.
    mean_loss = cross_entropy / divisor
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spike, idle = recent.is_spike(mean_loss), task.is_idle(batches)
    norm, skipped = _update(
        optimizer, scaler, parameters, cross_entropy, config.grad_clip, spike, idle, ranks
    )
    if config.spike_sigmas:
        recent.add(mean_loss, skipped)
    if task.balances and not idle:
        # A row of ones moves no expert bias.
        model.balance_experts(torch.where(skipped, 1.0, summed["expert_load"]))
    optimizer.zero_grad(set_to_none=True)

    sums = {
        "cross_entropy": cross_entropy,
        "targets": torch.full_like(norm, divisor),
        "steps": torch.ones_like(norm),
        "aux_loss": aux_loss / config.grad_accum,
        "z_loss": z_loss / config.grad_accum,
        **summed,
    }
    return StepResult(sums, norm, skipped)


def _update(
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    parameters: list[Tensor],
    cross_entropy: Tensor,
    grad_clip: float,
    is_spike: Tensor | None = None,
    idle: bool = False,
    ranks: Ranks = ONE_PROCESS,
) -> tuple[Tensor, Tensor]:
    """Clip and take the optimizer's step; change nothing if it is bad or idle.

    Bad is a loss or gradient that is not finite, or a loss that is a spike. Return (gradient norm
    before clipping, whether the step was bad), 0-dim: the device decides, without a host sync.
    """
    scaler.unscale_(optimizer)
    gradients = [ranks.local(p.grad) for p in parameters if p.grad is not None]
    norm = total_norm(gradients, ranks)
    bad = ~torch.isfinite(norm + cross_entropy)
    bad = bad if is_spike is None else bad | is_spike
    if idle:
        scaler.update()
        return norm, bad
    if scaler.is_enabled() or norm.device.type == "mps":
        # The scaler tells the optimizer to change nothing where a gradient is not finite. MPS's
        # kernel ignores that, so there the host reads `bad`.
        if norm.device.type != "mps" or not bad:
            if grad_clip:
                torch._foreach_mul_(gradients, (grad_clip / norm).clamp(max=1.0))
            scaler.step(optimizer)
    else:
        # What GradScaler tells a fused optimizer: divide gradients by grad_scale, so that clipping
        # costs no pass of its own, and change nothing where found_inf is 1.
        scale = (norm / grad_clip).clamp(min=1.0).float() if grad_clip else None
        optimizer.grad_scale = scale  # type: ignore[attr-defined]  # torch's own protocol
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
    scaler.update()
    return norm, bad


# ----------------------------------------------------------------------------------------- the loop
@dataclass
class Hooks:
    """What the loop calls; by default nothing.

    on_log(record): every log_interval steps ("train"), after each validation ("val"), and the
        task's "score", also before the first step.
    on_save(state, val_loss, is_best): every save_interval steps (not among skipped ones), at the
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
    ranks: Ranks = ONE_PROCESS,
) -> RunState:
    """Train `model` in place until config.max_steps or a requested stop; return the state reached.

    The host waits for the device only where something is due (Hooks), and every
    MOST_SKIPPED_IN_A_ROW steps (MPS: at each). The optimizer must be able to skip a step, as
    torch's fused ones are; else ValueError. ranks: that all call this, with models that they
    share. Raises TrainingDiverged.
    """
    hooks = hooks or Hooks()
    state = state or RunState()
    optimizer = optimizer or build_optimizer(model, config, ranks)
    check_skips(optimizer)
    device = model.embed.weight.device
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if state.scaler:
        scaler.load_state_dict(state.scaler)
    task.restore(state.task)
    task.started(model, ranks)
    validation = task.validation(model.config, config)
    if not state.step:
        _score(model, task, state, hooks)
    totals = Totals(state, device)
    recent = RecentLoss(state, config.spike_sigmas, device)
    model.train()
    with contextlib.closing(_steps(model, task, config, state, ranks)) as stream:
        for step in range(state.step, config.max_steps):
            # Take a step.
            started = time.perf_counter()
            batches, divisor = next(stream)
            waited = time.perf_counter() - started
            lr = _set_learning_rate(optimizer, step, config)
            tokens = sum(batch[0].numel() for batch in batches)
            divisor, tokens = ranks.sum_on_host(divisor, tokens)
            result = train_step(
                *(model, task, batches, divisor, optimizer, scaler, recent, config, dtype),
                step=step,
                ranks=ranks,
            )
            totals.add(result.sums, result.grad_norm, result.skipped)

            # Count it; wait for the device only where its numbers are read.
            state.step = step + 1
            state.samples_seen += config.batch_size * config.grad_accum
            state.tokens_seen += tokens
            validates = bool(validation or task.scores)
            stop = ranks.any(hooks.stop_requested())
            due = what_is_due(state.step, config, validates, stop)
            reads = any(due) or state.step % MOST_SKIPPED_IN_A_ROW == 0
            if reads:
                totals.wait()
            seconds = time.perf_counter() - started
            state.train_seconds += seconds
            totals.add_on_host(tokens=tokens, seconds=seconds, waiting_seconds=waited)
            hooks.on_step()
            if not reads:
                continue

            # Log, validate, save or stop.
            grad_norm = totals.store(state)
            state.scaler = scaler.state_dict() if scaler.is_enabled() else {}
            if config.spike_sigmas:
                state.recent_loss = recent.numbers.tolist()
            _check_progress(state, config, scaler)
            if due.log:
                hooks.on_log(train_record(state, lr, grad_norm, task.is_likelihood))
                totals.clear()
                state.window = {}
            val_loss, score = None, {}
            if due.validate and validation:
                # Whatever it is, it has a length and numbered batches.
                val_loss = evaluate(model, validation, task.loss, dtype, ranks)  # type: ignore[arg-type]
                hooks.on_log(val_record(state, val_loss, task.is_likelihood))
            if due.validate:
                score = _score(model, task, state, hooks)
            # Among skipped steps nothing new needs saving, and nobody should roll back to there.
            if (due.save and not state.skipped_in_a_row) or due.last or due.stop:
                is_best = state.note_best(val_loss, score.get(task.best_score), task.best_score)
                state.task = task.state()
                hooks.on_save(state, val_loss, is_best)
            if due.stop:
                break
    return state


def _steps(
    model: LLM, task: Task, config: TrainConfig, state: RunState, ranks: Ranks
) -> Generator[tuple[list[Batch], int]]:
    """Return a rank's micro-batches and their count of each step left, fetched ahead if it may."""
    loader = task.loader(model.config, config)
    pinned = model.embed.weight.device.type == "cuda"
    samples = config.batch_size * config.grad_accum
    # Computed now, because the state changes while the steps are made.
    firsts = [state.samples_seen + i * samples for i in range(config.max_steps - state.step)]
    mine = ranks.mine(config.grad_accum)
    made = (micro_batches(loader, task.count, config, first, pinned, mine) for first in firsts)
    # prefetch is annotated as an iterator and is a generator, which `fit` closes.
    return prefetch(made) if task.fetch_ahead else made  # type: ignore[return-value]


def _set_learning_rate(optimizer: Optimizer, step: int, config: TrainConfig) -> float:
    """Give every group of the optimizer the learning rate of a step; return it."""
    lr = learning_rate(step, config)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _check_progress(state: RunState, config: TrainConfig, scaler: torch.amp.GradScaler) -> None:
    """Raise TrainingDiverged after too many skipped steps in a row."""
    # A scale that is still falling may yet reach one at which gradients are finite.
    settled = not scaler.is_enabled() or scaler.get_scale() < SMALLEST_LOSS_SCALE
    if state.skipped_in_a_row > MOST_SKIPPED_IN_A_ROW and settled:
        spikes = " or their losses were spikes" if config.spike_sigmas else ""
        raise TrainingDiverged(
            f"{state.skipped_in_a_row} steps in a row were skipped (step {state.step}), because "
            f"their gradients were not finite{spikes}: go back to the last checkpoint with a lower "
            "--lr or a longer --warmup_steps, or try --dtype float32"
        )


@torch.no_grad()
def _score(model: LLM, task: Task, state: RunState, hooks: Hooks) -> dict[str, float]:
    """Return the task's further numbers of a validation, asked in eval mode; log them."""
    was_training = model.training
    model.eval()
    try:
        numbers = task.score(model)
    finally:
        model.train(was_training)
    if numbers:
        hooks.on_log({"kind": "score", "step": state.step, "score": numbers})
    return numbers


# -------------------------------------------------------------------------------------------- a run
def launch(settings: cli.Settings, task_of: Callable, config_class: type = TrainConfig) -> int:
    """Plan a run and carry it out, here or on the ranks that torchrun started (make_plan, run)."""
    if not process.has_ranks():
        return run(make_plan(settings, task_of, config_class))
    from runtime.distributed.launch import joined

    with joined(settings.values.get("device", "auto")) as ranks:
        return run(make_plan(settings, task_of, config_class, ranks))


def run(plan: TrainPlan) -> int:
    """Carry out a plan; return the exit code (0, or 128 + the signal that stopped it)."""
    if plan.config.micro_batch == "auto":
        plan = with_largest_micro_batch(plan, lambda candidate: runs(candidate, forward_backward))
    ranks, config = plan.ranks, plan.config
    needed = ranks.together(lambda: check_memory(plan))
    for line in plan.notes + schedule_notes(plan, learning_rate) + describe(plan, needed):
        print(line)
    sys.stdout.flush()
    if config.resume:
        assert plan.source is not None
        # A kill between saving a checkpoint and naming it left the names of an older one.
        ranks.from_first(functools.partial(restore_names, plan.source))
    state = initial_state(plan)
    left = config.max_steps - state.step
    if not left:
        print(
            f"training is already complete ({state.step:,}/{config.max_steps:,} steps in "
            f"{config.ckpt_dir}); raise --max_steps to continue"
        )
        return 0
    if config.profile and left < sum(PROFILED_STEPS):
        raise ValueError(
            f"--profile needs {sum(PROFILED_STEPS)} steps (it records the last "
            f"{PROFILED_STEPS[-1]}), and {left} are left: raise --max_steps"
        )
    check_data_and_disk(plan, saved_bytes(plan))
    task = plan.task
    answers = short_answers(
        config.sample_prompts, task.tokenizer_state, task.chats, plan.dtype, ranks
    )
    with watched(plan):
        while True:
            reporter = reporter_of(plan, state, answers)
            try:
                return _train(plan, state, reporter)
            except TrainingDiverged as error:
                reporter.note_skipped(state.step)
                plan, state = rolled_back(plan, state, error)
            finally:
                reporter.close()


def _train(plan: TrainPlan, state: RunState, reporter: Reporter) -> int:
    """Set up, train, and print how it ended."""
    config = plan.config
    plan.task.restore(state.task)
    model, optimizer, seconds = set_up(plan, forward_backward)
    reporter.ready(model, seconds)

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
            stage=plan.task.stage(model),
            ranks=plan.ranks,
        )
        reporter.saved(state.step, is_best)

    with (
        StopRequest() as stop,
        explained_failures(plan),
        profiled(plan, state, reporter.say) as on_step,
    ):
        hooks = Hooks(reporter.on_log, on_save, on_step, stop.requested)
        fit(
            *(model, plan.task, config, hooks),
            optimizer=optimizer,
            state=state,
            dtype=plan.dtype,
            ranks=plan.ranks,
        )
    reporter.finish()
    print(peak_memory_line(plan.device, sum(check_memory(plan).values())))
    print(*closing_lines(plan, state, reporter.scores()), sep="\n")
    if state.step < config.max_steps:
        plan.ranks.stopped()
        return stop.exit_code
    return 0


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(
        __doc__, "Settings: a flag beats --config, which beats --preset, which beats the default."
    )
    cli.add_config_flags(parser, ModelConfig, TrainConfig)
    settings = cli.settings_from(parser.parse_args(argv), ModelConfig, TrainConfig)
    return launch(settings, pretraining)


if __name__ == "__main__":
    cli.run_main(main)
