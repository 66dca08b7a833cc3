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
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

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
from runtime.data.loader import micro_batches, prefetch, validation_batches
from runtime.training.optimizer import build_optimizer
from runtime.training.plan import (
    Plan,
    check_memory,
    checkpoint_bytes,
    describe,
    initial_state,
    make_plan,
    saved_state,
    with_largest_micro_batch,
)
from runtime.training.reporter import PROFILED_STEPS, Reporter, profiled
from runtime.training.setup import out_of_memory_advice, set_up
from runtime.training.state import (
    RecentLoss,
    RunState,
    Totals,
    TrainingDiverged,
    perplexity,
    train_record,
)

MOST_SKIPPED_IN_A_ROW = 25
SMALLEST_LOSS_SCALE = (
    2.0**-14
)  # float16's smallest normal number: a gradient that overflows even so is not a matter of scale


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
        micro_batches(loader, config, first_sample, device) for first_sample in firsts
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
                on_log(train_record(state, lr, grad_norm))
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
                        "perplexity": perplexity(val_loss),
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


def loss_of(plan: Plan) -> Callable[[LLM, tuple], Output]:
    """The plan's loss."""
    return (
        functools.partial(packed_documents_loss, end_of_text_id=plan.train.end_of_text_id)
        if plan.config.document_mask
        else next_token_loss
    )


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
