"""What the C decoder makes of the inputs of packed weights, in PyTorch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model import LLM
from model_parts import activate
from runtime.inference.quantize import kind_in, packed_kind

# Inputs that share a scale, and the steps from 0 to the largest of them.
GRAIN = {"int8": (128, 32767), "int4": (32, 127)}


def rounded(x: Tensor, kind: str) -> Tensor:
    """Return inputs [..., I] as the C decoder takes them next to weights packed to `kind`."""
    grain, steps = GRAIN[kind]
    I = x.shape[-1]
    groups = F.pad(x.float(), (0, -I % grain)).unflatten(-1, (-1, grain))
    top = groups.abs().amax(dim=-1, keepdim=True).clamp(min=1e-30)
    return ((groups * (steps / top)).round() * (top / steps)).flatten(-2)[..., :I]


@contextlib.contextmanager
def rounding_inputs(model: LLM) -> Iterator[None]:
    """Let a packed model's products round their inputs as the C decoder does."""
    kind = packed_kind(model)
    handles, slots = [], []
    for block in model.layers:
        a, experts = block.attention, block.moe.experts
        handles += [
            linear.register_forward_pre_hook(
                lambda module, x: (rounded(x[0], kind_in(module, kind)),)
            )
            for linear in (a.W_q, a.W_k, a.W_v, a.out_proj)
        ]
        slots.append((experts, experts.feed_forward))

        def feed_forward(x_RC, w_in, b_in, w_out, b_out, counts_E, activation):
            y_RC, start = torch.empty_like(x_RC), 0
            x_RC = rounded(x_RC, kind)
            for e, count in enumerate(counts_E.tolist()):
                rows = slice(start, start := start + count)
                h_RF = F.linear(x_RC[rows], w_in[e], None if b_in is None else b_in[e])
                h_RF = rounded(activate(h_RF, activation), kind)
                y_RC[rows] = F.linear(h_RF, w_out[e], None if b_out is None else b_out[e])
            return (y_RC,)

        experts.feed_forward = feed_forward
    # The head is given what the last norm gives.
    handles.append(model.norm.register_forward_hook(lambda _, __, out: rounded(out, kind)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for experts, feed_forward in slots:
            experts.feed_forward = feed_forward
