"""Newton-Schulz steps in C, on a CPU in float32: runtime/kernels/newton_schulz.c.

runtime/training/muon.py asks it. The results are those of its products except for rounding.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from ctypes import c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from runtime.kernels.compile import kernel, parallel_region
from runtime.kernels.eager import is_eager_float32
from runtime.kernels.scratch import scratch

SOURCE = Path(__file__).with_name("newton_schulz.c")
# Numbers of a matrix up to which a thread takes a whole one. Of a larger one, with what comes of
# it, nothing would stay in a core's cache, and PyTorch shares each product among all threads.
LARGEST = 1 << 16


class _Matrices(ctypes.Structure):
    """The C code's `Matrices`."""

    _fields_ = (
        [(name, c_int64) for name in ("N", "R", "C", "steps")]
        + [(name, c_void_p) for name in ("x", "factors", "rooms")]
        + [("room_size", c_int64), ("parallel", c_void_p), ("threads", c_int64)]
    )


@functools.cache
def library(dtype: torch.dtype = torch.float32, *flags: str) -> tuple[ctypes.CDLL | None, str]:
    """Return (the compiled code, ""), or (None, why it is missing).

    dtype: float32, or float64 in tests, as are further flags.
    """
    return kernel(SOURCE, _Matrices, dtype == torch.float64, *flags, gptoss_room=2)


def takes(matrices_NRC: Tensor) -> bool:
    """Return whether `steps_` does these matrices: on a CPU, in float32, not too large."""
    N, R, C = matrices_NRC.shape
    fits = N > 0 and R * C <= LARGEST
    return fits and is_eager_float32(matrices_NRC) and library()[0] is not None


def steps_(matrices_NRC: Tensor, factors: Sequence[tuple[float, float, float]]) -> Tensor:
    """Return a X + (b X X' + c (X X')^2) X of each matrix, one step after another, [N, R, C].

    factors: (a, b, c) of each step. The matrices are used up. Each is computed alone, in one order.
    """
    N, R, C = matrices_NRC.shape
    tall = R > C
    # The products are of the shorter side.
    x = (matrices_NRC.mT if tall else matrices_NRC).contiguous()
    code, why = library(x.dtype)
    if code is None:
        raise ValueError(why)
    numbers = torch.tensor(factors, dtype=torch.float64).to(x.dtype).contiguous()
    job = _Matrices(N=N, R=x.shape[1], C=x.shape[2], steps=len(factors))
    job.threads, job.parallel = torch.get_num_threads(), parallel_region()
    job.room_size = code.gptoss_room(job.R, job.C)
    rooms = scratch.get("rooms", job.threads * job.room_size, x.dtype)
    job.x, job.factors, job.rooms = x.data_ptr(), numbers.data_ptr(), rooms.data_ptr()
    code.gptoss_newton_schulz(ctypes.byref(job))
    return x.mT if tall else x
