"""What a run on many ranks costs: memory of a rank, bytes over each link, and a bound on its speed.

    python test.py --world 64 --expert_parallel 8

Bytes are exact (traffic.py). Memory is an estimate that tests hold to counts (memory.py). Seconds
are an estimate that no run on several GPUs has been held to. It takes the links and the compute of
one kind of machine, and leaves out latency, unequal experts and everything that a host does.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

from config_model import ModelConfig, TrainConfig, flops_per_token
from runtime.base.ranks import ONE_PROCESS
from runtime.base.text import human_bytes, human_count
from runtime.training.memory import training_memory_bytes
from runtime.training.placement import Placement
from runtime.training.split import with_split_for
from runtime.training.traffic import (
    EXPOSED,
    GRADIENTS,
    MUON,
    NUMBERS,
    ROWS,
    WEIGHTS,
    Collective,
    micro_batches,
    step_collectives,
)

# One H100 SXM in a node of eight, from NVIDIA's data sheets: bfloat16 products without sparsity,
# NVLink to the other GPUs of the node in one direction, 400 Gbit/s of InfiniBand to other nodes.
GPU, PEAK_FLOPS, NODE_BYTES, NETWORK_BYTES = "H100 SXM", 989e12, 450e9, 50e9
# Shares of these that a good run gets.
COMPUTE_SHARE, LINK_SHARE = 0.5, 0.8
RANKS_OF_A_NODE = 8


class StepTime(NamedTuple):
    """Estimated seconds of a step.

    node, network: of weights and gradients over the two links, which move while blocks compute.
    waiting: of what a step waits for.
    """

    compute: float
    node: float
    network: float
    waiting: float

    @property
    def total(self) -> float:
        return max(self.compute, self.node, self.network) + self.waiting

    @property
    def bound(self) -> str:
        """Return what takes longest."""
        named = {
            "compute": self.compute,
            "weights and gradients over NVLink": self.node,
            "weights and gradients over the network": self.network,
            "what it waits for": self.waiting,
        }
        return max(named, key=named.__getitem__)


def step_time(
    config: ModelConfig, train: TrainConfig, placement: Placement, collectives: list[Collective]
) -> StepTime:
    """Return the estimate of a step's time in bfloat16."""
    tokens = micro_batches(train, placement) * train.batch_size * config.context_length
    # Forward, and backward twice as much; recomputation is one forward more.
    passes = 4 if train.activation_checkpointing else 3
    compute = passes * flops_per_token(config) * tokens / (COMPUTE_SHARE * PEAK_FLOPS)

    def seconds(hidden: bool) -> tuple[float, float]:
        sent = [c.sent_bytes for c in collectives if (c.what not in EXPOSED) == hidden]
        return (
            sum(node for node, _ in sent) / (LINK_SHARE * NODE_BYTES),
            sum(network for _, network in sent) / (LINK_SHARE * NETWORK_BYTES),
        )

    node, network = seconds(True)
    return StepTime(compute, node, network, max(seconds(False)))


def hiding_tokens(config: ModelConfig, time: StepTime, tokens: int) -> int:
    """Return the tokens of a micro-batch from which on weights and gradients cost no time.

    tokens: of the micro-batches whose time it is.
    """
    return round(max(time.node, time.network) / time.compute * tokens)


def ranks_line(
    config: ModelConfig, train: TrainConfig, placement: Placement, compute_bytes: int
) -> str:
    """Return the line that a run on ranks prints before its first step."""
    p, nodes = placement, placement.world // placement.in_node
    sent = [c.sent_bytes for c in step_collectives(config, train, placement, compute_bytes)]
    node, network = sum(node for node, _ in sent), sum(network for _, network in sent)
    parts = [f"sends {human_bytes(node)} a step in its node"] * bool(node)
    parts += [f"{human_bytes(network)} to other nodes"] * bool(network)
    experts = f"; {p.expert_parallel} share the experts" if p.expert_parallel > 1 else ""
    where = f"{nodes} nodes" if nodes > 1 else "one node"
    return (
        f"ranks    {p.world} on {where}, weights sharded over {p.sharding}{experts}; each takes "
        f"{micro_batches(train, p)} of {train.grad_accum} micro-batches and {' and '.join(parts)}"
    )


# ------------------------------------------------------------------------------- test.py's report
def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add --world and --nproc_per_node to test.py's flags."""
    parser.add_argument(
        "--world", type=int, default=1, help="ranks of a run by torchrun, to estimate its cost"
    )
    parser.add_argument(
        "--nproc_per_node",
        type=int,
        help=f"of these on each node, as torchrun's (default: {RANKS_OF_A_NODE} or all)",
    )


def report(config: ModelConfig, train: TrainConfig, args: argparse.Namespace) -> list[str]:
    """Return the report's lines on a run on ranks, [] on one rank. args: those of add_flags."""
    world, in_node = args.world, args.nproc_per_node
    if world < 1 or (in_node is not None and in_node < 1):
        raise ValueError("--world and --nproc_per_node count ranks: give 1 or more")
    if world == 1:
        if in_node is not None:
            raise ValueError("--nproc_per_node has no effect without --world: give both or none")
        ONE_PROCESS.arrange(train.expert_parallel, train.shard, config.num_experts)
        return []
    in_node = in_node or min(RANKS_OF_A_NODE, world)
    given = (world, in_node, config.num_experts, train.expert_parallel, train.shard)
    placement = Placement(*given, in_half=True)
    notes: list[str] = []
    train = _with_enough_sequences(train, world, notes)
    collectives = step_collectives(config, train, placement, 2)
    return [
        "",
        f"{world} ranks, {in_node} a node; weights sharded over {placement.sharding}, experts "
        f"shared by {placement.expert_parallel}; bfloat16 on GPUs",
        *notes,
        "",
        *_memory_rows(config, train, placement),
        "",
        *_traffic_rows(collectives),
        "",
        *_time_lines(config, train, placement, collectives),
    ]


def _with_enough_sequences(train: TrainConfig, world: int, notes: list[str]) -> TrainConfig:
    """Return the config with micro-batches for each rank, as train.py makes or asks for them."""
    if train.batch_size * train.grad_accum % world == 0:
        return with_split_for(world, train, notes)
    accum = -(-train.grad_accum // world) * world
    notes.append(
        f"batch    {train.batch_size} x {accum} sequences a step, because {world} ranks share "
        f"them: train.py needs --grad_accum {accum} instead of {train.grad_accum}"
    )
    return TrainConfig(**vars(train) | {"grad_accum": accum})


def _row(label: str, *cells: str) -> str:
    return f"{label:24}" + "".join(f"{cell:>18}" for cell in cells)


def _memory_rows(config: ModelConfig, train: TrainConfig, placement: Placement) -> list[str]:
    parts = training_memory_bytes(config, train, 2, on_gpu=True, placement=placement)
    rows = {name: size for name, size in parts.items() if size} | {"in all": sum(parts.values())}
    head = _row("memory of a rank", f"{train.batch_size} x {config.context_length}")
    return [head, *(_row(name, human_bytes(size)) for name, size in rows.items())]


def _traffic_rows(collectives: list[Collective]) -> list[str]:
    rows = [_row("sent by a rank, a step", "in its node", "to other nodes")]
    total = (0.0, 0.0)
    for what in (WEIGHTS, GRADIENTS, ROWS, MUON, NUMBERS):
        sent = [c.sent_bytes for c in collectives if c.what == what]
        node, network = sum(n for n, _ in sent), sum(n for _, n in sent)
        total = (total[0] + node, total[1] + network)
        if sent:
            rows.append(_row(what, human_bytes(node), human_bytes(network)))
    return [*rows, _row("in all", *map(human_bytes, total))]


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:,.0f} ms"


def _time_lines(
    config: ModelConfig, train: TrainConfig, placement: Placement, collectives: list[Collective]
) -> list[str]:
    time = step_time(config, train, placement, collectives)
    tokens = train.batch_size * train.grad_accum * config.context_length
    useful = 3 * flops_per_token(config) * tokens / placement.world / PEAK_FLOPS / time.total
    own = train.batch_size * config.context_length
    hidden = hiding_tokens(config, time, own)
    return [
        f"estimate {_ms(time.total)} a step: compute {_ms(time.compute)}; next to it weights and "
        f"gradients, {_ms(time.node)} over NVLink and {_ms(time.network)} over the network; then "
        f"{_ms(time.waiting)} of waiting for the rest",
        f"bound by {time.bound}: {100 * useful:.0f} % of the GPUs' peak, "
        f"{human_count(tokens / time.total)} tokens/s in all",
        f"weights and gradients cost no time from {hidden:,} tokens a micro-batch on; "
        f"these have {own:,}",
        f"not measured: computed for an {GPU} that gets {100 * COMPUTE_SHARE:.0f} % of its "
        f"products and {100 * LINK_SHARE:.0f} % of its links, with even experts and no latency",
    ]
