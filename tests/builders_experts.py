"""A step with shared experts, next to the same step in one process, both in float64."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch
from torch import Tensor

from config_model import ModelConfig
from model import LLM, Output
from runtime.base.ranks import Ranks
from runtime.kernels.choose import choose_kernels
from tests.builders import random_model, tiny_config

NUM_EXPERTS = 8
# Which experts win, whatever the router says: all, one, the first rank's, the last rank's, some.
FAVOURED = ("none", "one", "first", "last", "some")


class Compared(NamedTuple):
    """What a case found on one rank.

    worst: by name, the largest difference as a share of the largest number of one process.
    sent, computed: assignments of this rank's tokens; rows that its experts were given.
    """

    worst: dict[str, float]
    sent: int
    computed: int


def routing_case(seed: int, ranks: Ranks) -> tuple[ModelConfig, list[Tensor], Tensor]:
    """Return a random model's config, each rank's ids [B, T + 1], and the bias [E] that routes.

    The ranks have batches of different shapes, down to one token.
    """
    r = random.Random(seed)
    K = r.choice([1, 2, 3, NUM_EXPERTS])
    config = tiny_config(
        d_model=16,
        transformer_blocks=2,
        num_heads=2,
        num_kv_heads=1,
        num_experts=NUM_EXPERTS,
        top_k=K,
        d_ff=r.choice([5, 8]),
        expert_activation=r.choice(["gelu", "swiglu", "swiglu_clamped"]),
        expert_bias=r.random() < 0.5,
        router_bias=r.random() < 0.5,
        # Makes the buffer that routes.
        router_bias_rate=1e-3,
        aux_loss_coef=0.01,
        z_loss_coef=0.001,
        capacity_factor=r.choice([0.0, 0.0, 0.7]),
        tie_embeddings=r.random() < 0.5,
    )
    random_numbers = torch.Generator().manual_seed(seed)
    batches = [
        torch.randint(
            config.vocabulary_size,
            r.choice([(1, 2), (1, 9), (3, 5), (2, 17)]),
            generator=random_numbers,
        )
        for _ in range(ranks.world)
    ]
    held = NUM_EXPERTS // max(ranks.experts, 1)
    favoured = {
        "none": range(0),
        "one": [r.randrange(NUM_EXPERTS)],
        "first": range(held),
        "last": range(NUM_EXPERTS - held, NUM_EXPERTS),
        "some": r.sample(range(NUM_EXPERTS), 3),
    }[r.choice(FAVOURED)]
    bias_E = torch.zeros(NUM_EXPERTS)
    bias_E[list(favoured)] = 100.0
    return config, batches, bias_E


def compare_with_one_process(ranks: Ranks, seeds: list[int], expert_parallel: int) -> list:
    """Return a Compared for each random routing.

    Every rank takes its batch through a model whose experts are shared, and all batches through a
    plain one. Each is the sum of the losses, so that gradients add up alike.
    """
    ranks.arrange(expert_parallel, "full", NUM_EXPERTS)
    return [_compare(ranks, seed) for seed in seeds]


def _compare(ranks: Ranks, seed: int) -> Compared:
    config, batches, bias_E = routing_case(seed, ranks)
    plain = _routed(config, seed, bias_E)
    outs = [_pass(plain, ids, config) for ids in batches]
    shared = _routed(config, seed, bias_E)
    shared.activation_checkpointing = seed % 2 == 1
    ranks.shard(shared, torch.float64)
    computed = 0

    def count(module, arguments) -> None:
        nonlocal computed
        # A row of zeros may stand in for none.
        computed += int(arguments[0].any(dim=1).sum())

    handles = [block.moe.experts.register_forward_pre_hook(count) for block in shared.layers]
    out = _pass(shared, batches[ranks.rank], config, backward=False)
    for handle in handles:
        handle.remove()
    _loss(out).backward()
    # With top_k 1 a routing weight is p / p: what the loss sends back to the router is what is left
    # of two equal terms, rounding. So it is measured by the model's largest gradient.
    largest = (
        max(p.grad.abs().max().item() for p in plain.parameters()) if config.top_k == 1 else 0.0
    )
    worst = {
        "loss": _off(_loss(out), _loss(outs[ranks.rank])),
        "logits": _off(*(_logits(model, batches[ranks.rank]) for model in (shared, plain))),
    }
    for (name, p), (_, expected) in zip(
        shared.named_parameters(), plain.named_parameters(), strict=True
    ):
        of = largest if "router" in name else 0.0
        worst[name] = _off(ranks.whole(p.grad), expected.grad, of)
    sent = batches[ranks.rank][:, 1:].numel() * config.top_k * config.transformer_blocks
    return Compared(worst, sent, computed)


def _routed(config: ModelConfig, seed: int, bias_E: Tensor) -> LLM:
    """Return a random model in float64 whose routers prefer what bias_E says.

    It has the operations of a CPU, or the plain ones.
    """
    model = random_model(config, seed, torch.float64)
    if seed % 3:
        choose_kernels(model, torch.device("cpu"), torch.float64)
    for block in model.layers:
        block.moe.router.selection_bias.copy_(bias_E)
    return model


def _pass(model: LLM, ids_BS: Tensor, config: ModelConfig, backward: bool = True) -> Output:
    out = model(ids_BS[:, :-1], ids_BS[:, 1:])
    if backward:
        _loss(out).backward()
    return out


def _loss(out: Output) -> Tensor:
    assert out.cross_entropy_sum is not None
    return out.cross_entropy_sum + out.aux_loss + out.z_loss


@torch.no_grad()
def _logits(model: LLM, ids_BS: Tensor) -> Tensor:
    return model(ids_BS[:, :-1]).logits


def _off(tensor: Tensor, expected: Tensor, of: float = 0.0) -> float:
    """Return the largest difference as a share of the largest number, or of a larger one."""
    largest = max(expected.abs().max().item(), of, torch.finfo(expected.dtype).tiny)
    return (tensor - expected).abs().max().item() / largest
