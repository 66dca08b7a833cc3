"""Choose the kernels that suit a device and a dtype."""

from __future__ import annotations

import functools
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

import runtime.kernels.cpu_experts  # noqa: F401  (registers gptoss::feed_forward)
from runtime.kernels import (
    bias_attention,
    cpu_attention,
    linear_cross_entropy,
    loss_in_c,
    norms,
    routed_experts,
    router,
)
from runtime.kernels.attention_choice import Card, card_of, choose_attention, gpu_attention
from runtime.kernels.sink_attention import sink_attention

# It asks for each loss whether C can do it.
linear_cross_entropy.in_c = loss_in_c  # type: ignore[assignment]
# The kernels of training, in the order of InC's fields.
IN_C = (routed_experts, cpu_attention, norms, router, loss_in_c)


def choose_kernels(model, device: torch.device, dtype: torch.dtype) -> None:
    """Tell a model's blocks which of their paths is the fast one on `device` in `dtype`.

    The results are the same. Grouped experts: bfloat16 on Hopper, whose kernel wants rows of a
    multiple of 16 bytes; not on later cards while PyTorch issue 172439 is open (wrong weight
    gradients for experts without tokens). On a CPU: runtime/kernels/routed_experts.py, in C, and
    runtime/kernels/cpu_experts.py without a compiler. Attention: on a CPU
    runtime/kernels/cpu_attention.py, in C; else runtime/kernels/attention_choice.py, with sinks
    runtime/kernels/sink_attention.py, with the learned bias, if it is asked for,
    runtime/kernels/bias_attention.py. Norms and rotations, routers: on a CPU
    runtime/kernels/norms.py and router.py, in C. What `leave_out` took away stays away.
    """
    in_c = _in_c(device, dtype)
    for norm in norms_of(model):
        _put(norm, "kernel", norms.rms_norm if in_c.norms else None)
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
        plain = torch.ops.gptoss.feed_forward.default if device.type == "cpu" else None
        _put(experts, "feed_forward", routed_experts.rows_of_experts if in_c.experts else plain)
        if hasattr(block.moe.dispatcher, "kernel"):
            dispatch = routed_experts.dispatch if in_c.experts else None
            _put(block.moe.dispatcher, "kernel", dispatch)
        _put(block.moe, "route_kernel", router.route if in_c.router else None)
        attention = block.attention
        _put(attention, "turn_kernel", norms.turn if in_c.norms else None)
        attend = cpu_attention.attend if in_c.attention else None
        _put(attention, "kernel", _bias_kernel(attention, device, dtype) or attend)
        attention.device_attention = functools.partial(gpu_attention, card=card) if card else None
        _put(attention, "sink_kernel", _sink_kernel(device, dtype, attention.D, card))


def leave_out(part, slot: str) -> None:
    """Take the kernel from a slot of a model's part for good: it computes something else.

    A model's kernels are chosen again where its dtype is another one for a while.
    """
    setattr(part, slot, None)
    part.left_out = getattr(part, "left_out", frozenset()) | {slot}


def _put(part, slot: str, kernel) -> None:
    setattr(part, slot, None if slot in getattr(part, "left_out", ()) else kernel)


def norms_of(model) -> list:
    """Return a model's norms that may have a kernel: model_parts.RMSNorm."""
    parts = [*model.layers, getattr(model, "norm", None)]
    modules = (m for part in parts if part is not None for m in part.modules())
    return [m for m in modules if isinstance(m, torch.nn.RMSNorm) and hasattr(m, "kernel")]


class InC(NamedTuple):
    """Which of a block's parts C does; norms: rotations, too."""

    experts: bool = False
    attention: bool = False
    norms: bool = False
    router: bool = False


def _in_c(device: torch.device, dtype: torch.dtype) -> InC:
    """Return what C does.

    The first time on a machine, all kernels of training are compiled at once.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return InC()
    with ThreadPoolExecutor(len(IN_C)) as pool:
        *there, _ = pool.map(lambda kernel: kernel.library()[0] is not None, IN_C)
    return InC(*there)


def why_not_c(device: torch.device, dtype: torch.dtype) -> str:
    """Return why a CPU does without the C kernels of training, "" where it has them."""
    if device.type != "cpu" or dtype != torch.float32:
        return ""
    return next(filter(None, (kernel.library()[1] for kernel in IN_C)), "")


def _sink_kernel(device: torch.device, dtype: torch.dtype, D: int, card: Card | None):
    """Return sink_attention where it can run, else None: Apple's GPUs, heads of odd sizes."""
    if device.type == "cpu":
        return sink_attention
    masked = card and choose_attention(card, dtype, "fixed", 2, D, needs_gradient=False)
    if masked is None or masked.kernel == "torch":
        return None
    return functools.partial(sink_attention, card=card)


def _bias_kernel(attention, device: torch.device, dtype: torch.dtype):
    """Return bias_attention.attend where it is asked for and can run, else None."""
    has_bias = attention.attention_bias is not None
    if not bias_attention.is_asked_for() or not has_bias:
        return None
    if bias_attention.why_not(attention, device, dtype):
        return None
    return functools.partial(bias_attention.attend, dtype=dtype)
