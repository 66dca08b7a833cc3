"""Cross-entropy of a linear layer in C, on a CPU in float32: runtime/kernels/loss.c.

runtime/kernels/linear_cross_entropy.py asks it, and does without it where there is no compiler. The
results are the same except for rounding.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.compile import kernel, parallel_region
from runtime.kernels.eager import is_eager_float32
from runtime.kernels.scratch import scratch

SOURCE = Path(__file__).with_name("loss.c")
POINTERS = "parallel h weight bias targets losses grad_h grad_weight grad_bias logits rooms"


class _Loss(ctypes.Structure):
    """The C code's `Loss`."""

    _fields_ = (
        [(name, c_int64) for name in ("N", "C", "V", "chunk", "ignore")]
        + [("threads", c_int32), ("unused", c_int32)]
        + [(name, c_void_p) for name in POINTERS.split()]
        + [(name, c_int64) for name in ("room_size", "first", "count")]
    )


@functools.cache
def library(dtype: torch.dtype = torch.float32, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Return (the compiled code, ""), or (None, why it is missing).

    dtype: float32, or float64 in tests, as are further flags.
    """
    return kernel(SOURCE, _Loss, dtype == torch.float64, *flags, gptoss_room=1)


def summed_loss(
    h_NC: Tensor,
    weight_VC: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    chunk_rows: int,
    ignore: int,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Return (summed cross-entropy, 0-dim; its gradients of h, weight and bias).

    All floats in one dtype that `library` has. needed: which gradients are wanted; the others are
    None. chunk_rows: rows whose logits are held. ValueError for a target that is no id.
    """
    dtype, (N, C), V = h_NC.dtype, h_NC.shape, len(weight_VC)
    code, why = library(dtype)
    if code is None:
        raise ValueError(why)
    empty = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)
    grads = [
        empty(t) if need and t is not None else None
        for t, need in zip((h_NC, weight_VC, bias_V), needed, strict=True)
    ]
    chunk = max(1, min(chunk_rows, N))
    job = _Loss(N=N, C=C, V=V, chunk=chunk, ignore=ignore)
    job.threads, job.parallel = torch.get_num_threads(), parallel_region()
    job.room_size = code.gptoss_room(chunk)
    losses_N = torch.empty(N, dtype=torch.float64)
    tensors = dict(
        h=h_NC.contiguous(),
        weight=weight_VC.contiguous(),
        bias=None if bias_V is None else bias_V.contiguous(),
        targets=targets_N.contiguous(),
        losses=losses_N,
        grad_h=grads[0],
        grad_weight=grads[1],
        grad_bias=grads[2],
        logits=torch.empty(chunk * V, dtype=dtype),
        rooms=scratch.get("rooms", job.threads * job.room_size, dtype),
    )
    for name, tensor in tensors.items():
        if tensor is not None:
            setattr(job, name, tensor.data_ptr())
    if N == 0:
        for grad in grads:
            if grad is not None:
                grad.zero_()
    if code.gptoss_loss(ctypes.byref(job)):
        raise ValueError(
            f"a target is neither an id from 0 to {V - 1} nor {ignore}, which is not counted"
        )
    # Here the losses are added in float64, in the rows' order.
    return losses_N.sum().to(dtype), grads


def takes(*tensors: Tensor | None) -> bool:
    """Return whether `summed_loss` can read these tensors: in float32, in a CPU's memory."""
    return is_eager_float32(*tensors) and library()[0] is not None
