"""Attention with sinks by the kernels that know none: the same mathematics as model_parts.attention_with_sinks, no scores held.

A kernel gives softmax(s) v and the log of the softmax's sum. With one place more in that sum, which holds nothing, the result
shrinks by exp(old log - new log). Backward, the kernel only needs to be told the shrunk result and the new log: it then makes
every probability anew as exp(s - new log), which is what they are, and the rest of its formulas stays true. The sink's own
gradient is minus its probability times the inner product of the result and its gradient, as for any place with the value 0.
`runtime.device.choose_kernels` puts this into `Attention.sink_kernel`.
"""
from __future__ import annotations

import torch
from torch import Tensor

_ALIGNMENT = 16  # numbers that a row of a mask on a GPU must be a multiple of

aten = torch.ops.aten


class _SinkAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks_H, mask, is_causal, flash):
        y, log_BHT, *rest = _forward(q, k, v, mask, is_causal, flash)
        new_log_BHT = torch.logaddexp(log_BHT, sinks_H.to(log_BHT.dtype)[:, None])
        T = q.shape[2]  # a GPU's kernel may pad the log
        y = (y * (log_BHT - new_log_BHT)[:, :, :T, None].exp()).to(y.dtype)
        ctx.save_for_backward(q, k, v, sinks_H, mask, y, new_log_BHT, *(x for x in rest if isinstance(x, Tensor)))
        ctx.rest, ctx.is_causal, ctx.flash = [None if isinstance(x, Tensor) else x for x in rest], is_causal, flash
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks_H, mask, y, log_BHT, *tensors = ctx.saved_tensors
        tensors = iter(tensors)
        rest = [next(tensors) if x is None else x for x in ctx.rest]
        grad_q, grad_k, grad_v = _backward(grad.to(y.dtype), q, k, v, y, log_BHT, mask, ctx.is_causal, ctx.flash, rest)
        share_BHT = (sinks_H.to(log_BHT.dtype)[:, None] - log_BHT[:, :, :q.shape[2]]).exp()
        grad_sinks = -(share_BHT * (grad.to(share_BHT.dtype) * y.to(share_BHT.dtype)).sum(dim=-1)).sum(dim=(0, 2)).to(sinks_H.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None, None, None


def sink_attention(q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, sinks_H: Tensor, mask: Tensor | None, is_causal: bool, has_flash: bool = False) -> Tensor:
    """[B, H, T, D] in the queries' dtype, on a CPU or by CUDA's flash kernel (no mask, and `has_flash`: half precision from Ampere on) or
    memory-efficient kernel.

    mask: bool, [T, S] or [B, 1, T, S], True keeps. G may be less than H (on a GPU with flash or on a CPU).
    """
    flash = has_flash and mask is None
    if mask is not None:
        mask = _as_numbers(mask, q_BHTD)
    return _SinkAttention.apply(q_BHTD, k_BGSD, v_BGSD, sinks_H, mask, is_causal, flash)


def _as_numbers(mask: Tensor, q_BHTD: Tensor) -> Tensor:
    """0 and -inf in the queries' dtype; for a GPU [B, H, T, S], its rows at aligned addresses."""
    numbers = torch.zeros((), dtype=q_BHTD.dtype, device=mask.device).where(mask, -torch.inf)
    if not q_BHTD.is_cuda:
        return numbers
    S = numbers.shape[-1]
    padded = torch.nn.functional.pad(numbers, (0, -S % _ALIGNMENT))[..., :S]
    return padded.expand(*q_BHTD.shape[:2], *padded.shape[-2:])


def _forward(q, k, v, mask, is_causal, flash):
    """(result, log of the softmax's sum, what the backward pass needs besides)"""
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=mask)
    if flash:
        y, log, *rest = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)
        return y, log, *rest[:6]  # cumulated lengths (none), longest of each, state of the random numbers (none are drawn)
    return aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, is_causal)


def _backward(grad, q, k, v, y, log, mask, is_causal, flash, rest):
    if not q.is_cuda:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(grad, q, k, v, y, log, 0.0, is_causal, attn_mask=mask)
    if flash:
        return aten._scaled_dot_product_flash_attention_backward(grad, q, k, v, y, log, *rest[:4], 0.0, is_causal, *rest[4:])
    return aten._scaled_dot_product_efficient_attention_backward(grad, q, k, v, mask, y, log, *rest, 0.0, [True, True, True, False], is_causal)[:3]
