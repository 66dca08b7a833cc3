"""Log-probabilities of targets under a linear layer over a large vocabulary, one for each row.

A loss of single rows' log-probabilities (preferences, rewards, distillation) knows a row's weight
only when all rows are known. So the forward pass keeps the log of each row's sum, and the backward
pass makes the logits again, a few rows at a time: 8 instead of 6 products' worth of work of the
fused loss, and one pass through the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.kernels.linear_cross_entropy import (
    IGNORE,
    add_product_,
    head_dtype,
    log_sum_exp_,
    logits_buffer,
)
from runtime.kernels.trained_rows import split_rows


class _TargetLogProbs(torch.autograd.Function):
    """(h W' + b)[target] - logsumexp(h W' + b) of each row; 0 where the target is IGNORE."""

    @staticmethod
    def forward(ctx, h_MC, weight_VC, bias_V, targets_M, chunk_rows, dtype, rows_nC, first_row):
        wide = torch.promote_types(dtype, torch.float32)
        weight = weight_VC.to(dtype)
        M, V = len(h_MC), len(weight)
        log_sum_M = torch.zeros(M, dtype=wide, device=h_MC.device)
        at_target_M = torch.zeros_like(log_sum_M)
        buffer = logits_buffer(min(chunk_rows, M), V, dtype, h_MC.device)
        for rows, logits_NV in _logits(h_MC, weight, bias_V, chunk_rows, buffer):
            target_N1 = targets_M[rows].clamp(min=0)[:, None]
            at_target_M[rows] = logits_NV.gather(1, target_N1)[:, 0]
            # In place: torch.logsumexp makes a copy of its size.
            log_sum_M[rows] = log_sum_exp_(logits_NV)[0][:, 0]
        ctx.save_for_backward(h_MC, weight_VC, bias_V, targets_M, log_sum_M)
        ctx.chunk_rows, ctx.dtype = chunk_rows, dtype
        ctx.trained = None if rows_nC is None else slice(first_row, first_row + len(rows_nC))
        return torch.where(targets_M != IGNORE, at_target_M - log_sum_M, 0.0)

    @staticmethod
    def backward(ctx, grad_M):
        h_MC, weight_VC, bias_V, targets_M, log_sum_M = ctx.saved_tensors
        dtype, chunk_rows = ctx.dtype, ctx.chunk_rows
        wide = torch.promote_types(dtype, torch.float32)
        weight = weight_VC.to(dtype)
        M, V = len(h_MC), len(weight)
        needs_h, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        own = dict(dtype=wide, device=h_MC.device)
        grad_h = torch.empty(h_MC.shape, **own) if needs_h else None
        # Written by the first chunk, if there is one.
        empty = torch.empty if M else torch.zeros
        grad_weight = empty(weight.shape, **own) if needs_weight else None
        grad_bias = torch.zeros(V, **own) if needs_bias else None
        grad_rows = None
        if ctx.trained is not None:
            grad_rows = torch.zeros(weight[ctx.trained].shape, **own)
        buffer = logits_buffer(min(chunk_rows, M), V, dtype, h_MC.device)
        grad_M = torch.where(targets_M != IGNORE, grad_M, 0.0).to(wide)
        for rows, logits_NV in _logits(h_MC, weight, bias_V, chunk_rows, buffer):
            grad_N1, target_N1 = grad_M[rows, None], targets_M[rows].clamp(min=0)[:, None]
            # (one_hot - softmax) * grad, over the logits.
            logits_NV.sub_(log_sum_M[rows, None])
            at_target_N1 = -torch.expm1(logits_NV.gather(1, target_N1)) * grad_N1
            logits_NV.exp_().mul_(-grad_N1).scatter_(1, target_N1, at_target_N1)
            if grad_bias is not None:
                grad_bias += logits_NV.sum(dim=0)
            chunk_NV = buffer[: len(logits_NV), :V]
            if chunk_NV.dtype != wide:
                chunk_NV.copy_(logits_NV)
            if grad_h is not None:
                grad_h[rows] = (chunk_NV @ weight).to(wide)
            if grad_weight is not None:
                is_first = rows.start == 0
                add_product_(grad_weight, chunk_NV, h_MC[rows].to(dtype), is_first)
            if grad_rows is not None:
                grad_rows += logits_NV[:, ctx.trained].T @ h_MC[rows].to(wide)
        grads = (grad_h, h_MC), (grad_weight, weight_VC), (grad_bias, bias_V)
        made = (None if g is None else g.to(like.dtype) for g, like in grads)
        return *made, None, None, None, grad_rows, None


def _logits(h_MC, weight_VC, bias_V, chunk_rows, buffer):
    """Yield (slice of rows, their logits in float32 or better) for each chunk.

    The logits lie in the buffer where that has their dtype.
    """
    wide = torch.promote_types(weight_VC.dtype, torch.float32)
    for first in range(0, len(h_MC), chunk_rows):
        rows = slice(first, min(first + chunk_rows, len(h_MC)))
        h_NC = h_MC[rows].to(weight_VC.dtype)
        chunk_NV = torch.mm(h_NC, weight_VC.T, out=buffer[: len(h_NC), : len(weight_VC)])
        logits_NV = chunk_NV.to(wide)
        yield rows, logits_NV if bias_V is None else logits_NV.add_(bias_V.to(wide))


def target_log_probs(
    h_MC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    chunk_rows: int,
) -> Tensor:
    """Return log softmax(h W' + b)[target] of each row (nats), [M], float32; 0 for IGNORE.

    float64 for float64 inputs. h [M, C], weight [V, C], bias [V] or None, targets [M] int64. Of the
    logits [M, V], `chunk_rows` rows are held at a time, in the backward pass too. Any gradient may
    come back for each row. The products run in autocast's dtype if it is on. Of a weight from
    with_trained_rows, the trained rows' gradient alone is made.
    """
    device = h_MC.device.type
    weight_VC, rows_nC, first_row = split_rows(weight_VC)
    dtype = head_dtype(device, weight_VC)
    with torch.autocast(device, enabled=False):
        return _TargetLogProbs.apply(
            h_MC, weight_VC, bias_V, targets_M, chunk_rows, dtype, rows_nC, first_row
        )
