"""Count what a training step asks of other ranks, and its peak memory, in one process.

    python -m benchmarks.fake_ranks                          the cases below, at 8 and 64 ranks
    python -m benchmarks.fake_ranks --world 64 --preset nano --expert_parallel 8

torch.distributed's process group "fake" plays any number of ranks and moves nothing. So shapes,
bytes and the order of what is asked are those of a real run; numbers are not. Experts on several
ranks are told that the others send them what they send. `step_collectives` and the memory of a rank
(runtime/training) are held to these counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base import cli
from runtime.base.device import DTYPES
from runtime.base.text import human_bytes
from runtime.checkpoint.optimizer_state import initialise_state
from runtime.distributed.parallel import Parallel
from runtime.kernels.choose import choose_kernels
from runtime.training.optimizer import build_optimizer
from runtime.training.placement import Placement
from runtime.training.state import RecentLoss, RunState
from runtime.training.task import GivenTask
from runtime.training.traffic import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
    step_collectives,
)

RANKS_OF_A_NODE = 8
# torch's operations, by the parts of their names.
KINDS = {
    "allgather": ALL_GATHER,
    "all_gather": ALL_GATHER,
    "reduce_scatter": REDUCE_SCATTER,
    "allreduce": ALL_REDUCE,
    "alltoall": ALL_TO_ALL,
}
TINY = dict(
    vocabulary_size=250,
    d_model=48,
    transformer_blocks=2,
    num_heads=4,
    num_kv_heads=2,
    context_length=32,
    d_ff=40,
    num_experts=16,
    use_attention_bias=False,
)
# (ranks, changes of TINY, settings of training)
CASES: dict[str, tuple[int, dict, dict]] = {
    "full, AdamW": (8, {}, {}),
    "full, Muon, two micro-batches": (64, {}, dict(optimizer="muon", grad_accum=128)),
    "none, recomputed": (8, {}, dict(shard="none", activation_checkpointing=True)),
    "node, experts shared, Muon": (
        64,
        dict(expert_activation="swiglu", expert_bias=False, qk_norm=True, tie_embeddings=True),
        dict(shard="node", expert_parallel=4, optimizer="muon"),
    ),
    "experts shared in the node, recomputed": (
        64,
        dict(qkv_bias=True, attention_sinks=True, router_bias=True, head_bias=False),
        dict(expert_parallel=8, activation_checkpointing=True),
    ),
    "experts shared by all, learned attention bias": (
        8,
        dict(use_attention_bias=True, top_k=3),
        dict(expert_parallel=8, grad_accum=16),
    ),
}


class Asked(NamedTuple):
    """A collective: its kind, the numbers of the ranks that take part, bytes of all of it."""

    kind: str
    ranks: tuple[int, ...]
    size: int


class CollectiveCounter(TorchDispatchMode):
    """While it is entered, note what is asked of other ranks, and the most bytes held at once."""

    def __init__(self):
        super().__init__()
        self.asked: Counter[Asked] = Counter()
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        kind = next((kind for part, kind in KINDS.items() if part in str(function)), None)
        if kind and function.namespace in ("c10d", "_c10d_functional"):
            self._note(kind, args, result)
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages.setdefault(storage._cdata, weakref.ref(storage))
        return result

    def _note(self, kind: str, args: tuple, result: object) -> None:
        tensors = [t for t in tree_leaves((args, result)) if isinstance(t, Tensor)]
        sizes = [t.numel() * t.itemsize for t in tensors]
        self.asked[Asked(kind, _ranks_of(args), max(sizes))] += 1
        if kind == ALL_TO_ALL and tensors[0].shape == tensors[1].shape:
            tensors[0].copy_(tensors[1])


def _ranks_of(args: tuple) -> tuple[int, ...]:
    """Return the numbers of the ranks in the group that an operation of torch's is given."""
    for argument in args:
        if isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type()):
            return tuple(dist.get_process_group_ranks(dist.ProcessGroup.unbox(argument)))
    names = [a for a in args if isinstance(a, str) and a != "sum"]
    return tuple(dist.get_process_group_ranks(_resolve_process_group(names[-1])))


@contextlib.contextmanager
def fake_ranks(world: int, in_node: int = RANKS_OF_A_NODE) -> Iterator[Parallel]:
    """Yield the first of `world` ranks, in this process; the others answer at once, with nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Parallel(torch.device("cpu"), min(world, in_node))
    finally:
        dist.destroy_process_group()


class _Zeros:
    """A loader of the same ids again and again."""

    def __init__(self, config: ModelConfig, batch_size: int):
        self.ids_BT = torch.zeros(batch_size, config.context_length, dtype=torch.int64)

    def batch(self, first: int) -> tuple[Tensor, Tensor]:
        return self.ids_BT, self.ids_BT


def counted_step(
    world: int, config: ModelConfig, train_config: TrainConfig, in_half: bool = False
) -> CollectiveCounter:
    """Return what the first of `world` ranks asks for in one training step.

    in_half: compute in bfloat16 and gather in it what is cast to it, as on CUDA.
    """
    c, counter = train_config, CollectiveCounter()
    dtype = torch.bfloat16 if in_half else torch.float32
    with fake_ranks(world) as ranks:
        ranks.gathers_half = in_half
        model = LLM(config)
        choose_kernels(model, torch.device("cpu"), dtype)
        model.activation_checkpointing = c.activation_checkpointing
        ranks.arrange(c.expert_parallel, c.shard, config.num_experts)
        ranks.shard(model, dtype)
        optimizer = build_optimizer(model, c, ranks)
        initialise_state(optimizer)
        loader = _Zeros(config, c.batch_size)
        task = GivenTask(loader, train.next_token_loss)
        batches = [loader.batch(0) for _ in ranks.mine(c.grad_accum)]
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        recent = RecentLoss(RunState(), 0.0, torch.device("cpu"))
        with counter:
            train.train_step(
                *(model, task, batches, 1, optimizer, scaler, recent, c, dtype), ranks=ranks
            )
    return counter
