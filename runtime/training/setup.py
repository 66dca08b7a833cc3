"""Build what a plan names: model, optimizer and loader."""

from __future__ import annotations

import dataclasses
import time

import torch
from tqdm import tqdm

from model import LLM
from runtime.base.device import (
    autocast,
    explained_out_of_memory,
    has_room,
    is_out_of_memory,
    release_memory,
    synchronize,
    to_device,
)
from runtime.checkpoint.optimizer_state import initialise_state
from runtime.checkpoint.read import build_model, load_training_state
from runtime.checks.kernels import settle_kernels
from runtime.data.loader import WindowLoader
from runtime.kernels.choose import choose_kernels
from runtime.training.optimizer import build_optimizer
from runtime.training.plan import (
    Plan,
    with_config,
)
from train import (
    loss_of,
)


def runs(plan: Plan) -> bool:
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


def set_up(plan: Plan) -> tuple[LLM, torch.optim.Optimizer, WindowLoader, float]:
    """Model, optimizer and loader of a plan, ready for `fit`, and the seconds that a micro-batch takes."""
    config = plan.config
    loader = WindowLoader(
        plan.train, plan.model_config.context_length, config.batch_size, config.seed
    )
    with out_of_memory_advice(plan):
        if config.init_from:
            model = build_model(with_config(plan.source, plan.model_config), plan.device)
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
