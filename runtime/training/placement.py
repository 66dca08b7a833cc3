"""Which parts of a model a rank holds and gathers, in closed form.

Standard library only, so that a run on any number of ranks can be priced on any machine. Tests hold
the shapes to the module's own, and the bytes to what a step asks for (benchmarks/fake_ranks.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from config_model import ModelConfig
from runtime.base.ranks import sharding_ranks

# Groups of ranks that share what FSDP gathers together.
ROOT, BLOCK, EXPERTS = "root", "block", "experts"


class Shape(NamedTuple):
    """Parameters of one shape that are gathered together: `number` of them, [rows, row]."""

    unit: str  # ROOT, BLOCK or EXPERTS
    number: int  # in a unit
    rows: int
    row: int  # elements
    hidden: bool = False  # a hidden matrix, or a stack of them
    cast: bool = False  # used in the dtype of autocast alone

    @property
    def elements(self) -> int:
        return self.number * self.rows * self.row

    def part(self, ranks: int) -> int:
        """Return the elements of the largest part. Smaller ones are padded to it when they move."""
        return self.number * -(-self.rows // ranks) * self.row


@dataclass(frozen=True)
class Placement:
    """Ranks, and how they share a model. Raise ValueError for what cannot be honoured.

    in_node: ranks of a node; expert_parallel, shard: as in TrainConfig. in_half: whether matrices
    are gathered in half precision. Under autocast they otherwise are in float32, and are cast.
    """

    world: int
    in_node: int
    num_experts: int
    expert_parallel: int = 1
    shard: str = "full"
    in_half: bool = False

    def __post_init__(self):
        if self.world % self.in_node:
            raise ValueError(
                f"{self.world} ranks do not fill nodes of {self.in_node} ranks each: give a "
                "multiple, or another --nproc_per_node"
            )
        given = (self.world, self.in_node, self.expert_parallel, self.shard, self.num_experts)
        sharding_ranks(*given)

    @property
    def sharding(self) -> int:
        """Return the ranks that hold the weights once."""
        given = (self.world, self.in_node, self.expert_parallel, self.shard, self.num_experts)
        return sharding_ranks(*given)

    @property
    def replicas(self) -> int:
        return self.world // self.sharding

    def gathers(self, shape: Shape) -> int:
        """Return how often a micro-batch gathers a unit: again in its backward pass, but the root.

        The root is whole from the first embedding to the gradient of the last.
        """
        return 1 if self.shard == "none" or shape.unit == ROOT else 2

    def sharers(self, shape: Shape) -> int:
        """Return the ranks that a unit's weights are sharded over."""
        return self.sharding // (self.expert_parallel if shape.unit == EXPERTS else 1)

    def of_rank(self, shape: Shape) -> Shape:
        """Return the shape that a rank gathers: with expert parallelism a slice of each stack."""
        if shape.unit != EXPERTS:
            return shape
        return shape._replace(rows=shape.rows // self.expert_parallel)

    def held(self, shape: Shape) -> int:
        """Return the elements of a shape that the rank with the most of them holds."""
        return self.of_rank(shape).part(self.sharers(shape))

    def gathered_bytes(self, shape: Shape) -> int:
        """Return the bytes of an element of a shape when it is gathered."""
        return 2 if self.in_half and shape.cast else 4


def shapes(config: ModelConfig) -> Iterator[Shape]:
    """Yield the shapes of all parameters; those of a block stand for each block."""
    c, V, C, E = config, config.vocabulary_size, config.d_model, config.num_experts
    D = c.attention_head_dim
    q, kv = c.num_heads * D, c.num_kv_heads * D
    yield Shape(ROOT, 2 - c.tie_embeddings, V, C)
    yield Shape(ROOT, int(c.head_bias), V, 1)
    yield Shape(ROOT, 1, C, 1)
    # Attention.
    yield Shape(BLOCK, 2, C, 1)
    yield Shape(BLOCK, 1, q, C, hidden=True, cast=True)
    yield Shape(BLOCK, 2, kv, C, hidden=True, cast=True)
    yield Shape(BLOCK, 1, C, q, hidden=True, cast=True)
    yield Shape(BLOCK, int(c.qkv_bias), q, 1, cast=True)
    yield Shape(BLOCK, 2 * c.qkv_bias, kv, 1, cast=True)
    yield Shape(BLOCK, int(c.out_proj_bias), C, 1, cast=True)
    yield Shape(BLOCK, 2 * c.qk_norm, D, 1)
    yield Shape(BLOCK, int(c.attention_sinks), c.num_heads, 1)
    yield Shape(BLOCK, int(c.use_attention_bias), c.num_heads, c.context_length**2)
    # Router and experts.
    yield Shape(BLOCK, 1, E, C)
    yield Shape(BLOCK, int(c.router_bias), E, 1)
    yield Shape(EXPERTS, 1, E, c.expert_inputs * C, hidden=True, cast=True)
    yield Shape(EXPERTS, 1, E, C * c.d_ff, hidden=True, cast=True)
    yield Shape(EXPERTS, int(c.expert_bias), E, c.expert_inputs, cast=True)
    yield Shape(EXPERTS, int(c.expert_bias), E, C, cast=True)


def units(config: ModelConfig, shape: Shape) -> int:
    """Return how many units of a shape's kind a model has."""
    return 1 if shape.unit == ROOT else config.transformer_blocks


def gathered_together(config: ModelConfig, placement: Placement) -> list[list[Shape]]:
    """Return the shapes by what is gathered at once: of one unit, and in one dtype.

    Without expert parallelism the experts are part of their block.
    """
    groups: dict[tuple[str, int], list[Shape]] = {}
    for shape in shapes(config):
        own = placement.expert_parallel > 1 and shape.unit == EXPERTS
        unit = BLOCK if shape.unit == EXPERTS and not own else shape.unit
        key = (unit, placement.gathered_bytes(shape))
        groups.setdefault(key, []).append(shape)
    return list(groups.values())
