"""Guarantees about what ranks tell each other: the closed forms, to the byte."""

from __future__ import annotations

import random
import warnings

from benchmarks.fake_ranks import TINY, asked_bytes, counted_step, formula_bytes
from config_model import ModelConfig, TrainConfig
from tests.promises import Promise, Tally
from tests.promises.common import FIRST_SEED, attempt

WORLDS = (8, 64)


def random_case(seed: int) -> tuple[int, ModelConfig, TrainConfig, bool]:
    """Return ranks, configs, and whether a step is in half precision: each way in two of them."""
    r = random.Random(seed)
    world, in_half = WORLDS[seed % 2], bool(seed // 2 % 2)
    model = TINY | dict(
        d_model=r.choice((32, 40, 56)),
        transformer_blocks=r.randint(1, 3),
        num_experts=r.choice((8, 24, 40)),
        top_k=r.randint(1, 4),
        d_ff=r.randint(9, 70),
        vocabulary_size=r.randint(100, 300),
        context_length=r.choice((8, 16)),
        expert_activation=r.choice(("gelu", "swiglu")),
    )
    flags = "qkv_bias qk_norm attention_sinks use_attention_bias expert_bias router_bias"
    for name in (*flags.split(), "tie_embeddings", "head_bias", "out_proj_bias"):
        model[name] = r.random() < 0.5
    shard = r.choice(("full", "none", "node") if world > WORLDS[0] else ("full", "none"))
    training = dict(
        batch_size=r.randint(1, 3),
        grad_accum=world * r.randint(1, 2),
        # Gathered updates of meshes with two dimensions: torch keeps the groups of an earlier mesh
        # that is equal, and those are gone here. A fast test has such a step, once in a process.
        optimizer=r.choice(("adamw",) if shard == "node" else ("adamw", "muon")),
        activation_checkpointing=r.random() < 0.5,
        shard=shard,
        expert_parallel=r.choice((1, 2, 4, 8)),
        balance_over=r.choice(("micro_batch", "global")),
    )
    return world, ModelConfig(**model), TrainConfig(**training), in_half


def bytes_of_ranks(count: int) -> Tally:
    """A step asks for the collectives of the closed form: kind, ranks, bytes, and how often."""
    tally, found = Tally(), 0
    for seed in range(FIRST_SEED, FIRST_SEED + count):
        case = random_case(seed)

        def check(case=case):
            nonlocal found
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "FSDP2-wrapped module")
                counted = asked_bytes(counted_step(*case))
            formula = formula_bytes(*case)
            assert counted == formula, f"counted {counted - formula}, formula {formula - counted}"
            found += counted.total()

        attempt(tally, f"{case[0]} ranks, seed {seed}", check)
    tally.detail["collectives"] = found
    return tally


PROMISES = [
    Promise(
        71,
        "What ranks exchange in a step is what the closed form says, to the byte: 8 and 64 ranks "
        "that are played",
        bytes_of_ranks,
        6,
        60,
        60,
    ),
]
