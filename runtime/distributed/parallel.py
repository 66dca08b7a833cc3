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
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Size, Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from runtime.base.ranks import Ranks
from runtime.distributed.trained_rows import keep_trained_rows

T = TypeVar("T")


class Parallel(Ranks):
    """The ranks of a process group that has been started.

    device: of this rank; local_world: ranks on this machine, neighbours by number.
    """

    def __init__(self, device: torch.device, local_world: int):
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.device, self.local_world = device, local_world
        self.mesh: DeviceMesh
        self.reshard = True

    def arrange(self, expert_parallel: int, shard: str, num_experts: int) -> None:
        sharding = self.world
        if shard == "node":
            sharding = self.local_world
            if self.world % sharding or self.world == sharding:
                raise ValueError(
                    f"--shard node is for several nodes of as many ranks each, and these are "
                    f"{self.world} ranks, {sharding} of them here: leave it out"
                )
        if sharding % expert_parallel or num_experts % expert_parallel:
            raise ValueError(
                f"--expert_parallel {expert_parallel} must divide both the {sharding} ranks that "
                f"share the weights and the {num_experts} experts: take "
                f"{' or '.join(map(str, _common_divisors(sharding, num_experts)))}"
            )
        self.experts, self.reshard = expert_parallel, shard != "none"
        replicas, kind = self.world // sharding, self.device.type
        # Meshes of one dimension where there is one group of shards: fewer collectives.
        # Ranks that share experts are neighbours, and so on one machine if they fit there; a stack
        # is split among them first, so that their dimension comes before that of the shards.
        numbers = torch.arange(self.world).view(replicas, -1, expert_parallel).transpose(1, 2)
        names = ("replica", "expert", "expert_shard")
        grid = DeviceMesh(kind, numbers.contiguous(), mesh_dim_names=names)
        flat = init_device_mesh(kind, (replicas, sharding), mesh_dim_names=("replica", "shard"))
        self.mesh = flat if replicas > 1 else flat["shard"]
        self.expert_mesh = grid["replica", "expert_shard"] if replicas > 1 else grid["expert_shard"]
        # Whose members hold the weights once, and whose members share a block's experts.
        self.shard_group, self.expert_group = flat.get_group("shard"), grid.get_group("expert")
        self.expert_rank = grid.get_local_rank("expert")
        self.whole_expert_mesh = grid["expert", "expert_shard"]

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
        except (ValueError, OSError) as error:
            failure = error
        failures: list[Any] = [None] * self.world
        dist.all_gather_object(failures, failure)
        found = {rank: error for rank, error in enumerate(failures) if error is not None}
        if not found:
            return result  # type: ignore[return-value]  # what `do` returned
        rank, error = next(iter(found.items()))
        if len({str(other) for other in found.values()}) > 1 or len(found) < self.world:
            raise ValueError(f"rank {rank}: {error}") from failure
        raise error

    def check_equal(self, what: dict[str, object]) -> None:
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, what)
        for rank, theirs in enumerate(every):
            for name, value in every[0].items():
                if theirs.get(name) != value:
                    raise ValueError(
                        f"rank {rank} has another {name} than rank 0: {theirs.get(name)}, not "
                        f"{value}; start all ranks with the same command, data and code"
                    )

    def in_order(self, values: Sequence[T]) -> list[T]:
        every: list[Any] = [None] * self.world
        dist.all_gather_object(every, list(values))
        return [value for turn in zip(*every, strict=True) for value in turn]

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
        options: dict[str, Any] = {"reshard_after_forward": self.reshard}
        for block in model.layers:  # type: ignore[union-attr]  # an LLM's
            fully_shard(block, mesh=self.mesh, **options)
        fully_shard(model, mesh=self.mesh, **options)
        keep_trained_rows(model, self)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                # Plain sums: a factor of 1 alone is a product that Gloo lacks.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def local(self, tensor: Tensor) -> Tensor:
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def is_split(self, tensor: Tensor) -> bool:
        return isinstance(tensor, DTensor)

    def part_of(self, tensor: Tensor, whole: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return whole
        rows = self._rows_of(tensor)
        return whole[rows.start : rows.stop]

    def shape_of(self, tensor: Tensor) -> Size:
        if self._holds_experts(tensor):
            return Size((len(tensor) * self.experts, *tensor.shape[1:]))
        return tensor.shape

    def whole(self, tensor: Tensor, local: Tensor | None = None) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor if local is None else local
        local = tensor.to_local() if local is None else local
        mesh, shape = tensor.device_mesh, self.shape_of(tensor)
        placements = tensor.placements
        if self._holds_experts(tensor):
            mesh, placements = self.whole_expert_mesh, (Shard(0), Shard(0))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, mesh, placements, run_check=False, shape=shape, stride=stride
        ).full_tensor()

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


def _common_divisors(a: int, b: int) -> list[int]:
    return [n for n in range(1, math.gcd(a, b) + 1) if a % n == 0 and b % n == 0]
