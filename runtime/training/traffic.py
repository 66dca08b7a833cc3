"""What the ranks of a training step tell each other, in closed form, to the byte.

Standard library only. A test counts what a step asks of torch.distributed, on a process group that
moves nothing (benchmarks/fake_ranks.py), and compares.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from config_model import ModelConfig, TrainConfig
from runtime.training.placement import (
    BLOCK,
    EXPERTS,
    Placement,
    gathered_together,
    shapes,
    units,
)

ALL_GATHER, REDUCE_SCATTER = "all_gather", "reduce_scatter"
ALL_REDUCE, ALL_TO_ALL = "all_reduce", "all_to_all"
# What it is for.
WEIGHTS, GRADIENTS, ROWS = "weights", "gradients", "rows of tokens"
MUON, NUMBERS = "Muon's updates", "numbers"
# What a step waits for. The others run while a block computes.
EXPOSED = (ROWS, MUON, NUMBERS)


class Collective(NamedTuple):
    """Something that a group of ranks does together, several times in a step.

    size: bytes of the whole tensor, as it is before or after it is split among the group.
    """

    kind: str
    what: str
    ranks: int  # in the group
    nodes: int  # that the group reaches
    size: int
    times: int  # in a step

    @property
    def sent_bytes(self) -> tuple[float, float]:
        """Return what a rank sends in a step: to ranks of its node, and to other nodes.

        Of a gather no less is possible: each part enters each node once, and the ranks of a node
        share that work. Tokens are routed evenly.
        """
        n, nodes, total = self.ranks, self.nodes, self.size * self.times
        in_node = n // nodes
        if self.kind == ALL_TO_ALL:
            return total * (in_node - 1) / n, total * (n - in_node) / n
        # An all-reduce is a reduce-scatter and an all-gather.
        passes = 2 if self.kind == ALL_REDUCE else 1
        return passes * total * (n - nodes) / n, passes * total * (nodes - 1) / n


def step_collectives(
    config: ModelConfig, train: TrainConfig, placement: Placement, compute_bytes: int
) -> list[Collective]:
    """Return what a rank takes part in during a step, but for groups of one rank.

    compute_bytes: of a number in the dtype that is computed in. Validations, saves and the counts
    that hosts exchange are not in it.
    """
    found = [
        *_of_weights(config, train, placement),
        *_of_rows(config, train, placement, compute_bytes),
        *_of_muon(config, train, placement),
        *_of_numbers(config, train, placement),
    ]
    return [collective for collective in found if collective.ranks > 1 and collective.times]


def micro_batches(train: TrainConfig, placement: Placement) -> int:
    """Return the micro-batches of a rank in a step."""
    return train.grad_accum // placement.world


def _nodes(placement: Placement, ranks: int, apart: int = 1) -> int:
    """Return how many nodes a group of ranks reaches whose numbers are `apart`."""
    if apart >= placement.in_node:
        return ranks
    return max(1, ranks * apart // placement.in_node)


def _of_weights(
    config: ModelConfig, train: TrainConfig, placement: Placement
) -> Iterator[Collective]:
    """Yield the gathers of the weights, and the sums of their gradients."""
    passes = micro_batches(train, placement)
    for group in gathered_together(config, placement):
        n, times = placement.sharers(group[0]), passes * units(config, group[0])
        apart = placement.expert_parallel if group[0].unit == EXPERTS else 1
        nodes = _nodes(placement, n, apart)
        elements = [n * placement.held(shape) for shape in group]
        size = sum(
            e * placement.gathered_bytes(shape) for e, shape in zip(elements, group, strict=True)
        )
        yield Collective(ALL_GATHER, WEIGHTS, n, nodes, size, times * placement.gathers(group[0]))
        gradients = 4 * sum(elements)
        yield Collective(REDUCE_SCATTER, GRADIENTS, n, nodes, gradients, times)
        # Each rank's part, over the other machines that hold the same.
        replicas = placement.replicas
        far = _nodes(placement, replicas, placement.sharding)
        yield Collective(ALL_REDUCE, GRADIENTS, replicas, far, gradients // n, times)


def _block_passes(config: ModelConfig, train: TrainConfig, placement: Placement) -> int:
    """Return how many forward passes of a block a step has, recomputations included."""
    again = 2 if train.activation_checkpointing else 1
    return micro_batches(train, placement) * config.transformer_blocks * again


def _of_rows(
    config: ModelConfig, train: TrainConfig, placement: Placement, compute_bytes: int
) -> Iterator[Collective]:
    """Yield what experts on several ranks exchange: counts, rows, and the gradients of rows."""
    n, forwards = placement.expert_parallel, _block_passes(config, train, placement)
    backwards = micro_batches(train, placement) * config.transformer_blocks
    tokens = train.batch_size * config.context_length
    rows = tokens * config.top_k * config.d_model * compute_bytes
    nodes = _nodes(placement, n)
    yield Collective(ALL_TO_ALL, ROWS, n, nodes, 8 * config.num_experts, forwards)
    # There and back, and the gradients as well.
    yield Collective(ALL_TO_ALL, ROWS, n, nodes, rows, 2 * (forwards + backwards))


def _of_muon(config: ModelConfig, train: TrainConfig, placement: Placement) -> Iterator[Collective]:
    """Yield what Muon needs of matrices that are split within themselves: update and norm."""
    if train.optimizer != "muon":
        return
    n = placement.sharding
    nodes = _nodes(placement, n)
    for shape in shapes(config):
        if shape.hidden and shape.unit == BLOCK:
            one = shape._replace(number=1)
            times = shape.number * config.transformer_blocks
            yield Collective(ALL_GATHER, MUON, n, nodes, 4 * n * one.part(n), times)
            yield Collective(ALL_REDUCE, MUON, n, nodes, 4, times)


def _of_numbers(
    config: ModelConfig, train: TrainConfig, placement: Placement
) -> Iterator[Collective]:
    """Yield the sums of what is logged, of the squared gradient, of a global balance's counts."""
    # Three losses; of each block the load of its experts, the router's entropy, the dropped share.
    logged = 3 + config.transformer_blocks * (config.num_experts + 2)
    world, n = placement.world, placement.sharding
    if train.balance_over == "global":
        times = _block_passes(config, train, placement)
        counts = 8 * config.num_experts
        yield Collective(ALL_REDUCE, NUMBERS, world, _nodes(placement, world), counts, times)
    yield Collective(ALL_REDUCE, NUMBERS, world, _nodes(placement, world), 8 * logged, 1)
    yield Collective(ALL_REDUCE, NUMBERS, n, _nodes(placement, n), 8, 1)
