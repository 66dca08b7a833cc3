"""Attention with sinks by kernels that know none; no scores are held.

The mathematics is that of model_parts.attention_with_sinks. A kernel gives softmax(s) v and lse,
the log of the softmax's sum. The sink adds a term to that denominator, so the output is scaled by
exp(lse_old - lse_new). In the backward pass, give the kernel the scaled output and lse_new: it
recomputes each probability as exp(s - lse_new), which is right, and its other formulas hold. The
sink's gradient is minus its probability times the inner product of the output and its gradient, as
for any key with the value 0.
`runtime.kernels.choose.choose_kernels` puts this into `Attention.sink_kernel`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from runtime.kernels.attention_choice import (
    Card,
    aligned_mask,
    choose_attention,
    mask_kind,
    mask_numbers,
)

aten = torch.ops.aten


class _SinkAttention(torch.autograd.Function):
    """kernel: cpu, flash, efficient or cudnn."""

    @staticmethod
    def forward(ctx, q, k, v, sinks_H, mask, is_causal, kernel):
        y, log, *rest = _forward(kernel, q, k, v, mask, is_causal)
        log_BHT = log.flatten(2)  # cuDNN's is [B, H, T, 1]
        new_log_BHT = torch.logaddexp(log_BHT, sinks_H.to(log_BHT.dtype)[:, None])
        T = q.shape[2]  # the memory-efficient kernel pads the log
        dtype, y = y.dtype, y * (log_BHT - new_log_BHT)[:, :, :T, None].exp()
        # Compiled by torch 2.11, a result of a `to` that changes nothing has gradients of 0.
        if y.dtype != dtype:
            y = y.to(dtype)
        tensors = [x for x in rest if isinstance(x, Tensor)]
        ctx.save_for_backward(q, k, v, sinks_H, mask, y, new_log_BHT.view(log.shape), *tensors)
        # A kernel may also return None, so None cannot say that a tensor was saved.
        ctx.rest = [(True, None) if isinstance(x, Tensor) else (False, x) for x in rest]
        ctx.is_causal, ctx.kernel = is_causal, kernel
        return y

    @staticmethod
    def backward(ctx, grad):
        q, k, v, sinks_H, mask, y, log, *tensors = ctx.saved_tensors
        tensors = iter(tensors)
        rest = [next(tensors) if is_tensor else value for is_tensor, value in ctx.rest]
        grad_q, grad_k, grad_v = _backward(
            ctx.kernel, grad.to(y.dtype), q, k, v, y, log, mask, ctx.is_causal, rest
        )
        log_BHT = log.flatten(2)[:, :, : q.shape[2]]
        share_BHT = (sinks_H.to(log_BHT.dtype)[:, None] - log_BHT).exp()
        products_BHT = (grad.to(share_BHT.dtype) * y.to(share_BHT.dtype)).sum(dim=-1)
        grad_sinks = -(share_BHT * products_BHT).sum(dim=(0, 2)).to(sinks_H.dtype)
        return grad_q, grad_k, grad_v, grad_sinks, None, None, None


def sink_attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    sinks_H: Tensor,
    mask: Tensor | None,
    is_causal: bool,
    card: Card | None = None,
) -> Tensor:
    """[B, H, T, D] in the queries' dtype: on a CPU, or by the kernel that suits `card`.

    mask: bool, [T, S] or [B, 1, T, S], True keeps. ValueError for what no kernel of a card takes:
    heads of odd sizes, float64.
    """
    if card is None:
        kernel = "cpu"
        mask = None if mask is None else mask_numbers(mask, q_BHTD.dtype)
    else:
        H, (G, S, D) = q_BHTD.shape[1], k_BGSD.shape[1:]
        choice = choose_attention(
            card, q_BHTD.dtype, mask_kind(mask), S, D, torch.is_grad_enabled(), sinks=True
        )
        kernel = choice.kernel
        if kernel == "torch":
            raise ValueError(
                f"no kernel of a GPU knows sinks with heads of {D} numbers in "
                f"{q_BHTD.dtype}: use model_parts.attention_with_sinks"
            )
        if G != H and choice.copies_heads:
            k_BGSD, v_BGSD = (x.repeat_interleave(H // G, dim=1) for x in (k_BGSD, v_BGSD))
        mask = None if mask is None else aligned_mask(mask, q_BHTD)
    return _SinkAttention.apply(q_BHTD, k_BGSD, v_BGSD, sinks_H, mask, is_causal, kernel)


def _forward(kernel, q, k, v, mask, is_causal):
    """Return (result, log of the softmax's sum, what else the backward pass needs)."""
    if kernel == "cpu":
        cpu = aten._scaled_dot_product_flash_attention_for_cpu
        return cpu(q, k, v, 0.0, is_causal, attn_mask=mask)
    if kernel == "efficient":
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, mask, True, 0.0, is_causal)
    if kernel == "flash":
        everything = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)
    else:
        cudnn = aten._scaled_dot_product_cudnn_attention
        everything = cudnn(q, k, v, None, True, 0.0, is_causal)
    # Cumulated lengths (none), longest of each, state of the random numbers (none are drawn).
    return everything[:8]


def _backward(kernel, grad, q, k, v, y, log, mask, is_causal, rest):
    if kernel == "cpu":
        cpu = aten._scaled_dot_product_flash_attention_for_cpu_backward
        return cpu(grad, q, k, v, y, log, 0.0, is_causal, attn_mask=mask)
    if kernel == "efficient":
        efficient = aten._scaled_dot_product_efficient_attention_backward
        wanted = [True, True, True, False]
        return efficient(grad, q, k, v, mask, y, log, *rest, 0.0, wanted, is_causal)[:3]
    lengths, state = rest[:4], rest[4:]
    if kernel == "flash":
        flash = aten._scaled_dot_product_flash_attention_backward
        return flash(grad, q, k, v, y, log, *lengths, 0.0, is_causal, *state)
    cudnn = aten._scaled_dot_product_cudnn_attention_backward
    return cudnn(grad, q, k, v, y, log, *state, None, *lengths, 0.0, is_causal)
