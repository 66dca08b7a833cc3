"""Guarantees about several ranks: they train as one process does."""

from __future__ import annotations

import dataclasses
import random

import torch
from torch import Tensor

from config_model import ModelConfig
from runtime.base.ranks import ONE_PROCESS
from tests.builders import random_config, tiny_config
from tests.builders_ranks import Trained, trained
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt, equal
from tests.ranks import run_on

# Kernels compute what does not fill a vector register without fused multiply-add, so that its last
# bit may differ. With these sizes half of each tensor fills registers of 16 numbers.
FULL_REGISTERS = dict(d_model=32, head_dim=32, d_ff=32, vocabulary_size=64, context_length=16)
# Every tensor of the models that these describe has an even number of rows.
SIX = [
    ({}, {}),
    (dict(dropout=0.1), dict(optimizer="muon")),
    (
        dict(
            tie_embeddings=True,
            expert_bias=True,
            out_proj_bias=True,
            head_bias=True,
            use_attention_bias=True,
            expert_activation="gelu",
        ),
        dict(state_dtype="bfloat16"),
    ),
    (dict(tie_embeddings=True), dict(optimizer="muon", activation_checkpointing=True)),
    (dict(router_bias_rate=0.01, aux_loss_coef=0.0, dropout=0.2), dict(grad_clip=0.1)),
    (
        dict(capacity_factor=1.0, expert_bias=True, head_bias=True),
        dict(optimizer="muon", grad_clip=0.1, state_dtype="bfloat16", shard="none"),
    ),
]
TIMES = ("seconds", "tokens_per_sec", "waiting_share", "memory_bytes")
# Four numbers that are added in another order differ by at most 6 roundings of their sizes' sum.
# The sum is at most a few times the largest gradient of its tensor.
FOUR_RANKS_LOSS, FOUR_RANKS_GRADIENT = 5e-7, 2e-6
# Compared at least; the second one's loss is that of weights that were updated.
FOUR_RANKS_STEPS = 2


def random_settings(seed: int) -> dict:
    """Return settings of training, drawn at random."""
    r = random.Random(seed)
    return dict(
        optimizer=r.choice(["adamw", "muon"]),
        state_dtype=r.choice(["float32", "bfloat16"]),
        activation_checkpointing=r.random() < 0.5,
        grad_clip=r.choice([0.0, 0.1, 1.0]),
        batch_size=r.choice([1, 2, 3]),
        shard=r.choice(["full", "none"]),
        spike_sigmas=r.choice([0.0, 6.0]),
    )


def random_full_registers(seed: int) -> ModelConfig:
    """Return random_config in sizes of FULL_REGISTERS, for what has a number per head or expert."""
    r = random.Random(seed)
    return dataclasses.replace(
        random_config(seed),
        **FULL_REGISTERS,
        num_heads=32,
        num_kv_heads=r.choice([8, 16, 32]),
        num_experts=32,
        top_k=r.choice([1, 2, 4]),
        transformer_blocks=r.choice([1, 2]),
    )


def without_times(records: list[dict]) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in TIMES} for record in records]


def differing(one: Trained, other: Trained) -> list[str]:
    """Return the names of what is not the same to the last bit."""
    kinds = ("weights", "moments", "gradients", "buffers")
    names = [
        f"{kind} {name}"
        for kind in kinds
        for name, tensor in getattr(one, kind).items()
        if not equal(tensor, getattr(other, kind).get(name))
    ]
    same_records = without_times(one.records) == without_times(other.records)
    return names + ([] if same_records else ["records"])


def two_ranks(count: int) -> Tally:
    """Two ranks are one process, to the last bit: SIX configurations, then random ones.

    Compared after 10 steps: weights, moments, expert biases, the first and the last step's
    gradients, all that is logged (losses, norms, router) and the validation losses.
    """
    tally, tensors = Tally(), 0
    for case in range(count):
        seed = FIRST_SEED + case
        if case < len(SIX):
            config, settings = tiny_config(**FULL_REGISTERS | SIX[case][0]), SIX[case][1]
        else:
            config, settings = random_full_registers(seed), random_settings(seed)

        def check(config=config, settings=settings):
            nonlocal tensors
            one = trained(ONE_PROCESS, config, settings)
            tensors += sum(map(len, one[:4]))
            for rank, other in enumerate(run_on(2, trained, config, settings)):
                names = differing(one, other)
                assert not names, f"rank {rank}, {len(names)} differ: {names[:3]}"

        attempt(tally, f"configuration {case} (seed {seed})", check)
    tally.detail["tensors compared"] = tensors
    return tally


def four_ranks(count: int) -> Tally:
    """Four ranks agree with each other to the bit, and with one process to rounding.

    Random configurations. Some have fewer experts or rows than ranks, or a number that four does
    not divide. Losses are compared until a token changes its expert.
    """
    tally, worst = Tally(), {"loss": 0.0, "gradient": 0.0}
    moved = {"runs in which a token changed its expert": 0}
    for seed in range(FIRST_SEED, FIRST_SEED + count):

        def check(seed=seed):
            # What bfloat16 makes of a moment is not its size.
            settings = random_settings(seed) | dict(grad_accum=4, state_dtype="float32")
            config = random_config(seed)
            one = trained(ONE_PROCESS, config, settings)
            first, *others = run_on(4, trained, config, settings)
            for rank, other in enumerate(others, 1):
                names = differing(first, other)
                assert not names, f"rank {rank} is not rank 0: {names[:3]}"
            steps = before_a_token_moves(one.records, first.records)
            assert steps >= FOUR_RANKS_STEPS, f"a token moved in step {steps + 1}"
            moved["runs in which a token changed its expert"] += steps < len(one.records)
            off = {
                "loss": max(
                    abs(a["loss"] / b["loss"] - 1)
                    for a, b in zip(first.records[:steps], one.records[:steps], strict=True)
                ),
                "gradient": max(
                    relative(first.gradients[name], gradient)
                    for name, gradient in one.gradients.items()
                    if name.startswith("first.")
                ),
            }
            for name in worst:
                worst[name] = max(worst[name], off[name])
            assert off["loss"] <= FOUR_RANKS_LOSS and off["gradient"] <= FOUR_RANKS_GRADIENT, off

        attempt(tally, f"seed {seed}", check)
    for name, value in worst.items():
        tally.detail[f"largest relative difference, {name}"] = float(f"{value:.0e}")
    tally.detail |= moved
    return tally


def before_a_token_moves(some: list[dict], others: list[dict]) -> int:
    """Return how many records two runs share in which all experts have the same load.

    A token whose two best experts are nearly equal takes the other one after a change of rounding.
    From there on the losses differ by as much as that token counts.
    """
    assert len(some) == len(others)
    for number, records in enumerate(zip(some, others, strict=True)):
        loads = [torch.tensor(record.get("expert_load", 0.0)) for record in records]
        # A mean of counts, as a multiple of a fair share; a token is more than a thousandth of it.
        if not torch.allclose(*loads, rtol=0, atol=1e-4):
            return number
    return len(some)


def relative(tensor: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest number that is expected."""
    largest = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
    return ((tensor - expected).abs().max() / largest).item()


PROMISES = [
    Promise(
        60,
        "Two ranks train as one process: weights, moments, gradients, losses, norms, to the bit",
        two_ranks,
        4,
        60,
        60,
    ),
    Promise(
        61,
        "Four ranks are the same to the bit, and one process to rounding (loss 5e-7, gradients "
        "2e-6)",
        four_ranks,
        1,
        40,
        40,
    ),
]
