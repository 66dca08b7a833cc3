"""A frozen matrix of which some rows are trained, for an output projection over a vocabulary.

The gradient of all of a head is as large as the head, 0.8 GB at full size, and a third of the
loss's products. If three rows of it are trained, as with adapters and new ids, the kernels of the
loss make those rows of it alone. Any other operation makes all of it, and the rows are taken out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _TrainedRows(torch.autograd.Function):
    """Return a frozen tensor as it is; its gradient goes to the rows that are trained."""

    @staticmethod
    def forward(ctx, whole, rows, first_row):
        ctx.rows = slice(first_row, first_row + len(rows))
        return whole.detach()

    @staticmethod
    def backward(ctx, grad):
        return None, grad[ctx.rows], None


def with_trained_rows(whole: Tensor, rows: Tensor, first_row: int) -> Tensor:
    """Return a frozen tensor [V, ..] whose gradient goes to `rows` [n, ..].

    They are rows of it in memory, the first at `first_row`.
    """
    result: Any = _TrainedRows.apply(whole, rows, first_row)
    # What `split_rows` finds.
    result.parts = (whole, rows, first_row)
    return result


def split_rows(weight: Tensor) -> tuple[Tensor, Tensor | None, int]:
    """Return (tensor, its trained rows, the first of them); (tensor, None, 0) for all others."""
    return getattr(weight, "parts", (weight, None, 0))
