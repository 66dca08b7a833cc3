"""Count what a training step asks of other ranks, and its peak memory, in one process.

    python -m benchmarks.fake_ranks

torch.distributed's process group "fake" plays any number of ranks and moves nothing. So shapes,
bytes and the order of what is asked are those of a real run; numbers are not. Experts on several
ranks are told that the others send them what they send. `step_collectives` and the memory of a rank
(runtime/training) are held to these counts.
"""

from __future__ import annotations

import contextlib
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.tensor import _redistribute
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from config_model import ModelConfig, TrainConfig
from model import LLM
from runtime.base import cli
from runtime.base.text import human_bytes
from runtime.checkpoint.optimizer_state import initialise_state
from runtime.distributed.parallel import Parallel
from runtime.kernels.choose import choose_kernels
from runtime.training.optimizer import build_optimizer
from runtime.training.placement import Placement
from runtime.training.state import RecentLoss, RunState
from runtime.training.task import Batch, GivenTask
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
    "none, recomputed, one balance of all": (
        8,
        {},
        dict(shard="none", activation_checkpointing=True, balance_over="global"),
    ),
    "node, experts shared, Muon": (
        64,
        dict(expert_activation="swiglu", expert_bias=False, qk_norm=True, tie_embeddings=True),
        dict(shard="node", expert_parallel=4, optimizer="muon"),
    ),
    "experts shared in the node, recomputed": (
        64,
        dict(qkv_bias=True, attention_sinks=True, router_bias=True, head_bias=False),
        dict(expert_parallel=8, activation_checkpointing=True, balance_over="global"),
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
        elif "sum_over_ranks" in str(function):
            # An operation of ours, inside of which nothing is seen.
            every = tuple(range(dist.get_world_size()))
            self.asked[Asked(ALL_REDUCE, every, result.numel() * result.itemsize)] += 1
        self.watch(result)
        self.peak_bytes = max(self.peak_bytes, self.held_bytes())
        return result

    def watch(self, tensors: object) -> None:
        """Count the storages of some tensors from now on, as long as they live."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = weakref.ref(storage)

    def held_bytes(self) -> int:
        """Return the bytes of what lives. FSDP empties a storage and fills it again."""
        alive = {key: storage for key, ref in self._storages.items() if (storage := ref())}
        self._storages = {key: self._storages[key] for key in alive}
        return sum(storage.nbytes() for storage in alive.values())

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
    # The functional ones are given its name, last.
    group = _resolve_process_group(args[-1])
    return tuple(dist.get_process_group_ranks(group))


@contextlib.contextmanager
def fake_ranks(world: int, in_node: int = RANKS_OF_A_NODE) -> Iterator[Parallel]:
    """Yield the first of `world` ranks, in this process; the others answer with nothing."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    try:
        yield Parallel(torch.device("cpu"), min(world, in_node))
    finally:
        dist.destroy_process_group()
        # How to gather is kept for equal meshes, and names groups that are gone.
        _redistribute._gen_transform_infos.cache_clear()
        _redistribute.clear_redistribute_planner_cache()


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
        ranks.arrange(c.expert_parallel, c.shard, config.num_experts, c.balance_over)
        ranks.shard(model, dtype)
        optimizer = build_optimizer(model, c, ranks)
        initialise_state(optimizer)
        loader = _Zeros(config, c.batch_size)
        task = GivenTask(loader, train.next_token_loss)
        batches: list[Batch] = [loader.batch(0) for _ in ranks.mine(c.grad_accum)]
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        recent = RecentLoss(RunState(), 0.0, torch.device("cpu"))
        held = [ranks.local(parameter) for parameter in model.parameters()]
        held += [ranks.local(t) for state in optimizer.state.values() for t in state.values()]
        counter.watch(held)
        with counter:
            train.train_step(
                *(model, task, batches, 1, optimizer, scaler, recent, c, dtype), ranks=ranks
            )
    return counter


def asked_bytes(counter: CollectiveCounter, in_node: int = RANKS_OF_A_NODE) -> Counter[tuple]:
    """Return how often each (kind, ranks, nodes, bytes) was asked of a group of several ranks."""
    found: Counter[tuple] = Counter()
    for (kind, ranks, size), times in counter.asked.items():
        if len(ranks) > 1:
            found[kind, len(ranks), len({rank // in_node for rank in ranks}), size] += times
    return found


def formula_bytes(
    world: int, config: ModelConfig, train_config: TrainConfig, in_half: bool = False
) -> Counter[tuple]:
    """Return the same by the closed form."""
    found: Counter[tuple] = Counter()
    placement = placement_of(world, config, train_config, in_half)
    for c in step_collectives(config, train_config, placement, 2 if in_half else 4):
        found[c.kind, c.ranks, c.nodes, c.size] += c.times
    return found


def placement_of(
    world: int, config: ModelConfig, train_config: TrainConfig, in_half: bool
) -> Placement:
    """Return how ranks in nodes of eight share a model."""
    c = train_config
    in_node = min(world, RANKS_OF_A_NODE)
    return Placement(world, in_node, config.num_experts, c.expert_parallel, c.shard, in_half)


def case(name: str) -> tuple[int, ModelConfig, TrainConfig]:
    """Return the ranks and the configs of one of CASES."""
    world, model, training = CASES[name]
    return world, ModelConfig(**(TINY | model)), TrainConfig(**(dict(grad_accum=world) | training))


def main(argv: list[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    parser.parse_args(argv)
    wrong = 0
    for name in CASES:
        for in_half in (False, True):
            given = (*case(name), in_half)
            counted, formula = asked_bytes(counted_step(*given)), formula_bytes(*given)
            wrong += counted != formula
            total = sum(size * times for (*_, size), times in counted.items())
            print(
                f"{name}, {'bfloat16' if in_half else 'float32'}, {given[0]} ranks: "
                f"{counted.total()} collectives of {human_bytes(total)} in all, "
                f"{'as' if counted == formula else 'NOT as'} the closed form says"
            )
    return min(wrong, 1)


if __name__ == "__main__":
    cli.run_main(main)
