"""What a rank holds and gathers, by closed form, against the module's own tensors."""

from __future__ import annotations

from collections import Counter

import pytest

from config_model import PRESETS, ModelConfig, total_parameters
from runtime.checkpoint.format import meta_model
from runtime.training.memory import hidden_matrices
from runtime.training.optimizer import HIDDEN_MATRICES
from runtime.training.placement import BLOCK, EXPERTS, ROOT, Placement, Shape, shapes, units
from tests.builders import tiny_config

OPTIONS = [
    dict(use_attention_bias=True, tie_embeddings=True, head_bias=True),
    dict(qkv_bias=True, out_proj_bias=True, qk_norm=True, attention_sinks=True),
    dict(expert_activation="swiglu", expert_bias=False, router_bias=True, head_dim=6),
]


def of_module(config: ModelConfig) -> Counter:
    """Return (unit, rows, row, is hidden) of a model's parameters, and how many there are."""
    found: Counter = Counter()
    for name, parameter in meta_model(config).named_parameters():
        block = EXPERTS if ".experts." in name else BLOCK
        unit = block if name.startswith("layers.") else ROOT
        rows = len(parameter)
        found[unit, rows, parameter.numel() // rows, name.endswith(HIDDEN_MATRICES)] += 1
    return found


@pytest.mark.parametrize(
    "config",
    [ModelConfig(**PRESETS[name].model) for name in PRESETS] + [tiny_config(**o) for o in OPTIONS],
    ids=[*PRESETS, *map(str, range(len(OPTIONS)))],
)
def test_the_shapes_are_the_modules(config):
    """Rows decide how a tensor is split and padded, so that a sum of elements says too little."""
    ours: Counter = Counter()
    for shape in shapes(config):
        key = (shape.unit, shape.rows, shape.row, shape.hidden)
        ours[key] += shape.number * units(config, shape)
    assert +ours == of_module(config)
    in_all = sum(shape.elements * units(config, shape) for shape in shapes(config))
    assert in_all == total_parameters(config)
    hidden = [s.elements * units(config, s) for s in shapes(config) if s.hidden]
    assert sum(hidden) == hidden_matrices(config)


def test_experts_are_shared_by_whole_experts():
    """Ranks beyond the number of experts hold none, and what is gathered is padded for them."""
    config = tiny_config(num_experts=8)
    stacks = [shape for shape in shapes(config) if shape.unit == EXPERTS and shape.number]
    for world, in_node, shared, each in ((4, 4, 1, 2), (16, 8, 1, 1), (16, 8, 4, 1), (8, 8, 8, 1)):
        placement = Placement(world, in_node, 8, expert_parallel=shared)
        held = {placement.held(shape) // (shape.number * shape.row) for shape in stacks}
        assert held == {each}


def test_placements_that_cannot_be_are_one_line():
    for given, line in (
        ((12, 8, 8), "12 ranks do not fill nodes of 8"),
        ((8, 8, 8, 3), "--expert_parallel 3 must divide both the 8 ranks"),
        (
            (16, 8, 8, 16),
            "--expert_parallel 16 must divide .* the 8 experts: take 1 or 2 or 4 or 8",
        ),
        ((8, 8, 8, 1, "node"), "--shard node is for several nodes"),
    ):
        with pytest.raises(ValueError, match=line):
            Placement(*given)


def test_a_node_shards_what_a_node_holds():
    placement = Placement(64, 8, 32, shard="node")
    assert (placement.sharding, placement.replicas) == (8, 8)


def test_only_blocks_are_gathered_again():
    """The backward pass begins with the head, which is whole from the forward pass."""
    of_block, of_root = (Shape(unit, 1, 8, 8) for unit in (BLOCK, ROOT))
    for shard, times in (("full", 2), ("node", 2), ("none", 1)):
        placement = Placement(64, 8, 32, shard=shard)
        assert placement.gathers(of_block) == times
        assert placement.gathers(of_root) == 1
