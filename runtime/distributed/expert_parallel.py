"""Experts on several ranks: rows of tokens go to the rank that holds their expert, and come back.

GShard's placement (Lepikhin et al. 2020, section 3.2), without its fixed capacity: ranks first tell
each other how many rows they send, so that no row is dropped or padded. Ranks that share a block's
experts hold equal slices of its stacks, in order. A pass exchanges the counts once, on which the
host waits, and the rows twice; a backward pass exchanges the gradients of the rows twice.

Sorting, routing weights and capacity stay at home, as in LocalDispatcher: only its call of the
experts is another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from model_parts import Block, Experts, LocalDispatcher, MoE
from runtime.kernels.grouped_linear import GatherRows


def share_experts(block: Block, group: ProcessGroup) -> Experts:
    """Leave a block the experts of this rank; have it send rows to the others'. Return its own.

    group: the ranks that share them, whose number divides that of the experts. Raise ValueError for
    experts that hold more than stacks with a row for each expert (weights, biases, adapters).
    """
    _check_known(block.moe)
    experts, ranks, rank = block.moe.experts, group.size(), group.rank()
    for name, parameter in list(experts.named_parameters()):
        held = len(parameter) // ranks
        # A copy, so that the whole stack is freed.
        own = parameter.detach()[rank * held : (rank + 1) * held].clone()
        setattr(experts, name, nn.Parameter(own, parameter.requires_grad))
    block.moe.dispatcher = RankDispatcher(group)
    if block._compiled_call_impl is not None:
        # In graphs of what comes before the exchange and after it, which the blocks share.
        block.compile(dynamic=False)
    return experts


def _check_known(moe: MoE) -> None:
    E = moe.router.num_experts
    for name, tensor in (*moe.experts.named_parameters(), *moe.experts.named_buffers()):
        if "." in name or not isinstance(tensor, nn.Parameter) or len(tensor) != E:
            raise ValueError(
                f"--expert_parallel knows experts whose parameters are stacks with a row for each "
                f"of {E} experts, not {name} {list(tensor.shape)}: leave it out"
            )
    if type(moe.dispatcher) is not LocalDispatcher:
        raise ValueError(
            f"--expert_parallel replaces LocalDispatcher, and this model has the dispatcher "
            f"{type(moe.dispatcher).__name__}: leave it out"
        )


class RankDispatcher(LocalDispatcher):
    """Bring tokens to experts that a group of ranks shares."""

    def __init__(self, group: ProcessGroup):
        self.group = group

    def __call__(
        self,
        x_NC: Tensor,
        weights_NK: Tensor,
        experts_NK: Tensor,
        counts_E: Tensor,
        experts: Experts,
    ) -> Tensor:
        def wherever_they_are(rows_RC: Tensor, experts_R: Tensor, counts_E: Tensor) -> Tensor:
            return self._exchanged(rows_RC, counts_E, experts)

        return super().__call__(x_NC, weights_NK, experts_NK, counts_E, wherever_they_are)  # type: ignore[arg-type]

    # The sizes are known on the host alone, and a compiler would make a graph for each.
    @torch.compiler.disable
    def _exchanged(self, rows_RC: Tensor, counts_E: Tensor, experts: Experts) -> Tensor:
        """Pass rows that are sorted by expert through the experts of all ranks: [R, C] -> [R, C].

        Under autocast rows travel in its dtype, which the experts would round them to.
        """
        ranks, device = self.group.size(), rows_RC.device
        # [ranks, experts of a rank]: rows for each, and rows from each for those here.
        sent, arrived = counts_E.view(ranks, -1), torch.empty_like(counts_E).view(ranks, -1)
        dist.all_to_all_single(arrived, sent.contiguous(), group=self.group)
        to_each, from_each = torch.stack((sent, arrived)).sum(dim=2).tolist()
        if torch.is_autocast_enabled(device.type):
            rows_RC = rows_RC.to(torch.get_autocast_dtype(device.type))
        rows_RC = ExchangeRows.apply(rows_RC, to_each, from_each, self.group)

        # They come by rank, then by expert, and are wanted by expert alone.
        num_held = arrived.shape[1]
        experts_R = torch.arange(num_held, device=device).repeat(ranks)
        experts_R = experts_R.repeat_interleave(arrived.flatten(), output_size=sum(from_each))
        order_R = experts_R.argsort(stable=True)
        inverse_R = torch.empty_like(order_R).scatter_(
            0, order_R, torch.arange(len(order_R), device=device)
        )
        rows_RC = GatherRows.apply(rows_RC, order_R, inverse_R, 1)
        y_RC = _computed(experts, rows_RC, experts_R[order_R], arrived.sum(dim=0))
        y_RC = GatherRows.apply(y_RC, inverse_R, order_R, 1)
        return ExchangeRows.apply(y_RC, from_each, to_each, self.group)


def _computed(experts: Experts, rows_RC: Tensor, experts_R: Tensor, counts_E: Tensor) -> Tensor:
    """Return the experts' outputs, [R, C], also of no rows at all.

    Then they get one row of zeros: F.grouped_mm refuses some operands without rows (pytorch pull
    request 192497). The result still depends on the rows, so that their gradients are exchanged.
    """
    if len(rows_RC):
        return experts(rows_RC, experts_R, counts_E)
    is_first_E = F.pad(torch.ones_like(counts_E[:1]), (0, len(counts_E) - 1))
    return experts(F.pad(rows_RC, (0, 0, 0, 1)), F.pad(experts_R, (0, 1)), is_first_E)[:0]


class ExchangeRows(torch.autograd.Function):
    """Send rows [R, C] to the ranks of a group, and get theirs; gradients travel the other way.

    to_each, from_each: how many consecutive rows are for each rank, and how many come from each.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, to_each: list[int], from_each: list[int], group: ProcessGroup
    ) -> Tensor:
        ctx.back = (from_each, to_each, group)
        return _exchange(rows, to_each, from_each, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchange(grad, *ctx.back), None, None, None


def _exchange(
    rows: Tensor, to_each: list[int], from_each: list[int], group: ProcessGroup
) -> Tensor:
    arrived = rows.new_empty(sum(from_each), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), from_each, to_each, group=group)
    return arrived
