"""Attention as one operation for CPUs, in C: forward and backward by tiles, in float32.

PyTorch's own kernel reaches a quarter of a core's speed at 512 tokens, takes a mask as T x S
numbers, and knows no sinks. attention.c takes the rule itself (model_parts.attention_mask):
positions, a window, each query's start of document. runtime/kernels/choose.py puts this into
`Attention.kernel`; benchmarks/attention.py compares them.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.compile import FUSED, compiled, parallel_region

SOURCE = Path(__file__).with_name("attention.c")
# Longest heads that are worth a row of a tile.
MOST_HEAD_DIM = 256


class _Call(ctypes.Structure):
    """A `Call` of attention.c."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "S", "H", "G", "D", "window", "threads")),
        *(
            (f"{name}_steps", ctypes.c_int64 * 3)
            for name in ("q", "k", "v", "y", "grad")
        ),
        ("bias_steps", ctypes.c_int64 * 2),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("q", "k", "v", "sinks", "bias", "q_positions", "k_positions", "starts"),
                *("y", "logs", "grad", "grad_q", "grad_k", "grad_v", "grad_sinks", "grad_bias"),
                *("room", "parallel"),
            )
        ),
    ]


@functools.cache
def library(*flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Return (the compiled attention.c, ""), or (None, why there is none)."""
    code, why = compiled(SOURCE, FUSED, *flags)
    if code is not None:
        code.attention_room.restype = ctypes.c_int64
        code.attention_room.argtypes = [ctypes.c_void_p, ctypes.c_int64]
        for function in (code.attention_forward, code.attention_backward):
            function.restype, function.argtypes = None, [ctypes.c_void_p]
    return code, why


def _call(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    sinks_H: Tensor | None,
    bias_HTS: Tensor | None,
    q_positions_T: Tensor,
    k_positions_S: Tensor,
    starts_BT: Tensor | None,
    window: int,
) -> _Call:
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    call = _Call(B, T, S, H, G, D, window, torch.get_num_threads())
    call.parallel = parallel_region() or None
    for name, x in (("q", q_BHTD), ("k", k_BGSD), ("v", v_BGSD)):
        _put(call, name, x)
    if bias_HTS is not None:
        call.bias, call.bias_steps = bias_HTS.data_ptr(), bias_HTS.stride()[:2]
    for name, x in (
        ("sinks", sinks_H),
        ("q_positions", q_positions_T),
        ("k_positions", k_positions_S),
        ("starts", starts_BT),
    ):
        if x is not None:
            setattr(call, name, x.data_ptr())
    return call


def _put(call: _Call, name: str, x_BHTD: Tensor) -> None:
    setattr(call, name, x_BHTD.data_ptr())
    setattr(call, f"{name}_steps", x_BHTD.stride()[:3])


def _run(code: ctypes.CDLL, call: _Call, is_backward: bool, like: Tensor) -> None:
    address = ctypes.byref(call)
    room = like.new_empty(code.attention_room(address, is_backward))
    call.room = room.data_ptr()
    (code.attention_backward if is_backward else code.attention_forward)(address)


def forward(code: ctypes.CDLL, *given) -> tuple[Tensor, Tensor]:
    """Return (y [B, H, T, D], base-2 logarithms of the softmax's sums [B, H, T])."""
    call, q_BHTD = _call(*given), given[0]
    y_BHTD, logs_BHT = _outputs(q_BHTD)
    _put(call, "y", y_BHTD)
    call.logs = logs_BHT.data_ptr()
    _run(code, call, False, q_BHTD)
    return y_BHTD, logs_BHT


def backward(code: ctypes.CDLL, grad_BHTD: Tensor, y_BHTD: Tensor, logs_BHT: Tensor, *given):
    """Return the gradients of q, k, v, sinks and bias; the last two are empty if there is none."""
    call, (q_BHTD, k_BGSD, _, sinks_H, bias_HTS) = _call(*given), given[:5]
    grads = _gradients(*given[:5])
    _put(call, "y", y_BHTD)
    _put(call, "grad", grad_BHTD)
    call.logs = logs_BHT.data_ptr()
    for name, grad in zip(("q", "k", "v"), grads, strict=False):
        setattr(call, f"grad_{name}", grad.data_ptr())
    sinks_BH = q_BHTD.new_empty(q_BHTD.shape[:2])
    if sinks_H is not None:
        call.grad_sinks = sinks_BH.data_ptr()
    if bias_HTS is not None:
        grads[4].zero_()
        call.grad_bias = grads[4].data_ptr()
    _run(code, call, True, q_BHTD)
    if sinks_H is not None:
        torch.sum(sinks_BH, dim=0, out=grads[3])
    return grads


def _outputs(q_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, D = q_BHTD.shape
    # In memory as the output projection reads it.
    return q_BHTD.new_empty(B, T, H, D).transpose(1, 2), q_BHTD.new_empty(B, H, T)


def _gradients(q_BHTD, k_BGSD, v_BGSD, sinks_H, bias_HTS) -> tuple[Tensor, ...]:
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    grad_q = q_BHTD.new_empty(B, T, H, D).transpose(1, 2)
    grad_k, grad_v = (q_BHTD.new_empty(B, S, G, D).transpose(1, 2) for _ in range(2))
    others = (q_BHTD.new_empty(0 if x is None else x.shape) for x in (sinks_H, bias_HTS))
    return (grad_q, grad_k, grad_v, *others)
