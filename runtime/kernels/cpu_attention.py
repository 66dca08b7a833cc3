"""Attention in C, on a CPU in float32: forward and backward, tile by tile.

runtime/kernels/attention.c does it from the mask's rule itself (model_parts.attention_mask):
positions, a window, each query's start of document. So no T x S numbers are held, but the gradient
of a learned bias, which is the parameter's. It also knows sinks and key/value heads that query
heads share. The machine's own compiler compiles it (runtime/kernels/compile.py). Where there is
none, or for another dtype, model_parts.Attention takes PyTorch's kernels, whose results are the
same except for rounding. runtime/kernels/choose.py puts it into `Attention.kernel`;
benchmarks/attention.py compares them.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.compile import kernel, parallel_region
from runtime.kernels.eager import called, eager_function
from runtime.kernels.scratch import scratch

SOURCE = Path(__file__).with_name("attention.c")
NUMBERS = "B T S H G D window threads"
# Of the batch, the head, the token; of the bias: of the head and the query.
STEPS = {"q": 3, "k": 3, "v": 3, "y": 3, "grad": 3, "bias": 2}
POINTERS = (
    "q k v sinks bias q_positions k_positions starts y logs grad "
    "grad_q grad_k grad_v grad_sinks grad_bias room parallel"
)


class _Call(ctypes.Structure):
    """The C code's `Call`."""

    _fields_ = (
        [(name, c_int64) for name in NUMBERS.split()]
        + [(f"{name}_steps", c_int64 * count) for name, count in STEPS.items()]
        + [(name, c_void_p) for name in POINTERS.split()]
    )


@functools.cache
def library(dtype: torch.dtype = torch.float32, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Return (the compiled code, ""), or (None, why it is missing).

    dtype: float32, or float64 in tests, as are further flags.
    """
    code, why = kernel(SOURCE, _Call, dtype == torch.float64, *flags)
    if code is not None:
        code.gptoss_room.restype = c_int64
    return code, why


def attend(
    owner, q_BHTD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, cache, starts_BT: Tensor | None
) -> Tensor | None:
    """Do what model_parts.Attention.attend does, [B, H, T, D]; None for what C lacks.

    That is dropout, dtypes other than float32, and a single query, for which it is not faster.
    owner: model_parts.Attention. cache: model_parts.Cache or None.
    """
    T, bias_HTS = q_BHTD.shape[2], owner.attention_bias
    floats = (q_BHTD, k_BGSD, v_BGSD, owner.sinks, bias_HTS)
    if T == 1 or any(x is not None and x.dtype != torch.float32 for x in floats):
        return None
    if (cache is not None and cache.per_row) or (owner.dropout and owner.training):
        return None
    if cache is None:
        q_positions_T = k_positions_S = torch.arange(T, device=q_BHTD.device)
    else:
        q_positions_T = cache.query_positions(T, q_BHTD.device)
        k_positions_S = cache.key_positions(owner.block, T)
    if bias_HTS is not None:
        start = 0 if cache is None else cache.length
        bias_HTS = bias_HTS[:, start : start + T]
        ring = cache is not None and cache.is_ring[owner.block]
        bias_HTS = bias_HTS[:, :, k_positions_S] if ring else bias_HTS[:, :, : start + T]
    return computed(
        *(q_BHTD, k_BGSD, v_BGSD, owner.sinks, bias_HTS),
        *(q_positions_T, k_positions_S, starts_BT, owner.window),
    )[0]


def computed(*given) -> tuple[Tensor, Tensor]:
    """Return what `attention` does, in the way that costs least."""
    return called(attention, _Attention, _forward, given)


@torch.library.custom_op("gptoss::attention", mutates_args=(), device_types="cpu")
def attention(
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    sinks_H: Tensor | None,
    bias_HTS: Tensor | None,
    q_positions_T: Tensor,
    k_positions_S: Tensor,
    starts_BT: Tensor | None,
    window: int,
) -> tuple[Tensor, Tensor]:
    """Return (y [B, H, T, D], base-2 logarithms of the softmax's sums [B, H, T]).

    The second is for the backward pass. All floats have one dtype, float32, or float64 in tests;
    positions and starts are int64.
    """
    return _forward(
        *(q_BHTD, k_BGSD, v_BGSD, sinks_H, bias_HTS),
        *(q_positions_T, k_positions_S, starts_BT, window),
    )


def _forward(q_BHTD: Tensor, *given) -> tuple[Tensor, Tensor]:
    call, held = _call(q_BHTD, *given)
    y_BHTD, logs_BHT = _outputs(q_BHTD)
    _set(call, held, y=y_BHTD, logs=logs_BHT)
    _run("forward", call, q_BHTD.dtype)
    return y_BHTD, logs_BHT


def _gradients(
    grad_BHTD: Tensor,
    y_BHTD: Tensor,
    logs_BHT: Tensor,
    q_BHTD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    sinks_H: Tensor | None,
    bias_HTS: Tensor | None,
    q_positions_T: Tensor,
    k_positions_S: Tensor,
    starts_BT: Tensor | None,
    window: int,
    bias_needed: bool,
) -> list[Tensor]:
    """Return the gradients of q, k, v, sinks and bias; empty ones for the last two if not there."""
    given = (q_BHTD, k_BGSD, v_BGSD, sinks_H, bias_HTS)
    call, held = _call(*given, q_positions_T, k_positions_S, starts_BT, window)
    grads = _empty_gradients(*given, bias_needed)
    _set(call, held, y=y_BHTD, logs=logs_BHT, grad=grad_BHTD)
    call.grad_q, call.grad_k, call.grad_v = (grad.data_ptr() for grad in grads[:3])
    if bias_needed:
        call.grad_bias = grads[4].zero_().data_ptr()
    sinks_BH = None if sinks_H is None else logs_BHT.new_empty(logs_BHT.shape[:2])
    _set(call, held, grad_sinks=sinks_BH)
    _run("backward", call, q_BHTD.dtype)
    if sinks_BH is not None:
        torch.sum(sinks_BH, dim=0, out=grads[3])
    return grads


_attention_backward = torch.library.custom_op(
    "gptoss::attention_backward", _gradients, mutates_args=(), device_types="cpu"
)


def _call(
    q_BHTD, k_BGSD, v_BGSD, sinks_H, bias_HTS, q_positions_T, k_positions_S, starts_BT, window
) -> tuple[_Call, list[Tensor]]:
    """Return what forward and backward have in common, and the tensors, which must live as long."""
    (B, H, T, D), (G, S) = q_BHTD.shape, k_BGSD.shape[1:3]
    call = _Call(B=B, T=T, S=S, H=H, G=G, D=D, window=window, threads=torch.get_num_threads())
    call.parallel = parallel_region()
    held: list[Tensor] = []
    _set(
        call,
        held,
        q=q_BHTD,
        k=k_BGSD,
        v=v_BGSD,
        sinks=sinks_H,
        bias=bias_HTS,
        q_positions=q_positions_T,
        k_positions=k_positions_S,
        starts=starts_BT,
    )
    return call, held


def _set(call: _Call, held: list[Tensor], **tensors: Tensor | None) -> None:
    """Give pointers to the C code, and steps where it takes any."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        count = STEPS.get(name, 0)
        if not count or tensor.stride(-1) != 1:
            tensor = tensor.contiguous()
        held.append(tensor)
        setattr(call, name, tensor.data_ptr())
        if count:
            setattr(call, f"{name}_steps", (c_int64 * count)(*tensor.stride()[:count]))


def _run(which: str, call: _Call, dtype: torch.dtype) -> None:
    code, why = library(dtype)
    if code is None:
        raise ValueError(why)
    count = code.gptoss_room(ctypes.byref(call), which == "backward")
    call.room = scratch.get("attention", count, dtype).data_ptr()
    getattr(code, f"gptoss_attention_{which}")(ctypes.byref(call))


# --------------------------------------------------------------------------------- for the compiler
def _outputs(q_BHTD: Tensor) -> tuple[Tensor, Tensor]:
    B, H, T, D = q_BHTD.shape
    # In memory as the output projection reads it.
    return q_BHTD.new_empty(B, T, H, D).transpose(1, 2), q_BHTD.new_empty(B, H, T)


def _empty_gradients(q_BHTD, k_BGSD, v_BGSD, sinks_H, bias_HTS, bias_needed) -> list[Tensor]:
    grads = [
        x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)
        for x in (q_BHTD, k_BGSD, v_BGSD)
    ]
    sinks = (0,) if sinks_H is None else sinks_H.shape
    bias = bias_HTS.shape if bias_needed else (0,)
    return [*grads, q_BHTD.new_empty(sinks), q_BHTD.new_empty(bias)]


@attention.register_fake
def _(q_BHTD, k, v, sinks, bias, q_positions, k_positions, starts, window):
    return _outputs(q_BHTD)


@_attention_backward.register_fake
def _(grad, y, logs, q, k, v, sinks, bias, q_positions, k_positions, starts, window, bias_needed):
    return _empty_gradients(q, k, v, sinks, bias, bias_needed)


def _save_for_backward(ctx, inputs, output):
    *tensors, ctx.window = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output, *tensors)


def _backward(ctx, grad_BHTD, _, gradients=_attention_backward):
    if grad_BHTD is None:
        return (None,) * 9
    needed = ctx.needs_input_grad[:5]
    grads = gradients(grad_BHTD, *ctx.saved_tensors, ctx.window, needed[4])
    return *(g if need else None for g, need in zip(grads, needed, strict=True)), *[None] * 4


attention.register_autograd(_backward, setup_context=_save_for_backward)
# Where no compiler is at work.
_Attention = eager_function(
    "_Attention", _forward, _save_for_backward, functools.partial(_backward, gradients=_gradients)
)
