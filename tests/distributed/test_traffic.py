"""The bytes and the memory of many ranks, by closed form, against what a step asks for.

The ranks are played by torch's fake process group, in this process: bytes, never numbers.
"""

from __future__ import annotations

import pytest

from benchmarks.fake_ranks import (
    CASES,
    asked_bytes,
    case,
    counted_step,
    formula_bytes,
    placement_of,
)
from config_model import ModelConfig, TrainConfig
from runtime.training.memory import training_memory_bytes
from runtime.training.traffic import (
    ALL_GATHER,
    ALL_REDUCE,
    ALL_TO_ALL,
    REDUCE_SCATTER,
    WEIGHTS,
    Collective,
)

# Large enough that weights and activations, not numbers to log, fill its memory.
WIDE = dict(
    vocabulary_size=2048,
    d_model=256,
    transformer_blocks=4,
    num_heads=4,
    num_kv_heads=2,
    context_length=128,
    d_ff=256,
    num_experts=16,
    use_attention_bias=False,
)
# (ranks, settings of training, whether it is in bfloat16)
HELD = {
    "full": (8, {}, False),
    "none": (8, dict(shard="none"), False),
    "recomputed": (8, dict(activation_checkpointing=True), False),
    "bfloat16, two micro-batches": (8, dict(grad_accum=16), True),
    "node, Muon": (16, dict(shard="node", optimizer="muon"), False),
    "experts shared": (64, dict(expert_parallel=8, batch_size=4), False),
}
# The worst of HELD is 9 % off.
MEMORY_TOLERANCE = 0.12


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("in_half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_asks_for_what_the_closed_form_says(name, in_half):
    """To the byte: each collective's kind, ranks, nodes, size and how often it is asked for."""
    given = (*case(name), in_half)
    counted = asked_bytes(counted_step(*given))
    assert counted.total() > 0
    assert counted == formula_bytes(*given)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.parametrize("name", HELD)
def test_a_ranks_memory_is_about_what_the_closed_form_says(name):
    """A rank once was said to hold all weights, and none of those that it gathers."""
    world, training, in_half = HELD[name]
    config = ModelConfig(**WIDE)
    train_config = TrainConfig(**(dict(grad_accum=world) | training))
    counted = counted_step(world, config, train_config, in_half).peak_bytes
    placement = placement_of(world, config, train_config, in_half)
    bytes_each = 2 if in_half else 4
    parts = training_memory_bytes(config, train_config, bytes_each, placement=placement)
    # Python and PyTorch are no tensors.
    estimate = sum(parts.values()) - parts["program"]
    assert estimate == pytest.approx(counted, rel=MEMORY_TOLERANCE)


def test_what_crosses_a_link_is_counted_once():
    """Of 64 ranks in nodes of 8: each rank gets the other 63 parts, 7 of them over the network."""

    def sent(kind: str, ranks: int, nodes: int) -> tuple[float, float]:
        return Collective(kind, WEIGHTS, ranks, nodes, 64 * ranks, 1).sent_bytes

    for kind in (ALL_GATHER, REDUCE_SCATTER):
        assert sent(kind, 64, 8) == (64 * 56, 64 * 7)
        assert sent(kind, 8, 1) == (64 * 7, 0)
        assert sent(kind, 8, 8) == (0, 64 * 7)
    assert sent(ALL_REDUCE, 64, 8) == (2 * 64 * 56, 2 * 64 * 7)
    # Each row has one destination, so that no rank forwards another's.
    assert sent(ALL_TO_ALL, 64, 8) == (64 * 7, 64 * 56)
    assert sent(ALL_TO_ALL, 8, 1) == (64 * 7, 0)
