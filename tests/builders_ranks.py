"""Small training runs on several ranks, and in one process, for comparison."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

import train
from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base.device import DTYPES, one_thread
from runtime.base.ranks import ONE_PROCESS, Ranks
from runtime.kernels.choose import choose_kernels
from runtime.kernels.linear_cross_entropy import IGNORE
from runtime.training.optimizer import build_optimizer
from runtime.training.task import GivenTask

CPU = torch.device("cpu")
SPEED = dict(
    batch_size=2,
    grad_accum=2,
    max_steps=10,
    warmup_steps=2,
    lr=1e-2,
    min_lr=1e-3,
    log_interval=1,
    save_interval=1000,
)
FOR_RANKS = ("expert_parallel", "shard", "balance_over")
# An odd number, so that two or four ranks do not share them out evenly.
VALIDATION_BATCHES = 3


class Trained(NamedTuple):
    """What a run ends with, as whole tensors by name, and what it logged.

    gradients: of the first step and of the last, under "first." and "last.".
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]
    records: list[dict]


class Windows:
    """A loader of random ids; what it gives depends on a sample's number alone."""

    def __init__(self, config: ModelConfig, batch_size: int):
        self.config, self.batch_size = config, batch_size

    def batch(self, first: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(first)
        shape = (self.batch_size, self.config.context_length + 1)
        ids_BS = torch.randint(0, self.config.vocabulary_size, shape, generator=random)
        targets_BT = ids_BS[:, 1:].clone()
        # Batches differ in how many targets they have.
        targets_BT[0, : first % self.config.context_length] = IGNORE
        return ids_BS[:, :-1].contiguous(), targets_BT


# As ranks do in tests: two threads add in another order.
@one_thread()
def trained(
    ranks: Ranks, model_config: ModelConfig, changes: dict, device: torch.device = CPU
) -> Trained:
    """Train a new model for some steps, on ranks or in one process (ONE_PROCESS).

    changes: of SPEED, the settings of training. The one process has no use for FOR_RANKS: there
    they are dropped. Without a dtype it is float32.
    """
    if ranks is ONE_PROCESS:
        changes = {k: v for k, v in changes.items() if k not in FOR_RANKS}
    config = TrainConfig(**(SPEED | changes))
    dtype = DTYPES.get(config.dtype, torch.float32)
    torch.manual_seed(0)
    model = LLM(model_config).to(device)
    choose_kernels(model, device, dtype)
    if config.compile:
        model.compile_in_place()
    model.activation_checkpointing = config.activation_checkpointing
    ranks.arrange(
        config.expert_parallel, config.shard, model_config.num_experts, config.balance_over
    )
    ranks.shard(model, dtype)
    optimizer = build_optimizer(model, config, ranks)
    gradients: dict[str, Tensor] = {}
    steps = 0

    def note_gradients(*_) -> None:
        nonlocal steps
        steps += 1
        for when in ["first"] * (steps == 1) + ["last"] * (steps == config.max_steps):
            for name, parameter in model.named_parameters():
                assert parameter.grad is not None
                gradients[f"{when}.{name}"] = ranks.whole(parameter.grad).clone()

    optimizer.register_step_pre_hook(note_gradients)
    records: list[dict] = []
    loader = Windows(model_config, config.batch_size)
    held_out = [loader.batch(10**6 + 7 * i) for i in range(VALIDATION_BATCHES)]
    train.fit(
        model,
        GivenTask(loader, train.next_token_loss, held_out),
        config,
        train.Hooks(on_log=records.append),
        optimizer=optimizer,
        dtype=dtype,
        ranks=ranks,
    )
    return Trained(
        {name: ranks.whole(p.detach()).clone() for name, p in model.named_parameters()},
        {
            f"{key}.{name}": ranks.whole(value).clone()
            for name, parameter in model.named_parameters()
            for key, value in optimizer.state[parameter].items()
        },
        gradients,
        {name: buffer.clone() for name, buffer in model.named_buffers()},
        records,
    )
