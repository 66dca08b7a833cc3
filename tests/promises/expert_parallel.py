"""Guarantees about experts that several ranks share: they are the experts of one process."""

from __future__ import annotations

import math

from runtime.base.ranks import ONE_PROCESS
from tests.builders import tiny_config
from tests.builders_experts import compare_with_one_process
from tests.builders_ranks import trained
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt
from tests.ranks import run_on

# (ranks, of which so many share a block's experts)
GRIDS = ((2, 2), (4, 2), (4, 4))
# Of the largest number: 450 roundings of float64, for sums over fewer terms than that.
MOST = 1e-13
# A call of the ranks takes at most so many routings.
AT_ONCE = 10
# Losses of ten steps in float32: 8 roundings, for sums that are added in another order.
MOST_LOSS = 1e-6


def shared_experts(count: int) -> Tally:
    """Shared experts compute what those of one process do: random and skewed routings, in float64.

    Compared on each rank: logits, loss and the gradient of every tensor. And every assignment of a
    token to an expert is computed once.
    """
    tally = Tally()
    largest, idle, rows = 0.0, 0, 0
    at_once = min(AT_ONCE, math.ceil(count / len(GRIDS)))
    for first in range(0, count, at_once):
        world, shared = GRIDS[first // at_once % len(GRIDS)]
        seeds = list(range(FIRST_SEED + first, FIRST_SEED + min(first + at_once, count)))
        by_rank = run_on(world, compare_with_one_process, seeds, shared, seconds=120)
        for seed, found in zip(seeds, zip(*by_rank, strict=True), strict=True):

            def check(found=found):
                worst, name = max((v, k) for one in found for k, v in one.worst.items())
                sent, computed = (sum(one[i] for one in found) for i in (1, 2))
                assert worst <= MOST, f"{name} {worst:.1e}"
                assert sent == computed, f"{computed} of {sent} rows computed"

            attempt(tally, f"{world} ranks, {shared} share experts, seed {seed}", check)
            largest = max(largest, *(v for one in found for v in one.worst.values()))
            idle += any(not one.computed for one in found)
            rows += sum(one.sent for one in found)
    tally.detail |= {
        "largest relative difference": float(f"{largest:.0e}"),
        "routings that leave a rank without rows": idle,
        "rows": rows,
    }
    return tally


# Settings of runs on four ranks: with the experts of two ranks each, or of four.
FOUR_RANKS = [
    dict(expert_parallel=2, optimizer="muon", activation_checkpointing=True),
    dict(expert_parallel=4, optimizer="muon", grad_clip=0.1),
    dict(expert_parallel=2, optimizer="muon", shard="none", state_dtype="bfloat16"),
    dict(expert_parallel=2, optimizer="muon", shard="node"),
]


def shared_experts_train(count: int) -> Tally:
    """Four ranks that share experts and shard the rest train as one process: losses of 10 steps."""
    tally, largest = Tally(), 0.0
    for case in range(count):
        settings = FOUR_RANKS[case % len(FOUR_RANKS)] | dict(grad_accum=4, seed=FIRST_SEED + case)
        nodes = 2 if settings.get("shard") == "node" else 1
        # Six experts: two ranks hold three, and shard them as two and one.
        num_experts = 8 if settings["expert_parallel"] == 4 else 6
        config = tiny_config(num_experts=num_experts, expert_bias=True, router_bias_rate=0.01)

        def check(config=config, settings=settings, nodes=nodes):
            nonlocal largest
            one = trained(ONE_PROCESS, config, settings)
            first, *others = run_on(4, trained, config, settings, local_world=4 // nodes)
            for other in others:
                assert [r["loss"] for r in other.records] == [r["loss"] for r in first.records]
            off = max(
                abs(a["loss"] / b["loss"] - 1)
                for a, b in zip(first.records, one.records, strict=True)
            )
            largest = max(largest, off)
            assert off <= MOST_LOSS, f"{off:.1e}"

        attempt(tally, f"{settings}", check)
    tally.detail["largest relative difference of a loss"] = float(f"{largest:.0e}")
    return tally


PROMISES = [
    Promise(
        62,
        "Experts that ranks share compute as those of one process (1e-13), and lose no row",
        shared_experts,
        6,
        300,
        300,
    ),
    Promise(
        63,
        "Four ranks that share experts train as one process with Muon: losses 1e-6 over 10 steps",
        shared_experts_train,
        0,
        8,
        8,
    ),
]
