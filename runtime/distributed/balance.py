"""Balance losses that count the tokens of all ranks (--balance_over global).

A micro-batch is a few texts, often of one kind. Balance within each of them keeps experts from
taking a kind of their own; balance over many texts does not (Qiu et al. 2025, arXiv 2501.11873).
What is summed are the assignments of each expert, over the micro-batches that the ranks compute at
the same time. The mean of these losses over W ranks is the loss of one micro-batch W times as
large.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from model_parts import MoE, balance_loss


def balance_over_ranks(moe: MoE) -> None:
    """Have a block's balance loss count the assignments of all ranks, which call it together."""
    moe.balance_loss = _balance_loss_of_all


def _balance_loss_of_all(mean_E: Tensor, counts_E: Tensor) -> Tensor:
    # A compiled block is one graph, which a plain collective would break.
    total = sum_in_a_graph if torch.compiler.is_compiling() else _sum_over_ranks
    return balance_loss(mean_E, total(counts_E))


def _sum_over_ranks(counts_E: Tensor) -> Tensor:
    sums_E = counts_E.clone()
    dist.all_reduce(sums_E)
    return sums_E


@torch.library.custom_op("gptoss::sum_over_ranks", mutates_args=())
def sum_in_a_graph(counts_E: Tensor) -> Tensor:
    """Return counts, int64, summed over all ranks: one step for a compiler."""
    return _sum_over_ranks(counts_E)


@sum_in_a_graph.register_fake
def _(counts_E):
    return torch.empty_like(counts_E)
