"""Choose the kernels that suit a device and a dtype."""

from __future__ import annotations

import functools

import torch

import runtime.kernels.cpu_experts  # noqa: F401  (registers gptoss::feed_forward)
from runtime.kernels.attention_choice import Card, card_of, choose_attention, gpu_attention
from runtime.kernels.bias_attention import bias_attention, is_asked_for, why_not
from runtime.kernels.sink_attention import sink_attention


def choose_kernels(model, device: torch.device, dtype: torch.dtype) -> None:
    """Tell a model's blocks which of their paths is the fast one on `device` in `dtype`.

    The results are the same. Grouped experts: bfloat16 on Hopper, whose kernel wants rows of a
    multiple of 16 bytes; not on later cards while PyTorch issue 172439 is open (wrong weight
    gradients for experts without tokens). On a CPU: runtime/kernels/cpu_experts.py. Attention:
    runtime/kernels/attention_choice.py; with sinks: runtime/kernels/sink_attention.py; with the
    learned bias, if it is asked for: runtime/kernels/bias_attention.py.
    """
    card = card_of(device) if device.type == "cuda" else None
    capability = (0, 0) if card is None else card.capability
    for block in model.layers:
        experts = block.moe.experts
        experts.grouped = (
            capability == (9, 0)
            and dtype == torch.bfloat16
            and experts.w_in.shape[2] % 8 == 0
            and experts.w_out.shape[2] % 8 == 0
        )
        experts.feed_forward = (
            torch.ops.gptoss.feed_forward.default if device.type == "cpu" else None
        )
        attention = block.attention
        attention.device_attention = functools.partial(gpu_attention, card=card) if card else None
        attention.sink_kernel = _sink_kernel(device, dtype, attention.D, card)
        attention.bias_kernel = _bias_kernel(attention, device, dtype)


def _sink_kernel(device: torch.device, dtype: torch.dtype, D: int, card: Card | None):
    """Return sink_attention where it can run, else None: Apple's GPUs, heads of odd sizes."""
    if device.type == "cpu":
        return sink_attention
    masked = card and choose_attention(card, dtype, "fixed", 2, D, needs_gradient=False)
    if masked is None or masked.kernel == "torch":
        return None
    return functools.partial(sink_attention, card=card)


def _bias_kernel(attention, device: torch.device, dtype: torch.dtype):
    """Return bias_attention where it is asked for and can run, else None."""
    has_bias = attention.attention_bias is not None
    if not is_asked_for() or not has_bias or why_not(attention, device, dtype):
        return None
    return functools.partial(bias_attention, dtype=dtype)
