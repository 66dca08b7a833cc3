"""Build what a plan names, model and optimizer, and try one micro-batch."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch.optim import Optimizer
from tqdm import tqdm

from model import LLM, Output
from runtime.base.compiler import explained_compiler_failure
from runtime.base.device import (
    explained_out_of_memory,
    has_room,
    is_out_of_memory,
    release_memory,
    synchronize,
)
from runtime.base.ranks import START_SECONDS, STEP_SECONDS
from runtime.checkpoint.changed import with_config
from runtime.checkpoint.format import Checkpoint, meta_model
from runtime.checkpoint.optimizer_state import initialise_state
from runtime.checkpoint.read import build_model, load_training_state
from runtime.checks.kernels import settle_kernels
from runtime.kernels.choose import choose_kernels, why_not_c
from runtime.training.optimizer import build_optimizer
from runtime.training.placing import allocate, draw_by_name, is_large, put_back, set_aside
from runtime.training.plan import TrainPlan

# train.forward_backward(model, task, batch, dtype). It is handed in, because gradients are computed
# in train.py alone.
ForwardBackward = Callable[..., Output]


def runs(plan: TrainPlan, forward_backward: ForwardBackward) -> bool:
    """Return whether a step of the plan runs on its device with memory to spare.

    The trial is not compiled. Its memory is released.
    """
    eager = dataclasses.replace(plan, config=dataclasses.replace(plan.config, compile=False))
    try:
        set_up(eager, forward_backward)
        return has_room(plan.device)
    except ValueError as error:
        if not is_out_of_memory(error.__cause__ or error):
            raise
        return False
    finally:
        release_memory(plan.device)


def dry_run(
    model: LLM, optimizer: Optimizer, plan: TrainPlan, forward_backward: ForwardBackward
) -> float:
    """Run two micro-batches, so that a lack of memory shows now; return the second's seconds.

    The optimizer's state is allocated before, and nothing is updated. The first micro-batch warms
    up. If this rank takes several of a step, the second runs with the gradients of the first in
    memory. If it takes one, no step needs that memory.
    """
    initialise_state(optimizer)
    model.train()
    loader = plan.task.loader(plan.model_config, plan.config)
    for _ in range(2):
        if len(plan.ranks.mine(plan.config.grad_accum)) == 1:
            optimizer.zero_grad(set_to_none=True)
        started = time.perf_counter()
        forward_backward(model, plan.task, loader.batch(0), plan.dtype)
        synchronize(plan.device)
        seconds = time.perf_counter() - started
    optimizer.zero_grad(set_to_none=True)
    return seconds


@contextlib.contextmanager
def explained_failures(plan: TrainPlan) -> Iterator[None]:
    """Turn a lack of memory, or of what torch.compile needs, into a line that says what to do."""
    advice = (
        f"lower --batch_size (now {plan.config.batch_size}; raise --grad_accum as much to keep the "
        "tokens per step), or take --micro_batch auto or --activation_checkpointing; then lower "
        "--context_length or the model"
    )
    with explained_out_of_memory(plan.device, advice), explained_compiler_failure():
        yield


def set_up(plan: TrainPlan, forward_backward: ForwardBackward) -> tuple[LLM, Optimizer, float]:
    """Return a plan's model and optimizer, ready for `fit`, and the seconds of a micro-batch."""
    config, ranks = plan.config, plan.ranks
    ranks.wait_at_most(START_SECONDS)
    with explained_failures(plan):
        plan.task.planned(config, plan.dtype)
        model = build(plan)
        plan.task.prepare(model)
        choose_kernels(model, plan.device, plan.dtype)
        if why := why_not_c(plan.device, plan.dtype):
            tqdm.write(f"note     PyTorch computes experts and attention, which is slower: {why}")
        if config.compile:
            model.compile_in_place()
        share_out(model, plan)
        for line in settle_kernels(model, config.document_mask):
            tqdm.write(f"note     {line}")
        optimizer = build_optimizer(model, config, ranks, plan.muon_dtype)
        if config.resume:
            assert plan.source is not None
            load_training_state(plan.source, model, optimizer, ranks)
        model.activation_checkpointing = config.activation_checkpointing
        model.loss_rows = plan.loss_rows
        plan.task.started(model, ranks)
        seconds = dry_run(model, optimizer, plan, forward_backward)
    # Validation is compiled later, and not as fast on every node.
    ranks.wait_at_most(START_SECONDS if config.compile else STEP_SECONDS)
    return model, optimizer, seconds


def build(plan: TrainPlan) -> LLM:
    """Return the plan's model with the weights of --init_from or random ones.

    It is on its device, or it waits for share_out: of shapes alone.
    """
    from_file = is_from_file(plan)
    if from_file and plan.ranks.world == 1:
        return build_model(starting_weights(plan), plan.device)
    if from_file or is_large(plan.model_config) or plan.ranks.are_mixed:
        return meta_model(plan.model_config)
    torch.manual_seed(plan.config.seed)
    with plan.device:
        return LLM(plan.model_config)


def is_from_file(plan: TrainPlan) -> bool:
    """Return whether the plan's model begins with weights of its source.

    A run with adapters does so also when it is resumed: its own weights are loaded later, into what
    `prepare` makes of the model.
    """
    has_adapters = plan.source is not None and plan.source.adapter is not None
    return bool(plan.config.init_from) or has_adapters


def starting_weights(plan: TrainPlan) -> Checkpoint:
    """Return what a model from a file begins with; of a run with adapters, the base's weights."""
    source = plan.source
    assert source is not None, "ask is_from_file before"
    if plan.config.init_from:
        return with_config(source, plan.model_config, plan.task.new_ids(source))
    return source


def share_out(model: LLM, plan: TrainPlan) -> None:
    """Leave each rank its share of what `build` returned, with its weights, on its device.

    A large model that is resumed gets memory alone: load_training_state fills it.
    """
    ranks = plan.ranks
    is_filled = is_from_file(plan) and ranks.world > 1
    # Adapters have values already.
    own = set_aside(model) if is_filled else {}
    is_meta = model.embed.weight.is_meta
    ranks.shard(model, plan.dtype)
    if is_meta:
        allocate(model, plan.device)
    if is_filled:
        put_back(model, own, starting_weights(plan), ranks)
    elif is_meta and not plan.config.resume:
        draw_by_name(model, plan.config.seed, ranks)
