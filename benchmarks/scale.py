"""Print the table of docs/distributed.md: what three models would cost on 8 to 512 GPUs.

    python -m benchmarks.scale

Nothing is run: these are the closed forms of runtime/training, with the largest micro-batch whose
estimate fits. Each rank takes one micro-batch a step, so nothing hides behind a second.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from config_model import PRESETS, ModelConfig, TrainConfig, flops_per_token
from runtime.base import cli
from runtime.training.memory import training_memory_bytes
from runtime.training.placement import Placement
from runtime.training.scale import PEAK_FLOPS, RANKS_OF_A_NODE, step_time
from runtime.training.traffic import step_collectives

# Of an 80 GB card, what is left next to CUDA's own and to what the estimate misses.
USABLE_BYTES = 72 * 2**30
SEQUENCES = (64, 48, 32, 24, 16, 12, 8, 6, 4, 3, 2, 1)
WORLDS = (8, 64, 512)
MODELS = {
    "default, 3.66 B": ModelConfig(),
    "gpt-oss-20b": ModelConfig(**PRESETS["gpt-oss-20b"].model | {"context_length": 4096}),
    "gpt-oss-120b": ModelConfig(
        **PRESETS["gpt-oss-20b"].model
        | dict(transformer_blocks=36, num_experts=128, context_length=4096)
    ),
}
# (--shard, --expert_parallel)
WAYS = {
    "full": ("full", 1),
    "full, experts over 8": ("full", 8),
    "node": ("node", 1),
    "node, experts over 8": ("node", 8),
}


class Cost(NamedTuple):
    """What a way to train would cost. share: of the GPUs' peak that is useful."""

    share: float
    sequences: int
    recomputed: bool
    memory_bytes: int

    def __str__(self) -> str:
        again = ", recomputed" if self.recomputed else ""
        return f"{100 * self.share:.0f} % ({self.sequences}{again}, {self.memory_bytes >> 30} GiB)"


def cost(config: ModelConfig, placement: Placement, train: TrainConfig) -> Cost:
    """Return what a step costs in bfloat16."""
    memory = training_memory_bytes(config, train, 2, on_gpu=True, placement=placement)
    collectives = step_collectives(config, train, placement, 2)
    seconds = step_time(config, train, placement, collectives).total
    useful = 3 * flops_per_token(config) * train.batch_size * config.context_length
    share = useful / PEAK_FLOPS / seconds
    return Cost(share, train.batch_size, train.activation_checkpointing, sum(memory.values()))


def best(config: ModelConfig, world: int, shard: str, experts: int) -> Cost | None:
    """Return the cheapest of what fits, with and without recomputation; None if nothing does."""
    if shard == "node" and world == RANKS_OF_A_NODE:
        return None
    train = TrainConfig(grad_accum=world, expert_parallel=experts, shard=shard)
    placement = Placement(world, RANKS_OF_A_NODE, config.num_experts, experts, shard, True)
    costs = [
        cost(config, placement, replace(train, batch_size=b, activation_checkpointing=r))
        for b in SEQUENCES
        for r in (False, True)
    ]
    fitting = [c for c in costs if c.memory_bytes <= USABLE_BYTES]
    return max(fitting, key=lambda c: c.share, default=None)


def table() -> list[str]:
    """Return the table as Markdown."""
    lines = [
        f"| model | GPUs | {' | '.join(WAYS)} |",
        "|---|---|" + "---|" * len(WAYS),
    ]
    for name, config in MODELS.items():
        for world in WORLDS:
            costs = [best(config, world, *way) for way in WAYS.values()]
            cells = " | ".join("-" if c is None else str(c) for c in costs)
            lines.append(f"| {name} | {world} | {cells} |")
    return lines


def main(argv: list[str] | None = None) -> int:
    cli.parser(__doc__).parse_args(argv)
    print("\n".join(table()))
    return 0


if __name__ == "__main__":
    cli.run_main(main)
