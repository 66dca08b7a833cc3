"""RMSNorm and the rotation of heads in C, on a CPU in float32: runtime/kernels/norms.c.

PyTorch makes either of half a dozen operations, each of which reads and writes all numbers, in both
passes. The machine's own compiler compiles the C code (runtime/kernels/compile.py). What it lacks,
and a compiled model, whose compiler fuses the same, is left to the modules' own operations, whose
results are the same except for rounding. runtime/kernels/choose.py puts these functions into
`RMSNorm.kernel` and `Attention.turn_kernel`.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_double, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.compile import kernel, parallel_region
from runtime.kernels.eager import is_eager_float32, once_differentiable
from runtime.kernels.scratch import scratch

SOURCE = Path(__file__).with_name("norms.c")
NUMBERS = "R n T H threads task_rows"
POINTERS = "parallel x weight cos sin grad y scales grad_x grad_weight sums"


class _Rows(ctypes.Structure):
    """The C code's `Rows`."""

    _fields_ = (
        [(name, c_int64) for name in NUMBERS.split()]
        + [("eps", c_double)]
        + [(name, c_void_p) for name in POINTERS.split()]
    )


@functools.cache
def library(dtype: torch.dtype = torch.float32, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Return (the compiled code, ""), or (None, why it is missing).

    dtype: float32, or float64 in tests, as are further flags.
    """
    return kernel(SOURCE, _Rows, dtype == torch.float64, *flags, gptoss_task_rows=1)


def rms_norm(norm, x: Tensor) -> Tensor | None:
    """Do what nn.RMSNorm does, in x's shape; None for what C lacks.

    norm: the module, whose weight has the length of x's last axis.
    """
    weight = norm.weight
    if weight is None or weight.shape != x.shape[-1:] or not is_eager_float32(x, weight):
        return None
    return rows(x, weight, None, norm.eps)


def turn(x_BHTD: Tensor, norm, rope: tuple[Tensor, Tensor] | None) -> Tensor | None:
    """Do what model_parts.Attention.turned does, [B, H, T, D]; None for what C lacks.

    That is a dtype other than float32, a norm without a weight, and positions that differ from row
    to row. norm: nn.RMSNorm of a head, or None.
    """
    weight, eps = (None, 0.0) if norm is None else (norm.weight, norm.eps)
    if norm is not None and weight is None:
        return None
    if not is_eager_float32(x_BHTD, weight, *(rope or ())):
        return None
    if rope is not None and any(t.shape != x_BHTD.shape[2:] for t in rope):
        return None
    if rope is None and norm is None:
        return x_BHTD
    return rows(x_BHTD.transpose(1, 2), weight, rope, eps).transpose(1, 2)


def rows(
    x: Tensor, weight_N: Tensor | None, rope: tuple[Tensor, Tensor] | None, eps: float | None
) -> Tensor:
    """Return x [..., N] normed by its root mean square and a weight, and rotated.

    rope: (cos, sin), each [T, N], of x [B, T, H, N]; one of the two may be None. All have one dtype
    that `library` has. eps: None is the dtype's machine epsilon.
    """
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _NormAndTurn.apply(x, weight_N, *(rope or (None, None)), eps)


class _NormAndTurn(torch.autograd.Function):
    """`rows`, with gradients of x and of the weight."""

    @staticmethod
    def forward(ctx, x, weight, cos, sin, eps):
        x, ctx.eps = x.contiguous(), eps
        y = torch.empty_like(x)
        scales = None if weight is None else x.new_empty(x.numel() // x.shape[-1])
        _run("forward", x, eps, weight=weight, cos=cos, sin=sin, y=y, scales=scales)
        # A rotation alone needs no x.
        ctx.save_for_backward(None if weight is None else x, weight, cos, sin, scales)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, cos, sin, scales = ctx.saved_tensors
        grad = grad.contiguous()
        given = dict(weight=weight, cos=cos, sin=sin, scales=scales, grad=grad)
        grad_x, grad_weight = torch.empty_like(grad), None
        if weight is not None and ctx.needs_input_grad[1]:
            grad_weight = torch.empty_like(weight)
        given |= dict(grad_x=grad_x, grad_weight=grad_weight)
        _run("backward", grad if x is None else x, ctx.eps, **given)
        return grad_x, grad_weight, None, None, None


def _run(which: str, x: Tensor, eps: float, **tensors: Tensor | None) -> None:
    code, why = library(x.dtype)
    if code is None:
        raise ValueError(why)
    n = x.shape[-1]
    job = _Rows(
        R=x.numel() // max(n, 1), n=n, T=1, H=1, eps=eps, task_rows=code.gptoss_task_rows(n)
    )
    if tensors["cos"] is not None:
        job.T, job.H = x.shape[1:3]
    job.threads, job.parallel = torch.get_num_threads(), parallel_region()
    if which == "backward" and tensors["weight"] is not None:
        tasks = -(-job.R // job.task_rows)
        tensors["sums"] = scratch.get("norms", tasks * n, x.dtype)
    for name, tensor in dict(tensors, x=x).items():
        if tensor is not None:
            setattr(job, name, tensor.data_ptr())
    getattr(code, f"gptoss_norms_{which}")(ctypes.byref(job))
