"""The ranks that torchrun starts: who holds which weights, and what they tell each other.

FSDP2 (torch.distributed.fsdp.fully_shard) keeps of each tensor the rows of one rank and gathers a
block's weights while the block computes; the ZeRO-3 of Rajbhandari et al. 2019 (arXiv 1910.02054).
Gradients are summed, never averaged: the loss is divided by the targets of the whole step already.
Stacks of experts are sharded by whole experts, so Muon finds whole matrices in them.

With --expert_parallel the ranks are a grid. Neighbours share the experts of each block
(runtime/distributed/expert_parallel.py), and all other weights are sharded over all ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

# The only way that there is, and torchtitan's.
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from model_parts import Experts
from runtime.base.ranks import START_SECONDS, Ranks, sharding_ranks
from runtime.distributed.balance import balance_over_ranks
from runtime.distributed.expert_parallel import share_experts
from runtime.distributed.trained_rows import keep_trained_rows

T = TypeVar("T")
# Parameters that autocast, or the module itself, casts before each use, by the module's class.
CAST_BEFORE_USE: dict[type, set[str]] = {
    nn.Linear: {"weight", "bias"},
    Experts: {"w_in", "b_in", "w_out", "b_out"},
}


class Parallel(Ranks):
    """The ranks of a process group that has been started.

    device: of this rank; local_world: ranks on this machine, neighbours by number.
    """

    def __init__(self, device: torch.device, local_world: int):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device: torch.device = device
        self.local_world = local_world
        self.mesh: DeviceMesh
        # All that they send each other anything in; None is that of all ranks.
        self.groups: list[dist.ProcessGroup | None] = [None]
        self.waits = START_SECONDS
        self.reshard, self.balances_globally = True, False
        # Whether matrices are gathered in the dtype that is computed in, which halves the bytes.
        self.gathers_half = device.type == "cuda"

    def arrange(
        self,
        expert_parallel: int,
        shard: str,
        num_experts: int,
        balance_over: str = "micro_batch",
    ) -> None:
        given = (self.world, self.local_world, expert_parallel, shard, num_experts)
        sharding = sharding_ranks(*given)
        self.experts, self.reshard = expert_parallel, shard != "none"
        self.balances_globally = balance_over == "global"
        assert self.device is not None, "ranks are given theirs"
        replicas, kind = self.world // sharding, self.device.type
        # Meshes of one dimension where there is one group of shards: fewer collectives.
        # Ranks that share experts are neighbours, and so on one machine if they fit there; a stack
        # is split among them first, so that their dimension comes before that of the shards.
        numbers = torch.arange(self.world).view(replicas, -1, expert_parallel).transpose(1, 2)
        names = ("replica", "expert", "expert_shard")
        # A new tensor: torch 2.11 reads a mesh's strides, and those of dimensions of 1 may be any.
        grid = DeviceMesh(kind, torch.tensor(numbers.tolist()), mesh_dim_names=names)
        flat = init_device_mesh(kind, (replicas, sharding), mesh_dim_names=("replica", "shard"))
        self.mesh = flat if replicas > 1 else flat["shard"]
        self.expert_mesh = grid["replica", "expert_shard"] if replicas > 1 else grid["expert_shard"]
        # Whose members hold the weights once, and whose members share a block's experts.
        self.shard_group, self.expert_group = flat.get_group("shard"), grid.get_group("expert")
        self.expert_rank = grid.get_local_rank("expert")
        self.whole_expert_mesh = grid["expert", "expert_shard"]
        self.groups = [None, *flat.get_all_groups(), *grid.get_all_groups()]

    # ------------------------------------------------------------------------------ on the host
    def sum_on_host(self, *numbers: int) -> tuple[int, ...]:
        sums = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(sums)
        return tuple(sums.tolist())

    def any(self, flag: bool) -> bool:
        return self.sum_on_host(int(flag))[0] > 0

    def from_first(self, make: Callable[[], T]) -> T:
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome = [make(), None]
            except (ValueError, OSError) as error:
                outcome = [None, error]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def together(self, do: Callable[[], T]) -> T:
        result, failure = None, None
        try:
            result = do()
        except (ValueError, OSError) as mistake:
            failure = mistake
        failures: list[Any] = [None] * self.world
        dist.all_gather_object(failures, failure)
        found = {rank: other for rank, other in enumerate(failures) if other is not None}
        if not found:
            return result  # type: ignore[return-value]  # what `do` returned
        rank, first = next(iter(found.items()))
        if len({str(other) for other in found.values()}) > 1 or len(found) < self.world:
            raise ValueError(f"rank {rank}: {first}") from failure
        raise first

    def check_equal(self, what: dict[str, object]) -> None:
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, what)
        for rank, theirs in enumerate(every):
            for name in every[0] | theirs:
                value, other = (one.get(name, "not given") for one in (every[0], theirs))
                if other != value:
                    raise ValueError(
                        f"rank {rank} has another {name} than rank 0: {other}, not {value}; start "
                        "all ranks with the same command, data and code"
                    )

    def command(self, command: str) -> str:
        nodes = self.world // self.local_world
        where = "--standalone" if nodes == 1 else f"--nnodes {nodes} --rdzv_endpoint HOST:PORT"
        script = command.removeprefix("python ")
        return f"torchrun {where} --nproc_per_node {self.local_world} {script}"

    def in_order(self, values: Sequence[T]) -> list[T]:
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, list(values))
        return [value for turn in zip(*every, strict=True) for value in turn]

    def wait_at_most(self, seconds: float) -> float:
        for group in self.groups:
            _set_pg_timeout(timedelta(seconds=seconds), group)
        before, self.waits = self.waits, seconds
        return before

    # ---------------------------------------------------------------------------- on the device
    def share(self, batches: Sequence[T]) -> Iterator[tuple[T, bool]]:
        for first in range(0, len(batches), self.world):
            number = first + self.rank
            yield batches[min(number, len(batches) - 1)], number < len(batches)

    def concatenated(self, rows: Tensor) -> Tensor:
        every = [torch.empty_like(rows) for _ in range(self.world)]
        dist.all_gather(every, rows)
        return torch.stack(every, dim=1).flatten(0, 1)

    def sum_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        # In float64, so that two ranks give what one process gives to the bit.
        flat = torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])
        dist.all_reduce(flat)
        parts = flat.split([tensor.numel() for tensor in tensors.values()])
        return {
            name: part.view(tensor.shape).to(tensor.dtype)
            for (name, tensor), part in zip(tensors.items(), parts, strict=True)
        }

    def sum_of_shards_(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor, group=self.shard_group)
        return tensor

    # ------------------------------------------------------------------------- weights in shards
    def shard(self, model: nn.Module, dtype: torch.dtype) -> None:
        options: dict[str, Any] = {"mesh": self.mesh, "reshard_after_forward": self.reshard}
        policy = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        half, in_half = options | {"mp_policy": policy}, self.gathers_half and dtype.itemsize == 2
        for block in model.layers:  # type: ignore[union-attr]  # an LLM's
            modules = cast_before_use(block) if in_half else []
            if self.balances_globally:
                balance_over_ranks(block.moe)
            if self.experts > 1:
                experts = share_experts(block, self.expert_group)
                own = half if experts in modules else options
                fully_shard(experts, **own | {"mesh": self.expert_mesh})
                modules = [module for module in modules if module is not experts]
            # A compiled block is one graph, which has no room for a gather in it.
            if modules and not block._compiled_call_impl:
                fully_shard(modules, **half)
            # What is left, in float32: norms, router, sinks, learned attention bias.
            fully_shard(block, **options)
        # The backward pass begins with the head, so it would only be gathered again.
        fully_shard(model, **options | {"reshard_after_forward": False})
        keep_trained_rows(model, self)
        for module in _sharded(model):
            # Plain sums: a factor of 1 alone is a product that Gloo lacks.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
        model.register_forward_hook(_free_whole_weights)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def is_split(self, tensor: Tensor) -> bool:
        return isinstance(tensor, DTensor)

    def part_of(self, tensor: Tensor, whole: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return whole
        rows = self._rows_of(tensor)
        return whole[rows.start : rows.stop]

    def rows(self, tensor: Tensor) -> range:
        return self._rows_of(tensor) if isinstance(tensor, DTensor) else range(len(tensor))

    def shape_of(self, tensor: Tensor) -> Size:
        if self._holds_experts(tensor):
            return Size((len(tensor) * self.experts, *tensor.shape[1:]))
        return tensor.shape

    def whole(self, tensor: Tensor, local: Tensor | None = None) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor if local is None else local
        local = tensor.to_local() if local is None else local
        held = DTensor.from_local(
            local,
            tensor.device_mesh,
            tensor.placements,
            run_check=False,
            shape=tensor.shape,
            stride=tensor.stride(),
        ).full_tensor()
        if not self._holds_experts(tensor):
            return held
        whole = held.new_empty(self.shape_of(tensor))
        dist.all_gather(list(whole.chunk(self.experts)), held.contiguous(), group=self.expert_group)
        return whole

    def write_files(
        self, folder: Path, groups: dict[str, dict[str, Tensor]]
    ) -> dict[str, tuple[int, str]]:
        # Here, because it takes a while.
        from runtime.distributed.sharded_checkpoint import write_files

        shards = {
            group: {name: self._shards_of(tensor) for name, tensor in tensors.items()}
            for group, tensors in groups.items()
        }
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, write_files(folder, shards, self.rank, self.world))
        return {name: file for files in every for name, file in files.items()}

    def _shards_of(self, tensor: Tensor) -> Tensor:
        """Return a tensor that knows of which rows of the whole it has; of experts too."""
        if not self._holds_experts(tensor):
            return tensor
        shape = self.shape_of(tensor)
        return DTensor.from_local(
            self.local(tensor),
            self.whole_expert_mesh,
            (Shard(0), Shard(0)),
            run_check=False,
            shape=shape,
            stride=torch.empty(shape, device="meta").stride(),
        )

    def _holds_experts(self, tensor: Tensor) -> bool:
        """Return whether a tensor is this rank's part of a stack that other ranks hold parts of."""
        return (
            self.experts > 1
            and isinstance(tensor, DTensor)
            and tensor.device_mesh == self.expert_mesh
        )

    def _rows_of(self, tensor: DTensor) -> range:
        """Return which rows of the whole tensor are this rank's."""
        start, count = 0, len(tensor)
        for size, rank, placement in zip(
            tensor.device_mesh.shape,
            tensor.device_mesh.get_coordinate() or (),
            tensor.placements,
            strict=True,
        ):
            if not isinstance(placement, Replicate):
                # Shards are of equal size but the last, which may be smaller or empty.
                each = math.ceil(count / size)
                first = min(rank * each, count)
                start, count = start + first, min(each, count - first)
        if self._holds_experts(tensor):
            start += self.expert_rank * len(tensor)
        return range(start, start + count)


def _sharded(model: nn.Module) -> Iterator[FSDPModule]:
    return (module for module in model.modules() if isinstance(module, FSDPModule))


def _free_whole_weights(model: nn.Module, *_) -> None:
    """Leave shards alone after a pass without gradients: no backward pass frees what is whole.

    A checkpoint after a validation would find other parameters than the optimizer's.
    """
    if not torch.is_grad_enabled():
        for module in _sharded(model):
            module.reshard()


def cast_before_use(block: nn.Module) -> list[nn.Module]:
    """Return the modules of a block whose parameters are only used in the dtype of autocast.

    These are linear layers and experts. A module with parameters that this does not know, such as
    adapters, is left out: it may compute with them in float32.
    """
    return [
        module
        for module in block.modules()
        if (known := CAST_BEFORE_USE.get(type(module)))
        and known.issuperset(name for name, _ in module.named_parameters())
    ]
