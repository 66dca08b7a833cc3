"""The ranks of a run: processes that take one step together, each on its share of it.

`Ranks` is a run in one process, so that all of it does nothing. The loop, the optimizer and the
checkpoints are written against it. runtime/distributed/parallel.py has the same methods for the
ranks that torchrun starts; `python train.py` never imports that file.

A rank takes whole micro-batches. The step of W ranks is that of one process with the same
micro-batches, so neither data order nor dropout depends on W.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from torch import Size, Tensor, device, dtype, nn

T = TypeVar("T")

# How long a rank waits for the others before it gives up: as they start (they read weights and
# compile, not all as fast), and later, between steps.
START_SECONDS = 1800.0
STEP_SECONDS = 120.0


class Ranks:
    """One process: its methods return what they are given. Every rank must call them alike.

    rank, world: this process's number, and how many there are.
    experts: ranks that share a block's experts (--expert_parallel).
    local_world: ranks on this machine.
    device: of this rank; None = the run chooses.
    are_mixed: whether they have GPUs of different kinds, whose random numbers differ.
    run_before: run_id of the run that these ranks were restarted to continue; "" = none.
    """

    rank: int = 0
    world: int = 1
    experts: int = 1
    local_world: int = 1
    device: device | None = None
    are_mixed: bool = False
    run_before: str = ""

    @property
    def is_first(self) -> bool:
        """Return whether this rank writes files and lines."""
        return self.rank == 0

    @property
    def checks_files(self) -> bool:
        """Return whether this rank compares a file's digests: one rank of each machine does."""
        return self.rank % self.local_world == 0

    def mine(self, count: int) -> range:
        """Return which of `count` micro-batches this rank takes."""
        return range(self.rank, count, self.world)

    # ------------------------------------------------------------------------------ on the host
    def sum_on_host(self, *numbers: int) -> tuple[int, ...]:
        """Return whole numbers summed over the ranks."""
        return numbers

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set on a rank."""
        return flag

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what `make` returns on the first rank, which alone calls it; or raise its error.

        For whatever reads a clock, random bytes or a folder that is written to.
        """
        return make()

    def together(self, do: Callable[[], T]) -> T:
        """Return what `do` returns here; raise ValueError on every rank if it fails on one.

        do: something that takes no part in what the ranks do together.
        """
        return do()

    def check_equal(self, what: dict[str, object]) -> None:
        """Raise ValueError, which names the rank, if a rank has other values than the first."""

    def in_order(self, values: Sequence[T]) -> list[T]:
        """Return the values that the ranks made of what `share` gave them, in its order."""
        return list(values)

    def began(self, run_id: str) -> None:
        """Remember the run, for ranks that are started again in place of these."""

    def stopped(self) -> None:
        """Remember that the run was told to stop, so that no restart continues it."""

    def command(self, command: str) -> str:
        """Return what a user types to start as many ranks. command: for one process."""
        return command

    def wait_at_most(self, seconds: float) -> float:
        """Let ranks wait so long for each other, or else fail, from now on.

        Return how long they would have waited.
        """
        return seconds

    # ---------------------------------------------------------------------------- on the device
    def share(self, batches: Sequence[T]) -> Iterable[tuple[T, bool]]:
        """Yield this rank's batches, as many on every rank, and whether each of them counts.

        Where they do not share out evenly, a rank is given one that counts on another.
        """
        return ((batch, True) for batch in batches)

    def concatenated(self, rows: Tensor) -> Tensor:
        """Return the rows [n, ..] that the ranks made of what `share` gave them, in its order."""
        return rows

    def sum_of(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return tensors, by name, summed over the ranks; each keeps its dtype."""
        return tensors

    def sum_of_shards_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks that hold different parts of the weights, in place; return it."""
        return tensor

    # ------------------------------------------------------------------------- weights in shards
    def arrange(
        self,
        expert_parallel: int,
        shard: str,
        num_experts: int,
        balance_over: str = "micro_batch",
    ) -> None:
        """Decide which rank will hold what. Raise ValueError for what cannot be honoured.

        expert_parallel, shard, balance_over: as in TrainConfig.
        """
        for flag, is_given, instead in (
            ("expert_parallel", expert_parallel > 1, "leave it out"),
            ("shard", shard != "full", "leave it out"),
            # A resumed run has it without being given it.
            (
                "balance_over global",
                balance_over == "global",
                "take --balance_over micro_batch, with a larger --batch_size",
            ),
        ):
            if is_given:
                raise ValueError(
                    f"--{flag} is for runs on several ranks: {instead}, or start with torchrun "
                    "--standalone --nproc_per_node RANKS train.py"
                )

    def shard(self, model: nn.Module, dtype: dtype) -> None:
        """Keep this rank's share of a finished model. dtype: that is computed in."""

    def local(self, tensor: Tensor) -> Tensor:
        """Return the part of a tensor that this rank holds: rows of its first dimension."""
        return tensor

    def is_split(self, tensor: Tensor) -> bool:
        """Return whether this rank holds a part of a tensor only, or may."""
        return False

    def rows(self, tensor: Tensor) -> range:
        """Return which rows of the whole tensor this rank holds, of its first dimension."""
        return range(len(tensor))

    def part_of(self, tensor: Tensor, whole: Tensor) -> Tensor:
        """Return what this rank holds of a tensor, from the whole of it or of one like it."""
        return whole

    def fill_(self, tensor: Tensor, whole: Tensor) -> None:
        """Copy this rank's part of a whole tensor into one that may be in shards."""
        self.local(tensor).copy_(self.part_of(tensor, whole))

    def shape_of(self, tensor: Tensor) -> Size:
        """Return the shape of the whole tensor."""
        return tensor.shape

    def write_files(
        self, folder: Path, groups: dict[str, dict[str, Tensor]]
    ) -> dict[str, tuple[int, str]]:
        """Write each rank's part of some groups of tensors into a folder; return all files.

        By name, with their bytes and digests (runtime/checkpoint/sharded.py).
        """
        raise NotImplementedError("a checkpoint of one process is a file")

    def whole(self, tensor: Tensor, local: Tensor | None = None) -> Tensor:
        """Return the whole of a tensor on every rank: a collective.

        local: another tensor in the same shards, whose whole is returned instead.
        """
        return tensor if local is None else local


ONE_PROCESS = Ranks()


def sharding_ranks(
    world: int, in_node: int, expert_parallel: int, shard: str, num_experts: int
) -> int:
    """Return how many ranks hold the weights once. Raise ValueError for what cannot be honoured.

    in_node: ranks of a node; expert_parallel, shard: as in TrainConfig.
    """
    sharding = world
    if shard == "node":
        sharding = in_node
        if world % sharding or world == sharding:
            raise ValueError(
                f"--shard node is for several nodes of as many ranks each, and these are "
                f"{world} ranks, {sharding} of them here: leave it out"
            )
    if sharding % expert_parallel or num_experts % expert_parallel:
        raise ValueError(
            f"--expert_parallel {expert_parallel} must divide both the {sharding} ranks that "
            f"share the weights and the {num_experts} experts: take "
            f"{' or '.join(map(str, _common_divisors(sharding, num_experts)))}"
        )
    return sharding


def _common_divisors(a: int, b: int) -> list[int]:
    return [n for n in range(1, min(a, b) + 1) if a % n == 0 and b % n == 0]
